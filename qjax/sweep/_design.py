"""Designs: lists of points, which are dicts of plain values."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Value = str | int | float | bool | None
Point = dict[str, Value]


def grid(**axes: Iterable[Any]) -> list[Point]:
    """Returns the points of a full factorial design, the last axis the fastest.

    Args:
      **axes: the values of each axis: strings, numbers, booleans or None; NumPy numbers become Python's. A format is
        given by its name, and a repetition is an axis ``seed``.

    Designs are lists: join them with ``+``, and thin them with a comprehension.

    Raises:
      TypeError, ValueError: if an axis is no list of such values, or an empty one.

    >>> from qjax.sweep import grid
    >>> grid(fmt=["e4m3", "mxfp4"], seed=range(2))
    [{'fmt': 'e4m3', 'seed': 0}, {'fmt': 'e4m3', 'seed': 1}, {'fmt': 'mxfp4', 'seed': 0}, {'fmt': 'mxfp4', 'seed': 1}]
    """
    columns = []
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"grid: axis {name!r} must be a list of values, got {values!r}; write [{values!r}].")
        columns.append([plain("grid", name, value) for value in values])
        if not columns[-1]:
            raise ValueError(f"grid: axis {name!r} has no values; leave it out, or give it one.")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*columns)]


def random(n: int, /, *, seed: int, **distributions: Any) -> list[Point]:
    """Returns n independent random points, each with a ``seed`` of its own.

    Args:
      n: how many.
      seed: of the design. Of two designs that differ only in n, the shorter is the beginning of the longer.
      **distributions: for each axis, a list to draw from with equal probabilities, or a frozen distribution of
        ``scipy.stats`` (anything with ``rvs(random_state=...)``), as in scikit-learn's ``ParameterSampler``.

    Raises:
      TypeError, ValueError: for a negative n, an axis that is neither, or values that ``grid`` refuses.

    >>> from scipy import stats
    >>> from qjax.sweep import random
    >>> design = random(100, seed=0, fmt=["e4m3", "mxfp4"], rate=stats.loguniform(1e-4, 1e-2))
    >>> sorted(design[0]), design[:2] == random(2, seed=0, fmt=["e4m3", "mxfp4"], rate=stats.loguniform(1e-4, 1e-2))
    (['fmt', 'rate', 'seed'], True)
    """
    if n < 0:
        raise ValueError(f"random: n must be at least 0, got {n}.")
    design = []
    for i in range(n):
        generator = np.random.default_rng((seed, i))
        own = int(generator.integers(2**31))
        point = {name: plain("random", name, _draw(name, d, generator)) for name, d in distributions.items()}
        design.append(point | {"seed": own})
    return design


def _draw(name: str, distribution: Any, generator: np.random.Generator) -> Any:
    if hasattr(distribution, "rvs"):
        return distribution.rvs(random_state=generator)
    if isinstance(distribution, Sequence) and not isinstance(distribution, str) and distribution:
        return distribution[int(generator.integers(len(distribution)))]
    raise TypeError(
        f"random: axis {name!r} must be a list of values or a frozen scipy.stats distribution, got {distribution!r}."
    )


def checked(design: Sequence[Mapping[str, Value]]) -> list[Point]:
    """Returns the points of a design as plain data, if they are distinct."""
    if isinstance(design, Mapping) or not all(isinstance(point, Mapping) for point in design):
        raise TypeError(f"sweep: design must be a list of dicts, got {design!r:.80}; grid(...) makes one.")
    points = [{name: plain("sweep", name, value) for name, value in point.items()} for point in design]
    for point in points:
        if any(value != value for value in point.values()):
            raise ValueError(f"sweep: design has NaN in {point}, which no point of a file equals; use None.")
    for key, count in Counter(map(key_of, points)).most_common(1):
        if count > 1:
            raise ValueError(f"sweep: design has {dict(key)} {count} times; give each repetition a seed.")
    return points


def key_of(point: Mapping[str, Value]) -> frozenset:
    """Returns what two points have in common if they are equal, in whatever order their names are."""
    return frozenset(point.items())


def plain(caller: str, name: Any, value: Any) -> Value:
    """Returns a value of a row as a Python one."""
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    if not isinstance(name, str):
        raise TypeError(f"{caller}: the names in a row must be strings, got {name!r}.")
    if not isinstance(value, Value):
        raise TypeError(
            f"{caller}: {name!r} must be a string, a number, a boolean or None, got {value!r:.80}; "
            "give a format by its name, and each element of an array a name."
        )
    return value
