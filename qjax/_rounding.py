"""The rounding core: rounds floats to a ``Float`` or ``Fixed`` format on their bit patterns.

Only integer operations touch the data, for XLA flushes subnormals in float arithmetic and compares, and may
re-associate floats. The same function runs eagerly, under jit and inside a Pallas body.
"""

import dataclasses
import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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


class Carrier(NamedTuple):
    """What the core knows of the dtype whose bit patterns it works on."""

    mantissa_bits: int
    bias: int
    width: int

    @property
    def inf(self) -> int:
        return (2 * self.bias + 1) << self.mantissa_bits

    @property
    def nan(self) -> int:
        return self.inf | 1 << (self.mantissa_bits - 1)

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def uint(self) -> type:
        return np.uint64 if self.width == 64 else np.uint32

    @property
    def int(self) -> type:
        return np.int64 if self.width == 64 else np.int32

    @property
    def float(self) -> type:
        return np.float64 if self.width == 64 else np.float32


def carrier(dtype) -> Carrier:
    """Returns the carrier of float32 or float64."""
    return Carrier(52, 1023, 64) if dtype == jnp.float64 else Carrier(23, 127, 32)


def to_bits(x, c: Carrier):
    return lax.bitcast_convert_type(x, c.uint)


def from_bits(bits, c: Carrier):
    return lax.bitcast_convert_type(bits, c.float)


def widen(x):
    """Returns a bfloat16 or float16 array as float32, subnormals included; other arrays as they are."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def narrow(x, dtype):
    """Returns float32 values that ``dtype`` holds exactly as that dtype."""
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type((lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.uint16), dtype)
    return x.astype(dtype)


def flush(x):
    """Returns x with subnormals as zeros of their sign: what XLA's arithmetic does on some backends, on all of them."""
    c = carrier(x.dtype)
    bits = to_bits(x, c)
    normal = (bits & c.uint(c.sign - 1)) >= c.uint(1 << c.mantissa_bits)
    return from_bits(jnp.where(normal, bits, bits & c.uint(c.sign)), c)


def exponent(magnitude, c: Carrier):
    """Returns ``floor(log2)`` of the value of positive magnitude bits, subnormals included; far below them for 0."""
    field = (magnitude >> c.mantissa_bits).astype(c.int)
    # An integer below 2^mantissa_bits converts exactly, so its exponent field is its leading bit.
    as_float = to_bits(magnitude.astype(c.int).astype(c.float), c)
    leading = (as_float >> c.mantissa_bits).astype(c.int) - c.bias
    return jnp.where(field > 0, field - c.bias, leading + (1 - c.bias - c.mantissa_bits))


def compose(integer, power, c: Carrier):
    """Returns the bits of ``integer 2^power``, exact if the carrier holds it; infinity above its range."""
    as_float = to_bits(integer.astype(c.float), c)
    field = (as_float >> c.mantissa_bits).astype(c.int) + power
    fraction = as_float & c.uint(2**c.mantissa_bits - 1)
    normal = field.astype(c.uint) << c.mantissa_bits | fraction
    normal = jnp.where(field > 2 * c.bias, c.uint(c.inf), normal)
    down = jnp.clip(1 - field, 0, c.width - 1).astype(c.uint)
    subnormal = (fraction | c.uint(2**c.mantissa_bits)) >> down
    return jnp.where(integer == 0, c.uint(0), jnp.where(field > 0, normal, subnormal))


def _static_bits(value: int, power: int, c: Carrier) -> int:
    """Returns the bits of ``value 2^power`` with value of at most the carrier's precision, rounded toward zero."""
    if value == 0:
        return 0
    field = value.bit_length() - 1 + power + c.bias
    if field > 2 * c.bias:
        return c.inf - 1
    place = power + c.bias - 1 + c.mantissa_bits
    if field > 0:
        shift = c.mantissa_bits + 1 - value.bit_length()
        return (field << c.mantissa_bits) + (value << shift) - (1 << c.mantissa_bits)
    return value << place if place >= 0 else value >> -place


def _bits_of(value: int, power: int, shift, c: Carrier):
    """Returns the bits of ``value 2^(power + shift)``."""
    if isinstance(shift, int):
        return c.uint(_static_bits(value, power + shift, c))
    return jnp.minimum(compose(jnp.full_like(shift, value), power + shift, c), c.uint(c.inf - 1))


def _round_up(rounding: Rounding, fraction, odd, negative, random: Random | None, c: Carrier):
    """Returns whether the magnitude goes to the neighbour away from zero.

    Args:
      fraction: the distance from the neighbour nearer to zero as an unsigned fixed-point fraction of the spacing, the
        binary point at the left; inexact values have a nonzero one.
      odd: whether the code of that neighbour is odd, 0 or 1.
      negative: whether the value is negative.
    """
    half = c.uint(c.sign)
    match rounding:
        case Rounding.NEAREST_EVEN:
            return fraction > half - odd
        case Rounding.NEAREST_ODD:
            return fraction >= half + odd
        case Rounding.NEAREST_AWAY:
            return fraction >= half
        case Rounding.NEAREST_ZERO:
            return fraction > half
        case Rounding.TOWARD_ZERO:
            return jnp.zeros_like(fraction, dtype=bool)
        case Rounding.TOWARD_POSITIVE:
            return (fraction != 0) & ~negative
        case Rounding.TOWARD_NEGATIVE:
            return (fraction != 0) & negative
        case Rounding.TO_ODD:
            return (fraction != 0) & (odd == 0)
    assert random is not None
    words, bits = random.words, random.bits
    match rounding:
        case Rounding.STOCHASTIC:
            return fraction + words < fraction
        case Rounding.STOCHASTIC_B:
            return fraction + (words | c.uint(1 << (c.width - 1 - bits))) < fraction
        case Rounding.STOCHASTIC_C:
            kept = fraction >> (c.width - bits)
            kept = kept + (fraction << bits > half - (kept & 1)).astype(c.uint)
            return kept + (words >> (c.width - bits)) >= c.uint(1 << bits)
        case Rounding.STOCHASTIC_EQUAL:
            return (fraction != 0) & (words >= half)


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
    spread=lambda block_values: block_values,
    dtype=None,
):
    """Returns float32 or float64 ``x`` rounded, once, to the values of ``2^shift fmt`` that ``dtype`` holds.

    Args:
      x: a float32 or float64 array.
      random: the random words of a stochastic mode.
      saturate: overflow, infinities included, gives the largest value.
      shift: exponent of the scale, an int, or an integer array with one for each block.
      spread: brings an array with an entry for each block to the shape of x.
      dtype: the dtype whose values the result must be, ``x.dtype`` by default.

    The format is seen as the numbers ``k 2^max(e - m, q)``: e the exponent of the number, m the mantissa bits, q the
    exponent of the finest spacing. So ``drop`` low bits of the significand go, ``max(carrier's m - m, q - unit)``.
    """
    c = carrier(x.dtype)
    held = jnp.finfo(dtype or x.dtype)
    mantissa_bits = min(fmt.mantissa_bits, held.nmant) if isinstance(fmt, Float) else held.nmant
    static = isinstance(shift, int)
    grain = fmt.smallest_subnormal if isinstance(fmt, Float) else fmt.eps
    if static:
        grain = max(grain, float(held.smallest_subnormal))
    precision, top = mantissa_bits + 1, held.maxexp - 1
    smallest = _bits_of(*_ratio(grain, mantissa_bits), shift, c)
    if isinstance(fmt, Float):
        largest = lowest = _limit(*fmt._split(fmt.max_code), shift, precision, top, c)
    else:
        largest, lowest = (
            _limit(integer, fmt.quantum_exponent, shift, precision, top, c, grid=fmt.quantum_exponent + shift)
            for integer in (fmt.max_integer, -fmt.min_integer)
        )
    if not static:
        # The barrier makes XLA compute these once a block; it would fuse them into the work on every element.
        shift, smallest, largest, lowest = map(spread, lax.optimization_barrier((shift, smallest, largest, lowest)))

    bits = to_bits(x, c)
    magnitude = bits & c.uint(c.sign - 1)
    sign = bits & c.uint(c.sign)
    negative = sign != 0

    field = (magnitude >> c.mantissa_bits).astype(c.int)
    subnormal = field == 0
    significand = jnp.where(
        subnormal, magnitude, magnitude & c.uint(2**c.mantissa_bits - 1) | c.uint(2**c.mantissa_bits)
    )
    field = jnp.maximum(field, 1)
    place = c.bias + c.mantissa_bits + shift
    drop = jnp.maximum(c.mantissa_bits - mantissa_bits, fmt.quantum_exponent + place - field)
    wide = isinstance(fmt, Float) and not (static and fmt.emin + shift >= 1 - c.bias)
    if wide:
        # Subnormals of the carrier that are normal in the format have fewer bits than the carrier's normal numbers.
        value_exponent = exponent(magnitude, c)
        fewer = value_exponent + (c.mantissa_bits - 1 + c.bias) - mantissa_bits
        drop = jnp.where(subnormal, jnp.maximum(fewer, fmt.quantum_exponent + place - 1), drop)
        drop = jnp.maximum(drop, 0)
    if isinstance(fmt, Float) and fmt.subnormals is False:
        below = (exponent(magnitude, c) if wide else jnp.where(subnormal, -c.bias, field - c.bias)) < fmt.emin + shift
        drop = jnp.where(below, fmt.emin + place - field, drop)
    if rounding not in (Rounding.STOCHASTIC, Rounding.STOCHASTIC_B, Rounding.STOCHASTIC_C):
        # A distance below 1/128 may stand for all smaller ones.
        drop = jnp.minimum(drop, c.width - 1)
    drop = drop.astype(c.uint)

    fraction = significand << (c.width - drop)
    if rounding.is_stochastic and rounding is not Rounding.STOCHASTIC_EQUAL:
        # Shifts by the width or more, a negative number being a large unsigned one, give 0.
        far = drop - c.width
        low = significand >> far
        fraction = fraction | low
        if rounding is Rounding.STOCHASTIC_C:
            fraction = fraction | ((drop > c.width) & (low << far != significand)).astype(c.uint)
    kept = significand >> drop
    if isinstance(fmt, Float) and fmt.mantissa_bits == 0:
        code = (exponent(magnitude, c) if wide else field - c.bias) - shift + fmt.bias
        odd = jnp.where(kept == 0, c.uint(0), code.astype(c.uint) & 1)
    else:
        odd = kept & 1

    if isinstance(fmt, Float) and fmt.subnormals == "normal" and fmt.mantissa_bits > 0:
        beneath = magnitude < smallest
        if rounding.is_stochastic:
            near = _fraction_of_odd(significand, field, fmt.emin + c.bias + shift, mantissa_bits, c)
        else:
            # Less than half, half or more of the smallest value is all that counts.
            doubled = jnp.where(subnormal, magnitude << 1, magnitude + c.uint(1 << c.mantissa_bits))
            above = c.uint(c.sign) + (doubled > smallest).astype(c.uint)
            near = jnp.where(doubled < smallest, (magnitude != 0).astype(c.uint), above)
        fraction, odd = jnp.where(beneath, near, fraction), jnp.where(beneath, c.uint(0), odd)
    else:
        beneath = drop > c.mantissa_bits
    up = _round_up(rounding, fraction, odd, negative, random, c)
    rounded = ((magnitude >> drop) + up.astype(c.uint)) << drop
    rounded = jnp.where(beneath, jnp.where(up, smallest, c.uint(0)), rounded)

    finite = magnitude < c.uint(c.inf)
    if not static or fmt.quantum_exponent + place > 2 * c.bias + c.mantissa_bits:
        rounded = jnp.where(finite, rounded, c.uint(c.inf))
    if isinstance(fmt, Fixed):
        if fmt.overflow == "wrap":
            return _wrap(rounded, negative, fmt, c)
        bound = largest if fmt.min_integer == -fmt.max_integer else jnp.where(negative, lowest, largest)
        result = jnp.minimum(rounded, bound)
        return from_bits(jnp.where((result == 0) | (magnitude > c.uint(c.inf)), c.uint(0), result | sign), c)

    if not fmt.has_zero:
        rounded = jnp.maximum(rounded, smallest)
    over = rounded > largest
    nan = magnitude > c.uint(c.inf)
    saturate = saturate or not (fmt.has_inf or fmt.has_nan)
    result = jnp.where(over, largest if saturate or not fmt.has_inf else c.uint(c.inf), rounded)
    if not saturate:
        toward_zero = {
            Rounding.TOWARD_ZERO: True,
            Rounding.TO_ODD: True,
            Rounding.TOWARD_POSITIVE: negative,
            Rounding.TOWARD_NEGATIVE: ~negative,
        }.get(rounding)
        if toward_zero is not None:
            kept_finite = finite if toward_zero is True else finite & toward_zero
            result = jnp.where(over & kept_finite, largest, result)
            over = over & ~kept_finite
        if not fmt.has_inf:
            nan = nan | over
    if not fmt.signed:
        outside = negative & (magnitude != 0) & (result != 0)
        if saturate:
            result = jnp.where(outside, c.uint(0) if fmt.has_zero else smallest, result)
        else:
            nan = nan | outside
    elif fmt.has_negative_zero:
        result = result | sign
    else:
        result = jnp.where(result == 0, result, result | sign)
    return from_bits(jnp.where(nan, c.uint(c.nan) if fmt.has_nan else largest, result), c)


def _ratio(value: float, mantissa_bits: int) -> tuple[int, int]:
    """Returns (k, q) with value = k 2^q; a k of more than one bit is rounded up to mantissa_bits + 1 bits."""
    numerator, denominator = value.as_integer_ratio()
    trailing = (numerator & -numerator).bit_length() - 1
    k, q = numerator >> trailing, trailing - (denominator.bit_length() - 1)
    drop = max(k.bit_length() - 1 - mantissa_bits, 0)
    return -(-k >> drop), q + drop


def _limit(value: int, power: int, shift, precision: int, top: int, c: Carrier, grid=None):
    """Returns the bits of the largest number up to ``value 2^(power + shift)`` of ``precision`` bits, exponent <= top.

    It is a multiple of ``2^grid``, if that is given.
    """
    ceiling = c.uint(_static_bits(2**precision - 1, top - precision + 1, c))
    if grid is not None:
        finer = jnp.clip(grid - (top - c.mantissa_bits), 0, c.mantissa_bits).astype(c.uint)
        ceiling = ceiling >> finer << finer
    drop = max(value.bit_length() - precision, 0)
    return jnp.minimum(_bits_of(value >> drop, power + drop, shift, c), ceiling)


def _fraction_of_odd(significand, field, first_field, mantissa_bits: int, c: Carrier):
    """Returns x / s as a fraction for 0 <= x < s = 2^emin (1 + 2^-m), the smallest value of DLFloat16 and its like."""
    scaled = significand << (c.width - 2 - c.mantissa_bits)
    down = jnp.clip(first_field - field, 0, c.width - 1).astype(c.uint)
    quarter = scaled >> down
    divisor = c.uint(2**mantissa_bits + 1)
    part, rest = quarter // divisor, quarter % divisor
    below = quarter - part - (rest != 0).astype(c.uint)
    inexact = (rest != 0) | (quarter << down != scaled)
    return below << 2 | inexact.astype(c.uint)


def _wrap(rounded, negative, fmt: Fixed, c: Carrier):
    """Returns the rounded magnitudes as integers of the format, modulo 2^bits."""
    field = (rounded >> c.mantissa_bits).astype(c.int)
    fraction = rounded & c.uint(2**c.mantissa_bits - 1)
    significand = jnp.where(field > 0, fraction | c.uint(2**c.mantissa_bits), fraction)
    left = jnp.maximum(field, 1) - (c.bias + c.mantissa_bits) + fmt.fraction_bits
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
