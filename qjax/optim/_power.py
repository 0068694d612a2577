"""Logarithms and powers to single precision, of sums, products and integer operations only.

Those of XLA it keeps once computed, 4 bytes an element, where they have several uses or a loop works on them.
Polynomials are sums of pairs, so that few operations wait for each other.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from qjax import _carrier

# With s from 1 to 2, log2(s) = s - 1 + (s - 1)(2 - s) R(s) within 3.7e-7, exact at both ends; and 2^t = S(t) within a
# relative 2.63e-6 for t from 0 to 1; minimax fits.
_R = (1.1242294, -1.387221, 1.1165941, -0.5350983, 0.13937141, -0.015209109)
_S = (1.0000026, 0.693003833, 0.241442755, 0.05201146, 0.013534168)


# log2(x) of normal positive x is l(x) = bits 2^-23 - 127, linear between powers of two, and what lies beside it. That
# of a quotient is made of two differences: near numbers have logarithms whose difference is right to 8e-7, where sums
# would be to 2^-18 if they are 100.


def log2_on_line(difference: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns ``l(x) - l(y)`` by the difference of the bits of x and y."""
    c = _carrier.carrier(jnp.float32)
    return difference.astype(c.int).astype(c.float) * 2.0**-c.mantissa_bits


def log2_beside_line(
    bits: UInt32[Array, "*shape"], times: Float32[Array, "..."] | float = 1.0
) -> Float32[Array, "*shape"]:
    """Returns ``times (log2(x) - l(x))`` by the bits of x."""
    c = _carrier.carrier(jnp.float32)
    s = _carrier.from_bits(bits & c.uint(2**c.mantissa_bits - 1) | c.uint(c.bias << c.mantissa_bits), c)
    between = (3 - s) * s - 2
    return between * _polynomial([times * coefficient for coefficient in _R], s)


def exp2(t: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns ``2^t`` for t from 0 to 1."""
    return _polynomial(_S, t)


def _polynomial(coefficients, x) -> Any:
    """Returns ``sum_i coefficients[i] x^i``."""
    square = x * x
    pairs = [low + high * x for low, high in zip(coefficients[::2], coefficients[1::2], strict=False)]
    total, *others = (pairs + [coefficients[-1]] * (len(coefficients) % 2))[::-1]
    for pair in others:
        total = pair + square * total
    return total
