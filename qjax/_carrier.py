"""Carriers: the bit patterns of the float dtypes that values are held and worked on in."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Carrier(NamedTuple):
    """What the core knows of the dtype whose bit patterns it works on."""

    mantissa_bits: int
    bias: int
    width: int

    @property
    def inf(self) -> int:
        return (2 * self.bias + 1) << self.mantissa_bits

    @property
    def nan(self) -> int:
        return self.inf | 1 << (self.mantissa_bits - 1)

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def uint(self) -> type:
        return np.uint64 if self.width == 64 else np.uint32

    @property
    def int(self) -> type:
        return np.int64 if self.width == 64 else np.int32

    @property
    def float(self) -> type:
        return np.float64 if self.width == 64 else np.float32


def carrier(dtype) -> Carrier:
    """Returns the carrier of float32 or float64."""
    return Carrier(52, 1023, 64) if dtype == jnp.float64 else Carrier(23, 127, 32)


def to_bits(x, c: Carrier):
    return lax.bitcast_convert_type(x, c.uint)


def from_bits(bits, c: Carrier):
    return lax.bitcast_convert_type(bits, c.float)


def widen(x):
    """Returns a bfloat16 or float16 array as float32, subnormals included; other arrays as they are."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def narrow(x, dtype):
    """Returns float32 values that ``dtype`` holds exactly as that dtype."""
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type((lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.uint16), dtype)
    return x.astype(dtype)


def flush(x):
    """Returns x with subnormals as zeros of their sign: what XLA's arithmetic does on some backends, on all of them."""
    c = carrier(x.dtype)
    bits = to_bits(x, c)
    normal = (bits & c.uint(c.sign - 1)) >= c.uint(1 << c.mantissa_bits)
    return from_bits(jnp.where(normal, bits, bits & c.uint(c.sign)), c)


def apart(product):
    """Returns a product that XLA does not contract into a later sum; an optimization barrier does not prevent it."""
    return jnp.where(jnp.isnan(product), product.dtype.type(np.nan), product)


@jax.jit
def divide(a, b):
    """Returns a / b, of floats to nearest, ties to even, where XLA's own quotient on a GPU is another."""
    if not _is_short(a.dtype):
        return lax.div(a, b)
    return lax.platform_dependent(a, b, cuda=_wide_quotient, rocm=_wide_quotient, default=lax.div)


@jax.jit
def square_root(x):
    """Returns the square root of floats to nearest, ties to even, where that of XLA on a GPU is another as well."""
    if not _is_short(x.dtype):
        return lax.sqrt(x)
    return lax.platform_dependent(x, cuda=_wide_root, rocm=_wide_root, default=lax.sqrt)


def _is_short(dtype) -> bool:
    return dtype != np.float64 and jnp.issubdtype(dtype, jnp.floating)


# Rounded twice, a quotient or a root of float32 is what it is rounded once, for 2 x 24 + 2 <= 53. LLVM knows that, and
# would compute in float32, if they were not doubled ones, or halves.
def _wide_quotient(a, b):
    with jax.enable_x64(True):
        x, y = (lax.convert_element_type(v, np.float64) for v in (a, b))
        half = lax.div(x, y + y)
        return lax.convert_element_type(half + half, a.dtype)


def _wide_root(x):
    with jax.enable_x64(True):
        double = lax.sqrt(lax.convert_element_type(x, np.float64) * np.float64(4))
        return lax.convert_element_type(double * np.float64(0.5), x.dtype)


def exponent(magnitude, c: Carrier):
    """Returns ``floor(log2)`` of the value of positive magnitude bits, subnormals included; far below them for 0."""
    field = (magnitude >> c.mantissa_bits).astype(c.int)
    # An integer below 2^mantissa_bits converts exactly, so its exponent field is its leading bit.
    as_float = to_bits(magnitude.astype(c.int).astype(c.float), c)
    leading = (as_float >> c.mantissa_bits).astype(c.int) - c.bias
    return jnp.where(field > 0, field - c.bias, leading + (1 - c.bias - c.mantissa_bits))


def decompose(magnitude, c: Carrier):
    """Returns (integer, power) with the value ``integer 2^power`` of finite magnitude bits, the hidden bit included."""
    field = (magnitude >> c.mantissa_bits).astype(c.int)
    fraction = magnitude & c.uint(2**c.mantissa_bits - 1)
    integer = jnp.where(field > 0, fraction | c.uint(2**c.mantissa_bits), fraction)
    return integer, jnp.maximum(field, 1) - (c.bias + c.mantissa_bits)


def compose(integer, power, c: Carrier):
    """Returns the bits of ``integer 2^power``, exact if the carrier holds it; infinity above its range."""
    as_float = to_bits(integer.astype(c.float), c)
    field = (as_float >> c.mantissa_bits).astype(c.int) + power
    fraction = as_float & c.uint(2**c.mantissa_bits - 1)
    normal = field.astype(c.uint) << c.mantissa_bits | fraction
    normal = jnp.where(field > 2 * c.bias, c.uint(c.inf), normal)
    down = jnp.clip(1 - field, 0, c.width - 1).astype(c.uint)
    subnormal = (fraction | c.uint(2**c.mantissa_bits)) >> down
    return jnp.where(integer == 0, c.uint(0), jnp.where(field > 0, normal, subnormal))


def static_bits(value: int, power: int, c: Carrier) -> int:
    """Returns the bits of ``value 2^power`` with value of at most the carrier's precision, rounded toward zero."""
    if value == 0:
        return 0
    field = value.bit_length() - 1 + power + c.bias
    if field > 2 * c.bias:
        return c.inf - 1
    place = power + c.bias - 1 + c.mantissa_bits
    if field > 0:
        shift = c.mantissa_bits + 1 - value.bit_length()
        return (field << c.mantissa_bits) + (value << shift) - (1 << c.mantissa_bits)
    return value << place if place >= 0 else value >> -place
