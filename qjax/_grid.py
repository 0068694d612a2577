"""The numbers of a format as bit patterns of the carrier: what rounding compares with, and how many bits go."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._carrier import Carrier, compose, static_bits
from qjax._elementwise import elementwise
from qjax._modes import Rounding
from qjax.formats import Fixed, Float

_BY_PARITY = (Rounding.NEAREST_EVEN, Rounding.NEAREST_ODD, Rounding.TO_ODD)


class Numbers(NamedTuple):
    """What a ``Grid`` has at each element, ints or arrays.

    Attributes:
      shift: exponent of the scale, where it is asked for.
      room: the width of the carrier less the exponent field of ``2^m`` of the finest spacings, m the mantissa bits of
        the carrier.
      parity: that of the code at the finest spacing, as what stays of a pattern would have it.
      smallest: the pattern of the smallest value; 0 in stochastic modes if it is one of many.
      edge: what modes compare with below it: half of it, ``smallest`` in stochastic modes.
      bounds: the patterns of the largest value and, where it differs, of the magnitude of the lowest; of NaN where the
        scale is.
    """

    shift: Any
    room: Any
    parity: Any
    smallest: Any
    edge: Any
    bounds: tuple


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values of ``2^shift fmt`` that a dtype holds, on the patterns of the carrier.

    Attributes:
      fmt: the format.
      rounding: the mode.
      mantissa_bits: of the format, as many as the dtype has.
      top: exponent of the largest power of two that the dtype has.
      grain: the smallest value, without the shift.
      wide: whether subnormals of the carrier are given exponent fields below 1; else they are rounded as the integers
        that they are, while their spacing in the format is one.
      least_field: the least exponent field of normal numbers of the format.
      is_static: whether the shift is an int.
      at: what the shift decides, once it is known.
    """

    fmt: Float | Fixed
    rounding: Rounding
    mantissa_bits: int
    top: int
    grain: float
    wide: bool
    least_field: int
    is_static: bool
    at: Any = None

    @property
    def power(self) -> int:
        """The exponent of the smallest value, without the shift."""
        return math.frexp(self.grain)[1] - 1

    @property
    def has_subnormals(self) -> bool:
        return not isinstance(self.fmt, Float) or self.fmt.subnormals is True

    @property
    def has_zero(self) -> bool:
        return not isinstance(self.fmt, Float) or self.fmt.has_zero

    def first(self, c: Carrier):
        """Returns the pattern of the first number above 0."""
        return c.int((1 - c.mantissa_bits) << c.mantissa_bits) if self.wide else c.int(1)

    def finest(self, c: Carrier):
        """Returns the exponent field of ``2^m`` of the finest spacings, m the mantissa bits of the carrier."""
        return c.width - self.at.room

    def coarse(self, c: Carrier, by: int = 1) -> bool:
        """Returns whether the finest spacing is surely over ``2^by`` times that of the carrier's subnormals.

        Else 0 and the smallest value may be numbers like the others.
        """
        return self.is_static and not self.wide and self.finest(c) - c.mantissa_bits > by

    def fewest(self, c: Carrier) -> int:
        """Returns how many bits go at least, of numbers that do not saturate."""
        if self.is_static and isinstance(self.fmt, Fixed) and self.fmt.overflow == "saturate":
            return min(max(self.finest(c) + 1 - max(self.field_beyond(c), 2), 0), c.mantissa_bits)
        return c.mantissa_bits - self.mantissa_bits

    def is_void(self, shift: int) -> bool:
        """Returns whether the dtype holds no value but zero if this is the shift."""
        return self.has_zero and self.power + shift > self.top

    def field_beyond(self, c: Carrier) -> int:
        """Returns the exponent field of the first power of two above all values, if static."""
        return max(math.frexp(self.fmt.max)[1], math.frexp(-self.fmt.min)[1]) + self.at.shift + c.bias


def grid_of(fmt: Float | Fixed, rounding: Rounding, shift, least_shift: int, held, c: Carrier) -> Grid:
    """Returns the grid for a mode, without its numbers.

    Args:
      shift: exponent of the scale, an int, or an array.
      least_shift: the least that an array holds.
      held: the finfo of the dtype that holds the result.
    """
    is_static = isinstance(shift, int)
    mantissa_bits = min(fmt.mantissa_bits, held.nmant) if isinstance(fmt, Float) else held.nmant
    grain = fmt.smallest_subnormal if isinstance(fmt, Float) else fmt.eps
    if is_static:
        least_shift, least = shift, float(held.smallest_subnormal)
        if grain < 2.0**53 * least:
            grain = math.ceil(grain / least) * least
    least_field, has_tail = 1, True
    if isinstance(fmt, Float):
        least_field, has_tail = fmt.emin + least_shift + c.bias, fmt.subnormals is True or not fmt.has_zero
    wide = least_field < (0 if has_tail else 2)
    return Grid(fmt, rounding, mantissa_bits, held.maxexp - 1, grain, wide, least_field, is_static)


def numbers_of_blocks(shift, grid: Grid, spread: Callable[[Any], Any], c: Carrier) -> Numbers:
    """Returns the numbers of a grid at each element, from shifts that blocks share; what is constant is an int."""
    numbers = elementwise(numbers_of, shift, grid, c)
    if not (isinstance(grid.fmt, Float) and grid.fmt.subnormals == "normal"):
        numbers = numbers._replace(shift=0)
    leaves, structure = jax.tree.flatten(numbers)
    arrays = {id(x): x for x in leaves if isinstance(x, jax.Array)}
    spreads = dict(zip(arrays, map(spread, once(*arrays.values())), strict=True))
    return structure.unflatten([spreads[id(x)] if id(x) in spreads else int(x) for x in leaves])


def numbers_of(shift, grid: Grid, c: Carrier) -> Numbers:
    """Returns the numbers of a grid for a shift, an int or a number."""
    fmt, mantissa_bits = grid.fmt, grid.mantissa_bits
    hidden = c.int(1 << c.mantissa_bits)
    finest = fmt.quantum_exponent + shift + c.bias + c.mantissa_bits
    if grid.wide:
        smallest = _pattern(*_ratio(grid.grain, mantissa_bits), shift, c)
        edge = smallest if grid.rounding.is_stochastic else smallest - hidden
    else:
        finest = max(finest, 1) if grid.is_static else jnp.maximum(finest, 1)
        smallest = jnp.maximum(_bits(*_ratio(grid.grain, mantissa_bits), shift, c), grid.first(c))
        if grid.rounding.is_stochastic:
            edge = smallest = jnp.where(smallest < 2 * hidden, 0, smallest)
        else:
            edge = jnp.where(smallest < 2 * hidden, smallest >> 1, smallest - hidden)
    ends = [fmt._split(fmt.max_code)] if isinstance(fmt, Float) else []
    if isinstance(fmt, Fixed):
        ends = [(end, fmt.quantum_exponent) for end in dict.fromkeys((fmt.max_integer, -fmt.min_integer))]
    most = shift if grid.is_static else c.bias
    uniform = grid.has_subnormals and (isinstance(fmt, Fixed) or fmt.emin + most > grid.top)
    quantum = fmt.quantum_exponent + shift if uniform else None
    bounds = [_bound(*end, shift, mantissa_bits + 1, grid.top, c, quantum) for end in ends]
    if grid.is_void(most):
        bounds = [jnp.where(smallest > bound, 0, bound) for bound in bounds]
    if not grid.is_static:
        bounds = [jnp.where(shift > c.bias, c.int(c.nan), bound) for bound in bounds]
    # The code is odd at the finest spacing, or even where the codes of normal numbers start at 0.
    parity = 0
    if grid.rounding in _BY_PARITY:
        parity = finest - c.mantissa_bits + int(not isinstance(fmt, Float) or fmt.subnormals != "normal") & 1
    return Numbers(shift, c.width - finest, parity, smallest, edge, tuple(bounds))


def once(*block_values):
    """Returns integer arrays of one shape and dtype as they are, computed once a block.

    XLA fuses what it can into the work on every element, through optimization barriers too, but not a reduction.
    """
    first = block_values[0]
    shape = (*first.shape, 2)
    pair = lax.broadcasted_iota(first.dtype, shape, first.ndim)
    least = np.array(jnp.iinfo(first.dtype).min, first.dtype)
    return lax.reduce(
        [lax.broadcast_in_dim(values, shape, range(first.ndim)) - pair for values in block_values],
        [least] * len(block_values),
        lambda left, right: tuple(map(lax.max, left, right)),
        (first.ndim,),
    )


def _ratio(value: float, mantissa_bits: int) -> tuple[int, int]:
    """Returns (k, q) with value = k 2^q; a k of more than one bit is rounded up to mantissa_bits + 1 bits."""
    numerator, denominator = value.as_integer_ratio()
    trailing = (numerator & -numerator).bit_length() - 1
    k, q = numerator >> trailing, trailing - (denominator.bit_length() - 1)
    drop = max(k.bit_length() - 1 - mantissa_bits, 0)
    return -(-k >> drop), q + drop


def _bound(value: int, power: int, shift, precision: int, top: int, c: Carrier, quantum):
    """Returns the largest number up to ``value 2^(power + shift)`` of ``precision`` bits and exponent up to top.

    If there is a ``quantum``, since numbers may all be as far apart as subnormals, it is a multiple of ``2^quantum``.
    """
    ceiling = c.int(static_bits(2**precision - 1, top - precision + 1, c))
    if quantum is not None:
        finer = jnp.clip(quantum - (top - c.mantissa_bits), 0, c.mantissa_bits).astype(c.int)
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
