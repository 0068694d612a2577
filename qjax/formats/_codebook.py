"""Formats given by the list of their values."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np

from qjax.formats import _tapered


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class Codebook:
    """A format given by the list of its values.

    Args:
      values: the values, ascending, at most 2^16.
      name: what ``qjax.format`` calls it, if anything; shown by ``repr``.
      boundaries: ``boundaries[i]`` is where rounding to nearest changes from ``values[i]`` to ``values[i + 1]``.
        Default: the midpoints, exact. A number on a boundary goes to the even code (nearest_even), the odd one
        (nearest_odd), the larger or smaller magnitude (nearest_away, nearest_zero; the even code if they are equal).
      first_code: the code of ``values[0]``; codes count up from it modulo ``2^bits``.
      nan: whether the code before the first is NaN (NaR in posits and takums).

    Beyond the ends the nearest end is the answer in every mode. Without a NaN code, NaN becomes the largest value.
    With one, infinities become NaN unless saturated. There is no negative zero. Stochastic rounding is proportional to
    the distance between the two neighbouring values.

    Raises:
      ValueError: if the values are not finite and ascending, or the boundaries do not separate them.

    >>> from qjax import Codebook
    >>> ternary = Codebook((-1.0, 0.0, 1.0))
    >>> ternary.bits, ternary.max
    (2, 1.0)
    >>> ternary
    Codebook((-1.0, 0.0, 1.0))
    """

    table: tuple[float, ...]
    name: str
    boundaries: tuple[float, ...] | None
    first_code: int
    nan: bool

    def __init__(
        self,
        values: tuple[float, ...],
        name: str = "",
        *,
        boundaries: tuple[float, ...] | None = None,
        first_code: int = 0,
        nan: bool = False,
    ):
        table = tuple(float(v) + 0.0 for v in values)
        if not 2 <= len(table) + nan <= 2**16 or not all(map(math.isfinite, table)):
            raise ValueError(f"Codebook: expected 2 to 2^16 finite values, got {len(table)} (name {name!r}).")
        if any(a >= b for a, b in itertools.pairwise(table)):
            raise ValueError(f"Codebook: the values must ascend strictly (name {name!r}); sort them and drop repeats.")
        if boundaries is not None:
            boundaries = tuple(map(float, boundaries))
            if len(boundaries) != len(table) - 1 or any(
                not a <= b <= c for a, b, c in zip(table, boundaries, table[1:], strict=False)
            ):
                raise ValueError(
                    f"Codebook: expected {len(table) - 1} boundaries, each between its two values (name {name!r})."
                )
        for field, value in (
            ("table", table),
            ("name", name),
            ("boundaries", boundaries),
            ("first_code", first_code),
            ("nan", nan),
            ("_hash", hash((table, boundaries, first_code, nan))),
        ):
            object.__setattr__(self, field, value)

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Codebook)
            and hash(self) == hash(other)
            and (self.table, self.boundaries, self.first_code, self.nan)
            == (other.table, other.boundaries, other.first_code, other.nan)
        )

    def __repr__(self) -> str:
        if len(self.table) > 16 and self.name:
            return f"format({self.name!r})"
        options = {"name": "", "boundaries": None, "first_code": 0, "nan": False}
        shown = [f", {k}={getattr(self, k)!r}" for k, usual in options.items() if getattr(self, k) != usual]
        return f"Codebook({self.table!r}{''.join(shown)})"

    @property
    def bits(self) -> int:
        """The width of a code."""
        return (len(self.table) + self.nan - 1).bit_length()

    @property
    def max(self) -> float:
        """The largest value."""
        return self.table[-1]

    @property
    def min(self) -> float:
        """The lowest value."""
        return self.table[0]

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value, or the largest value if none is positive."""
        return min((v for v in self.table if v > 0), default=self.max)

    @property
    def emax(self) -> int:
        """The exponent of the largest magnitude."""
        return math.frexp(max(self.max, -self.min))[1] - 1

    has_inf = has_negative_zero = False

    @property
    def has_nan(self) -> bool:
        """Whether there is a NaN code."""
        return self.nan

    dtype = None

    def values(self) -> np.ndarray:
        """Returns all values, ascending, as float64.

        >>> from qjax import format
        >>> format("pow2_3").values()
        array([-1.  , -0.5 , -0.25,  0.  ,  0.25,  0.5 ,  1.  ])
        """
        return np.array(self.table, dtype=np.float64)


@functools.lru_cache
def posit(bits: int, es: int = 2) -> Codebook:
    """Returns the posit format of ``bits`` bits and ``es`` exponent bits (2 in the standard), 2 to 16 bits.

    Rounding to nearest is decided on the bit string, as the standard says: the boundary between two neighbours is the
    posit of one bit more between them. To nearest, nothing but zero rounds to zero, and no number rounds to NaR.

    >>> from qjax import posit
    >>> posit(8).max == 2.0**24
    True

    Source: Posit Working Group (2022), Standard for Posit Arithmetic, sections 3 and 4.
    """
    values, boundaries, first_code = _tapered.posit_tables(bits, es)
    name = f"posit{bits}" if es == 2 else f"posit{bits}es{es}"
    return Codebook(tuple(values), name, boundaries=tuple(boundaries), first_code=first_code, nan=True)


@functools.lru_cache
def takum(bits: int) -> Codebook:
    """Returns the linear takum format of ``bits`` bits, 2 to 16, rounded on the bit string as posits are.

    >>> from qjax import takum
    >>> takum(8).bits
    8

    Source: Hunhold (2024), Beating Posits at Their Own Game: Takum Arithmetic, https://arxiv.org/abs/2404.18603.
    """
    values, boundaries, first_code = _tapered.takum_tables(bits)
    return Codebook(tuple(values), f"takum{bits}", boundaries=tuple(boundaries), first_code=first_code, nan=True)


@functools.lru_cache
def powers_of_two(bits: int) -> Codebook:
    """Returns the format of 0 and the signed powers of two 2^0, 2^-1 ... that fit in ``bits`` bits, 2 to 9.

    >>> from qjax import powers_of_two
    >>> powers_of_two(3).max
    1.0

    Source: Zhou et al. (2017), Incremental Network Quantization, https://arxiv.org/abs/1702.03044, section 2.1.
    """
    if not 2 <= bits <= 9:
        raise ValueError(f"powers_of_two: expected 2 to 9 bits, got {bits}.")
    magnitudes = [2.0**-i for i in range(2 ** (bits - 1) - 1)]
    return Codebook(tuple(sorted([0.0, *magnitudes, *(-m for m in magnitudes)])), f"pow2_{bits}")


@functools.lru_cache
def midrise(bits: int) -> Codebook:
    """Returns the uniform grid without zero: the ``2^bits`` odd integers from ``1 - 2^bits`` to ``2^bits - 1``.

    With a scale it is the centred quantizer of ``bits`` bits, 1 to 8; with one bit, the sign.

    >>> from qjax import midrise
    >>> midrise(2).values()
    array([-3., -1.,  1.,  3.])

    Source: Panferov et al. (2025), QuEST, https://arxiv.org/abs/2502.05003, section 3.1.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"midrise: expected 1 to 8 bits, got {bits}.")
    return Codebook(tuple(float(k) for k in range(1 - 2**bits, 2**bits, 2)), f"midrise{bits}")


@functools.lru_cache
def dynamic(bits: int, signed: bool = True) -> Codebook:
    """Returns the dynamic tree format of 3 to 8 bits: 0, 1 and a few values in each of ``bits - 1`` decades.

    In ``[10^(i - E - 1), 10^(i - E)]``, i from 0 to ``E = bits - 2``, lie the midpoints of ``2^i`` equal intervals
    (twice as many if unsigned), of either sign; so the larger, the finer. Blocks of it have the largest magnitude 1.

    >>> from qjax import dynamic
    >>> [f"{value:.3g}" for value in dynamic(3).values()]
    ['-0.775', '-0.325', '-0.055', '0', '0.055', '0.325', '0.775', '1']

    Source: Dettmers et al. (2022), 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861,
    section 2.2; Dettmers (2016), https://arxiv.org/abs/1511.04561. The table is that of the released code, in float32.
    """
    if not 3 <= bits <= 8:
        raise ValueError(f"dynamic: expected 3 to 8 bits, got {bits}.")
    decades = bits - 1
    values = [0.0, 1.0]
    for i in range(decades):
        count = 2 ** (i if signed else i + 1)
        middles = [(0.1 + 0.9 * (j + 0.5) / count) * 10.0 ** (i + 1 - decades) for j in range(count)]
        values += middles + [-middle for middle in middles if signed]
    return Codebook(tuple(sorted(float(np.float32(v)) for v in values)), f"{'' if signed else 'u'}dynamic{bits}")
