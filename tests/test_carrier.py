"""Quotients and roots to nearest on devices whose own are not, as those of XLA on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import bits

import qjax
from qjax import _carrier
from qjax._elementwise import elementwise

DTYPES = ("float32", "bfloat16", "float16")
SPECIALS = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0**-126, 2.0**127)


def numbers(seed: int, dtype):
    random = np.random.default_rng(seed)
    x = random.standard_normal(50_000) * 2.0 ** random.integers(-12, 12, 50_000)
    return jnp.asarray(np.concatenate([x, random.permutation(np.tile(SPECIALS, 9))]).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", ["quotient", "root"])
def test_by_way_of_float64_it_is_the_nearest(wide, dtype):
    x, y = numbers(0, dtype), numbers(1, dtype)
    if wide == "quotient":
        ours, nearest = jax.jit(_carrier._wide_quotient)(x, y), x / y
        assert np.array_equal(bits(_carrier.divide(x, y)), bits(nearest))
    else:
        ours, nearest = jax.jit(_carrier._wide_root)(x), jnp.sqrt(x)
        assert np.array_equal(bits(_carrier.square_root(x)), bits(nearest))
    nan = jnp.isnan(nearest)
    assert (jnp.isnan(ours) == nan).all()
    assert np.array_equal(bits(jnp.where(nan, 0, ours)), bits(jnp.where(nan, 0, nearest)))


def test_constants_are_divided_too():
    x, one, three = jnp.arange(5, dtype=jnp.float32), jnp.float32(1), jnp.float32(3)
    for fn in (lambda x: _carrier.divide(one, three) * x, lambda x: _carrier.divide(x, three)):
        np.testing.assert_array_equal(elementwise(fn, x), np.asarray(fn(x)))


def of_gpu(function, *args) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def divides(text: str) -> set[str]:
    """Returns the dtypes of the quotients and roots of floats in a lowered program."""
    lines = (line for line in text.splitlines() if "stablehlo.divide" in line or "stablehlo.sqrt" in line)
    return {line.rsplit("x", 1)[-1].rsplit("<", 1)[-1].rstrip(">") for line in lines} - {"i32"}


@pytest.mark.parametrize("fmt", ["nvfp4", "int8_channel", "uint4_g32", "e4m3_1x128", "nf4", "dynamic8"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_no_quotient_of_a_format_is_a_gpus_own(fmt, rounding):
    x, key = jnp.ones((4, 256), jnp.float32), jax.random.key(0) if rounding == "stochastic" else None
    assert divides(of_gpu(lambda x: qjax.chop(x, fmt, rounding, key=key), x)) <= {"f64"}


def test_no_quotient_of_an_emulated_program_is_a_gpus_own():
    emulated = qjax.emulate(lambda x, y: jnp.sqrt(x) / y, "fp16")
    x = jnp.ones(8, jnp.float32)
    assert divides(of_gpu(emulated, x, x)) == {"f64"}
