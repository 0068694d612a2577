"""Minima and roots of functions of one variable, found by looking closer: exact enough, and nothing to tune."""

from collections.abc import Callable

import numpy as np


def argmin(function: Callable[[np.ndarray], np.ndarray], low: float, high: float, digits: int = 9) -> float:
    """Returns where a function of an array is least in [low, high]: 65 points, then 65 between the neighbours ..."""
    for _ in range(digits):
        points = np.linspace(low, high, 65)
        i = int(np.argmin(function(points)))
        low, high = points[max(i - 1, 0)], points[min(i + 1, 64)]
    return float((low + high) / 2)


def root(function: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Returns where a decreasing function is 0, elementwise by bisection; NaN where it has one sign on [low, high]."""
    low, high = (np.array(x, np.float64) for x in np.broadcast_arrays(low, high))
    with np.errstate(invalid="ignore"):
        none = ~((function(low) >= 0) & (function(high) <= 0))
    for _ in range(60):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(none, np.nan, (low + high) / 2)
