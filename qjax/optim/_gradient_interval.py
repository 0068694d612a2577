"""``GradientInterval``: the range of low-bit gradients, as a learned share of their largest magnitude."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from qjax._chop import chop
from qjax.formats import FP32, Fixed, Scaled
from qjax.optim._keys import first_key


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class GradientInterval:
    """The rule of the clip ratio gamma of a gradient: few enough of its large entries are clipped, and no fewer.

    A gradient g is rounded stochastically to ``2^bits - 1`` levels in ``[-gamma max|g|, gamma max|g|]``. The largest
    ``alpha`` of the entries count as large. Where ``R`` of all entries are clipped, by at most ``(1 - gamma) max|g|``,
    and the other large ones are wrong by at most half a step, ``gamma max|g| / (2^bits - 2)``, the bound of their error
    is least at ``R = alpha / (2^bits - 1)``. So every step does

    ``gamma <- clip(gamma + beta sign(R - alpha / (2^bits - 1)), 0.001, 1)``, with R at the old gamma.

    gamma is an array of the shape (), a traced state that starts at 1. For the gradients of parameters there is
    ``chop_by_gradient_interval``; ``cotangent`` is for the output of a product, as in the paper.

    Args:
      bits: the width of the gradient, 2 to 16.
      alpha: the share of the entries that are large.
      beta: the step of gamma.

    Edge cases: a gradient of zeros stays, one with NaN or infinity becomes NaN throughout, and gamma stays for both.
    With fewer than ``(2^bits - 1) / alpha`` entries a single clipped one is too many, so that gamma stays within beta
    of the ratio that clips none.

    Raises:
      ValueError: for arguments out of range.

    >>> import jax, jax.numpy as jnp, qjax
    >>> interval = qjax.optim.GradientInterval(bits=4)
    >>> g = jnp.array([0.5, -7.0, 14.0], jnp.float32)
    >>> interval.chop(g, jnp.float32(0.5), key=jax.random.key(0))
    Array([ 0., -7.,  7.], dtype=float32)
    >>> interval.update(jnp.float32(0.5), g)
    Array(0.501, dtype=float32)

    Source: Kim et al. (2024), Toward INT4 fixed-point training via exploring quantization error for gradients (ECCV),
    https://arxiv.org/abs/2407.12637, section 3. Deviation: the authors' code searches the first gamma on the first
    gradient; here it is 1, and falls by beta a step.
    """

    bits: int = 4
    alpha: float = 1e-3
    beta: float = 1e-3

    def __post_init__(self):
        if not 2 <= self.bits <= 16:
            raise ValueError(f"GradientInterval: bits must be 2 to 16, got {self.bits}.")
        if not (0 < self.alpha < 1 and 0 < self.beta < 1):
            raise ValueError(
                f"GradientInterval: alpha and beta must be between 0 and 1, got {self.alpha} and {self.beta}."
            )

    def init(self) -> Float[Array, ""]:
        """Returns the first gamma, 1."""
        return jnp.ones((), np.float32)

    def update(self, gamma: Float[Array, ""], g: Float[Array, "..."]) -> Float[Array, ""]:
        """Returns the gamma of the next step from that of this one and the unrounded gradient."""
        largest = _largest(g)
        clipped = jnp.mean(jnp.abs(g.astype(np.float32)) > gamma * largest, dtype=np.float32)
        sign = jnp.sign(clipped - np.float32(self.alpha / (2**self.bits - 1)))
        moved = jnp.clip(gamma + np.float32(self.beta) * sign, np.float32(1e-3), np.float32(1))
        return jnp.where(largest > 0, moved, gamma)

    def chop(self, g: Float[Array, "*shape"], gamma: Float[Array, ""], *, key: Array) -> Float[Array, "*shape"]:
        """Returns the gradient rounded stochastically to the levels within ``gamma max|g|``."""
        fmt = Scaled(Fixed(self.bits, symmetric=True), FP32, None)
        # A product, since a compiled quotient by a constant is one, and an eager one is not.
        scale = gamma * _largest(g) * np.float32(1 / fmt.element.max)
        return chop(g, fmt, "stochastic", scale=scale, key=key)

    def cotangent(self, y: Float[Array, "*shape"], gamma: Float[Array, ""], *, key: Array) -> Float[Array, "*shape"]:
        """Returns y; its gradient is rounded as in ``chop``, and "the gradient" of gamma is the next gamma.

        As with delayed scaling in ``Recipe``, the state is handed on where its gradient would be. So every
        product needs a gamma of its own: those of two would be added.

        >>> import jax, jax.numpy as jnp, qjax
        >>> interval, key = qjax.optim.GradientInterval(), jax.random.key(0)
        >>> loss = lambda w, gamma: jnp.sum(interval.cotangent(jnp.ones((2, 3)) @ w, gamma, key=key) ** 2)
        >>> dw, gamma = jax.grad(loss, argnums=(0, 1))(jnp.ones((3, 4)), interval.init())
        """
        return _cotangent(self, y, gamma, key)


def _largest(g):
    """Returns the largest magnitude, NaN if an entry is not finite: XLA's maximum may lose a NaN."""
    return jnp.where(jnp.isfinite(g).all(), jnp.max(jnp.abs(g.astype(np.float32))), np.float32(np.nan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cotangent(interval: GradientInterval, y, gamma, key):
    return y


def _cotangent_forward(interval: GradientInterval, y, gamma, key):
    return y, (gamma, key)


def _cotangent_backward(interval: GradientInterval, residuals, g):
    gamma, key = residuals
    return interval.chop(g, gamma, key=key), interval.update(gamma, g), None


_cotangent.defvjp(_cotangent_forward, _cotangent_backward)


class GradientIntervalState(NamedTuple):
    """The gamma of each tensor, and the key of the next step."""

    gamma: PyTree[Float[Array, ""]]
    key: Any


def chop_by_gradient_interval(
    bits: int = 4, *, alpha: float = 1e-3, beta: float = 1e-3, key: Array
) -> optax.GradientTransformation:
    """Returns the optax transformation that rounds each gradient within its ``GradientInterval``.

    Args:
      bits, alpha, beta: as there; each tensor has its own gamma.
      key: of the first step. The state carries it on.

    Put it first in a chain. It rounds the gradients of parameters, which are sums over a batch; the paper rounds those
    of the outputs of layers, for which there is ``GradientInterval.cotangent``.

    >>> import jax, jax.numpy as jnp, optax, qjax
    >>> tx = optax.chain(qjax.optim.chop_by_gradient_interval(4, key=jax.random.key(0)), optax.sgd(0.1))
    >>> state = tx.init(jnp.ones(3))
    >>> updates, state = tx.update(jnp.array([7.0, -3.0, 0.0]), state)
    >>> updates
    Array([-0.7,  0.3, -0. ], dtype=float32)

    Source: as ``GradientInterval``.
    """
    interval = GradientInterval(bits, alpha, beta)

    def init(params):
        return GradientIntervalState(jax.tree.map(lambda _: interval.init(), params), first_key(key))

    def update(updates, state, params=None):
        del params
        following, now = jax.random.split(state.key)
        keys = optax.tree.split_key_like(now, updates)
        chopped = jax.tree.map(lambda g, gamma, key: interval.chop(g, gamma, key=key), updates, state.gamma, keys)
        gamma = jax.tree.map(lambda g, gamma: interval.update(gamma, g), updates, state.gamma)
        return chopped, GradientIntervalState(gamma, following)

    return optax.GradientTransformation(init, update)
