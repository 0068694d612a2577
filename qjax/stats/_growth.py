"""``growth``: how the error of a quantized network grows through its depth."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qjax._rules import Rule
from qjax.formats import Format
from qjax.stats._observe import copied, observe, probes_of, rule_of


def growth(
    fn: Callable, what: Rule | Format | str, *args, key: jax.Array | None = None, strict: bool = True, **kwargs
) -> dict[str, dict[str, float]]:
    """Returns the relative error of what enters each product of a network, and of the gradient that comes back to it.

    The network runs as it is and quantized, both jitted; with a and b the same tensor in the two runs, the error is
    ``||b - a|| / ||a||`` before b is rounded for the product: what the products before have done to it. So the first
    one has none. By path, in the order of the program, then "lhs", "rhs" and "gradient" (of the result).

    Args:
      fn: a function that returns a scalar.
      what, key, strict: as in ``observe``.
      args, kwargs: those of fn. nnx modules among them are not changed.

    Raises:
      TypeError, ValueError: as ``observe`` does.

    >>> import jax, jax.numpy as jnp
    >>> from qjax import stats
    >>> x = jax.random.normal(jax.random.key(0), (8, 16))
    >>> def loss(weights):
    ...     return jnp.sum((jnp.tanh(x @ weights[0]) @ weights[1]) ** 2)
    >>> weights = jax.random.normal(jax.random.key(1), (2, 16, 16)) / 4
    >>> errors = stats.growth(loss, "mxfp4", weights)
    >>> errors[""]["lhs"], 0.1 < errors["#2"]["lhs"] < 0.3
    (0.0, True)
    """
    zeros = probes_of("growth", fn, rule_of("growth", what), args, kwargs, strict=strict, values=True)

    @jax.jit
    def run(zeros, args, kwargs):
        def seen(apply: bool):
            def of(probes):
                mine, named = copied(args, kwargs)
                return observe(fn, what, probes, apply=apply, key=key if apply else None, strict=strict)(*mine, **named)

            return jax.grad(of)(zeros)

        return jax.tree.map(_error, seen(False), seen(True))

    found = run(zeros, args, kwargs)
    return {path: {name: float(error) for name, error in errors.items()} for path, errors in found.items()}


def _error(a, b):
    """Returns ``||b - a|| / ||a||``, of numbers in units of the largest."""
    a, b = (x.astype(jnp.promote_types(x.dtype, np.float32)) for x in (a, b))
    unit = jnp.max(jnp.abs(a), initial=0)
    unit = jnp.where(unit > 0, unit, 1)
    return jnp.linalg.norm(((b - a) / unit).ravel()) / jnp.linalg.norm((a / unit).ravel())
