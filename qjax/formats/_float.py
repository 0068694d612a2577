"""Binary floating-point formats."""

import dataclasses
import math
from typing import Literal

import jax
import ml_dtypes
import numpy as np

Specials = Literal["ieee", "fn", "fnuz", "finite", "extended"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Float:
    """A binary floating-point format.

    The magnitude code is the exponent field E followed by the fraction field T of ``mantissa_bits`` = m bits, the
    hidden bit excluded. Its value is ``(1 + T / 2^m) 2^(E - bias)`` for E > 0 and ``T 2^(1 - bias - m)`` for E = 0.

    Args:
      exponent_bits: width of the exponent field, 1 to 11.
      mantissa_bits: stored fraction bits, the hidden bit excluded, 0 to 52. The precision of IEEE 754 is one more.
      bias: the exponent bias. Default ``2^(exponent_bits - 1) - 1``, and one more for "fnuz" and "extended".
      specials: what the codes that are no finite number mean.
        "ieee": the last exponent field holds infinity (fraction 0) and NaN;
        "fn": only the last magnitude is NaN, there is no infinity (OCP E4M3, E8M0);
        "fnuz": the code of negative zero is the only NaN, there is no infinity (P3109 finite, signed);
        "finite": none (OCP FP6, FP4);
        "extended": IEEE P3109 with infinity. Signed: NaN is the code of negative zero, infinity the last magnitude.
        Unsigned: NaN is the last code, infinity the one before.
      signed: whether there is a sign bit.
      subnormals: what the exponent field 0 holds. True: zero and the subnormals. False: zero alone, so results below
        ``min_normal`` become zero or ``min_normal``. "normal": one more binade of normal numbers, in which code 0 is
        zero if there are mantissa bits (DLFloat16) and ``2^-bias`` if there are none (E8M0, which has no zero).

    Raises:
      ValueError: if a field is out of range, no code is left for a number, or a value would not be a float64.

    Every value of a format is a float64. Two formats with equal fields are equal and compile once.

    >>> from qjax import Float
    >>> e4m3 = Float(4, 3, specials="fn")
    >>> e4m3.max, e4m3.min_normal, e4m3.smallest_subnormal, e4m3.eps
    (448.0, 0.015625, 0.001953125, 0.125)
    >>> e4m3
    Float(4, 3, specials='fn')

    Sources: IEEE 754-2019, section 3; OCP 8-bit Floating Point Specification 1.0 (2023); OCP Microscaling Formats 1.0
    (2023); IEEE P3109 interim report; the ml_dtypes names for fn, fnuz.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    signed: bool
    subnormals: bool | Literal["normal"]

    def __init__(
        self,
        exponent_bits: int,
        mantissa_bits: int,
        *,
        bias: int | None = None,
        specials: Specials = "ieee",
        signed: bool = True,
        subnormals: bool | Literal["normal"] = True,
    ):
        if not (1 <= exponent_bits <= 11 and 0 <= mantissa_bits <= 52):
            raise ValueError(
                f"Float: expected 1 to 11 exponent bits and 0 to 52 mantissa bits, got {exponent_bits} and "
                f"{mantissa_bits}."
            )
        if specials not in ("ieee", "fn", "fnuz", "finite", "extended"):
            raise ValueError(f"Float: specials must be 'ieee', 'fn', 'fnuz', 'finite' or 'extended', got {specials!r}.")
        if subnormals not in (True, False, "normal"):
            raise ValueError(f"Float: subnormals must be True, False or 'normal', got {subnormals!r}.")
        if specials == "fnuz" and not signed:
            raise ValueError("Float: 'fnuz' needs a sign bit, for NaN is the code of negative zero; use 'fn'.")
        if specials == "ieee" and mantissa_bits == 0:
            raise ValueError(
                "Float: without mantissa bits 'ieee' has one special code, for infinity, and none for NaN; "
                "use 'fn', 'extended' or 'finite'."
            )
        if signed and specials in ("fnuz", "extended") and subnormals == "normal" and mantissa_bits == 0:
            raise ValueError(
                f"Float: {specials!r} has NaN in the place of negative zero, where a signed format without zero has a "
                "number; use 'fn' or 'finite', or subnormals=True."
            )
        if bias is None:
            bias = 2 ** (exponent_bits - 1) - (0 if specials in ("fnuz", "extended") else 1)
        for name, value in (
            ("exponent_bits", exponent_bits),
            ("mantissa_bits", mantissa_bits),
            ("bias", bias),
            ("specials", specials),
            ("signed", signed),
            ("subnormals", subnormals),
        ):
            object.__setattr__(self, name, value)
        if self.max_code < 1 or not self._split(self.max_code)[0]:
            raise ValueError(f"Float: {self!r} has no code left for a number; add a bit or use specials='finite'.")
        if self.quantum_exponent < -1074 or self._split(self.max_code)[1] + mantissa_bits > 1023:
            raise ValueError(
                f"Float: {self!r} has values that no float64 holds (from 2^{self.quantum_exponent} to "
                f"2^{(self.max_code >> mantissa_bits) - self.bias}); choose a bias near {2 ** (exponent_bits - 1)}."
            )

    def __repr__(self) -> str:
        default = 2 ** (self.exponent_bits - 1) - (0 if self.specials in ("fnuz", "extended") else 1)
        options = {"bias": default, "specials": "ieee", "signed": True, "subnormals": True}
        shown = [f", {k}={getattr(self, k)!r}" for k, usual in options.items() if getattr(self, k) != usual]
        return f"Float({self.exponent_bits}, {self.mantissa_bits}{''.join(shown)})"

    def _split(self, code: int) -> tuple[int, int]:
        """Returns integers (k, q) with k 2^q the value of a magnitude code."""
        field, fraction = code >> self.mantissa_bits, code & (2**self.mantissa_bits - 1)
        if field == 0 and self.subnormals is not True:
            if self.subnormals is False or (self.mantissa_bits > 0 and fraction == 0):
                return 0, self.quantum_exponent
        elif field == 0:
            return fraction, self.quantum_exponent
        return 2**self.mantissa_bits + fraction, field - self.bias - self.mantissa_bits

    def _value(self, code: int) -> float:
        return math.ldexp(*self._split(code))

    @property
    def max_code(self) -> int:
        """The magnitude code of ``max``: all ones, less the reserved codes."""
        reserved = {
            "ieee": 2**self.mantissa_bits,
            "fn": 1,
            "fnuz": 0,
            "finite": 0,
            "extended": 1 if self.signed else 2,
        }
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 - reserved[self.specials]

    @property
    def bits(self) -> int:
        """The width of a code."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def emin(self) -> int:
        """The exponent of ``min_normal``."""
        return -self.bias if self.subnormals == "normal" else 1 - self.bias

    @property
    def emax(self) -> int:
        """The exponent of ``max``."""
        return math.frexp(self.max)[1] - 1

    @property
    def quantum_exponent(self) -> int:
        """The exponent of the finest spacing, ``emin - mantissa_bits``."""
        return self.emin - self.mantissa_bits

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self._value(self.max_code)

    @property
    def min(self) -> float:
        """The lowest finite value: ``-max``, or for unsigned formats 0 (2^-bias where there is no zero)."""
        return -self.max if self.signed else self._value(0)

    @property
    def min_normal(self) -> float:
        """The smallest positive normal value (numpy's ``tiny``)."""
        return self._value(1) if self.subnormals == "normal" and self.mantissa_bits else math.ldexp(1.0, self.emin)

    tiny = min_normal

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value, subnormal where the format has subnormals."""
        return math.ldexp(1.0, self.quantum_exponent) if self.subnormals is True else self.min_normal

    @property
    def eps(self) -> float:
        """The spacing at 1 of the precision: ``2^-mantissa_bits``."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def has_inf(self) -> bool:
        """Whether there is an infinity."""
        return self.specials in ("ieee", "extended")

    @property
    def has_nan(self) -> bool:
        """Whether there is a NaN."""
        return self.specials != "finite"

    @property
    def has_negative_zero(self) -> bool:
        """Whether zero is signed."""
        return self.signed and self.specials in ("ieee", "fn", "finite")

    @property
    def has_zero(self) -> bool:
        """Whether zero is a value (it is not in E8M0)."""
        return not (self.subnormals == "normal" and self.mantissa_bits == 0)

    @property
    def dtype(self) -> np.dtype | None:
        """The numpy or ml_dtypes dtype with the same encoding, or None."""
        return _DTYPES.get(self)

    def values(self) -> np.ndarray:
        """Returns all finite values, ascending, zero once, as float64; for formats up to 16 bits.

        >>> from qjax import Float
        >>> Float(2, 1, specials="finite", signed=False).values()
        array([0. , 0.5, 1. , 1.5, 2. , 3. , 4. , 6. ])
        """
        if self.bits > 16:
            raise ValueError(f"Float.values: {self!r} has 2^{self.bits} codes; only formats up to 16 bits are listed.")
        magnitudes = np.unique([self._value(code) for code in range(self.max_code + 1)])
        return np.unique(np.concatenate([-magnitudes, magnitudes]) + 0.0) if self.signed else magnitudes


_DTYPES = {
    Float(2, 1, specials="finite"): np.dtype(ml_dtypes.float4_e2m1fn),
    Float(2, 3, specials="finite"): np.dtype(ml_dtypes.float6_e2m3fn),
    Float(3, 2, specials="finite"): np.dtype(ml_dtypes.float6_e3m2fn),
    Float(3, 4): np.dtype(ml_dtypes.float8_e3m4),
    Float(4, 3): np.dtype(ml_dtypes.float8_e4m3),
    Float(4, 3, bias=11, specials="fnuz"): np.dtype(ml_dtypes.float8_e4m3b11fnuz),
    Float(4, 3, specials="fn"): np.dtype(ml_dtypes.float8_e4m3fn),
    Float(4, 3, specials="fnuz"): np.dtype(ml_dtypes.float8_e4m3fnuz),
    Float(5, 2): np.dtype(ml_dtypes.float8_e5m2),
    Float(5, 2, specials="fnuz"): np.dtype(ml_dtypes.float8_e5m2fnuz),
    Float(8, 0, specials="fn", signed=False, subnormals="normal"): np.dtype(ml_dtypes.float8_e8m0fnu),
    Float(8, 7): np.dtype(ml_dtypes.bfloat16),
    Float(5, 10): np.dtype(np.float16),
    Float(8, 23): np.dtype(np.float32),
    Float(11, 52): np.dtype(np.float64),
}
