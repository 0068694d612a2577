"""SGD-SaI: momentum with one learning rate a tensor, fixed at the first step by its gradient."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class ScaleBySgdSaiState(NamedTuple):
    """The state of ``scale_by_sgd_sai``.

    Attributes:
      count: steps taken.
      snr: the g-SNR of each tensor, a float32 scalar; 0 before the first step.
      trace: the momentum, of the shapes and dtypes of the parameters.
    """

    count: jax.typing.ArrayLike
    snr: Any
    trace: Any


def scale_by_sgd_sai(momentum: float = 0.9, eps: float = 1e-8) -> optax.GradientTransformation:
    """Returns the transformation that gives the momentum of each tensor times the g-SNR of its first gradient.

    At step 1, and never again, ``G = ||g|| / (std(g) + eps)`` with the unbiased standard deviation, some
    ``sqrt(size) sqrt(1 + mean^2 / var)``. The momentum starts as the first gradient: ``m = g``, then
    ``m = momentum m + (1 - momentum) g``. The update is ``G m``.

    Args:
      momentum: the decay of the average of gradients.
      eps: the least standard deviation.

    The updates have the shapes and dtypes of the gradients, G is float32. A NaN or an infinity in the gradient of step
    1 makes every update of its tensor NaN.

    >>> import jax.numpy as jnp, qjax.optim
    >>> optimizer = qjax.optim.scale_by_sgd_sai()
    >>> params = {"kernel": jnp.zeros(4, jnp.float32), "gain": jnp.zeros((), jnp.float32)}
    >>> gradients = {"kernel": jnp.array([1.0, -1.0, 1.0, -1.0], jnp.float32), "gain": jnp.array(3.0, jnp.float32)}
    >>> updates, state = optimizer.update(gradients, optimizer.init(params))
    >>> {name: round(float(snr), 3) for name, snr in state.snr.items()}
    {'gain': 1.0, 'kernel': 1.732}

    Source: Xu et al. (2024), No more Adam: learning rate scaling at initialization is all you need,
    https://arxiv.org/abs/2412.11768, algorithm 1; the first momentum is that of the authors' code. Deviation: where the
    gradient has no spread that float32 can tell from rounding (one element, all elements equal, all zero), G is
    ``sqrt(size)``, as for a gradient without mean. The formula would give ``|g| / eps`` for one element, a step of
    some 10^8 times the gradient, and 0 for a gradient of zeros, after which the tensor never moves.
    """

    def init(params):
        snr = jax.tree.map(lambda p: jnp.zeros((), jnp.float32), params)
        return ScaleBySgdSaiState(jnp.zeros((), jnp.int32), snr, optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        first = state.count == 0
        snr = jax.tree.map(lambda g, old: jnp.where(first, _snr(g, eps), old), updates, state.snr)
        moved = optax.tree.update_moment(updates, state.trace, momentum, 1)
        trace = jax.tree.map(lambda g, m: jnp.where(first, g, m), updates, moved)
        updates = jax.tree.map(lambda m, s: m * s.astype(m.dtype), trace, snr)
        return updates, ScaleBySgdSaiState(optax.safe_increment(state.count), snr, trace)

    return optax.GradientTransformation(init, update)


def _snr(g, eps: float) -> Float[Array, ""]:
    g = g.astype(jnp.float32)
    if g.size < 2:
        return jnp.ones((), jnp.float32)
    norm, std = jnp.linalg.norm(g.ravel()), jnp.std(g, ddof=1)
    flat = std <= jnp.finfo(jnp.float32).eps * norm
    return jnp.where(flat, math.sqrt(g.size), norm / (std + eps))


def sgd_sai(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    momentum: float = 0.9,
    eps: float = 1e-8,
    *,
    weight_decay: float = 1e-2,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Returns the SGD-SaI optimizer: ``p <- p (1 - learning_rate weight_decay) - learning_rate G m``.

    Args:
      learning_rate: a number or a schedule.
      momentum, eps: of ``scale_by_sgd_sai``, where G and m are defined.
      weight_decay, mask: as in ``optax.add_decayed_weights``.

    Its state is one buffer of the size of the parameters; Adam has two.

    >>> import jax.numpy as jnp, optax, qjax.optim
    >>> optimizer = qjax.optim.sgd_sai(0.1, weight_decay=0.0)
    >>> params = jnp.array([1.0, -1.0], jnp.float32)
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)
    Array([ 0.9, -0.9], dtype=float32)

    Source: that of ``scale_by_sgd_sai``.
    """
    return optax.chain(
        scale_by_sgd_sai(momentum, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
