"""The fastest tiles by device, kind of operands and rows: data, which benchmarks/tune_kernels.py refills."""

import functools
import json
import pathlib

from qjax._accumulator import Accumulator, register_of
from qjax._kernels._operands import Coded, Unrounded
from qjax._kernels._target import Target

PATH = pathlib.Path(__file__).with_name("tiles.json")


def kind_of(lhs, rhs, accumulator: Accumulator) -> str:
    """Returns what operands and a register have in common with others for which the same tiles are the fastest."""

    def name(x) -> str:
        if isinstance(x, Unrounded):
            return f"{x.x.dtype} to round"
        return f"codes of {x.fmt.bits} bits" if isinstance(x, Coded) else str(x.dtype)

    register = register_of(accumulator).sums.__name__
    if register == "float32" and accumulator.fmt.bits < 32:
        register = f"rounded {register}"
    return f"{name(lhs)} x {name(rhs)}, {'stochastic ' if accumulator.is_stochastic else ''}{register}"


@functools.cache
def table() -> tuple[dict, ...]:
    """Returns the rows, of which the first that fits counts.

    Each has a part of the device's name, a kind of operands (None: any), the most rows of lhs (None: any), the tiles,
    and when and in how many seconds they were measured (None: not yet).
    """
    return tuple(json.loads(PATH.read_text()))


def tiles_for(lhs, rhs, accumulator: Accumulator) -> tuple[int, ...] | None:
    """Returns the tiles of the table for operands on the current target, None if it has none."""
    device, kind, rows = Target.current().kind, kind_of(lhs, rhs, accumulator), lhs.shape[1]
    for row in table():
        most = row["most_rows"]
        if row["device"] in device and row["kind"] in (None, kind) and (most is None or rows <= most):
            return tuple(row["tiles"])
    return None


def whole(size: int, tile: int) -> int:
    """Returns a size that is not 0, up to whole tiles."""
    return -(-size // tile) * tile
