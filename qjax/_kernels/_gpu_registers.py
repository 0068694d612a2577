"""Products whose first operand a warpgroup makes in its registers: of codes of weights, or of floats yet to be rounded.

The tensor cores of Hopper take their first operand from registers, so that what is made of it is not written back.
"""

from collections.abc import Callable

import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax._kernels._gpu_sums import Load, Products, multiplied


def made(make: Callable, lhs: Load, rhs: Load, interpreted: bool) -> Products:
    """Returns the products of ``make(tile of lhs)``, arrays whose sum is the operand, and rhs, which has their dtype.

    Args:
      interpreted: whether the arrays go through shared memory, from which alone the interpreter multiplies.
    """

    def sum_of(tiles, shape, scratch):
        x, y = tiles
        x = x[...]

        def multiply(acc):
            for term in make(x):
                if interpreted:
                    scratch[...] = term
                    plgpu.commit_smem()
                plgpu.wgmma(acc, scratch if interpreted else term, y.T)

        (total,) = multiplied(multiply, shape, np.float32)
        # Copies of a later step, which take another way to memory, overwrite what was read.
        plgpu.commit_smem()
        return total

    return Products((lhs, rhs), sum_of, scratch=rhs.array.dtype if interpreted else None)
