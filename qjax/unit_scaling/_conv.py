"""Convolutions of unit variance."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Inexact

from qjax.unit_scaling._scale import Constraint, constrained, scale_bwd, scale_fwd


def conv_general_dilated(
    lhs: Inexact[Array, "*lhs"],
    rhs: Inexact[Array, "*rhs"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    *,
    constraint: Constraint | None = "to_output_scale",
    precision: lax.PrecisionLike = None,
    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
) -> Inexact[Array, "*out"]:
    """Returns the convolution of ``lax.conv_general_dilated`` over ``sqrt(fan_in)``.

    With ``fan_in`` the inputs of a group times the size of the window, and ``fan_out`` the outputs of all groups times
    that size, the gradient of lhs is multiplied by ``sqrt(strides * groups / fan_out)``, by default constrained to the
    factor of the output; that of rhs is over the root of batch times output positions. Padding is not counted.

    Args:
      lhs, rhs: as for lax; rhs is a kernel of standard deviation 1.
      window_strides, padding, rhs_dilation, dimension_numbers, feature_group_count, precision: as for lax.
      constraint: as for ``linear``.
      conv_general_dilated: what convolves, such as ``functools.partial(qjax.conv_general_dilated, recipe=...)``.

    Raises:
      ValueError: for an unknown constraint.

    >>> import jax.numpy as jnp, qjax.unit_scaling as us
    >>> us.conv_general_dilated(jnp.ones((1, 4, 4), jnp.float32), jnp.ones((1, 4, 4), jnp.float32), (1,), "VALID")
    Array([[[4.]]], dtype=float32)

    Source: Blake, Orr, Luschi (2023), https://arxiv.org/abs/2303.11257, section 4, and ``conv1d`` of the authors'
    library, here for any number of axes. Deviation: no ``lhs_dilation`` and no ``batch_group_count``.
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    fan_in = math.prod(rhs.shape) // rhs.shape[numbers.rhs_spec[0]]
    fan_out = math.prod(rhs.shape) // rhs.shape[numbers.rhs_spec[1]]
    reach = math.prod(window_strides) * feature_group_count / fan_out
    out, gradient = constrained("conv_general_dilated", constraint, fan_in**-0.5, reach**0.5)
    options = dict(
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
    )
    options |= dict(window_strides=window_strides, padding=padding)
    shape = jax.eval_shape(functools.partial(lax.conv_general_dilated, **options), lhs, rhs).shape
    terms = math.prod(shape) // shape[numbers.out_spec[1]]
    return scale_fwd(conv_general_dilated(scale_bwd(lhs, gradient), scale_bwd(rhs, terms**-0.5), **options), out)


def channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Returns the dimension numbers of (batch, ..., features) and kernels (..., inputs, outputs), which are Flax's."""
    data, kernel = (0, ndim - 1, *range(1, ndim - 1)), (ndim - 1, ndim - 2, *range(ndim - 2))
    return lax.ConvDimensionNumbers(data, kernel, data)


def each(value: int | Sequence[int], size: tuple[int, ...]) -> tuple[int, ...]:
    """Returns one number for each axis of a window."""
    return (value,) * len(size) if isinstance(value, int) else tuple(value)
