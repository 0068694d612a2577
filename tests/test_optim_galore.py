"""GaLore and Q-GaLore against the equations of their papers, in float64.

Float32 finds singular vectors within some ``2^-24 s_1 / d``, d the distance of their singular values from the next;
for the gradients on digits that is below 1e-4, and the tolerance is 1e-3.
"""

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_optim import promotion as promotion

import qjax
from qjax import optim

RANK = 4
MATRICES = {"tall": lambda: digits.gradients()["hidden"]["kernel"], "wide": lambda: tall().transpose(0, 2, 1)}
tall = MATRICES["tall"]


def basis_of(g):
    """Returns the first singular vectors of a matrix on its shorter side, as rows."""
    u, _, v = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    return v[:RANK] if g.shape[0] >= g.shape[1] else u[:, :RANK].T


def lazily(gradients, gap, threshold, size):
    """Returns the basis at each step, and the cosines and the gap at the end."""
    bases, cosines, basis = [], [], None
    for step, g in enumerate(gradients):
        if step % gap == 0:
            new = basis_of(g)
            if basis is not None:
                cosines = [*cosines, abs(basis[0] @ new[0])][-size:]
                if len(cosines) == size and np.mean(cosines) >= threshold:
                    gap *= 2
            basis = new
        bases.append(basis)
    return bases, cosines, gap


@pytest.mark.parametrize("side", MATRICES)
@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_the_subspace_and_when_it_is_renewed(side, threshold):
    gradients = MATRICES[side]()
    optimizer = optim.galore(
        optax.identity(), RANK, projection=None, update_gap=3, cos_threshold=threshold, queue_size=3, scale=0.5
    )
    updates, state = digits.updates(optimizer, gradients, gradients[0])
    bases, cosines, gap = lazily(gradients, 3, threshold, 3)
    for update, g, q in zip(updates, gradients, bases, strict=True):
        expected = 0.5 * (g @ q.T @ q if side == "tall" else q.T @ q @ g)
        np.testing.assert_allclose(update, expected, atol=1e-3 * np.abs(expected).max())
    p = state.projections
    np.testing.assert_allclose(p.cosines, cosines, atol=1e-3)
    assert p.gap == gap
    assert p.computed == sum(a is not b for a, b in zip(bases, [None, *bases], strict=False))


@pytest.mark.parametrize("side", MATRICES)
def test_adam_runs_in_the_subspace(side):
    gradients = MATRICES[side]()
    updates, state = digits.updates(optim.galore(optax.scale_by_adam(), RANK, projection=None), gradients, gradients[0])
    q = basis_of(gradients[0])
    assert state.inner.mu.shape == ((64, RANK) if side == "tall" else (RANK, 64))
    m = v = 0
    for t, g in enumerate(np.asarray(gradients, np.float64), 1):
        low = g @ q.T if side == "tall" else q @ g
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        expected = 0.25 * (u @ q if side == "tall" else q.T @ u)
        # Adam makes what is small as large as the rest, and with it the error of the vectors.
        np.testing.assert_allclose(updates[t - 1], expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("side", MATRICES)
def test_the_basis_is_stored_in_four_bits(side):
    gradients = MATRICES[side]()
    optimizer = optim.galore(optax.identity(), RANK, scale=1.0)
    updates, state = digits.updates(optimizer, gradients[:1], gradients[0])
    stored = state.projections.basis
    assert isinstance(stored, qjax.QTensor) and stored.codes.shape == (RANK, 16) and stored.codes.dtype == jnp.uint8
    q = basis_of(gradients[0])
    decoded = np.asarray(qjax.decode(stored))
    q *= np.sign(np.sum(q * decoded, axis=1, keepdims=True))
    step = (q.max(1) - q.min(1))[:, None] / 15
    zero = np.clip(np.round(-q.min(1)[:, None] / step), 0, 15)
    expected = (np.clip(np.round(q / step) + zero, 0, 15) - zero) * step
    # An element that float32 sees on the other side of a tie is one step off.
    off = np.abs(decoded - expected)
    assert (off < 1.01 * step).all() and (off > 0.01 * step).mean() < 0.02
    g = np.asarray(gradients[0], np.float64)
    expected = g @ decoded.T @ decoded if side == "tall" else decoded.T @ decoded @ g
    np.testing.assert_allclose(updates[0], expected, atol=1e-5 * np.abs(expected).max())


def test_other_tensors_go_to_the_inner_transformation_as_they_are():
    optimizer = optim.galore(optax.scale_by_adam(), 16)
    updates, state = digits.updates(optimizer, digits.gradients())
    plain, _ = digits.updates(optax.scale_by_adam(), digits.gradients())
    assert state.projections["out"] == {"kernel": None, "bias": None}
    np.testing.assert_allclose(updates["out"]["kernel"], plain["out"]["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates["gain"], plain["gain"], rtol=1e-5, atol=1e-6)


def test_q_galore_holds_weights_and_moments_in_8_bits():
    params = digits.initial()
    params["hidden"]["kernel"] = qjax.chop(params["hidden"]["kernel"], "uint8_g256")
    gradients = jax.tree.map(lambda g: g[0], digits.gradients())
    optimizer = optim.q_galore(0.01, 16, key=jax.random.key(0), min_size=256, weight_decay=0.1)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    held = [leaf.fmt.element.bits for leaf in jax.tree.leaves(state, is_leaf=is_qtensor) if is_qtensor(leaf)]
    assert sorted(held) == [4, 8, 8, 8, 8]  # A basis, and the moments of the two kernels.
    # Every row is a block, whose ends the zero point moves by up to half a step: 254 or 255 steps lie between them.
    weights = np.asarray(optax.apply_updates(params, updates)["hidden"]["kernel"], np.float64)
    codes = [weights * steps / np.ptp(weights, axis=1, keepdims=True) for steps in (254, 255)]
    assert (np.min([np.abs(c - np.round(c)).max(1) for c in codes], axis=0) < 0.01).all()


def is_qtensor(x):
    return isinstance(x, qjax.QTensor)


@pytest.mark.parametrize("name", ["rank", "update_gap", "queue_size"])
def test_errors(name):
    with pytest.raises(ValueError, match=f"galore: {name} must be at least 1, got 0"):
        optim.galore(optax.identity(), **{"rank": 4, name: 0})


def test_nothing_to_project():
    with pytest.raises(ValueError, match="no tensor is a matrix with both sides over rank 32, the shapes are"):
        optim.galore(optax.identity(), 32).init(digits.initial())
