"""The slow, obvious oracle of chop.

It shares no code with qjax and reads only the fields of a format. Arithmetic is exact: on rationals (``exact=True``),
or on float64 where every step is exact because numbers are float32 or spacings are powers of two;
``test_oracle.py`` checks that the two agree, and that they agree with MPFR, ml_dtypes, gfloat and NumPy.
"""

import bisect
import functools
import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np

import qjax
from qjax import Rounding as R

DETERMINISTIC = tuple(rounding for rounding in R if not rounding.value.startswith("stochastic"))


def goes_up(rounding: R, d, odd, negative, draw=0, bits: int = 1):
    """Returns whether numbers at distance d in [0, 1) of their spacing round away from zero."""
    half, steps = Fraction(1, 2), 2**bits
    if d.dtype != object:
        half = 0.5
    match rounding:
        case R.NEAREST_EVEN:
            return (d > half) | ((d == half) & odd)
        case R.NEAREST_ODD:
            return (d > half) | ((d == half) & ~odd)
        case R.NEAREST_AWAY:
            return d >= half
        case R.NEAREST_ZERO:
            return d > half
        case R.TOWARD_ZERO:
            return d < 0
        case R.TOWARD_POSITIVE:
            return (d > 0) & ~negative
        case R.TOWARD_NEGATIVE:
            return (d > 0) & negative
        case R.TO_ODD:
            return (d > 0) & ~odd
        case R.STOCHASTIC:
            return d * steps // 1 + draw >= steps
        case R.STOCHASTIC_B:
            return d * 2 * steps // 1 + 2 * draw + 1 >= 2 * steps
        case R.STOCHASTIC_C:
            whole = d * steps // 1
            rest = d * steps - whole
            return whole + ((rest > half) | ((rest == half) & (whole % 2 == 1))) + draw >= steps
        case R.STOCHASTIC_EQUAL:
            return (d > 0) & (draw >= steps // 2)


def code_at(fmt: qjax.Float, place: int) -> int:
    """Returns the magnitude code of the place-th value: without subnormals, field 0 holds zero only."""
    return place + 2**fmt.mantissa_bits - 1 if fmt.subnormals is False and place > 0 else place


def count(fmt: qjax.Float) -> int:
    """Returns the number of finite magnitudes."""
    reserved = {"ieee": 2**fmt.mantissa_bits, "fn": 1, "fnuz": 0, "finite": 0, "extended": 1 if fmt.signed else 2}
    codes = 2 ** (fmt.exponent_bits + fmt.mantissa_bits) - reserved[fmt.specials]
    return codes if fmt.subnormals is not False else codes - 2**fmt.mantissa_bits + 1


def magnitude(fmt: qjax.Float, place: int) -> Fraction:
    """Returns the place-th magnitude; those after the last go on as if the exponent field were wider."""
    field, fraction = divmod(code_at(fmt, place), 2**fmt.mantissa_bits)
    if fmt.subnormals == "normal":
        hidden = place > 0 or fmt.mantissa_bits == 0
    else:
        hidden, field = field > 0, max(field, 1)
    significand, exponent = fraction + hidden * 2**fmt.mantissa_bits, field - fmt.bias - fmt.mantissa_bits
    return Fraction(significand << max(exponent, 0), 1 << max(-exponent, 0))


def _float(value: Fraction) -> float:
    """Returns the float64 that a value is, infinity beyond the range."""
    return float(value) if value < 2**1024 else math.inf


@functools.cache
def largest(fmt: qjax.Float, dtype: np.dtype) -> float:
    """Returns the largest value that a dtype holds."""
    held = finfo_of(dtype)
    top = Fraction(float(held.max))
    place = bisect.bisect_right(range(count(fmt)), top, key=lambda i: magnitude(fmt, i)) - 1
    return toward_zero(magnitude(fmt, place), held)


def toward_zero(value: Fraction, held) -> float:
    """Returns the largest number of a dtype up to a magnitude, with its sign."""
    if abs(value) > Fraction(float(held.max)):
        return math.copysign(float(held.max), value)
    drop = max(abs(value.numerator).bit_length() - held.nmant - 1, 0)
    return math.copysign(float(Fraction(abs(value.numerator) >> drop << drop, value.denominator)), value)


@functools.lru_cache(maxsize=2)
def magnitudes(fmt: qjax.Float) -> np.ndarray:
    """Returns the magnitudes as float64, and the first one after the last."""
    return np.array([_float(magnitude(fmt, place)) for place in range(count(fmt) + 1)])


@functools.lru_cache(maxsize=8)
@np.errstate(over="ignore")
def _table(fmt: qjax.Float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values, codes) of the magnitudes that a dtype holds, and of the first one that is too large."""
    values = magnitudes(fmt)
    held = values.astype(dtype).astype(np.float64) == values
    held[np.flatnonzero(held[:-1])[-1] + 1] = True
    return values[held], np.array([code_at(fmt, place) for place in np.flatnonzero(held).tolist()])


@functools.lru_cache(maxsize=2)  # for all modes of the same numbers
def _distances(fmt: qjax.Float, size: bytes, dtype: np.dtype, exact: bool):
    """Returns (odd, low, high, d): the last magnitude up to each size, or zero, and the next.

    Whether the code of the former is odd, and the distance from it, in [0, 1) of their spacing.
    """
    sizes = np.frombuffer(size)
    if exact:
        sizes = np.array([Fraction(s) for s in sizes.tolist()], object)
    odd, low, high = _neighbours(fmt, sizes, dtype, exact)
    return odd, low, high, (sizes - low) / (high - low)


def _neighbours(fmt: qjax.Float, size: np.ndarray, dtype: np.dtype, exact: bool):
    if exact:
        every = range(count(fmt) + 1)
        places = [bisect.bisect_right(every, s, key=lambda i: magnitude(fmt, i)) - 1 for s in size]
        odd = np.array([code_at(fmt, i) % 2 == 1 if i >= 0 else False for i in places], bool)
        low = [magnitude(fmt, i) if i >= 0 else Fraction(0) for i in places]
        return odd, np.array(low, object), np.array([magnitude(fmt, i + 1) for i in places], object)
    values, codes = _table(fmt, dtype)
    index = np.searchsorted(values, size, side="right") - 1
    odd = (index >= 0) & (codes[index] % 2 == 1)
    low = np.where(index < 0, 0.0, values[index])
    # From the first number on that is too large any next one will do.
    return odd, low, np.where(index == len(values) - 1, math.inf, values[np.minimum(index + 1, len(values) - 1)])


def is_wide(fmt: qjax.Float) -> bool:
    """Returns whether a format has too many values for a table, or values next to the end of float64."""
    return fmt.bits > 19 or fmt.exponent_bits > 10


@np.errstate(invalid="ignore")
def round_float(x, fmt: qjax.Float, rounding: R, held, *, saturate=False, draw=0, bits=1, exact=False) -> np.ndarray:
    """Returns float64 x rounded to the format as ``qjax.chop`` says it, for a dtype with the ``finfo`` held."""
    exact = exact or is_wide(fmt)
    shape, x = np.shape(x), np.ravel(x).astype(np.float64)
    negative, finite, nan = np.signbit(x), np.isfinite(x), np.isnan(x)
    odd, low, high, d = _distances(fmt, np.abs(np.where(finite, x, 0.0)).tobytes(), held.dtype, exact)
    up = np.asarray(goes_up(rounding, d, odd, negative, draw, bits), bool)
    size = np.where(up, high, low)

    has_inf, has_nan = fmt.specials in ("ieee", "extended"), fmt.specials != "finite"
    maximum = largest(fmt, held.dtype)
    lowest = float(max(magnitude(fmt, 0), Fraction(float(held.smallest_subnormal)))) if magnitude(fmt, 0) else 0.0
    saturate = saturate or not has_nan
    over = (size > maximum) | np.isinf(x)
    result = np.maximum(np.where(over, 0, size).astype(np.float64), lowest)
    inward = {R.TOWARD_ZERO: True, R.TO_ODD: True, R.TOWARD_POSITIVE: negative, R.TOWARD_NEGATIVE: ~negative}
    kept = finite & inward.get(rounding, False)
    result = np.where(over, np.where(saturate | kept, maximum, math.inf if has_inf else math.nan), result)
    if fmt.signed:
        result = np.where(negative, -result, result)
        if fmt.specials in ("fnuz", "extended"):
            result = np.where(result == 0, 0.0, result)
    else:
        outside = negative & (x != 0) & (result != 0)
        result = np.where(outside, lowest if saturate else math.nan, result)
    return np.where(nan, math.nan if has_nan else maximum, result).reshape(shape)


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def round_fixed(x, fmt: qjax.Fixed, rounding: R, held, *, draw=0, bits=1) -> np.ndarray:
    """Returns float64 x rounded to a fixed-point format, for a dtype with the ``finfo`` held."""
    x = np.asarray(x, np.float64)
    negative, finite = np.signbit(x), np.isfinite(x)
    size = np.abs(np.where(finite, x, 0.0))
    # What is lost below the smallest float64 is not zero.
    size = np.where(size > 0, np.maximum(np.ldexp(size, fmt.fraction_bits), 2.0**-1074), 0)
    low = np.floor(size)
    size = low + goes_up(rounding, size - low, low % 2 == 1, negative, draw, bits)
    top = 2 ** (fmt.bits - fmt.signed) - 1
    bottom = (-top - (not fmt.symmetric)) if fmt.signed else 0
    ends = [Fraction(int(end)) / Fraction(2) ** fmt.fraction_bits for end in (bottom, top)]
    if fmt.overflow == "wrap":
        # Beyond 2^1024 all numbers are multiples of 2^bits.
        whole = np.where(np.isfinite(size) & finite, np.where(negative, -size, size), 0)
        value = np.array([(int(k) - bottom) % 2**fmt.bits + bottom for k in whole.flat], np.float64).reshape(x.shape)
        return np.ldexp(value, -fmt.fraction_bits) + 0.0
    quantum = Fraction(2) ** -fmt.fraction_bits
    low, high = (toward_zero(end, held) for end in ends)
    low, high = (float(math.trunc(Fraction(end) / quantum) * quantum) for end in (low, high))
    value = np.ldexp(np.where(negative, -size, size), -fmt.fraction_bits)
    value = np.where(np.isinf(x), np.copysign(np.inf, x), value)
    return np.where(np.isnan(x), 0.0, np.clip(value, low, high)) + 0.0


def round_codebook(x, fmt: qjax.Codebook, rounding: R, held, *, saturate=False) -> np.ndarray:
    """Returns float64 x rounded to those values of a codebook in the range of the dtype of ``finfo`` held."""
    smallest, greatest = float(held.smallest_subnormal), float(held.max)
    places = [i for i, v in enumerate(fmt.table) if v == 0 or smallest <= abs(v) <= greatest]
    table = [fmt.table[i] for i in places]

    def one(x: float) -> float:
        if math.isnan(x) or (math.isinf(x) and fmt.nan and not saturate):
            return math.nan if fmt.nan else table[-1]
        i = bisect.bisect_right(table, x) - 1
        if i < 0 or i == len(table) - 1 or x == table[i]:
            return table[max(i, 0)]
        low, high = Fraction(table[i]), Fraction(table[i + 1])
        middle = (low + high) / 2
        if fmt.boundaries:
            # Where values are left out, the boundary next to the smaller magnitude.
            middle = Fraction(fmt.boundaries[places[i] if abs(low) < abs(high) else places[i + 1] - 1])
        high_is_odd = (fmt.first_code + places[i + 1]) % 2 == 1
        # A boundary that is a value itself separates it from all others: nothing else rounds to it.
        tie = middle == Fraction(x) and middle not in (low, high)
        nearer = Fraction(x) > middle or (Fraction(x) == middle and middle == low)
        even = not high_is_odd if tie else nearer
        size_grows, same_size = abs(low) < abs(high), abs(low) == abs(high)
        up = {
            R.TOWARD_POSITIVE: True,
            R.TOWARD_NEGATIVE: False,
            R.TO_ODD: high_is_odd,
            R.NEAREST_EVEN: even,
            R.NEAREST_ODD: high_is_odd if tie else nearer,
            R.TOWARD_ZERO: even if same_size else not size_grows,
            R.NEAREST_AWAY: even if same_size or not tie else size_grows,
            R.NEAREST_ZERO: even if same_size or not tie else not size_grows,
        }[rounding]
        return table[i + bool(up)]

    return np.array([one(float(v)) for v in np.ravel(x)]).reshape(np.shape(x))


def blocks(shape: tuple[int, ...], block, axis: int):
    """Yields an index for each block of an array."""
    if isinstance(block, tuple):
        sizes = (1,) * (len(shape) - len(block)) + block
    elif block is None:
        sizes = shape
    else:
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis] if block == "axis" else block
    starts = (range(0, n, size) for n, size in zip(shape, sizes, strict=True))
    for start in itertools.product(*starts):
        yield tuple(slice(i, i + size) for i, size in zip(start, sizes, strict=True))


def floor_log2(a: Fraction) -> int:
    k = a.numerator.bit_length() - a.denominator.bit_length()
    return k if Fraction(2) ** k <= a else k - 1


def scale_exponent(a: Fraction, fmt: qjax.Scaled) -> int:
    """Returns the exponent of the scale of a block whose largest magnitude is ``a``, by the rule of the format."""
    lowest, highest = floor_log2(Fraction(fmt.scale.smallest_subnormal)), floor_log2(Fraction(fmt.scale.max))
    if a == 0:
        return lowest
    most = Fraction(fmt.element.max)
    match fmt.rule:
        case "floor":
            k = floor_log2(a) - floor_log2(most)
        case "ceil":
            k = -floor_log2(1 / a) - floor_log2(most)
        case "rceil":
            k = -floor_log2(most / a)
        case "even":
            step = Fraction(2) ** (floor_log2(a) - fmt.element.mantissa_bits)
            k = floor_log2((a / step + Fraction(1, 2)) // 1 * step) - floor_log2(most)
    return min(max(k, lowest), highest)


def flush(x):
    """Returns float32 or float64 numbers with subnormals as zeros."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(0, x).astype(x.dtype), x)


@np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore")
def round_scaled(x, fmt: qjax.Format, rounding: R, held, *, axis=-1, scales=None, draw=None, bits=1) -> np.ndarray:
    """Returns x, in the dtype that is computed with (float32 or float64), rounded to any format.

    Args:
      scales: a function from the exact scale that "absmax" would take to the one to take instead.
      draw: in a stochastic mode, the random integer of each element, of so many ``bits``.
    """
    wide = finfo_of(x.dtype)
    draw = np.zeros(x.shape, int) if draw is None else draw
    if isinstance(fmt, qjax.Float):
        value = round_float(x, fmt, rounding, held, saturate=True, draw=np.ravel(draw), bits=bits)
        return value.astype(x.dtype)
    if isinstance(fmt, qjax.Fixed):
        return round_fixed(x, fmt, rounding, held, draw=draw, bits=bits).astype(x.dtype)
    if isinstance(fmt, qjax.Codebook):
        return round_codebook(x, fmt, rounding, held, saturate=True).astype(x.dtype)
    result = np.empty_like(x)
    for index in blocks(x.shape, fmt.block, axis):
        part = x[index]
        special = not np.isfinite(part).all()
        if special and fmt.scale.specials != "finite":
            result[index] = np.nan
            continue
        a = np.abs(part).max(initial=0)
        if fmt.scale.mantissa_bits == 0 and not isinstance(fmt.element, qjax.Codebook):
            k = floor_log2(Fraction(fmt.scale.max)) if special else scale_exponent(Fraction(float(a)), fmt)
            k = min(k, wide.maxexp - 1)
            unscaled = round_scaled(
                np.ldexp(part.astype(np.float64), -k),
                fmt.element,
                rounding,
                finfo_of(np.float64),
                draw=draw[index],
                bits=bits,
            )
            if Fraction(fmt.element.max) * Fraction(2) ** k > float(held.max):
                within = [v for v in fmt.element.values() if abs(Fraction(v)) * Fraction(2) ** k <= float(held.max)]
                clipped = np.clip(unscaled, within[0], within[-1])
                unscaled = np.copysign(clipped, unscaled) if isinstance(fmt.element, qjax.Float) else clipped
            result[index] = np.ldexp(unscaled, k)
            continue
        zero_point = fmt.zero_point is not None
        span = part.max(initial=0) + (-part).max(initial=0) if zero_point else a
        ratio = flush(flush(span) / x.dtype.type(fmt.element.max))
        scale = round_float(ratio, fmt.scale, R.NEAREST_EVEN, wide, saturate=True).astype(x.dtype)
        if fmt.rule != "absmax":
            scale = x.dtype.type(2.0 ** scale_exponent(Fraction(float(a)), fmt))
        if fmt.scale.smallest_subnormal < wide.tiny:
            scale = max(scale, x.dtype.type(wide.tiny))
        if scales is not None:
            scale = scales(scale)
        divided = flush(flush(part) / (scale if scale else np.inf))
        if zero_point:
            z = round_fixed(
                flush(flush((-part).max(initial=0)) / (scale or np.inf)), fmt.zero_point, R.NEAREST_EVEN, wide
            )
            unclipped = qjax.Fixed(fmt.element.bits + 2)
            steps = round_fixed(divided, unclipped, rounding, wide, draw=draw[index], bits=bits)
            quantized = (np.clip(steps + z, 0, fmt.element.max) - z).astype(x.dtype)
        else:
            quantized = round_scaled(divided, fmt.element, rounding, wide, axis=axis, draw=draw[index], bits=bits)
        result[index] = flush(quantized * scale)
    return (
        round_float(result, _format_of(held), R.NEAREST_EVEN, held).astype(x.dtype) if held.dtype != x.dtype else result
    )


def finfo_of(dtype):
    return ml_dtypes.finfo(np.dtype(dtype))


def _format_of(held) -> qjax.Float:
    return qjax.Float(held.bits - held.nmant - 1, held.nmant)
