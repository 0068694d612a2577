"""Loss scaling: gradients out of the underflow of a narrow format, and steps that overflow left out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class LossScalingState(NamedTuple):
    """The state of ``loss_scaling``.

    Attributes:
      loss_scale: the scale that the next loss is to be multiplied by.
      good_steps: finite steps since the scale last changed or a step was left out.
      guarded: the state of ``optax.apply_if_finite`` around the inner transformation; its ``total_notfinite`` counts
        the steps that were left out.
    """

    loss_scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    guarded: Any


def loss_scaling(
    inner: optax.GradientTransformation,
    scale: float = 2.0**15,
    *,
    growth_interval: int = 2000,
    min_scale: float = 1.0,
    max_scale: float = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that divides gradients by the loss scale and leaves out steps that are not finite.

    The caller multiplies the loss by ``loss_scale(state)``. If every gradient is finite, ``inner`` gets the gradients
    divided by the scale, and the scale is doubled after ``growth_interval`` such steps in a row. If not, all updates
    are zero, ``inner`` keeps its state, and the scale is halved.

    Args:
      inner: any transformation, a whole optimizer as a rule.
      scale: the first scale; powers of two change no digit of a gradient.
      growth_interval: finite steps until the scale is doubled.
      min_scale, max_scale: the bounds of the scale. With both equal to ``scale`` the scaling is static.

    The quotient is taken in float32 and then has the dtype of the gradient: scaling saves what is small only if that
    dtype is wider than the one it would be lost in, so the parameters should be float32. The test for finite values is
    over the whole tree that the transformation sees. Under ``shard_map``, reduce the gradients first.

    Raises:
      ValueError: if not ``0 < min_scale <= scale <= max_scale``, or for a ``growth_interval`` below 1.

    >>> import jax, jax.numpy as jnp, optax, qjax.optim
    >>> optimizer = qjax.optim.loss_scaling(optax.sgd(1.0), 2.0**15)
    >>> params = jnp.array(1.0, jnp.float32)
    >>> state = optimizer.init(params)
    >>> def loss(params, scale):  # Its gradient, 2e-8, is 0 in float16.
    ...     return 2e-8 * scale * params.astype(jnp.float16).astype(jnp.float32)
    >>> scaled = jax.grad(loss)(params, qjax.optim.loss_scale(state))
    >>> updates, state = optimizer.update(scaled, state, params)
    >>> print(f"{updates:.1e}")
    -2.0e-08
    >>> _, state = optimizer.update(jnp.array(jnp.inf, jnp.float32), state, params)
    >>> qjax.optim.loss_scale(state)
    Array(16384., dtype=float32)

    Source: Micikevicius et al. (2018), Mixed precision training, https://arxiv.org/abs/1710.03740, section 3.2. The
    defaults are those in common use (NVIDIA, Training with mixed precision, "choosing a scaling factor").
    """
    if not 0 < min_scale <= scale <= max_scale:
        raise ValueError(
            "loss_scaling: expected 0 < min_scale <= scale <= max_scale, got "
            f"min_scale={min_scale}, scale={scale}, max_scale={max_scale}."
        )
    if growth_interval < 1:
        raise ValueError(f"loss_scaling: growth_interval must be at least 1, got {growth_interval}.")
    # It gives up after a number of steps, which a count of int32 never exceeds.
    guard = optax.with_extra_args_support(optax.apply_if_finite(inner, jnp.iinfo(jnp.int32).max))

    def init(params):
        return LossScalingState(jnp.array(scale, jnp.float32), jnp.zeros((), jnp.int32), guard.init(params))

    def update(updates, state, params=None, **extra_args):
        unscaled = jax.tree.map(lambda g: _divided(g, state.loss_scale), updates)
        updates, guarded = guard.update(unscaled, state.guarded, params, **extra_args)
        assert isinstance(guarded, optax.ApplyIfFiniteState)
        finite = guarded.last_finite
        good = jnp.where(finite, optax.safe_increment(state.good_steps), 0)
        grow = good >= growth_interval
        factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
        new_scale = jnp.clip(state.loss_scale * factor, min_scale, max_scale)
        return updates, LossScalingState(new_scale, jnp.where(grow, 0, good), guarded)

    return optax.GradientTransformationExtraArgs(init, update)


def _divided(g, scale):
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return (g.astype(wide) / scale.astype(wide)).astype(g.dtype)


def loss_scale(state: Any) -> Float[Array, ""]:
    """Returns the scale that the next loss is to be multiplied by, from a state with one of ``loss_scaling`` in it.

    Args:
      state: the state of ``loss_scaling``, or of a transformation around it.

    Raises:
      ValueError: if there is none. KeyError: if there are several.

    >>> import jax.numpy as jnp, optax, qjax.optim
    >>> optimizer = optax.chain(qjax.optim.loss_scaling(optax.adam(1e-3), 1024.0))
    >>> qjax.optim.loss_scale(optimizer.init(jnp.zeros(3, jnp.float32)))
    Array(1024., dtype=float32)
    """
    scale = optax.tree.get(state, "loss_scale")
    if scale is None:
        raise ValueError("loss_scale: state has no loss scale; make the optimizer with qjax.optim.loss_scaling.")
    return scale
