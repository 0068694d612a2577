"""Operands in real storage: where their blocks lie, and what a product reads from their codes."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax

from qjax import _carrier
from qjax._blocks import Rows, blocks_of, levels
from qjax._encode import QTensor, decode_apart
from qjax._quantizer import Quantizer
from qjax.formats import Format, Scaled


class Axes(NamedTuple):
    """The axes of an operand: what it is contracted over, what it shares with the other one, what is its own.

    Attributes:
      contract: in the order of the other operand's; blocks lie along all of them, ...
      block: ... or, if this is not None, along this one: in a convolution, the features.
    """

    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    block: int | None = None

    @property
    def order(self) -> tuple[int, ...]:
        return (*self.batch, *self.free, *self.contract)


def to_rows(x, axes: Axes):
    """Returns x as (batch axes, free axes, contraction)."""
    kept = tuple(x.shape[a] for a in (*axes.batch, *axes.free))
    return lax.transpose(x, axes.order).reshape(*kept, math.prod(x.shape[a] for a in axes.contract))


def from_rows(rows, axes: Axes, shape: tuple[int, ...]):
    """Returns the inverse of ``to_rows`` for an array of ``shape``."""
    return Rows(shape, axes.order).undone(rows)


def _along(fmt: Format, axes: Axes) -> tuple[int, bool]:
    """Returns the axis of the blocks of a format, and whether they lie in the layout that an array was given in."""
    blocks_are = {type(level.block) for level in levels(fmt)}
    along = axes.block
    if along is None or "axis" in [level.block for level in levels(fmt)]:
        along = axes.contract[0] if len(axes.contract) == 1 else None
    # The layout as it is, if blocks do not care or lie along one of its axes.
    straight = tuple not in blocks_are and (along is not None or not has_direction(fmt))
    return along if straight and along is not None else -1, straight


def laid_out(x, fmt: Format, axes: Axes, promote: int | None = None) -> tuple[Any, int, bool]:
    """Returns x as a format's blocks lie in it, their axis, and whether it is in the layout that it was given in."""
    axis, straight = _along(fmt, axes)
    if straight and promote is None:
        return x, axis, True
    rows = to_rows(x, axes)
    tiles = [len(level.block) for level in levels(fmt) if isinstance(level.block, tuple)]
    if tiles:
        # A tile spans no two entries of a batch: axes that it has more than the operand has of its own have length 1.
        missing, at = max(tiles) - 1 - len(axes.free), len(axes.batch)
        rows = rows.reshape(*rows.shape[:at], *(1,) * missing, *rows.shape[at:])
    return rows, -1, False


def has_direction(fmt: Format) -> bool:
    """Returns whether it matters to a format which axes are contracted: whether it has blocks along some of them."""
    return any(level.block is not None for level in levels(fmt))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "source"], meta_fields=["order"])
@dataclasses.dataclass(frozen=True)
class Followed:
    """An array of a program that is another one, its source, with the axes in an ``order``.

    Attributes:
      value: the array.
      source: the ``QTensor`` that it is read from, or another pytree that stands for where it comes from.
      order: the axis of the source that each axis is.
    """

    value: Any
    source: Any
    order: tuple[int, ...]

    def axes_of_source(self, axes: Axes) -> Axes:
        """Returns the axes of the source that those of the value are, with neither batch nor free ones in an order."""
        contract, batch, free = (tuple(self.order[a] for a in part) for part in axes[:3])
        block = None if axes.block is None else self.order[axes.block]
        return Axes(contract, tuple(sorted(batch)), tuple(sorted(free)), block)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lost:
    """The source of what is no longer followed: the format that it is stored in, None if it was no ``QTensor``."""

    fmt: Format | None


def stored_weight(x, quantizer: Quantizer, axes: Axes | None, key=None) -> QTensor:
    """Returns x in the storage that a product with these axes reads it from, None for a format without direction."""
    if quantizer.spec is not None:
        raise ValueError("quantize_params: codes are stored before they are split over a mesh; leave spec out.")
    wide, axis, straight = _carrier.widen(x), -1, True
    if axes is not None:
        wide, axis, straight = laid_out(wide, quantizer.fmt, axes)
    q, _ = quantizer.encode(wide, axis=axis, key=key)
    rows = None if straight or axes is None else Rows(x.shape, axes.order)
    return dataclasses.replace(q, dtype=x.dtype, rows=rows)


def is_stored(stored: Followed | None, quantizer: Quantizer, axes: Axes) -> bool:
    """Returns whether a product reads an operand from what is stored, rather than to round its value.

    Raises:
      ValueError: if it is stored in the format of the operand, but not as this product needs it.
    """
    if stored is None or stored.source.fmt != quantizer.fmt:
        return False
    if isinstance(stored.source, Lost):
        if not isinstance(quantizer.fmt, Scaled):
            return False  # values of the format are rounded to themselves
        raise ValueError(
            f"quantize: an operand that is stored in {quantizer.fmt!r} comes into this product through a while, a "
            "shard_map or the slices of a scan, where its codes are not followed; leave it in floating point (None in "
            "the rule of quantize_params), or decode it before (qjax.decode)."
        )
    q, mine = stored.source, stored.axes_of_source(axes)
    axis, straight = _along(q.fmt, mine)
    rows = None if straight else Rows(q.shape, mine.order)
    if quantizer.faults is None and not has_direction(q.fmt):
        return True
    fits = q.rows == rows and (rows is not None or (q.axis - axis) % len(q.shape) == 0)
    if quantizer.faults is not None or not (fits or q.rows == Rows(q.shape, mine.order)):
        lies = f"along axis {q.axis % len(q.shape)}" if q.rows is None else f"in rows of the axes {q.rows.order}"
        raise ValueError(
            f"quantize: an operand of shape {q.shape} is stored in {q.fmt!r} with blocks {lies}; this product has them "
            f"along its contraction over {mine.contract}, and no faults. Store it with "
            "axes=qjax.contracted(fn, params, ...), or store it in another format."
        )
    return True


def apart(stored: Followed, dtype) -> tuple[Any, Any]:
    """Returns the elements of what is stored, and the scale of each."""
    q = dataclasses.replace(stored.source, dtype=dtype)
    elements, scales = decode_apart(q)
    spread = blocks_of(q.fmt, q.shape_of_codes, q.axis).spread(scales)
    if q.rows is not None:
        elements, spread = q.rows.undone(elements), q.rows.undone(spread)
    return lax.transpose(elements, stored.order), lax.transpose(spread, stored.order)
