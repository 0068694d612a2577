"""Figures of fits and of laws. Each draws into the axes it is given, or into new ones, and returns them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.laws._allocation import iso_loss, optimal_allocation
from qjax.laws._bootstrap import Bootstrap
from qjax.laws._fit import Fit
from qjax.laws._law import Model


def _axes(axes):
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.figure(layout="constrained").add_subplot()
    return axes


def plot_fit(fit: Fit, x: str = "D", *, group: str = "N", samples: Bootstrap | None = None, axes: Any = None) -> Any:
    """Returns axes with the losses of the runs over a column, and the fitted law through each group of runs.

    Args:
      fit: of ``laws.fit``.
      x: the column along the axis.
      group: the column whose values share a color. Runs that differ in other columns get curves of their own.
      samples: of ``laws.bootstrap``; the 95 % interval of the prediction is then shaded.
      axes: matplotlib axes to draw into.

    Raises:
      ValueError: x or group is not a column of the law, or x is a category.
    """
    _known("plot_fit", fit.model, x, group)
    axes, runs = _axes(axes), fit.runs
    others = [name for name in runs.columns if name != x]
    values = list(dict.fromkeys(runs.columns[group].tolist()))
    keys, member = np.unique(np.stack([runs.columns[name].astype(str) for name in others]), axis=1, return_inverse=True)
    for i in range(keys.shape[1]):
        rows = np.flatnonzero(member == i)
        value = runs.columns[group][rows[0]]
        color = f"C{values.index(value) % 10}"
        label = _label(group, value) if rows[0] == np.flatnonzero(runs.columns[group] == value)[0] else None
        axes.plot(runs.columns[x][rows], runs.loss[rows], "o", color=color, label=label, markersize=4)
        fine = np.geomspace(runs.columns[x][rows].min() / 1.2, runs.columns[x][rows].max() * 1.2, 50)
        line = {x: fine, **{name: runs.columns[name][rows[0]] for name in others}}
        axes.plot(fine, fit.model(line), color=color, linewidth=1)
        if samples is not None:
            axes.fill_between(fine, *_interval(fit, samples, line), color=color, alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=_meaning(fit.model, x), ylabel="loss")
    axes.legend(fontsize="small")
    return axes


def plot_residuals(fit: Fit, x: str = "N", *, axes: Any = None) -> Any:
    """Returns axes with the residuals, log predicted less log observed, over a column; a category gets a tick a level.

    The band holds the residuals that Huber's loss takes as squares, if it has such a width.

    Raises:
      ValueError: x is not a column of the law.
    """
    if x not in fit.runs.columns:
        raise ValueError(f"plot_residuals: {x!r} is no column of {fit.model.law.name}")
    axes, category = _axes(axes), x in fit.runs.levels
    axes.axhline(0, color="0.5", linewidth=1)
    if 0 < fit.delta < np.inf:
        axes.axhspan(-fit.delta, fit.delta, color="0.9", label=f"|r| < delta = {fit.delta:g}")
        axes.legend(fontsize="small")
    axes.plot(fit.runs.columns[x], fit.residuals, "o", markersize=4)
    if category:
        axes.tick_params("x", rotation=30)
    else:
        axes.set_xscale("log")
    axes.set(xlabel=_meaning(fit.model, x), ylabel="log predicted - log observed")
    return axes


def plot_iso_loss(
    model: Model, losses: Sequence[float], N: Sequence[float], *, settings: Mapping[str, Mapping], axes: Any = None
) -> Any:
    """Returns axes with the (N, D) of equal loss, a color for each loss and a line style for each setting.

    Args:
      model: a law with values.
      losses: those of the contours.
      N: the range (low, high) of parameters.
      settings: the law's other columns by a name for the legend: ``{"E4M3": {"E": 4, "M": 3, "B": 128}}``; of a law
        without others ``{"": {}}``.
      axes: matplotlib axes to draw into.
    """
    axes, sizes = _axes(axes), np.geomspace(min(N), max(N), 200)
    for style, (name, setting) in zip(("-", "--", ":", "-."), settings.items(), strict=False):
        for i, loss in enumerate(losses):
            label = f"{name} {loss:g}".strip()
            axes.plot(sizes, iso_loss(model, loss, sizes, **setting), style, color=f"C{i % 10}", label=label)
    axes.set(xscale="log", yscale="log", xlabel=_meaning(model, "N"), ylabel=_meaning(model, "D"))
    axes.legend(fontsize="small", title="loss")
    return axes


def plot_pareto(
    model: Model, flops: Sequence[float], *, settings: Mapping[str, Mapping], bits: Mapping[str, float], axes: Any = None
) -> Any:
    """Returns axes with the least loss over compute for each format, and the envelope of them all.

    Args:
      model: a law with values.
      flops: the range (low, high) of budgets, in 16-bit operations.
      settings: the law's other columns by format.
      bits: by format, what an operation costs in it, of 16.
      axes: matplotlib axes to draw into.

    Raises:
      ValueError: settings and bits name different formats.
    """
    if set(settings) != set(bits):
        raise ValueError(f"plot_pareto: settings has the formats {sorted(settings)}, bits has {sorted(bits)}")
    axes, budgets = _axes(axes), np.geomspace(min(flops), max(flops), 30)
    curves = []
    for name, setting in settings.items():
        curves.append([optimal_allocation(model, b, bits=bits[name], **setting).loss for b in budgets])
        axes.plot(budgets, curves[-1], label=f"{name}, {bits[name]:g} bits")
    axes.plot(budgets, np.min(curves, axis=0), color="0.2", linewidth=4, alpha=0.25, label="the best")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs, in 16-bit operations", ylabel="least loss")
    axes.legend(fontsize="small")
    return axes


def _known(caller: str, model: Model, x: str, group: str):
    columns = {c.name: c for c in model.law.columns}
    if wrong := [name for name in (x, group) if name not in columns]:
        raise ValueError(f"{caller}: {wrong[0]!r} is no column of {model.law.name}; it has {', '.join(columns)}")
    if columns[x].category:
        raise ValueError(f"{caller}: {x!r} is a category; choose a column of numbers for the axis")


def _meaning(model: Model, name: str) -> str:
    return f"{name}: {next(c.meaning for c in model.law.columns if c.name == name)}"


def _label(name: str, value) -> str:
    return f"{name} = {value}" if isinstance(value, str) else f"{name} = {value:.3g}"


def _interval(fit: Fit, samples: Bootstrap, line: Mapping[str, Any]) -> np.ndarray:
    models = (dict(fit.parameters, **dict(zip(samples.names, row))) for row in samples.samples[:400])
    return np.quantile([Model(fit.model.law, tuple(p.items()))(line) for p in models], [0.025, 0.975], axis=0)
