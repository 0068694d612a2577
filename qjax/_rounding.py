"""The rounding core: rounds floats to a ``Float`` or ``Fixed`` format on their bit patterns.

Integer operations touch the data, for XLA flushes subnormals in float arithmetic and compares, and may re-associate
floats; the one sum of floats, in ``_nearest_by_sum``, is proof against both. The same function runs eagerly, under jit
and inside a Pallas body.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qjax._carrier import Carrier, carrier, compose, decompose, from_bits, to_bits
from qjax._elementwise import elementwise
from qjax._grid import Grid, grid_of, numbers_of, numbers_of_blocks
from qjax._modes import Random, Rounding, as_proportional, bump, goes_up, least_up
from qjax.formats import Fixed, Float


def round_to(
    x,
    fmt: Float | Fixed,
    rounding: Rounding,
    *,
    random: Random | None = None,
    saturate: bool = False,
    shift: int | jax.Array = 0,
    least_shift: int = 0,
    spread=lambda block_values: block_values,
    dtype=None,
    may_be_nan: bool = True,
):
    """Returns float32 or float64 ``x`` rounded, once, to the values of ``2^shift fmt`` that ``dtype`` holds.

    Args:
      x: a float32 or float64 array.
      random: the random words of a stochastic mode.
      saturate: overflow, infinities included, gives the largest value.
      shift: exponent of the scale, an int, or an integer array with one for each block; then overflow saturates, and
        an exponent above the carrier's, that of a NaN, gives NaN.
      least_shift: the least that an array of shifts holds, but for those of zeros.
      spread: brings an array with an entry for each block to the shape of x.
      dtype: the dtype whose values the result must be, ``x.dtype`` by default.
      may_be_nan: whether there may be a NaN where the scale is a number.

    The format is seen as the numbers ``k 2^max(e - m, q)``: e the exponent of the number, m the mantissa bits, q the
    exponent of the finest spacing. So the low ``max(carrier's m - m, q - exponent of the lowest bit)`` bits go, in
    place: a carry runs into the exponent, as it should. Below the smallest value there are only 0 and that value.
    """
    c, held = carrier(x.dtype), jnp.finfo(jnp.dtype(dtype or x.dtype))
    grid = grid_of(fmt, rounding, shift, least_shift, held, c)
    at = shift if grid.is_static else numbers_of_blocks(shift, grid, spread, c)
    return elementwise(_round, x, random, grid, at, saturate, may_be_nan)


def _round(x, random: Random | None, grid: Grid, at, saturate: bool, may_be_nan: bool):
    c, fmt, rounding = carrier(x.dtype), grid.fmt, grid.rounding
    grid = dataclasses.replace(grid, at=numbers_of(at, grid, c) if grid.is_static else at)
    bits = to_bits(x, c)
    magnitude, sign = bits & c.uint(c.sign - 1), bits & c.uint(c.sign)
    negative = sign != 0
    pattern = magnitude.astype(c.int)
    hidden = c.int(1 << c.mantissa_bits)
    if grid.wide:
        lowest_field = c.bias + c.mantissa_bits - 1
        normalized = to_bits(pattern.astype(c.float), c).astype(c.int) - c.int(lowest_field << c.mantissa_bits)
        # NaN goes with infinity here, so that it cannot overflow.
        pattern = jnp.where(pattern < hidden, normalized, jnp.minimum(pattern, c.int(c.inf)))
    # In a format whose finest spacing is that of subnormals of the carrier, or that of its first normal numbers, 0 and
    # the smallest value are numbers like the others.
    in_place = grid.is_static and not (grid.wide or grid.coarse(c)) and grid.has_subnormals and grid.mantissa_bits > 0
    if rounding is Rounding.NEAREST_EVEN and _sum_rounds(grid, c):
        rounded, zero, in_place = _nearest_by_sum(pattern, grid, c), pattern <= grid.at.edge, grid.has_subnormals
    elif rounding.is_stochastic:
        rounded, zero = _by_draw(pattern, grid, rounding, random, c)
        in_place = not grid.wide
    else:
        rounded, zero = _by_bits(pattern, grid, rounding, negative, c)
    if grid.wide:
        rounded = jnp.maximum(rounded, grid.at.smallest)
        down = 1 - (rounded >> c.mantissa_bits)
        denormalized = ((rounded & (hidden - 1)) | hidden) >> jnp.clip(down, 0, c.width - 1)
        rounded = jnp.where(down > 0, denormalized, rounded)
    rounded = rounded.astype(c.uint)
    if not (grid.wide or in_place):
        # Compared without a sign, which a NaN may have reached.
        rounded = jnp.maximum(rounded, grid.at.smallest.astype(c.uint))
    if not grid.has_zero or in_place:
        zero = rounded == 0
    if grid.is_static and grid.finest(c) > 2 * c.bias + c.mantissa_bits:
        rounded = jnp.where(magnitude < c.uint(c.inf), rounded, c.uint(c.inf))

    largest, *lowest = (bound.astype(c.uint) for bound in grid.at.bounds)
    if lowest:
        largest = jnp.where(negative, lowest[0], largest)
    if isinstance(fmt, Fixed) and fmt.overflow == "wrap":
        return _wrap(jnp.where(zero, c.uint(0), rounded), negative, fmt, c)
    if isinstance(fmt, Fixed):
        nonzero = ~zero & (magnitude <= c.uint(c.inf)) & (fmt.signed | ~negative)
        if grid.is_void(grid.at.shift if grid.is_static else c.bias):
            nonzero = nonzero & (largest > 0)
        result = jnp.where(nonzero, jnp.minimum(rounded, largest) | sign, c.uint(0))
    else:
        least = c.uint(0)
        if grid.has_zero and not in_place:
            rounded = jnp.where(zero, least, rounded)
        if not grid.has_zero:
            exponent = jnp.asarray(grid.power + grid.at.shift, c.int)
            least = compose(jnp.ones_like(exponent), exponent, c)
            rounded = jnp.maximum(rounded, least)
        nan = magnitude > c.uint(c.inf) if may_be_nan else jnp.zeros_like(negative)
        saturate = saturate or not grid.is_static
        result = _special(rounded, magnitude, sign, least, largest, nan, fmt, rounding, saturate, c)
    if not grid.is_static:
        result = jnp.where(grid.at.bounds[0] == c.nan, c.uint(c.nan), result)
    return from_bits(result, c)


def _by_bits(pattern, grid: Grid, rounding: Rounding, negative, c: Carrier):
    """Returns patterns without the bits that go, after a carry where they go up, and whether they go to 0.

    Of those below the smallest value only whether they go to 0 is right.
    """
    field, most = pattern >> c.mantissa_bits, c.width - grid.fewest(c)
    if grid.least_field == 0 and not grid.wide:
        # The subnormals of the carrier have half the spacing of its first normal numbers.
        most = most + (field == 0).astype(c.int)
    if not (grid.wide or grid.coarse(c)):
        field = jnp.maximum(field, 1)
    stay = jnp.clip(field + grid.at.room, c.width - c.mantissa_bits, most).astype(c.uint)
    mask = (c.uint(2**c.width - 1) >> stay).astype(c.int)
    # Where all bits but the hidden one go, the lowest bit of the exponent stands for it, that is for the parity of the
    # code.
    last = (c.width - stay).astype(c.int) if grid.mantissa_bits > 0 else c.mantissa_bits
    odd = (pattern + (grid.at.parity << c.mantissa_bits)) >> last & 1
    zero = pattern < least_up(rounding, grid.first(c), grid.at.edge, grid.at.smallest, negative)
    return (pattern + bump(rounding, mask, odd, negative)) & ~mask, zero


def _by_draw(pattern, grid: Grid, rounding: Rounding, random: Random | None, c: Carrier):
    """Returns patterns rounded by random words, and whether they go to 0; on wide grids as ``_by_bits`` does."""
    assert random is not None
    rounding, random = as_proportional(rounding, random, c)
    field = pattern >> c.mantissa_bits
    stay, most = field + grid.at.room, c.width - grid.fewest(c)
    above = (c.width - c.mantissa_bits + grid.power - grid.fmt.quantum_exponent) - stay
    # Whether the subnormals of the carrier are too small to count.
    far = grid.coarse(c, by=c.width)
    if grid.wide or far:
        stay = jnp.clip(stay, c.width - c.mantissa_bits, most).astype(c.uint)
    else:
        # Subnormals are taken as twice the number, with an exponent field of 0. Below the smallest value, where this
        # may be negative, it does not matter how many bits stay.
        stay = jnp.minimum(stay.astype(c.uint), c.uint(most)) + (field == 0).astype(c.uint)
    mask = (c.uint(2**c.width - 1) >> stay).astype(c.int)
    if rounding is Rounding.STOCHASTIC:
        added = (random.words >> stay).astype(c.int)
    else:
        fraction = (pattern & mask).astype(c.uint) << stay
        added = jnp.where(goes_up(rounding, fraction, random, c), mask, 0)
    rounded = (pattern + added) & ~mask
    if far and rounding is Rounding.STOCHASTIC and _floats_compare(grid, c):
        zero = _goes_to_zero(pattern, grid.power + grid.at.shift, random.words, c)
        # Compared without a sign, which a NaN may have reached.
        rounded = jnp.maximum(rounded.astype(c.uint), grid.at.smallest.astype(c.uint)).astype(c.int)
        return jnp.where(zero, 0, rounded), zero
    hidden = c.int(1 << c.mantissa_bits)
    significand = (pattern & (hidden - 1)) | hidden
    if grid.wide:
        significand = jnp.where(pattern < grid.first(c), 0, significand)
    else:
        significand = jnp.where(field == 0, pattern << 1, significand)
    if isinstance(grid.fmt, Float) and grid.fmt.subnormals == "normal" and grid.mantissa_bits > 0:
        first_field = grid.fmt.emin + c.bias + grid.at.shift
        fraction = _fraction_of_odd(significand, field, first_field, grid.mantissa_bits, c)
    else:
        fraction = _fraction_of_power(significand, above, rounding is not Rounding.STOCHASTIC, c)
    up, below = goes_up(rounding, fraction, random, c), pattern < grid.at.edge
    if grid.wide:
        return rounded, below & ~up
    rounded = jnp.where(below, jnp.where(up, grid.at.smallest, 0), rounded)
    return rounded, rounded == 0


def _special(
    rounded, magnitude, sign, lowest, largest, nan, fmt: Float, rounding: Rounding, saturate: bool, c: Carrier
):
    """Returns the bits of the result: signs, overflow, infinities, NaN, and negative numbers in unsigned formats.

    Args:
      rounded: the rounded magnitudes, as if the exponent had no upper end; of infinity and NaN, infinity at least.
      magnitude: those of x.
      sign: the sign bits of x.
      lowest: the lowest magnitude of the format, 0 if it has zero.
      largest: the largest one.
      nan: whether x is a NaN.
    """
    inf, negative = c.uint(c.inf), sign != 0
    saturate = saturate or not (fmt.has_inf or fmt.has_nan)
    if saturate:
        result = jnp.minimum(rounded, largest)
    else:
        match rounding:
            case Rounding.TOWARD_ZERO | Rounding.TO_ODD:
                result, over = jnp.minimum(rounded, largest), magnitude >= inf
            case Rounding.TOWARD_POSITIVE | Rounding.TOWARD_NEGATIVE:
                inward = negative if rounding is Rounding.TOWARD_POSITIVE else ~negative
                # Inward, no finite number becomes infinity.
                result, over = jnp.minimum(rounded, largest), rounded > jnp.where(inward, inf - 1, largest)
            case _:
                result, over = rounded, rounded > largest
        if fmt.has_inf:
            result = jnp.where(over, inf, result)
        else:
            nan = over
    if fmt.signed:
        if not fmt.has_negative_zero:
            sign = jnp.where(result == 0, 0, sign)
        result = result | sign
    elif saturate:
        result = jnp.where(negative, lowest, result)
    else:
        # As unsigned numbers, negative ones and NaNs are above infinity.
        outside = (magnitude | sign > inf) & ((result if fmt.has_zero else magnitude) != 0)
        nan = outside if fmt.has_inf else nan | outside
    return jnp.where(nan, c.uint(c.nan) if fmt.has_nan else largest, result)


def _sum_rounds(grid: Grid, c: Carrier) -> bool:
    """Returns whether ``_nearest_by_sum`` may be used for a grid."""
    # TPUs emulate float64, and do not round sums of it as IEEE 754 does.
    if c.width != 32 or not grid.coarse(c):
        return False
    if isinstance(grid.fmt, Float):
        return grid.fmt.mantissa_bits > 0 and grid.field_beyond(c) + grid.fewest(c) <= 2 * c.bias
    return grid.fmt.overflow == "saturate" and grid.field_beyond(c) < grid.finest(c) <= 2 * c.bias


def _nearest_by_sum(pattern, grid: Grid, c: Carrier):
    """Returns patterns rounded to the nearest, ties to even, by one sum of floats.

    The power of two that is added has the spacing of the result for its own, so the hardware rounds as wanted, once.
    What it adds up to is taken apart as an integer: the difference of floats would be the number itself to a compiler
    that re-associates. Subnormals of the carrier, which it may flush, are too small to count.
    """
    pattern = jnp.minimum(pattern, c.int(grid.field_beyond(c) << c.mantissa_bits))
    power = c.int(grid.finest(c) << c.mantissa_bits)
    if isinstance(grid.fmt, Float):
        power = jnp.maximum((pattern & c.int(c.inf)) + c.int(grid.fewest(c) << c.mantissa_bits), power)
    total = to_bits(from_bits(pattern, c) + from_bits(power, c), c).astype(c.int)
    spacing = from_bits(power - c.int(c.mantissa_bits << c.mantissa_bits), c)
    return to_bits((total - power).astype(c.float) * spacing, c).astype(c.int)


def _floats_compare(grid: Grid, c: Carrier) -> bool:
    """Returns whether ``_goes_to_zero`` may be used for a grid on which subnormals of the carrier do not count."""
    is_power = isinstance(grid.fmt, Fixed) or grid.fmt.subnormals != "normal" or grid.mantissa_bits == 0
    # TPUs emulate float64.
    return is_power and c.width == 32 and grid.power + grid.at.shift < c.bias + c.width


def _goes_to_zero(pattern, power: int, words, c: Carrier):
    """Returns whether a number goes to 0, not to ``2^power`` or beyond, by STOCHASTIC with these random words.

    That is whether ``floor(d 2^N) <= t`` with t the complement of the random word. No float lies between t and t
    rounded down to a float, which the hardware does once the bit below the last that stays is zero.
    """
    scaled = jnp.floor(from_bits(pattern, c) * c.float(2.0 ** (c.width - power)))
    complement = ~words
    return scaled <= (complement & ~(complement >> (c.mantissa_bits + 1))).astype(c.float)


def _fraction_of_power(significand, fields, sticky: bool, c: Carrier):
    """Returns x / s as a fraction for 0 <= x < s, a power of two whose exponent field is ``fields`` above that of x.

    If ``sticky``, the lowest bit also says whether lower ones were lost.
    """
    aligned = significand.astype(c.uint) << (c.width - 1 - c.mantissa_bits)
    far = (fields - 1).astype(c.uint)
    fraction = aligned >> far
    return fraction | (fraction << far != aligned).astype(c.uint) if sticky else fraction


def _fraction_of_odd(significand, field, first_field, mantissa_bits: int, c: Carrier):
    """Returns x / s as a fraction for 0 <= x < s = 2^emin (1 + 2^-m), the smallest value of DLFloat16 and its like."""
    scaled = significand.astype(c.uint) << (c.width - 2 - c.mantissa_bits)
    down = jnp.clip(first_field - field, 0, c.width - 1).astype(c.uint)
    quarter = scaled >> down
    divisor = c.uint(2**mantissa_bits + 1)
    part, rest = quarter // divisor, quarter % divisor
    below = quarter - part - (rest != 0).astype(c.uint)
    inexact = (rest != 0) | (quarter << down != scaled)
    return below << 2 | inexact.astype(c.uint)


def _wrap(rounded, negative, fmt: Fixed, c: Carrier):
    """Returns the rounded magnitudes as integers of the format, modulo 2^bits."""
    significand, power = decompose(rounded, c)
    left = power + fmt.fraction_bits
    integer = significand << left.astype(c.uint) | significand >> (-left).astype(c.uint)
    integer = jnp.where(rounded >= c.uint(c.inf), c.uint(0), integer)
    integer = jnp.where(negative, -integer, integer) << (c.width - fmt.bits)
    if fmt.signed:
        integer = integer.astype(c.int) >> (c.width - fmt.bits)
        minus = integer < 0
    else:
        integer = integer >> (c.width - fmt.bits)
        minus = jnp.zeros_like(negative)
    size = jnp.where(minus, -integer, integer).astype(c.uint)
    bits = compose(size, -fmt.fraction_bits, c)
    return from_bits(bits | jnp.where(minus, c.uint(c.sign), c.uint(0)), c)
