"""Fixed-point and integer formats."""

import dataclasses
import math
from typing import Literal

import jax
import ml_dtypes
import numpy as np


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Fixed:
    """A fixed-point format: the values ``k 2^-fraction_bits`` for the integers k of ``bits`` bits.

    Args:
      bits: the width of the two's complement (or unsigned) code, 1 to 64, the sign included.
      fraction_bits: binary places; 0 gives integers, a negative number multiples of a power of two.
      signed: whether k may be negative.
      symmetric: leave out the most negative integer, so that the range is ``-max`` to ``max``.
      overflow: "saturate" clips to the range, infinities too; "wrap" keeps the integer modulo ``2^bits`` (an infinity
        becomes 0).

    NaN becomes 0, as in WebAssembly's, LLVM's and PTX's saturating conversions. There is no negative zero.

    Raises:
      ValueError: if a field is out of range.

    >>> from qjax import Fixed
    >>> q = Fixed(16, 8)
    >>> q.min, q.max, q.eps
    (-128.0, 127.99609375, 0.00390625)
    """

    bits: int
    fraction_bits: int
    signed: bool
    symmetric: bool
    overflow: Literal["saturate", "wrap"]

    def __init__(
        self,
        bits: int,
        fraction_bits: int = 0,
        *,
        signed: bool = True,
        symmetric: bool = False,
        overflow: Literal["saturate", "wrap"] = "saturate",
    ):
        if not (1 <= bits <= 64 and -900 <= fraction_bits <= 900):
            raise ValueError(
                f"Fixed: expected 1 to 64 bits and -900 to 900 fraction bits, got {bits} and {fraction_bits}."
            )
        if overflow not in ("saturate", "wrap"):
            raise ValueError(f"Fixed: overflow must be 'saturate' or 'wrap', got {overflow!r}.")
        if symmetric and (not signed or bits < 2 or overflow == "wrap"):
            raise ValueError("Fixed: a symmetric range needs a sign, at least 2 bits and overflow='saturate'.")
        for name, value in (
            ("bits", bits),
            ("fraction_bits", fraction_bits),
            ("signed", signed),
            ("symmetric", symmetric),
            ("overflow", overflow),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        options = {"signed": True, "symmetric": False, "overflow": "saturate"}
        shown = [f", {k}={getattr(self, k)!r}" for k, usual in options.items() if getattr(self, k) != usual]
        fraction = f", {self.fraction_bits}" if self.fraction_bits else ""
        return f"Fixed({self.bits}{fraction}{''.join(shown)})"

    @property
    def max_integer(self) -> int:
        """The largest integer k."""
        return 2 ** (self.bits - self.signed) - 1

    @property
    def min_integer(self) -> int:
        """The lowest integer k."""
        return -self.max_integer - (not self.symmetric) if self.signed else 0

    @property
    def max(self) -> float:
        """The largest value (the nearest float64 to it beyond 53 bits)."""
        return math.ldexp(self.max_integer, -self.fraction_bits)

    @property
    def min(self) -> float:
        """The lowest value."""
        return math.ldexp(self.min_integer, -self.fraction_bits)

    @property
    def emax(self) -> int:
        """The exponent of ``max``: its position of the leading bit."""
        return self.max_integer.bit_length() - 1 - self.fraction_bits

    @property
    def quantum_exponent(self) -> int:
        """The exponent of the spacing, ``-fraction_bits``."""
        return -self.fraction_bits

    @property
    def mantissa_bits(self) -> int:
        """The fraction bits of ``max`` seen as a significand."""
        return self.max_integer.bit_length() - 1

    @property
    def eps(self) -> float:
        """The spacing of the values."""
        return math.ldexp(1.0, -self.fraction_bits)

    has_inf = has_nan = has_negative_zero = False
    has_zero = True

    @property
    def dtype(self) -> np.dtype | None:
        """The numpy or ml_dtypes integer dtype with the same encoding, or None."""
        if self.fraction_bits or self.bits not in (2, 4, 8, 16, 32, 64):
            return None
        name = f"{'' if self.signed else 'u'}int{self.bits}"
        return np.dtype(getattr(ml_dtypes, name, None) or name)

    def values(self) -> np.ndarray:
        """Returns all values, ascending, as float64; for formats up to 16 bits.

        >>> from qjax import Fixed
        >>> Fixed(3, 1).values()
        array([-2. , -1.5, -1. , -0.5,  0. ,  0.5,  1. ,  1.5])
        """
        if self.bits > 16:
            raise ValueError(f"Fixed.values: {self!r} has 2^{self.bits} codes; only formats up to 16 bits are listed.")
        return np.ldexp(np.arange(self.min_integer, self.max_integer + 1, dtype=np.float64), -self.fraction_bits)
