"""Bits that are wrong: the chosen ones, as often as said, the same for the same key, and counted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import bits as pattern

import qjax
import qjax.optim

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(16, 96)).astype(np.float32)
FORMATS = ["e4m3", "e2m1", "int8", "int3", "nf4", "fp32", "mxfp4", "nvfp4", "uint4_g32"]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["flip", "stuck_at_0", "stuck_at_1"])
def test_chosen_bits_are_struck(fmt, kind):
    clean = qjax.encode(X, fmt, saturate=True)
    width = clean.element.bits
    chosen = (0, width - 1)
    mask = (1 | 1 << (width - 1)) & (2**width - 1)
    before = np.asarray(clean.unpacked())
    expected = {"flip": before ^ mask, "stuck_at_0": before & ~before.dtype.type(mask), "stuck_at_1": before | mask}[
        kind
    ]
    struck, changed = qjax.Faults(1.0, chosen, kind).strike(clean, key=KEY)
    assert np.array_equal(struck.unpacked(), expected)
    assert int(changed) == sum(int(x).bit_count() for x in (before ^ expected).ravel())
    # The scales are as they were, and the Quantizer gives what is stored.
    assert jax.tree.all(jax.tree.map(np.array_equal, struck.scales, clean.scales))
    value = qjax.Quantizer(fmt, faults=qjax.Faults(1.0, chosen, kind))(X, key=KEY)
    assert np.array_equal(pattern(value), pattern(qjax.decode(struck)))


def test_bits_are_struck_at_the_rate_and_independently():
    n, rate = 2**18, 0.01
    codes = qjax.encode(jnp.zeros(n, jnp.float32), "uint8")
    struck, changed = qjax.Faults(rate).strike(codes, key=KEY)
    found = np.unpackbits(np.asarray(struck.codes)[:, None], axis=1)
    assert int(changed) == found.sum()
    # Of a binomial distribution, five standard deviations.
    assert np.all(np.abs(found.sum(0) - n * rate) < 5 * np.sqrt(n * rate))
    pairs = np.array([np.sum(found[:, i] & found[:, j]) for i in range(8) for j in range(i)])
    assert np.all(np.abs(pairs - n * rate**2) < 5 * np.sqrt(n * rate**2))
    neighbours = np.sum(found[1:] & found[:-1], axis=0)
    assert np.all(np.abs(neighbours - n * rate**2) < 5 * np.sqrt(n * rate**2))
    nothing, none = qjax.Faults(0.0).strike(codes, key=KEY)
    assert np.array_equal(nothing.codes, codes.codes) and int(none) == 0


def test_a_larger_rate_strikes_more_of_the_same():
    codes = qjax.encode(X, "e4m3")
    masks = []
    for rate in (1e-3, 1e-2, 1e-1):
        struck, _ = qjax.Faults(rate, bits=(1, 6)).strike(codes, key=KEY)
        masks.append(np.asarray(struck.codes) ^ np.asarray(codes.codes))
    assert all(np.array_equal(a & b, a) for a, b in itertools.pairwise(masks))
    assert masks[0].any() and not (masks[2] & ~np.uint8(0b01000010)).any()


def test_keys_and_seeds_reproduce():
    by_key = qjax.Quantizer("e4m3", faults=qjax.Faults(0.05))
    by_seed = qjax.Quantizer("e4m3", faults=qjax.Faults(0.05, kind="stuck_at_1", seed=3))
    assert by_key.is_stochastic and not by_seed.is_stochastic
    same, other = by_key(X, key=KEY), by_key(X, key=jax.random.key(1))
    assert np.array_equal(pattern(same), pattern(jax.jit(by_key)(X, key=KEY)))
    assert not np.array_equal(pattern(same), pattern(other))
    # Stuck cells are the same whatever is in them: what is written twice is as it was written once.
    once = by_seed(X)
    assert np.array_equal(pattern(once), pattern(by_seed(once)))
    assert not np.array_equal(pattern(once), pattern(qjax.Quantizer("e4m3", faults=qjax.Faults(0.05, seed=4))(X)))


def test_rounding_draws_what_it_draws_without_faults():
    clean = qjax.Quantizer("int4", "stochastic")
    faulty = qjax.Quantizer("int4", "stochastic", faults=qjax.Faults(0.1))
    a, b = np.asarray(clean(3 * X, key=KEY)), np.asarray(faulty(3 * X, key=KEY))
    _, changed = faulty.encode(3 * X, key=KEY)
    # An element has 4 bits: those that differ are at most as many as the bits, and at least a fourth of them.
    assert int(changed) / 4 <= np.sum(a != b) <= int(changed)


def test_the_gradient_is_the_estimator_s():
    faulty = qjax.Quantizer("int4", faults=qjax.Faults(0.2))
    assert np.array_equal(jax.grad(lambda x: jnp.sum(faulty(x, key=KEY)))(X), np.ones_like(X))
    clipped = qjax.Quantizer("int4", estimator=qjax.Clipped(), faults=qjax.Faults(0.2))
    x = jnp.array([3.0, 9.0], jnp.float32)
    assert jax.grad(lambda x: jnp.sum(clipped(x, key=KEY)))(x).tolist() == [1, 0]


def test_products_have_faulty_operands():
    faults = qjax.Faults(0.02, bits=(0, 1, 2, 7), seed=1)
    quantizer = qjax.Quantizer("e4m3", faults=faults)
    weights = X[:8]
    numbers = (((1,), (1,)), ((), ()))
    out = qjax.dot_general(X, weights, numbers, recipe=qjax.Recipe(qjax.Gemm(quantizer, None)))
    assert np.array_equal(out, jax.lax.dot_general(quantizer(X), weights, numbers))
    # With a key: that of the operand, as rounding has it.
    drawn = qjax.Quantizer("e4m3", faults=qjax.Faults(0.02, bits=(0, 1)))
    out = qjax.dot_general(X, weights, numbers, recipe=qjax.Recipe(qjax.Gemm(drawn, None)), key=KEY)
    expected = jax.lax.dot_general(drawn(X, key=jax.random.fold_in(KEY, 0)), weights, numbers)
    assert np.array_equal(out, expected)
    # What is saved for the backward pass is struck in store.
    recipe = qjax.Recipe(save_lhs=quantizer)
    gradient = jax.grad(lambda w: jnp.sum(qjax.dot_general(X, w, numbers, recipe=recipe)))(weights)
    assert np.allclose(gradient, np.asarray(quantizer(X)).sum(0)[None], rtol=1e-5)
    assert "e4m3 with flip faults x -" in str(
        qjax.coverage(lambda x: x @ x.T, X, rule=qjax.Recipe(qjax.Gemm(quantizer)))
    )


def test_stored_optimizer_states_have_faults():
    faulty = qjax.Quantizer("int8_tensor", faults=qjax.Faults(1.0, bits=(7,), seed=0))
    momentum = qjax.optim.chop_state(optax.trace(0.9), faulty)
    state = momentum.init(jnp.ones(4, jnp.float32))
    _, state = momentum.update(jnp.ones(4, jnp.float32), state)
    update, _ = momentum.update(jnp.zeros(4, jnp.float32), state)
    assert np.all(np.asarray(update) < 0)  # the sign bit of all momenta was struck


@pytest.mark.parametrize(
    "message, call",
    [
        ("Faults: rate must be a probability from 0 to 1, got 2", lambda: qjax.Faults(2)),
        (
            "Faults: kind must be 'flip', 'stuck_at_0' or 'stuck_at_1', got 'stuck'",
            lambda: qjax.Faults(0.1, kind="stuck"),
        ),
        ("Faults: bits must be different places from 0", lambda: qjax.Faults(0.1, bits=(1, 1))),
        (
            r"Faults: bit 8 does not exist in Float\(4, 3, specials='fn'\), which has bits 0 to 7",
            lambda: qjax.Quantizer("e4m3", faults=qjax.Faults(0.1, bits=(8,)))(X, key=KEY),
        ),
        ("Faults: without a seed they need key", lambda: qjax.Quantizer("e4m3", faults=qjax.Faults(0.1))(X)),
        (
            "Faults: with a seed they take no key",
            lambda: qjax.Faults(0.1, seed=0).strike(qjax.encode(X, "e4m3"), key=KEY),
        ),
        (
            "Quantizer: key was given, but the rounding draws nothing and the faults have a seed",
            lambda: qjax.Quantizer("e4m3", faults=qjax.Faults(0.1, seed=0))(X, key=KEY),
        ),
        ("Quantizer: faults must be a qjax.Faults or None, got 0.1", lambda: qjax.Quantizer("e4m3", faults=0.1)),
    ],
)
def test_refusals(message, call):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
