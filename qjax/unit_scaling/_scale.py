"""``scale_fwd`` and ``scale_bwd``, the two factors that all of unit scaling is made of, and how they are tied."""

import statistics
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

Constraint = Literal[
    "to_output_scale", "to_grad_input_scale", "to_left_grad_scale", "to_right_grad_scale", "gmean", "hmean", "amean"
]
Scalar = float | Inexact[Array, ""]

_CONSTRAINTS: dict[str, Callable[..., float]] = {
    "to_output_scale": lambda scales: scales[0],
    "to_grad_input_scale": lambda scales: scales[1],
    "to_left_grad_scale": lambda scales: scales[1],
    "to_right_grad_scale": lambda scales: scales[2],
    "gmean": statistics.geometric_mean,
    "hmean": statistics.harmonic_mean,
    "amean": statistics.fmean,
}
_BINARY = tuple(name for name in _CONSTRAINTS if "left" not in name and "right" not in name)
_TERNARY = tuple(name for name in _CONSTRAINTS if name != "to_grad_input_scale")


@jax.custom_jvp
def scale_fwd(x: Inexact[Array, "*shape"], scale: Scalar) -> Inexact[Array, "*shape"]:
    """Returns ``scale * x``, with the gradient of the identity.

    Forward mode agrees with reverse mode: the tangent passes as it is. The factor has no gradient.

    Args:
      x: an array of any float dtype, which is also that of the result. NaN and infinities propagate.
      scale: a number, or a traced scalar such as the ratio of a layer in a scan.

    >>> import jax, jax.numpy as jnp
    >>> from qjax.unit_scaling import scale_fwd
    >>> jax.value_and_grad(scale_fwd)(jnp.float32(3), 0.5)
    (Array(1.5, dtype=float32), Array(1., dtype=float32))

    Source: Blake, Orr, Luschi (2023), Unit scaling, https://arxiv.org/abs/2303.11257, section 4. That forward mode has
    the scaled derivative, too, is ours.
    """
    return x * jnp.asarray(scale).astype(x.dtype)


@scale_fwd.defjvp
def _scale_fwd_jvp(primals, tangents):
    return scale_fwd(*primals), tangents[0]


@jax.custom_jvp
def scale_bwd(x: Inexact[Array, "*shape"], scale: Scalar) -> Inexact[Array, "*shape"]:
    """Returns x, with its gradient multiplied by ``scale``.

    Forward mode agrees with reverse mode: the tangent is multiplied, too. The factor has no gradient.

    Args:
      x: an array of any float dtype. The value is the array itself, NaN and infinities included.
      scale: a number, or a traced scalar.

    >>> import jax, jax.numpy as jnp
    >>> from qjax.unit_scaling import scale_bwd
    >>> jax.value_and_grad(scale_bwd)(jnp.float32(3), 0.5)
    (Array(3., dtype=float32), Array(0.5, dtype=float32))

    Source: as ``scale_fwd``.
    """
    return x


@scale_bwd.defjvp
def _scale_bwd_jvp(primals, tangents):
    return primals[0], tangents[0] * jax.lax.stop_gradient(jnp.asarray(primals[1]).astype(tangents[0].dtype))


def constrained(caller: str, constraint: Constraint | None, *scales: float) -> tuple[float, ...]:
    """Returns the factors of an output and the gradients of its inputs, made one factor if there is a constraint."""
    known = _BINARY if len(scales) == 2 else _TERNARY
    if constraint is None:
        return scales
    if constraint not in known:
        raise ValueError(f"{caller}: constraint must be None or one of {', '.join(known)}, got {constraint!r}.")
    return (_CONSTRAINTS[constraint](scales),) * len(scales)


def interpolate(alpha: float, lower: float, upper: float) -> float:
    """Returns ``lower^(1 - alpha) upper^alpha``, the line between two numbers on a logarithmic scale."""
    return lower ** (1 - alpha) * upper**alpha
