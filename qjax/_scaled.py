"""Quantization to any format: dispatch on its kind, block scales and their rules."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _carrier, _rounding
from qjax._blocks import Blocks, blocks_of
from qjax._codebook import round_to_codebook
from qjax._elementwise import elementwise
from qjax._grid import once
from qjax._modes import Random, Rounding
from qjax._split import Split, names_of
from qjax.formats import Codebook, Fixed, Float, Format, Rms, Scaled


class Mode(NamedTuple):
    """How to round: everything of a call that is static."""

    fmt: Format
    rounding: Rounding
    axis: int
    saturate: bool
    dtype: Any
    split: Split = ()


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
    value = _rounding.round_to(x, fmt, mode.rounding, random=random, saturate=mode.saturate, dtype=mode.dtype)
    return value, Parts(value)


def multiply(value, scale):
    """Returns ``value * scale`` for scales >= 0, one rounding that XLA cannot contract with a later addition."""
    c = _carrier.carrier(value.dtype)
    bits = _carrier.to_bits(value, c)
    magnitude = _carrier.from_bits(bits & c.uint(c.sign - 1), c)
    product = _carrier.to_bits(_carrier.flush(magnitude * scale), c)
    nan = product > c.uint(c.inf)
    return _carrier.from_bits(jnp.where(nan, c.uint(c.nan), product | bits & c.uint(c.sign)), c)


def _divide(x, scale):
    """Returns ``x / scale`` for scales >= 0, 0 where the scale is 0; subnormals count as zero.

    The sign of x sits in the divisor, which makes it an array of its own: a quotient by a broadcast number is a product
    with the reciprocal to XLA, and so rounded twice.
    """
    c = _carrier.carrier(x.dtype)
    bits = _carrier.to_bits(_carrier.flush(x), c)
    divisor = _carrier.to_bits(jnp.where(scale == 0, c.float(np.inf), scale), c)
    magnitude = _carrier.from_bits(bits & c.uint(c.sign - 1), c)
    return _carrier.flush(_carrier.divide(magnitude, _carrier.from_bits(divisor | bits & c.uint(c.sign), c)))


def _quantize_blocks(x, fmt: Scaled, mode: Mode, scale, random: Random | None) -> tuple[Any, Parts]:
    blocks = blocks_of(fmt, x.shape, mode.axis)
    inner = mode._replace(fmt=fmt.element, saturate=True)
    if fmt.zero_point is not None:
        scale = None if scale is None else _given_scale(scale, fmt, blocks)
        return _quantize_affine(x, fmt, inner, blocks, scale, random)
    # A block with a NaN gets a scale that is NaN.
    may_be_nan = scale is not None or not fmt.scale.has_nan
    scale, shift = _scale_of(x, fmt, inner, blocks, scale, random)
    return _quantize_with(x, scale, fmt, blocks, inner, random, shift, may_be_nan)


def _given_scale(scale, fmt: Scaled, blocks: Blocks):
    return jnp.broadcast_to(_nearest_scale(jnp.abs(scale), fmt), blocks.counts)


def _scale_of(x, fmt: Scaled, inner: Mode, blocks: Blocks, scale, random: Random | None):
    """Returns the scale of each block, the given one in the scale's format or that of the rule, and its exponent.

    The exponent is None where the scale is not made from it.
    """
    if scale is not None:
        return _given_scale(scale, fmt, blocks), None
    largest = _over_devices(_largest(x, blocks), fmt, inner)
    if isinstance(fmt.rule, Rms):
        return _rms_scale(x, largest, fmt, fmt.rule, blocks), None
    if fmt.rule == "mse":
        return _best_scale(x, largest, fmt, blocks, inner, random), None
    return elementwise(_rule, largest, fmt)


def _quantize_with(
    x, scale, fmt: Scaled, blocks: Blocks, inner: Mode, random: Random | None, shift=None, may_be_nan: bool = True
) -> tuple[Any, Parts]:
    """Returns x quantized with the given scale of each block, the exponent of a power of two if it is known."""
    c = _carrier.carrier(x.dtype)
    if fmt.shifts:
        assert isinstance(fmt.element, Float | Fixed)
        if shift is None:
            shift = elementwise(_carrier.exponent, _carrier.to_bits(scale, c), c)
        elements = _rounding.round_to(
            x,
            fmt.element,
            inner.rounding,
            random=random,
            saturate=True,
            shift=shift,
            least_shift=_exponent_range(fmt, c)[0],
            spread=blocks.spread,
            dtype=inner.dtype,
            may_be_nan=may_be_nan,
        )
        stored = jnp.where(blocks.spread(jnp.isnan(scale)), c.float(0), elements)
        return elements, Parts(stored, blocks.spread(shift), (scale,))
    scale = once_per_block(scale)
    spread = blocks.spread(scale)
    value, parts = quantize(_divide(x, spread), inner._replace(dtype=x.dtype), random=random)
    return _hold(multiply(value, spread), inner.dtype), parts._replace(scales=(scale, *parts.scales))


def once_per_block(scale):
    """Returns scales as they are, computed once a block."""
    c = _carrier.carrier(scale.dtype)
    return _carrier.from_bits(once(_carrier.to_bits(scale, c).astype(c.int))[0].astype(c.uint), c)


def _hold(value, dtype):
    """Returns float32 values rounded to nearest in the dtype, still as float32."""
    if value.dtype == dtype:
        return value
    held = jnp.finfo(dtype)
    fmt = Float(held.nexp, held.nmant)
    return _rounding.round_to(value, fmt, Rounding.NEAREST_EVEN)


def _nearest_scale(ratio, fmt: Scaled):
    """Returns the scale next to a ratio, where it divides at least the smallest normal number of the carrier."""
    c = _carrier.carrier(ratio.dtype)
    scale = _rounding.round_to(ratio, fmt.scale, Rounding.NEAREST_EVEN, saturate=True)
    if fmt.shifts or fmt.scale.smallest_subnormal >= 2.0 ** (1 - c.bias):
        return scale
    # As integers, of which the maximum keeps a NaN.
    return _carrier.from_bits(jnp.maximum(_carrier.to_bits(scale, c), c.uint(1 << c.mantissa_bits)), c)


def _largest(x, blocks: Blocks):
    """Returns the bits of the largest magnitude of each block; NaN is above infinity, infinity above all else."""
    c = _carrier.carrier(x.dtype)
    return blocks.maximum(_carrier.to_bits(x, c) & c.uint(c.sign - 1))


def _over_devices(largest, fmt: Scaled, mode: Mode):
    """Returns the largest magnitudes of blocks that span devices, those of the whole."""
    names = ()
    if mode.split and fmt.block in (None, "axis"):
        names = names_of(mode.split) if fmt.block is None else mode.split[mode.axis]
    return lax.pmax(largest, names) if names else largest


def _quotient(magnitude, divisor: float, c):
    """Returns the bits of magnitudes divided by a constant."""
    return _divide(_carrier.from_bits(magnitude, c), jnp.full_like(magnitude, divisor, dtype=c.float))


def _rule(largest, fmt: Scaled):
    """Returns the scale of each block by the rule of the format, and its exponent if it is made from that.

    NaN where the block has a NaN or an infinity.
    """
    c = _carrier.carrier(np.float64 if largest.dtype == np.uint64 else np.float32)
    if fmt.rule in ("absmax", "mse"):
        return _of_finite(largest, _nearest_scale(_quotient(largest, fmt.element.max, c), fmt), fmt, c), None
    scale, exponent = _power_scale(_power_of_two(largest, fmt, c), fmt, c)
    instead = _not_finite(fmt, c)
    of_instead = math.frexp(instead)[1] - 1 if np.isfinite(instead) else c.bias + 1
    shift = jnp.where(largest >= c.uint(c.inf), c.int(of_instead), exponent)
    return _of_finite(largest, scale, fmt, c), shift


def _not_finite(fmt: Scaled, c):
    """Returns the scale of a block that has a NaN or an infinity: NaN, or the largest one."""
    return c.float(np.nan if fmt.scale.has_nan else min(fmt.scale.max, 2.0**c.bias))


def _of_finite(largest, scale, fmt: Scaled, c):
    """Returns the scale of each block, that of blocks with a NaN or an infinity replaced."""
    return jnp.where(largest >= c.uint(c.inf), _not_finite(fmt, c), scale)


def _power_scale(exponent, fmt: Scaled, c):
    """Returns the scale ``2^exponent``, or the nearest one that there is, and its exponent."""
    exponent = jnp.clip(exponent, *_exponent_range(fmt, c))
    return _carrier.from_bits(_carrier.compose(jnp.ones_like(exponent), exponent, c), c), exponent


def _exponent_range(fmt: Scaled, c) -> tuple[int, int]:
    """Returns the exponents of the least and the largest scale, normal numbers of the carrier where they divide."""
    scale = fmt.scale
    lowest = scale.quantum_exponent if scale.subnormals is True else scale.emin
    return max(lowest, 1 - c.bias - (c.mantissa_bits if fmt.shifts else 0)), min(scale.emax, c.bias)


def _rms_scale(x, largest, fmt: Scaled, rule: Rms, blocks: Blocks):
    """Returns the scale of each block from its root mean square."""
    c = _carrier.carrier(x.dtype)
    # In units of the largest magnitude, so that no square leaves the range.
    unit = _carrier.flush(_carrier.from_bits(largest, c))
    squares = blocks.split(jnp.square(_divide(x, blocks.spread(unit))))
    entries = blocks.split(jnp.ones_like(x))
    mean = jnp.sum(squares, axis=blocks.within) / jnp.sum(entries, axis=blocks.within)
    ratio = unit * jnp.sqrt(mean).reshape(blocks.counts) * c.float(rule.clip / fmt.element.max)
    if fmt.power_of_two:
        if rule.log2 == "nearest":
            ratio = ratio * c.float(math.sqrt(2))
        scale, _ = _power_scale(_carrier.exponent(_carrier.to_bits(ratio, c), c), fmt, c)
    else:
        scale = _nearest_scale(ratio, fmt)
    return _of_finite(largest, scale, fmt, c)


def _power_of_two(largest, fmt: Scaled, c):
    """Returns the exponent that "floor", "ceil", "rceil" or "even" gives each block."""
    element = fmt.element
    assert not isinstance(element, Scaled)
    exponent = _carrier.exponent(largest, c)
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


def _best_scale(x, largest, fmt: Scaled, blocks: Blocks, inner: Mode, random: Random | None):
    """Returns of the candidates the scale of the least squared error, the first of equals.

    Candidates: for power-of-two scales that of "floor", its double and its half; else 1, 31/32 ... 17/32 of "absmax".
    """
    c = _carrier.carrier(x.dtype)
    if fmt.power_of_two:
        middle = _power_of_two(largest, fmt, c)
        candidates = [_power_scale(middle + i, fmt, c)[0] for i in (0, 1, -1)]
    else:
        top = _quotient(largest, fmt.element.max, c)
        candidates = [_nearest_scale(top * c.float(1 - i / 32), fmt) for i in range(16)]
    best, least = candidates[0], None
    for scale in candidates:
        value, _ = _quantize_with(x, scale, fmt, blocks, inner, random)
        error = jnp.sum(blocks.split(jnp.square(value - x)), axis=blocks.within).reshape(blocks.counts)
        best = scale if least is None else jnp.where(error < least, scale, best)
        least = error if least is None else jnp.minimum(error, least)
    return jnp.where(largest >= c.uint(c.inf), c.float(np.nan), best)


def _quantize_affine(x, fmt: Scaled, inner: Mode, blocks: Blocks, scale, random: Random | None) -> tuple[Any, Parts]:
    """Returns ``(q - z) s`` with q = clip(round(x / s) + z): integers with a zero point."""
    element, zero_point = fmt.element, fmt.zero_point
    assert isinstance(element, Fixed) and zero_point is not None
    c = _carrier.carrier(x.dtype)
    bits = _carrier.to_bits(x, c)
    negative, magnitude = bits >= c.uint(c.sign), bits & c.uint(c.sign - 1)
    # Integers keep a NaN, which XLA's maximum of floats may lose.
    sides = (blocks.maximum(jnp.where(side, magnitude, 0)) for side in (negative, ~negative))
    below, above = (_carrier.flush(_carrier.from_bits(_over_devices(side, fmt, inner), c)) for side in sides)
    if scale is None:
        span = _carrier.to_bits(above + below, c)
        scale = _nearest_scale(_quotient(span, element.max, c), fmt)
        scale = jnp.where(span >= c.uint(c.inf), c.float(np.nan), scale)
    zero = _rounding.round_to(_divide(below, scale), zero_point, Rounding.NEAREST_EVEN)
    unclipped = Fixed(element.bits + 2, element.fraction_bits)
    steps = _rounding.round_to(_divide(x, blocks.spread(scale)), unclipped, inner.rounding, random=random)
    zeros = blocks.spread(zero)
    codes = jnp.clip(steps + zeros, c.float(0), c.float(element.max))
    value = _hold(multiply(codes - zeros, blocks.spread(scale)), inner.dtype)
    return value, Parts(codes, 0, (scale,), (zero,))


def quantize_apart(x, mode: Mode, *, scale=None, random: Random | None = None) -> tuple[Any, Any]:
    """Returns x rounded to a ``Scaled`` format as (elements, scale of each block), not yet multiplied.

    The elements are values of the element format, its own scales within, the zero point taken off.
    """
    fmt = mode.fmt
    assert isinstance(fmt, Scaled)
    blocks = blocks_of(fmt, x.shape, mode.axis)
    if fmt.zero_point is not None:
        _, parts = quantize(x, mode, scale=scale, random=random)
        return parts.elements - blocks.spread(parts.zero_points[0]), parts.scales[0]
    if fmt.shifts:
        _, parts = quantize(x, mode, scale=scale, random=random)
        return _unshifted(parts.elements, parts.shift), parts.scales[0]
    inner = mode._replace(fmt=fmt.element, saturate=True)
    scale = once_per_block(_scale_of(x, fmt, inner, blocks, scale, random)[0])
    elements, _ = quantize(_divide(x, blocks.spread(scale)), inner._replace(dtype=x.dtype), random=random)
    return elements, scale


def _unshifted(x, shift):
    """Returns ``x 2^-shift``, exact where x is ``2^shift`` times a normal number."""
    c = _carrier.carrier(x.dtype)
    bits = _carrier.to_bits(x, c)
    integer, power = _carrier.decompose(bits & c.uint(c.sign - 1), c)
    return _carrier.from_bits(_carrier.compose(integer, power - shift, c) | bits & c.uint(c.sign), c)
