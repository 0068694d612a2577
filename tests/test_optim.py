"""The laws of optimizers: each holds for every row of the table.

An optimizer joins with a row: its name, a function that makes it, and what a loss is multiplied by if it wants that.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import chex
import digits
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qjax
from qjax import optim


class Row(NamedTuple):
    name: str
    make: Callable[[], optax.GradientTransformation]
    loss_scale: Callable = lambda state: 1.0


STOCHASTIC = qjax.Quantizer("e4m3", "stochastic")
OPTIMIZERS = [
    Row("adam, for comparison", lambda: optax.adam(1e-2)),
    Row("chop_updates", lambda: optax.chain(optim.chop_updates(STOCHASTIC, key=jax.random.key(0)), optax.sgd(0.3))),
    Row("chop_params", lambda: optax.chain(optax.sgd(0.3), optim.chop_params(STOCHASTIC, key=jax.random.key(0)))),
    Row("chop_params, Kahan", lambda: optax.chain(optax.sgd(0.3), optim.chop_params("bf16", residual="bf16"))),
    Row("chop_state", lambda: optim.chop_state(optax.sgd(0.1, 0.9), STOCHASTIC, key=jax.random.key(0))),
    Row("coat_adamw", lambda: optim.coat_adamw(1e-2)),
    Row("adamw_8bit", lambda: optim.adamw_8bit(1e-2, min_size=64)),
    Row("adamw_4bit", lambda: optim.adamw_4bit(1e-2, min_size=64)),
    Row(
        "scale_by_u_mup",
        lambda: optax.chain(
            optax.scale_by_adam(),
            optim.scale_by_u_mup(lambda path, update: "hidden" if update.ndim == 2 else "bias"),
            optax.scale_by_learning_rate(1e-1),
        ),
    ),
    Row("stable_spam", lambda: optim.stable_spam(1e-2, reset_interval=20, total_steps=50)),
    Row("sgd_sai", lambda: optim.sgd_sai(3e-2)),
    Row(
        "galore",
        lambda: optax.chain(
            optim.galore(optax.scale_by_adam(), 8, update_gap=5, scale=1.0), optax.scale_by_learning_rate(2e-2)
        ),
    ),
    Row("q_galore", lambda: optim.q_galore(3e-2, 8, key=jax.random.key(0), update_gap=20, scale=1.0)),
    Row("loss_scaling", lambda: optim.loss_scaling(optax.adam(1e-2), growth_interval=8), optim.loss_scale),
]


@pytest.fixture(autouse=True)
def promotion():
    """optax takes powers of floats with counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


every_optimizer = pytest.mark.parametrize("row", OPTIMIZERS, ids=lambda row: row.name)


def stepper(row: Row, optimizer):
    def step(carry, batch):
        params, state = carry
        scale = row.loss_scale(state)
        value, gradient = jax.value_and_grad(lambda params: scale * digits.loss(params, *batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value / scale

    return step


@functools.cache
def trained(name: str):
    """Returns the parameters and the state after a scan over all batches, and the losses."""
    row = next(row for row in OPTIMIZERS if row.name == name)
    optimizer = row.make()
    params = digits.initial()
    carry, losses = jax.jit(lambda carry: jax.lax.scan(stepper(row, optimizer), carry, digits.batches()))(
        (params, optimizer.init(params))
    )
    return *carry, losses


@every_optimizer
def test_halves_the_loss(row):
    losses = trained(row.name)[2]
    assert losses[-5:].mean() < losses[0] / 2


@every_optimizer
def test_a_loop_is_a_scan_and_compiles_once(row):
    optimizer = row.make()
    step = jax.jit(stepper(row, optimizer))
    params = digits.initial()
    carry = params, jax.jit(optimizer.init)(params)
    chex.assert_trees_all_equal(carry[1], optimizer.init(params))
    for batch in zip(*digits.batches(), strict=True):
        carry, _ = step(carry, batch)
    assert step._cache_size() == 1
    chex.assert_trees_all_equal(carry, trained(row.name)[:2])


@every_optimizer
def test_the_state_is_arrays(row):
    params, state, _ = trained(row.name)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, row.make().init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, digits.initial())


def two_steps(optimizer, params, gradients):
    """Returns the updates of every step."""
    state, every = optimizer.init(params), []
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        every.append(updates)
    return every


def recorded(*names):
    """Returns parameters and the gradients of two steps, of all layers or some."""
    names = names or tuple(digits.initial())
    params = {name: digits.initial()[name] for name in names}
    gradients = {name: digits.gradients()[name] for name in names}
    return params, [jax.tree.map(operator.itemgetter(i), gradients) for i in (0, 1)]


@functools.cache
def alone(name: str):
    row = next(row for row in OPTIMIZERS if row.name == name)
    return two_steps(row.make(), *recorded())


@every_optimizer
def test_masked_and_partitioned(row):
    params, gradients = recorded()
    hidden = two_steps(row.make(), *recorded("hidden"))
    masked = two_steps(optax.masked(row.make(), {"hidden": True, "out": False, "gain": False}), params, gradients)
    chex.assert_trees_all_equal(masked[-1], gradients[1] | hidden[-1])
    parts = optax.partition(
        {"this": row.make(), "none": optax.set_to_zero()}, {"hidden": "this", "out": "none", "gain": "none"}
    )
    chex.assert_trees_all_equal(two_steps(parts, params, gradients)[-1]["hidden"], hidden[-1]["hidden"])


@every_optimizer
def test_in_a_chain(row):
    params, gradients = recorded()
    (chained,) = two_steps(optax.chain(optax.identity(), row.make(), optax.scale(0.5)), params, gradients[:1])
    chex.assert_trees_all_equal(chained, jax.tree.map(lambda u: 0.5 * u, alone(row.name)[0]))


@every_optimizer
def test_sharded(row):
    """Sums over shards are added in another order: within 1e-5 of the largest update of a tensor."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def shard(x):
        spec = PartitionSpec("data") if x.ndim and x.shape[0] % 8 == 0 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    updates = two_steps(row.make(), *jax.tree.map(shard, recorded()))
    for update, exact in zip(jax.tree.leaves(updates), jax.tree.leaves(alone(row.name)), strict=True):
        np.testing.assert_allclose(update, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
