"""Static scales from batches: each method is what it says, and finds the range it is known for."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import stats

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=(64, 32)).astype(np.float32) for _ in range(3)]
SPIKED = [np.where(np.arange(2048).reshape(64, 32) == 5, np.float32(60), BATCHES[0])]


def clip(*args, **kwargs):
    return float(stats.calibrate(*args, **kwargs)) * 127


def test_maximum_percentile_and_moving_average():
    sizes = [np.abs(x).max() for x in BATCHES]
    assert clip(BATCHES, "int8_tensor") == pytest.approx(max(sizes), rel=1e-6)
    every = np.abs(np.concatenate(BATCHES)).astype(np.float64)
    assert clip(BATCHES, "int8_tensor", "percentile", percentile=99) == pytest.approx(
        np.percentile(every, 99), rel=1e-6
    )
    average = 0.5 * (0.5 * sizes[0] + 0.5 * sizes[1]) + 0.5 * sizes[2]
    assert clip(BATCHES, "int8_tensor", "moving_average", decay=0.5) == pytest.approx(average, rel=1e-6)
    assert clip([np.zeros(3, np.float32)], "int8_tensor", "mse") == 0


def test_squared_errors_are_least_of_all_candidates():
    x, largest = SPIKED[0], 60.0
    w = RNG.normal(size=(32, 4)).astype(np.float32)
    for method, weights in (("mse", None), ("output_mse", w)):
        scale = stats.calibrate(SPIKED, "int4_tensor", method, weights=weights, steps=32)

        def loss(scale, weights=weights):
            error = np.asarray(qjax.chop(x, "int4_tensor", scale=scale), np.float64) - x
            return np.sum((error if weights is None else error @ weights) ** 2)

        every = [loss(np.float32(largest * i / 32 / 7)) for i in range(1, 33)]
        assert loss(scale) == pytest.approx(min(every), rel=1e-12)
    assert loss(scale) < every[-1]


def test_entropy_clips_a_spike_and_keeps_a_uniform_range():
    many = [np.concatenate([RNG.normal(size=100_000), [60.0]]).astype(np.float32)]
    assert 3 < clip(many, "int8_tensor", "kl") < 10
    # Of a normal distribution: near the 4 to 6 standard deviations that the method is known for, at 8 bits.
    assert clip([RNG.uniform(-1, 1, 100_000).astype(np.float32)], "int8_tensor", "kl") > 0.9


def test_a_scale_is_what_chop_takes():
    scale = stats.calibrate(SPIKED, "int8_tensor", "percentile", percentile=99)
    assert scale.dtype == jnp.float32 and scale.shape == ()
    assert float(jnp.max(qjax.chop(SPIKED[0], "int8_tensor", scale=scale))) == pytest.approx(127 * float(scale))


@pytest.mark.parametrize(
    "message, call",
    [
        ("calibrate: fmt must have one scale a tensor", lambda: stats.calibrate(BATCHES, "int8")),
        ("calibrate: fmt must have one scale a tensor", lambda: stats.calibrate(BATCHES, "uint8_tensor")),
        ("calibrate: method must be one of max, .* got 'min'", lambda: stats.calibrate(BATCHES, "int8_tensor", "min")),
        ("calibrate: weights are for", lambda: stats.calibrate(BATCHES, "int8_tensor", "output_mse")),
        ("calibrate: weights are for", lambda: stats.calibrate(BATCHES, "int8_tensor", weights=BATCHES[0])),
        ("calibrate: expected a percentile", lambda: stats.calibrate(BATCHES, "int8_tensor", percentile=101)),
        ("calibrate: batches must be arrays", lambda: stats.calibrate([], "int8_tensor")),
        ("calibrate: batches must be arrays", lambda: stats.calibrate([np.array([np.inf])], "int8_tensor")),
    ],
)
def test_refusals(message, call):
    with pytest.raises(ValueError, match=message):
        call()
