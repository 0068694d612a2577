"""Attention of unit variance."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from qjax.unit_scaling._linear import DotGeneral
from qjax.unit_scaling._scale import interpolate, scale_bwd, scale_fwd


def dot_product_attention(
    query: Inexact[Array, "*batch queries heads depth"],
    key: Inexact[Array, "*batch keys heads depth"],
    value: Inexact[Array, "*batch keys heads features"],
    bias: Inexact[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    is_causal: bool = False,
    mult: float = 1.0,
    precision: lax.PrecisionLike = None,
    dot_general: DotGeneral = lax.dot_general,
) -> Inexact[Array, "*batch queries heads features"]:
    """Returns ``softmax(mult query key^T / depth + bias) value / sigma``.

    With ``a = 1 / (1 + 4 depth / mult^2)``, sigma is ``sqrt(1 / keys)^(1 - a)``, with ``log(keys)`` in the place of the
    1 if causal: an average of independent values, more of them the flatter the softmax is. All three gradients are over
    the same sigma, so those of query and key are small, as their influence is, while that of value has deviation 1.

    Args:
      query, key, value: as for ``jax.nn.dot_product_attention``, with as many heads.
      bias, mask: broadcast to (*batch, heads, queries, keys); added to the logits, and where False they are left out. A
        mask does not change sigma.
      is_causal: whether a query sees the keys up to its own place alone.
      mult: the inverse temperature.
      precision, dot_general: as for ``matmul``; of both products. The softmax is in float32 at least.

    A query all of whose keys are masked gets the mean of all values. With one key the result is its value.

    Raises:
      ValueError: if the shapes do not fit.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> x = jnp.ones((1, 4, 2, 8), jnp.float32)
    >>> us.dot_product_attention(x, x, x).ravel()[:2]  # sqrt(4)^(32 / 33)
    Array([1.9584..., 1.9584...], dtype=float32)

    Source: Blake et al. (2024), u-muP, https://arxiv.org/abs/2407.17465, and the authors' library. Deviation: one
    causal key has sigma 1, where the formula has 0.
    """
    fits = query.ndim == key.ndim == value.ndim >= 3 and key.shape[:-1] == value.shape[:-1]
    if not fits or query.shape[:-3] + query.shape[-2:] != key.shape[:-3] + key.shape[-2:]:
        raise ValueError(
            "dot_product_attention: query, key and value must be (..., queries, heads, depth), "
            "(..., keys, heads, depth) and (..., keys, heads, features), "
            f"got {query.shape}, {key.shape} and {value.shape}."
        )
    depth, keys = query.shape[-1], key.shape[-3]
    flat = math.log(keys) / keys if is_causal and keys > 1 else 1 / keys
    scale = 1 / interpolate(1 / (1 + 4 * depth / mult**2), flat**0.5, 1)
    query, key, value = (scale_bwd(x, scale) for x in (query, key, value))

    sequence = query.ndim - 3
    batch = tuple(range(sequence))
    heads = (*batch, sequence + 1)
    numbers = (((sequence + 2,), (sequence + 2,)), (heads, heads))
    logits = dot_general(query, key, numbers, precision=precision)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) * (mult / depth)
    if bias is not None:
        logits += jnp.broadcast_to(bias, logits.shape).astype(logits.dtype)
    least = jnp.finfo(logits.dtype).min
    if is_causal:
        logits = jnp.where(jnp.broadcast_to(jnp.tri(*logits.shape[-2:], dtype=bool), logits.shape), logits, least)
    if mask is not None:
        logits = jnp.where(jnp.broadcast_to(mask, logits.shape), logits, least)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    numbers = (((sequence + 2,), (sequence,)), ((*batch, sequence), heads))
    out = dot_general(weights, value, numbers, precision=precision)
    return scale_fwd(jnp.swapaxes(out, -3, -2), scale)
