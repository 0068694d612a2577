"""``Hadamard``: block rotations that spread outliers before rounding."""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from qjax import _carrier


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hadamard:
    """The rotation ``x diag(signs) H / sqrt(size)`` of every block of ``size`` along an axis; H is Sylvester's matrix.

    H is symmetric and orthogonal up to its norm, so two operands that are rotated along the axis they are contracted
    over have the same product as before, but for rounding.

    Args:
      size: the length of a block, a power of two; it must divide the axis.
      signs: +1 or -1 for each place in a block; "random" to draw them from the key; None for ones.

    Raises:
      ValueError: if the size is no power of two, or the signs do not fit it.

    >>> import jax.numpy as jnp, qjax
    >>> h = qjax.Hadamard(4)
    >>> h(jnp.array([1.0, 0.0, 0.0, 0.0], jnp.float32))
    Array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    >>> h.inverse(h(jnp.array([4.0, 2.0, 0.0, 8.0], jnp.float32)))
    Array([4., 2., 0., 8.], dtype=float32)

    The sums are those of the fast transform, the nearest partners first, in float32 for bfloat16 and float16.

    Sources: Tseng et al. (2024), QuIP#, https://arxiv.org/abs/2402.04396, section 3 (randomized); Ashkboos et al.
    (2025), HALO, https://arxiv.org/abs/2501.02625 (in training).
    """

    size: int
    signs: tuple[int, ...] | Literal["random"] | None = None

    def __post_init__(self):
        if self.size < 1 or self.size & (self.size - 1):
            raise ValueError(f"Hadamard: size must be a power of two, got {self.size}.")
        if isinstance(self.signs, tuple) and (len(self.signs) != self.size or set(self.signs) - {1, -1}):
            raise ValueError(f"Hadamard: signs must be {self.size} numbers of 1 and -1, got {self.signs}.")

    @property
    def is_stochastic(self) -> bool:
        """Whether it needs a key."""
        return self.signs == "random"

    def __call__(
        self, x: Inexact[Array, "*shape"], *, axis: int = -1, key: Array | None = None
    ) -> Inexact[Array, "*shape"]:
        """Returns x rotated along an axis.

        Raises:
          ValueError: if the size does not divide the axis, or a key is missing.
        """
        return _transformed(x * self._signs(x, axis, key), self.size, axis)

    def inverse(
        self, x: Inexact[Array, "*shape"], *, axis: int = -1, key: Array | None = None
    ) -> Inexact[Array, "*shape"]:
        """Returns x rotated back along an axis.

        Raises:
          ValueError: if the size does not divide the axis, or a key is missing.
        """
        return _transformed(x, self.size, axis) * self._signs(x, axis, key)

    def _signs(self, x, axis: int, key):
        length = x.shape[axis]
        if length % self.size:
            raise ValueError(
                f"Hadamard: axis {axis} has {length} elements, not a multiple of the size {self.size}; "
                "take a smaller size, or pad the axis."
            )
        if self.signs == "random":
            if key is None:
                raise ValueError("Hadamard: random signs need key=jax.random.key(...), got none.")
            signs = jax.random.rademacher(key, (self.size,), jnp.int8).astype(x.dtype)
        else:
            signs = jnp.asarray(self.signs or (1,) * self.size, x.dtype)
        shape = [1] * x.ndim
        shape[axis] = length
        return jnp.tile(signs, length // self.size).reshape(shape)


@functools.partial(jax.jit, static_argnames=("size", "axis"), inline=True)
def _transformed(x, size: int, axis: int):
    axis %= x.ndim
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    dtype, x = x.dtype, _carrier.widen(x)
    half = 1
    while half < size:
        pairs = x.reshape(*before, length // (2 * half), 2, half, *after)
        first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
        x = jnp.stack([first + second, first - second], axis=axis + 1).reshape(x.shape)
        half *= 2
    return _carrier.apart(x * jnp.asarray(1 / math.sqrt(size), x.dtype)).astype(dtype)
