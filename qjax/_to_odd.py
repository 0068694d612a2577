"""Sums, quotients and square roots of floats rounded to odd, of which any shorter rounding is that of the exact result.

A float rounded to odd is the exact value if a float holds it, and else the neighbour of it whose last bit is one: with
two bits more than a format has, it lies on the same side of every number of the format and of every midpoint between
two (Boldo and Melquiond, 2008, Emulation of FMA and correctly rounded sums, https://doi.org/10.1109/TC.2007.70819).
Results below the smallest normal number of the dtype count as zero, as in XLA's arithmetic.
"""

import jax.numpy as jnp

from qjax import _carrier


def add(a, b, *, bounded: bool = True):
    """Returns a + b rounded to odd; if not ``bounded``, infinity where it is beyond the largest float."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return _odd(_bounded(total, _is_finite(a) & _is_finite(b)) if bounded else total, error)


def subtract(a, b):
    """Returns a - b rounded to odd."""
    return add(a, -b)


def multiply(a, b):
    """Returns a b, of operands with half the bits of their dtype at most: exact, but for what is beyond its range."""
    return _bounded(a * b, _is_finite(a) & _is_finite(b))


def divide(a, b):
    """Returns a / b rounded to odd, of operands with half the bits of their dtype at most."""
    quotient = _carrier.divide(a, b)
    # The remainder in numbers of one binade, so that no part of it is too small.
    x, y = _significand(a), _significand(b)
    q = _carrier.divide(x, y)
    upper, lower = _halves(q, _carrier.carrier(q.dtype))
    error = (x - _carrier.apart(upper * y)) - _carrier.apart(lower * y)
    error = jnp.where((b < 0) ^ (a < 0), -error, error)
    finite = _is_finite(a) & _is_finite(b) & (b != 0) & (quotient != 0)
    return _odd(_bounded(quotient, finite), jnp.where(finite & (a != 0), error, 0))


def square_root(a):
    """Returns the square root of a rounded to odd, of an operand with half the bits of its dtype at most."""
    root = _carrier.square_root(a)
    c = _carrier.carrier(a.dtype)
    bits = _carrier.to_bits(a, c)
    # In [1, 4), with an exponent of the parity of that of a.
    field = (bits >> c.mantissa_bits).astype(c.int)
    even = (c.bias + (field - c.bias) % 2).astype(c.uint)
    x = _carrier.from_bits(even << c.mantissa_bits | bits & c.uint(2**c.mantissa_bits - 1), c)
    s = _carrier.square_root(x)
    upper, lower = _halves(s, c)
    error = (x - _carrier.apart(upper * upper)) - _carrier.apart(2 * upper * lower) - _carrier.apart(lower * lower)
    return _odd(root, jnp.where((a > 0) & _is_finite(a), error, 0))


def from_integer(n, dtype):
    """Returns an integer array as float32 or float64, rounded to odd."""
    info, value = jnp.iinfo(n.dtype), n.astype(dtype)
    beyond = value >= 2.0 ** (info.bits - (info.min < 0))
    back = jnp.where(beyond, 0, value).astype(n.dtype)
    error = (n > back).astype(dtype) - (n < back).astype(dtype)
    return _odd(value, jnp.where(beyond, -1, error))


def _odd(value, error):
    """Returns ``value + error``, error being less than half a unit of it, rounded to odd."""
    c = _carrier.carrier(value.dtype)
    bits, error_bits = (_carrier.to_bits(x, c).astype(c.int) for x in (value, error))
    # One step back where the value lies beyond the exact one; then the last bit is one.
    beyond = (bits ^ error_bits) >> (c.width - 1)
    odd = jnp.where(jnp.abs(error) > 0, (bits + beyond) | 1, bits)
    return _carrier.from_bits(odd.astype(c.uint), c)


def _is_finite(x):
    # Mosaic GPU lowers neither jnp.isfinite nor jnp.copysign.
    return jnp.abs(x) < jnp.inf


def _bounded(value, finite):
    """Returns a result, an infinite one of a finite exact one as the largest number, which is odd."""
    largest = jnp.finfo(value.dtype).max
    return jnp.where(finite & jnp.isinf(value), jnp.where(value < 0, -largest, largest), value)


def _significand(x):
    """Returns the magnitude of x brought to [1, 2)."""
    c = _carrier.carrier(x.dtype)
    fraction = _carrier.to_bits(x, c) & c.uint(2**c.mantissa_bits - 1)
    return _carrier.from_bits(fraction | c.uint(c.bias << c.mantissa_bits), c)


def _halves(x, c: _carrier.Carrier):
    """Returns two floats of which x is the sum, each with half its bits."""
    half = c.mantissa_bits // 2 + 1
    upper = (_carrier.to_bits(x, c) + c.uint(2 ** (half - 1))) & ~c.uint(2**half - 1)
    upper = _carrier.from_bits(upper, c)
    return upper, x - upper
