"""``Faults``: bits of stored codes that are wrong, by chance or for good."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qjax import _packing, _random
from qjax._encode import QTensor


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Faults:
    """Bits of the codes of elements that are wrong: soft errors, or cells that are stuck.

    Each chosen bit of each element is struck with the probability ``rate``, independently of all others. Which ones
    follows from the key (or the seed), the place of the element in its array and the bit: so the same key strikes the
    same bits, and a larger rate strikes them and others. Codes of scales and zero points are left alone.

    Args:
      rate: the probability, 0 to 1; met to 2^-32.
      bits: which bits can be struck, counted from 0, the lowest, to ``bits - 1`` of the element's format: the sign, if
        it has one. None for all.
      kind: "flip" inverts what is struck (a soft error); "stuck_at_0" and "stuck_at_1" set it to 0 or 1.
      seed: None to strike other bits with each key, as soft errors do; or an integer that says which, with no key: then
        it is the same bits in every call and in all arrays of a shape, as in a faulty memory.

    Raises:
      ValueError: if an argument is out of range.

    >>> import jax, jax.numpy as jnp, qjax
    >>> top = qjax.Quantizer("int8", faults=qjax.Faults(0.5, bits=(6,)))
    >>> top(jnp.arange(8, dtype=jnp.float32), key=jax.random.key(0))
    Array([ 0.,  1., 66., 67.,  4., 69., 70.,  7.], dtype=float32)
    """

    rate: float
    bits: tuple[int, ...] | None = None
    kind: Literal["flip", "stuck_at_0", "stuck_at_1"] = "flip"
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.rate <= 1:
            raise ValueError(f"Faults: rate must be a probability from 0 to 1, got {self.rate}.")
        if self.kind not in ("flip", "stuck_at_0", "stuck_at_1"):
            raise ValueError(f"Faults: kind must be 'flip', 'stuck_at_0' or 'stuck_at_1', got {self.kind!r}.")
        if self.bits is not None:
            bits = tuple(self.bits)
            if not bits or len(set(bits)) < len(bits) or min(bits) < 0:
                raise ValueError(f"Faults: bits must be different places from 0, the lowest bit, got {self.bits!r}.")
            object.__setattr__(self, "bits", bits)

    @property
    def is_stochastic(self) -> bool:
        """Whether they need a key."""
        return self.seed is None

    def strike(self, q: QTensor, *, key: Array | None = None) -> tuple[QTensor, Array]:
        """Returns q with these faults, and how many bits they changed (int32).

        A bit that is stuck at what it was is not counted. The codes may then stand for what rounding never gives: NaN,
        infinity, the lowest integer of a symmetric range, an unused entry of a codebook (NaN).

        Raises:
          ValueError: if the format has no such bit; for a missing key, and for one that the seed leaves unused.

        >>> import jax, jax.numpy as jnp, qjax
        >>> q = qjax.encode(jnp.ones(1000, jnp.float32), "e4m3")
        >>> struck, changed = qjax.Faults(0.01, bits=(7,)).strike(q, key=jax.random.key(0))
        >>> int(changed) == int((qjax.decode(struck) == -1).sum())
        True
        """
        width = q.element.bits
        places = tuple(range(width)) if self.bits is None else self.bits
        if max(places) >= width:
            raise ValueError(
                f"Faults: bit {max(places)} does not exist in {q.element!r}, which has bits 0 to {width - 1}."
            )
        if (key is None) == self.is_stochastic:
            need = "without a seed they need key=jax.random.key(...)" if key is None else "with a seed they take no key"
            raise ValueError(f"Faults: {need}.")
        drawn = jax.random.key(self.seed or 0) if key is None else key
        codes = q.unpacked()
        dtype = codes.dtype
        mask = jnp.zeros(codes.shape, dtype)
        threshold = math.floor(self.rate * 2**32)
        for place in places if threshold else ():
            words = _random.random_words(jax.random.fold_in(drawn, place), codes.shape, 32, 32)
            struck = words <= np.uint32(threshold - 1)
            mask = mask | jnp.where(struck, dtype.type(1 << place), dtype.type(0))
        struck = {"flip": codes ^ mask, "stuck_at_0": codes & ~mask, "stuck_at_1": codes | mask}[self.kind]
        changed = jnp.sum(jax.lax.population_count(codes ^ struck).astype(jnp.int32), dtype=jnp.int32)
        packed = _packing.pack(jnp.atleast_1d(struck), width)
        return dataclasses.replace(q, codes=packed), changed
