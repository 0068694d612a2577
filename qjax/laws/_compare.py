"""How well a law predicts runs that it has not seen."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from qjax.laws._data import Runs, read
from qjax.laws._fit import fit_runs
from qjax.laws._law import Law, Model


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """The held-out scores of a law.

    Attributes:
      law: its name.
      r_squared: of the logarithms of all held-out losses, against the mean of those losses' logarithms.
      rms: the root mean square of the held-out log residuals.
      parameters: how many were fitted.
      predicted: the losses, each by the fit that has not seen its run.
    """

    law: str
    r_squared: float
    rms: float
    parameters: int
    predicted: Float[np.ndarray, " n"] = dataclasses.field(repr=False)


def r_squared(model: Model, data: Any, *, loss: str = "loss", columns: Mapping[str, str] | None = None) -> float:
    """Returns ``1 - sum (log L - log loss)^2 / sum (log loss - mean)^2``: 1 is perfect, 0 no better than the mean.

    Held-out if the model has not seen the data. Raises what ``fit`` raises for bad data, and a ValueError if all
    losses are equal.

    >>> from qjax import laws
    >>> laws.r_squared(laws.POWER.model(c=1.0, alpha=0.5), {"x": [1.0, 4.0], "loss": [1.0, 0.5]})
    1.0
    """
    runs = read("r_squared", model.law, data, loss, columns)
    if np.all(runs.loss == runs.loss[0]):
        raise ValueError(f"r_squared: all {len(runs)} losses are {runs.loss[0]:g}, so there is nothing to explain")
    return _r_squared(np.log(model(runs.columns)), np.log(runs.loss))


def _r_squared(predicted, observed) -> float:
    return float(1 - np.sum((predicted - observed) ** 2) / np.sum((observed - observed.mean()) ** 2))


def cross_validate(
    laws: Sequence[Law],
    data: Any,
    *,
    folds: int = 5,
    key: jax.Array,
    by: str | None = None,
    loss: str = "loss",
    columns: Mapping[str, str] | None = None,
    delta: float = 1e-3,
    fixed: Mapping[str, float] | None = None,
    starts: Mapping[str, Sequence[float]] | None = None,
) -> list[Score]:
    """Returns the held-out scores of rival laws on the same folds of the same runs, the best first.

    Args:
      laws: to compare. All see the same rows.
      data, loss, columns, delta: as in ``fit``.
      folds: into how many parts the runs are dealt; each is predicted from the others.
      key: of ``jax.random.key``, deals the runs.
      by: a column whose values are dealt as wholes, such as N: do the laws extrapolate to an unseen size?
      fixed, starts: as in ``fit``; each law takes those that it has.

    Raises:
      ValueError: there are fewer runs, or values of ``by``, than folds; a held-out level has no run in the others;
        and as ``fit``.

    >>> import jax, numpy as np
    >>> from qjax import laws
    >>> x = np.geomspace(1.0, 1e4, 12)
    >>> scores = laws.cross_validate(
    ...     [laws.POWER, laws.SATURATING_POWER], {"x": x, "loss": 2.0 / x**0.5 + 1.0}, folds=3, key=jax.random.key(0)
    ... )
    >>> [score.law for score in scores]
    ['saturating_power', 'power']

    Warnings of single folds are not issued: fit all runs to see them.
    """
    every = [(law, read("cross_validate", law, data, loss, _columns_of(law, columns))) for law in laws]
    known = {p.name for law in laws for p in law.parameters}
    if unknown := sorted({n for n in (*(fixed or {}), *(starts or {})) if n.split("[")[0] not in known}):
        raise ValueError(f"cross_validate: fixed or starts has {unknown[0]!r}, a parameter of none of the laws")
    fold = _deal(every, folds, key, by)
    scores = []
    for law, runs in every:
        own = {p.name for p in law.parameters}
        held, begin = ({n: v for n, v in (x or {}).items() if n.split("[")[0] in own} for x in (fixed, starts))
        predicted, free = np.zeros(len(runs)), 0
        for part in range(folds):
            result = fit_runs("cross_validate", runs.take(fold != part), delta, held, None, begin, 200)
            predicted[fold == part] = np.log(result.model(runs.take(fold == part).columns))
            free = len(result.free)
        residuals = predicted - np.log(runs.loss)
        rms = float(np.sqrt(np.mean(residuals**2)))
        scores.append(Score(law.name, _r_squared(predicted, np.log(runs.loss)), rms, free, np.exp(predicted)))
    return sorted(scores, key=lambda score: -score.r_squared)


def _columns_of(law: Law, columns: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the renamings that concern a law: rivals have different columns."""
    return {name: other for name, other in (columns or {}).items() if name in {c.name for c in law.columns}}


def _deal(every: list[tuple[Law, Runs]], folds: int, key: jax.Array, by: str | None) -> np.ndarray:
    runs = next((r for _, r in every if by is None or by in r.columns), None)
    if runs is None:
        raise ValueError(f"cross_validate: by={by!r} is a column of none of the laws")
    units = np.arange(len(runs)) if by is None else np.unique(runs.columns[str(by)], return_inverse=True)[1]
    count = int(units.max()) + 1
    if not 2 <= folds <= count:
        raise ValueError(f"cross_validate: folds must be from 2 to {count}, the number of {by or 'run'}s; got {folds}")
    return np.asarray(jax.random.permutation(key, np.arange(count, dtype=np.int32)))[units] % folds
