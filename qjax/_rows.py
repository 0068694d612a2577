"""A ``dot_general`` or a convolution as a product of rows: ``(b, m, k) x (b, n, k) -> (b, m, n)``."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _operand, _stored
from qjax._stored import Axes


def axes_of(equation) -> tuple[Axes, Axes]:
    """Returns the axes of the two operands of a product."""
    ranks = tuple(v.aval.ndim for v in equation.invars)
    return axes_of_numbers(equation.primitive.name, equation.params["dimension_numbers"], ranks)


def axes_of_numbers(operation: str, numbers, ranks: tuple[int, ...]) -> tuple[Axes, Axes]:
    """Returns the axes of the two operands of an operation of lax, with its dimension numbers and their ranks."""
    if operation == "dot_general":
        contract, batch = numbers
        free = [
            tuple(a for a in range(rank) if a not in (*c, *b))
            for rank, c, b in zip(ranks, contract, batch, strict=True)
        ]
        return Axes(contract[0], batch[0], free[0]), Axes(contract[1], batch[1], free[1])
    lhs, rhs = numbers.lhs_spec, numbers.rhs_spec
    return Axes((lhs[1],), (), (lhs[0], *lhs[2:])), Axes((*rhs[2:], rhs[1]), (), (rhs[0],), block=rhs[1])


def dot_rows(equation, lhs, rhs):
    """Returns the operands of a ``dot_general`` as (b, m, k) and (b, n, k), and what brings (b, m, n) to its result."""
    axes = axes_of(equation)
    batch = [lhs.shape[a] for a in axes[0].batch]
    free = [[x.shape[a] for a in w.free] for x, w in zip((lhs, rhs), axes, strict=True)]
    rows = []
    for x, w, mine in zip((lhs, rhs), axes, free, strict=True):
        depth = math.prod(x.shape[a] for a in w.contract)
        rows.append(_stored.to_rows(x, w).reshape(math.prod(batch), math.prod(mine), depth))
    return *rows, lambda out: out.reshape(*batch, *free[0], *free[1])


def conv_rows(equation, lhs, rhs):
    """Returns patches (b, m, k) and kernels (b, n, k) of a convolution, and what brings (b, m, n) to its result."""
    p, numbers = equation.params, equation.params["dimension_numbers"]
    x, kernel = lax.transpose(lhs, numbers.lhs_spec), lax.transpose(rhs, numbers.rhs_spec)
    padding = [(0, 0, 0), (0, 0, 0)]
    padding += [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = lax.pad(x, x.dtype.type(0), padding)
    sizes = kernel.shape[2:]
    for place, (window, stride, dilation) in enumerate(zip(sizes, p["window_strides"], p["rhs_dilation"], strict=True)):
        x = _operand.windows(x, 2 + 2 * place, window, stride, dilation)
    # (batch, features, position, window, position, window ...) to (groups, batch and positions, features and windows).
    spatial = len(sizes)
    groups, batch_groups = p["feature_group_count"], p["batch_group_count"]
    count = groups * batch_groups
    n, features = x.shape[:2]
    positions = [x.shape[2 + 2 * i] for i in range(spatial)]
    x = x.reshape(batch_groups, n // batch_groups, groups, features // groups, *x.shape[2:])
    place, window = [4 + 2 * i for i in range(spatial)], [5 + 2 * i for i in range(spatial)]
    depth = math.prod(kernel.shape[1:])
    rows = lax.transpose(x, (0, 2, 1, *place, 3, *window))
    rows = rows.reshape(count, n // batch_groups * math.prod(positions), depth)
    kernels = kernel.reshape(count, kernel.shape[0] // count, depth)

    def output(out):
        out = out.reshape(count, n // batch_groups, *positions, kernels.shape[1])
        out = jnp.moveaxis(out, (0, -1), (1, 2)).reshape(n // batch_groups, kernel.shape[0], *positions)
        return lax.transpose(out, np.argsort(numbers.out_spec).tolist())

    return rows, kernels, output
