"""Numerics of tensors and networks: what formats do to them, as numbers, tables and pictures."""

from qjax.stats._files import measure_file
from qjax.stats._growth import growth
from qjax.stats._measure import measure
from qjax.stats._observe import observe, probes
from qjax.stats._plots import plot_exponents, plot_growth, plot_heat_map
from qjax.stats._ranges import calibrate
from qjax.stats._report import Report, inspect, report
from qjax.stats._stats import COUNTS, Stats, total
from qjax.stats._suggest import Choice, Suggestion, suggest
from qjax.stats._watch import JsonLines, TensorBoard, Wandb, Watch, scalars

__all__ = [
    "COUNTS",
    "Choice",
    "JsonLines",
    "Report",
    "Stats",
    "Suggestion",
    "TensorBoard",
    "Wandb",
    "Watch",
    "calibrate",
    "growth",
    "inspect",
    "measure",
    "measure_file",
    "observe",
    "plot_exponents",
    "plot_growth",
    "plot_heat_map",
    "probes",
    "report",
    "scalars",
    "suggest",
    "total",
]
