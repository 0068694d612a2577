"""Intervals by resampling the runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qjax.laws._fit import Fit
from qjax.laws._solver import minimize_many


@dataclasses.dataclass(frozen=True, eq=False)
class Bootstrap:
    """Parameters fitted to resampled runs.

    Attributes:
      names: of the free parameters.
      samples: a row for each resampling.
    """

    names: tuple[str, ...]
    samples: Float[np.ndarray, "samples p"]

    def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Returns the central interval of each parameter that holds this share of the samples."""
        tails = np.quantile(self.samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return {name: (float(low), float(high)) for name, low, high in zip(self.names, *tails)}


def bootstrap(fit: Fit, samples: int = 4000, *, key: jax.Array, max_steps: int = 100) -> Bootstrap:
    """Returns the parameters of a fit's law, fitted again to runs that are drawn from its own with replacement.

    All resamplings run in one compiled program, each from the optimum of the fit. Runs are drawn within the levels of
    the category columns, so that no efficiency is left without runs.

    Args:
      fit: of ``laws.fit``, with ``delta > 0``.
      samples: how many resamplings.
      key: of ``jax.random.key``.
      max_steps: the most steps from the optimum.

    Raises:
      ValueError: the fit is one of least absolute deviations; fit with a small delta.

    >>> import jax, numpy as np
    >>> from qjax import laws
    >>> x = np.geomspace(1.0, 100.0, 20)
    >>> loss = 3.0 / x**0.5 * np.exp(0.01 * np.sin(np.arange(20)))
    >>> result = laws.fit(laws.POWER, {"x": x, "loss": loss})
    >>> low, high = laws.bootstrap(result, 200, key=jax.random.key(0)).interval()["alpha"]
    >>> low < 0.5 < high
    True

    Source: Efron and Tibshirani (1993), An introduction to the bootstrap, section 13.3; for scaling laws Besiroglu et
    al. (2024), https://arxiv.org/abs/2404.10102. Deviation: strata, and one start, where they rerun all.
    """
    if fit.delta == 0:
        raise ValueError("bootstrap: delta is 0, whose kinks hold resampled optima; fit with a small delta, say 1e-4")
    n, problem = len(fit.runs), fit.problem
    strata = [fit.runs.columns[name] for name in fit.runs.levels] or [np.zeros(n, np.int64)]
    _, stratum = np.unique(np.stack([np.unique(s, return_inverse=True)[1] for s in strata]), axis=1, return_inverse=True)
    order, size = np.argsort(stratum, kind="stable"), np.bincount(stratum)
    first = (np.cumsum(size) - size)[stratum]
    with jax.enable_x64(True):
        draw = jax.random.randint(key, (samples, n), 0, size[stratum])
        picked = jnp.asarray(order)[first + draw]
        counts = jax.vmap(lambda rows: jnp.zeros(n).at[rows].add(1.0))(picked)
        z = problem.fitted(np.array([fit.parameters[name] for name in fit.free]))
        rest = (problem.encode(fit.runs), np.log(fit.runs.loss), counts, fit.delta)
        ends, *_ = minimize_many(problem, np.tile(z, (samples, 1)), *rest, max_steps=max_steps)
        return Bootstrap(fit.free, np.asarray(problem.natural(ends)))
