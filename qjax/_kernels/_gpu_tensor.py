"""Products of operands that the tensor cores of Hopper take as they are, and of 16-bit integers by their halves."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax._kernels import _int16
from qjax._kernels._gpu_plan import Plan
from qjax._kernels._gpu_sums import Load, Products, multiplied


def direct(lhs, rhs, sums: type) -> Products:
    """Returns the products of operands in a dtype of the tensor cores, padded to whole tiles, with sums of a dtype."""
    exact = np.int32 if lhs.dtype == jnp.int8 else np.float32

    def sum_of(tiles, shape, scratch):
        x, y = tiles
        (total,) = multiplied(lambda acc: plgpu.wgmma(acc, x, y.T), shape, exact)
        return total.astype(sums)

    return Products((Load(lhs, False), Load(rhs, True)), sum_of)


def by_halves(lhs, rhs, plan: Plan) -> Products:
    """Returns the products of int16 operands, exact modulo 2^32, by four products of int8: ``_int16.product``."""
    halves = [Load(half, of_columns) for of_columns, x in ((False, lhs), (True, rhs)) for half in _int16.halves(x)]

    def sum_of(tiles, shape, scratch):
        xh, xl, yh, yl = tiles

        def multiply(upper, middle, lower):
            plgpu.wgmma(upper, xh, yh.T)
            plgpu.wgmma(middle, xh, yl.T)
            plgpu.wgmma(middle, xl, yh.T)
            plgpu.wgmma(lower, xl, yl.T)

        upper, middle, lower = multiplied(multiply, shape, *(np.int32,) * 3)
        return (upper << 16) + (middle << 8) + lower

    return Products(tuple(halves), sum_of, _int16.offsets(lhs, rhs, plan.depth))
