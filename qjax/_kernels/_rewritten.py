"""Functions without the operations that a compiler of kernels does not have."""

from collections.abc import Callable, Mapping

import jax
from jax.extend.core import Primitive

from qjax._jaxpr import is_literal


def rewritten(fn: Callable, rules: Mapping[Primitive, Callable]) -> Callable:
    """Returns a function of arrays with other operations in the place of some of its primitive ones.

    Args:
      rules: by primitive, what makes the result of its operands, or None to leave it as it is.
    """

    def run(jaxpr, consts, args) -> list:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        read = lambda v: v.val if is_literal(v) else values[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            rule = rules.get(eqn.primitive)
            if "jaxpr" in eqn.params:
                inner = eqn.params["jaxpr"]
                results = run(inner.jaxpr, inner.consts, operands)
            elif rule is not None and (result := rule(*operands)) is not None:
                results = [result]
            else:
                results = eqn.primitive.bind(*operands, **eqn.params)
                results = results if eqn.primitive.multiple_results else [results]
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def call(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), run(closed.jaxpr, closed.consts, jax.tree.leaves(args)))

    return call
