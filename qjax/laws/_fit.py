"""Fitting a law to runs."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from qjax.laws._data import Runs, check_identified, read
from qjax.laws._identified import covariance_of, warnings_of
from qjax.laws._law import Law, Model
from qjax.laws._problem import Problem, pose, starting_points
from qjax.laws._solver import minimize_many


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
        return dict(zip(self.free, np.sqrt(np.diag(self.covariance)).tolist(), strict=True))

    def __str__(self) -> str:
        errors, width = self.standard_errors, max(map(len, self.parameters)) + 2
        lines = [self.model.law.equation, f"{'parameter':<{width}}{'value':>14}{'standard error':>18}"]
        for name, value in self.parameters.items():
            error = f"{errors[name]:.3g}" if name in errors else "fixed or tied"
            lines.append(f"{name:<{width}}{value:>14.6g}{error:>18}")
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
    problem = pose(caller, runs, fixed, dict(runs.law.tied) if tied is None else tied)
    check_identified(caller, runs.law, runs, problem.free)
    first = starting_points(caller, problem, starts)
    # Least absolute deviations are approached through wider losses, which have no kinks to be caught at.
    widths = tuple(10.0**-k for k in range(2, 9)) if delta == 0 else (delta,)
    with jax.enable_x64(True):
        data = problem.encode(runs)
        rest = (data, np.log(runs.loss), np.ones(len(runs)))
        ends, objectives, _ = map(np.asarray, minimize_many(problem, first, *rest, widths[0], max_steps=max_steps))
        if not np.isfinite(objectives.min()):
            raise ValueError(
                f"{caller}: {runs.law.name} is not a positive number at any start; give others as starts=..."
            )
        ends = ends[np.argsort(objectives)[:16]]
        for width in widths:
            ends, polished, _ = map(np.asarray, minimize_many(problem, ends, *rest, width, max_steps=20 * max_steps))
        z, best = ends[np.argmin(polished)], float(polished.min())
        log_prediction, jacobian = map(np.asarray, _linear(problem, z, data))
        natural = np.asarray(problem.natural(z))
        values = np.asarray(problem.all_of(natural))
    residuals = log_prediction - rest[1]
    return Fit(
        model=Model(runs.law, tuple(zip(problem.names, values.tolist(), strict=True))),
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
