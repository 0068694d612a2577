"""The kernels for Hopper GPUs: what they take, and operands brought to their tiles."""

import jax.numpy as jnp
import numpy as np

from qjax import _carrier
from qjax._accumulator import Accumulator, register_of
from qjax._kernels import _gpu_sums, _gpu_tensor, _reference
from qjax._kernels._gpu_plan import Tiles, fitting, plan, unit
from qjax._kernels._target import Target

# In each of them a product is exact in bfloat16.
_EIGHT_BITS = (np.dtype(np.int8), np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2))
_CARRIERS = (np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.int16), *_EIGHT_BITS)


def accumulate(
    lhs, rhs, accumulator: Accumulator, *, key=None, scales=None, tiles: Tiles | None = None, interpret=None
):
    """Returns the products of rows, ``(b, m, k) x (b, n, k) -> (b, m, n)``, summed by an accumulator, as float32.

    Integers are exact, and floats wherever float32 holds the sums of chunks: the tensor cores sum in another order,
    and those of 8-bit floats keep fewer bits than float32 does.

    Args:
      lhs, rhs: elements, of which ``refusal`` is None.
      key: for a stochastic accumulator.
      scales: scales of what is promoted, ``(b, m, segments)`` and ``(b, n, segments)``, or None.
      tiles: None for those of ``fitting``.
      interpret: ``InterpretGPUParams``, to run without a GPU.
    """
    lhs, rhs = _in_carriers(lhs, rhs, accumulator)
    (b, m, depth), n = lhs.shape, rhs.shape[1]
    if 0 in (b, m, n):
        return jnp.zeros((b, m, n), jnp.float32)
    halves = lhs.dtype == np.int16
    bits = 8 if halves else 8 * lhs.dtype.itemsize
    steps = plan(accumulator, depth, bits, 128 if tiles is None else tiles.bytes)
    tiles = tiles or fitting(steps, accumulator, halves)
    counts = b, _up(m, tiles.rows), _up(n, tiles.columns)
    lhs, rhs = (_padded(x, count, steps.steps * steps.depth) for x, count in zip((lhs, rhs), counts[1:], strict=True))
    products = (
        _gpu_tensor.by_halves(lhs, rhs, steps)
        if halves
        else _gpu_tensor.direct(lhs, rhs, register_of(accumulator).sums)
    )
    inner = scales if steps.holds_total else None
    if inner is not None:
        inner = tuple(_padded(s, count, steps.segments) for s, count in zip(inner, counts[1:], strict=True))
    options = {"counts": counts, "strides": (m * n, n, 1), "key": key, "scales": inner, "interpret": interpret}
    result = _gpu_sums.accumulate(products, accumulator, steps, tiles, **options)[:, :m, :n]
    if scales is None or inner is not None:
        return result
    return 0 + _carrier.apart(result * scales[0] * jnp.swapaxes(scales[1], 1, 2))


def refusal(lhs, rhs, accumulator: Accumulator, *, scales=None) -> str | None:
    """Returns why the operands, arrays or their shapes, cannot be multiplied by a kernel on the target, or None."""
    target = Target.current()
    if not target.is_hopper:
        return f"the kernels for GPUs need a Hopper GPU (H100, H200), and this is {target.kind!r}"
    return unsuited(lhs, rhs, accumulator)


def unsuited(lhs, rhs, accumulator: Accumulator) -> str | None:
    """Returns why the operands cannot be multiplied by a kernel, or None."""
    x, y = np.dtype(lhs.dtype), np.dtype(rhs.dtype)
    for dtype in (x, y):
        if dtype == np.float32:
            return "the tensor cores would round float32 operands to TF32; take a dtype of at most 16 bits"
        if jnp.issubdtype(dtype, jnp.unsignedinteger):
            return f"the tensor cores would read {dtype.name} operands as signed; take int8 or int16"
        if dtype not in _CARRIERS:
            return f"the tensor cores of Hopper take no {dtype.name} operands"
    are_integers = [jnp.issubdtype(dtype, jnp.integer) for dtype in (x, y)]
    if x != y and (any(are_integers) or not all(dtype in _EIGHT_BITS for dtype in (x, y))):
        return f"the operands are {x.name} and {y.name}; take one dtype, or two of 8-bit floats"
    is_integer = register_of(accumulator).sums == np.int32
    if is_integer and not all(are_integers):
        return f"a Fixed register sums integers, and the operands are {x.name}"
    if not is_integer and x == np.int16:
        return "int16 operands need a Fixed register"
    chunk, segment, _ = _reference.divided(accumulator, lhs.shape[-1])
    if chunk % 16 and not (chunk == segment >= lhs.shape[-1]):
        return f"the tensor cores sum 16 products at a time, and chunk is {accumulator.chunk}; take a multiple of 16"
    if chunk % 32 and x == np.int16 and not (chunk == segment >= lhs.shape[-1]):
        return f"int16 products are summed 32 at a time, and chunk is {accumulator.chunk}; take a multiple of 32"
    if accumulator.is_stochastic and lhs.shape[0] * lhs.shape[1] * rhs.shape[1] > 2**32:
        return "a stochastic register counts the entries of the result in 32 bits, and there are more"
    return None


def _in_carriers(lhs, rhs, accumulator: Accumulator):
    """Returns the operands, as bfloat16 where chunks are shorter than what 8-bit products are summed by."""
    chunk, segment, segments = _reference.divided(accumulator, lhs.shape[-1])
    if lhs.dtype in _EIGHT_BITS and chunk % unit(8) and not (segments == 1 and chunk == segment):
        return lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
    return lhs, rhs


def _padded(x, rows: int, depth: int):
    """Returns x with zeros up to ``(b, rows, depth)``."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, depth - x.shape[2])))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
