"""A format for each layer: what is measured, what is solved, and that it is the best there is."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.linen
from qjax import stats
from qjax.stats._sensitivity import Network, costs
from qjax.stats._suggest import solve

KEYS = jax.random.split(jax.random.key(0), 5)
X = jax.random.normal(KEYS[0], (64, 32), jnp.float32)
CANDIDATES = ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, width in (("first", 64), ("second", 32), ("third", 8)):
            x = nn.Dense(width, name=name)(x)
            x = nn.gelu(x) if name != "third" else x
        return x


NET = Net()
VARIABLES = NET.init(KEYS[1], X)


def fn(variables, x):
    return NET.apply(variables, x)


@functools.cache
def suggested():
    return stats.suggest(fn, CANDIDATES, 6.25, VARIABLES, X, points=4)


def divergence(a, b):
    p, q = (np.asarray(jax.nn.log_softmax(y), np.float64) for y in (a, b))
    return np.mean(np.sum(np.exp(p) * (p - q), -1))


def test_sensitivities_are_those_of_the_quantized_network():
    found = suggested()
    gemm = qjax.Gemm(qjax.Quantizer("mxfp4"), qjax.Quantizer("mxfp4"))
    model = qjax.linen.quantize(NET, {"second": qjax.Recipe(gemm), ".*": None})
    # The mean of differences of logarithms of float32 numbers near 1: a few of their units in the last place.
    assert found.sensitivity[1, 0] == pytest.approx(divergence(fn(VARIABLES, X), model.apply(VARIABLES, X)), abs=1e-6)
    whole = qjax.linen.quantize(NET, found.rule)
    assert found.best.divergence == pytest.approx(divergence(fn(VARIABLES, X), whole.apply(VARIABLES, X)), abs=1e-6)
    assert list(found.best.formats) == ["first", "second", "third"]


@pytest.mark.parametrize("pairwise", [False, True])
def test_the_choice_is_that_of_brute_force(pairwise):
    budget = 6.25
    found = stats.suggest(fn, CANDIDATES, budget, VARIABLES, X, pairwise=True, points=4) if pairwise else suggested()
    network = Network(
        "test", fn, [qjax.Recipe(qjax.Gemm(q, q)) for q in map(qjax.Quantizer, CANDIDATES)], (VARIABLES, X), {}
    )
    cost = costs(network.sites, [(f.bits, f.bits) for f in map(qjax.format, CANDIDATES)], "bits")
    sizes = np.array([32 * 64, 64 * 32, 32 * 8])
    assert np.allclose(cost, np.outer(sizes / sizes.sum(), [4.25, 6.25, 8.25]))
    alone = found.sensitivity
    pairs = network.interactions(alone) if pairwise else np.zeros((3, 3, 3, 3))
    rows = np.arange(3)

    def predicted(picked):
        return alone[rows, picked].sum() + sum(pairs[i, picked[i], j, picked[j]] for i, j in ((0, 1), (0, 2), (1, 2)))

    every = [p for p in itertools.product(range(3), repeat=3) if cost[rows, p].sum() <= budget]
    best = min(map(predicted, every))
    assert predicted(solve(alone, cost, budget, pairs if pairwise else None)) == best
    # Never worse than one format everywhere, of those that the budget allows.
    assert found.best.cost <= budget
    assert found.best.divergence <= min(c.divergence for c in found.uniform.values() if c.cost <= budget)
    # The front ascends in cost and descends in what it predicts.
    front = [(c.cost, c.predicted) for c in found.front]
    assert front == sorted(front) and [p for _, p in front] == sorted((p for _, p in front), reverse=True)


def test_random_programs_are_solved_exactly():
    rng = np.random.default_rng(0)
    for _ in range(20):
        alone, cost = rng.exponential(size=(4, 3)) * 1e-5, rng.integers(1, 9, (4, 3)).astype(float)
        pairs = rng.normal(size=(4, 3, 4, 3)) * 1e-5
        budget = float(rng.integers(cost.min(1).sum(), cost.max(1).sum() + 1))
        rows = np.arange(4)

        def total(picked, alone=alone, pairs=pairs, rows=rows):
            return alone[rows, picked].sum() + sum(
                pairs[i, picked[i], j, picked[j]] for i, j in itertools.combinations(range(4), 2)
            )

        every = [p for p in itertools.product(range(3), repeat=4) if cost[rows, p].sum() <= budget]
        picked = solve(alone, cost, budget, pairs)
        assert cost[rows, picked].sum() <= budget and np.isclose(
            total(picked), min(map(total, every)), rtol=0, atol=1e-16
        )


def test_curvature_is_the_trace_of_the_hessian():
    w = jax.random.normal(KEYS[2], (4, 3), jnp.float32)
    x = X[:8, :4]
    network = Network("test", lambda w, x: x @ w, [], (w, x), {})
    found = network.curvature(KEYS[3], 400)[""]

    def loss(shift):
        p, q = (jax.nn.log_softmax(x @ v) for v in (w, w + shift))
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))

    hessian = np.asarray(jax.hessian(loss)(jnp.zeros_like(w)), np.float64).reshape(12, 12)
    exact, others = np.trace(hessian) / 12, hessian - np.diag(np.diag(hessian))
    # The variance of v (H v) with random signs is 2 ||H||^2 off the diagonal, and here also that of the block of x.
    spread = np.sqrt(2 * np.sum(others**2) / 400) / 12
    assert abs(found["rhs"] - exact) < 5 * max(spread, exact / 20)


def test_curvature_ranks_the_formats_as_the_divergence_does():
    measured = suggested().sensitivity
    options = dict(sensitivity="hessian", key=KEYS[4], points=1)
    curved = stats.suggest(fn, CANDIDATES, 6.25, VARIABLES, X, **options).sensitivity
    assert np.all(curved[:, 0] > 5 * curved[:, 1:].max(1))  # E2M3 and E4M3 have the same precision
    # To second order, of errors taken as independent: within a factor of two of the divergence for small ones.
    assert np.all(np.abs(np.log2(curved[:, 1:] / measured[:, 1:])) < 1)


def test_units_and_nnx():
    class Module(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Linear(32, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    module = Module()
    found = stats.suggest(lambda m, x: m(x), ("int4_channel", "int8_channel"), 400, module, X, unit="bytes", points=3)
    assert found.uniform["int4_channel"].cost == (32 * 16 + 16 * 4) / 2 and found.best.cost <= 400
    found = stats.suggest(lambda m, x: m(x), ("int4_channel",), 10**7, module, X, unit="bit_operations", points=1)
    assert found.best.cost == 64 * (32 * 16 + 16 * 4) * 16


def test_what_only_does_not_match_stays_in_full_precision():
    found = stats.suggest(fn, CANDIDATES, 6.25, VARIABLES, X, only="first|second", points=1)
    assert list(found.best.formats) == ["first", "second"] and found.uniform["mxfp4"].cost == 4.25
    assert np.array_equal(found.sensitivity, suggested().sensitivity[:2])
    assert list(found.rule) == ["first", "second", ".*"] and found.rule[".*"] is None
    assert len(suggested().rule) == 3
    whole = qjax.linen.quantize(NET, found.rule)
    # As above: differences of logarithms near 1.
    assert found.best.divergence == pytest.approx(divergence(fn(VARIABLES, X), whole.apply(VARIABLES, X)), abs=1e-6)
    options = dict(sensitivity="hessian", key=KEYS[4], points=1, only="second")
    assert stats.suggest(fn, CANDIDATES, 6.25, VARIABLES, X, **options).sensitivity.shape == (1, 3)


def test_the_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = suggested()
    axes = found.plot()
    assert {t.get_text() for t in axes.texts} == set(CANDIDATES)
    assert axes.get_xlabel() == "bits" and axes.lines[-1].get_xdata()[0] == found.best.cost
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    "message, call",
    [
        (
            "suggest: the cheapest formats cost 4.25 bits, more than the budget 4",
            lambda: stats.suggest(fn, CANDIDATES, 4, VARIABLES, X),
        ),
        ("suggest: unit must be 'bits', 'bytes'", lambda: stats.suggest(fn, CANDIDATES, 9, VARIABLES, X, unit="watts")),
        (
            "suggest: sensitivity must be 'kl' or 'hessian'.*got 'hessian' and True",
            lambda: stats.suggest(fn, CANDIDATES, 9, VARIABLES, X, sensitivity="hessian", pairwise=True),
        ),
        (
            "suggest: key=.* is for sensitivity='hessian'",
            lambda: stats.suggest(fn, CANDIDATES, 9, VARIABLES, X, key=KEYS[0]),
        ),
        ("suggest: there is no dot product .* quantized.$", lambda: stats.suggest(jnp.sin, CANDIDATES, 9, X)),
        (
            "quantized whose path matches 'frist'; the nearest are 'first', ",
            lambda: stats.suggest(fn, CANDIDATES, 9, VARIABLES, X, only="frist"),
        ),
        (
            "suggest: pattern '\\(' is not a regular expression",
            lambda: stats.suggest(fn, CANDIDATES, 9, VARIABLES, X, only="("),
        ),
    ],
)
def test_refusals(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_solution_is_an_error():
    with pytest.raises(RuntimeError, match="suggest: HiGHS found no solution"):
        solve(np.ones((2, 2)), np.ones((2, 2)), 1.0)
