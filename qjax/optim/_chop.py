"""Updates and weights on the grid of a format."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qjax._quantizer import Quantizer
from qjax.optim._keys import check_key, first_key, fold_in, map_with_keys, next_key
from qjax.optim._storage import QuantizerLike, as_quantizer, restored, stored


class ChopState(NamedTuple):
    """The state of ``chop_updates`` and ``chop_params``: the key of the next step, the residuals in their format."""

    key: Any
    residual: Any = None


def chop_updates(q: QuantizerLike, *, key: jax.Array | None = None) -> optax.GradientTransformation:
    """Returns a transformation that rounds updates, ``u -> Q(u)``: gradients at the start of a chain, steps at its end.

    Args:
      q: a ``Quantizer``, or a format or its name for rounding to nearest. Blocks lie along the last axis.
      key: the PRNG key, if q is stochastic; each step and each array draws anew.

    Raises:
      ValueError: if q is stochastic and there is no key, or there is one for nothing.

    >>> import jax.numpy as jnp, optax, qjax
    >>> sgd = optax.chain(qjax.optim.chop_updates("e5m2"), optax.sgd(1.0))
    >>> sgd.update(jnp.array([0.3, 1e-6], jnp.float32), sgd.init(jnp.zeros(2, jnp.float32)))[0]
    Array([-0.3125, -0.    ], dtype=float32)
    """
    quantizer = as_quantizer(q)
    check_key("chop_updates", [quantizer.is_stochastic], key)

    def update(updates, state, params=None):
        key, own = next_key(state.key)
        return map_with_keys(lambda u, key: quantizer(u, key=key), updates, own), ChopState(key)

    return optax.GradientTransformation(lambda params: ChopState(first_key(key)), update)


def chop_params(
    q: QuantizerLike, *, residual: QuantizerLike | None = None, key: jax.Array | None = None
) -> optax.GradientTransformation:
    """Returns the last link of a chain that keeps the weights in a format, without master copies.

    It emits ``Q(p + u) - p``, so that ``optax.apply_updates`` lands on the grid. With a residual format what rounding
    loses is kept in that format and added to the next update,

    ``w = Q(p + u + r)``, ``r' = Q_r(u + r - (w - p))``:

    Kahan's compensated sum where the residual has the format of the weights, error feedback in general.

    The sum ``p + u`` is that of float32 (float64 for such weights). The landing is exact where ``w - p`` is a number of
    float32 too, as between floats of a few bits; with scales or codes of all its bits it can be off by a spacing
    of ``|w| + |p|``. Round the weights once at the start, ``jax.tree.map(q, params)``.

    Args:
      q: a ``Quantizer``, or a format or its name for rounding to nearest. Blocks lie along the last axis.
      residual: likewise, for the residuals, which are stored as ``QTensor``s.
      key: the PRNG key, if one of them is stochastic; each step and each array draws anew.

    Raises:
      ValueError: if there is no key for a stochastic q, or one for nothing; in ``update``, if there are no params.

    >>> import jax.numpy as jnp, optax, qjax
    >>> for residual in (None, "bf16"):
    ...     tx = optax.chain(optax.sgd(1.0), qjax.optim.chop_params("bf16", residual=residual))
    ...     w = jnp.ones((), jnp.float32)
    ...     state = tx.init(w)
    ...     for _ in range(4):
    ...         update, state = tx.update(jnp.full((), -0.0015, jnp.float32), state, w)
    ...         w = optax.apply_updates(w, update)
    ...     print(w)
    1.0
    1.0078125

    Sources: Gupta et al. (2015), https://arxiv.org/abs/1502.02551 (stochastic rounding of weights); Zamirai et al.
    (2020), Revisiting BFloat16 Training, https://arxiv.org/abs/2010.06192, algorithms 1 and 3 (stochastic, Kahan).
    """
    quantizer = as_quantizer(q)
    # Without residuals it is never used.
    kept = as_quantizer(q if residual is None else residual)
    check_key("chop_params", [quantizer.is_stochastic, kept.is_stochastic], key)

    def hold(x, key):
        return stored(kept, x, key)

    def init(params):
        if residual is None:
            return ChopState(first_key(key))
        zeros = jax.tree.map(lambda p: jnp.zeros_like(_wide(p)), params)
        return ChopState(first_key(key), map_with_keys(hold, zeros, _key_for(kept, first_key(key), 1)))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("chop_params: update needs the params; call tx.update(grads, state, params).")
        key, own = next_key(state.key)
        params, updates = jax.tree.map(_wide, params), jax.tree.map(_wide, updates)
        if residual is not None:
            updates = jax.tree.map(lambda u, r: u + restored(r), updates, state.residual)
        sums = jax.tree.map(jnp.add, params, updates)
        weights = map_with_keys(lambda w, key: quantizer(w, key=key), sums, _key_for(quantizer, own, 0))
        steps = jax.tree.map(jnp.subtract, weights, params)
        if residual is None:
            return steps, ChopState(key)
        lost = jax.tree.map(jnp.subtract, updates, steps)
        return steps, ChopState(key, map_with_keys(hold, lost, _key_for(kept, own, 1)))

    return optax.GradientTransformation(init, update)


def _key_for(quantizer: Quantizer, key, number: int):
    return fold_in(key, number) if quantizer.is_stochastic else None


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
