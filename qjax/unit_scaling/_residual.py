"""Sums of unit variance, and those of a residual network."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from qjax.unit_scaling._scale import Constraint, Scalar, constrained, scale_bwd, scale_fwd


def add(
    x: Inexact[Array, "..."], y: Inexact[Array, "..."], *, constraint: Constraint | None = "to_output_scale"
) -> Inexact[Array, "..."]:
    """Returns ``(x + y) / sqrt(2)``, broadcast; or ``x + y`` if either has one element.

    The gradient of each is over the root of the number of times it is repeated; by default it is constrained to the
    factor of the output.

    Args:
      x, y: arrays that broadcast.
      constraint: as for ``matmul``.

    Raises:
      ValueError: for an unknown constraint.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.add(jnp.full(2, 2, jnp.float32), jnp.full(2, 2, jnp.float32))
    Array([2.828427, 2.828427], dtype=float32)

    Source: Blake, Orr, Luschi (2023), https://arxiv.org/abs/2303.11257, section 4, and the authors' library.
    """
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    out = 1.0 if 1 in (x.size, y.size) else 2**-0.5
    repeats = (math.prod(shape) // operand.size for operand in (x, y))
    out, *gradients = constrained("add", constraint, out, *(n**-0.5 for n in repeats))
    x, y = (jnp.broadcast_to(scale_bwd(v, g), shape) for v, g in zip((x, y), gradients, strict=True))
    return scale_fwd(x + y, out)


def residual_split(
    x: Inexact[Array, "*shape"], tau: Scalar = 1.0
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    """Returns ``(x, x)``, the inputs of a branch and of the skip connection that ``residual_add`` adds it to.

    The gradients that come back are multiplied by ``tau / sqrt(1 + tau^2)`` and ``1 / sqrt(1 + tau^2)``: the factors of
    ``residual_add`` apply to the gradients at this end of the branch, so that inside it they have unit variance.

    Args:
      x: of any shape and float dtype.
      tau: the ratio of branch to skip, as for ``residual_add``.

    >>> import jax, jax.numpy as jnp, qjax.unit_scaling as us
    >>> jax.grad(lambda x: us.residual_add(*us.residual_split(x)))(jnp.float32(1))  # as that of sqrt(2) x
    Array(1.4142135, dtype=float32)

    Source: Blake et al. (2024), u-muP, https://arxiv.org/abs/2407.17465, appendix G, and the authors' library.
    """
    branch, skip = _ratio(tau)
    return scale_bwd(x, branch), scale_bwd(x, skip)


def residual_add(
    branch: Inexact[Array, "*shape"], skip: Inexact[Array, "*shape"], tau: Scalar = 1.0
) -> Inexact[Array, "*shape"]:
    """Returns ``(tau branch + skip) / sqrt(1 + tau^2)``, with the gradients of a plain sum.

    Args:
      branch, skip: the output of the branch, and the second output of ``residual_split``.
      tau: above 1 favours the branch. (The authors' library says the opposite, and computes this.)

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.residual_add(jnp.float32(2), jnp.float32(2), tau=0.0)
    Array(2., dtype=float32)

    Source: as ``residual_split``.
    """
    of_branch, of_skip = _ratio(tau)
    return scale_fwd(branch, of_branch) + scale_fwd(skip, of_skip)


def _ratio(tau: Scalar):
    root = (1 + tau**2) ** 0.5
    return tau / root, 1 / root
