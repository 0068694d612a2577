"""Random bits for stochastic rounding: a counter-based generator of a few integer operations an element."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._elementwise import elementwise
from qjax._split import Split

# Of Threefry-2x32: Salmon et al. (2011), Parallel random numbers, https://doi.org/10.1145/2063384.2063405, table 2.
_TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Whitened(NamedTuple):
    """A key as the words that it contributes: eight of ``key_words``."""

    words: jax.Array


def key_words(key, count: int = 4) -> jax.Array:
    """Returns the words that a PRNG key contributes, whitened by its own generator: ``jax.random.bits``.

    For JAX's default generator without its loop, which takes as long to compile as all else that rounding does.
    """
    if isinstance(key, Whitened):
        return key.words[:count]
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.bits(key, (count,), jnp.uint32)
    first, second = (lax.broadcast(word, (count,)) for word in jax.random.key_data(key))
    return elementwise(_threefry, first, second, lax.iota(jnp.uint32, count))


def _threefry(first, second, counter):
    """Returns the halves, XORed, of Threefry-2x32 of the counter (0, ``counter``) with a key of two words."""
    schedule = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    left, right = schedule[0], counter + schedule[1]
    for i in range(5):
        for turn in _TURNS[i % 2]:
            left = left + right
            right = (right << turn | right >> (32 - turn)) ^ left
        left, right = left + schedule[(i + 1) % 3], right + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return left ^ right


def counter_bits(words, low, high=None):
    """Returns 32 random bits for each counter.

    The counter times a keyed odd number, plus a keyed word, goes through two multiply-xorshift rounds.

    Args:
      words: four words of ``key_words``.
      low: uint32 array of counters.
      high: uint32 array of their upper words, or None for 0.
    """
    state = low * (words[0] | np.uint32(1)) + words[1]
    if high is not None:
        state = state + high * (words[2] | np.uint32(1))
    state = (state ^ (state >> 16)) * np.uint32(0x7FEB352D)
    state = (state ^ (state >> 15) ^ words[3]) * np.uint32(0x846CA68B)
    return state ^ (state >> 16)


def counters(shape: tuple[int, ...], split: Split = ()):
    """Returns the row-major index of every element as uint32, and its upper word where there are over 2^32 elements.

    Args:
      shape: of the array, or of its part on a device ...
      split: ... where it is split like this. The index is that in the whole.
    """
    whole = list(shape)
    for axis, names in enumerate(split):
        whole[axis] *= lax.axis_size(names) if names else 1
    upper = len(shape)
    while upper and math.prod(whole[upper - 1 :]) <= 2**32:
        upper -= 1

    def index(axes):
        total = jnp.zeros(shape, jnp.uint32)
        stride = 1
        for axis in reversed(axes):
            place = lax.broadcasted_iota(jnp.uint32, shape, axis)
            if split and split[axis]:
                place = place + lax.axis_index(split[axis]).astype(jnp.uint32) * np.uint32(shape[axis])
            total = total + place * np.uint32(stride % 2**32)
            stride *= whole[axis]
        return total

    return index(range(upper, len(shape))), index(range(upper)) if upper else None


def random_words(key, shape: tuple[int, ...], bits: int, width: int, split: Split = ()):
    """Returns unsigned words of ``width`` bits (32 or 64) whose upper ``bits`` bits are random and the rest zero.

    The same bits however the array is tiled or sharded: they depend on the key and on the index of the element alone,
    under ``shard_map`` on that in the whole if ``split`` says how it is split.
    """
    words = key_words(key, 4 * width // 32)
    low, high = counters(shape, split)
    drawn = counter_bits(words[:4], low, high)
    if width == 64:
        other = counter_bits(words[4:], low, high)
        drawn = drawn.astype(jnp.uint64) << 32 | other.astype(jnp.uint64)
    return upper(drawn, bits)


def upper(words, bits: int):
    """Returns words with all but their upper ``bits`` bits zero."""
    lower = words.dtype.itemsize * 8 - bits
    return words if lower == 0 else words >> lower << lower
