"""The operands of a product: rounded, scales apart where they can be, and the dtypes that hold them exactly."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _carrier
from qjax._blocks import blocks_of
from qjax._chop import random
from qjax._encode import decode
from qjax._modes import Random, max_random_bits
from qjax._quantizer import Quantizer, StraightThrough, derivative
from qjax._scaled import Mode, multiply, quantize, quantize_apart
from qjax._split import check_blocks, names_of, run, split_of
from qjax._stored import Axes, Followed, apart, from_rows, laid_out
from qjax.formats import Codebook, Fixed, Float, Format, Scaled


class Operand(NamedTuple):
    """An operand of a product, ``elements * scale``.

    Attributes:
      elements: in the layout of the array that was given.
      scale: None, or of that layout with 1 for every contracted axis.
      segments: None, or the scales of what is promoted: rows, then segments.
      fmt: the format of the elements, None if they are no format's.
      slope: None for 1, or the derivative that stands for that of rounding, in the layout of the elements.
      whole: where there are segments, the elements times their scales.
    """

    elements: Any
    scale: Any = None
    segments: Any = None
    fmt: Format | None = None
    slope: Any = None
    whole: Any = None

    @property
    def value(self):
        if self.segments is not None:
            return self.whole
        return self.elements if self.scale is None else self.elements.astype(self.scale.dtype) * self.scale


def quantized(
    x,
    quantizer: Quantizer | None,
    axes: Axes,
    *,
    key=None,
    scale=None,
    promote: int | None = None,
    with_slope: bool = False,
    stored: Followed | None = None,
) -> Operand:
    """Returns x as an operand: rounded by a quantizer, blocks along the contraction.

    Args:
      key: of a stochastic quantizer.
      scale: replaces the computed scales.
      promote: the length of segments; where blocks are multiples of it, their scales stay apart.
      with_slope: whether the slope of the estimator is asked for.
      stored: what x is read from, in the format of the quantizer, which then rounds nothing.
    """
    if quantizer is None:
        return Operand(x)
    fmt = quantizer.fmt
    wide, mode, drawn, straight = prepared(x, quantizer, axes, key, promote)
    axis, options = mode.axis, {"scale": scale, "random": drawn}

    def operand(elements, value, **parts) -> Operand:
        slope = None
        if with_slope and stored is None and not isinstance(quantizer.estimator, StraightThrough):
            slope = _back(derivative(quantizer, wide, value, axis, scale, mode.split), x, axes, straight)
        return Operand(_back(elements, x, axes, straight), **parts, slope=slope)

    if quantizer.faults is not None:
        # Codes with faults stand for any value, which no narrow dtype is known to hold.
        value = decode(quantizer.encode(wide, axis=axis, key=key, scale=scale)[0])
        return operand(value, value)
    if isinstance(fmt, Scaled):
        blocks = blocks_of(fmt, wide.shape, axis)
        constant = all(blocks.counts[a] == 1 for a in (axes.contract if straight else (-1,)))
        if constant or (promote is not None and blocks.sizes[-1] % promote == 0):
            if stored is None:
                elements, scales = quantize_apart(wide, mode, **options)
                spread = blocks.spread(scales)
            else:
                elements, spread = (laid_out(part, fmt, axes, promote)[0] for part in apart(stored, wide.dtype))
                scales = spread[tuple(slice(None, None, size) for size in blocks.sizes)]
            element = _element(fmt)
            value = multiply(elements, spread)
            if not constant:
                whole = _back(value, x, axes, straight)
                return operand(elements, value, segments=spread[..., ::promote], fmt=element, whole=whole)
            if not straight:
                reduced = tuple(1 if a in axes.contract else n for a, n in enumerate(x.shape))
                scales = from_rows(spread[..., :1], axes, reduced)
            return operand(elements, value, scale=scales, fmt=element)
    if stored is None:
        value, _ = quantize(wide, mode, **options)
    else:
        value = lax.transpose(decode(dataclasses.replace(stored.source, dtype=wide.dtype)), stored.order)
        value = laid_out(value, fmt, axes, promote)[0]
    return operand(value, value, fmt=fmt)


def prepared(
    x, quantizer: Quantizer, axes: Axes, key, promote: int | None = None
) -> tuple[jax.Array, Mode, Random | None, bool]:
    """Returns an operand as it is rounded: laid out, how, the random words, and whether in the layout it was given."""
    rows, axis, straight = laid_out(x, quantizer.fmt, axes, promote)
    wide = _carrier.widen(rows)
    bits = max_random_bits(quantizer.rounding, jnp.finfo(wide.dtype).bits)
    order = tuple(range(x.ndim)) if straight else axes.order
    split = split_of("Quantizer", quantizer.spec, x.ndim)
    split, shape = tuple(split[a] for a in order if split), tuple(x.shape[a] for a in order)
    drawn = random(jax.ShapeDtypeStruct(shape, wide.dtype), quantizer.keys(key)[0], None, bits, split)
    drawn = drawn and Random(drawn.words.reshape(wide.shape), drawn.bits)
    if split:
        runs = wide.shape
        if not straight:
            # The axes of the contraction are one, and a tile may have axes of length 1 before those of the operand.
            batch, kept = len(axes.batch), len(axes.batch) + len(axes.free)
            ones, merged = ((),) * (wide.ndim - kept - 1), split[kept:]
            runs = (*wide.shape[:-1], run(shape[kept:], merged))
            split = (*split[:batch], *ones, *split[batch:kept], names_of(merged))
        check_blocks("Quantizer", quantizer.fmt, runs, axis, split)
    return wide, Mode(quantizer.fmt, quantizer.rounding, axis, quantizer.saturate, wide.dtype, split), drawn, straight


def _element(fmt: Scaled) -> Format:
    """Returns the format of elements apart from their scale."""
    if fmt.zero_point is None:
        return fmt.element
    # Integers less a zero point, which may be beyond them where the scale was rounded down.
    element, zero = fmt.element, fmt.zero_point
    assert isinstance(element, Fixed)
    return Fixed(max(element.bits, zero.bits) + 1, max(element.fraction_bits, zero.fraction_bits))


def _back(rows, x, axes: Axes, straight: bool):
    return rows if straight else from_rows(rows, axes, x.shape)


def windows(x, axis: int, window: int, stride: int, dilation: int):
    """Returns x with an axis split in two, the positions of a window and the places within it."""
    positions = max((x.shape[axis] - dilation * (window - 1) - 1) // stride + 1, 0)
    if positions == 0:
        return jnp.zeros((*x.shape[:axis], 0, window, *x.shape[axis + 1 :]), x.dtype)
    # The fewer slices: those of one place each, or those of one position each. A gather is some ten times slower.
    by_place = window <= positions
    number, apart, length, step = (
        (window, dilation, positions, stride) if by_place else (positions, stride, window, dilation)
    )
    slices = [lax.slice_in_dim(x, i * apart, i * apart + step * (length - 1) + 1, step, axis) for i in range(number)]
    return jnp.stack(slices, axis + 1 if by_place else axis)


class Extent(NamedTuple):
    """What bounds the values of a format: their significant bits, and the exponent of the lowest bit if it is known."""

    precision: int
    lowest: int | None


def extent(fmt: Format | None) -> Extent | None:
    """Returns the extent of the values of a format, None if they need the whole carrier."""
    match fmt:
        case Float():
            return Extent(fmt.mantissa_bits + 1, fmt.quantum_exponent)
        case Fixed():
            # The lowest integer is a power of two, or not beyond the largest.
            return Extent(max(fmt.max_integer.bit_length(), 1), fmt.quantum_exponent)
        case Codebook():
            ratios = [abs(v).as_integer_ratio() for v in fmt.table if v]
            lowest = min((n & -n).bit_length() - d.bit_length() for n, d in ratios)
            return Extent(max((n // (n & -n)).bit_length() for n, _ in ratios), lowest)
        case Scaled():
            inner = extent(fmt.element)
            if inner is None or fmt.zero_point is not None:
                return None
            return Extent(inner.precision + (0 if fmt.power_of_two else fmt.scale.mantissa_bits + 1), None)
    return None


def narrow_dtype(fmt: Format | None, wide: np.dtype) -> np.dtype:
    """Returns the narrowest of int8, bfloat16 and ``wide`` that holds all values of a format that count.

    int8 holds them as integers, in units of their lowest bit. bfloat16 has the exponents of float32, and of its 8
    bits of precision none is lost by a normal number; subnormals count as zero in products, as XLA has it.
    """
    found = extent(fmt)
    if found is None or wide != np.float32:
        return wide
    # The unit of a product, and the sum of 2^17 of them, are float32 numbers.
    if found.lowest is not None and -60 <= found.lowest <= 40 and _fits_int8(fmt, 2.0**found.lowest):
        return np.dtype(np.int8)
    return narrow_float(fmt)


def narrow_float(fmt: Format | None) -> np.dtype:
    """Returns bfloat16 if it holds all values of a format that count, else float32."""
    found = extent(fmt)
    return np.dtype(jnp.bfloat16) if found is not None and found.precision <= 8 else np.dtype(np.float32)


def _fits_int8(fmt: Format | None, unit: float) -> bool:
    match fmt:
        case Float():
            return fmt.max <= 127 * unit
        case Fixed() | Codebook():
            return fmt.max <= 127 * unit and fmt.min >= -128 * unit
    return False


def lowest_bit(fmt: Format | None) -> int:
    """Returns the exponent of the unit in which int8 holds the values of a format."""
    found = extent(fmt)
    assert found is not None and found.lowest is not None
    return found.lowest


def stored(operand: Operand) -> Operand:
    """Returns an operand with its elements in the narrowest dtype that holds them."""
    if operand.segments is not None:
        return Operand(operand.whole)
    dtype = narrow_dtype(operand.fmt, operand.elements.dtype)
    return Operand(held(operand.elements, operand.fmt, dtype), operand.scale, fmt=operand.fmt)


def restored(operand: Operand, dtype: np.dtype):
    """Returns the value of a stored operand."""
    x = operand.elements
    if x.dtype == np.int8:
        x = x.astype(np.float32) * np.float32(2.0 ** lowest_bit(operand.fmt))
    return operand._replace(elements=x).value.astype(dtype)


def held(x: jax.Array, fmt: Format | None, dtype: np.dtype):
    """Returns elements in a dtype that holds them exactly."""
    return (x * x.dtype.type(2.0 ** -lowest_bit(fmt))).astype(dtype) if dtype == np.int8 else x.astype(dtype)
