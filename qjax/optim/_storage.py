"""What holds an array of an optimizer's state between steps."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax import _carrier
from qjax._blocks import blocks_of
from qjax._encode import QTensor, decode, encode
from qjax._grid import once
from qjax._quantizer import Quantizer
from qjax.formats import FP32, Float, Format, Scaled, format
from qjax.optim._power import exp2, log2


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False)
class Expanded:
    """COAT's dynamic range expansion: a float format of ``q = sign(x) max (|x| / M)^k``, M and k one for each block.

    M is the largest magnitude of a block, in float32, and max the largest value of the format. With m the smallest
    nonzero magnitude, k is the largest multiple of 1/16, up to 255/16, that keeps ``(M / m)^k`` within ``max^2 / 2``,
    and is stored in a byte: the block uses the range that the format has. The way back is ``M (|q| / max)^(1/k)``.

    Args:
      fmt: a ``Float`` of at most 8 bits, or its name.
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
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"Expanded: block must be a positive int, got {block!r}.")
        object.__setattr__(self, "fmt", resolved)
        object.__setattr__(self, "block", block)

    @property
    def is_stochastic(self) -> bool:
        return False

    def encode(self, x: Float32[Array, "*shape"]) -> "ExpandedTensor":
        """Returns the storage of x."""
        if x.dtype != jnp.float32:
            raise TypeError(f"Expanded: arrays must be float32, got {x.dtype}; hold it by a Quantizer, or convert it.")
        return _expanded(self, x)

    def __call__(self, x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns what is left of x once stored."""
        return self.encode(x).decode()


@functools.partial(jax.jit, static_argnums=0)
def _expanded(expanded: Expanded, x) -> "ExpandedTensor":
    blocks = _blocks(expanded.block, x.shape)
    c = _carrier.carrier(x.dtype)
    size = _carrier.flush(jnp.abs(x))
    bits = _carrier.to_bits(size, c)
    top, gap = blocks.maximum(bits), blocks.maximum(jnp.where(bits == 0, 0, c.uint(c.inf) - bits))
    largest = _carrier.from_bits(top, c)
    logarithm = log2(jnp.where(top == 0, 1, largest))
    span = jnp.maximum(logarithm - log2(_carrier.from_bits(c.uint(c.inf) - gap, c)), 1)
    steps = jnp.clip(jnp.floor(16 * math.log2(expanded.fmt.max**2 / 2) / span), 1, 255).astype(c.int)
    top, steps, logarithm = once(top.astype(c.int), steps, _carrier.to_bits(logarithm, c).astype(c.int))
    logarithm = _carrier.from_bits(logarithm.astype(c.uint), c)
    power = exp2(blocks.spread(steps.astype(c.float) / 16) * (log2(size) - blocks.spread(logarithm)))
    q = jnp.copysign(jnp.where(bits == 0, 0, power * expanded.fmt.max), x)
    largest = jnp.where(top < c.inf, largest, jnp.nan)
    return ExpandedTensor(encode(q, expanded.fmt), largest, steps.astype(jnp.uint8), expanded.block)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "largest", "steps"], meta_fields=["block"])
@dataclasses.dataclass(frozen=True)
class ExpandedTensor:
    """An array in the storage of ``Expanded``: the values q, and M and 16 k of each block."""

    values: QTensor
    largest: Array
    steps: Array
    block: int

    def decode(self) -> Array:
        """Returns the array."""
        return _contracted(self)


@jax.jit
def _contracted(x: ExpandedTensor) -> Array:
    codes, blocks = x.values.unpacked().astype(jnp.int32), _blocks(x.block, x.values.shape)
    rows, count = _roots(x.values.fmt), 2**x.values.fmt.bits
    row = blocks.spread(x.steps.astype(jnp.int32) * count)
    return jnp.asarray(rows.ravel())[row | codes] * blocks.spread(x.largest)


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


def _blocks(block: int, shape: tuple[int, ...]):
    return blocks_of(Scaled(FP32, FP32, block), shape, -1)


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


def stored(storage: Storage, x: Array, key: Any = None) -> Stored:
    """Returns x in its storage; in one row where its last axis is no multiple of the block.

    So few elements share a scale only where there are few, and sharded arrays of the usual shapes stay as they are.
    """
    block = storage.block if isinstance(storage, Expanded) else _block(storage.fmt)
    laid_out = x if x.ndim and x.shape[-1] % block == 0 else x.reshape(-1)
    if isinstance(storage, Expanded):
        return Stored(storage.encode(laid_out), x.shape)
    q, _ = storage.encode(laid_out, key=key)
    return Stored(q, x.shape)


def restored(stored: Stored) -> Array:
    """Returns the array."""
    value = stored.value
    return (decode(value) if isinstance(value, QTensor) else value.decode()).reshape(stored.shape)


def _block(fmt: Format) -> int:
    """Returns how many elements along the last axis share a scale, 1 if it is not a number of them that says it."""
    while isinstance(fmt, Scaled):
        if isinstance(fmt.block, int):
            return fmt.block
        fmt = fmt.element
    return 1
