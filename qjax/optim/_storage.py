"""What holds an array of an optimizer's state between steps."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from qjax import _carrier
from qjax._blocks import blocks_of
from qjax._encode import QTensor, decode, encode
from qjax._quantizer import Quantizer
from qjax._rounding import once
from qjax.formats import FP32, Float, Format, Scaled, format


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False)
class Expanded:
    """COAT's dynamic range expansion: a float format of ``q = sign(x) max (|x| / M)^k``, M and k one for each block.

    M is the largest magnitude of a block, in float32, and max the largest value of the format. With m the smallest
    nonzero magnitude, k is the largest multiple of 1/16, up to 255/16, that keeps ``(M / m)^k`` within ``max^2 / 2``,
    and is stored in a byte: the block uses the range that the format has. The way back is ``M (|q| / max)^(1/k)``.

    Args:
      fmt: a ``Float`` or its name.
      block: how many elements along the last axis share M and k.

    Zeros stay zeros, and subnormals become zeros. A block with a NaN or an infinity becomes NaN. Rounding is to
    nearest, ties to even, once the float32 logarithms and exponentials of the backend have had their say.

    >>> import jax.numpy as jnp, qjax
    >>> x = jnp.array([1.0, 0.9, 1.1, 0.95], jnp.float32)
    >>> [f"{v:.3f}" for v in qjax.chop(x, "e4m3_g128")]
    ['1.021', '0.864', '1.100', '0.943']
    >>> [f"{v:.3f}" for v in qjax.optim.Expanded("e4m3", 128)(x)]
    ['0.999', '0.899', '1.100', '0.951']

    Source: Xi et al. (2024), COAT, https://arxiv.org/abs/2410.19313, section 4.1. There x is first divided by
    ``sqrt(M m)``, and the result by a scale of its own; both cancel, and are not stored. The bound ``max^2 / 2`` is that
    of the released code, whose k has no bound and divides by zero where all magnitudes are equal.
    """

    fmt: Float
    block: int

    def __init__(self, fmt: Float | str = "e4m3", block: int = 128):
        resolved = format(fmt)
        if not isinstance(resolved, Float):
            raise ValueError(f"Expanded: fmt must be a Float, such as 'e4m3', got {fmt!r}.")
        object.__setattr__(self, "fmt", resolved)
        object.__setattr__(self, "block", block)

    @property
    def is_stochastic(self) -> bool:
        return False

    def encode(self, x: Float32[Array, "*shape"]) -> "ExpandedTensor":
        """Returns the storage of x."""
        blocks = _blocks(self.block, x.shape)
        c = _carrier.carrier(x.dtype)
        bits = _carrier.to_bits(_carrier.flush(jnp.abs(x)), c)
        top, gap = blocks.maximum(bits), blocks.maximum(jnp.where(bits == 0, 0, c.uint(c.inf) - bits))
        largest = _carrier.from_bits(top, c)
        span = jnp.log2(largest / _carrier.from_bits(c.uint(c.inf) - gap, c))
        steps = jnp.floor(16 * math.log2(self.fmt.max**2 / 2) / jnp.maximum(span, 1))
        top, steps = once(top.astype(c.int), jnp.clip(steps, 1, 255).astype(c.int))
        largest, steps = _carrier.from_bits(top.astype(c.uint), c), steps.astype(jnp.uint8)
        ratio = jnp.abs(x) / blocks.spread(jnp.where(top == 0, 1, largest))
        power = jnp.exp(blocks.spread(steps.astype(c.float) / 16) * jnp.log(ratio))
        return ExpandedTensor(encode(jnp.copysign(power * self.fmt.max, x), self.fmt), largest, steps, self.block)

    def __call__(self, x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns what is left of x once stored."""
        return self.encode(x).decode()


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
        q, blocks = decode(self.values), _blocks(self.block, self.values.shape)
        root = blocks.spread(16 / self.steps.astype(q.dtype))
        power = jnp.exp(root * jnp.log(jnp.abs(q) / self.values.fmt.max))
        return jnp.copysign(power * blocks.spread(self.largest), q)


def _blocks(block: int, shape: tuple[int, ...]):
    return blocks_of(Scaled(FP32, FP32, block), shape, -1)


Storage = Quantizer | Expanded


def as_storage(storage: Storage | Format | str) -> Storage:
    """Returns a storage; a format or its name stands for rounding to nearest."""
    return storage if isinstance(storage, Quantizer | Expanded) else Quantizer(storage)


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
    q = encode(laid_out, storage.fmt, storage.rounding, saturate=storage.saturate, key=key)
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
