"""Codes of weights as terms in bfloat16, in few operations, which run on pairs of elements."""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._kernels import _operands
from qjax._kernels._operands import Coded
from qjax.formats import Codebook, Fixed, Float


def dtype_of(fmt: Float | Fixed | Codebook) -> np.dtype | None:
    """Returns the dtype that codes of a format are read as, of those that the GPU converts, or None."""
    if fmt.bits == 4:
        return np.dtype(jnp.int4)
    if fmt.bits == 8 and fmt.dtype in (np.int8, jnp.float8_e4m3fn, jnp.float8_e5m2):
        return np.dtype(fmt.dtype)
    return None


def read(rhs: Coded, rows: int, depth: int):
    """Returns codes as an array ``(b, rows, depth)`` of ``dtype_of`` their format, of the same bytes, padded."""
    fmt, dtype = rhs.fmt, dtype_of(rhs.fmt)
    assert dtype is not None
    per = 8 // fmt.bits
    finite = fmt.first_code & (2**fmt.bits - 1) if isinstance(fmt, Codebook) else 0
    padding = [(0, 0), (0, rows - rhs.codes.shape[1]), (0, depth // per - rhs.codes.shape[2])]
    codes = jnp.pad(rhs.codes, padding, constant_values=np.uint8(finite * (17 if per == 2 else 1)))
    return lax.bitcast_convert_type(codes, dtype).reshape(codes.shape[0], rows, depth)


def terms(codes, fmt: Float | Fixed | Codebook) -> Iterable:
    """Makes bfloat16 arrays whose sum are the values of codes, one if bfloat16 holds all values of the format."""
    match fmt:
        case Fixed(bits=4, signed=False):
            x = codes.astype(jnp.bfloat16)
            return [_scaled(jnp.where(x < 0, x + 16, x), -fmt.fraction_bits)]
        case Fixed():
            return [_scaled(codes.astype(jnp.bfloat16), -fmt.fraction_bits)]
        case Float(bits=8):
            # There is no conversion to bfloat16 itself.
            return [codes.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)]
        case Float(exponent_bits=1 | 2, signed=True, specials="finite", subnormals=True):
            return [_by_lines(codes.astype(jnp.bfloat16), fmt)]
    return _looked_up(codes.astype(jnp.int32) & 15, fmt)


def _by_lines(code, fmt: Float):
    """Returns the values of 4-bit codes, which grow as the largest of a line for each binade."""
    negative = code < 0
    place = jnp.where(negative, code + 8, code)
    lines = range(2**fmt.exponent_bits - 1)
    size = [_scaled(place - i * 2**fmt.mantissa_bits if i else place, fmt.quantum_exponent + i) for i in lines]
    for line in size[1:]:
        size[0] = jnp.maximum(size[0], line)
    return jnp.where(negative, -size[0], size[0])


def _looked_up(code, fmt: Float | Fixed | Codebook) -> Iterator:
    """Returns the terms of the values of 4-bit codes from 0 on, each bit of which chooses between halves of a table."""
    with jax.ensure_compile_time_eval():
        rest = np.asarray(_operands.decoded(jnp.arange(16, dtype=jnp.uint32), fmt))
    odd = [(code >> bit) & 1 != 0 for bit in range(4)]
    while rest.any():
        term = rest.astype(jnp.bfloat16).astype(np.float32)
        values = [np.float32(v) for v in term]
        for which in odd:
            values = [jnp.where(which, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        yield values[0].astype(jnp.bfloat16)
        rest = np.where(np.isfinite(rest), rest, 0) - np.where(np.isfinite(rest), term, 0)


def _scaled(x, power: int):
    return x * 2.0**power if power else x
