"""Functions with a derivative of their own, evaluated with equations in them replaced; the derivative stays theirs."""

from typing import Any

import jax

from qjax import _jaxpr


def custom_jvp_call(eqn, plans, operands, key):
    """Returns the results of a ``jax.custom_jvp`` function, the jaxpr of its value being replaced."""
    (plan,) = plans["call_jaxpr"]
    return _with_tangents(eqn, lambda key, *args: _jaxpr.run(eqn.params["call_jaxpr"], plan, args, key), operands, key)


def custom_linear_solve(eqn, plans, operands, key):
    """Returns the results of a ``jax.lax.custom_linear_solve``, the jaxpr of its solution being replaced."""
    jaxprs, lengths = eqn.params["jaxprs"], eqn.params["const_lengths"]
    given = [name for name in jaxprs._fields if getattr(jaxprs, name) is not None]
    plan = plans["jaxprs"][given.index("solve")]
    start = sum(getattr(lengths, name) for name in jaxprs._fields[: jaxprs._fields.index("solve")])
    end, right = start + lengths.solve, sum(lengths)

    def value(key, *args):
        return _jaxpr.run(jaxprs.solve, plan, [*args[start:end], *args[right:]], key)

    return _with_tangents(eqn, value, operands, key)


def custom_vjp_call(eqn, plans, operands, key):
    """Returns the results of a ``jax.custom_vjp`` function, the jaxpr of its value being replaced."""
    (name, (plan,)) = next(iter(plans.items()))

    @jax.custom_vjp
    def fn(key, *args):
        return _jaxpr.run(eqn.params[name], plan, args, key)

    def forward(key, *args):
        return fn(key, *args), args

    def backward(args, gradients):
        return None, *jax.vjp(_original(eqn), *args)[1](gradients)

    fn.defvjp(forward, backward)
    return fn(key, *operands)


def _with_tangents(eqn, value, operands, key):
    fn = jax.custom_jvp(value)

    @fn.defjvp
    def rule(primals, tangents):
        return fn(*primals), jax.jvp(_original(eqn), primals[1:], tangents[1:])[1]

    return fn(key, *operands)


def _original(eqn):
    def fn(*args) -> list[Any]:
        return eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))

    return fn


ENTER = {
    "custom_jvp_call": custom_jvp_call,
    "custom_linear_solve": custom_linear_solve,
    "custom_vjp_call": custom_vjp_call,
}
