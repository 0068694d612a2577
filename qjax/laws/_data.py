"""Runs as a law wants them: columns of equal length, checked, from a mapping, a data frame or a CSV file."""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.laws._law import Law


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """Training runs: the columns of a law, float64 or names of levels, and the losses."""

    law: Law
    columns: Mapping[str, np.ndarray]
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: np.ndarray) -> "Runs":
        return Runs(self.law, {name: values[rows] for name, values in self.columns.items()}, self.loss[rows])

    @property
    def levels(self) -> dict[str, tuple[str, ...]]:
        """The levels of every category column, in the order in which they appear."""
        return {c.name: tuple(dict.fromkeys(self.columns[c.name].tolist())) for c in self.law.columns if c.category}


def read(caller: str, law: Law, data: Any, loss: str = "loss", columns: Mapping[str, str] | None = None) -> Runs:
    """Returns the runs in ``data``, checked; ``columns`` says where the data has another name than the law."""
    columns = columns or {}
    table: Any = _csv(caller, data) if isinstance(data, (str, os.PathLike)) else data
    if not hasattr(table, "keys") and not hasattr(table, "columns"):
        raise TypeError(
            f"{caller}: data is a {type(data).__name__}; expected a mapping of arrays, a data frame or a CSV path"
        )
    has = [str(name) for name in (table.columns if hasattr(table, "columns") else table)]
    names = [c.name for c in law.columns]
    if unknown := sorted(set(columns) - set(names)):
        raise ValueError(f"{caller}: columns renames {unknown[0]!r}; the columns of {law.name} are {', '.join(names)}")
    raw: dict[str, np.ndarray] = {}
    for key, name in [*((name, columns.get(name, name)) for name in names), ("loss", loss)]:
        if name not in has:
            hint = "loss=..." if key == "loss" else f"columns={{{key!r}: ...}}"
            raise ValueError(f"{caller}: no column {name!r} in the data, which has {', '.join(has)}; say {hint}")
        raw[key] = np.asarray(table[name])
        if raw[key].ndim != 1 or len(raw[key]) != len(raw[names[0]]):
            expected = f"({len(raw[names[0]])},), as {names[0]}" if raw[names[0]].ndim == 1 else "one dimension"
            raise ValueError(f"{caller}: column {name!r} has shape {raw[key].shape}; expected {expected}")
    full = dict(law.reference)
    for c in law.columns:
        name, values = columns.get(c.name, c.name), raw[c.name]
        raw[c.name] = values.astype(str) if c.category else _numbers(caller, name, values, c.lower, full.get(c.name))
    return Runs(law, raw, _numbers(caller, loss, raw.pop("loss"), 0.0))


def _numbers(caller: str, name: str, values: np.ndarray, lower: float, reference: float | None = None) -> np.ndarray:
    """Returns finite float64 numbers above ``lower``, or ``reference``; the error names the first bad row."""
    try:
        values = values.astype(np.float64)
    except ValueError as error:
        raise ValueError(f"{caller}: column {name!r} must be numbers: {error}") from None
    wrong = ~((values > lower) & np.isfinite(values) | (values == reference))
    if wrong.any():
        row, full = int(np.argmax(wrong)), "" if reference is None else f" (or {reference:g}: full precision)"
        raise ValueError(
            f"{caller}: column {name!r} must be finite and above {lower:g}{full}, got {values[row]} "
            f"in row {row}; drop or mend the {wrong.sum()} such rows"
        )
    return values


def check_identified(caller: str, law: Law, runs: Runs, free: tuple[str, ...]):
    """Raises an error if there are too few runs for the free parameters, or if what they need never varies."""
    if len(runs) < max(len(free), 1):
        raise ValueError(
            f"{caller}: {len(runs)} runs are too few for the {len(free)} free parameters {', '.join(free)}; "
            "add runs, or fix some with fixed={...}"
        )
    for column in law.columns:
        values, need = runs.columns[column.name], [p.name for p in law.parameters if column.name in p.needs]
        if len(runs) and not column.category and np.all(values == values[0]) and (lost := set(need) & set(free)):
            raise ValueError(
                f"{caller}: column {column.name!r} never varies ({values[0]:g} in all {len(runs)} rows), so "
                f"{', '.join(sorted(lost))} cannot be found; add runs, or fix them with fixed={{...}}"
            )


def _csv(caller: str, path: str | os.PathLike) -> dict[str, np.ndarray]:
    with pathlib.Path(path).open(newline="") as file:
        names, *rows = list(csv.reader(file)) or [[]]
    for line, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise ValueError(f"{caller}: line {line} of {path} has {len(row)} fields; expected {len(names)}, as line 1")
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}
