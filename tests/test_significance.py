"""``significant_digits``: CESTAC's digits, and what the true errors are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import emulate, significant_digits

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=200), jnp.float32)


def test_digits_are_those_of_the_samples():
    f = lambda x: jnp.cumsum(x) * 0.3  # noqa: E731
    found = significant_digits(f, "fp16", sums="sequential", samples=5, key=KEY)(X)
    run = lambda key: emulate(f, "fp16", rounding="stochastic_equal", sums="sequential", key=key)(X)  # noqa: E731
    samples = np.asarray(jax.vmap(run)(jax.random.split(KEY, 5)), np.float64)
    mean, deviation = samples.mean(0), samples.std(0, ddof=1)
    same = deviation == 0
    with np.errstate(divide="ignore"):
        # 2.776: Student's 0.975 quantile with 4 degrees of freedom, in any table.
        wanted = np.log10(np.sqrt(5) * np.abs(mean) / (2.776 * deviation))
    wanted = np.where(same, 11 * math.log10(2), np.clip(wanted, 0, 11 * math.log10(2)))
    # float32 sums of five fp16 numbers: 2^-22 of their size, seen against a spread of 2^-11 of it or more.
    np.testing.assert_allclose(found.digits, wanted, atol=2e-3)
    np.testing.assert_allclose(found.value, mean, rtol=2.0**-21, atol=1e-6)


def test_most_true_errors_are_within_the_digits():
    """An estimate at 95 % confidence from 3 samples of dependent sums: it must hold for nine of ten results."""
    f = lambda x: (jnp.exp(x) - 1) / x  # noqa: E731
    found = significant_digits(f, "bf16", key=KEY)(X)
    exact = np.expm1(np.asarray(emulate(lambda x: x, "bf16")(X), np.float64))
    exact = exact / np.asarray(emulate(lambda x: x, "bf16")(X), np.float64)
    error = np.abs(np.asarray(found.value, np.float64) - exact) / np.abs(exact)
    assert (error <= 10.0 ** -np.asarray(found.digits, np.float64)).mean() > 0.9
    assert np.ptp(np.asarray(found.digits)) > 1


def test_directions_give_their_range():
    f = lambda x: (x + 100) - 100  # noqa: E731
    low, high = (emulate(f, "fp16", rounding=mode)(X) for mode in ("toward_negative", "toward_positive"))
    found = jax.jit(significant_digits(f, "fp16", rounding=("toward_negative", "toward_positive")))(X)
    mean = np.abs(np.asarray(low) + np.asarray(high)) / 2
    with np.errstate(divide="ignore"):
        wanted = np.log10(mean / (np.asarray(high) - np.asarray(low)))
    differ = np.asarray(low != high)
    assert differ.any()
    np.testing.assert_allclose(np.asarray(found.digits)[differ], np.clip(wanted, 0, None)[differ], atol=1e-5)
    assert (np.asarray(found.digits)[~differ] == np.float32(11 * math.log10(2))).all()
    mixed = significant_digits(f, "fp16", rounding=("stochastic", "toward_zero"), key=KEY)(X)
    assert jnp.isfinite(mixed.digits).all()


def test_exact_results_infinite_ones_and_integers():
    f = lambda x: (x * 2, x / 0.0, x - x, jnp.argmax(x), jnp.exp(jax.lax.complex(x * 0, x)), (x * 1.1 > x).all())  # noqa: E731
    x = jnp.asarray([1.0, 3.0], jnp.float32)
    value, digits = significant_digits(f, "fp16", key=KEY)(x)
    most = np.float32(11 * math.log10(2))
    assert (digits[0] == most).all()
    assert (digits[1] == 0).all()
    assert (digits[2] == most).all()
    assert (value[3], digits[3]) == (1, most)
    assert digits[4].dtype == np.float32
    assert (digits[4] > 2).all()
    assert digits[5] == most
    assert (value[0] == x * 2).all()


REFUSED = [
    (
        dict(rounding="toward_zero"),
        "rounding 'toward_zero' gives the same result in every run; take 'stochastic_equal'",
    ),
    (dict(rounding=["toward_zero"]), "a sequence of roundings has at least two"),
    (dict(samples=1, key=KEY), "samples must be at least 2, got 1"),
    (dict(confidence=1.0, key=KEY), "confidence must be above 0 and below 1, got 1.0"),
    (dict(), r"rounding 'stochastic_equal' is stochastic; pass key=jax.random.key"),
    (dict(rounding="up"), "significant_digits: unknown rounding 'up'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        significant_digits(jnp.exp, qjax.format("fp16"), **options)
