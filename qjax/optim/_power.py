"""Logarithms and powers to single precision, of sums, products and integer operations only.

Those of XLA it keeps once computed, 4 bytes an element, where they have several uses or a loop works on them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from qjax import _carrier

# log2(1 + t) = t + t (1 - t) R(t) and 2^t = 1 + t + t (1 - t) S(t) for t in [0, 1]: exact at both ends, else within
# 3.3e-7 and 1.4e-7; minimax fits.
_R = (0.44266644, -0.2778878, 0.19543637, -0.12970375, 0.06332581, -0.01520909)
_S = (-0.306847, -0.0666999, -0.0108446, -0.00189685)


def log2(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns ``log2(x)`` of normal positive numbers; exact for powers of two."""
    c = _carrier.carrier(x.dtype)
    bits = _carrier.to_bits(x, c)
    exponent = (bits >> c.mantissa_bits).astype(c.int) - c.bias
    significand = _carrier.from_bits(bits & c.uint(2**c.mantissa_bits - 1) | c.uint(c.bias << c.mantissa_bits), c)
    return exponent.astype(c.float) + _curve(significand - 1, _R)


def exp2(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns ``2^max(x, -126)`` of x below 128; exact for integers."""
    c = _carrier.carrier(x.dtype)
    x = jnp.maximum(x, 1 - c.bias)
    floor = jnp.floor(x)
    # The sum has the integer in its lowest bits.
    integer = _carrier.to_bits(floor + c.float(1.5 * 2**c.mantissa_bits), c) << c.mantissa_bits
    return _carrier.from_bits(_carrier.to_bits(1 + _curve(x - floor, _S), c) + integer, c)


def _curve(t, coefficients):
    total = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        total = total * t + coefficient
    return t + t * (1 - t) * total
