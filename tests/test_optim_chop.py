"""chop_updates and chop_params: every step on the grid, Kahan's sum, where nearest stalls and stochastic does not."""

import digits
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import qjax
from qjax import optim

FEW_BITS = ["bf16", "e4m3", "e5m2", "q2.6", "mxfp8_e4m3"]
ALL_BITS = ["dynamic8", "int8_channel"]


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_updates_are_chopped():
    gradients = digits.gradients()
    updates, _ = digits.updates(optim.chop_updates("e4m3"), gradients)
    for got, g in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True):
        expected = np.asarray(g).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("make", [optim.chop_updates, optim.chop_params], ids=["chop_updates", "chop_params"])
def test_each_step_and_each_array_draws_anew(make):
    q, zeros = qjax.Quantizer("int4", "stochastic"), {name: jnp.zeros(256, jnp.float32) for name in "ab"}
    tx = make(q, key=jax.random.key(3))
    state, seen = tx.init(zeros), []
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(lambda x: x + 0.5, zeros), state, zeros)
        seen += [np.asarray(u).tobytes() for u in updates.values()]
    assert len(set(seen)) == 4
    again = make(q, key=jax.random.key(3))
    first, _ = again.update(jax.tree.map(lambda x: x + 0.5, zeros), again.init(zeros), zeros)
    assert np.asarray(first["a"]).tobytes() == seen[0]


@pytest.mark.parametrize("name", FEW_BITS + ALL_BITS)
def test_params_land_on_the_grid(name):
    """At every step of SGD on real gradients: on the bits, or within the two roundings of w - p and p + (w - p)."""
    q = qjax.Quantizer(name)
    tx = optim.chop_params(q)
    params = jax.tree.map(q, digits.initial())
    state = tx.init(params)
    for i in range(digits.STEPS):
        steps = jax.tree.map(lambda g, i=i: np.float32(-0.1) * g[i], digits.gradients())
        expected = jax.tree.map(lambda p, u: q(p + u), params, steps)
        updates, state = jax.jit(tx.update)(steps, state, params)
        before, params = params, jax.jit(optax.apply_updates)(params, updates)
        for p, w, old in zip(*map(jax.tree.leaves, (params, expected, before)), strict=True):
            assert np.array_equal(p, w) or name in ALL_BITS
            assert (np.abs(p - w) <= np.spacing(np.abs(w) + np.abs(old))).all()


def test_kahan_is_the_sum_in_bfloat16():
    """Zamirai et al., algorithm 3, in the arithmetic of ml_dtypes: u is rounded once with what the last step lost."""
    bf16 = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)  # noqa: E731
    tx = optim.chop_params("bf16", residual="bf16")
    w = bf16(np.asarray(digits.initial()["out"]["kernel"]))
    steps = -0.01 * np.asarray(digits.gradients()["out"]["kernel"])
    params, state, lost, exact = jnp.asarray(w), tx.init(jnp.asarray(w)), np.zeros_like(w), w.astype(np.float64)
    for u in steps:
        carried = u + lost
        landed = bf16(w + carried)
        lost, w = bf16(carried - (landed - w)), landed
        updates, state = tx.update(jnp.asarray(u), state, params)
        params = optax.apply_updates(params, updates)
        assert np.array_equal(params, w)
        exact += u
    # The residual is at most half a spacing of bfloat16, 2^-9 |w|, and each step rounds it, by 2^-9 of that. The sums
    # round by 2^-24: less than as much again.
    assert np.abs(w + lost - exact).max() <= 2 * digits.STEPS * 2.0**-18 * np.abs(w).max()


def run(tx, w, u, steps):
    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jnp.full_like(w, u), state, w)
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (w, tx.init(w)), length=steps)[0][0]


def test_nearest_stalls_stochastic_and_kahan_do_not():
    """1000 updates of 2^-12 at 1, whose spacing is 2^-7: the sum is 1.244.

    A stochastic sum has a variance of at most 1000 p (1 - p) 2^-14 with p = 2^-5: over 4096 of them the mean is within
    5 deviations of 5 2^-7 sqrt(1000 p / 4096) = 0.0034.
    """
    ones = jnp.ones(4096, jnp.float32)
    assert (run(optim.chop_params("bf16"), ones, 2.0**-12, 1000) == 1).all()
    stochastic = optim.chop_params(qjax.Quantizer("bf16", "stochastic"), key=jax.random.key(0))
    assert abs(float(run(stochastic, ones, 2.0**-12, 1000).mean()) - (1 + 1000 / 4096)) < 0.0035
    kahan = run(optim.chop_params("bf16", residual="bf16"), ones, 2.0**-12, 1000)
    assert np.abs(np.asarray(kahan) - (1 + 1000 / 4096)).max() <= 2.0**-8


def test_bfloat16_params():
    """The sum is float32's, though the arrays are bfloat16."""
    w, u = jnp.ones(3, jnp.bfloat16), jnp.full(3, 2.0**-7, jnp.bfloat16)
    tx = optim.chop_params("e5m2")
    updates, _ = tx.update(u, tx.init(w), w)
    assert updates.dtype == jnp.float32
    assert np.array_equal(optax.apply_updates(w, updates), jnp.ones(3, jnp.bfloat16))


STOCHASTIC = qjax.Quantizer("bf16", "stochastic")
REFUSALS = {
    r"chop_updates: the rounding is stochastic and needs key=jax.random.key": lambda: optim.chop_updates(STOCHASTIC),
    r"chop_updates: key was given, but no rounding is stochastic": lambda: optim.chop_updates(
        "bf16", key=jax.random.key(0)
    ),
    r"chop_params: the rounding is stochastic and needs key": lambda: optim.chop_params("bf16", residual=STOCHASTIC),
    r"chop_params: update needs the params": lambda: optim.chop_params("bf16").update(
        jnp.zeros(1), optim.chop_params("bf16").init(jnp.zeros(1))
    ),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises(ValueError, match=text):
        REFUSALS[text]()
