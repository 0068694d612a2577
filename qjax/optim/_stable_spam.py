"""Stable-SPAM: Adam with resets, on gradients whose spikes are clipped and whose norms are evened out."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class ScaleByStableSpamState(NamedTuple):
    """The state of ``scale_by_stable_spam``; the statistics are float32 scalars, one a tensor.

    Attributes:
      count: steps taken.
      largest: averages of the largest magnitudes.
      norm, square: averages of the norms and of their squares.
      adam: the state of ``optax.scale_by_adam``, whose count is that since the last reset.
    """

    count: jax.typing.ArrayLike
    largest: Any
    norm: Any
    square: Any
    adam: optax.OptState


def scale_by_stable_spam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    gamma1: float = 0.7,
    gamma2: float = 0.9,
    gamma3: float = 0.999,
    reset_interval: int = 1000,
    reset_counts: Literal["adam", "all"] = "adam",
    total_steps: int | None = None,
    eta_min: float = 0.5,
) -> optax.GradientTransformation:
    """Returns the transformation that gives Adam's update for clipped and normalised gradients.

    For each tensor g, at step t, hats being the bias correction of Adam:

    - AdaClip: ``T = gamma3 T + (1 - gamma3) max|g|``; where ``|g| > That``, g becomes ``g That / max|g|``;
    - AdaGN: ``n = ||g||``, ``mu = gamma1 mu + (1 - gamma1) n``, ``nu = gamma2 nu + (1 - gamma2) n^2``; g becomes
      ``g / n * muhat / (sqrt(nuhat) + eps)``;
    - MoRet: at every multiple of ``reset_interval`` the moments and the count of Adam are set to 0;
    - ``optax.scale_by_adam(b1, b2, eps)`` on what g has become.

    Args:
      b1, b2, eps: of Adam; eps also of AdaGN.
      gamma1, gamma2: decays of the mean norm and the mean squared norm.
      gamma3: decay of the mean largest magnitude.
      reset_interval: steps from one reset to the next. The paper's runs in 4 bits have 500.
      reset_counts: "adam", or "all" for what the authors' code does: a reset also restarts the count in the bias
        corrections of T, mu and nu, though not these themselves. Then That is some ``1 / (1 - gamma3^2)`` times too
        high after a reset, and clips no spike for about ``1 / (1 - gamma3)`` steps.
      total_steps: if given, gamma1 and b1 are multiplied by a cosine that falls from 1 to ``eta_min``.
      eta_min: the end of that cosine.

    The updates have the shapes and dtypes of the gradients; statistics are float32. A tensor of zeros stays zero. A NaN
    or an infinity in a gradient stays in the statistics: see ``loss_scaling`` and ``optax.apply_if_finite``.

    Raises:
      ValueError: for a ``reset_interval`` below 1, or an unknown ``reset_counts``.

    >>> import jax.numpy as jnp, qjax.optim
    >>> optimizer = qjax.optim.scale_by_stable_spam()
    >>> state = optimizer.init(jnp.zeros(2, jnp.float32))
    >>> for g in [1.0] * 9 + [1000.0]:  # Adam ends with [0.49, 1.0].
    ...     update, state = optimizer.update(jnp.array([g, 1.0], jnp.float32), state)
    >>> update.round(2)
    Array([1.01, 0.89], dtype=float32)

    Source: Huang et al. (2025), Stable-SPAM: How to train in 4-bit more stably than 16-bit Adam,
    https://arxiv.org/abs/2502.17055, section 4; the cosine, also in the bias corrections, is that of the authors' code.
    Deviation from the code: the counts after a reset, see ``reset_counts``.
    """
    if reset_interval < 1:
        raise ValueError(f"scale_by_stable_spam: reset_interval must be at least 1, got {reset_interval}.")
    if reset_counts not in ("adam", "all"):
        raise ValueError(f"scale_by_stable_spam: reset_counts must be 'adam' or 'all', got {reset_counts!r}.")
    cosine = None if total_steps is None else optax.cosine_decay_schedule(1.0, total_steps + 1, eta_min)

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros((), jnp.float32), params)
        return ScaleByStableSpamState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, optax.scale_by_adam().init(params))

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        corrected = count if reset_counts == "adam" else optax.safe_increment(state.adam.count)
        fade = 1.0 if cosine is None else cosine(count)

        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), updates)
        largest = jax.tree.map(lambda g: jnp.max(jnp.abs(g), initial=0).astype(jnp.float32), wide)
        mean_largest = optax.tree.update_moment(largest, state.largest, gamma3, 1)
        threshold = optax.tree.bias_correction(mean_largest, gamma3, corrected)
        wide = jax.tree.map(_clipped, wide, largest, threshold)

        norms = jax.tree.map(lambda g: jnp.linalg.norm(g.ravel()).astype(jnp.float32), wide)
        norm = optax.tree.update_moment(norms, state.norm, gamma1 * fade, 1)
        square = optax.tree.update_moment(norms, state.square, gamma2, 2)
        mean = optax.tree.bias_correction(norm, gamma1 * fade, corrected)
        mean_square = optax.tree.bias_correction(square, gamma2, corrected)
        factor = jax.tree.map(
            lambda n, m, s: m / (jnp.sqrt(s) + eps) / jnp.where(n == 0, 1, n), norms, mean, mean_square
        )
        updates = jax.tree.map(lambda old, g, f: (g * f.astype(g.dtype)).astype(old.dtype), updates, wide, factor)

        reset = jnp.remainder(count, reset_interval) == 0
        adam = jax.tree.map(lambda s: jnp.where(reset, jnp.zeros_like(s), s), state.adam)
        updates, adam = optax.scale_by_adam(b1 * fade, b2, eps).update(updates, adam)
        return updates, ScaleByStableSpamState(count, mean_largest, norm, square, adam)

    return optax.GradientTransformation(init, update)


def _clipped(g, largest: Float[Array, ""], threshold: Float[Array, ""]):
    ratio = threshold / jnp.where(largest == 0, 1, largest)
    return jnp.where(jnp.abs(g) > threshold.astype(g.dtype), g * ratio.astype(g.dtype), g)


def stable_spam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """Returns the Stable-SPAM optimizer: ``scale_by_stable_spam``, decoupled weight decay and the learning rate.

    Args:
      learning_rate: a number or a schedule. The paper's 350M models have 4e-4.
      b1, b2, eps: of Adam.
      weight_decay, mask: as in ``optax.add_decayed_weights``.
      kwargs: of ``scale_by_stable_spam``.

    >>> import jax.numpy as jnp, optax, qjax.optim
    >>> optimizer = qjax.optim.stable_spam(0.1, reset_interval=500)
    >>> params = jnp.array([1.0, -1.0], jnp.float32)
    >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates).round(4)
    Array([ 0.9, -0.9], dtype=float32)

    Source: that of ``scale_by_stable_spam``.
    """
    return optax.chain(
        scale_by_stable_spam(b1, b2, eps, **kwargs),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
