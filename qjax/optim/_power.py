"""Logarithms and powers to single precision, of sums, products and integer operations only.

Those of XLA it keeps once computed, 4 bytes an element, where they have several uses or a loop works on them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from qjax import _carrier

# log2(1 + t) = t + (t - t^2) R(t) and 2^t = 1 + t + (t - t^2) S(t) for t in [0, 1]: exact at both ends, else within
# 3.3e-7 and 1.4e-7; minimax fits.
_R = (0.44266644, -0.2778878, 0.19543637, -0.12970375, 0.06332581, -0.01520909)
_S = (-0.306847, -0.0666999, -0.0108446, -0.00189685)


def log2(x: Float32[Array, "*shape"], less=0.0) -> tuple[Int32[Array, "*shape"], Float32[Array, "*shape"]]:
    """Returns ``log2(x) - less`` of normal positive x as ``floor(log2(x))`` and the rest; exact for powers of two.

    So near numbers have logarithms whose difference is right to 7e-7, where sums would be to 2^-18 if they are 100.
    """
    c = _carrier.carrier(x.dtype)
    bits = _carrier.to_bits(x, c)
    exponent = (bits >> c.mantissa_bits).astype(c.int) - c.bias
    significand = _carrier.from_bits(bits & c.uint(2**c.mantissa_bits - 1) | c.uint(c.bias << c.mantissa_bits), c)
    t = significand - 1
    return exponent, t - less + _between(t, _R)


def exp2(x: Float32[Array, "*shape"]) -> tuple[Float32[Array, "*shape"], Float32[Array, "*shape"]]:
    """Returns ``2^x`` as exponent, ``floor(x)``, and significand, from 1 to 2; exact for integers."""
    exponent = jnp.floor(x)
    t = x - exponent
    return exponent, 1 + t + _between(t, _S)


def _between(t, coefficients):
    """Returns ``t - t^2`` times a polynomial: 0 at both ends. By pairs, so that few operations wait for each other."""
    power, terms = t, list(coefficients)
    while len(terms) > 1:
        pairs = [low + high * power for low, high in zip(terms[::2], terms[1::2], strict=False)]
        terms, power = pairs + terms[2 * len(pairs) :], power * power
    return (t - t * t) * terms[0]
