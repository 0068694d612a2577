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
    return {name: array.ravel() for name, array in zip(columns, arrays)}


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
    P_w=[3, 4, 5, 6, 8, 12],
    P_a=[4, 6, 12],
    P_kv=[4, 6, 12],
)
# A row: the law, the runs of its paper, and options of the fit.
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
    "float quantization": (
        laws.FLOAT_QUANTIZATION.published,
        grid(**CAPYBARA, E=[1, 2, 3, 4, 5], M=[1, 2, 3, 4, 5], B=[32, 128, 2**13.1567]),
        {},
    ),
    **{
        law.name: (
            law.published,
            grid(N=[74e6, 145e6, 297e6, 595e6], D=[1e10, 2e10, 5e10, 1e11], G=[32, 64, 128, 256]),
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
        ratios(
            forward=laws.QUARTET.published.levels("forward"), backward=laws.QUARTET.published.levels("backward")
        ),
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
