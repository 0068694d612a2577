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


def once(block_values):
    """Returns an integer array as it is, computed once a block.

    XLA fuses what it can into the work on every element, through optimization barriers too, but not a reduction.
    """
    pair = lax.broadcasted_iota(block_values.dtype, (*block_values.shape, 2), block_values.ndim)
    return jnp.max(block_values[..., None] - pair, axis=-1)


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
        each = lambda value: value  # noqa: E731
    else:
        each = lambda block_values: spread(once(block_values))  # noqa: E731
        shift = once(shift)
    has_subnormals = not isinstance(fmt, Float) or fmt.subnormals is True
    has_zero = not isinstance(fmt, Float) or fmt.has_zero
    bits = to_bits(x, c)
    magnitude, sign = bits & c.uint(c.sign - 1), bits & c.uint(c.sign)
    negative = sign != 0
    if isinstance(fmt, Float):
        bound = each(_bound(*fmt._split(fmt.max_code), shift, precision, top, c))
    else:
        ends = (fmt.max_integer, -fmt.min_integer)
        bound, lowest = (
            each(_bound(end, fmt.quantum_exponent, shift, precision, top, c, on_grid=True)) for end in ends
        )
        bound = bound if ends[0] == ends[1] else jnp.where(negative, lowest, bound)

    pattern = magnitude.astype(c.int)
    hidden = c.int(1 << c.mantissa_bits)
    finest = fmt.quantum_exponent + shift + c.bias + c.mantissa_bits
    # Subnormals of the carrier are rounded as the integers that they are, while their spacing in the format is one;
    # else they are given exponent fields below 1.
    least_field = fmt.emin + least_shift + c.bias if isinstance(fmt, Float) else 1
    wide = least_field < (0 if has_subnormals or not has_zero else 2)
    if wide:
        lowest_field = c.bias + c.mantissa_bits - 1
        normalized = to_bits(pattern.astype(c.float), c).astype(c.int) - c.int(lowest_field << c.mantissa_bits)
        # NaN goes with infinity here, so that it cannot overflow.
        pattern = jnp.where(pattern < hidden, normalized, jnp.minimum(pattern, c.int(c.inf)))
        first = c.int((1 - c.mantissa_bits) << c.mantissa_bits)
        smallest = _pattern(*_ratio(grain, mantissa_bits), shift, c)
        half = smallest - hidden
    else:
        finest = max(finest, 1) if static else jnp.maximum(finest, 1)
        first = c.int(1)
        smallest = jnp.maximum(_bits(*_ratio(grain, mantissa_bits), shift, c), first)
        half = jnp.where(smallest < 2 * hidden, smallest >> 1, smallest - hidden)
    quantum_field = finest - c.mantissa_bits
    # In a format whose finest spacing is that of subnormals of the carrier, or that of its first normal numbers, 0 and
    # the smallest value are numbers like the others.
    coarse = static and not wide and quantum_field > 1
    in_place = static and not (wide or coarse) and has_subnormals and mantissa_bits > 0
    fewest = c.mantissa_bits - mantissa_bits
    nearest = rounding is Rounding.NEAREST_EVEN
    if nearest and coarse and isinstance(shift, int) and _sum_rounds(fmt, shift, fewest, c):
        rounded, zero = _nearest_by_sum(pattern, fmt, shift, fewest, c), pattern <= half
        in_place = has_subnormals
    else:
        field, finest = pattern >> c.mantissa_bits, each(finest)
        if least_field == 0 and not wide:
            # The subnormals of the carrier have half the spacing of its first normal numbers.
            drop = jnp.maximum(finest - field, fewest) - (field == 0).astype(c.int)
        else:
            normal = field if wide or coarse else jnp.maximum(field, 1)
            drop = jnp.maximum(finest - normal, fewest)
        drop = jnp.minimum(drop, c.mantissa_bits)
        mask = (c.int(1) << drop) - 1
        if not rounding.is_stochastic:
            # Where all bits but the hidden one go, the lowest bit of the exponent stands for it, that is for the parity
            # of the code: it is odd at the finest spacing, or even where the codes of normal numbers start at 0.
            lowest_is_odd = int(not (isinstance(fmt, Float) and fmt.subnormals == "normal"))
            flip = each((quantum_field + lowest_is_odd & 1) << c.mantissa_bits)
            odd = (pattern + flip) >> (drop if mantissa_bits > 0 else c.mantissa_bits) & 1
            bump = _bump(rounding, mask, odd, negative)
            smallest = each(smallest)
            zero = pattern < _least_up(rounding, first, each(half), smallest, negative)
        else:
            assert random is not None
            if rounding in (Rounding.STOCHASTIC, Rounding.STOCHASTIC_B):
                last = 1 << (c.width - 1 - random.bits) if rounding is Rounding.STOCHASTIC_B else 0
                bump = ((random.words | c.uint(last)) >> (c.width - drop).astype(c.uint)).astype(c.int)
            else:
                fraction = (pattern & mask).astype(c.uint) << (c.width - drop).astype(c.uint)
                bump = jnp.where(goes_up(rounding, fraction, random, c), mask, 0)
            significand = (pattern & (hidden - 1)) | hidden
            sticky = rounding in (Rounding.STOCHASTIC_C, Rounding.STOCHASTIC_EQUAL)
            if wide:
                significand = jnp.where(magnitude == 0, 0, significand)
            elif not static or sticky or quantum_field <= c.width:  # else they are too small to count
                significand = jnp.where(field == 0, pattern, significand)
                field = jnp.maximum(field, 1)
            smallest = each(smallest if wide else jnp.where(smallest < 2 * hidden, 0, smallest))
            if isinstance(fmt, Float) and fmt.subnormals == "normal" and mantissa_bits > 0:
                fraction = _fraction_of_odd(significand, field, each(fmt.emin + c.bias + shift), mantissa_bits, c)
            else:
                fraction = _fraction_of_power(significand, (smallest >> c.mantissa_bits) - field, sticky, c)
            zero = (pattern < smallest) & ~goes_up(rounding, fraction, random, c)
        rounded = (pattern + bump) & ~mask
    if wide:
        rounded = jnp.maximum(rounded, smallest)
        down = 1 - (rounded >> c.mantissa_bits)
        denormalized = ((rounded & (hidden - 1)) | hidden) >> jnp.clip(down, 0, c.width - 1)
        rounded = jnp.where(down > 0, denormalized, rounded)
    rounded, largest = rounded.astype(c.uint), bound.astype(c.uint)
    if not (wide or in_place):
        # Compared without a sign, which a NaN may have reached.
        rounded = jnp.maximum(rounded, smallest.astype(c.uint))
    if has_zero and not in_place:
        rounded = jnp.where(zero, c.uint(0), rounded)

    if static and finest > 2 * c.bias + c.mantissa_bits:
        rounded = jnp.where(magnitude < c.uint(c.inf), rounded, c.uint(c.inf))
    if isinstance(fmt, Fixed) and fmt.overflow == "wrap":
        return _wrap(rounded, negative, fmt, c)
    if isinstance(fmt, Fixed):
        result = jnp.minimum(rounded, largest)
        result = jnp.where((result == 0) | (magnitude > c.uint(c.inf)), c.uint(0), result | sign)
    else:
        lowest = c.uint(0)
        if not has_zero:
            exponent = math.frexp(grain)[1] - 1 + shift
            lowest = compose(jnp.ones_like(exponent, c.int), jnp.asarray(exponent, c.int), c)
        result = _special(
            jnp.maximum(rounded, lowest), magnitude, sign, lowest, largest, fmt, rounding, saturate or not static, c
        )
    if not static:
        scale_is_nan = finest - (fmt.quantum_exponent + c.mantissa_bits) > 2 * c.bias
        result = jnp.where(scale_is_nan, c.uint(c.nan), result)
    return from_bits(result, c)


def _special(rounded, magnitude, sign, lowest, largest, fmt: Float, rounding: Rounding, saturate: bool, c: Carrier):
    """Returns the bits of the result: signs, overflow, infinities, NaN, and negative numbers in unsigned formats.

    Args:
      rounded: the rounded magnitudes, as if the exponent had no upper end; of infinity and NaN, infinity at least.
      magnitude: those of x.
      sign: the sign bits of x.
      lowest: the lowest magnitude of the format, 0 if it has zero.
      largest: the largest one.
    """
    inf, negative, nan = c.uint(c.inf), sign != 0, magnitude > c.uint(c.inf)
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
