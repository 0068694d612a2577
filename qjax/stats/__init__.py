"""Numerics of tensors: what a format does to them, as numbers, tables and pictures."""

from qjax.stats._measure import measure
from qjax.stats._stats import COUNTS, Stats, total

__all__ = ["COUNTS", "Stats", "measure", "total"]
