"""Quantization-aware scaling of the gradients of integer parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from qjax._blocks import blocks_of
from qjax._encode import QTensor, decode
from qjax.formats import Scaled


class ScaleByQASState(NamedTuple):
    """The scales, arrays: ``state._replace(scales=...)`` changes them without a recompile."""

    scales: PyTree[Float[Array, "..."]]


def scale_by_qas(scales: PyTree[Float[Array, "..."] | QTensor | float]) -> optax.GradientTransformation:
    """Returns the optax transformation ``G <- G / s^2`` for parameters that are stored as ``q = w / s``.

    In a graph of true integers the parameter is 1/s times as large as the real one and its gradient s times: the ratio
    ``|W| / |G|`` is off by ``s^-2``, and one learning rate fits neither the layers nor the channels. So

    ``G_w <- G_w s_w^-2``, and ``G_b <- G_b (s_w s_x)^-2`` for a bias, which is stored in units of ``s_w s_x``,

    after which a step of SGD on q is that of w, divided by s.

    Args:
      scales: a pytree like the parameters. Its leaves broadcast to them: ``s_w``, one a tensor or one a channel, for a
        weight, ``s_w s_x`` for a bias, 1 for what is not quantized. Or the ``QTensor`` of ``encode``, for its scales.

    Edge cases: where a scale is 0 the result is 0. Gradients that are not finite stay so.

    Raises:
      ValueError: in ``init``, for a scale that does not broadcast to its parameter; a ``QTensor`` without scales.

    >>> import jax.numpy as jnp, qjax
    >>> tx = qjax.optim.scale_by_qas({"w": jnp.array([[0.5], [0.25]]), "b": 0.125})
    >>> state = tx.init({"w": jnp.zeros((2, 2)), "b": jnp.zeros(1)})
    >>> updates, _ = tx.update({"w": jnp.ones((2, 2)), "b": jnp.ones(1)}, state)
    >>> updates
    {'b': Array([64.], dtype=float32), 'w': Array([[ 4.,  4.],
           [16., 16.]], dtype=float32)}

    Source: Lin et al. (2022), On-device training under 256KB memory, https://arxiv.org/abs/2206.15472, section 2.1,
    equations 2 to 4. Deviation: divided by s twice, since ``s^-2`` leaves the range of float32 first.
    """

    def init(params):
        return ScaleByQASState(jax.tree.map(_scale_of, params, scales, is_leaf=_is_masked))

    def update(updates, state, params=None):
        del params
        return jax.tree.map(_scaled, updates, state.scales), state

    return optax.GradientTransformation(init, update)


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _scale_of(x, scale):
    if _is_masked(x):
        return x
    # An array of its own, so that a donated state does not take the caller's.
    scale = _spread(scale) if isinstance(scale, QTensor) else jnp.array(scale, np.float32)
    if scale.ndim > x.ndim or any(n not in (1, m) for n, m in zip(scale.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(
            f"scale_by_qas: a scale of shape {scale.shape} does not broadcast to its parameter of shape {x.shape}."
        )
    return scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)


def _spread(q: QTensor):
    """Returns the scale of every element."""
    if not isinstance(q.fmt, Scaled):
        raise ValueError(f"scale_by_qas: a QTensor of {q.fmt!r} has no scale; encode it in a Scaled format.")
    scale, level = jnp.ones((), np.float32), q.fmt
    for stored in q.scales:
        assert isinstance(level, Scaled)
        scale = scale * blocks_of(level, q.shape, q.axis).spread(decode(stored)).astype(np.float32)
        level = level.element
    return scale


def _scaled(g, scale):
    inverse = jnp.where(scale == 0, np.float32(0), 1 / scale)
    return (g.astype(np.float32) * inverse * inverse).astype(g.dtype)
