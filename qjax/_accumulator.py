"""``Accumulator``: how the products of a dot are summed, in any format, and the arithmetic of its register."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import _modes, _rounding, _to_odd
from qjax._chop import RoundingLike, _rounding_named
from qjax._modes import Rounding
from qjax.formats import Fixed, Float, Format, format


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False)
class Accumulator:
    """The register that the products of a dot are summed in, as if the hardware had it.

    The products of ``chunk`` neighbours along the contraction are summed, then added to the register, which rounds:
    ``acc = round(acc + (x[k] y[k] + ... + x[k + chunk - 1] y[k + chunk - 1]))``. Every ``promote`` products the
    register is added to a float32 total and cleared.

    The register holds elements: scales that are constant along the contraction multiply the result. Block scales
    multiply the elements, unless the blocks are whole multiples of ``promote``: then they multiply what is promoted.

    Args:
      fmt: the format of the register, a ``Float`` or a ``Fixed`` (that wraps or saturates as it says), or its name.
      rounding: a ``Rounding`` or its name, of a ``Float`` register.
      chunk: how many products are summed before the register rounds; 1 is multiply-accumulate by multiply-accumulate.
      promote: after how many products, a multiple of chunk, the register is added to the float32 total; None: never.
      saturate: whether overflow of a ``Float`` register gives its largest value.
      detect: whether a ``Fixed`` register answers NaN where it overflowed, instead of wrapping or saturating.

    The sum of a chunk is that of a float32 dot (exact if the products are and their sum has at most 24 bits), its
    addition to the register is exact before it rounds: once, in a ``Float`` of m <= 21 mantissa bits (in stochastic
    modes the probability of going up is right to 2^(m - 23)). Float32 itself, to nearest, is the carrier's addition.
    Subnormals of float32 count as zero, and its largest number bounds every register. A ``Fixed`` register sums the
    integers of ``Fixed`` elements, exactly, and has the sum of their fraction bits.

    Raises:
      TypeError, ValueError: if an argument is none of these.

    >>> import qjax
    >>> qjax.Accumulator("fp16", chunk=4).fmt
    Float(5, 10)

    Sources: Wang et al. (2018), Training deep neural networks with 8-bit floating point numbers,
    https://arxiv.org/abs/1812.08011, section 2 (chunks); DeepSeek-V3 (2024), https://arxiv.org/abs/2412.19437, section
    3.3.2 (promotion); Das et al. (2018), https://arxiv.org/abs/1802.00930, section 4 (integer chains); Boldo and
    Melquiond (2008) for the exact addition by rounding to odd.
    """

    fmt: Float | Fixed
    rounding: Rounding
    chunk: int
    promote: int | None
    saturate: bool
    detect: bool

    def __init__(
        self,
        fmt: Format | str,
        rounding: RoundingLike = Rounding.NEAREST_EVEN,
        *,
        chunk: int = 1,
        promote: int | None = None,
        saturate: bool = False,
        detect: bool = False,
    ):
        fmt = format(fmt)
        if not isinstance(fmt, Float | Fixed):
            raise TypeError(f"Accumulator: fmt must be a Float or a Fixed, got {fmt!r}.")
        rounding = _rounding_named("Accumulator", rounding)
        if isinstance(fmt, Float) and fmt.mantissa_bits > 21 and (fmt, rounding) != (_F32, Rounding.NEAREST_EVEN):
            raise ValueError(
                f"Accumulator: {fmt!r} with rounding {rounding.value!r} cannot be rounded once on float32; "
                "take at most 21 mantissa bits, or fp32 with 'nearest_even'."
            )
        if isinstance(fmt, Fixed):
            if fmt.bits > 31 + fmt.signed:
                raise ValueError(f"Accumulator: a Fixed register has at most 32 bits, or 31 unsigned, got {fmt!r}.")
            if rounding is not Rounding.NEAREST_EVEN or saturate:
                raise ValueError(
                    f"Accumulator: {fmt!r} sums integers exactly; leave rounding and saturate out, and give the format "
                    "overflow='wrap' or 'saturate'."
                )
        if chunk < 1 or (promote is not None and (promote < chunk or promote % chunk)):
            raise ValueError(
                "Accumulator: chunk must be positive and promote a multiple of it, "
                f"got chunk={chunk}, promote={promote}."
            )
        if detect and not isinstance(fmt, Fixed):
            raise ValueError(f"Accumulator: detect needs a Fixed register, got {fmt!r}; a Float overflows to infinity.")
        for name, value in (
            ("fmt", fmt),
            ("rounding", rounding),
            ("chunk", chunk),
            ("promote", promote),
            ("saturate", saturate),
            ("detect", detect),
        ):
            object.__setattr__(self, name, value)

    @property
    def is_stochastic(self) -> bool:
        """Whether it needs a key."""
        return self.rounding.is_stochastic

    @property
    def watches(self) -> bool:
        """Whether it is a ``Fixed`` register that looks for overflow, to saturate or to detect it."""
        return isinstance(self.fmt, Fixed) and (self.detect or self.fmt.overflow == "saturate")


_F32 = Float(8, 23)


class Register(NamedTuple):
    """The arithmetic of an accumulator, on arrays of any shape: the same in a scan and in the body of a kernel.

    Attributes:
      sums: the dtype of the sums of chunks.
      start: makes the state of registers of a shape, a tuple of arrays.
      add: makes the next state of a state, the sums of a chunk, and random words or None.
      read: makes the float32 value of a state.
    """

    sums: type
    start: Callable
    add: Callable
    read: Callable


def register_of(accumulator: Accumulator) -> Register:
    """Returns the register of an accumulator."""
    if isinstance(accumulator.fmt, Fixed):
        return _integer_register(accumulator, accumulator.fmt)
    return _float_register(accumulator, accumulator.fmt)


def random_bits(accumulator: Accumulator) -> int:
    """Returns how many random bits a stochastic accumulator draws for each sum."""
    return _modes.max_random_bits(accumulator.rounding, 32)


def _float_register(accumulator: Accumulator, fmt: Float) -> Register:
    def start(shape):
        return (jnp.zeros(shape, jnp.float32),)

    # To the nearest, what is beyond float32 overflows as infinity does.
    bounded = not accumulator.rounding.value.startswith("nearest")

    def add(state, part, words):
        if fmt == _F32:
            return (state[0] + part,)
        random = None if words is None else _modes.Random(words, random_bits(accumulator))
        total = _to_odd.add(state[0], part, bounded=bounded)
        return (_rounding.round_to(total, fmt, accumulator.rounding, random=random, saturate=accumulator.saturate),)

    return Register(np.float32, start, add, lambda state: state[0])


def _integer_register(accumulator: Accumulator, fmt: Fixed) -> Register:
    """The state is the integer and, if it looks for overflow, whether there was one."""

    def start(shape):
        value = jnp.zeros(shape, jnp.int32)
        return (value, jnp.zeros(shape, bool)) if accumulator.watches else (value,)

    def add(state, part, words):
        value = state[0]
        total = value + part
        if not accumulator.watches:
            return (total,)
        # Two summands of one sign whose sum has the other: 32 bits overflowed.
        beyond = ((value ^ total) & (part ^ total)) < 0
        low, high = np.int32(fmt.min_integer), np.int32(fmt.max_integer)
        over = beyond | (total < low) | (total > high)
        clipped = jnp.where(jnp.where(beyond, value, total) < 0, low, high)
        return jnp.where(over, clipped, total), state[1] | over

    def read(state):
        value = state[0]
        if fmt.overflow == "wrap" and not accumulator.detect and fmt.bits < 32:
            upper = value << (32 - fmt.bits)
            value = (upper if fmt.signed else upper.astype(jnp.uint32)) >> (32 - fmt.bits)
        value = value.astype(jnp.float32) * np.float32(2.0**-fmt.fraction_bits)
        return jnp.where(state[1], jnp.float32(np.nan), value) if accumulator.detect else value

    return Register(np.int32, start, add, read)
