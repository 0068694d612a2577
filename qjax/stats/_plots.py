"""Pictures of statistics. Each draws into the axes it is given, or into new ones, and returns them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax._coverage import format_text
from qjax.formats import Codebook, Format, Scaled
from qjax.stats._observe import OPERANDS
from qjax.stats._report import Report
from qjax.stats._stats import Stats


def _axes(axes):
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.figure(layout="constrained").add_subplot()
    return axes


def plot_exponents(stats: Stats, *, label: str | None = None, axes: Any = None) -> Any:
    """Returns axes with the histogram of the exponents of a tensor over the range of its format.

    The band is what the format holds: from the exponent of its smallest value to that of its largest, the part below
    the smallest normal number lighter. That of a block format is as wide as that of its elements, and ends at the
    highest exponent of the tensor: it is the range of the block with the largest element.

    Args:
      stats: of ``measure``, or an entry of a ``Report``.
      label: for the legend; by default the name of the format.
      axes: matplotlib axes to draw into.
    """
    axes = _axes(axes)
    exponents, counts = stats.exponents
    ends = _range(stats.fmt, int(exponents[-1]) if len(exponents) else 0)
    lowest, normal, highest = ends
    axes.axvspan(normal - 0.5, highest + 0.5, color="#009e73", alpha=0.18, lw=0, label=label or format_text(stats.fmt))
    if lowest < normal:
        axes.axvspan(lowest - 0.5, normal - 0.5, color="#009e73", alpha=0.08, lw=0, label="its subnormals")
    inside = (exponents >= lowest) & (exponents <= highest)
    share = counts / max(stats.count("size"), 1)
    axes.bar(exponents, share, width=1, color=np.where(inside, "#0072b2", "#d55e00"), ec="white", lw=0.3)
    axes.set(xlabel="exponent, floor(log2 |x|)", ylabel="share of the elements")
    axes.legend(fontsize="small")
    return axes


def _range(fmt: Format, top: int) -> tuple[int, int, int]:
    """Returns the exponents of the smallest value, of the smallest normal one and of the largest one."""
    element = fmt
    while isinstance(element, Scaled):
        element = element.element
    if isinstance(element, Codebook):
        sizes = np.abs(np.array(element.table))
        lowest = normal = math.frexp(sizes[sizes > 0].min())[1] - 1
        highest = math.frexp(sizes.max())[1] - 1
    else:
        highest, lowest = element.emax, element.quantum_exponent
        # An integer has the precision of its magnitude: what is normal is one power of two at most.
        normal = getattr(element, "emin", highest)
        lowest = lowest if getattr(element, "subnormals", True) is True else normal
    shift = top - highest if isinstance(fmt, Scaled) else 0
    return lowest + shift, normal + shift, highest + shift


def plot_heat_map(report: Report, statistic: str = "sqnr", *, axes: Any = None) -> Any:
    """Returns axes with a statistic of every operand: a row a path, a column an operand of the three products.

    Args:
      report: of ``inspect`` or ``report``.
      statistic: a name in ``Stats.summary``.
      axes: matplotlib axes to draw into.

    Raises:
      ValueError: the statistic is none.
    """
    rows = {key: s.summary() for key, s in report.items()}
    names = next(iter(rows.values())) if rows else {}
    if statistic not in names:
        raise ValueError(f"plot_heat_map: {statistic!r} is no statistic; there are {', '.join(names)}.")
    axes, paths = _axes(axes), list(dict.fromkeys(path for path, _ in rows))
    operands = [operand for operand in OPERANDS if any((path, operand) in rows for path in paths)]
    grid = np.array([[rows.get((p, o), {}).get(statistic, math.nan) for o in operands] for p in paths], float)
    finite = np.isfinite(grid)
    shown = np.where(finite, grid, np.nan)
    image = axes.imshow(shown, aspect="auto", cmap="viridis")
    axes.set_facecolor("0.9")  # what is not finite
    middle = (np.nanmax(shown) + np.nanmin(shown)) / 2 if finite.any() else 0
    for i, j in np.ndindex(*grid.shape):
        dark = finite[i, j] and grid[i, j] < middle
        axes.text(j, i, f"{grid[i, j]:.3g}", ha="center", va="center", color="white" if dark else "black", fontsize=7)
    axes.set_xticks(range(len(operands)), operands, rotation=30, ha="right")
    axes.set_yticks(range(len(paths)), [path or "(no name)" for path in paths])
    axes.figure.colorbar(image, ax=axes, label=f"{statistic} in dB" if statistic == "sqnr" else statistic)
    return axes


def plot_growth(errors: Mapping[str, Mapping[str, float]], *, label: str = "", axes: Any = None) -> Any:
    """Returns axes with the relative errors of ``growth`` through the depth of a network.

    Args:
      errors: of ``growth``.
      label: what comes before "activations" and "gradients" in the legend.
      axes: matplotlib axes to draw into.
    """
    axes, place = _axes(axes), np.arange(len(errors))
    for tensor, name, style in (("lhs", "activations", "o-"), ("gradient", "gradients", "s--")):
        values = np.array([of[tensor] for of in errors.values()])
        axes.plot(place, np.where(values > 0, values, np.nan), style, ms=4, lw=1, label=f"{label} {name}".strip())
    axes.set(yscale="log", ylabel="relative error", xlabel="product, in the order of the program")
    axes.set_xticks(place, list(errors), rotation=60, ha="right", fontsize="small")
    axes.legend(fontsize="small")
    return axes
