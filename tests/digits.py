"""A small problem on real data for the tests of optimizers: scikit-learn's digits and a network of two layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

STEPS, BATCH = 50, 64


@functools.cache
def batches():
    """Returns images and labels of ``STEPS`` batches, drawn from the digits."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).integers(0, len(labels), (STEPS, BATCH))
    return (images[chosen] / 16).astype(np.float32), labels[chosen].astype(np.int32)


def initial():
    """Returns the parameters, with one tensor of a single element."""
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": {"kernel": jax.random.normal(first, (64, 32), jnp.float32) / 8, "bias": jnp.zeros(32, jnp.float32)},
        "out": {"kernel": jax.random.normal(second, (32, 16), jnp.float32) / 6, "bias": jnp.zeros(16, jnp.float32)},
        "gain": jnp.ones((), jnp.float32),
    }


def loss(params, images, labels):
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = params["gain"] * (hidden @ params["out"]["kernel"] + params["out"]["bias"][None])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def gradients():
    """Returns the gradients of ``STEPS`` steps of SGD, stacked."""

    def step(params, batch):
        gradient = jax.grad(loss)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), gradient

    return jax.lax.scan(step, initial(), batches())[1]


def updates(optimizer, gradients, params=None):
    """Returns the updates of an optimizer at every step, stacked, and its last state; the parameters do not move."""
    params = initial() if params is None else params

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return state, updates

    state, stacked = jax.jit(lambda state: jax.lax.scan(step, state, gradients))(optimizer.init(params))
    return stacked, state
