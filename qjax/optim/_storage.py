"""What holds an array of an optimizer's state between steps."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from qjax import _carrier
from qjax._encode import QTensor, _nan_code, decode
from qjax._grid import once
from qjax._packing import pack
from qjax._quantizer import Quantizer
from qjax.formats import Float, Format, Scaled, format
from qjax.optim._power import exp2, log2_beside_line, log2_on_line


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False)
class Expanded:
    """COAT's dynamic range expansion: a float format of ``q = sign(x) max (|x| / M)^k``, M and k one for each block.

    M is the largest magnitude of a block, in float32, and max the largest value of the format. With m the smallest
    nonzero magnitude, k is the largest multiple of 1/16, up to 255/16, that keeps ``(M / m)^k`` within ``max^2 / 2``,
    and is stored in a byte: the block uses the range that the format has. The way back is ``M (|q| / max)^(1/k)``.

    Args:
      fmt: a ``Float`` of at most 8 bits, with a mantissa and subnormals, or its name.
      block: how many elements along the last axis share M and k.

    Arrays are float32. Zeros stay zeros, and subnormals become zeros. A block with a NaN or an infinity becomes NaN.
    Rounding is to nearest, ties to even, of a power that is right to a relative 2^-16. The way back is a table's.

    Raises:
      TypeError, ValueError: for other formats, blocks and dtypes.

    >>> import jax.numpy as jnp, qjax
    >>> x = jnp.array([1.0, 0.9, 1.1, 0.95], jnp.float32)
    >>> [f"{v:.3f}" for v in qjax.chop(x, "e4m3_g128")]
    ['1.021', '0.864', '1.100', '0.943']
    >>> [f"{v:.3f}" for v in qjax.optim.Expanded("e4m3", 128)(x)]
    ['0.999', '0.899', '1.100', '0.951']

    Source: Xi et al. (2024), COAT, https://arxiv.org/abs/2410.19313, section 4.1. There x is first divided by
    ``sqrt(M m)``, and the result by a scale of its own; both cancel, and are not stored. The bound is that
    of the released code, whose k is unbounded, and divides by zero where all magnitudes are equal.
    """

    fmt: Float
    block: int

    def __init__(self, fmt: Float | str = "e4m3", block: int = 128):
        resolved = format(fmt)
        if not isinstance(resolved, Float) or resolved.bits > 8:
            raise ValueError(f"Expanded: fmt must be a Float of at most 8 bits, such as 'e4m3', got {fmt!r}.")
        if resolved.subnormals is not True or resolved.mantissa_bits == 0:
            raise ValueError(f"Expanded: fmt must have mantissa bits and subnormals, as 'e4m3' has, got {fmt!r}.")
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"Expanded: block must be a positive int, got {block!r}.")
        object.__setattr__(self, "fmt", resolved)
        object.__setattr__(self, "block", block)

    @property
    def is_stochastic(self) -> bool:
        return False

    def encode(self, x: Float32[Array, "*shape"], again: Float32[Array, "*shape"] | None = None) -> "ExpandedTensor":
        """Returns the storage of x.

        Args:
          x: the array.
          again: x computed another time, from which the codes are made: then XLA need not store x between the loop
            that finds M and k, and the one over the elements.
        """
        if x.dtype != jnp.float32:
            raise TypeError(f"Expanded: arrays must be float32, got {x.dtype}; hold it by a Quantizer, or convert it.")
        return _expanded(self, x, x if again is None else again)

    def __call__(self, x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns what is left of x once stored."""
        return self.encode(x).decode()


@functools.partial(jax.jit, static_argnums=0)
def _expanded(expanded: Expanded, x, again) -> "ExpandedTensor":
    c, fmt = _carrier.carrier(x.dtype), expanded.fmt
    bits = _carrier.to_bits(jnp.abs(_in_blocks(x, expanded.block)), c)
    first = c.uint(1 << c.mantissa_bits)
    # Both at once, for what two loops read XLA stores. Less the first normal number, zeros and subnormals wrap around.
    # From behind a barrier, or XLA reduces the zeros of a first state while it compiles: 9 s for a million.
    top, above = lax.reduce(
        (bits, bits - first),
        lax.optimization_barrier((c.uint(0), c.uint(2**c.width - 1))),
        lambda left, right: (lax.max(left[0], right[0]), lax.min(left[1], right[1])),
        (bits.ndim - 1,),
    )
    lower = jnp.where(top < first, top, above + first)
    span = log2_on_line(top - lower) + (log2_beside_line(top) - log2_beside_line(lower))
    steps = jnp.clip(jnp.floor(16 * math.log2(fmt.max**2 / 2) / jnp.maximum(span, 1)), 1, 255)
    base = math.log2(fmt.max) - fmt.emin - log2_beside_line(top, steps / 16)
    steps, base = once(steps.astype(c.int), _carrier.to_bits(base, c).astype(c.int))
    codes = _codes(
        _in_blocks(again, expanded.block),
        top[..., None],
        (steps.astype(c.float) / 16)[..., None],
        _carrier.from_bits(base.astype(c.uint), c)[..., None],
        fmt,
    )
    values = QTensor(pack(codes, fmt.bits), (), (), fmt, codes.shape[-1], x.dtype, -1)
    largest = jnp.where(top < c.inf, _carrier.flush(_carrier.from_bits(top, c)), jnp.nan)
    return ExpandedTensor(values, largest, steps.astype(jnp.uint8), x.shape[-1] if x.ndim else None)


def _codes(x, top, power, base, fmt: Float):
    """Returns the codes of ``max (|x| / M)^power`` with the sign of x.

    In units of the last place a power is its significand and its exponent, that of the smallest normal number at least,
    counted from there: the code, but for rounding, for which a sum has this unit for the spacing of its result.

    Args:
      top: the bits of M.
      base: ``log2(max / M^power)``, less what the bits of M say, counted from the smallest normal number.
    """
    c = _carrier.carrier(x.dtype)
    bits = _carrier.to_bits(jnp.abs(x), c)
    log = log2_on_line(bits - top) * power + base + log2_beside_line(bits, power)
    exponent = jnp.floor(log)
    unit = c.float(1.5 * 2 ** (c.mantissa_bits - fmt.mantissa_bits))
    place = exponent + unit
    # What has an exponent below that of normal numbers has no place, but is shifted down: bits below those of unit.
    least = jnp.minimum(_carrier.to_bits(place, c), _carrier.to_bits(unit, c))
    down = least << (c.mantissa_bits - fmt.mantissa_bits)
    significand = _carrier.from_bits(_carrier.to_bits(exp2(log - exponent), c) + down, c)
    codes = _carrier.to_bits(significand + place, c) - least
    codes = jnp.where(bits < c.uint(1 << c.mantissa_bits), 0, codes)
    negative = _carrier.to_bits(x, c) >> (c.width - 1)
    if fmt.has_negative_zero:
        return codes | negative << (fmt.bits - 1)
    minus = codes | c.uint(1 << (fmt.bits - 1)) if fmt.signed else _nan_code(fmt) if fmt.has_nan else 0
    return jnp.where((negative == 1) & (codes != 0), minus, codes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "largest", "steps"], meta_fields=["length"])
@dataclasses.dataclass(frozen=True)
class ExpandedTensor:
    """An array in the storage of ``Expanded``: the values q, as (..., blocks, entries), and M and 16 k of each block.

    ``length`` is that of the last axis, None for a scalar.
    """

    values: QTensor
    largest: Array
    steps: Array
    length: int | None

    def decode(self, reading: int = 0) -> Array:
        """Returns the array.

        Args:
          reading: 0, 1 or 2: the same numbers, which XLA does not see to be the same.
        """
        return _contracted(self, reading)


@functools.partial(jax.jit, static_argnums=1)
def _contracted(x: ExpandedTensor, reading: int) -> Array:
    # A row has 2^bits entries.
    codes, rows = x.values.unpacked().astype(jnp.uint16), x.steps.astype(jnp.int32) << x.values.fmt.bits
    if reading == 0:
        # Unknown to have no bit in common with codes, so that the compiler does not make eight addresses of eight equal
        # rows where a loop is over the last axis of another shape, as that of an update of the parameters is.
        (rows,) = once(rows)
    place = _UNITED[reading](*jnp.broadcast_arrays(rows[..., None].astype(jnp.uint16), codes))
    value = jnp.asarray(_roots(x.values.fmt).ravel())[place] * x.largest[..., None]
    if x.length is None:
        return value.reshape(())
    return value.reshape(*codes.shape[:-2], -1)[..., : x.length]


# What has no bit in common, these unite.
_UNITED = lax.bitwise_xor, lax.bitwise_or, lax.add


@functools.lru_cache
def _roots(fmt: Float) -> np.ndarray:
    """Returns ``sign(q) (|q| / max)^(16 / steps)`` of every code, a row for each of the steps from 0 to 255."""
    magnitudes = np.array([math.ldexp(*fmt._split(code)) for code in range(fmt.max_code + 1)])
    rows = np.maximum(np.arange(256), 1)[:, None]
    table = np.full((256, 2**fmt.bits), np.nan)
    table[:, : fmt.max_code + 1] = (magnitudes / fmt.max) ** (16 / rows)
    if fmt.signed:
        table[:, 2 ** (fmt.bits - 1) :] = -table[:, : 2 ** (fmt.bits - 1)]
    return table.astype(np.float32)


def _in_blocks(x, block: int):
    """Returns x as (..., blocks, entries), with zeros at the end where the last block is not full."""
    x = jnp.atleast_1d(x)
    size = max(min(block, x.shape[-1]), 1)
    count = -(-x.shape[-1] // size)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * size - x.shape[-1])])
    return x.reshape(*x.shape[:-1], count, size)


QuantizerLike = Quantizer | Format | str
Storage = Quantizer | Expanded
StorageLike = QuantizerLike | Expanded


def as_quantizer(q: QuantizerLike) -> Quantizer:
    """Returns a Quantizer; a format or its name stands for rounding to nearest."""
    return q if isinstance(q, Quantizer) else Quantizer(q)


def as_storage(storage: StorageLike) -> Storage:
    """Returns a storage; a format or its name stands for rounding to nearest."""
    return storage if isinstance(storage, Expanded) else as_quantizer(storage)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of a state between steps: its storage, and the shape that the array has."""

    value: QTensor | ExpandedTensor
    shape: tuple[int, ...]


def stored(storage: Storage, x: Array, key: Any = None, *, again: Array | None = None) -> Stored:
    """Returns x in its storage; in one row where its last axis is no multiple of the block.

    So few elements share a scale only where there are few, and sharded arrays of the usual shapes stay as they are.

    Args:
      again: x, perhaps computed another time: what an ``Expanded`` makes its codes from.
    """
    block = storage.block if isinstance(storage, Expanded) else _block(storage.fmt)
    again = x if again is None else again
    rows = x.ndim and x.shape[-1] % block == 0
    laid_out, again = (y if rows else y.reshape(-1) for y in (x, again))
    if isinstance(storage, Expanded):
        return Stored(storage.encode(laid_out, again), x.shape)
    q, _ = storage.encode(laid_out, key=key)
    return Stored(q, x.shape)


def restored(stored: Stored, reading: int = 0) -> Array:
    """Returns the array; of an ``ExpandedTensor`` by one of its readings."""
    value = stored.value
    return (decode(value) if isinstance(value, QTensor) else value.decode(reading)).reshape(stored.shape)


def _block(fmt: Format) -> int:
    """Returns how many elements along the last axis share a scale, 1 if it is not a number of them that says it."""
    while isinstance(fmt, Scaled):
        if isinstance(fmt.block, int):
            return fmt.block
        fmt = fmt.element
    return 1
