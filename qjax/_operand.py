"""The operands of a product: rounded, scales apart where they can be, and the dtypes that hold them exactly."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _carrier
from qjax._blocks import blocks_of
from qjax._chop import random
from qjax._quantizer import Quantizer
from qjax._rounding import max_random_bits
from qjax._scaled import Mode, quantize, quantize_apart
from qjax.formats import Codebook, Fixed, Float, Format, Scaled


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


class Operand(NamedTuple):
    """An operand of a product, ``elements * scale``.

    Attributes:
      elements: in the layout of the array that was given.
      scale: None, or of that layout with 1 for every contracted axis.
      segments: None, or the scales of what is promoted: rows, then segments.
      fmt: the format of the elements, None if they are no format's.
    """

    elements: Any
    scale: Any = None
    segments: Any = None
    fmt: Format | None = None

    @property
    def value(self):
        return self.elements if self.scale is None else self.elements.astype(self.scale.dtype) * self.scale


def to_rows(x, axes: Axes):
    """Returns x as (batch axes, free axes, contraction)."""
    kept = tuple(x.shape[a] for a in (*axes.batch, *axes.free))
    return lax.transpose(x, axes.order).reshape(*kept, math.prod(x.shape[a] for a in axes.contract))


def from_rows(rows, axes: Axes, shape: tuple[int, ...]):
    """Returns the inverse of ``to_rows`` for an array of ``shape``."""
    x = rows.reshape(tuple(shape[a] for a in axes.order))
    return lax.transpose(x, np.argsort(axes.order).tolist())


def quantized(
    x, quantizer: Quantizer | None, axes: Axes, *, key=None, scale=None, promote: int | None = None
) -> Operand:
    """Returns x as an operand: rounded by a quantizer, blocks along the contraction.

    Args:
      key: of a stochastic quantizer.
      scale: replaces the computed scales.
      promote: the length of segments; where blocks are multiples of it, their scales stay apart.
    """
    if quantizer is None:
        return Operand(x)
    fmt = quantizer.fmt
    blocks_are = {type(level.block) for level in _levels(fmt)}
    tiled, along = tuple in blocks_are, axes.block
    if along is None or "axis" in [level.block for level in _levels(fmt)]:
        along = axes.contract[0] if len(axes.contract) == 1 else None
    # The layout as it is, if blocks do not care or lie along one of its axes.
    straight = promote is None and not tiled and (along is not None or blocks_are <= {type(None)})
    rows = x if straight else to_rows(x, axes)
    axis = along if straight and along is not None else -1

    wide = _carrier.widen(rows)
    bits = min(max_random_bits(quantizer.rounding, jnp.finfo(wide.dtype).bits), jnp.finfo(wide.dtype).bits)
    mode = Mode(fmt, quantizer.rounding, axis, quantizer.saturate, wide.dtype)
    options = {"scale": scale, "random": random(wide, key, None, bits)}
    if not isinstance(fmt, Scaled):
        return Operand(_back(quantize(wide, mode, **options)[0], x, axes, straight), fmt=fmt)
    element = fmt.element
    if fmt.zero_point is not None:
        assert isinstance(element, Fixed)
        element = Fixed(element.bits + 1, element.fraction_bits)
    blocks = blocks_of(fmt, rows.shape, axis)
    if all(blocks.counts[a] == 1 for a in (axes.contract if straight else (-1,))):
        elements, scales = quantize_apart(wide, mode, **options)
        if not straight:
            reduced = tuple(1 if a in axes.contract else n for a, n in enumerate(x.shape))
            scales = from_rows(blocks.spread(scales)[..., :1], axes, reduced)
        return Operand(_back(elements, x, axes, straight), scales, fmt=element)
    if promote is not None and blocks.sizes[-1] % promote == 0:
        elements, scales = quantize_apart(wide, mode, **options)
        segments = blocks.spread(scales)[..., ::promote]
        return Operand(_back(elements, x, axes, straight), segments=segments, fmt=element)
    return Operand(_back(quantize(wide, mode, **options)[0], x, axes, straight), fmt=fmt)


def _back(rows, x, axes: Axes, straight: bool):
    return rows if straight else from_rows(rows, axes, x.shape)


def _levels(fmt: Format) -> list[Scaled]:
    """Returns a block format and those within it, outermost first."""
    return [fmt, *_levels(fmt.element)] if isinstance(fmt, Scaled) else []


class Extent(NamedTuple):
    """What bounds the values of a format: significant bits, and the exponents of the lowest and highest bit."""

    precision: int
    lowest: int | None
    highest: int | None


def extent(fmt: Format | None) -> Extent | None:
    """Returns the extent of the values of a format, None if they need the whole carrier.

    Where scales that are powers of two are in the values, only the carrier bounds the exponents: None.
    """
    match fmt:
        case Float():
            return Extent(fmt.mantissa_bits + 1, fmt.quantum_exponent, fmt.emax)
        case Fixed():
            return Extent(max(fmt.max_integer, -fmt.min_integer).bit_length(), fmt.quantum_exponent, fmt.emax + 1)
        case Codebook():
            ratios = [abs(v).as_integer_ratio() for v in fmt.table if v]
            lowest = min((n & -n).bit_length() - d.bit_length() for n, d in ratios)
            precision = max((n // (n & -n)).bit_length() for n, _ in ratios)
            return Extent(precision, lowest, fmt.emax)
        case Scaled():
            inner = extent(fmt.element)
            if inner is None or fmt.zero_point is not None:
                return None
            outer = Extent(fmt.scale.mantissa_bits + 1, fmt.scale.quantum_exponent, fmt.scale.emax)
            if fmt.power_of_two:
                return Extent(inner.precision, None, None)
            if inner.lowest is None or inner.highest is None or outer.lowest is None or outer.highest is None:
                return Extent(inner.precision + outer.precision, None, None)
            return Extent(
                inner.precision + outer.precision, inner.lowest + outer.lowest, inner.highest + outer.highest + 1
            )
    return None


def narrow_dtype(fmt: Format | None, wide: np.dtype) -> np.dtype:
    """Returns the narrowest of int8, bfloat16 and ``wide`` that holds all values of a format.

    int8 holds them as integers, in units of their lowest bit. bfloat16 has the exponents of float32, and of its 8
    bits of precision none is lost by a normal number; subnormals count as zero in products, as XLA has it.
    """
    found = extent(fmt)
    if found is None or wide != np.float32:
        return wide
    if found.lowest is not None and found.highest is not None and _fits_int8(fmt, 2.0**found.lowest):
        return np.dtype(np.int8)
    fits = found.lowest is None or (found.lowest >= -126 and (found.highest or 0) <= 127)
    return np.dtype(jnp.bfloat16) if found.precision <= 8 and fits else wide


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
    x = operand.elements
    dtype = narrow_dtype(operand.fmt, x.dtype)
    return operand._replace(elements=held(x, operand.fmt, dtype), segments=None)


def restored(operand: Operand, dtype: np.dtype):
    """Returns the value of a stored operand."""
    x = operand.elements.astype(np.float32 if operand.elements.dtype == np.int8 else dtype)
    if operand.elements.dtype == np.int8:
        x = x * np.float32(2.0 ** lowest_bit(operand.fmt))
    return operand._replace(elements=x).value.astype(dtype)


def held(x: jax.Array, fmt: Format | None, dtype: np.dtype):
    """Returns elements in a dtype that holds them exactly."""
    return (x * x.dtype.type(2.0 ** -lowest_bit(fmt))).astype(dtype) if dtype == np.int8 else x.astype(dtype)
