"""The kernels for Hopper GPUs: what they take, and operands brought to their tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qjax import _carrier, _operand
from qjax._accumulator import Accumulator, register_of
from qjax._kernels import _gpu_codes, _gpu_registers, _gpu_sums, _gpu_tensor, _operands, _reference
from qjax._kernels._gpu_plan import DENSE, WEIGHTS, Plan, Tiles, fitting, plan, unit
from qjax._kernels._gpu_sums import Load, Products
from qjax._kernels._operands import Coded, Unrounded
from qjax._kernels._target import Target
from qjax._kernels._tiles import tiles_for, whole
from qjax.formats import Codebook

# Those of the tensor cores in which products are exact in bfloat16 too.
_EIGHT_BITS = (np.dtype(np.int8), np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2))
_CARRIERS = (np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.int16), *_EIGHT_BITS)


@functools.partial(jax.jit, static_argnames=("accumulator", "tiles", "interpret"))
def accumulate(
    lhs, rhs, accumulator: Accumulator, *, key=None, scales=None, tiles: Tiles | None = None, interpret=None
):
    """Returns the products of rows, ``(b, m, k) x (b, n, k) -> (b, m, n)``, summed by an accumulator, as float32.

    Integers are exact, and floats wherever float32 holds the sums of chunks: the tensor cores sum in another order,
    and those of 8-bit floats keep fewer bits than float32 does.

    Args:
      lhs, rhs: elements, of which ``refusal`` is None; lhs may be ``Unrounded``, rhs ``Coded``.
      key: for a stochastic accumulator.
      scales: scales of what is promoted, ``(b, m, segments)`` and ``(b, n, segments)``, or None.
      tiles: None for those of the table, or else of ``fitting``.
      interpret: ``InterpretGPUParams``, to run without a GPU.
    """
    (b, m, depth), n = lhs.shape, rhs.shape[1]
    if 0 in (b, m, n):
        return jnp.zeros((b, m, n), jnp.float32)
    if isinstance(rhs, Coded) and isinstance(lhs, Unrounded):
        lhs = lhs.elements.astype(jnp.bfloat16)
    if not isinstance(rhs, Coded) and not isinstance(lhs, Unrounded):
        lhs, rhs = _in_carriers(lhs, rhs, accumulator)
    dtype = _multiplied(lhs, rhs)
    bits = 8 if dtype == np.int16 else 8 * dtype.itemsize
    found = tiles_for(lhs, rhs, accumulator) if tiles is None else None
    tiles = Tiles(*found) if found else tiles
    # The operand that is made in registers is the first of the tensor cores, whose tiles have 64 rows: the weights.
    is_turned = isinstance(rhs, Coded)
    # A codebook's terms take more registers.
    most = WEIGHTS if is_turned and not isinstance(rhs.fmt, Codebook) else DENSE
    steps = plan(accumulator, depth, bits, tiles.bytes if tiles else most)
    rows, columns = (n, m) if is_turned else (m, n)
    if tiles is None:
        is_made = is_turned or isinstance(lhs, Unrounded)
        more = 2 if dtype == np.int16 or (is_turned and isinstance(rhs.fmt, Codebook)) else int(is_made)
        weights = rhs.fmt if is_turned else None
        tiles = fitting(steps, accumulator, (b, rows, columns), more=more, weights=weights)
    steps = steps.split(tiles.splits)
    rows, columns = whole(rows, tiles.rows), whole(columns, tiles.columns)
    products = _products(lhs, rhs, rows, columns, steps, register_of(accumulator).sums, interpret is not None)
    inner = None
    if scales is not None and steps.holds_total:
        of_rows, of_columns = scales[::-1] if is_turned else scales
        count = steps.segments * steps.splits
        inner = _padded(of_rows, rows, count), _padded(of_columns, columns, count)
    strides = (m * n, 1, n) if is_turned else (m * n, n, 1)
    result = _gpu_sums.accumulate(
        products,
        accumulator,
        steps,
        tiles,
        counts=(b, rows, columns),
        strides=strides,
        key=key,
        scales=inner,
        interpret=interpret,
    )
    result = jnp.swapaxes(result[:, :n, :m], 1, 2) if is_turned else result[:, :m, :n]
    if scales is None or inner is not None:
        return result
    return 0 + _carrier.apart(result * scales[0] * jnp.swapaxes(scales[1], 1, 2))


def _products(lhs, rhs, rows: int, columns: int, steps: Plan, sums: type, interpreted: bool) -> Products:
    """Returns the products of operands, padded to whole tiles."""
    depth = steps.whole
    if isinstance(rhs, Coded):
        codes = Load(_gpu_codes.read(rhs, rows, depth), False)
        make = functools.partial(_gpu_codes.terms, fmt=rhs.fmt)
        return _gpu_registers.made(make, codes, Load(_padded(lhs, columns, depth), True), interpreted)
    if isinstance(lhs, Unrounded):
        quantizer, dtype = lhs.quantizer, rhs.dtype
        x = Load(_padded(lhs.x, rows, depth), False)
        y = Load(_padded(rhs, columns, depth), True)
        return _gpu_registers.made(lambda x: [_operands.rounded(x, quantizer).astype(dtype)], x, y, interpreted)
    lhs, rhs = _padded(lhs, rows, depth), _padded(rhs, columns, depth)
    return _gpu_tensor.by_halves(lhs, rhs, steps) if lhs.dtype == np.int16 else _gpu_tensor.direct(lhs, rhs, sums)


def refusal(lhs, rhs, accumulator: Accumulator, *, scales=None) -> str | None:
    """Returns why the operands, arrays or their shapes, cannot be multiplied by a kernel on the target, or None."""
    target = Target.current()
    if not target.is_hopper:
        return f"the kernels for GPUs need a Hopper GPU (H100, H200), and this is {target.kind!r}"
    return unsuited(lhs, rhs, accumulator)


def unsuited(lhs, rhs, accumulator: Accumulator) -> str | None:
    """Returns why the operands cannot be multiplied by a kernel, or None."""
    if isinstance(rhs, Coded) and _gpu_codes.dtype_of(rhs.fmt) is None:
        return f"codes of {rhs.fmt!r} are not decoded in the kernels for GPUs; take a 4-bit format, int8, e4m3 or e5m2"
    if isinstance(lhs, Unrounded) and _operand.narrow_float(lhs.quantizer.fmt) != jnp.bfloat16:
        return f"values of {lhs.quantizer.fmt!r} do not fit bfloat16, in which they would be multiplied"
    if isinstance(rhs, Coded) or isinstance(lhs, Unrounded):
        plain = rhs.dtype if isinstance(lhs, Unrounded) and not isinstance(rhs, Coded) else None
        plain = lhs.dtype if not isinstance(lhs, Unrounded) else plain
        if plain not in (None, jnp.bfloat16):
            return f"an operand made in the kernel is multiplied by bfloat16, and the other is {np.dtype(plain).name}"
        x = y = np.dtype(jnp.bfloat16)
    else:
        x, y = np.dtype(lhs.dtype), np.dtype(rhs.dtype)
    return _unsuited_dtypes(x, y, accumulator) or _unsuited_depth(lhs, rhs, x, accumulator)


def _unsuited_dtypes(x: np.dtype, y: np.dtype, accumulator: Accumulator) -> str | None:
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
    return None


def _unsuited_depth(lhs, rhs, dtype: np.dtype, accumulator: Accumulator) -> str | None:
    chunk, segment, _ = _reference.divided(accumulator, lhs.shape[-1])
    least = 32 if dtype == np.int16 or (isinstance(rhs, Coded) and rhs.fmt.bits == 4) else 16
    if chunk % least and not chunk == segment >= lhs.shape[-1]:
        return (
            f"the tensor cores sum {least} products of {dtype.name} at a time, and chunk is {accumulator.chunk}; take "
            f"a multiple of {least}"
        )
    if accumulator.is_stochastic and lhs.shape[0] * lhs.shape[1] * rhs.shape[1] > 2**32:
        return "a stochastic register counts the entries of the result in 32 bits, and there are more"
    return None


def _multiplied(lhs, rhs) -> np.dtype:
    """Returns the dtype that the tensor cores multiply, or int16."""
    return np.dtype(rhs.dtype if isinstance(lhs, Unrounded) else lhs.dtype)


def _in_carriers(lhs, rhs, accumulator: Accumulator):
    """Returns the operands, as bfloat16 where chunks are shorter than what 8-bit products are summed by."""
    chunk, segment, segments = _reference.divided(accumulator, lhs.shape[-1])
    if lhs.dtype in _EIGHT_BITS and chunk % unit(8) and not (segments == 1 and chunk == segment):
        return lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
    return lhs, rhs


def _padded(x, rows: int, depth: int):
    """Returns x with zeros up to ``(b, rows, depth)``."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, depth - x.shape[2])))
