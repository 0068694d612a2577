"""SGD-SaI against the equations of its paper, in float64."""

import digits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optim import promotion as promotion

from qjax import optim


def reference(gradients, momentum, eps):
    gradients = gradients.astype(np.float64)
    g = gradients[0]
    snr = 1.0 if g.size == 1 else np.sqrt(np.sum(g**2)) / (np.std(g, ddof=1) + eps)
    m, updates = g, []
    for t, g in enumerate(gradients):
        m = g if t == 0 else momentum * m + (1 - momentum) * g
        updates.append(snr * m)
    return np.array(updates)


@pytest.mark.parametrize("momentum, eps", [(0.9, 1e-8), (0.0, 1e-8), (0.99, 0.1)])
def test_the_equations(momentum, eps):
    """Within 2e-5 of the largest update: sums of 2048 squares and averages of 50 terms, each rounded to 2^-24."""
    updates, _ = digits.updates(optim.scale_by_sgd_sai(momentum, eps), digits.gradients())
    for got, gradients in zip(jax.tree.leaves(updates), jax.tree.leaves(digits.gradients()), strict=True):
        expected = reference(np.asarray(gradients), momentum, eps)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_the_optimizer_decays_weights_apart_from_the_gradient():
    params = digits.initial()
    got, _ = digits.updates(optim.sgd_sai(0.1, 0.8, weight_decay=0.2), digits.gradients(), params)
    plain, _ = digits.updates(optim.scale_by_sgd_sai(0.8), digits.gradients(), params)
    expected = jax.tree.map(lambda u, p: -0.1 * u - 0.1 * 0.2 * p[None], plain, params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient, snr", [
    ([3.0], 1.0),
    ([0.1] * 9, 3.0),
    ([0.0] * 4, 2.0),
    ([1.0, -1.0], 1.0),
    ([1.0, 2.0, 3.0], 14**0.5),
])  # fmt: skip
def test_the_ratio_of_small_and_flat_gradients(gradient, snr):
    g = jnp.array(gradient, jnp.float32)
    _, state = digits.updates(optim.scale_by_sgd_sai(), g[None], g)
    np.testing.assert_allclose(state.snr, snr, rtol=1e-6)


def test_the_ratio_is_measured_once():
    gradients = digits.gradients()
    first = jax.tree.map(lambda g: g[:1], gradients)
    once, always = (digits.updates(optim.scale_by_sgd_sai(), g)[1] for g in (first, gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), once.snr, always.snr)
