"""Quantization to any format: dispatch on its kind, block scales and their rules."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _rounding
from qjax._blocks import Blocks, blocks_of
from qjax._codebook import round_to_codebook
from qjax._rounding import Random, Rounding
from qjax.formats import Codebook, Fixed, Float, Format, Scaled


class Mode(NamedTuple):
    """How to round: everything of a call that is static."""

    fmt: Format
    rounding: Rounding
    axis: int
    saturate: bool
    dtype: Any


class Parts(NamedTuple):
    """What ``encode`` stores.

    Attributes:
      elements: the rounded elements, as ``2^shift`` times values of the element format; the positions in a codebook.
      shift: exponent of the scale that is still in the elements, an int or an array.
      scales: the scales of each level, outermost first, one for each block.
      zero_points: likewise, the zero points.
    """

    elements: Any
    shift: Any = 0
    scales: tuple = ()
    zero_points: tuple = ()


def quantize(x, mode: Mode, *, scale=None, random: Random | None = None) -> tuple[Any, Parts]:
    """Returns float32 or float64 ``x`` rounded to the format of ``mode``, and the parts to store."""
    fmt = mode.fmt
    if isinstance(fmt, Scaled):
        return _quantize_blocks(x, fmt, mode, scale, random)
    if isinstance(fmt, Codebook):
        value, position = round_to_codebook(
            x, fmt, mode.rounding, random=random, saturate=mode.saturate, dtype=mode.dtype
        )
        return value, Parts(position)
    value = _rounding.round_to(
        x, fmt, mode.rounding, random=random, saturate=mode.saturate, dtype=mode.dtype
    )
    return value, Parts(value)


def multiply(value, scale):
    """Returns ``value * scale`` for scales >= 0, one rounding that XLA cannot contract with a later addition."""
    c = _rounding.carrier(value.dtype)
    bits = _rounding.to_bits(value, c)
    magnitude = _rounding.from_bits(bits & c.uint(c.sign - 1), c)
    product = _rounding.to_bits(_rounding.flush(magnitude * scale), c)
    nan = product > c.uint(c.inf)
    return _rounding.from_bits(jnp.where(nan, c.uint(c.nan), product | bits & c.uint(c.sign)), c)


def _divide(view, scale):
    """Returns ``view / scale``, 0 where the scale is 0; subnormals count as zero."""
    return _rounding.flush(_rounding.flush(view) / jnp.where(scale == 0, np.inf, scale))


def _quantize_blocks(x, fmt: Scaled, mode: Mode, scale, random: Random | None) -> tuple[Any, Parts]:
    blocks = blocks_of(fmt, x.shape, mode.axis)
    view = blocks.split(x)
    inner = mode._replace(fmt=fmt.element, saturate=True)
    words = None if random is None else Random(blocks.split(random.words), random.bits)
    if fmt.zero_point is not None:
        return _quantize_affine(view, fmt, inner, blocks, scale, words)
    if scale is not None:
        scale = blocks.spread(_nearest_scale(scale, fmt))
    elif fmt.rule == "mse":
        scale = _best_scale(view, fmt, blocks, inner, words)
    else:
        scale = _computed_scale(_largest(view, blocks), fmt)

    if fmt.power_of_two and isinstance(fmt.element, Float | Fixed):
        c = _rounding.carrier(x.dtype)
        value, shift = _shifted(view, scale, inner, words)
        parts = Parts(blocks.join(value), blocks.join(jnp.broadcast_to(shift, view.shape)))
        value = jnp.where(jnp.isnan(scale), c.float(np.nan), value)
        return blocks.join(value), parts._replace(scales=(scale.reshape(blocks.counts),))
    ratio = _divide(view, scale)
    if isinstance(fmt.element, Scaled):
        value, parts = quantize(blocks.join(ratio), inner, random=random)
        value = blocks.split(value)
    else:
        value, parts = quantize(ratio, inner, random=words)
        parts = parts._replace(elements=blocks.join(parts.elements))
    value = _hold(blocks.join(multiply(value, scale)), mode.dtype)
    return value, parts._replace(scales=(scale.reshape(blocks.counts), *parts.scales))


def _shifted(view, scale, inner: Mode, words):
    """Returns the elements rounded exactly on the grid of the scaled format, and the scale's exponent."""
    c = _rounding.carrier(view.dtype)
    shift = _rounding.exponent(_rounding.to_bits(scale, c), c)
    value = _rounding.round_to(
        view, inner.fmt, inner.rounding, random=words, saturate=True, shift=shift, dtype=inner.dtype
    )
    return value, shift


def _hold(value, dtype):
    """Returns float32 values rounded to nearest in the dtype, still as float32."""
    if value.dtype == dtype:
        return value
    held = jnp.finfo(dtype)
    fmt = Float(held.nexp, held.nmant)
    return _rounding.round_to(value, fmt, Rounding.NEAREST_EVEN)


def _nearest_scale(ratio, fmt: Scaled):
    scale = _rounding.round_to(ratio, fmt.scale, Rounding.NEAREST_EVEN, saturate=True)
    return scale if fmt.power_of_two else _rounding.flush(scale)


def _largest(view, blocks: Blocks):
    """Returns the bits of the largest magnitude of each block; NaN is above infinity, infinity above all else."""
    c = _rounding.carrier(view.dtype)
    magnitude = _rounding.to_bits(view, c) & c.uint(c.sign - 1)
    return jnp.max(magnitude, axis=blocks.within, keepdims=True, initial=0)


def _quotient(largest, divisor: float, c):
    """Returns the quotient of magnitudes and a constant; the barrier keeps XLA from multiplying by its reciprocal."""
    return _rounding.from_bits(largest, c) / lax.optimization_barrier(c.float(divisor))


def _computed_scale(largest, fmt: Scaled):
    """Returns the scale of each block by the rule of the format; NaN where the block has a NaN or an infinity."""
    c = _rounding.carrier(np.float64 if largest.dtype == np.uint64 else np.float32)
    if fmt.rule in ("absmax", "mse"):
        scale = _nearest_scale(_quotient(largest, fmt.element.max, c), fmt)
    else:
        exponent = jnp.clip(_power_of_two(largest, fmt, c), *_exponent_range(fmt.scale, c))
        scale = _rounding.from_bits(_rounding.compose(jnp.ones_like(exponent), exponent, c), c)
    return jnp.where(largest >= c.uint(c.inf), c.float(np.nan if fmt.scale.has_nan else fmt.scale.max), scale)


def _exponent_range(scale: Float, c) -> tuple[int, int]:
    lowest = scale.quantum_exponent if scale.subnormals is True else scale.emin
    return max(lowest, 1 - c.bias - c.mantissa_bits), min(scale.emax, c.bias)


def _power_of_two(largest, fmt: Scaled, c):
    """Returns the exponent that "floor", "ceil", "rceil" or "even" gives each block."""
    element = fmt.element
    exponent = _rounding.exponent(largest, c)
    # The fraction of the largest magnitude, its leading bit moved to where a normal number has it.
    up = jnp.clip((1 - c.bias) - exponent, 0, c.mantissa_bits).astype(c.uint)
    fraction = (largest << up) & c.uint(2**c.mantissa_bits - 1)
    match fmt.rule:
        case "ceil":
            exponent = exponent + (fraction != 0).astype(c.int)
        case "rceil":
            numerator, _ = element.max.as_integer_ratio()
            place = c.mantissa_bits + 1 - numerator.bit_length()
            significand = numerator << place if place >= 0 else numerator >> -place
            exponent = exponent + (fraction > c.uint(significand - 2**c.mantissa_bits)).astype(c.int)
        case "even":
            kept = element.mantissa_bits if isinstance(element, Float | Fixed) else 0
            if kept < c.mantissa_bits:
                half = 2 ** (c.mantissa_bits - kept - 1)
                exponent = exponent + (fraction >= c.uint(2**c.mantissa_bits - half)).astype(c.int)
    return exponent - element.emax


def _best_scale(view, fmt: Scaled, blocks: Blocks, inner: Mode, words):
    """Returns of the candidates the scale of the least squared error, the first of equals.

    Candidates: for power-of-two scales that of "floor", its double and its half; else 1, 31/32 ... 17/32 of "absmax".
    """
    c = _rounding.carrier(view.dtype)
    largest = _largest(view, blocks)
    if fmt.power_of_two:
        middle = _power_of_two(largest, fmt, c)
        low, high = _exponent_range(fmt.scale, c)
        candidates = [
            _rounding.from_bits(_rounding.compose(jnp.ones_like(middle), jnp.clip(middle + i, low, high), c), c)
            for i in (0, 1, -1)
        ]
    else:
        top = _quotient(largest, fmt.element.max, c)
        candidates = [_nearest_scale(top * c.float(1 - i / 32), fmt) for i in range(16)]
    best, least = candidates[0], None
    for scale in candidates:
        if fmt.power_of_two and isinstance(fmt.element, Float | Fixed):
            value, _ = _shifted(view, scale, inner, words)
        else:
            value, _ = quantize(_divide(view, scale), inner, random=words)
            value = multiply(value, scale)
        error = jnp.sum(jnp.square(value - view), axis=blocks.within, keepdims=True)
        best = scale if least is None else jnp.where(error < least, scale, best)
        least = error if least is None else jnp.minimum(error, least)
    return jnp.where(largest >= c.uint(c.inf), c.float(np.nan), best)


def _quantize_affine(view, fmt: Scaled, inner: Mode, blocks: Blocks, scale, words) -> tuple[Any, Parts]:
    """Returns ``(q - z) s`` with q = clip(round(x / s) + z): integers with a zero point."""
    element, zero_point = fmt.element, fmt.zero_point
    assert isinstance(element, Fixed) and zero_point is not None
    c = _rounding.carrier(view.dtype)
    low = jnp.min(view, axis=blocks.within, keepdims=True, initial=0)
    high = jnp.max(view, axis=blocks.within, keepdims=True, initial=0)
    if scale is None:
        span = _rounding.to_bits(high - low, c)
        scale = _nearest_scale(_quotient(span, element.max, c), fmt)
        scale = jnp.where(span >= c.uint(c.inf), c.float(np.nan), scale)
    else:
        scale = blocks.spread(_nearest_scale(scale, fmt))
    zero = _rounding.round_to(_divide(-low, scale), zero_point, Rounding.NEAREST_EVEN)
    unclipped = Fixed(element.bits + 2, element.fraction_bits)
    steps = _rounding.round_to(_divide(view, scale), unclipped, inner.rounding, random=words)
    codes = jnp.clip(steps + zero, c.float(0), c.float(element.max))
    value = _hold(blocks.join(multiply(codes - zero, scale)), inner.dtype)
    parts = Parts(blocks.join(codes), 0, (scale.reshape(blocks.counts),), (zero.reshape(blocks.counts),))
    return value, parts
