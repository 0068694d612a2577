"""Rounding to odd: the results lie on the same side of every shorter number and midpoint as the exact ones."""

from fractions import Fraction

import gmpy2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import _to_odd

PRECISION = {np.float32: 11, np.float64: 25}


def to_odd(exact: Fraction, mantissa_bits: int) -> Fraction:
    """Returns a positive rational rounded to odd with an unbounded exponent."""
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > exact
    step = Fraction(2) ** (exponent - mantissa_bits)
    below = exact // step
    return (below if below * step == exact else below | 1) * step


def operands(dtype, seed: int, count: int = 3000):
    """Returns numbers of few bits: at random, and those next to powers of two, with exponents near and far."""
    random = np.random.default_rng(seed)
    p = PRECISION[dtype]
    significands = random.integers(2 ** (p - 1), 2**p, count)
    edge = random.random(count) < 0.5
    significands[edge] = random.choice([2 ** (p - 1), 2 ** (p - 1) + 1, 2**p - 1], edge.sum())
    exponents = random.integers(-14, 14, count) * random.choice([1, 3], count)
    return (significands * 2.0**exponents * random.choice([-1, 1], count)).astype(dtype)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide", "square_root"])
def test_results_are_the_exact_ones_to_odd(name, dtype):
    with jax.enable_x64(dtype == np.float64):
        a, b = operands(dtype, 0), operands(dtype, 1)
        bits = jnp.finfo(dtype).nmant
        if name == "square_root":
            a = np.abs(a)
            out = jax.jit(_to_odd.square_root)(a)
            with gmpy2.context(precision=300):
                wanted = [to_odd(Fraction(*map(int, gmpy2.sqrt(float(x)).as_integer_ratio())), bits) for x in a]
        else:
            out = jax.jit(getattr(_to_odd, name))(a, b)
            operation = {
                "add": Fraction.__add__,
                "subtract": Fraction.__sub__,
                "multiply": Fraction.__mul__,
                "divide": Fraction.__truediv__,
            }[name]
            exact = [operation(Fraction(float(x)), Fraction(float(y))) for x, y in zip(a, b, strict=True)]
            wanted = [0 if x == 0 else to_odd(abs(x), bits) * (1 if x > 0 else -1) for x in exact]
        np.testing.assert_array_equal(np.asarray(out), np.array([float(w) for w in wanted], dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_integers_are_converted_to_odd(dtype):
    info = jnp.iinfo(dtype)
    random = np.random.default_rng(0)
    values = random.integers(info.min, info.max, 2000, dtype, endpoint=True)
    powers = [2**k + d for k in range(info.bits) for d in (-1, 0, 1, 2)]
    values = np.concatenate([values, np.array([v for v in powers if v <= info.max], dtype), [info.min, info.max]])
    out = _to_odd.from_integer(jnp.asarray(values.astype(dtype)), np.dtype(np.float32))
    wanted = [0 if v == 0 else to_odd(Fraction(abs(int(v))), 23) * (1 if v > 0 else -1) for v in values]
    np.testing.assert_array_equal(np.asarray(out), np.array([float(w) for w in wanted], np.float32))


def test_special_values_are_those_of_ieee():
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0], np.float32)
    a, b = (x.ravel() for x in np.meshgrid(special, special))
    with np.errstate(all="ignore"):
        for name, operation in (("add", np.add), ("multiply", np.multiply), ("divide", np.divide)):
            out = np.asarray(getattr(_to_odd, name)(jnp.asarray(a), jnp.asarray(b)))
            wanted = operation(a, b)
            np.testing.assert_array_equal(out, wanted)
            finite = ~np.isnan(wanted)
            np.testing.assert_array_equal(np.signbit(out)[finite], np.signbit(wanted)[finite])
        np.testing.assert_array_equal(np.asarray(_to_odd.square_root(jnp.asarray(special))), np.sqrt(special))


def test_finite_operands_never_give_infinity():
    largest = jnp.finfo(jnp.float32).max
    x = jnp.float32(2.0**127)
    assert _to_odd.add(x, x) == _to_odd.multiply(x, x) == _to_odd.divide(x, jnp.float32(2.0**-10)) == largest
