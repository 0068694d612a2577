"""How an array divides into the blocks of a format."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats import Format, Scaled


class Rows(NamedTuple):
    """An array of ``shape`` laid out with its axes in an ``order``, and seen in another shape of as many elements."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    def undone(self, rows):
        """Returns the array."""
        x = rows.reshape(tuple(self.shape[a] for a in self.order))
        return lax.transpose(x, np.argsort(self.order).tolist())


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
            if _several(count) and _several(size):
                shape += [count, size]
                within.append(len(shape) - 1)
            else:
                shape.append(count * size)
                if _several(size):
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
        divided = [axis for axis, size in enumerate(self.sizes) if _several(size)]
        folds = _FOLDS if _known_size(self.shape) >= _LARGE else 1
        if divided and self.sizes == self.shape:
            # All at once, so that a mesh sends one number.
            size = self.sizes[divided[-1]]
            part = math.gcd(size, 128) if isinstance(size, int) else 1
            x = _folded(x, divided[-1], part if part >= 32 else size, folds)
            return _max(x, tuple(range(x.ndim))).reshape(self.counts)
        # One axis after the other, from the last on: XLA takes many times longer over two at once.
        for axis in reversed(divided):
            x = _largest(x, axis, self.sizes[axis], folds)
        return x

    def spread(self, scales):
        """Returns an array of shape ``counts`` with its entry for every element, in ``shape``."""
        view, within = self._view
        kept = tuple(axis for axis in range(len(view)) if axis not in within)
        whole = tuple(count * size for count, size in zip(self.counts, self.sizes, strict=True))
        x = lax.broadcast_in_dim(scales.reshape(tuple(view[axis] for axis in kept)), view, kept).reshape(whole)
        return x if whole == self.shape else x[tuple(slice(0, n) for n in self.shape)]


# Arrays with fewer elements are not worth a longer compilation, nor a kernel more.
_LARGE, _LARGE_FOR_ROWS = 2**16, 2**20
# XLA computes anew, instead of storing it, what another computation reads up to 15 times.
_FOLDS, _FOLDS_OF_REST = 8, 4


def _largest(x, axis: int, size, folds: int):
    """Returns the largest of every ``size`` entries along an axis and 0, the last of them perhaps fewer.

    On the CPU, XLA unrolls short loops into operations on single numbers. Loops over vectors are left of entries folded
    onto each other and of several blocks at once, and, along other axes than the last, of at most 32 entries. What is
    folded lies together, so that a mesh can have parts of a large block on each device.
    """
    n = x.shape[axis]
    if rest := n % size:
        whole, last = lax.split(x, (n - rest, rest), axis)
        parts = _largest(whole, axis, size, folds), _largest(last, axis, rest, min(folds, _FOLDS_OF_REST))
        return lax.concatenate(parts, axis)
    is_last, is_large = axis == x.ndim - 1, folds > 1 and isinstance(size, int)
    longest, part = (128, 128) if is_last else (32, 16)
    if is_large and size > longest and (part := _divisor(size, part)) > 1:
        # Two reductions, of which XLA would make one: jax 0.10 through the barrier too, if nothing else lies between.
        parts = lax.optimization_barrier(_largest(x, axis, part, folds))
        return _max(_folded(parts, axis, size // part, 1 if is_last else 2), (axis + 1,))
    in_rows = is_large and is_last and _known_size(x.shape) >= _LARGE_FOR_ROWS and jax.default_backend() == "cpu"
    x = _folded(x, axis, size, folds)
    if in_rows and 16 <= x.shape[-1] <= 32:
        return _of_rows(x, folds * x.shape[-1] // size)
    return _max(x, (axis + 1,))


def _of_rows(x, most: int):
    """Returns the largest of each row and 0, of up to ``most`` rows in one loop, all on one device of any mesh."""
    devices = jax.device_count()
    counts = [_divisor(n // math.gcd(n, devices), most) if isinstance(n, int) else 1 for n in x.shape[:-1]]
    axis = max(range(len(counts)), key=lambda a: (counts[a], a))
    parts = x.reshape(*x.shape[:axis], x.shape[axis] // counts[axis], counts[axis], *x.shape[axis + 1 :])
    rows = [lax.index_in_dim(parts, i, axis + 1, False) for i in range(counts[axis])]
    zeros = [_zero(x)] * len(rows)
    maxima = lax.reduce(rows, zeros, lambda left, right: tuple(map(lax.max, left, right)), (x.ndim - 1,))
    # To concatenate them would be a kernel of its own.
    shape = parts.shape[:-1]
    which = lax.broadcasted_iota(np.int32, shape, axis + 1)
    kept = [a for a in range(len(shape)) if a != axis + 1]
    y, *others = (lax.broadcast_in_dim(y, shape, kept) for y in maxima)
    for i, other in enumerate(others, 1):
        y = lax.select(which == i, other, y)
    return y.reshape(x.shape[:-1])


def _max(x, axes: tuple[int, ...]):
    return lax.reduce(x, _zero(x), lax.max, axes)


def _zero(x):
    """Returns 0, which XLA takes for unknown: large constants it would reduce while it compiles, a second a million."""
    zero = np.zeros((), x.dtype)
    return lax.optimization_barrier(zero) if _known_size(x.shape) >= _LARGE else zero


def _folded(x, axis: int, size, most: int):
    """Returns x with an axis as (blocks, size), and fewer entries there, of which the largest is that of the block."""
    before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if not isinstance(size, int):
        return jnp.expand_dims(x, axis)
    folds = _divisor(size, most if after else min(most, max(size // 16, 1)))
    if folds == 1 < most and n == size >= 128:
        parts = lax.split(x, (n - n % 64, n % 64), axis)
        return lax.concatenate([_folded(part, axis, part.shape[axis], most) for part in parts], axis + 1)
    width = 1 if after else size // folds
    parts = x.reshape(*before, n // width // folds, folds, width, *after)
    x = functools.reduce(lax.max, [lax.index_in_dim(parts, i, axis + 1, False) for i in range(folds)])
    return x.reshape(*before, n // size, size // folds, *after)


def _known_size(shape) -> int:
    """Returns how many elements there are, for a symbolic size of 1."""
    return math.prod(n for n in shape if isinstance(n, int))


def _divisor(n: int, most: int) -> int:
    """Returns the largest divisor of n up to ``most``."""
    return next(d for d in range(most, 0, -1) if n % d == 0)


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
    # In this order the comparisons are decided for symbolic sizes too, of which only n >= 1 is known.
    return Blocks(shape, tuple(max(min(size, n), 1) for size, n in zip(sizes, shape, strict=True)))


def _several(n) -> bool:
    """Returns whether a size is above 1; a symbolic one, of ``jax.export``, may be anything."""
    return n > 1 if isinstance(n, int) else n != 1


def levels(fmt: Format) -> list[Scaled]:
    """Returns a block format and those within it, outermost first."""
    return [fmt, *levels(fmt.element)] if isinstance(fmt, Scaled) else []
