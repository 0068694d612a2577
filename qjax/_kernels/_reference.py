"""The sum of products by an ``Accumulator`` as a scan over chunks: what defines the numbers of every implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _carrier, _random
from qjax._accumulator import Accumulator, random_bits, register_of
from qjax._kernels._target import Target


def accumulate(lhs, rhs, accumulator: Accumulator, *, key=None, scales=None, products=None):
    """Returns the products of rows, ``(b, m, k) x (b, n, k) -> (b, m, n)``, summed by an accumulator, as float32.

    Args:
      lhs, rhs: elements: floats that float32 holds, or for a ``Fixed`` register integers.
      key: for a stochastic accumulator.
      scales: scales of what is promoted, ``(b, m, segments)`` and ``(b, n, segments)``, or None.
      products: the product of two chunks, ``(b, m, c) x (b, n, c) -> (b, m, n)``, in the dtype of the register's sums;
        by default that of float32 in full precision, or of int32.
    """
    register = register_of(accumulator)
    products = products or (lambda x, y: dot(x.astype(register.sums), y.astype(register.sums)))
    depth, shape = lhs.shape[-1], (*lhs.shape[:2], rhs.shape[1])
    chunk, segment, segments = divided(accumulator, depth)
    padded = [jnp.pad(x, [(0, 0), (0, 0), (0, segments * segment - depth)]) for x in (lhs, rhs)]
    # XLA's CPU backend slices bfloat16 as float32, twice the bytes.
    bits = [lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x for x in padded]

    def add_chunk(state, place):
        slices = (lax.dynamic_slice_in_dim(x, place * chunk, chunk, 2) for x in bits)
        pieces = (lax.bitcast_convert_type(x, y.dtype) for x, y in zip(slices, padded, strict=True))
        part = products(*pieces)
        # XLA makes a product of a dot of one term, and contracts that into the sum that follows.
        part = _carrier.apart(part) if register.sums == np.float32 and chunk == 1 else part
        words = None
        if key is not None:
            words = _random.random_words(jax.random.fold_in(key, place), shape, random_bits(accumulator), 32)
        return register.add(state, part, words), None

    def add_segment(total, number):
        places = number * (segment // chunk) + jnp.arange(segment // chunk)
        value = register.read(lax.scan(add_chunk, register.start(shape), places)[0])
        if scales is not None:
            x, y = (lax.dynamic_index_in_dim(s, number, 2, keepdims=False) for s in scales)
            value = _carrier.apart(value * x[:, :, None] * y[:, None, :])
        return total + value, None

    if segments == 1:
        return add_segment(jnp.float32(0), 0)[0]
    return lax.scan(add_segment, jnp.zeros(shape, jnp.float32), jnp.arange(segments))[0]


def divided(accumulator: Accumulator, depth: int) -> tuple[int, int, int]:
    """Returns how a contraction is divided: the length of chunks, that of segments, and how many segments there are."""
    chunk = accumulator.chunk
    segment = accumulator.promote or max(-(-depth // chunk) * chunk, chunk)
    if register_of(accumulator).sums == np.int32 and not accumulator.watches:
        chunk = segment  # sums modulo 2^32 do not depend on their order
    return chunk, segment, max(-(-depth // segment), 1)


# Of rows, columns and products that XLA does not pad on a GPU.
EVEN = 16


def is_trusted(dtype, *sizes: int) -> bool:
    """Returns whether XLA multiplies operands of these sizes exactly.

    With some of its kernels for GPUs what it pads comes out doubled in int8, and of rounded products in bfloat16 (seen
    with jax 0.11.2 on an H200).
    """
    narrow = dtype in (np.int8, jnp.bfloat16) and Target.current().platform == "gpu"
    return not narrow or all(n % EVEN == 0 for n in sizes)


def dot(x, y):
    """Returns the products of rows, in float32 in full precision or in int32."""
    if not is_trusted(x.dtype, x.shape[1], y.shape[1], x.shape[2]):
        whole = [jnp.pad(z, [(0, 0), *((0, -n % EVEN) for n in z.shape[1:])]) for z in (x, y)]
        return dot(*whole)[:, : x.shape[1], : y.shape[1]]
    total = np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else np.float32
    options: dict[str, Any] = dict(precision=lax.Precision.HIGHEST, preferred_element_type=total)
    if len(x) == 1:  # the CPU multiplies bfloat16 only where there is no batch
        return lax.dot_general(x[0], y[0], (((1,), (1,)), ((), ())), **options)[None]
    return lax.dot_general(x, y, (((2,), (2,)), ((0,), (0,))), **options)
