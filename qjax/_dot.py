"""``dot_general`` and ``conv_general_dilated`` with every operand of the product and of its gradients in a format."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array

from qjax import _carrier
from qjax._encode import QTensor, decode, is_qtensor
from qjax._jaxpr import is_literal
from qjax._mesh import has_explicit_axes, in_auto_axes
from qjax._operand import Operand, restored, stored
from qjax._product import product, rotated, swapped
from qjax._quantizer import Quantizer
from qjax._recipe import TENSORS, Gemm, Recipe
from qjax._rows import axes_of
from qjax._sites import marked
from qjax._split import names_of, split_of
from qjax._stored import Followed


def dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    *,
    recipe: Recipe | None,
    key: Array | None = None,
    state: dict[str, Array] | None = None,
    out_sharding=None,
) -> Array:
    """Returns ``jax.lax.dot_general(lhs, rhs, ...)`` with the operands of all three products rounded as a recipe says.

    Each product rounds its operands in blocks along its own contraction. Scales that are constant along it multiply the
    result; other scales multiply the elements. The elements are multiplied in the narrowest of int8, bfloat16 and their
    own dtype that holds both operands exactly, and summed in int32 or float32, or as the accumulator says.

    Args:
      lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding: as in ``jax.lax.dot_general``. A
        ``precision`` that names an algorithm keeps the operands in their own dtype. An operand may be a ``QTensor``:
        in the format of the recipe its codes are what is multiplied, in another one its values are rounded.
      recipe: a ``Recipe``; an empty one or None is ``jax.lax.dot_general``, bit for bit, gradients included.
      key: the PRNG key of a stochastic recipe. Each operand gets its own.
      state: that of a recipe with delayed scaling (``Recipe.init``).

    Gradient: in reverse mode, once, the products ``dlhs`` and ``drhs`` of the recipe. Forward mode is refused by JAX.
    The "gradient" of the state is the next state, for only the backward pass sees the gradient of the result.

    Raises:
      TypeError, ValueError: for a missing key, a key that nothing would use, and as ``chop`` does.

    >>> import jax.numpy as jnp, qjax
    >>> int8 = qjax.Quantizer("int8_channel")
    >>> recipe = qjax.Recipe(qjax.Gemm(int8, int8))
    >>> x, w = jnp.ones((2, 3), jnp.float32), jnp.full((3, 1), 0.5, jnp.float32)
    >>> qjax.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe)
    Array([[1.5],
           [1.5]], dtype=float32)
    """
    options = dict(dimension_numbers=dimension_numbers, precision=precision)
    options |= dict(preferred_element_type=preferred_element_type, out_sharding=out_sharding)
    return linear("dot_general", lax.dot_general, lhs, rhs, options, recipe, key, state)


def conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision=None,
    preferred_element_type=None,
    *,
    recipe: Recipe | None,
    key: Array | None = None,
    state: dict[str, Array] | None = None,
) -> Array:
    """Returns ``jax.lax.conv_general_dilated(lhs, rhs, ...)`` with all three products rounded as a recipe says.

    Everything is as in ``dot_general``. Blocks lie along the input features, within a group; "axis" blocks of the
    kernel span all that an output feature is summed over. The gradients are convolutions too, in which the batch may
    be the features: blocks then lie along it. A rotation is along the features.

    Raises:
      TypeError, ValueError: as ``dot_general``; for a rotation that a convolution cannot undo.

    >>> import jax.numpy as jnp, qjax
    >>> recipe = qjax.Recipe(qjax.Gemm(qjax.Quantizer("e4m3"), qjax.Quantizer("e4m3")))
    >>> x, w = jnp.full((1, 1, 4), 0.3, jnp.float32), jnp.ones((1, 1, 3), jnp.float32)
    >>> qjax.conv_general_dilated(x, w, (1,), "VALID", recipe=recipe)
    Array([[[0.9375, 0.9375]]], dtype=float32)
    """
    options = dict(window_strides=window_strides, padding=padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation)
    options |= dict(dimension_numbers=dimension_numbers, feature_group_count=feature_group_count)
    options |= dict(batch_group_count=batch_group_count, precision=precision)
    options |= dict(preferred_element_type=preferred_element_type)
    return linear("conv_general_dilated", lax.conv_general_dilated, lhs, rhs, options, recipe, key, state)


_FLOATS = frozenset(map(np.dtype, (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)))


def linear(caller: str, operation, lhs, rhs, options: dict, recipe: Recipe | None, key, state, implementation=None):
    """Returns an operation of lax with its products as a recipe has them, in an implementation, if one is named."""
    if recipe is None:
        recipe = Recipe()
    if not isinstance(recipe, Recipe):
        raise TypeError(f"{caller}: recipe must be a qjax.Recipe or None, got {recipe!r}.")
    if recipe.is_stochastic and key is None:
        raise ValueError(f"{caller}: the recipe is stochastic; give key=jax.random.key(...).")
    if key is not None and not recipe.is_stochastic:
        raise ValueError(f"{caller}: key was given, but nothing in the recipe is stochastic; leave key out.")
    if (recipe.history is None) != (state is None):
        what = "needs state=recipe.init()" if state is None else "has no delayed scaling; leave state out"
        raise ValueError(f"{caller}: the recipe {what}.")
    codes = tuple(_stored_in(x) for x in (lhs, rhs))
    lhs, rhs = (x.value if isinstance(x, Followed) else decode(x) if is_qtensor(x) else x for x in (lhs, rhs))
    if recipe.is_empty:
        return operation(lhs, rhs, **options)
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"{caller}: {name} must be an array, got a {type(x).__name__}; use jax.numpy.asarray.")
        if x.dtype not in _FLOATS:
            raise TypeError(
                f"{caller}: {name} has dtype {x.dtype}; only float32, float64, bfloat16 and float16 can be quantized."
            )
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise TypeError(
                f"{caller}: {name} is a {x.dtype} NumPy array, which JAX would first round to 32 bits; convert it "
                "yourself, x.astype(numpy.float32), or set jax_enable_x64."
            )
    static = Static(operation, settings(options), recipe, (lhs.dtype, rhs.dtype), implementation)
    traced = any(isinstance(x, Tracer) for x in (lhs, rhs))
    if not traced and not any(map(has_explicit_axes, (lhs, rhs))):
        return _product(static, lhs, rhs, key, state, codes)
    program = jax.make_jaxpr(static.product)(lhs, rhs)
    # On a mesh with explicit axes the sharding is asked of the result as a whole, not of the product within.
    static = static._replace(options=settings(options | ({"out_sharding": None} if "out_sharding" in options else {})))
    with marked(program.jaxpr.eqns[-1], recipe) if traced else contextlib.nullcontext():
        run = functools.partial(_product, static)
        return in_auto_axes(run, program.out_avals[0].sharding, lhs, rhs, key, state, codes)


def _stored_in(x) -> Followed | None:
    """Returns what an operand is read from, None if it is an array that comes from anywhere."""
    if is_qtensor(x):
        return Followed(None, x, tuple(range(len(x.shape))))
    return Followed(None, x.source, x.order) if isinstance(x, Followed) else None


def settings(options: dict[str, Any]) -> tuple:
    """Returns the options of an operation as a value that can be hashed."""
    return tuple((name, _frozen(value)) for name, value in options.items())


def _frozen(value):
    """Returns an option in which lists are tuples, so that it can be hashed; named tuples stay what they are."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(map(_frozen, value))
    return value


class Static(NamedTuple):
    """What of a product is static."""

    operation: Callable
    options: tuple
    recipe: Recipe
    dtypes: tuple
    implementation: str | None = None

    def product(self, lhs, rhs):
        return self.operation(lhs, rhs, **dict(self.options))

    def transpose(self, place: int, gradient, other, mine):
        """Returns the gradient of an operand, lhs (0) or rhs (1), as lax has it."""
        linear = (lambda x: self.product(x, other)) if place == 0 else (lambda x: self.product(other, x))
        return jax.linear_transpose(linear, mine)(gradient)[0]


# The numbers of the products: their operands have the keys 0 to 5.
_FORWARD, _DLHS, _DRHS = 0, 1, 2
_TENSORS = tuple(TENSORS.values())


def given_to(key, state, number: int, gemm: Gemm, codes: tuple = (None, None)) -> dict[str, Any]:
    """Returns what a product is given: the keys of its stochastic parts, delayed scales, the codes of its operands."""
    numbers = {"lhs": 2 * number, "rhs": 2 * number + 1, "accumulator": 6 + number, "rotate": 9 + number}
    numbers |= {"rotate_lhs": 12 + 2 * number, "rotate_rhs": 13 + 2 * number}
    parts = {name: getattr(gemm, name) for name in numbers}
    given: dict[str, Any] = {
        name: jax.random.fold_in(key, numbers[name]) if part is not None and part.is_stochastic else None
        for name, part in parts.items()
    }
    for name, tensor in zip(("lhs", "rhs"), _TENSORS[number], strict=True):
        quantizer = getattr(gemm, name)
        given[f"{name}_scale"] = None
        if state is not None and quantizer is not None:
            largest = jnp.max(state[tensor])
            # A quotient by a constant would be a product with its reciprocal, which is rounded twice.
            scale = _carrier.divide(largest, lax.optimization_barrier(np.float32(quantizer.fmt.element.max)))
            given[f"{name}_scale"] = jnp.where((largest > 0) & jnp.isfinite(scale), scale, np.float32(1))
    return given | dict(zip(("lhs_stored", "rhs_stored"), codes, strict=True))


def _recorded(history, x, quantizer: Quantizer | None):
    """Returns a history with the largest magnitude of an array before all others, and the last one gone."""
    largest = jnp.max(jnp.abs(x)).astype(history.dtype)
    names = names_of(split_of("Quantizer", quantizer.spec, x.ndim)) if quantizer is not None else ()
    largest = lax.pmax(largest, names) if names else largest
    return jnp.concatenate([largest[None], history[:-1]])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: Static, lhs, rhs, key, state, codes):
    return _product_forward(static, lhs, rhs, key, state, codes)[0]


def _product_forward(static: Static, lhs, rhs, key, state, codes):
    out, kept, recorded = _quantized_product(static, lhs, rhs, key, state, codes)
    # What is saved as it is does not pass the jit: a scan then knows it for its own input, and keeps no copy.
    residuals = [(x if saved is None else saved, slope) for x, (saved, slope) in zip((lhs, rhs), kept, strict=True)]
    return out, (*residuals, key, state, recorded)


@functools.partial(jax.jit, static_argnums=0)
def _quantized_product(static: Static, lhs, rhs, key, state, codes):
    """Returns the product, (what is saved in the place of it, its slope) for each operand, and the next histories."""
    recipe, gemm = static.recipe, static.recipe.forward
    operands: list[Operand] = []
    given = given_to(key, state, _FORWARD, gemm, codes) | {"implementation": static.implementation}
    out = _evaluate(jax.make_jaxpr(static.product)(lhs, rhs), gemm, lhs, rhs, given, operands)
    kept = []
    for place, (x, save) in enumerate(((lhs, recipe.save_lhs), (rhs, recipe.save_rhs))):
        saved = None
        if save == "quantized":
            saved = stored(operands[place])
        elif isinstance(save, Quantizer):
            number = jax.random.fold_in(key, 18 + place) if save.is_stochastic else None
            saved, _ = save.encode(x, key=number)
        kept.append((saved, operands[place].slope))
    named = (("lhs", lhs, gemm.lhs), ("rhs", rhs, gemm.rhs))
    recorded = state and {name: _recorded(state[name], x, quantizer) for name, x, quantizer in named}
    return out, kept, recorded


@jax.custom_jvp
def _undifferentiated(x):
    """Returns an argument of a gradient, which refuses to be differentiated: the derivative of rounding is no 0."""
    return x


@_undifferentiated.defjvp
def _undifferentiated_jvp(primals, tangents):
    raise NotImplementedError(
        "dot_general, conv_general_dilated: the gradient of a quantized product cannot be differentiated again; "
        "take second derivatives with an empty recipe."
    )


@functools.partial(jax.jit, static_argnums=0)
def _product_backward(static: Static, residuals, gradient):
    (lhs, lhs_slope), (rhs, rhs_slope), key, state, recorded = residuals
    recipe, forward = static.recipe, static.recipe.forward
    saves = (recipe.save_lhs, recipe.save_rhs)
    lhs, rhs = (_undifferentiated(_loaded(x, dtype)) for x, dtype in zip((lhs, rhs), static.dtypes, strict=True))
    gradient = _undifferentiated(gradient)
    to_lhs = jax.make_jaxpr(functools.partial(static.transpose, 0, mine=lhs))(gradient, rhs)
    to_rhs = jax.make_jaxpr(functools.partial(static.transpose, 1, mine=rhs))(gradient, lhs)
    dlhs = _evaluate(to_lhs, recipe.dlhs, gradient, rhs, given_to(key, state, _DLHS, recipe.dlhs))
    # The transpose takes (gradient, lhs), the recipe says (lhs, gradient).
    given = swapped(given_to(key, state, _DRHS, recipe.drhs))
    drhs = _evaluate(to_rhs, recipe.drhs.swapped(), gradient, lhs, given)
    axes = axes_of(jax.make_jaxpr(static.product)(lhs, rhs).jaxpr.eqns[-1])
    given = given_to(key, None, _FORWARD, forward)
    results = []
    for place, (x, slope, where) in enumerate(zip((dlhs, drhs), (lhs_slope, rhs_slope), axes, strict=True)):
        # The gradient of an operand is that of the rotated one if it met the other operand rotated. The slope is that
        # of the rotated operand too, in all its axes; one that is straight-through commutes with the rotations.
        met_rotated = saves[1 - place] == "quantized"
        turn = forward.rotate if met_rotated or slope is not None else None
        turned = x if met_rotated else rotated(x, turn, where, given["rotate"])
        if slope is not None:
            name = ("rotate_lhs", "rotate_rhs")[place]
            free = functools.partial(rotated, rotation=getattr(forward, name), axes=where, key=given[name], free=True)
            turned = free(free(turned) * slope.astype(x.dtype), inverse=True)
        results.append(rotated(turned, turn, where, given["rotate"], inverse=True))
    following = recorded and recorded | {"gradient": _recorded(state["gradient"], gradient, recipe.dlhs.lhs)}
    return *results, None, following, None


_product.defvjp(_product_forward, _product_backward)


def _loaded(saved, dtype):
    """Returns what was saved of an operand as an array."""
    if isinstance(saved, Operand):
        return restored(saved, dtype)
    return decode(saved) if isinstance(saved, QTensor) else saved


def _evaluate(program, gemm: Gemm, first, second, given: dict, kept: list | None = None):
    """Returns the value of a jaxpr of two arguments that has one product, as a Gemm has it.

    Args:
      gemm: its lhs is what derives from the first argument.
      kept: gets the operands of the product, with their slopes, if given.
    """

    def perform(equation, lhs, rhs, swap: bool):
        mine = (gemm.swapped(), swapped(given)) if swap else (gemm, given)
        return product(equation, mine[0], lhs, rhs, mine[1], kept)

    return with_product(program, perform, first, second)


def with_product(program, perform: Callable, first, second):
    """Returns the value of a jaxpr of two arguments, its product by ``perform(equation, lhs, rhs, swap)``.

    Swap says whether the lhs of the product derives from the second argument.
    """
    jaxpr = program.jaxpr
    values, of_first = dict(zip(jaxpr.invars, (first, second), strict=True)), {jaxpr.invars[0]}
    for equation in jaxpr.eqns:
        operands = [v.val if is_literal(v) else values[v] for v in equation.invars]
        variables = [v for v in equation.invars if not is_literal(v)]
        of_first |= set(equation.outvars) if of_first & set(variables) else set()
        if equation.primitive in (lax.dot_general_p, lax.conv_general_dilated_p):
            lhs, rhs = operands
            result = perform(equation, lhs, rhs, equation.invars[0] not in of_first)
        else:
            result = equation.primitive.bind(*operands, **equation.params)
        values[equation.outvars[0]] = result
    last = jaxpr.outvars[0]
    return last.val if is_literal(last) else values[last]
