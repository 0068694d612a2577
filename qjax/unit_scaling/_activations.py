"""Activations and softmax of unit variance. Their factors are fits: no closed form is known for every ``mult``."""

import math
from collections.abc import Callable

import jax
from jaxtyping import Array, Inexact

from qjax.unit_scaling._scale import Constraint, constrained, interpolate, scale_bwd, scale_fwd


def _elementwise(caller: str, f: Callable[[Array], Array], x, out: float, gradient: float, constraint):
    out, gradient = constrained(caller, constraint, out, gradient)
    return scale_fwd(f(scale_bwd(x, gradient)), out)


# The factors go from that of x / 2, where mult is small, to that of relu; for gated units, of a gate that is 0 or 1.
def _smooth(mult: float, relu: float) -> float:
    return interpolate(1 / (1 + 0.25 / mult**2), 2, relu)


def _gated(mult: float) -> float:
    return interpolate(1 / (1 + 1 / mult**2), 2, 2**0.5)


_RELU = (2 / (1 - 1 / math.pi)) ** 0.5


def gelu(
    x: Inexact[Array, "*shape"],
    approximate: bool = True,
    *,
    mult: float = 1.0,
    constraint: Constraint | None = "to_output_scale",
) -> Inexact[Array, "*shape"]:
    """Returns ``c gelu(mult x) / mult`` elementwise, with c for a standard deviation of 1 if that of x is 1.

    With ``a = 1 / (1 + 1 / (4 mult^2))``, c is ``2^(1 - a) sqrt(2 / (1 - 1 / pi))^a`` for the output and
    ``2^(1 - a) sqrt(2)^a`` for the gradient, by default constrained to the former.

    Args:
      x: of any shape and float dtype, which are also those of the result.
      approximate: as for ``jax.nn.gelu``.
      mult: how sharp it bends.
      constraint: as for ``linear``.

    Raises:
      ValueError: for an unknown constraint.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.gelu(jnp.array([0.0, 10.0], jnp.float32))
    Array([ 0.     , 17.66783], dtype=float32)

    Source: Blake et al. (2024), u-muP, https://arxiv.org/abs/2407.17465, and the authors' library.
    """
    out, gradient = _smooth(mult, _RELU), _smooth(mult, 2**0.5)
    return _elementwise("gelu", lambda x: jax.nn.gelu(x * mult, approximate) / mult, x, out, gradient, constraint)


def silu(
    x: Inexact[Array, "*shape"], *, mult: float = 1.0, constraint: Constraint | None = "to_output_scale"
) -> Inexact[Array, "*shape"]:
    """Returns ``c x sigmoid(mult x)``, with c as for ``gelu``; that of the gradient has ``a = 1 / (1 + 1 / mult^2)``.

    Args:
      x: of any shape and float dtype, which are also those of the result.
      mult: how sharp it bends.
      constraint: as for ``linear``.

    Raises:
      ValueError: for an unknown constraint.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.silu(jnp.array([0.0, 100.0], jnp.float32))
    Array([  0.    , 176.6783], dtype=float32)

    Source: as ``gelu``.
    """
    out, gradient = _smooth(mult, _RELU), _gated(mult)
    return _elementwise("silu", lambda x: x * jax.nn.sigmoid(x * mult), x, out, gradient, constraint)


def silu_glu(
    x: Inexact[Array, "*shape"], gate: Inexact[Array, "*shape"], *, mult: float = 1.0
) -> Inexact[Array, "*shape"]:
    """Returns ``c x gate sigmoid(mult gate)``, the gated linear unit with SiLU, with the same c for both gradients.

    With ``a = 1 / (1 + 1 / mult^2)``, c is ``2^(1 - a) sqrt(2)^a``.

    Args:
      x, gate: of one shape and float dtype, which are also those of the result.
      mult: how sharp the gate bends.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.silu_glu(jnp.ones(1, jnp.float32), jnp.full(1, 100, jnp.float32))
    Array([168.17...], dtype=float32)

    Source: as ``gelu``.
    """
    c = _gated(mult)
    gate = scale_bwd(gate, c)
    return scale_fwd(scale_bwd(x, c) * gate * jax.nn.sigmoid(gate * mult), c)


def softmax(
    x: Inexact[Array, "*shape"],
    axis: int = -1,
    *,
    mult: float = 1.0,
    constraint: Constraint | None = "to_output_scale",
) -> Inexact[Array, "*shape"]:
    """Returns ``c softmax(mult x)`` along an axis of n elements, of a root mean square near 1: it sums to c, not to 1.

    With ``a = 1 / (1 + 4 / mult^2)``, c is ``n^(1 - a) sqrt(n)^a`` for the output and the same with ``n / mult`` for
    the gradient, by default constrained to the former. One element alone gives 1.

    Args:
      x: of any shape and float dtype, which are also those of the result.
      axis: as for ``jax.nn.softmax``.
      mult: the inverse temperature.
      constraint: as for ``linear``.

    Raises:
      ValueError: for an unknown constraint.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.softmax(jnp.zeros(2, jnp.float32))
    Array([0.933033, 0.933033], dtype=float32)

    Source: as ``gelu``.
    """
    n, a = x.shape[axis], 1 / (1 + 4 / mult**2)
    out, gradient = interpolate(a, n, n**0.5), interpolate(a, n / mult, (n / mult) ** 0.5)
    return _elementwise("softmax", lambda x: jax.nn.softmax(x * mult, axis), x, out, gradient, constraint)
