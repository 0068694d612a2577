"""Scaling laws: forms against NumPy, constants found again, the reference fits of public runs, and what is refused."""

import csv
import math
import pathlib

import jax
import numpy as np
import pytest

from qjax import laws

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
needs_runs = pytest.mark.skipif(not DATA.exists(), reason="the public runs are not here")


def grid(**columns):
    arrays = np.meshgrid(*columns.values(), indexing="ij")
    return {name: array.ravel() for name, array in zip(columns, arrays, strict=True)}


# Hoffmann et al.: a design of some 240 runs. Others: the setups of the papers.
CHINCHILLA_RUNS = grid(N=np.geomspace(44e6, 16e9, 16), D=np.geomspace(1e9, 1e12, 15))
CAPYBARA = {"N": [40894464, 84934656, 154140672, 679477248], "D": [10485760000, 20971520000, 52428800000, 104857600000]}
EPFL_N, RATIOS = np.array([30482560, 49556736, 102777856, 203188480]), np.array([25, 50, 100, 200, 400, 800])


def ratios(**levels):
    runs = grid(N=EPFL_N, ratio=RATIOS, **levels)
    return {**runs, "D": runs["N"] * runs["ratio"]}


KUMAR_RUNS = grid(
    N=[30e6, 60e6, 110e6, 220e6],
    D=[1.5e9, 3e9, 6e9, 13e9, 26e9],
    P_w=[3, 4, 5, 6, 12, math.inf],
    P_a=[4, 6, 12],
    P_kv=[4, 6, 12],
)
# A row: the law, the runs of its paper, and in full precision where the law has that, and options of the fit.
PUBLISHED = {
    "power": (laws.POWER.model(c=400.0, alpha=0.34), {"x": np.geomspace(1e6, 1e10, 9)}, {}),
    "saturating power": (
        laws.SATURATING_POWER.model(c=400.0, alpha=0.34, E=1.7),
        {"x": np.geomspace(1e6, 1e10, 9)},
        {},
    ),
    "chinchilla": (laws.CHINCHILLA.published, CHINCHILLA_RUNS, {}),
    "chinchilla, replication": (laws.CHINCHILLA_REPLICATION.published, CHINCHILLA_RUNS, {}),
    "chinchilla, tied": (
        laws.CHINCHILLA.model(A=400.0, B=900.0, E=1.8, alpha=0.35, beta=0.35),
        CHINCHILLA_RUNS,
        {"tied": {"beta": "alpha"}},
    ),
    "precision": (laws.PRECISION.published, KUMAR_RUNS, {}),
    "precision, untied": (laws.PRECISION.published, KUMAR_RUNS, {"tied": {}}),
    "post training": (
        laws.POST_TRAINING.published,
        grid(
            N=[30e6, 220e6],
            D=[1.5e9, 6e9, 26e9],
            P_w=[4, 6, 12, math.inf],
            P_a=[4, 6, 12],
            P_kv=[4, 6, 12],
            P_post=[2, 3, 4],
        ),
        {},
    ),
    "float quantization": (
        laws.FLOAT_QUANTIZATION.published,
        grid(**CAPYBARA, E=[1, 2, 3, 4, 5, math.inf], M=[1, 2, 3, 4, 5, math.inf], B=[32, 128, 2**13.1567]),
        {},
    ),
    # Constants of another order, those of study 11.
    "float quantization, tiny models": (
        laws.FLOAT_QUANTIZATION.model(n=2.3, alpha=0.15, d=29.0, beta=0.27, eps=0.6, gamma=55.0, delta=2.4, nu=1.4),
        grid(N=[24576, 98304, 221184], D=[128e3, 256e3, 1e6], E=[1, 2, 4, math.inf], M=[0, 1, 2, 4], B=[16, 32]),
        {},
    ),
    **{
        law.name: (
            law.published,
            grid(N=[74e6, 145e6, 297e6, 595e6], D=[1e10, 2e10, 5e10, 1e11], G=[1, 32, 64, 128, 256]),
            {},
        )
        for law in (laws.QAT_W4A4, laws.QAT_W4A16, laws.QAT_W16A4, laws.QAT_W4A4_FC2_8BIT, laws.QAT_W16A4_FC2_8BIT)
    },
    "quest": (
        laws.QUEST.model(**{**laws.QUEST.published.parameters, "E": 1.0}),
        ratios(format=laws.QUEST.published.levels("format")),
        {"fixed": {"eff[bf16]": 1.0}},
    ),
    "quartet": (
        laws.QUARTET.published,
        ratios(forward=laws.QUARTET.published.levels("forward"), backward=laws.QUARTET.published.levels("backward")),
        {"fixed": {"eff_N[bf16]": 1.0, "eff_D[bf16]": 1.0}},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_constants_are_found_again(name):
    model, runs, options = PUBLISHED[name]
    result = laws.fit(model.law, {**runs, "loss": model(runs)}, **options)
    assert not result.warnings
    assert result.parameters == pytest.approx(model.parameters, rel=1e-4)
    assert result.reached >= 1


# The equations again, in NumPy and from the papers.
def sun(N, D, E, M, B):
    error = D**0.5162 / N**0.2368 * np.log2(B) / (11334.5197 * (E + 0.5) ** 3.1926 * (M + 0.5) ** 2.9543)
    return 69.2343 / N**0.2368 + 68973.0621 / D**0.5162 + 1.9061 + error


def kumar(N, D, P_w, P_a, P_kv):
    share = math.prod(
        1 - np.exp(-(P / g + n)) for P, g, n in ((P_w, 2.6745, 0.3037), (P_a, 2.2102, 1.4072), (P_kv, 0.9578, 2.4185))
    )
    return 4299 / (N * share) ** 0.4965 + 18060 / D**0.4965 + 2.7648, N * share


def kumar_post(N, D, P_w, P_a, P_kv, P_post):
    loss, effective = kumar(N, D, P_w, P_a, P_kv)
    size = 0.0598 * D**0.5068 / effective**0.3439 * np.exp(-P_post / 0.5907)
    return loss + size * (1 - np.exp(-1.1277 * (P_w - P_post)))


def chen(N, D, G):
    return 237.7042 / N**0.3022 + 596.249 / D**0.3022 + 1.9279 + 0.1582 * D**0.0745 * np.log2(G) ** 0.7779 / N**0.2186


EQUATIONS = [
    (laws.FLOAT_QUANTIZATION, sun, dict(N=1e9, D=1e11, E=4.0, M=3.0, B=128.0)),
    (laws.FLOAT_QUANTIZATION, sun, dict(N=np.array([1e8, 1e9]), D=1e11, E=2.0, M=1.0, B=16.0)),
    (laws.PRECISION, lambda **d: kumar(**d)[0], dict(N=1e8, D=1e10, P_w=4.0, P_a=6.0, P_kv=math.inf)),
    (laws.POST_TRAINING, kumar_post, dict(N=1e8, D=1e10, P_w=8.0, P_a=6.0, P_kv=12.0, P_post=3.0)),
    (laws.QAT_W4A4, chen, dict(N=6e8, D=1e11, G=128.0)),
    (laws.CHINCHILLA_REPLICATION, lambda N, D: 482.01 / N**0.3478 + 2085.43 / D**0.3658 + 1.8172, dict(N=1e9, D=2e10)),
]


@pytest.mark.parametrize("law, reference, data", EQUATIONS, ids=lambda x: getattr(x, "name", ""))
def test_published_laws_are_their_equations(law, reference, data):
    # Powers as exp(a log x): |a log x| < 20, so some 20 ulp a power; 1e-13 holds a few of them.
    losses = law.published(data)
    np.testing.assert_allclose(losses, reference(**data), rtol=1e-13)
    assert np.ndim(losses) == 0 or losses.flags.writeable  # The user's own, to compute with in place.


# Section D of the papers' notes: anchors, to the digits printed there.
@pytest.mark.parametrize(
    "expected, digits, value",
    [
        (2.608669, 6, lambda: laws.FLOAT_QUANTIZATION.published(N=679477248, D=104857600000, E=4, M=3, B=128)),
        (2.647745, 6, lambda: laws.FLOAT_QUANTIZATION.published(N=679477248, D=104857600000, E=2, M=1, B=128)),
        (
            2.608174,
            6,
            lambda: laws.FLOAT_QUANTIZATION.published(N=679477248, D=104857600000, E=math.inf, M=math.inf, B=128),
        ),
        (3.685907, 5, lambda: laws.FLOAT_QUANTIZATION.published(N=40894464, D=10485760000, E=1, M=1, B=2**13.1567)),
        (2.740661, 6, lambda: laws.QAT_W4A4.published(N=595e6, D=1e11, G=1)),
        *(
            (delta, 5, lambda law=law: law.published(N=595e6, D=1e11, G=128) - law.published(N=595e6, D=1e11, G=1))
            for law, delta in (
                (laws.QAT_W4A4, 0.05728),
                (laws.QAT_W4A16, 0.02100),
                (laws.QAT_W16A4, 0.03996),
                (laws.QAT_W4A4_FC2_8BIT, 0.03810),
                (laws.QAT_W16A4_FC2_8BIT, 0.02161),
            )
        ),
    ],
)
def test_anchors(expected, digits, value):
    assert value() == pytest.approx(expected, abs=0.6 * 10**-digits)


def test_best_splits_of_bits():
    expected = "E1M1 E2M1 E2M2 E3M2 E3M3 E4M3 E4M4 E5M4 E5M5 E6M5 E6M6 E7M6 E7M7 E8M7".split()
    for bits, name in enumerate(expected, 3):
        split = laws.optimal_split(laws.FLOAT_QUANTIZATION.published, bits)
        assert f"E{split.exponent_bits}M{split.mantissa_bits}" == name
        assert split.exponent + split.mantissa + 1 == pytest.approx(bits)


@pytest.mark.parametrize(
    "E, M, B, tokens",
    [(8, 7, 128, 1.73e15), (4, 3, 128, 2.73e13), (2, 1, 128, 3.93e11), (5, 2, 128, 1.94e13), (4, 3, 32, 3.79e13)],
)
def test_critical_data_sizes(E, M, B, tokens):
    model = laws.FLOAT_QUANTIZATION.published
    D = laws.critical_data_size(model, N=1e9, E=E, M=M, B=B)
    assert pytest.approx(tokens, rel=5e-3) == D
    at = model(N=1e9, D=D * np.array([0.9, 1.0, 1.1]), E=E, M=M, B=B)
    assert at.argmin() == 1


@pytest.mark.parametrize("D, bits", [(1e11, 4.268), (1e12, 5.179), (1e13, 6.284), (1e14, 7.624)])
def test_optimal_precision_of_tokens(D, bits):
    assert laws.optimal_precision(laws.FLOAT_QUANTIZATION.published, D=D, B=128) == pytest.approx(bits, abs=6e-4)


def split_loss(P, N, D):
    p = laws.FLOAT_QUANTIZATION.published.parameters
    E, M = (p[x] * P / (p["delta"] + p["nu"]) - 0.5 for x in ("delta", "nu"))
    return laws.FLOAT_QUANTIZATION.published(N=N, D=D, E=E, M=M, B=128)


def test_optimal_precision_of_compute():
    P = np.linspace(2, 16, 14001)  # A step of 1e-3; the optimum of the grid is within one.
    for C, N in ((1e21, 1e9), (1e24, 1e11)):
        best = P[split_loss(P, N, 16 * C / (6 * P * N)).argmin()]
        assert laws.optimal_precision(laws.FLOAT_QUANTIZATION.published, N=N, flops=C, B=128) == pytest.approx(
            best, abs=2e-3
        )
    bits = [laws.optimal_precision(laws.FLOAT_QUANTIZATION.published, flops=C, B=128) for C in (1e21, 1e26, 1e31)]
    assert 4 <= bits[0] < bits[1] < bits[2] <= 8  # The paper's range.
    D = np.geomspace(1e9, 1e13, 2001)[:, None]
    P = np.linspace(3, 6, 301)
    joint = split_loss(P, 16e21 / (6 * P * D), D)
    assert bits[0] == pytest.approx(P[np.unravel_index(joint.argmin(), joint.shape)[1]], abs=0.02)


def test_optimal_allocation_is_the_closed_form_and_keeps_its_budgets():
    p, C = laws.CHINCHILLA.published.parameters, 1e22
    a, b = p["alpha"], p["beta"]
    N = (a * p["A"] / (b * p["B"])) ** (1 / (a + b)) * (C / 6) ** (b / (a + b))
    best = laws.optimal_allocation(laws.CHINCHILLA.published, C)
    # The loss is flat: 9 rounds leave 1e-8 of log N, where L changes by less than an ulp.
    assert pytest.approx(N, rel=1e-6) == best.N
    assert pytest.approx(C) == 6 * best.N * best.D
    assert laws.optimal_allocation(laws.CHINCHILLA.published, C, bits=8).loss < best.loss
    small = laws.optimal_allocation(laws.CHINCHILLA.published, C, memory=2e9)
    assert pytest.approx(1e9, rel=1e-6) == small.N and small.loss > best.loss
    served = laws.optimal_allocation(laws.CHINCHILLA.published, C, inference_tokens=1e12)
    assert served.N < best.N and pytest.approx(C) == 6 * served.N * served.D + 2 * served.N * 1e12


def test_effective_parameters():
    q, N, D, G = laws.QAT_W4A4.published.parameters, 6e8, 1e11, 128
    extra = q["k"] * D ** q["gamma_D"] * np.log2(G) ** q["gamma_G"] * N ** (q["alpha"] - q["gamma_N"])
    expected = N * (q["A"] / (q["A"] + extra)) ** (1 / q["alpha"])  # Notes D.3.
    assert laws.effective_parameters(laws.QAT_W4A4.published, N=N, D=D, G=G) == pytest.approx(expected, rel=1e-9)
    bits = dict(P_w=4.0, P_a=6.0, P_kv=8.0)
    found = laws.effective_parameters(laws.PRECISION.published, N=[1e8, 1e9], D=1e10, **bits)
    np.testing.assert_allclose(found, [kumar(N, 1e10, **bits)[1] for N in (1e8, 1e9)], rtol=1e-8)


def test_iso_curves():
    model, setting, N = laws.FLOAT_QUANTIZATION.published, dict(E=2, M=1, B=32), np.geomspace(1e7, 1e11, 9)
    D = laws.iso_loss(model, 2.8, N, **setting)
    there = np.isfinite(D)
    assert there.any() and not there.all()
    np.testing.assert_allclose(model(N=N[there], D=D[there], **setting), 2.8, rtol=1e-12)
    tokens, loss = laws.iso_compute(model, 6e20, N, bits=4, **setting)
    np.testing.assert_allclose(tokens, 4e20 / N)
    np.testing.assert_allclose(loss, model(N=N, D=tokens, **setting))


# Public runs. The numbers are those of section D.5 and D.6 of the notes, which SciPy found.
def read_csv(name):
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


@needs_runs
def test_the_public_fit_of_quartet():
    base, later = laws.fit_two_stage(
        laws.QUARTET,
        DATA / "quartet_runs_v1.csv",
        columns={"forward": "fwd", "backward": "bwd"},
        baseline={"forward": "BF16", "backward": "BF16"},
        delta=1e-4,
    )
    assert len(base.runs) == 23
    assert base.objective == pytest.approx(1.8762e-6, rel=5e-5)
    table = {"A": 1.5237e5, "alpha": 0.5886, "B": 5.2546e5, "beta": 0.5440, "E": 1.3481, "gamma": 0.2739}
    for name, value in table.items():
        assert base.parameters[name] == pytest.approx(value, rel=2e-4), name  # Half of its last digit.
    names = {"QuEST": "QuEST", "SR": "AlbertTsengQuantizer", "RTN": "AlbertTsengDeterministic"}
    for name, value in {"N QuEST": 0.6478, "N RTN": 0.6076, "N SR": 0.4353, "D SR": 0.8918, "D RTN": 0.9270}.items():
        kind, scheme = name.split()
        assert later.parameters[f"eff_{kind}[{names[scheme]}]"] == pytest.approx(value, abs=6e-5), name


def quest_format(row):
    kind, bits = row["w_quant"], row["w_bits"]
    rotated = "" if "Hadamard" in kind or kind == "NoQuantizer" else "NOH"
    if kind == "NoQuantizer":
        return "bf16"
    if "FourEight" in kind or "FP4" in kind:
        return "2:4" if "FourEight" in kind else "fp4"
    return f"WO{bits}" if row["a_quant"] == "NoQuantizer" else rotated + bits


D5 = "1 2 3 4 8 fp4 2:4 WO1 WO2 WO3 WO4 NOH1 NOH2 NOH3 NOH4 NOH8".split()
D5_SQUARES = ".0205 .1519 .4332 .6919 1.0162 .6297 .3812 .1384 .4137 .6531 .8405 .0156 .0784 .3221 .6033 .9377"
D5_HUBER = ".0197 .1560 .4304 .6904 1.0022 .6178 .3762 .1384 .4092 .6540 .8326 .0161 .0815 .3045 .5887 .9210"


@needs_runs
@pytest.mark.parametrize(
    "delta, objective, efficiencies", [(math.inf, 7.38053e-4, D5_SQUARES), (1e-3, 2.188297e-4, D5_HUBER)]
)
def test_the_public_fit_of_quest(delta, objective, efficiencies):
    rows = read_csv("quest_runs.csv")
    data = {name: [float(row[name]) for row in rows] for name in ("N", "D", "loss")}
    with pytest.warns(RuntimeWarning, match="E = .* has run away"):
        found = laws.fit(
            laws.QUEST, data | {"format": [*map(quest_format, rows)]}, delta=delta, fixed={"eff[bf16]": 1.0}
        )
    # At or below the notes', whose last digits are those of an optimum that runs away.
    assert found.objective <= objective * (1 + 1e-5)
    assert found.objective == pytest.approx(objective, rel=1e-4)
    for level, value in zip(D5, map(float, efficiencies.split()), strict=True):
        assert found.parameters[f"eff[{level}]"] == pytest.approx(value, abs=2e-4), level


def noisy(seed=0, scale=0.01):
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(7.6, 10.2, 240), 10 ** rng.uniform(9, 11.7, 240)
    loss = laws.CHINCHILLA_REPLICATION.published(N=N, D=D) * np.exp(rng.laplace(scale=scale, size=240))
    return {"N": N, "D": D, "loss": loss}


def test_the_optimum_is_at_or_below_scipys():
    from scipy.optimize import minimize

    data, delta = noisy(), 1e-3
    n, d, y = (np.log(data[name]) for name in ("N", "D", "loss"))

    def objective(z):
        a, b, e, alpha, beta = z
        terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
        r = np.logaddexp.reduce(terms) - y
        push = np.exp(terms - np.logaddexp.reduce(terms)) * np.clip(r, -delta, delta)
        size = np.abs(r)
        value = np.where(size <= delta, r**2 / 2, delta * (size - delta / 2)).sum()
        return value, np.array([*push.sum(1), -(push[0] @ n), -(push[1] @ d)])

    found = laws.fit(laws.CHINCHILLA, data, delta=delta)
    rng = np.random.default_rng(1)
    starts = [
        [5 * rng.integers(6), 5 * rng.integers(6), rng.integers(-2, 3) / 2, *(rng.integers(5, size=2) / 2)]
        for _ in range(25)
    ]
    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-12}
    ends = [minimize(objective, z, jac=True, method="L-BFGS-B", options=options).fun for z in starts]
    assert found.objective <= min(ends) * (1 + 1e-12)
    assert found.starts == 4500 and found.reached > 1000


def test_least_squares_and_its_covariance_are_those_of_lstsq():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 30)
    loss = 3 / x**0.4 * np.exp(rng.normal(scale=0.05, size=30))
    found = laws.fit(laws.POWER, {"x": x, "loss": loss}, delta=math.inf)
    design = np.stack([np.ones(30), -np.log(x)], 1)
    z, (squares,), *_ = np.linalg.lstsq(design, np.log(loss))
    assert found.objective == pytest.approx(squares / 2, rel=1e-10)
    np.testing.assert_allclose([found.parameters["c"], found.parameters["alpha"]], [math.exp(z[0]), z[1]], rtol=1e-7)
    slope = np.diag([math.exp(z[0]), 1.0])
    expected = slope @ np.linalg.inv(design.T @ design) @ slope * squares / 28
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-6)
    assert found.standard_errors["alpha"] == pytest.approx(expected[1, 1] ** 0.5, rel=1e-6)


def test_absolute_deviations_are_those_of_a_linear_program():
    from scipy.optimize import linprog

    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 31)
    loss = 3 / x**0.4 * np.exp(rng.laplace(scale=0.05, size=31))
    found = laws.fit(laws.POWER, {"x": x, "loss": loss}, delta=0)
    design, eye = np.stack([np.ones(31), -np.log(x)], 1), np.eye(31)
    program = linprog(
        np.r_[0, 0, np.ones(62)],
        A_eq=np.c_[design, eye, -eye],
        b_eq=np.log(loss),
        bounds=[(None, None)] * 2 + [(0, None)] * 62,
    )
    # Huber's minimiser at delta 1e-8 has a sum within n delta of the least.
    assert found.objective == pytest.approx(program.fun, abs=31e-8)


def test_bootstrap_agrees_with_the_covariance():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 60)
    found = laws.fit(laws.POWER, {"x": x, "loss": 3 / x**0.4 * np.exp(rng.normal(scale=0.05, size=60))}, delta=math.inf)
    samples = laws.bootstrap(found, 2000, key=jax.random.key(0))
    # A bootstrapped standard error of 60 runs is known to some 1 / sqrt(2 60) = 9 %; three of these.
    assert samples.samples[:, 1].std() == pytest.approx(found.standard_errors["alpha"], rel=0.27)
    low, high = samples.interval()["alpha"]
    assert low < 0.4 < high
    np.testing.assert_array_equal(samples.samples, laws.bootstrap(found, 2000, key=jax.random.key(0)).samples)
    with pytest.raises(ValueError, match="bootstrap: delta is 0, whose kinks"):
        laws.bootstrap(laws.fit(laws.POWER, {"x": x, "loss": 3 / x**0.4 + x * 1e-5}, delta=0), key=jax.random.key(0))


def test_bootstrap_draws_within_levels():
    model, runs, options = PUBLISHED["quest"]
    found = laws.fit(model.law, {**runs, "loss": model(runs)}, **options)
    samples = laws.bootstrap(found, 50, key=jax.random.key(0)).samples
    np.testing.assert_allclose(samples, np.tile([found.parameters[n] for n in found.free], (50, 1)), rtol=1e-3)


def test_rivals_are_compared_on_runs_that_they_have_not_seen():
    N, D, E, M = grid(**CAPYBARA, E=[2, 4], M=[1, 3]).values()
    data = {"N": N, "D": D, "E": E, "M": M, "B": np.full(N.shape, 128.0)}
    data["loss"] = laws.FLOAT_QUANTIZATION.published(data)
    # Folds of one size: those of two are two programs for each law.
    few = {"folds": 4, "key": jax.random.key(0), "starts": {"A": [150.0, 2e4], "B": [150.0, 2e4], "alpha": [0.25, 0.5]}}
    for by in (None, "N"):
        best, worst = laws.cross_validate([laws.CHINCHILLA, laws.FLOAT_QUANTIZATION], data, by=by, **few)
        assert (best.law, best.parameters) == ("float_quantization", 8)
        assert best.r_squared > 1 - 1e-6 > worst.r_squared
        for score in (best, worst):
            assert score.rms == pytest.approx(np.sqrt(np.mean(np.log(score.predicted / data["loss"]) ** 2)), rel=1e-9)
    assert laws.r_squared(laws.FLOAT_QUANTIZATION.published, data) == 1
    with pytest.raises(ValueError, match="folds must be from 2 to 4, the number of Ns; got 5"):
        laws.cross_validate([laws.CHINCHILLA], data, by="N", folds=5, key=jax.random.key(0))
    with pytest.raises(ValueError, match="cross_validate: by='width' is a column of none"):
        laws.cross_validate([laws.CHINCHILLA], data, by="width", key=jax.random.key(0))
    with pytest.raises(ValueError, match="cross_validate: fixed or starts has 'gama', a parameter of none"):
        laws.cross_validate([laws.CHINCHILLA], data, fixed={"gama": 1.0}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="r_squared: all 2 losses are 1"):
        laws.r_squared(laws.POWER.model(c=1, alpha=1), {"x": [1, 2], "loss": [1, 1]})


X = {"x": np.geomspace(1, 100, 10), "loss": 2 / np.geomspace(1, 100, 10) ** 0.5}
C = {"N": np.repeat([1e7, 1e8, 1e9], 3), "D": np.tile([1e9, 1e10, 1e11], 3)}
C["loss"] = laws.CHINCHILLA.published(C)


@pytest.mark.parametrize(
    "kind, data, options, text",
    [
        (
            laws.POWER,
            X | {"loss": -X["loss"]},
            {},
            "fit: column 'loss' must be finite and above 0, got -2.0 in row 0; drop",
        ),
        (laws.POWER, X | {"x": [math.nan, *X["x"][1:]]}, {}, "column 'x' must be finite and above 0, got nan in row 0"),
        (
            laws.QAT_W4A4,
            C | {"G": np.full(9, 0.5)},
            {},
            r"column 'G' must be finite and above 1 \(or 1: full precision\), got 0.5 in row 0; drop",
        ),
        (laws.POWER, X | {"x": ["one"] * 10}, {}, "column 'x' must be numbers"),
        (laws.POWER, X | {"x": X["x"][:3]}, {}, r"column 'loss' has shape \(10,\); expected \(3,\), as x"),
        (laws.POWER, {"x": X["x"]}, {}, r"no column 'loss' in the data, which has x; say loss=\.\.\."),
        (laws.CHINCHILLA, X, {}, r"no column 'N' in the data, which has x, loss; say columns=\{'N': \.\.\.\}"),
        (laws.POWER, X, {"columns": {"y": "x"}}, "columns renames 'y'; the columns of power are x"),
        (laws.POWER, {n: v[:1] for n, v in X.items()}, {}, "1 runs are too few for the 2 free parameters c, alpha"),
        (
            laws.CHINCHILLA,
            C | {"N": np.full(9, 1e8)},
            {},
            r"'N' never varies \(1e\+08 in all 9 rows\), so A, alpha cannot",
        ),
        (laws.POWER, X, {"delta": -1.0}, "fit: delta must be at least 0, got -1.0"),
        (laws.POWER, X, {"fixed": {"beta": 1.0}}, "fixed has 'beta'; the parameters of power are c, alpha"),
        (laws.POWER, X, {"tied": {"alpha": "beta"}}, "tied has 'beta'"),
        (laws.POWER, X, {"tied": {"alpha": "c", "c": "alpha"}}, "'alpha' is tied and tied to"),
        (laws.POWER, X, {"starts": {"beta": [1.0]}}, "starts has 'beta'; the free parameters are c, alpha"),
        (laws.POWER, X, {"starts": {"c": [-1.0]}}, r"starts of 'c' must be positive, got \[-1.0\]"),
        (laws.POWER, X, {"starts": {"alpha": [1e6]}}, "power is not a positive number at any start"),
    ],
)
def test_what_fit_refuses(kind, data, options, text):
    with pytest.raises(ValueError, match=text):
        laws.fit(kind, data, **options)


def test_other_refusals():
    model, published = laws.POWER.model(c=1, alpha=1), laws.CHINCHILLA.published
    refusals = {
        "power: no published constants; fit the law": lambda: laws.POWER.published,
        "power: expected values of alpha, c, got c": lambda: laws.POWER.model(c=1.0),
        "power: column x is missing; expected x": model,
        "power: unknown column y; expected x": lambda: model(x=1.0, y=2.0),
        "quartet: forward 'mxfp6' has no parameter; expected bf16, quest": lambda: laws.QUARTET.published(
            N=1e8, D=1e9, forward="mxfp6", backward="bf16"
        ),
        "optimal_split: chinchilla has no gamma; this is a question for": lambda: laws.optimal_split(published, 8),
        "optimal_split: bits must be at least 2, a sign and an exponent, got 1": lambda: laws.optimal_split(
            laws.FLOAT_QUANTIZATION.published, 1
        ),
        "optimal_precision: expected D, or N and flops, or flops; got D=None, N=1": lambda: laws.optimal_precision(
            laws.FLOAT_QUANTIZATION.published, B=128, N=1.0
        ),
        "effective_parameters: quest has no column values of full": lambda: laws.effective_parameters(
            laws.QUEST.published, N=1e8, D=1e9, format="w4a4"
        ),
        "optimal_allocation: expected positive flops": lambda: laws.optimal_allocation(published, -1.0),
        "optimal_allocation: power has no columns N and D": lambda: laws.optimal_allocation(model, 1e20),
        "iso_loss: loss must be positive, got 0": lambda: laws.iso_loss(published, 0, 1e9),
        "iso_compute: expected positive flops and bits": lambda: laws.iso_compute(published, 1e20, 1e9, bits=0),
        "fit_two_stage: baseline must name the level of forward, backward; got": lambda: laws.fit_two_stage(
            laws.QUARTET, {}, baseline={"forward": "bf16"}
        ),
        "baseline must name the level of no column, so fit is all there is": lambda: laws.fit_two_stage(
            laws.CHINCHILLA, C, baseline={}
        ),
        "fit_two_stage: no run is at the baseline": lambda: laws.fit_two_stage(
            laws.QUEST, {**C, "format": ["fp4"] * 9}, baseline={"format": "bf16"}
        ),
    }
    for text, call in refusals.items():
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(
        TypeError, match="fit: data is a list; expected a mapping of arrays, a data frame or a CSV path"
    ):
        laws.fit(laws.POWER, [1.0])


def test_what_is_not_identified_is_said():
    with pytest.warns(RuntimeWarning, match="A, eff.fp4. are not identified: the runs determine only a combination"):
        laws.fit(laws.QUEST, {**C, "format": ["fp4"] * 9})
    with pytest.warns(RuntimeWarning, match=r"alpha = -0.5 has run away: it is outside \(0, 4\)"):
        laws.fit(laws.POWER, X | {"loss": X["x"] ** 0.5})
    x = np.geomspace(1, 1.5, 10)
    with pytest.warns(RuntimeWarning, match="alpha = 0.18.* is barely identified: its standard error is 0.2"):
        laws.fit(laws.POWER, {"x": x, "loss": x**-0.05 * np.exp(np.tile([0.1, -0.1], 5))}, delta=math.inf)


def test_data_frames_and_files_are_data(tmp_path):
    class Frame:  # What pandas and polars have in common.
        columns = ["x", "loss"]

        def __getitem__(self, name):
            return X[name]

    path = tmp_path / "runs.csv"
    np.savetxt(path, np.stack([*X.values()], 1), "%.17g", ",", header="x,loss", comments="")
    expected = laws.fit(laws.POWER, X).parameters
    assert laws.fit(laws.POWER, Frame()).parameters == expected == laws.fit(laws.POWER, path).parameters
    path.write_text("x,loss\n1.0\n")
    with pytest.raises(ValueError, match=r"fit: line 2 of .*runs.csv has 1 fields; expected 2, as line 1"):
        laws.fit(laws.POWER, path)


def test_an_equal_fit_compiles_nothing():
    from qjax.laws import _solver

    laws.fit(laws.POWER, X)
    before = _solver.minimize_many._cache_size()
    laws.fit(laws.POWER, X | {"loss": X["loss"] * 2}, delta=1e-2)
    assert _solver.minimize_many._cache_size() == before


def test_the_command_line(tmp_path, capsys):
    from qjax.laws.__main__ import main

    path = tmp_path / "runs.csv"
    np.savetxt(path, np.stack([*X.values()], 1), "%.17g", ",", header="size,loss", comments="")
    main(["fit", str(path), "--law", "power", "--column", "x=size"])
    table = capsys.readouterr().out
    assert table.startswith("L = c / x^alpha\n") and "10 runs, objective" in table and "starts reached" in table
    main(["list"])
    assert "float_quantization\n" in capsys.readouterr().out
    for arguments, answer in {
        "split bits=8": "exponent_bits 4  mantissa_bits 3  exponent 3.65507  mantissa 3.34493",
        "critical-data N=1e9 E=4 M=3 B=128": "2.73",
        "precision D=1e12 B=128": "5.17897",
        "loss x=4 --law power --set c=2 --set alpha=0.5": "1\n",
        "allocation flops=1e21 --law chinchilla": "N 2.21",
        "effective-parameters N=6e8 D=1e11 G=128 --law qat_w4a4": "e+08",
        "iso-loss loss=2.5 N=1e9 --law chinchilla": "2.52513e+10",
    }.items():
        main(["ask", *arguments.split()])
        assert answer in capsys.readouterr().out, arguments
    for arguments, text in {
        "fit none.csv --law power": "No such file",
        "ask split --law chinchilla bits=8": "unrecognized|chinchilla has no gamma",
        "ask split bits": "expected name=value, got 'bits'",
    }.items():
        with pytest.raises(SystemExit):
            main(arguments.split())
        assert any(part in capsys.readouterr().err for part in text.split("|"))


def test_plots():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    found = laws.fit(laws.CHINCHILLA, C, starts={"alpha": [0.5], "beta": [0.5]})
    samples = laws.bootstrap(found, 20, key=jax.random.key(0))
    assert len(laws.plot_fit(found, samples=samples).lines) == 6  # Runs and curve, for each of three N.
    assert len(laws.plot_residuals(found).lines) == 2
    assert len(laws.plot_iso_loss(laws.CHINCHILLA.published, [2.5, 3.0], (1e7, 1e9), settings={"": {}}).lines) == 2
    options = {"settings": {"w4a4": {"G": 128}}, "bits": {"w4a4": 4}}
    assert len(laws.plot_pareto(laws.QAT_W4A4.published, (1e19, 1e22), **options).lines) == 2
    plt.close("all")
    with pytest.raises(ValueError, match="plot_fit: 'x' is no column of chinchilla; it has N, D"):
        laws.plot_fit(found, "x")
    with pytest.raises(ValueError, match="plot_residuals: 'x' is no column of chinchilla"):
        laws.plot_residuals(found, "x")
    with pytest.raises(ValueError, match="plot_pareto: settings has the formats"):
        laws.plot_pareto(laws.QAT_W4A4.published, (1e19, 1e22), settings={"a": {}}, bits={})
