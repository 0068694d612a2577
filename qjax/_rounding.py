"""The rounding core: rounds floats to a ``Float`` or ``Fixed`` format on their bit patterns.

Integer operations touch the data, for XLA flushes subnormals in float arithmetic and compares, and may re-associate
floats; the one sum of floats, in ``_nearest_by_sum``, is proof against both. The same function runs eagerly, under jit
and inside a Pallas body.
"""

import dataclasses
import enum
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._carrier import Carrier, carrier, compose, decompose, from_bits, static_bits, to_bits
from qjax.formats import Fixed, Float


@jax.tree_util.register_static
class Rounding(enum.Enum):
    """A rounding mode. Wherever one is taken, its lower-case name is too.

    With d in [0, 1) the distance of the magnitude from the neighbour nearer to zero, in units of the spacing:

    - NEAREST_EVEN, NEAREST_AWAY, NEAREST_ZERO, NEAREST_ODD: the nearer neighbour; at d = 1/2 the one with the even
      code, the larger, the smaller, the one with the odd code;
    - TOWARD_ZERO, TOWARD_POSITIVE, TOWARD_NEGATIVE: directed;
    - TO_ODD: if not exact, the neighbour with the odd code;
    - STOCHASTIC, STOCHASTIC_B, STOCHASTIC_C: away from zero if ``floor(d 2^N) + R >= 2^N``,
      ``floor(d 2^(N+1)) + 2 R + 1 >= 2^(N+1)`` or ``nearest_even(d 2^N) + R >= 2^N``, with R of N random bits;
    - STOCHASTIC_EQUAL: if not exact, either neighbour with probability 1/2.

    >>> import qjax
    >>> qjax.Rounding("stochastic").is_stochastic
    True

    Sources: IEEE 754-2019, section 4.3; IEEE P3109 interim report (StochasticA, B and C, ToOdd); Croci et al. (2022),
    Stochastic rounding, https://doi.org/10.1098/rsos.211631; Boldo and Melquiond (2008), Emulation of FMA and
    correctly rounded sums (to odd).
    """

    NEAREST_EVEN = "nearest_even"
    NEAREST_AWAY = "nearest_away"
    NEAREST_ZERO = "nearest_zero"
    NEAREST_ODD = "nearest_odd"
    TOWARD_ZERO = "toward_zero"
    TOWARD_POSITIVE = "toward_positive"
    TOWARD_NEGATIVE = "toward_negative"
    TO_ODD = "to_odd"
    STOCHASTIC = "stochastic"
    STOCHASTIC_B = "stochastic_b"
    STOCHASTIC_C = "stochastic_c"
    STOCHASTIC_EQUAL = "stochastic_equal"

    @property
    def is_stochastic(self) -> bool:
        """Whether it draws random bits."""
        return self.value.startswith("stochastic")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["bits"])
@dataclasses.dataclass(frozen=True)
class Random:
    """Random words, one an element, of which the upper ``bits`` bits count; the lower ones are zero."""

    words: jax.Array
    bits: int


def _bump(rounding: Rounding, mask, odd, negative):
    """Returns what to add to a magnitude, whose bits of ``mask`` go, so that a carry leaves them where it goes up.

    Args:
      mask: the bits that go, ones from the lowest on; 0 if none does.
      odd: whether the last bit that stays is one, 0 or 1.
      negative: whether the number is negative.
    """
    match rounding:
        case Rounding.NEAREST_EVEN:
            return (mask + odd) >> 1
        case Rounding.NEAREST_ODD:
            return (mask + (odd ^ 1)) >> 1
        case Rounding.NEAREST_AWAY:
            return (mask + 1) >> 1
        case Rounding.NEAREST_ZERO:
            return mask >> 1
        case Rounding.TOWARD_ZERO:
            return 0
        case Rounding.TOWARD_POSITIVE:
            return jnp.where(negative, 0, mask)
        case Rounding.TOWARD_NEGATIVE:
            return jnp.where(negative, mask, 0)
        case Rounding.TO_ODD:
            return mask & (odd - 1)
    raise AssertionError(rounding)


def _least_up(rounding: Rounding, first, half, smallest, negative):
    """Returns the least pattern that does not go to 0.

    Args:
      first: the pattern of the first number above 0.
      half: that of half the smallest value.
      smallest: that of the smallest value.
      negative: whether the number is negative.
    """
    match rounding:
        case Rounding.NEAREST_EVEN | Rounding.NEAREST_ZERO:
            return half + 1
        case Rounding.NEAREST_AWAY | Rounding.NEAREST_ODD:
            return jnp.maximum(half, first)
        case Rounding.TOWARD_ZERO:
            return smallest
        case Rounding.TOWARD_POSITIVE:
            return jnp.where(negative, smallest, first)
        case Rounding.TOWARD_NEGATIVE:
            return jnp.where(negative, first, smallest)
        case Rounding.TO_ODD:
            return first
    raise AssertionError(rounding)


def goes_up(rounding: Rounding, fraction, random: Random, c: Carrier):
    """Returns whether a stochastic mode goes to the neighbour away from zero.

    Args:
      fraction: the distance from the neighbour nearer to zero as an unsigned fixed-point fraction of the spacing, the
        binary point at the left; inexact values have a nonzero one.
      random: the random words.
    """
    words, bits = random.words, random.bits
    match rounding:
        case Rounding.STOCHASTIC:
            return fraction + words < fraction
        case Rounding.STOCHASTIC_B:
            return fraction + (words | c.uint(1 << (c.width - 1 - bits))) < fraction
        case Rounding.STOCHASTIC_C:
            kept = fraction >> (c.width - bits)
            kept = kept + (fraction << bits > c.uint(c.sign) - (kept & 1)).astype(c.uint)
            return kept + (words >> (c.width - bits)) >= c.uint(1 << bits)
        case Rounding.STOCHASTIC_EQUAL:
            return (fraction != 0) & (words >= c.uint(c.sign))
    raise AssertionError(rounding)


def once(*block_values):
    """Returns integer arrays of one shape and dtype as they are, computed once a block.

    XLA fuses what it can into the work on every element, through optimization barriers too, but not a reduction.
    """
    first = block_values[0]
    pair = lax.broadcasted_iota(first.dtype, (*first.shape, 2), first.ndim)
    least = np.array(jnp.iinfo(first.dtype).min, first.dtype)
    return lax.reduce(
        [values[..., None] - pair for values in block_values],
        [least] * len(block_values),
        lambda left, right: tuple(map(lax.max, left, right)),
        (first.ndim,),
    )


def _spread_once(spread, *block_values):
    """Returns arrays computed once a block and spread over its elements; other values as they are."""
    values = iter(once(*(value for value in block_values if isinstance(value, jax.Array))))
    return [spread(next(values)) if isinstance(value, jax.Array) else value for value in block_values]


def max_random_bits(rounding: Rounding, width: int) -> int:
    """Returns how many random bits a mode can use on words of ``width`` bits."""
    return width if rounding in (Rounding.STOCHASTIC, Rounding.STOCHASTIC_EQUAL) else width - 2


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
    c = carrier(x.dtype)
    held = jnp.finfo(dtype or x.dtype)
    static = isinstance(shift, int)
    mantissa_bits = min(fmt.mantissa_bits, held.nmant) if isinstance(fmt, Float) else held.nmant
    precision, top = mantissa_bits + 1, held.maxexp - 1
    grain = fmt.smallest_subnormal if isinstance(fmt, Float) else fmt.eps
    if static:
        grain, least_shift = max(grain, float(held.smallest_subnormal)), shift
    power = math.frexp(grain)[1] - 1
    has_subnormals = not isinstance(fmt, Float) or fmt.subnormals is True
    has_zero = not isinstance(fmt, Float) or fmt.has_zero
    hidden = c.int(1 << c.mantissa_bits)
    finest = fmt.quantum_exponent + shift + c.bias + c.mantissa_bits
    # Subnormals of the carrier are rounded as the integers that they are, while their spacing in the format is one;
    # else they are given exponent fields below 1.
    least_field = fmt.emin + least_shift + c.bias if isinstance(fmt, Float) else 1
    wide = least_field < (0 if has_subnormals or not has_zero else 2)
    if wide:
        first = c.int((1 - c.mantissa_bits) << c.mantissa_bits)
        smallest = _pattern(*_ratio(grain, mantissa_bits), shift, c)
        edge = smallest if rounding.is_stochastic else smallest - hidden
    else:
        finest = max(finest, 1) if static else jnp.maximum(finest, 1)
        first = c.int(1)
        smallest = jnp.maximum(_bits(*_ratio(grain, mantissa_bits), shift, c), first)
        if rounding.is_stochastic:
            edge = jnp.where(smallest < 2 * hidden, 0, smallest)
        else:
            edge = jnp.where(smallest < 2 * hidden, smallest >> 1, smallest - hidden)
    ends = [fmt._split(fmt.max_code)] if isinstance(fmt, Float) else []
    if isinstance(fmt, Fixed):
        ends = [(end, fmt.quantum_exponent) for end in dict.fromkeys((fmt.max_integer, -fmt.min_integer))]
    bounds = [_bound(*end, shift, precision, top, c, on_grid=isinstance(fmt, Fixed)) for end in ends]
    room, parity = c.width - finest, finest - c.mantissa_bits + 1 & 1
    if isinstance(fmt, Float) and fmt.subnormals == "normal":
        parity = parity ^ 1
    if not static:
        if rounding not in (Rounding.NEAREST_EVEN, Rounding.NEAREST_ODD, Rounding.TO_ODD):
            parity = 0
        shift = None if has_zero and has_subnormals else shift
        room, smallest, edge, parity, shift, *bounds = _spread_once(
            spread, room, smallest, edge, parity, shift, *bounds
        )

    bits = to_bits(x, c)
    magnitude, sign = bits & c.uint(c.sign - 1), bits & c.uint(c.sign)
    negative = sign != 0
    pattern = magnitude.astype(c.int)
    if wide:
        lowest_field = c.bias + c.mantissa_bits - 1
        normalized = to_bits(pattern.astype(c.float), c).astype(c.int) - c.int(lowest_field << c.mantissa_bits)
        # NaN goes with infinity here, so that it cannot overflow.
        pattern = jnp.where(pattern < hidden, normalized, jnp.minimum(pattern, c.int(c.inf)))
    # In a format whose finest spacing is that of subnormals of the carrier, or that of its first normal numbers, 0 and
    # the smallest value are numbers like the others.
    coarse = static and not wide and finest - c.mantissa_bits > 1
    in_place = static and not (wide or coarse) and has_subnormals and mantissa_bits > 0
    fewest = c.mantissa_bits - mantissa_bits
    if static and isinstance(fmt, Fixed) and fmt.overflow == "saturate":
        fewest = min(max(finest + 1 - _field_beyond(fmt, shift, c), 0), c.mantissa_bits)  # what is larger saturates
    nearest = rounding is Rounding.NEAREST_EVEN
    if nearest and coarse and isinstance(shift, int) and _sum_rounds(fmt, shift, fewest, c):
        rounded, zero = _nearest_by_sum(pattern, fmt, shift, fewest, c), pattern <= edge
        in_place = has_subnormals
    else:
        field = pattern >> c.mantissa_bits
        # Whether the subnormals of the carrier are too small to count, for a stochastic mode too.
        far = coarse and finest - c.mantissa_bits > c.width
        normal = field if wide or far else jnp.maximum(field, 1)
        stay, most = normal + room, c.width - fewest
        if least_field == 0 and not wide:
            # The subnormals of the carrier have half the spacing of its first normal numbers.
            most = most + (field == 0).astype(c.int)
        above = (c.width - c.mantissa_bits + power - fmt.quantum_exponent) - stay
        stay = jnp.clip(stay, c.width - c.mantissa_bits, most).astype(c.uint)
        mask = (c.uint(2**c.width - 1) >> stay).astype(c.int)
        if not rounding.is_stochastic:
            # Where all bits but the hidden one go, the lowest bit of the exponent stands for it, that is for the parity
            # of the code: it is odd at the finest spacing, or even where the codes of normal numbers start at 0.
            last = (c.width - stay).astype(c.int) if mantissa_bits > 0 else c.mantissa_bits
            odd = (pattern + (parity << c.mantissa_bits)) >> last & 1
            bump = _bump(rounding, mask, odd, negative)
            zero = pattern < _least_up(rounding, first, edge, smallest, negative)
        else:
            assert random is not None
            words = random.words
            if rounding is Rounding.STOCHASTIC_B:
                words = words | c.uint(1 << (c.width - 1 - random.bits))
            if rounding in (Rounding.STOCHASTIC, Rounding.STOCHASTIC_B):
                bump = (words >> stay).astype(c.int)
            else:
                fraction = (pattern & mask).astype(c.uint) << stay
                bump = jnp.where(goes_up(rounding, fraction, random, c), mask, 0)
            significand = (pattern & (hidden - 1)) | hidden
            sticky = rounding in (Rounding.STOCHASTIC_C, Rounding.STOCHASTIC_EQUAL)
            if wide:
                significand = jnp.where(magnitude == 0, 0, significand)
            elif sticky or not far:
                significand = jnp.where(field == 0, pattern, significand)
            if isinstance(fmt, Float) and fmt.subnormals == "normal" and mantissa_bits > 0:
                fraction = _fraction_of_odd(significand, normal, fmt.emin + c.bias + shift, mantissa_bits, c)
                zero = (pattern < edge) & ~goes_up(rounding, fraction, random, c)
            elif far and not sticky and _floats_compare(power + shift, c):
                zero = _goes_to_zero(pattern, power + shift, words, c)
            else:
                fraction = _fraction_of_power(significand, above, sticky, c)
                zero = (pattern < edge) & ~goes_up(rounding, fraction, random, c)
        rounded = (pattern + bump) & ~mask
    if wide:
        rounded = jnp.maximum(rounded, smallest)
        down = 1 - (rounded >> c.mantissa_bits)
        denormalized = ((rounded & (hidden - 1)) | hidden) >> jnp.clip(down, 0, c.width - 1)
        rounded = jnp.where(down > 0, denormalized, rounded)
    rounded, largest = rounded.astype(c.uint), bounds[0].astype(c.uint)
    if len(bounds) > 1:
        largest = jnp.where(negative, bounds[1].astype(c.uint), largest)
    if not (wide or in_place):
        # Compared without a sign, which a NaN may have reached.
        rounded = jnp.maximum(rounded, smallest.astype(c.uint))
    if not has_zero or in_place:
        zero = rounded == 0

    if static and finest > 2 * c.bias + c.mantissa_bits:
        rounded = jnp.where(magnitude < c.uint(c.inf), rounded, c.uint(c.inf))
    if isinstance(fmt, Fixed) and fmt.overflow == "wrap":
        return _wrap(jnp.where(zero, c.uint(0), rounded), negative, fmt, c)
    if isinstance(fmt, Fixed):
        nonzero = ~zero & (magnitude <= c.uint(c.inf)) & (fmt.signed | ~negative)
        result = jnp.where(nonzero, jnp.minimum(rounded, largest) | sign, c.uint(0))
    else:
        rounded = jnp.where(zero, c.uint(0), rounded)
        lowest = c.uint(0)
        if not has_zero:
            exponent = power + shift
            lowest = compose(jnp.ones_like(exponent, c.int), jnp.asarray(exponent, c.int), c)
        result = _special(
            jnp.maximum(rounded, lowest),
            magnitude,
            sign,
            lowest,
            largest,
            (magnitude > c.uint(c.inf)) & may_be_nan,
            fmt,
            rounding,
            saturate or not static,
            c,
        )
    if not static:
        scale_is_nan = c.width - room - (fmt.quantum_exponent + c.mantissa_bits) > 2 * c.bias
        result = jnp.where(scale_is_nan, c.uint(c.nan), result)
    return from_bits(result, c)


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
        nan = nan | negative & ((result if fmt.has_zero else magnitude) != 0)
    return jnp.where(nan, c.uint(c.nan) if fmt.has_nan else largest, result)


def _field_beyond(fmt: Float | Fixed, shift: int, c: Carrier) -> int:
    """Returns the exponent field of the first power of two above all values."""
    return max(math.frexp(fmt.max)[1], math.frexp(-fmt.min)[1]) + shift + c.bias


def _sum_rounds(fmt: Float | Fixed, shift: int, fewest: int, c: Carrier) -> bool:
    """Returns whether ``_nearest_by_sum`` may be used for a format whose spacings are normal numbers of the carrier."""
    beyond = _field_beyond(fmt, shift, c)
    if c.width != 32:  # TPUs emulate float64, and do not round sums of it as IEEE 754 does
        return False
    if isinstance(fmt, Float):
        return fmt.mantissa_bits > 0 and beyond + fewest <= 2 * c.bias
    spacing_field = -fmt.fraction_bits + shift + c.bias
    return fmt.overflow == "saturate" and beyond < spacing_field + c.mantissa_bits <= 2 * c.bias


def _nearest_by_sum(pattern, fmt: Float | Fixed, shift: int, fewest: int, c: Carrier):
    """Returns magnitudes rounded to the nearest, ties to even, by one sum of floats.

    The power of two that is added has the spacing of the result for its own, so the hardware rounds as wanted, once.
    What it adds up to is taken apart as an integer: the difference of floats would be the number itself to a compiler
    that re-associates. Subnormals of the carrier, which it may flush, are too small to count.
    """
    pattern = jnp.minimum(pattern, c.int(_field_beyond(fmt, shift, c) << c.mantissa_bits))
    power = c.int(fmt.quantum_exponent + shift + c.bias + c.mantissa_bits << c.mantissa_bits)
    if isinstance(fmt, Float):
        power = jnp.maximum((pattern & c.int(c.inf)) + c.int(fewest << c.mantissa_bits), power)
    total = to_bits(from_bits(pattern, c) + from_bits(power, c), c).astype(c.int)
    spacing = from_bits(power - c.int(c.mantissa_bits << c.mantissa_bits), c)
    return to_bits((total - power).astype(c.float) * spacing, c).astype(c.int)


def _floats_compare(power: int, c: Carrier) -> bool:
    """Returns whether ``_goes_to_zero`` may be used where the smallest value is ``2^power``."""
    return c.width == 32 and 1 - c.bias <= c.width - power <= c.bias  # TPUs emulate float64


def _goes_to_zero(pattern, power: int, words, c: Carrier):
    """Returns whether a number goes to 0, not to ``2^power`` or beyond, by STOCHASTIC with these random words.

    That is whether ``floor(d 2^N) <= t`` with t the complement of the random word. No float lies between t and t
    rounded down to a float, which the hardware does once the bit below the last that stays is zero.
    """
    scaled = jnp.floor(from_bits(pattern, c) * c.float(2.0 ** (c.width - power)))
    complement = ~words
    return scaled <= (complement & ~(complement >> (c.mantissa_bits + 1))).astype(c.float)


def _ratio(value: float, mantissa_bits: int) -> tuple[int, int]:
    """Returns (k, q) with value = k 2^q; a k of more than one bit is rounded up to mantissa_bits + 1 bits."""
    numerator, denominator = value.as_integer_ratio()
    trailing = (numerator & -numerator).bit_length() - 1
    k, q = numerator >> trailing, trailing - (denominator.bit_length() - 1)
    drop = max(k.bit_length() - 1 - mantissa_bits, 0)
    return -(-k >> drop), q + drop


def _bound(value: int, power: int, shift, precision: int, top: int, c: Carrier, on_grid: bool = False):
    """Returns the largest number up to ``value 2^(power + shift)`` of ``precision`` bits and exponent up to top.

    If ``on_grid``, it is a multiple of ``2^(power + shift)``.
    """
    ceiling = c.int(static_bits(2**precision - 1, top - precision + 1, c))
    if on_grid:
        finer = jnp.clip(power + shift - (top - c.mantissa_bits), 0, c.mantissa_bits).astype(c.int)
        ceiling = ceiling >> finer << finer
    drop = max(value.bit_length() - precision, 0)
    return jnp.minimum(_bits(value >> drop, power + drop, shift, c), ceiling)


def _bits(k: int, q: int, shift, c: Carrier):
    """Returns the bits of ``k 2^(q + shift)``, cut where the carrier's spacing is coarser."""
    if isinstance(shift, int):
        return c.int(static_bits(k, q + shift, c))
    return compose(jnp.full_like(shift, k), q + shift, c).astype(c.int)


def _pattern(k: int, q: int, shift, c: Carrier):
    """Returns the bits of ``k 2^(q + shift)``, with an exponent field below 1 where the carrier has subnormals."""
    length = max(k.bit_length() - 1, 0)
    # Beyond these fields there is no number to compare with.
    least, most = -(c.bias + c.mantissa_bits), 2 * c.bias + 1
    field = q + length + c.bias + shift if k else least
    if q + length <= -c.bias // 2:
        field = jnp.maximum(field, least)
    elif q + length > 0:
        field = jnp.minimum(field, most)
    field = jnp.asarray(field, c.int)
    return (field << c.mantissa_bits) + c.int((k << (c.mantissa_bits - length)) & (2**c.mantissa_bits - 1))


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
