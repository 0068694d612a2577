"""Fitting a law to runs."""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qjax.laws._data import Runs, check_identified, read
from qjax.laws._identified import covariance_of, warnings_of
from qjax.laws._law import Law, Levels, Model, encode, expand, unflatten
from qjax.laws._solver import minimize_many


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Problem:
    """Which parameters of a law are free, and how the vector that a fit moves becomes them.

    The fitted vector z has an entry for each free name: its logarithm, or itself. ``source`` says for every parameter
    of the law which entry of (free, fixed) it is.
    """

    law: Law
    levels: Levels
    free: tuple[str, ...]
    fixed: tuple[float, ...]
    source: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return expand(self.law, self.levels)

    @functools.cached_property
    def log(self) -> np.ndarray:
        return np.array([self.parameter(name).log for name in self.free], bool)

    def parameter(self, name: str):
        return next(p for p in self.law.parameters if p.name == name.split("[")[0])

    def natural(self, z):
        """Returns the free parameters, and of a batch of vectors a batch."""
        return jnp.where(self.log, jnp.exp(jnp.where(self.log, z, 0.0)), z)

    def fitted(self, natural: np.ndarray) -> np.ndarray:
        return np.where(self.log, np.log(np.where(self.log, natural, 1.0)), natural)

    def all_of(self, natural):
        return jnp.concatenate([natural, jnp.array(self.fixed, jnp.float64)])[np.array(self.source)]

    def encode(self, runs: Runs) -> dict[str, np.ndarray]:
        return {c.name: encode("fit", c, runs.columns[c.name], dict(self.levels)) for c in self.law.columns}

    def log_prediction(self, z, data):
        return jnp.log(self.law.function(unflatten(self.law, self.levels, self.all_of(self.natural(z))), data))


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What ``fit`` found.

    Attributes:
      model: the law with the fitted parameters: predict with it, ask it.
      free: the names of the parameters that were fitted, the order of ``covariance``.
      objective: the sum over the runs of Huber's loss of the residuals; for ``delta = 0`` of their magnitudes.
      residuals: log of the predicted less log of the observed loss, for each run.
      covariance: of the free parameters, from the curvature at the optimum; NaN where a parameter is not identified.
      reached: how many starts ended within 1e-4 of the optimum's objective, relatively, of ``starts``.
      warnings: what is wrong with the optimum, a sentence each; also issued as Python warnings.
      delta, runs, problem: what was fitted.
    """

    model: Model
    free: tuple[str, ...]
    objective: float
    residuals: Float[np.ndarray, " n"]
    covariance: Float[np.ndarray, "p p"]
    reached: int
    starts: int
    warnings: tuple[str, ...]
    delta: float
    runs: Runs
    problem: Problem

    @property
    def parameters(self) -> dict[str, float]:
        """All parameters of the law, those fixed and tied included."""
        return self.model.parameters

    @property
    def standard_errors(self) -> dict[str, float]:
        """The square roots of the variances of the free parameters."""
        return dict(zip(self.free, np.sqrt(np.diag(self.covariance)).tolist()))

    def __str__(self) -> str:
        errors = self.standard_errors
        lines = [self.model.law.equation, f"{'parameter':<28}{'value':>14}{'standard error':>18}"]
        for name, value in self.parameters.items():
            lines.append(f"{name:<28}{value:>14.6g}" + (f"{errors[name]:>18.3g}" if name in errors else f"{'':>13}fixed"))
        rms = math.sqrt(np.mean(self.residuals**2))
        lines.append(f"{len(self.runs)} runs, objective {self.objective:.5g}, rms of log residuals {rms:.3g}")
        lines.append(f"{self.reached} of {self.starts} starts reached the optimum")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def fit(
    law: Law,
    data: Any,
    *,
    loss: str = "loss",
    columns: Mapping[str, str] | None = None,
    delta: float = 1e-3,
    fixed: Mapping[str, float] | None = None,
    tied: Mapping[str, str] | None = None,
    starts: Mapping[str, Sequence[float]] | None = None,
    max_steps: int = 200,
) -> Fit:
    """Returns the parameters with which a law predicts the losses of runs best, from many starts.

    It minimises ``sum_i H(log L(p, d_i) - log loss_i)`` with Huber's ``H(r) = r^2 / 2`` for ``|r| <= delta`` and
    ``delta (|r| - delta / 2)`` beyond. All starts run in one compiled program in float64, whatever JAX's setting, and
    the best 16 go on until they stand still.

    Args:
      law: one of the laws here, or your own.
      data: a mapping of arrays, a data frame (pandas, polars) or the path of a CSV file.
      loss: the name of the column of losses.
      columns: where the data has another name for a column of the law: ``{"N": "params"}``.
      delta: Huber's width. ``math.inf`` is least squares; 0 is the limit of least absolute deviations, whose objective
        is ``sum |r|``.
      fixed: parameters to hold, by name; those of another fit make this one the second stage. One level of an
        efficiency must be held at 1 for the others to mean anything: ``{"eff[bf16]": 1.0}``.
      tied: parameters to hold equal to another, ``{"beta": "alpha"}``; ``{}`` unties what the law ties.
      starts: values to start from, by parameter, in place of the law's own.
      max_steps: the most steps from each start.

    Raises:
      ValueError: the data is bad (a column is missing, of another length, not a number, not positive, or never varies
        while a free parameter needs it; too few runs), or a parameter is unknown.
      TypeError: data is something else.

    Warns:
      RuntimeWarning: for each sentence in ``Fit.warnings``: a parameter is not identified, or has run away.

    >>> import numpy as np
    >>> from qjax import laws
    >>> N, D = (x.ravel() for x in np.meshgrid([1e7, 1e8, 1e9], [1e9, 1e10, 1e11]))
    >>> data = {"N": N, "D": D, "loss": laws.CHINCHILLA.published(N=N, D=D)}
    >>> result = laws.fit(laws.CHINCHILLA, data, starts={"alpha": [0.5], "beta": [0.5]})
    >>> round(result.parameters["alpha"], 6), result.reached > 10
    (0.339171, True)

    Source: objective and starts of Hoffmann et al. (2022), https://arxiv.org/abs/2203.15556, approach 3, with the sum
    in place of a mean. Deviation: they descend by L-BFGS; see ``benchmarks/results/laws.md``.
    """
    if not delta >= 0:
        raise ValueError(f"fit: delta must be at least 0, got {delta}; math.inf is least squares")
    runs = read("fit", law, data, loss, columns)
    result = fit_runs("fit", runs, delta, fixed or {}, tied, starts or {}, max_steps)
    for text in result.warnings:
        warnings.warn(f"fit: {text}", RuntimeWarning, stacklevel=2)
    return result


def fit_runs(caller: str, runs: Runs, delta: float, fixed, tied, starts, max_steps: int) -> Fit:
    """Returns the fit; its warnings are not yet issued."""
    problem = _problem(caller, runs, fixed, dict(runs.law.tied) if tied is None else tied)
    check_identified(caller, runs.law, runs, problem.free)
    first = _starts(caller, problem, starts)
    # Least absolute deviations are approached through wider losses, which have no kinks to be caught at.
    widths = tuple(10.0**-k for k in range(2, 9)) if delta == 0 else (delta,)
    with jax.enable_x64(True):
        data = problem.encode(runs)
        rest = (data, np.log(runs.loss), np.ones(len(runs)))
        ends, objectives, _ = map(np.asarray, minimize_many(problem, first, *rest, widths[0], max_steps=max_steps))
        if not np.isfinite(objectives.min()):
            raise ValueError(f"{caller}: {runs.law.name} is not a positive number at any start; give others as starts=...")
        ends = ends[np.argsort(objectives)[:16]]
        for width in widths:
            ends, polished, _ = map(np.asarray, minimize_many(problem, ends, *rest, width, max_steps=20 * max_steps))
        z, best = ends[np.argmin(polished)], float(polished.min())
        log_prediction, jacobian = map(np.asarray, _linear(problem, z, data))
        natural = np.asarray(problem.natural(z))
        values = np.asarray(problem.all_of(natural))
    residuals = log_prediction - rest[1]
    return Fit(
        model=Model(runs.law, tuple(zip(problem.names, values.tolist()))),
        free=problem.free,
        objective=best if delta else float(np.abs(residuals).sum()),
        residuals=residuals,
        covariance=covariance_of(problem, natural, residuals, jacobian, delta),
        reached=int(np.sum(objectives <= (best if delta else objectives.min()) * (1 + 1e-4) + 1e-20)),
        starts=len(first),
        warnings=warnings_of(problem, natural, residuals, jacobian, delta),
        delta=delta,
        runs=runs,
        problem=problem,
    )


@functools.partial(jax.jit, static_argnums=0)
def _linear(problem: Problem, z, data):
    return problem.log_prediction(z, data), jax.jacfwd(problem.log_prediction)(z, data)


def _problem(caller: str, runs: Runs, fixed: Mapping[str, float], tied: Mapping[str, str]) -> Problem:
    law, found = runs.law, runs.levels
    for p in law.parameters:
        if p.per:
            held = [name[len(p.name) + 1 : -1] for name in fixed if name.startswith(f"{p.name}[")]
            found[p.per] = tuple(dict.fromkeys([*held, *found[p.per]]))
    levels = tuple(found.items())
    names = expand(law, levels)
    for kind, given in (("fixed", [*fixed]), ("tied", [*tied, *tied.values()])):
        if unknown := [name for name in given if name not in names]:
            raise ValueError(f"{caller}: {kind} has {unknown[0]!r}; the parameters of {law.name} are {', '.join(names)}")
    # A parameter that is fixed is not tied; one that is tied to a fixed one has its value.
    ties = {a: b for a, b in tied.items() if a not in fixed}
    if chain := sorted(set(ties) & set(ties.values())):
        raise ValueError(f"{caller}: {chain[0]!r} is tied and tied to; tie both to the third parameter")
    free = tuple(name for name in names if name not in fixed and name not in ties)
    index = {name: i for i, name in enumerate([*free, *fixed])}
    source = tuple(index[ties.get(name, name)] for name in names)
    return Problem(law, levels, free, tuple(map(float, fixed.values())), source)


def _starts(caller: str, problem: Problem, starts: Mapping[str, Sequence[float]]) -> Float[np.ndarray, "s p"]:
    free = {*problem.free, *(name.split("[")[0] for name in problem.free)}
    if unknown := sorted(set(starts) - free):
        raise ValueError(f"{caller}: starts has {unknown[0]!r}; the free parameters are {', '.join(problem.free)}")
    grid = [starts.get(n, starts.get(n.split("[")[0], problem.parameter(n).starts)) for n in problem.free]
    natural = np.array(list(itertools.product(*grid)), np.float64)
    if bad := [n for n, log, column in zip(problem.free, problem.log, natural.T) if log and not (column > 0).all()]:
        raise ValueError(f"{caller}: starts of {bad[0]!r} must be positive, got {[*starts[bad[0].split('[')[0]]]}")
    return problem.fitted(natural)


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
    if set(categories) != set(baseline):
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
