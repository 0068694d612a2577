"""Operands that a kernel brings to its carrier itself: packed codes, and floats that are yet to be rounded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, UInt

from qjax import _carrier, _operand, _packing, _rounding
from qjax._encode import _values
from qjax._quantizer import Quantizer
from qjax.formats import Codebook, Fixed, Float


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes"], meta_fields=["fmt"])
@dataclasses.dataclass(frozen=True)
class Coded:
    """Rows of codes of a 4-bit or 8-bit format, packed along the last axis as in a ``QTensor``.

    Attributes:
      codes: uint8 of shape ``(b, n, bytes)``; of two 4-bit codes in a byte the first has the low bits.
      fmt: the format of the elements.
    """

    codes: UInt[Array, "b n bytes"]
    fmt: Float | Fixed | Codebook

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the elements, of an even number in a row."""
        b, n, size = self.codes.shape
        return b, n, size * 8 // self.fmt.bits

    @property
    def elements(self) -> Array:
        """The elements as float32."""
        return decoded(_packing.unpack(self.codes, self.fmt.bits, self.shape[-1], jnp.uint32), self.fmt)


def decoded(codes, fmt: Float | Fixed | Codebook) -> Any:
    """Returns the float32 values of uint32 codes in operations that kernels have: a codebook is no gather."""
    if not isinstance(fmt, Codebook):
        return _values(codes, fmt, 0, _carrier.carrier(np.float32))
    places = (np.arange(2**fmt.bits) - fmt.first_code) % 2**fmt.bits
    table = np.concatenate([fmt.values().astype(np.float32), np.full(2**fmt.bits - len(fmt.table), np.nan, np.float32)])
    values = [np.float32(v) for v in table[places]]
    for bit in range(fmt.bits):
        odd = (codes >> bit) & 1 != 0
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=["quantizer"])
@dataclasses.dataclass(frozen=True)
class Unrounded:
    """Rows of floats that a kernel rounds before it multiplies them.

    Attributes:
      x: float32 or bfloat16 of shape ``(b, m, k)``.
      quantizer: of a ``Float`` or ``Fixed`` format, deterministic.
    """

    x: Inexact[Array, "b m k"]
    quantizer: Quantizer

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def elements(self) -> Array:
        """The rounded elements as float32."""
        return rounded(self.x, self.quantizer)


def rounded(x, quantizer: Quantizer):
    """Returns float32 or bfloat16 numbers rounded by a quantizer, as float32."""
    fmt = quantizer.fmt
    assert isinstance(fmt, Float | Fixed)
    return _rounding.round_to(_carrier.widen(x), fmt, quantizer.rounding, saturate=quantizer.saturate)


def carried(lhs, rhs) -> tuple[Array, Array]:
    """Returns operands as arrays of the narrowest dtype that holds both: what XLA gets in their place."""
    if not isinstance(lhs, Unrounded) and not isinstance(rhs, Coded):
        return lhs, rhs
    narrow = [isinstance(x, Coded | Unrounded) or x.dtype == jnp.bfloat16 for x in (lhs, rhs)]
    formats = [lhs.quantizer.fmt] if isinstance(lhs, Unrounded) else []
    formats += [rhs.fmt] if isinstance(rhs, Coded) else []
    fits = all(narrow) and all(_operand.narrow_float(fmt) == jnp.bfloat16 for fmt in formats)
    arrays = [x.elements if isinstance(x, Coded | Unrounded) else x for x in (lhs, rhs)]
    first, second = (x.astype(jnp.bfloat16 if fits else jnp.float32) for x in arrays)
    return first, second
