"""Rounding to a ``Codebook``: a search among the exact decision points of the carrier."""

import functools
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _carrier, _modes
from qjax._modes import Random, Rounding
from qjax.formats import Codebook


@functools.lru_cache(maxsize=64)
def _table(fmt: Codebook, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values that the dtype has (as float64, rounded to it) and the position of each in the codebook.

    A value beyond the range of the dtype, or nonzero and below its smallest number, is none of them.
    """
    exact = fmt.values()
    with np.errstate(over="ignore", under="ignore"):
        held = exact.astype(dtype).astype(np.float64)
    kept = np.flatnonzero(np.isfinite(held) & ((held != 0) | (exact == 0)))
    return held[kept], kept


def _goes_up(fmt: Codebook, rounding: Rounding, i: int, j: int, low: Fraction, high: Fraction) -> tuple[Fraction, bool]:
    """Returns (b, tie): numbers above b, and b itself if tie, go to ``high`` at position j, others to ``low`` at i."""
    toward_zero = low if abs(low) < abs(high) else high
    sizes_differ = abs(low) != abs(high)
    odd_high = bool((fmt.first_code + j) & 1)
    match rounding:
        case Rounding.TOWARD_NEGATIVE:
            return high, True
        case Rounding.TOWARD_POSITIVE:
            return low, False
        case Rounding.TOWARD_ZERO if sizes_differ:
            return (high, True) if toward_zero == low else (low, False)
        case Rounding.TO_ODD:
            return (low, False) if odd_high else (high, True)
    if fmt.boundaries is None:
        boundary = (low + high) / 2
    else:
        # Where values are left out, the boundary beside the smaller magnitude: nothing rounds across it to zero.
        boundary = Fraction(fmt.boundaries[i if toward_zero == low else j - 1])
    if boundary in (low, high):
        return boundary, boundary == high
    match rounding:
        case Rounding.NEAREST_AWAY if sizes_differ:
            return boundary, toward_zero == low
        case Rounding.NEAREST_ZERO if sizes_differ:
            return boundary, toward_zero == high
        case Rounding.NEAREST_ODD:
            return boundary, odd_high
    return boundary, not odd_high


@functools.lru_cache(maxsize=64)
def _thresholds(fmt: Codebook, rounding: Rounding, dtype: np.dtype, held: np.dtype) -> np.ndarray:
    """Returns for each neighbouring pair the least number of the carrier that goes up, as an ordinal."""
    table, kept = _table(fmt, held)
    values = [Fraction(float(value)) for value in table]
    thresholds = []
    for i, j, low, high in zip(kept[:-1].tolist(), kept[1:].tolist(), values[:-1], values[1:], strict=True):
        boundary, tie = _goes_up(fmt, rounding, i, j, low, high)
        least = dtype.type(float(boundary))
        if Fraction(float(least)) < boundary or (Fraction(float(least)) == boundary and not tie):
            least = np.nextafter(least, dtype.type(np.inf))
        else:
            below = np.nextafter(least, dtype.type(-np.inf))
            if Fraction(float(below)) > boundary or (Fraction(float(below)) == boundary and tie):
                least = below
        thresholds.append(least + dtype.type(0))
    return _ordinal_of(np.array(thresholds, dtype))


def _ordinal_of(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.int64 if x.dtype == np.float64 else np.int32)
    return np.where(bits < 0, np.iinfo(bits.dtype).min - bits, bits)


def round_to_codebook(
    x, fmt: Codebook, rounding: Rounding, *, random: Random | None = None, saturate: bool = False, dtype=None
):
    """Returns float32 or float64 ``x`` rounded to the codebook, and the positions of its values there."""
    c = _carrier.carrier(x.dtype)
    held = np.dtype(dtype or x.dtype)
    table, kept = _table(fmt, held)
    values = jnp.asarray(table.astype(c.float))
    bits = lax.bitcast_convert_type(x, c.int)
    # As integers both zeros are 0, so that subnormals compare as numbers do.
    ordinal = jnp.where(bits < 0, c.int(np.iinfo(c.int).min) - bits, bits)

    split = Rounding.TOWARD_NEGATIVE if rounding.is_stochastic else rounding
    index = _count_up_to(_thresholds(fmt, split, np.dtype(c.float), held).astype(c.int), ordinal, c)
    if rounding.is_stochastic:
        lowest = c.int(_ordinal_of(table[:1].astype(c.float))[0])
        inside = jnp.where(ordinal < lowest, values[0], x)
        index = _draw(inside, index, values, fmt, kept, rounding, random, c)
    result = values[index]
    position = index if len(kept) == len(fmt.table) else jnp.asarray(kept.astype(np.int32))[index]
    magnitude = bits & c.int(np.iinfo(c.int).max)
    nan = magnitude > c.int(c.inf)
    if fmt.nan:
        nan = nan if saturate else magnitude >= c.int(c.inf)
        return jnp.where(nan, c.float(np.nan), result), jnp.where(nan, -1, position)
    top = len(table) - 1
    return jnp.where(nan, values[top], result), jnp.where(nan, int(kept[top]), position)


def _count_up_to(thresholds: np.ndarray, ordinal, c):
    """Returns how many of the ascending thresholds are at most each ordinal, int32."""
    if len(thresholds) <= 32:
        return sum((ordinal >= threshold).astype(jnp.int32) for threshold in thresholds)
    place = c.width - 16
    starts = np.arange(-(2**15), 2**15, dtype=c.int) << place
    before = np.searchsorted(thresholds, starts, side="right")
    within = np.diff(before, append=len(thresholds)).max()
    if within > 3:
        return jnp.searchsorted(thresholds, ordinal, side="right", method="scan_unrolled").astype(jnp.int32)
    # The upper 16 bits say it but for the few thresholds that share them with the ordinal.
    start = jnp.asarray(before.astype(np.uint16))[(ordinal >> place) + 2**15].astype(jnp.int32)
    padded = jnp.asarray(np.append(thresholds, np.full(within, np.iinfo(c.int).max, c.int)))
    return start + sum((ordinal >= padded[start + i]).astype(jnp.int32) for i in range(within))


def _draw(x, index, values, fmt: Codebook, kept: np.ndarray, rounding: Rounding, random: Random | None, c):
    """Returns the index after a stochastic choice between ``values[index]`` and the next, for x not below the first."""
    high_index = jnp.minimum(index + 1, len(kept) - 1)
    low, high = values[index], values[high_index]
    # The nearer one to zero is the lower neighbour, so that the rule is odd, as it is for floats.
    negative = (high <= 0) & (low < 0)
    near, far = jnp.where(negative, high, low), jnp.where(negative, low, high)
    share = _carrier.divide(x - near, jnp.where(near == far, c.float(1), far - near))
    distance = jnp.where(high_index == index, c.float(0), share)
    distance = jnp.clip(distance, c.float(0), c.float(1))
    fraction = (distance * c.float(2.0 ** (c.width - 2))).astype(c.int).astype(c.uint)
    # The lowest bit says that x is not exact, however near it is to the value.
    inexact = (_carrier.to_bits(x, c) ^ _carrier.to_bits(near, c)) & c.uint(c.sign - 1) != 0
    fraction = jnp.minimum(fraction, c.uint(2 ** (c.width - 2) - 1)) << 2 | inexact.astype(c.uint)
    near_index = jnp.where(negative, high_index, index)
    assert random is not None
    up = _modes.goes_up(rounding, fraction, random, c)
    up = up | (_carrier.to_bits(x, c) == _carrier.to_bits(far, c))
    return jnp.where(up, jnp.where(negative, index, high_index), near_index)
