"""What a wrong call says: function, argument, expected, got, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

X = jnp.ones((4, 48), jnp.float32)
KEY = jax.random.key(0)

REFUSALS = {
    "chop: x is a float64 NumPy array, which JAX would first round to 32 bits": lambda: qjax.chop(np.ones(3), "e4m3"),
    "chop: x is a complex128 NumPy array": lambda: qjax.chop(np.ones(3) * 1j, "e4m3"),
    "encode: x is a float64 NumPy array": lambda: qjax.encode(np.float64(1.0), "e4m3"),
    "chop: x has dtype int32; expected float32": lambda: qjax.chop(jnp.arange(3), "e4m3"),
    "chop: x has dtype int64; expected float32": lambda: qjax.chop(3, "e4m3"),
    "chop: x has dtype float8_e4m3fn": lambda: qjax.chop(jnp.ones(3, jnp.float8_e4m3fn), "e4m3"),
    "chop: x must be an array, got a list": lambda: qjax.chop([1.0], "e4m3"),
    "format: unknown name 'mxfp5'; the nearest are mxfp4": lambda: qjax.chop(X, "mxfp5"),
    "chop: unknown rounding 'nearest'; expected one of nearest_even, ": lambda: qjax.chop(X, "e4m3", "nearest"),
    "needs key=jax.random.key\\(...\\), or the random words themselves as random_bits, got neither": lambda: qjax.chop(
        X, "e4m3", "stochastic"
    ),
    "as random_bits, got both": lambda: qjax.chop(
        X, "e4m3", "stochastic", key=KEY, random_bits=jnp.ones(X.shape, jnp.uint8)
    ),
    "chop: key was given, but rounding 'nearest_even' draws nothing": lambda: qjax.chop(X, "e4m3", key=KEY),
    "chop: random_bits was given, but rounding 'to_odd' draws nothing": lambda: qjax.chop(
        X, "e4m3", "to_odd", random_bits=3
    ),
    "chop: rounding 'stochastic_c' on float32 takes 1 to 30 random bits, got 31": lambda: qjax.chop(
        X, "e4m3", "stochastic_c", key=KEY, random_bits=31
    ),
    "takes 1 to 32 random bits, got 0": lambda: qjax.chop(X, "e4m3", "stochastic", key=KEY, random_bits=0),
    "random_bits must be an int or an unsigned array of shape \\(4, 48\\), got uint8\\[3\\]": lambda: qjax.chop(
        X, "e4m3", "stochastic", random_bits=jnp.ones(3, jnp.uint8)
    ),
    "chop: scale was given, but Float\\(4, 3, specials='fn'\\) has no scale": lambda: qjax.chop(X, "e4m3", scale=1.0),
    "chop: scale must be a float array, got int32": lambda: qjax.chop(X, "int8_channel", scale=jnp.arange(4)),
    "chop: scale of shape \\(3,\\) does not broadcast to \\(4, 2\\), one for each block": lambda: qjax.chop(
        X, "mxfp4", scale=jnp.ones(3, jnp.float32)
    ),
    "chop: axis 2 does not exist in x of shape \\(4, 48\\)": lambda: qjax.chop(X, "mxfp4", axis=2),
    "chop: axis -3 does not exist": lambda: qjax.chop(X, "int8_channel", axis=-3),
    "encode: axis 5 does not exist": lambda: qjax.encode(X, "nvfp4", axis=5),
    "chop: tiles of \\(128, 128\\) need 2 axes, x has shape \\(48,\\)": lambda: qjax.chop(X[0], "e4m3_128x128"),
    "chop: axis=0 was given, but tiles lie over the last axes": lambda: qjax.chop(X, "e4m3_2x2", axis=0),
    "chop: .* wraps 40 bits, more than the 32 that float32 is worked on with": lambda: qjax.chop(
        X, qjax.Fixed(40, overflow="wrap")
    ),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((ValueError, TypeError), match=text):
        REFUSALS[text]()


@pytest.mark.parametrize("text", ["needs key=jax.random.key", "scale of shape"])
def test_refusals_come_while_tracing_too(text):
    with pytest.raises(ValueError, match=text):
        jax.jit(REFUSALS.get(text) or next(f for t, f in REFUSALS.items() if text in t))()


def test_a_python_float_and_a_float32_numpy_array_are_taken():
    assert qjax.chop(0.3, "e4m3").dtype == jnp.float32
    assert qjax.chop(np.ones(2, np.float32), "e4m3").dtype == jnp.float32
    assert qjax.chop(np.float16(0.3), "e4m3").dtype == jnp.float16
