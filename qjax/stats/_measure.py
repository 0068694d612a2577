"""``measure``: the statistics of a tensor in a format."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Inexact

from qjax import _carrier
from qjax._blocks import blocks_of, levels
from qjax._carrier import Carrier
from qjax._chop import RoundingLike, _checked, random
from qjax._modes import Random, Rounding
from qjax._scaled import Mode, Parts, quantize
from qjax.formats import Codebook, Fixed, Float, Format, Scaled
from qjax.stats._stats import PER_OCTAVE, SLOT, Stats, lowest_error, lowest_exponent, sizes

PIECE = 2**18
"""The elements that are read from memory at a time."""


def measure(
    x: Inexact[Array, "*shape"] | np.ndarray | float,
    fmt: Format | str,
    rounding: RoundingLike = Rounding.NEAREST_EVEN,
    *,
    axis: int = -1,
    scale: Array | np.ndarray | float | None = None,
    key: Array | None = None,
    saturate: bool = False,
) -> Stats:
    """Returns the statistics of x and of its rounding ``q = chop(x, fmt, ...)``.

    Args:
      x, fmt, rounding, axis, scale, key, saturate: as in ``chop``; x is real, of fewer than 2^31 elements.

    What counts as what is decided on bit patterns, so subnormals of x count in full:

    - underflow: x finite and not zero, q zero of either sign;
    - saturation: q is the largest or the lowest value that the block of x can hold, not zero, and x lies beyond it by
      more than half the last spacing. So x that round there as they would without an end are none, and infinities that
      become finite are. Formats that wrap saturate nothing;
    - turned NaN: q NaN, x not, as by overflow without infinity, or in a block with an infinity.

    Where q is NaN or infinite and x finite, all of x is lost: errors are those of q = 0.

    Histograms and counts are exact integers. The sums are float32 (float64 for float64 x), of terms in units of the
    largest: nothing overflows, and what is lost below is under 2^-126 of the largest term. They are summed in runs of
    32, whose sums again, so with terms that are all positive and 3 roundings each a sum of n has a relative error of at
    most ``(31 (ceil(log32 n) + 1) + 3) 2^-24``: 1.2e-5 for n = 10^7, and 1e-4 dB in ``sqnr``.

    An array on one device is read from memory once, in pieces that caches hold, where its blocks lie along the last
    axis and divide it, or there are none; scales of a tensor or another axis need all of it first.

    Raises:
      TypeError: if x is complex, or as ``chop`` does.
      ValueError: if x has 2^31 elements or more, or as ``chop`` does.

    >>> import jax.numpy as jnp
    >>> from qjax import stats
    >>> s = stats.measure(jnp.array([0.3, 300.0, 1e6, -1e-9], jnp.float32), "e4m3")
    >>> s.count("underflows"), s.count("to_nan"), round(s.sqnr, 2), s.error_quantile(0.5)
    (1, 1, 0.0, 0.04296875)
    >>> s.exponents[0][-1], s.exponents[1][-1]
    (np.int64(19), np.int64(1))
    """
    x, mode, scale, key, _, bits = _checked("measure", x, fmt, rounding, axis, scale, key, None, saturate)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError("measure: x is complex; measure x.real and x.imag.")
    if x.size >= 2**31:
        raise ValueError(
            f"measure: x has {x.size} elements, and counts are 32-bit integers; measure parts of fewer than 2^31 and "
            "add them with stats.total."
        )
    # Of an array on many devices, pieces would have to be gathered.
    alone = not isinstance(x, Tracer) and len(x.sharding.device_set) == 1
    in_pieces = alone and x.size >= 2 * PIECE and scale is None and _divides(mode, x.shape)
    return _measure(x, scale, key, mode=mode, bits=bits, in_pieces=in_pieces)


@functools.partial(jax.jit, static_argnames=("mode", "bits", "in_pieces"))
def _measure(x, scale, key, *, mode: Mode, bits: int, in_pieces: bool) -> Stats:
    drawn = random(x, key, None, bits)
    if not in_pieces:
        return _of_array(x, mode, scale, drawn)
    flat, mode = x.ravel(), mode._replace(axis=-1)

    def of_piece(start, size: int) -> Stats:
        def cut(y):
            return lax.dynamic_slice(y.ravel(), (start,), (size,))

        return _of_array(cut(flat), mode, None, drawn and Random(cut(drawn.words), drawn.bits))

    whole = x.size - x.size % PIECE
    parts = lax.map(lambda i: of_piece(i * PIECE, PIECE), jnp.arange(whole // PIECE, dtype=jnp.int32))
    if whole < x.size:
        last = of_piece(whole, x.size - whole)
        parts = jax.tree.map(lambda y, end: jnp.concatenate([y, end[None]]), parts, last)
    return jax.tree.map(_sum_of_parts, parts)


def _of_array(x, mode: Mode, scale, random: Random | None) -> Stats:
    wide = _carrier.widen(x)
    return Stats(**of_signal(wide), **of_error(wide, mode, scale=scale, random=random), fmt=mode.fmt)


def _divides(mode: Mode, shape: tuple[int, ...]) -> bool:
    """Returns whether the blocks of an array are those of its pieces."""
    blocks = [level.block for level in levels(mode.fmt)]
    last = not blocks or mode.axis in (-1, len(shape) - 1)
    return last and all(isinstance(block, int) and shape[-1] % block == PIECE % block == 0 for block in blocks)


def _sum_of_parts(x):
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.sum(x, axis=0, dtype=x.dtype)
    return jax.vmap(_sum_by_runs)(x.T)


def of_signal(x) -> dict[str, Array]:
    """Returns the fields of ``Stats`` that are about x alone."""
    c = _carrier.carrier(x.dtype)
    magnitude = _magnitude(x, c).ravel()
    key = _key(magnitude, c)
    finite = jnp.where((magnitude > 0) & (magnitude < c.uint(c.inf)), key, _absent(c))
    squares, fourths = _power_sums(finite, (2, 4), c)
    # Zero comes below all bins, and infinity and NaN come above.
    length = sizes(c)["magnitudes"]
    place = (key >> (c.mantissa_bits - 3)) - PER_OCTAVE * (lowest_exponent(c) + c.bias)
    magnitudes = _histogram(jnp.clip(place, -1, length) + 1, length + 2)[1:-1]
    return {"magnitudes": magnitudes, "squares": squares, "fourths": fourths}


def of_error(x, mode: Mode, *, scale=None, random: Random | None = None) -> dict[str, Array]:
    """Returns the fields of ``Stats`` that are about x and its rounding."""
    c, element = _carrier.carrier(x.dtype), _element(mode.fmt)
    value, parts = quantize(x, mode, scale=scale, random=random)
    end, reach = (jnp.broadcast_to(a, x.shape).ravel() for a in _ends(parts, mode, x, c))
    before, after = x.ravel(), value.ravel()
    m, r = _magnitude(before, c), _magnitude(after, c)
    zero, inf = c.uint(0), c.uint(c.inf)
    lost = r >= inf
    error, old, new, up = _difference(before, jnp.where(lost, c.float(0), after), m, jnp.where(lost, zero, r), c)
    saturates = end & (m > r) & (error * reach > new)

    # All counts come of one histogram, for that is what takes time: of the bins of errors, once more of those of what
    # saturates, of what underflows, and of the kinds of x and q where one of them is zero or no number.
    length = sizes(c)["errors"]
    octaves = (_carrier.to_bits(error / old, c) >> (c.mantissa_bits - 3)).astype(c.int)
    place = jnp.clip(octaves - PER_OCTAVE * (c.bias + lowest_error(c)) + 1, 1, length - 1)
    place = jnp.where(error == 0, 0, place) + jnp.where(saturates, c.int(length), c.int(0))
    kind_of_x = jnp.where(m > inf, 3, jnp.where(m == inf, 2, 1 - (m > zero).astype(c.int)))
    kind_of_q = jnp.where(r > inf, 2, (r == inf).astype(c.int))
    place = jnp.where(r == zero, 2 * length, place)
    place = jnp.where((kind_of_x > 0) | (kind_of_q > 0), 2 * length + 1 + 3 * kind_of_x + kind_of_q, place)
    bins = _histogram(place, 2 * length + 13)
    plain, saturated, underflows = bins[:length], bins[length : 2 * length], bins[2 * length]
    kinds = bins[2 * length + 1 :].reshape(4, 3)  # x finite and not zero, zero, infinite, NaN; q finite, infinite, NaN
    add = functools.partial(jnp.sum, dtype=jnp.int32)
    of_zero, of_infinity, of_nan = add(kinds[1:], axis=1)
    wraps = isinstance(element, Fixed) and element.overflow == "wrap"
    saturations = add(saturated) + (0 if wraps else kinds[2, 0])
    to_nan, to_infinity = add(kinds[:3, 2]), add(kinds[:2, 1])
    size = jnp.asarray(before.size, jnp.int32)
    counts = jnp.stack([size, of_zero, of_nan, of_infinity, underflows, saturations, to_nan, to_infinity])
    all_lost = 1 - PER_OCTAVE * lowest_error(c)  # the bin of an error of 1
    errors = (plain + saturated).at[all_lost].add(underflows + add(kinds[0, 1:]))

    bits = _carrier.to_bits(error, c).astype(c.int)
    key = jnp.where((m < inf) & (error > 0), bits - (up << c.mantissa_bits), _absent(c))
    (noise,) = _power_sums(key, (2,), c)
    return {"counts": counts, "errors": errors, "noise": noise}


def _magnitude(x, c: Carrier):
    return _carrier.to_bits(x, c) & c.uint(c.sign - 1)


def _key(magnitude, c: Carrier):
    """Returns the bits of magnitudes as if there were no least exponent: subnormals get fields of 0 and below.

    So the upper bits are the exponent plus the bias, the lower ones the fraction. Zero comes below all.
    """
    # An integer below 2^mantissa_bits converts exactly; the value of a subnormal is its integer times the smallest one.
    integer = _carrier.to_bits(magnitude.astype(c.int).astype(c.float), c).astype(c.int)
    below = integer + c.int(lowest_exponent(c) * 2**c.mantissa_bits)
    return jnp.where(magnitude < c.uint(1 << c.mantissa_bits), below, magnitude.astype(c.int))


def _absent(c: Carrier):
    """Returns the key of what does not count: below those of all positive numbers, and in range after a subtraction."""
    return c.int(-(1 << (c.width - 2)))


def _difference(before, after, m, r, c: Carrier):
    """Returns |after - before|, |before|, |after| and an exponent: where all is small, they are 2^exponent larger.

    So no difference, and no number that it is compared with, is subnormal where the other one is not far larger.
    """
    up = 2 * c.mantissa_bits + 18  # 64 in float32
    small = jnp.maximum(m, r) < c.uint((c.bias - up + c.mantissa_bits) << c.mantissa_bits)

    def raised(magnitude, signed):
        larger = jnp.where(magnitude == 0, c.int(0), _key(magnitude, c) + c.int(up << c.mantissa_bits))
        bits = jnp.where(small, larger.astype(c.uint), magnitude)
        return _carrier.from_bits(bits, c), _carrier.from_bits(bits | _carrier.to_bits(signed, c) & c.uint(c.sign), c)

    (old, signed_old), (new, signed_new) = raised(m, before), raised(r, after)
    return jnp.abs(signed_new - signed_old), old, new, jnp.where(small, c.int(up), c.int(0))


def _ends(parts: Parts, mode: Mode, x, c: Carrier):
    """Returns which elements are at an end of their range, and the end in halves of the last spacing."""
    element = _element(mode.fmt)
    at, nowhere = parts.elements, jnp.zeros(x.shape, bool)
    if isinstance(element, Codebook):
        table = element.table
        halves = [2 * abs(table[i]) / abs(table[i] - table[j]) for i, j in ((-1, -2), (0, 1))]
        top = at == len(table) - 1
        return top | (at == 0), jnp.where(top, c.float(halves[0]), c.float(halves[1]))
    if isinstance(element, Fixed) and element.overflow == "wrap":
        return nowhere, c.float(1)
    if isinstance(mode.fmt, Scaled) and mode.fmt.zero_point is not None:
        # The end is a number of spacings from the zero point, not from 0.
        steps = at - blocks_of(mode.fmt, x.shape, mode.axis).spread(parts.zero_points[0])
        return (at == 0) | (at == c.float(element.max)), 2 * jnp.abs(steps)
    negative = _carrier.to_bits(at, c) >= c.uint(c.sign)
    high, low = (
        (element.max_integer, -element.min_integer)
        if isinstance(element, Fixed)
        else (round(math.ldexp(element.max, element.mantissa_bits - element.emax)),) * 2
    )
    unit = element.quantum_exponent if isinstance(element, Fixed) else element.emax - element.mantissa_bits

    def size(integer: int):
        if isinstance(parts.shift, int):
            return c.uint(_carrier.static_bits(integer, unit + parts.shift, c))
        return _carrier.compose(jnp.full(x.shape, integer, c.uint), parts.shift + unit, c)

    end = _magnitude(at, c) == jnp.where(negative, size(low), size(high))
    if low == 0:
        end = end & ~negative
    return end, jnp.where(negative, c.float(2 * low), c.float(2 * high))


def _element(fmt: Format) -> Float | Fixed | Codebook:
    while isinstance(fmt, Scaled):
        fmt = fmt.element
    return fmt


def _histogram(place, length: int):
    """Returns how many elements have each place."""
    return jnp.zeros(length, jnp.int32).at[place].add(1, mode="promise_in_bounds")


def _power_sums(key, powers: tuple[int, ...], c: Carrier):
    """Returns for each power p the slots of the sum of ``|x|^p``, of the keys of |x|."""
    lowest = lowest_exponent(c)
    top = (jnp.max(key, initial=c.int((lowest + c.bias) << c.mantissa_bits)) >> c.mantissa_bits) - c.bias
    # In units of the largest; what is left out is below 2^-63 of it, its square below the smallest normal number.
    bits = key - (top << c.mantissa_bits)
    bits = jnp.where(bits > c.int((c.bias // 2) << c.mantissa_bits), bits, c.int(0))
    unit = _carrier.from_bits(bits.astype(c.uint), c)
    square = unit * unit
    slot, within = (top - lowest) // SLOT, (top - lowest) % SLOT
    sums = []
    for power in powers:
        summed = _sum_by_runs(square if power == 2 else square * square)
        factor = (power * (within - 3 * SLOT // 4) + c.bias).astype(c.uint) << c.mantissa_bits
        placed = summed * _carrier.from_bits(factor, c)
        sums.append(jnp.where(jnp.arange(sizes(c)["squares"]) == slot, placed, c.float(0)))
    return sums


def _sum_by_runs(x):
    """Returns the sum of a vector: of runs of 32, of the sums of 32 runs, and so on."""
    while x.size > 32:
        runs = jnp.pad(x, (0, -x.size % 32)).reshape(-1, 32)
        x = lax.optimization_barrier(jnp.sum(runs, axis=1))  # else XLA makes one long sum of two
    return jnp.sum(x)
