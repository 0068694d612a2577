"""Stable-SPAM against the equations of its paper, in float64."""

import inspect

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_optim import promotion as promotion

from qjax import optim

SPIKE = 29
CASES = [
    {},
    {"reset_interval": 7},
    {"reset_interval": 7, "reset_counts": "all"},
    {"total_steps": 50, "reset_interval": 20},
    {"b1": 0.8, "b2": 0.99, "eps": 1e-4, "gamma1": 0.85, "gamma2": 0.999, "gamma3": 0.9},
    {"total_steps": 60, "eta_min": 0.2},
]


def spiked():
    """Returns the gradients on digits with one step a thousand times too large."""
    factor = np.ones(digits.STEPS, np.float32)
    factor[SPIKE] = 1000
    return jax.tree.map(lambda g: g * factor.reshape(-1, *[1] * (g.ndim - 1)), digits.gradients())


def reference(gradients, **case):
    """Returns the updates for the gradients of one tensor."""
    defaults = inspect.signature(optim.scale_by_stable_spam).parameters
    b1, b2, eps, gamma1, gamma2, gamma3, interval, counts, total, eta_min = (
        case.get(name, default.default) for name, default in defaults.items()
    )
    largest = norm = square = 0.0
    first = second = np.zeros(gradients.shape[1:])
    since, since_code, updates = 0, 0, []
    for t, raw in enumerate(gradients.astype(np.float64), 1):
        c = 1.0
        if total is not None:
            c = eta_min + (1 - eta_min) * (1 + np.cos(np.pi * t / (total + 1))) / 2
        since, since_code = since + 1, since_code + 1
        corrected = t if counts == "adam" else since_code
        g_max = np.abs(raw).max()
        largest = gamma3 * largest + (1 - gamma3) * g_max
        threshold = largest / (1 - gamma3**corrected)
        clipped = np.where(np.abs(raw) > threshold, raw / g_max * threshold, raw)
        n = np.sqrt(np.sum(clipped**2))
        norm = c * gamma1 * norm + (1 - c * gamma1) * n
        square = gamma2 * square + (1 - gamma2) * n**2
        mean = norm / (1 - (c * gamma1) ** corrected)
        g = clipped / n * mean / (np.sqrt(square / (1 - gamma2**corrected)) + eps)
        if t % interval == 0:
            first, second, since, since_code = 0 * first, 0 * second, 1, 1
        first = c * b1 * first + (1 - c * b1) * g
        second = b2 * second + (1 - b2) * g**2
        updates.append(first / (1 - (c * b1) ** since) / (np.sqrt(second / (1 - b2**since)) + eps))
    return np.array(updates)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_equations(case):
    """Within 1e-3: ``1 - 0.999^t`` in float32 has a relative error of up to ``2^-25 / 0.001``, 3e-5, in the threshold
    and in the second moment, which later gradients are divided by, and averages of 50 terms of both signs one of
    some ``50 * 2^-24`` of the largest of them, in a quotient that is at most some 10.
    """
    updates, _ = digits.updates(optim.scale_by_stable_spam(**case), spiked())
    for got, gradients in zip(jax.tree.leaves(updates), jax.tree.leaves(spiked()), strict=True):
        np.testing.assert_allclose(got, reference(np.asarray(gradients), **case), rtol=1e-3, atol=1e-3)


def test_the_alias_is_the_chain():
    params = digits.initial()
    got, _ = digits.updates(optim.stable_spam(0.1, weight_decay=0.2), spiked(), params)
    plain, _ = digits.updates(optim.scale_by_stable_spam(), spiked(), params)
    expected = jax.tree.map(lambda u, p: -0.1 * (u + 0.2 * p[None]), plain, params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_after_a_reset_the_paper_clips_and_the_code_does_not():
    gradients = jnp.ones((31, 4), jnp.float32).at[30, 0].set(3.0)

    def last_norm(counts):
        optimizer = optim.scale_by_stable_spam(gamma1=0.0, gamma3=0.99, reset_interval=30, reset_counts=counts)
        return digits.updates(optimizer, gradients, gradients[0])[1].norm

    clipped = 1 + 2 * 0.01 / (1 - 0.99**31)
    np.testing.assert_allclose(last_norm("adam"), (clipped**2 + 3) ** 0.5, rtol=1e-4)
    np.testing.assert_allclose(last_norm("all"), 12**0.5, rtol=1e-4)


def test_a_tensor_of_zeros_stays_zero():
    zeros = jnp.zeros((3, 4), jnp.float32)
    updates, state = digits.updates(optim.scale_by_stable_spam(), zeros, zeros[0])
    assert not updates.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_bfloat16_gradients_have_float32_statistics():
    narrow = digits.gradients()["hidden"]["kernel"].astype(jnp.bfloat16)
    updates, state = digits.updates(optim.scale_by_stable_spam(), narrow, narrow[0])
    exact, _ = digits.updates(optim.scale_by_stable_spam(), narrow.astype(jnp.float32), narrow[0].astype(jnp.float32))
    assert updates.dtype == jnp.bfloat16
    assert state.largest.dtype == state.norm.dtype == state.square.dtype == jnp.float32
    # The first update is of magnitude 1 wherever there is a gradient; bfloat16 divides to within 2^-8 or so.
    np.testing.assert_allclose(updates[0].astype(jnp.float32), exact[0], atol=0.02)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"reset_interval": 0}, "reset_interval must be at least 1, got 0"),
        ({"reset_counts": "none"}, "reset_counts must be 'adam' or 'all', got 'none'"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        optim.stable_spam(1e-3, **arguments)


def test_without_its_parts_it_is_adam_on_unit_gradients():
    """Where all norms are equal AdaGN divides by them, and AdaClip has nothing to clip."""
    gradients = jax.tree.map(lambda g: g[:1].repeat(5, 0), digits.gradients())
    got, _ = digits.updates(optim.scale_by_stable_spam(), gradients)
    unit = jax.tree.map(lambda g: g / jnp.linalg.norm(g[0].ravel()), gradients)
    expected, _ = digits.updates(optax.scale_by_adam(), unit)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
