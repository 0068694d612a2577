"""Fitting a law in two stages: the base, then the efficiencies of formats."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.laws._data import read
from qjax.laws._fit import Fit, fit_runs
from qjax.laws._law import Law


def fit_two_stage(
    law: Law,
    data: Any,
    *,
    baseline: Mapping[str, str],
    loss: str = "loss",
    columns: Mapping[str, str] | None = None,
    delta: float = 1e-3,
    fixed: Mapping[str, float] | None = None,
    tied: Mapping[str, str] | None = None,
    starts: Mapping[str, Sequence[float]] | None = None,
    max_steps: int = 200,
) -> tuple[Fit, Fit]:
    """Returns two fits: the base of the runs at the baseline, then the efficiencies of the other levels.

    The second fit holds everything but the efficiencies at the first one's values, and sees the runs in which at most
    one column is off the baseline, so that each efficiency is that of its own level.

    Args:
      law: a law with parameters per category, ``QUEST`` or ``QUARTET``.
      baseline: the level of every category column whose efficiency is 1, ``{"forward": "bf16", "backward": "bf16"}``.
      data, loss, columns, delta, fixed, tied, starts, max_steps: as in ``fit``.

    Raises:
      ValueError: a category column of the law is missing from ``baseline``, or no run is at the baseline; and as
        ``fit``.

    >>> import numpy as np
    >>> from qjax import laws
    >>> N, D, forms = (x.ravel() for x in np.meshgrid([3e7, 1e8, 3e8], [1e9, 1e10, 1e11], ["w4a4", "bf16"]))
    >>> truth = {"A": 400.0, "B": 400.0, "E": 1.7, "alpha": 0.34, "beta": 0.28, "eff[bf16]": 1.0, "eff[w4a4]": 0.7}
    >>> data = {"N": N, "D": D, "format": forms}
    >>> data["loss"] = laws.QUEST.model(**truth)(data)
    >>> few = {"A": [150.0], "B": [150.0], "alpha": [0.5], "beta": [0.5]}
    >>> base, second = laws.fit_two_stage(laws.QUEST, data, baseline={"format": "bf16"}, starts=few)
    >>> round(second.parameters["eff[w4a4]"], 4)
    0.7

    Source: Castro et al. (2025), Quartet, https://arxiv.org/abs/2505.14669, appendix on scaling laws.
    """
    categories = [c.name for c in law.columns if c.category]
    if not categories or set(categories) != set(baseline):
        expected = ", ".join(categories) or "no column, so fit is all there is"
        raise ValueError(f"fit_two_stage: baseline must name the level of {expected}; got {dict(baseline)}")
    runs = read("fit_two_stage", law, data, loss, columns)
    off = np.sum([runs.columns[c] != str(baseline[c]) for c in categories], axis=0)
    if not np.any(off == 0):
        raise ValueError(f"fit_two_stage: no run is at the baseline {dict(baseline)}; the levels are {runs.levels}")
    per = {p.name: p.per for p in law.parameters if p.per}
    ones = {f"{name}[{baseline[column]}]": 1.0 for name, column in per.items()}
    split = [{n: s for n, s in (starts or {}).items() if (n.split("[")[0] in per) is later} for later in (False, True)]
    base = fit_runs("fit_two_stage", runs.take(off == 0), delta, {**ones, **(fixed or {})}, tied, split[0], max_steps)
    later = fit_runs("fit_two_stage", runs.take(off <= 1), delta, base.parameters, {}, split[1], max_steps)
    for text in (*base.warnings, *later.warnings):
        warnings.warn(f"fit_two_stage: {text}", RuntimeWarning, stacklevel=2)
    return base, later
