"""Block formats: elements that share a scale."""

import dataclasses
import math
from typing import Literal

import jax

from qjax.formats._codebook import Codebook
from qjax.formats._fixed import Fixed
from qjax.formats._float import Float


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rms:
    """The rule of a block scale that follows the root mean square r of the block: ``clip r / M``, M as in ``Scaled``.

    Elements beyond ``clip`` times r saturate. A scale that is not a power of two is rounded to nearest in its format;
    one that is, has the exponent ``floor(log2(clip r / M))``, or the nearest integer with ``log2="nearest"``. The sum
    of squares is that of the backend, so that the last bit of r may differ between programs.

    >>> import jax.numpy as jnp, qjax
    >>> fmt = qjax.Scaled(qjax.TERNARY, qjax.FP32, "axis", rule=qjax.Rms(1.5))
    >>> qjax.chop(jnp.array([3.0, -3.0, 3.0, 0.5, -3.0], jnp.float32), fmt)
    Array([ 4.0388737, -4.0388737,  4.0388737,  0.       , -4.0388737],      dtype=float32)

    Source: Panferov et al. (2025), QuEST, https://arxiv.org/abs/2502.05003, section 3.1.
    """

    clip: float
    log2: Literal["floor", "nearest"] = "floor"


Rule = Literal["floor", "ceil", "rceil", "even", "absmax", "mse"] | Rms
Block = int | tuple[int, ...] | Literal["axis"] | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Scaled:
    """A block format: every block of elements shares one scale, ``x = scale * element``.

    Args:
      element: the format of the elements, itself ``Scaled`` for a scale of two levels (NVFP4).
      scale: the format of the scales, a ``Float``.
      block: which elements share a scale. An int: that many along the ``axis`` of the call, the last block perhaps
        partial, never across rows. A tuple: a tile of the last axes. "axis": all of the ``axis`` (per channel).
        None: the whole array.
      rule: how the scale follows from ``a``, the largest magnitude of the block, and M, the largest of the element.
        "floor": ``2^(floor(log2 a) - floor(log2 M))`` (OCP MX, DFP; the largest elements may saturate);
        "ceil": ``2^(ceil(log2 a) - floor(log2 M))``;
        "rceil": ``2^ceil(log2(a / M))`` (NVIDIA; never saturates);
        "even": as floor, of ``a`` rounded to the element's mantissa bits, ties away;
        "absmax": ``a / M``, rounded to nearest in the scale's format;
        "mse": the one of the least squared error; of the scale of "floor", its double and its half for scales that are
        powers of two, else of 1, 31/32 ... 17/32 times the scale of "absmax";
        ``Rms(clip)``: from the root mean square instead.
        Default: "floor" for scales that are powers of two, else "absmax".
      zero_point: for an unsigned ``Fixed`` element the format of a zero point z, ``x = scale * (element - z)``, both
        from the smallest and the largest value of the block and zero; else None.

    Raises:
      TypeError, ValueError: if the parts do not fit together.

    >>> from qjax import Scaled, E2M1, E8M0
    >>> mxfp4 = Scaled(E2M1, E8M0, 32)
    >>> mxfp4.rule, mxfp4.bits
    ('floor', 4.25)

    Sources: OCP Microscaling Formats (MX) 1.0 (2023), section 5; Das et al. (2018), https://arxiv.org/abs/1802.00930
    (DFP); the names of the rules are torchao's. The block along an axis, the tile and the two-level scale follow
    NVIDIA's NVFP4 and DeepSeek-V3 (2024), https://arxiv.org/abs/2412.19437, section 3.3.
    """

    element: "Float | Fixed | Codebook | Scaled"
    scale: Float
    block: Block
    rule: Rule
    zero_point: Fixed | None

    def __init__(
        self,
        element: "Float | Fixed | Codebook | Scaled",
        scale: Float,
        block: Block,
        *,
        rule: Rule | None = None,
        zero_point: Fixed | None = None,
    ):
        if not isinstance(element, Float | Fixed | Codebook | Scaled):
            raise TypeError(f"Scaled: element must be a format, got {element!r}; resolve names with qjax.format.")
        if not isinstance(scale, Float):
            raise TypeError(f"Scaled: scale must be a Float, got {scale!r}.")
        if not (
            block is None
            or block == "axis"
            or (isinstance(block, int) and block > 0)
            or (isinstance(block, tuple) and block and all(isinstance(b, int) and b > 0 for b in block))
        ):
            raise ValueError(f"Scaled: block must be a positive int, a tuple of them, 'axis' or None, got {block!r}.")
        power_of_two = scale.mantissa_bits == 0
        if rule is None:
            rule = "floor" if power_of_two else "absmax"
        if rule not in ("floor", "ceil", "rceil", "even", "absmax", "mse") and not isinstance(rule, Rms):
            raise ValueError(
                f"Scaled: rule must be 'floor', 'ceil', 'rceil', 'even', 'absmax', 'mse' or an Rms, got {rule!r}."
            )
        if isinstance(element, Fixed) and element.overflow == "wrap":
            raise ValueError("Scaled: elements saturate; use a Fixed element with overflow='saturate'.")
        if not element.max > 0:
            raise ValueError(
                f"Scaled: {element!r} has no number above 0 to scale the largest of a block to; add a bit."
            )
        if zero_point is not None and (
            not isinstance(element, Fixed) or element.signed or power_of_two or rule != "absmax"
        ):
            raise ValueError(
                "Scaled: a zero point needs an unsigned Fixed element, a scale with mantissa and 'absmax'."
            )
        if isinstance(element, Scaled) and (power_of_two or rule != "absmax"):
            raise ValueError("Scaled: around a Scaled element the scale needs a mantissa, and the rule 'absmax'.")
        if not power_of_two and element.max >= 2.0**128:
            raise ValueError(
                f"Scaled: the largest element, {element.max:.4g}, is beyond float32, in which a scale with mantissa is "
                f"computed; use an element with fewer exponents than {element!r}."
            )
        for name, value in (
            ("element", element),
            ("scale", scale),
            ("block", block),
            ("rule", rule),
            ("zero_point", zero_point),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        usual = "floor" if self.scale.mantissa_bits == 0 else "absmax"
        rule = "" if self.rule == usual else f", rule={self.rule!r}"
        zero_point = "" if self.zero_point is None else f", zero_point={self.zero_point!r}"
        return f"Scaled({self.element!r}, {self.scale!r}, {self.block!r}{rule}{zero_point})"

    @property
    def bits(self) -> float:
        """The storage of an element in bits, its share of the scale of an int or tile block included."""
        if isinstance(self.block, int | tuple):
            shared = self.scale.bits + (self.zero_point.bits if self.zero_point else 0)
            return self.element.bits + shared / math.prod(
                self.block if isinstance(self.block, tuple) else (self.block,)
            )
        return self.element.bits

    @property
    def max(self) -> float:
        """The largest value: the largest scale times the largest element."""
        return self.scale.max * self.element.max

    @property
    def power_of_two(self) -> bool:
        """Whether the computed scales are powers of two, so that scaling is exact."""
        return self.scale.mantissa_bits == 0

    @property
    def shifts(self) -> bool:
        """Whether elements are rounded on the scaled grid itself: scaled by powers of two, and no codebook."""
        return self.power_of_two and isinstance(self.element, Float | Fixed)
