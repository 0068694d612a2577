"""Products of 16-bit integers by four products of 8-bit ones, exact modulo 2^32."""

import jax.numpy as jnp
import numpy as np

from qjax._kernels._reference import dot


def halves(x):
    """Returns int8 (high, low) with ``x = 256 high + low + 128`` for int16 x."""
    return (x >> 8).astype(jnp.int8), ((x & 255) - 128).astype(jnp.int8)


def product(x, y, dot=dot):
    """Returns the products of rows, ``(b, m, k) x (b, n, k) -> (b, m, n)``, of int16 as int32, modulo 2^32.

    ``sum(x y) = sum((x - 128) (y - 128)) + 128 sum(x) + 128 sum(y) - 128^2 k``, and ``dot`` multiplies the halves.
    """
    return of_halves(x, y, dot) + offset(x)[:, :, None] + (offset(y) - modulo(x.shape[-1] << 14))[:, None, :]


def of_halves(x, y, dot):
    """Returns the products of rows of ``x - 128`` and ``y - 128``."""
    (xh, xl), (yh, yl) = halves(x), halves(y)
    return (dot(xh, yh) << 16) + ((dot(xh, yl) + dot(xl, yh)) << 8) + dot(xl, yl)


def offsets(x, y, chunk: int):
    """Returns what to add to ``of_halves`` of every chunk, ``(b, m, chunks)`` and ``(b, n, chunks)``."""
    of_x, of_y = (offset(z.reshape(*z.shape[:2], -1, chunk)) for z in (x, y))
    return of_x, of_y - modulo(chunk << 14)


def offset(x):
    """Returns the sums of ``128 x`` over the last axis, modulo 2^32."""
    return jnp.sum(x, axis=-1, dtype=jnp.int32) << 7


def modulo(n: int) -> np.int32:
    """Returns an integer modulo 2^32."""
    return np.uint32(n % 2**32).view(np.int32)
