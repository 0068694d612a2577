"""Hadamard rotations against the matrix they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Hadamard

KEY = jax.random.key(4)


def sylvester(size: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("size", [1, 2, 4, 16, 128])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_it_is_the_product_with_the_matrix(size, axis):
    """x diag(signs) H / sqrt(size) in blocks along an axis.

    log2(size) rounded sums and the rounded factor: an error of (log2(size) + 2) 2^-24 of the sum of magnitudes.
    """
    signs = tuple(np.random.default_rng(1).choice([-1, 1], size).tolist())
    x = (
        np.random.default_rng(0).normal(size=(256, 2, 128)).astype(np.float32)
        if axis != 1
        else np.ones((2, 128, 2), np.float32)
    )
    matrix = np.diag(signs) @ sylvester(size) / size**0.5
    moved = np.moveaxis(x.astype(np.float64), axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, size)
    exact = np.moveaxis((blocks @ matrix).reshape(moved.shape), -1, axis)
    bound = np.moveaxis((np.abs(blocks) @ np.abs(matrix)).reshape(moved.shape), -1, axis)
    rotation = Hadamard(size, signs)
    ours = rotation(jnp.asarray(x), axis=axis)
    assert (np.abs(ours - exact) <= (np.log2(size) + 2) * 2.0**-24 * bound).all()
    back = rotation.inverse(ours, axis=axis)
    turned = (np.abs(blocks) @ np.abs(matrix) @ np.abs(matrix.T)).reshape(moved.shape)
    assert (np.abs(back - x) <= 2 * (np.log2(size) + 2) * 2.0**-24 * np.moveaxis(turned, -1, axis)).all()


def test_random_signs_come_from_the_key():
    rotation, x = Hadamard(8, "random"), jnp.eye(8, dtype=jnp.float32)
    ours = np.asarray(rotation(x, key=KEY)) * 8**0.5
    signs = np.rint(ours[:, 0])
    assert set(signs.tolist()) == {1.0, -1.0} and np.array_equal(np.rint(ours), np.diag(signs) @ sylvester(8))
    others = [np.rint(np.asarray(rotation(x, key=jax.random.key(i)))[:, 0] * 8**0.5).tolist() for i in range(8)]
    assert len({tuple(o) for o in others}) > 4
    assert np.allclose(rotation.inverse(rotation(x, key=KEY), key=KEY), x, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_short_floats_are_rounded_once(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)).astype(dtype)
    ours = Hadamard(64)(x)
    wide = Hadamard(64)(x.astype(jnp.float32))
    assert ours.dtype == x.dtype and np.array_equal(ours, wide.astype(dtype))


def test_float64_and_gradients():
    with jax.enable_x64():
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)))
        h = Hadamard(16)
        ours, back = jax.jit(lambda x, g: (h(x), jax.vjp(h, x)[1](g)[0]))(x, jnp.cos(x))
        # 2^-53 for each of four sums and the factor, on sums below 2^6.
        assert ours.dtype == jnp.float64 and np.abs(ours - np.asarray(x) @ sylvester(16) / 4).max() < 2.0**-44
        assert np.abs(back - np.cos(np.asarray(x)) @ sylvester(16) / 4).max() < 2.0**-44


def test_it_is_an_argument_of_jit():
    traces = []

    @jax.jit
    def f(h, x):
        traces.append(h)
        return h(x)

    x = jnp.ones((2, 8), jnp.float32)
    f(Hadamard(4), x), f(qjax.Hadamard(4, None), x)
    assert len(traces) == 1 and f(Hadamard(8), x)[0, 0] == np.float32(8) * np.float32(8**-0.5)
