"""``matmul`` on arrays and ``QTensor``s, with the implementation named, or the best that runs here."""

import dataclasses
import math

import jax
from jax import lax
from jaxtyping import Array

from qjax import _packing
from qjax._accumulated import coded
from qjax._accumulator import Accumulator
from qjax._blocks import Rows, levels
from qjax._dot import linear
from qjax._encode import QTensor
from qjax._kernels._accumulate import IMPLEMENTATIONS, Implementation, kernels_for
from qjax._kernels._target import is_alone
from qjax._quantizer import Quantizer
from qjax._recipe import Gemm, Recipe
from qjax._stored import Axes

__all__ = ["k_major", "matmul"]


def matmul(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    gemm: Gemm | None = None,
    *,
    key: Array | None = None,
    preferred_element_type=None,
    implementation: Implementation | None = None,
) -> Array:
    """Returns ``lhs @ rhs``, ``(..., k) x (k, n) -> (..., n)``, its operands rounded and summed as a ``Gemm`` says.

    It is ``qjax.dot_general`` with the implementation named:

    - "reference": plain JAX that defines the numbers: operands in float32 (int32 for a ``Fixed`` register), products in
      full precision, chunk after chunk in a scan.
    - "xla": the same, in the narrowest dtypes that hold the operands exactly; int16 by four int8 products.
    - "pallas": a Mosaic kernel, on TPUs and on Hopper GPUs (jax >= 0.11.2): registers stay on the chip, weights that
      are stored in 4 or 8 bits (``k_major``) are decoded there, floats that the Gemm rounds to an elementwise format
      are rounded there.
    - None: "pallas" where it can run and XLA is slower (an accumulator, stored weights), on one device or within a
      ``jax.shard_map`` over all axes of the mesh; else "xla".

    Integer sums and sums that float32 holds exactly are the same bits in all of them. Else the sums within a chunk (all
    of the contraction where there is no accumulator) may be in another order: each is within ``k 2^-24 sum |x| |y|`` of
    the exact one, k the number of its terms, and the register rounds it as it says.

    Args:
      lhs: float32, bfloat16 or float16, or a ``QTensor`` with blocks along the last axis.
      rhs: likewise, of two axes, with blocks along the first.
      gemm: what is rounded, None for nothing; a ``QTensor`` counts as rounded to its format.
      key: the PRNG key of a stochastic Gemm.
      preferred_element_type: the dtype of the result, by default that of ``lax.dot_general``; a QTensor counts as
        what the other operand is.

    Gradient: ``g @ rhs.T`` and ``lhs.T @ g`` by lax, straight through all rounding, with the values of QTensors, which
    get none.

    Raises:
      ValueError: for an implementation that is none, shapes that do not fit, a Gemm that rounds a QTensor again.
      NotImplementedError: if "pallas" is named and cannot run here, with the reason.
      TypeError, ValueError: as ``dot_general`` does.

    >>> import jax.numpy as jnp, qjax
    >>> x, w = jnp.ones((2, 256), jnp.bfloat16), jnp.full((256, 8), 0.5, jnp.float32)
    >>> weights = qjax.kernels.k_major(qjax.encode(w, "int4_g128", axis=0))
    >>> qjax.kernels.matmul(x, weights).shape, weights.codes.shape
    ((2, 8), (8, 128))
    >>> register = qjax.Gemm(accumulator=qjax.Accumulator("e5m2", chunk=64))
    >>> float(qjax.kernels.matmul(x, w.astype(jnp.bfloat16), register)[0, 0])
    128.0
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"matmul: implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))} or None, "
            f"got {implementation!r}."
        )
    if len(rhs.shape) != 2 or not lhs.shape or lhs.shape[-1] != rhs.shape[0]:
        raise ValueError(f"matmul: shapes must be (..., k) and (k, n), got {lhs.shape} and {rhs.shape}.")
    gemm = gemm or Gemm()
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        if isinstance(x, QTensor):
            if getattr(gemm, name) is not None:
                raise ValueError(f"matmul: {name} is a QTensor, and the Gemm rounds it again; leave its {name} out.")
            gemm = dataclasses.replace(gemm, **{name: Quantizer(x.fmt)})
    if isinstance(rhs, QTensor):
        rhs = dataclasses.replace(rhs, dtype=lhs.dtype)
    elif isinstance(lhs, QTensor):
        lhs = dataclasses.replace(lhs, dtype=rhs.dtype)
    gemm, implementation = _summed(lhs, rhs, gemm, implementation)
    precision = lax.Precision.HIGHEST if implementation == "reference" else None
    options = dict(dimension_numbers=(((len(lhs.shape) - 1,), (0,)), ((), ())), precision=precision)
    options |= dict(preferred_element_type=preferred_element_type, out_sharding=None)
    return linear("matmul", lax.dot_general, lhs, rhs, options, Recipe(gemm), key, None, implementation)


def _summed(lhs, rhs, gemm: Gemm, implementation: Implementation | None) -> tuple[Gemm, Implementation | None]:
    """Returns a Gemm without an accumulator with that of the kernel which computes it, if one is to, and which is to.

    Its sums are float32's, group after group where groups of weights have a scale.
    """
    if gemm.accumulator is not None or implementation in ("reference", "xla"):
        return gemm, implementation
    codes = coded(rhs, _AXES) if isinstance(rhs, QTensor) else None
    block = levels(rhs.fmt)[0].block if codes is not None and levels(rhs.fmt) else None
    group = block if isinstance(block, int) else None
    accumulator = Accumulator("fp32", chunk=group or 128, promote=group)
    if implementation is None:
        if codes is None or not is_alone():
            return gemm, None
        rows = jax.ShapeDtypeStruct((1, math.prod(lhs.shape[:-1]), lhs.shape[-1]), lhs.dtype)
        if isinstance(kernels_for(rows, codes, accumulator, None), str):
            return gemm, None
    return dataclasses.replace(gemm, accumulator=accumulator), "pallas"


_AXES = Axes((0,), (), (1,))


def k_major(q: QTensor) -> QTensor:
    """Returns stored weights ``(k, n)`` with the codes of each output together, packed along k, as kernels read them.

    The values are the same bits, and so are all products. Codes that are in rows already are returned as they are.

    Args:
      q: of two axes, with blocks along the first, as ``encode(w, fmt, axis=0)`` and ``quantize_params`` make it.

    Raises:
      ValueError: for another number of axes, for blocks along the last axis, and for tiles.

    >>> import jax.numpy as jnp, qjax
    >>> q = qjax.encode(jnp.ones((64, 3), jnp.float32), "mxfp4", axis=0)
    >>> q.codes.shape, qjax.kernels.k_major(q).codes.shape
    ((64, 2), (3, 32))
    """
    if len(q.shape) != 2:
        raise ValueError(f"k_major: a weight has two axes, (k, n), got the shape {q.shape}.")
    if q.rows is not None:
        return q
    blocks = [level.block for level in levels(q.fmt)]
    if any(isinstance(block, tuple) for block in blocks) or (any(b is not None for b in blocks) and q.axis != -2):
        raise ValueError(
            f"k_major: blocks must lie along the first axis, over which a product contracts, got {q.fmt!r} with blocks "
            f"along axis {q.axis}; encode with axis=0 and no tiles."
        )
    return dataclasses.replace(_transposed(q), axis=-1, rows=Rows(q.shape, (1, 0)))


def _transposed(q: QTensor) -> QTensor:
    codes = _packing.pack(q.unpacked().T, q.element.bits)
    scales, zero_points = (tuple(map(_transposed, parts)) for parts in (q.scales, q.zero_points))
    return dataclasses.replace(q, codes=codes, scales=scales, zero_points=zero_points, length=q.shape[0])
