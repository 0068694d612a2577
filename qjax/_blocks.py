"""How an array divides into the blocks of a format."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from qjax.formats import Format, Scaled


class Blocks(NamedTuple):
    """How an array of ``shape`` splits into blocks of ``sizes``, one size for each axis."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of blocks along every axis: the shape of the scales."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.sizes, strict=True))

    @property
    def _view(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape that has every divided axis as (blocks, size), and the axes within the blocks."""
        shape: list[int] = []
        within: list[int] = []
        for count, size in zip(self.counts, self.sizes, strict=True):
            if count > 1 and size > 1:
                shape += [count, size]
                within.append(len(shape) - 1)
            else:
                shape.append(count * size)
                if size > 1:
                    within.append(len(shape) - 1)
        return tuple(shape), tuple(within)

    @property
    def within(self) -> tuple[int, ...]:
        """The axes of the view that lie within blocks."""
        return self._view[1]

    def split(self, x):
        """Returns x, padded with zeros to whole blocks, with every divided axis as (blocks, size)."""
        padding = [(0, count * size - n) for n, count, size in zip(self.shape, self.counts, self.sizes, strict=True)]
        return jnp.pad(x, padding).reshape(self._view[0]) if any(p[1] for p in padding) else x.reshape(self._view[0])

    def maximum(self, x):
        """Returns the largest of each block's entries and 0, of shape ``counts``."""
        view, (shape, within) = self.split(x), self._view
        if within:
            # Folded first in operations on whole vectors, also where x is computed on the way: XLA reduces one number
            # after the other. What is folded lies together, so that a mesh can have parts of a block on each device.
            axis, before, after = within[-1], shape[: within[-1]], shape[within[-1] + 1 :]
            size = shape[axis]
            lanes = math.gcd(size, 8) if math.prod(after) == 1 else 1
            folds = next(d for d in range(8, 0, -1) if size // lanes % d == 0)
            width = lanes * math.gcd(size // lanes // folds, 2) if lanes > 1 else 1
            parts = view.reshape(*before, size // width // folds, folds, width, *after)
            view = functools.reduce(jnp.maximum, [lax.index_in_dim(parts, i, axis + 1, False) for i in range(folds)])
            view = lax.optimization_barrier(view)
            view = view.reshape(*before, size // folds, *after)
        return jnp.max(view, axis=within, initial=0).reshape(self.counts)

    def spread(self, scales):
        """Returns an array of shape ``counts`` with its entry for every element, in ``shape``."""
        view, within = self._view
        kept = scales.reshape(tuple(1 if axis in within else n for axis, n in enumerate(view)))
        whole = tuple(count * size for count, size in zip(self.counts, self.sizes, strict=True))
        x = jnp.broadcast_to(kept, view).reshape(whole)
        return x if whole == self.shape else x[tuple(slice(0, n) for n in self.shape)]


def blocks_of(fmt: Scaled, shape: tuple[int, ...], axis: int) -> Blocks:
    """Returns the blocks of a format on an array, ``axis`` counted from either end."""
    if isinstance(fmt.block, tuple):
        sizes = (1,) * (len(shape) - len(fmt.block)) + fmt.block
    elif fmt.block is None or not shape:
        sizes = shape
    else:
        axis %= len(shape)
        size = shape[axis] if fmt.block == "axis" else fmt.block
        sizes = tuple(size if i == axis else 1 for i in range(len(shape)))
    return Blocks(shape, tuple(max(1, min(size, n)) for size, n in zip(sizes, shape, strict=True)))


def levels(fmt: Format) -> list[Scaled]:
    """Returns a block format and those within it, outermost first."""
    return [fmt, *levels(fmt.element)] if isinstance(fmt, Scaled) else []
