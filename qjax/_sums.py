"""Sums of many terms with a rounding after every addition: one after the other, or in pairs."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from qjax import _operand, _rows
from qjax._jaxpr import folded

Binary = Callable[..., jax.Array]
"""A rounded operation of two arrays and a key, ``(a, b, key) -> Array``."""

ORDERS = ("once", "sequential", "pairwise")


def total(terms, operation: Binary, order: str, key):
    """Returns the sum of the terms along the first axis, of which there is at least one.

    Args:
      order: "sequential", ``((t0 + t1) + t2) + ...``; or "pairwise": neighbours are added, then neighbours of these
        sums, and so on; an odd one at the end waits.
    """
    if order == "sequential":

        def step(sum_, term):
            place, term = term
            return operation(sum_, term, folded(key, place)), None

        return lax.scan(step, terms[0], (jnp.arange(1, len(terms)), terms[1:]))[0]
    for level in itertools.count():
        if len(terms) == 1:
            return terms[0]
        pairs, odd = terms[: len(terms) // 2 * 2], terms[len(terms) // 2 * 2 :]
        sums = jnp.concatenate([operation(pairs[::2], pairs[1::2], folded(key, level)), odd])
        # Fused, each sum would be computed again for each element of the next level: XLA takes minutes to compile that.
        terms = lax.optimization_barrier(sums)


def totals(terms, operation: Binary, order: str, key, *, axis: int, reverse: bool):
    """Returns the sums of the first term, the first two terms, and so on, along an axis."""
    if order == "pairwise":
        number = itertools.count()
        fn = lambda a, b: operation(a, b, folded(key, next(number)))  # noqa: E731
        return lax.associative_scan(fn, terms, reverse=reverse, axis=axis)
    terms = jnp.moveaxis(terms, axis, 0)
    if len(terms) == 0:
        return jnp.moveaxis(terms, 0, axis)
    first, rest = (terms[-1:], terms[:-1]) if reverse else (terms[:1], terms[1:])

    def step(sum_, term):
        place, term = term
        sum_ = operation(sum_, term, folded(key, place))
        return sum_, sum_

    sums = lax.scan(step, first[0], (jnp.arange(len(rest)), rest), reverse=reverse)[1]
    return jnp.moveaxis(jnp.concatenate([sums, first] if reverse else [first, sums]), 0, axis)


def product(equation, lhs, rhs, add: Binary, multiply: Binary, order: str, key):
    """Returns the dot product or convolution of an equation, products and sums rounded one by one."""
    dtype = equation.outvars[0].aval.dtype
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    if equation.primitive is lax.dot_general_p:
        x, y, output = _rows.dot_rows(equation, lhs, rhs)
    else:
        x, y, output = _rows.conv_rows(equation, lhs, rhs)
    if x.shape[-1] == 0:
        return output(jnp.zeros((*x.shape[:2], y.shape[1]), dtype))
    keys = [folded(key, i) for i in range(2)]
    if order == "sequential":

        def step(sum_, terms):
            place, x, y = terms
            part = multiply(*jnp.broadcast_arrays(x[:, :, None], y[:, None, :]), folded(keys[0], place))
            return jnp.where(place == 0, part, add(sum_, part, folded(keys[1], place))), None

        places = jnp.arange(x.shape[-1])
        start = jnp.zeros((*x.shape[:2], y.shape[1]), dtype)
        out, _ = lax.scan(step, start, (places, jnp.moveaxis(x, -1, 0), jnp.moveaxis(y, -1, 0)))
        return output(out)

    def row(terms):
        place, x = terms
        parts = multiply(*jnp.broadcast_arrays(x[:, None, :], y), folded(keys[0], place))
        return total(jnp.moveaxis(parts, -1, 0), add, order, folded(keys[1], place))

    # The products of as many rows at once as fit a cache or two.
    batch = max(2**20 // max(math.prod(y.shape), 1), 1)
    rows = (jnp.arange(x.shape[1]), jnp.moveaxis(x, 1, 0))
    return output(jnp.moveaxis(lax.map(row, rows, batch_size=batch), 0, 1))


def windows(x, params: dict, empty):
    """Returns the terms of a ``reduce_window``: the places of a window, then the windows.

    Args:
      empty: what an array is padded with.
    """
    padding = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["base_dilation"], strict=True)]
    x = lax.pad(x, empty, padding)
    options = zip(params["window_dimensions"], params["window_strides"], params["window_dilation"], strict=True)
    for axis, (window, stride, dilation) in enumerate(options):
        x = _operand.windows(x, 2 * axis, window, stride, dilation)
    x = jnp.moveaxis(x, range(1, x.ndim, 2), range(x.ndim // 2))
    return x.reshape(math.prod(params["window_dimensions"]), *x.shape[x.ndim // 2 :])
