"""Products of pieces of two operands in the body of the TPU kernel."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _operand
from qjax._kernels import _int16, _operands
from qjax._kernels._operands import Coded, Unrounded
from qjax._kernels._rewritten import rewritten
from qjax._kernels._tpu_plan import is_halved


def products_of(lhs, rhs):
    """Returns the product of the places of a slice of two operands, as the dtype of the register's sums."""

    def elements(x, dtype=None):
        if isinstance(lhs, Unrounded):
            x = rewritten(functools.partial(_operands.rounded, quantizer=lhs.quantizer), RULES)(x)
            return x.astype(dtype or _operand.narrow_float(lhs.quantizer.fmt))
        return x

    def dense(x, y, places):
        y = y[0, :, places]
        return _dot(elements(x[0, :, places], y.dtype), y)

    def int16(x, y, places):
        x, y = (z[0, :, places].astype(jnp.int32) for z in (x, y))
        return _int16.of_halves(x, y, _dot)

    def coded(x, y, places):
        codes = y[0, :, places].astype(jnp.int32).astype(jnp.uint32)
        return _decoded_dot(elements(x[0, :, places]), codes, rhs.fmt)

    def halved(x, y, places):
        places = slice(places.start // 2, places.stop // 2)
        codes = y[0, :, places].astype(jnp.int32).astype(jnp.uint32)
        even = _decoded_dot(elements(x[0, 0, :, places]), codes & 15, rhs.fmt)
        return even + _decoded_dot(elements(x[0, 1, :, places]), codes >> 4, rhs.fmt)

    if isinstance(rhs, Coded):
        return halved if is_halved(rhs) else coded
    is_int16 = not isinstance(lhs, Unrounded) and lhs.dtype == np.int16
    return int16 if is_int16 else dense


def _decoded_dot(x, codes, fmt):
    values = _operands.decoded(codes, fmt)
    dtype = jnp.bfloat16 if x.dtype == _operand.narrow_float(fmt) == jnp.bfloat16 else jnp.float32
    return _dot(x.astype(dtype), values.astype(dtype))


def _dot(x, y):
    total = np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else np.float32
    precision = lax.Precision.HIGHEST if x.dtype == np.float32 else None
    return lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=total)


def _signed(primitive):
    """Returns the rule of a minimum or maximum of unsigned integers, which the v5e has not.

    Those of signed integers with the top bit flipped are the same.
    """

    def flip(x):
        return lax.bitcast_convert_type(x ^ np.uint32(2**31), np.int32)

    def rule(x, y):
        if x.dtype == np.uint32:
            return lax.bitcast_convert_type(primitive.bind(flip(x), flip(y)), np.uint32) ^ np.uint32(2**31)

    return rule


RULES = {primitive: _signed(primitive) for primitive in (lax.min_p, lax.max_p)}
