"""Loss scaling: the scale against its rule, and what an overflow leaves untouched."""

import chex
import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_optim import promotion as promotion

from qjax import optim


def scales(finite, growth_interval, scale, low, high):
    """Returns the scale after each step by the rule of Micikevicius et al."""
    good = 0
    for ok in finite:
        good = good + 1 if ok else 0
        if not ok:
            scale = max(scale / 2, low)
        elif good == growth_interval:
            scale, good = min(scale * 2, high), 0
        yield scale


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("low, high", [(1.0, 2.0**24), (64.0, 256.0), (128.0, 128.0)])
def test_the_rule(bad, low, high):
    finite = np.random.default_rng(0).random(50) < 0.8
    optimizer = optim.loss_scaling(optax.sgd(1.0), 128.0, growth_interval=3, min_scale=low, max_scale=high)
    params = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros((), jnp.float32)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for ok, scale in zip(finite, scales(finite, 3, 128.0, low, high), strict=True):
        last = optim.loss_scale(state)
        gradients = {"a": jnp.array([0.3, 0.3 if ok else bad], jnp.float32), "b": jnp.array(0.3, jnp.float32)}
        updates, state = update(optax.tree.scale(last, gradients), state)
        expected = optax.tree.scale(-1.0, gradients) if ok else optax.tree.zeros_like(gradients)
        chex.assert_trees_all_equal(updates, expected)
        assert optim.loss_scale(state) == scale
    assert state.guarded.total_notfinite == (~finite).sum()


def test_powers_of_two_change_no_bit():
    gradients = digits.gradients()
    unscaled, _ = digits.updates(optim.loss_scaling(optax.identity()), optax.tree.scale(2.0**15, gradients))
    chex.assert_trees_all_equal(unscaled, gradients)


def test_an_overflow_leaves_the_inner_state():
    optimizer, params = optim.loss_scaling(optax.adam(1e-2)), digits.initial()
    gradients = jax.tree.map(lambda g: g[0], digits.gradients())
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    spoiled = gradients | {"gain": jnp.array(jnp.nan, jnp.float32)}
    updates, after = optimizer.update(spoiled, state, params)
    chex.assert_trees_all_equal(after.guarded.inner_state, state.guarded.inner_state)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))


def test_it_saves_gradients_that_float16_loses():
    """With float32 parameters and float16 activations, and a loss too small for float16 without a scale."""
    params, (images, labels) = digits.initial(), (part[0] for part in digits.batches())

    def loss(params, scale):
        narrow = jax.tree.map(lambda p: p.astype(jnp.float16), params)
        return digits.loss(narrow, images.astype(np.float16), labels).astype(jnp.float32) * 1e-5 * scale

    optimizer = optim.loss_scaling(optax.sgd(1.0), 2.0**12)
    state = optimizer.init(params)
    exact = jax.tree.map(lambda g: -1e-5 * g, jax.grad(digits.loss)(params, images, labels))
    lost = jax.grad(loss)(params, 1.0)
    kept, _ = optimizer.update(jax.grad(loss)(params, optim.loss_scale(state)), state, params)

    def error(g, sign):
        return optax.tree.norm(optax.tree.sub(optax.tree.scale(sign, g), exact)) / optax.tree.norm(exact)

    assert error(kept, 1) < 0.01 < 0.1 < error(lost, -1)


def test_extra_arguments_reach_the_inner_transformation():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda updates, state, params=None, *, value: (value, state)
    )
    optimizer, x = optim.loss_scaling(inner), jnp.ones(2, jnp.float32)
    updates, _ = optimizer.update(x, optimizer.init(x), value=3 * x)
    np.testing.assert_array_equal(updates, 3 * x)


@pytest.mark.parametrize("arguments, text", [
    ({"scale": 0.5}, "expected 0 < min_scale <= scale <= max_scale, got min_scale=1.0, scale=0.5"),
    ({"growth_interval": 0}, "growth_interval must be at least 1, got 0"),
])  # fmt: skip
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        optim.loss_scaling(optax.sgd(1.0), **arguments)


def test_a_state_without_a_scale():
    with pytest.raises(ValueError, match="state has no loss scale; make the optimizer with"):
        optim.loss_scale(optax.adam(1e-3).init(jnp.zeros(2, jnp.float32)))
