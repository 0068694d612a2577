"""Normalisation and embedding: what has unit variance by itself, with unit gradients of the parameters."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Integer

from qjax.unit_scaling._scale import scale_bwd


def layer_norm(
    x: Inexact[Array, "*batch features"],
    scale: Inexact[Array, " features"] | None = None,
    bias: Inexact[Array, " features"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Inexact[Array, "*batch features"]:
    """Returns ``(x - mean) / sqrt(variance + epsilon) * scale + bias`` along the last axis.

    The gradients of scale and bias are over the root of the number of rows; that of x is as it is.

    Args:
      x: of any float dtype, which is also that of the result; one feature alone, or a constant row, gives 0.
      scale, bias: by default 1 and 0.
      epsilon: as for ``flax.linen.LayerNorm``.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> [f"{v:.3f}" for v in us.layer_norm(jnp.array([1.0, 3.0], jnp.float32))]
    ['-1.000', '1.000']

    Source: Blake, Orr, Luschi (2023), https://arxiv.org/abs/2303.11257, section 4.
    """
    return _affine(jax.nn.standardize(x, epsilon=epsilon), scale, bias)


def rms_norm(
    x: Inexact[Array, "*batch features"], scale: Inexact[Array, " features"] | None = None, *, epsilon: float = 1e-6
) -> Inexact[Array, "*batch features"]:
    """Returns ``x / sqrt(mean(x^2) + epsilon) * scale`` along the last axis.

    The gradient of scale is over the root of the number of rows; that of x is as it is.

    Args:
      x: of any float dtype, which is also that of the result; a row of zeros gives zeros.
      scale: by default 1.
      epsilon: as for ``flax.linen.RMSNorm``.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.rms_norm(jnp.array([3.0, 4.0], jnp.float32))
    Array([0.84852..., 1.13137...], dtype=float32)

    Source: as ``layer_norm``.
    """
    return _affine(x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon), scale, None)


def _affine(x, scale, bias):
    factor = (x.shape[-1] / x.size) ** 0.5
    if scale is not None:
        x = x * jnp.broadcast_to(scale_bwd(scale, factor), x.shape)
    return x if bias is None else x + jnp.broadcast_to(scale_bwd(bias, factor), x.shape)


def embedding(
    table: Inexact[Array, "vocabulary features"], indices: Integer[Array, "*batch"]
) -> Inexact[Array, "*batch features"]:
    """Returns the rows of a table, with the gradient of the table times ``sqrt(vocabulary / number of indices)``.

    Args:
      table: of standard deviation 1.
      indices: of any shape; beyond the table they give NaN, as with ``jax.numpy.take``.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.embedding(jnp.array([[1.0], [2.0]], jnp.float32), jnp.array([1, 1, 0]))[:, 0]
    Array([2., 2., 1.], dtype=float32)

    Source: as ``layer_norm``. The factor is for indices that are all as frequent.
    """
    return jnp.take(scale_bwd(table, (table.shape[0] / indices.size) ** 0.5), indices, axis=0)
