"""The rounding modes: what each does with the bits that go, and with its random words."""

import dataclasses
import enum
import functools

import jax
import jax.numpy as jnp

from qjax._carrier import Carrier


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


def bump(rounding: Rounding, mask, odd, negative):
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


def least_up(rounding: Rounding, first, half, smallest, negative):
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


def as_proportional(rounding: Rounding, random: Random, c: Carrier) -> tuple[Rounding, Random]:
    """Returns the mode and its words, STOCHASTIC_B as STOCHASTIC: half a unit of R more is a bit more, a one."""
    if rounding is not Rounding.STOCHASTIC_B:
        return rounding, random
    return Rounding.STOCHASTIC, Random(random.words | c.uint(1 << (c.width - 1 - random.bits)), random.bits + 1)


def goes_up(rounding: Rounding, fraction, random: Random, c: Carrier):
    """Returns whether a stochastic mode goes to the neighbour away from zero.

    Args:
      fraction: the distance from the neighbour nearer to zero as an unsigned fixed-point fraction of the spacing, the
        binary point at the left; inexact values have a nonzero one.
      random: the random words.
    """
    rounding, random = as_proportional(rounding, random, c)
    words, bits = random.words, random.bits
    match rounding:
        case Rounding.STOCHASTIC:
            return fraction + words < fraction
        case Rounding.STOCHASTIC_C:
            kept = fraction >> (c.width - bits)
            kept = kept + (fraction << bits > c.uint(c.sign) - (kept & 1)).astype(c.uint)
            return kept + (words >> (c.width - bits)) >= c.uint(1 << bits)
        case Rounding.STOCHASTIC_EQUAL:
            return (fraction != 0) & (words >= c.uint(c.sign))
    raise AssertionError(rounding)


def max_random_bits(rounding: Rounding, width: int) -> int:
    """Returns how many random bits a mode can use on words of ``width`` bits."""
    return width if rounding in (Rounding.STOCHASTIC, Rounding.STOCHASTIC_EQUAL) else width - 2
