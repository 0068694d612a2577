"""Matrix products and linear layers of unit variance."""

import functools
import math
from collections.abc import Callable

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact

from qjax.unit_scaling._scale import Constraint, constrained, scale_bwd, scale_fwd

DotGeneral = Callable[..., Array]


def matmul(
    a: Inexact[Array, "*batch m k"],
    b: Inexact[Array, "*batch k n"],
    *,
    constraint: Constraint | None = "to_output_scale",
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    dot_general: DotGeneral = lax.dot_general,
) -> Inexact[Array, "*batch m n"]:
    """Returns ``a b / sqrt(k)``, with the gradients of ``a b`` over ``sqrt(n)`` for a and ``sqrt(m)`` for b.

    Args:
      a, b: matrices, or stacks of as many.
      constraint: what the three factors become if they are to be one: "to_output_scale", "to_left_grad_scale",
        "to_right_grad_scale", or their "gmean", "hmean" or "amean". None leaves each its own, which is right where the
        gradients of a and b meet no other path (a cut edge of the graph).
      precision, preferred_element_type: as for ``jax.numpy.matmul``.
      dot_general: what multiplies, such as ``functools.partial(qjax.dot_general, recipe=...)``.

    Raises:
      ValueError: if the shapes do not fit, or for an unknown constraint.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.matmul(jnp.ones((2, 16), jnp.float32), jnp.ones((16, 1), jnp.float32)).ravel()
    Array([4., 4.], dtype=float32)

    Source: Blake, Orr, Luschi (2023), https://arxiv.org/abs/2303.11257, section 4. There the constraint is the
    geometric mean; the default is that of Blake et al. (2024), https://arxiv.org/abs/2407.17465, and of their library.
    Deviation: the batch axes are not broadcast, for the sum over a broadcast axis has no factor there.
    """
    fits = a.ndim == b.ndim >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    if not fits:
        raise ValueError(
            f"matmul: a and b must be (..., m, k) and (..., k, n) with equal batch axes, got {a.shape} and {b.shape}; "
            "broadcast them yourself, or use linear."
        )
    (m, k), n = a.shape[-2:], b.shape[-1]
    out, left, right = constrained("matmul", constraint, k**-0.5, n**-0.5, m**-0.5)
    batch = tuple(range(a.ndim - 2))
    numbers = (((a.ndim - 1,), (a.ndim - 2,)), (batch, batch))
    options = dict(precision=precision, preferred_element_type=preferred_element_type)
    return scale_fwd(dot_general(scale_bwd(a, left), scale_bwd(b, right), numbers, **options), out)


def linear(
    x: Inexact[Array, "*batch_and_inputs"],
    kernel: Inexact[Array, "*inputs_and_outputs"],
    bias: Inexact[Array, "*outputs"] | None = None,
    *,
    axes: int = 1,
    constraint: Constraint | None = "to_output_scale",
    precision: lax.PrecisionLike = None,
    dot_general: DotGeneral = lax.dot_general,
) -> Inexact[Array, "*batch_and_outputs"]:
    """Returns ``(x kernel + bias) / sqrt(fan_in)``.

    The gradient of x is over ``sqrt(fan_out)``, by default constrained to ``sqrt(fan_in)``; those of kernel and bias
    are over the root of the number of rows of x, under any constraint: they are cut edges, on no path to other
    parameters.

    Args:
      x: the batch axes, then the input axes.
      kernel: of standard deviation 1; the input axes, then the output axes, as in ``flax.linen.DenseGeneral``.
      bias: the output axes.
      axes: how many input axes there are.
      constraint: as for ``matmul``: "to_output_scale", "to_grad_input_scale", "gmean", "hmean", "amean" or None.
      precision, dot_general: as for ``matmul``.

    Raises:
      ValueError: if the shapes do not fit, or for an unknown constraint.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.linear(jnp.ones(16, jnp.float32), jnp.ones((16, 2), jnp.float32))
    Array([4., 4.], dtype=float32)

    Source: as ``matmul``.
    """
    return _linear("linear", 0.5, x, kernel, bias, axes, constraint, precision, dot_general)


def linear_readout(
    x: Inexact[Array, "*batch_and_inputs"],
    kernel: Inexact[Array, "*inputs_and_outputs"],
    bias: Inexact[Array, "*outputs"] | None = None,
    *,
    axes: int = 1,
    constraint: Constraint | None = None,
    precision: lax.PrecisionLike = None,
    dot_general: DotGeneral = lax.dot_general,
) -> Inexact[Array, "*batch_and_outputs"]:
    """Returns ``(x kernel + bias) / fan_in``, the last layer of u-muP; all else is as for ``linear``.

    At initialisation the outputs have the standard deviation ``1 / sqrt(fan_in)``. The gradient of x has its own
    factor: this is right for the end of a network, whose every path goes through it.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.linear_readout(jnp.ones(16, jnp.float32), jnp.ones((16, 2), jnp.float32))
    Array([1., 1.], dtype=float32)

    Source: Blake et al. (2024), u-muP, https://arxiv.org/abs/2407.17465, table 2. There the factor of the gradient of x
    is 1/sqrt(fan_in); the authors' library and we have 1/sqrt(fan_out), which keeps its deviation at 1.
    """
    return _linear("linear_readout", 1.0, x, kernel, bias, axes, constraint, precision, dot_general)


def _linear(caller: str, power: float, x, kernel, bias, axes, constraint, precision, dot_general):
    inputs, outputs = kernel.shape[:axes], kernel.shape[axes:]
    if x.shape[x.ndim - axes :] != inputs or (bias is not None and bias.shape != outputs):
        raise ValueError(
            f"{caller}: the last {axes} axes of x must be the first of kernel, and bias its others, got x {x.shape}, "
            f"kernel {kernel.shape}, bias {None if bias is None else bias.shape}; say how many inputs with axes=."
        )
    fan_in, fan_out = math.prod(inputs), math.prod(outputs)
    out, gradient = constrained(caller, constraint, fan_in**-power, fan_out**-0.5)
    of_parameter = functools.partial(scale_bwd, scale=(math.prod(x.shape) / fan_in) ** -0.5)
    numbers = ((tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))), ((), ()))
    y = dot_general(scale_bwd(x, gradient), of_parameter(kernel), numbers, precision=precision)
    if bias is not None:
        y += of_parameter(bias).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return scale_fwd(y, out)
