"""How an array lies on a mesh under ``shard_map``: which of its axes are split over which mesh axes."""

import itertools
import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from qjax._blocks import levels
from qjax.formats import Format, Rms

Split = tuple[tuple[str, ...], ...]
"""For each axis of an array the mesh axes that it is split over, the major first; () for an array that is whole."""


def split_of(caller: str, spec: PartitionSpec | None, ndim: int) -> Split:
    """Returns what a ``PartitionSpec`` says of an array of so many axes."""
    if spec is None:
        return ()
    if not isinstance(spec, PartitionSpec) or PartitionSpec.UNCONSTRAINED in tuple(spec):
        raise TypeError(f"{caller}: spec must be a jax.P of mesh axes, as in in_specs of jax.shard_map, got {spec!r}.")
    if len(spec) > ndim:
        raise ValueError(f"{caller}: spec {spec!r} has {len(spec)} entries, and x has {ndim} axes.")
    named = ((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec)
    return (*named, *((),) * (ndim - len(spec)))


def names_of(split: Split) -> tuple[str, ...]:
    """Returns the mesh axes that any of some axes are split over."""
    return tuple(itertools.chain.from_iterable(split))


def run(shape: Sequence[int], split: Split) -> int:
    """Returns how many neighbours of the whole, in row-major order, lie together on one device."""
    last = max((axis for axis, names in enumerate(split) if names), default=0)
    return math.prod(shape[last:])


def check_blocks(caller: str, fmt: Format, runs: Sequence[int], axis: int, split: Split) -> None:
    """Raises if blocks lie across devices that do not share their scales.

    Args:
      runs: the length of each axis, or of what lies together along it.
    """
    for level in levels(fmt) if names_of(split) else ():
        if level.block in (None, "axis"):
            shared = names_of(split) if level.block is None else split[axis]
            if shared and (isinstance(level.rule, Rms) or level.rule == "mse"):
                raise ValueError(
                    f"{caller}: scales over devices are those of the largest magnitude, but {level!r} has another "
                    "rule; take 'absmax' or a power-of-two rule."
                )
            continue
        sizes = level.block if isinstance(level.block, tuple) else (level.block,)
        axes = range(-len(sizes), 0) if isinstance(level.block, tuple) else (axis,)
        for place, size in zip(axes, sizes, strict=True):
            if split[place] and runs[place] % size:
                raise ValueError(
                    f"{caller}: blocks of {size} of {level!r} would lie across the devices of {split[place]}, each of "
                    f"which has {runs[place]} elements together; give each device whole blocks."
                )
