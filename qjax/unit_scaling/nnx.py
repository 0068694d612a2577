"""Flax nnx layers of unit variance, and the roles of their parameters.

They have the names, the shapes and, as far as they go, the arguments of Flax's own. All weights start with a standard
deviation of 1, and ``use_bias`` is False unless it is set, as in the authors' library.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.linen.linear import canonicalize_padding
from flax.nnx.nn.dtypes import promote_dtype
from flax.traverse_util import unflatten_dict
from jax import lax

from qjax import unit_scaling as us
from qjax.unit_scaling._conv import channels_last, each
from qjax.unit_scaling._linear import DotGeneral
from qjax.unit_scaling._scale import Constraint
from qjax.unit_scaling._u_mup import Kind, roles_of

UNIT = nnx.initializers.normal(1.0)


class LinearGeneral(nnx.Module):
    """``flax.nnx.LinearGeneral`` of unit variance: ``qjax.unit_scaling.linear`` over the last axes, the in_features.

    ``constraint``, ``precision`` and ``dot_general`` are those of the function.
    """

    role: ClassVar[Kind] = "hidden"
    operation: ClassVar[Callable] = staticmethod(us.linear)

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = UNIT,
        bias_init: Callable = nnx.initializers.zeros,
        precision: lax.PrecisionLike = None,
        constraint: Constraint | None = "to_output_scale",
        dot_general: DotGeneral = lax.dot_general,
        rngs: nnx.Rngs,
    ):
        inputs, outputs = ((n,) if isinstance(n, int) else tuple(n) for n in (in_features, out_features))
        self.kernel = nnx.Param(kernel_init(rngs.params(), inputs + outputs, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), outputs, param_dtype)) if use_bias else None
        self.axes, self.dtype, self.precision = len(inputs), dtype, precision
        self.constraint, self.dot_general = constraint, dot_general

    def __call__(self, inputs):
        inputs, kernel, bias = _promoted(self.dtype, inputs, self.kernel, self.bias)
        options = dict(constraint=self.constraint, precision=self.precision, dot_general=self.dot_general)
        return self.operation(inputs, kernel, bias, axes=self.axes, **options)


class Linear(LinearGeneral):
    """``flax.nnx.Linear`` of unit variance: ``qjax.unit_scaling.linear``.

    >>> import jax
    >>> from flax import nnx as flax_nnx
    >>> from qjax.unit_scaling import nnx
    >>> nnx.Linear(256, 256, rngs=flax_nnx.Rngs(1))(jax.random.normal(jax.random.key(0), (64, 256))).std()
    Array(1.009..., dtype=float32)
    """


class LinearReadout(LinearGeneral):
    """The last layer of a network: ``qjax.unit_scaling.linear_readout``, with the parameters of ``flax.nnx.Linear``."""

    role: ClassVar[Kind] = "output"
    operation: ClassVar[Callable] = staticmethod(us.linear_readout)

    def __init__(self, in_features, out_features, *, constraint: Constraint | None = None, rngs: nnx.Rngs, **options):
        super().__init__(in_features, out_features, constraint=constraint, rngs=rngs, **options)


class Conv(nnx.Module):
    """``flax.nnx.Conv`` of unit variance: ``qjax.unit_scaling.conv_general_dilated``, for (batch, ..., features)."""

    role: ClassVar[Kind] = "hidden"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Any = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Callable = UNIT,
        bias_init: Callable = nnx.initializers.zeros,
        constraint: Constraint | None = "to_output_scale",
        conv_general_dilated: Callable = lax.conv_general_dilated,
        rngs: nnx.Rngs,
    ):
        size = tuple(kernel_size)
        shape = (*size, in_features // feature_group_count, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        self.strides, self.kernel_dilation = each(strides, size), each(kernel_dilation, size)
        self.padding, self.feature_group_count = padding, feature_group_count
        self.dtype, self.precision = dtype, precision
        self.constraint: Constraint | None = constraint
        self.conv_general_dilated = conv_general_dilated

    def __call__(self, inputs):
        inputs, kernel, bias = _promoted(self.dtype, inputs, self.kernel, self.bias)
        y = us.conv_general_dilated(
            inputs,
            kernel,
            self.strides,
            canonicalize_padding(self.padding, len(self.strides)),
            self.kernel_dilation,
            channels_last(inputs.ndim),
            self.feature_group_count,
            constraint=self.constraint,
            precision=self.precision,
            conv_general_dilated=self.conv_general_dilated,
        )
        return y if bias is None else y + jnp.broadcast_to(us.scale_bwd(bias, (y.shape[-1] / y.size) ** 0.5), y.shape)


class Embed(nnx.Module):
    """``flax.nnx.Embed`` of unit variance: ``qjax.unit_scaling.embedding``; ``attend`` is ``linear_readout``."""

    role: ClassVar[Kind] = "input"

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: Callable = UNIT,
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Param(embedding_init(rngs.params(), (num_embeddings, features), param_dtype))
        self.dtype = dtype

    def __call__(self, inputs):
        return us.embedding(_promoted(self.dtype, self.embedding)[0], inputs)

    def attend(self, query):
        query, embedding = _promoted(self.dtype, query, self.embedding)
        return us.linear_readout(query, embedding.T)


class LayerNorm(nnx.Module):
    """``flax.nnx.LayerNorm`` over the last axis, with unit gradients: ``qjax.unit_scaling.layer_norm``."""

    role: ClassVar[Kind] = "norm"

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable = nnx.initializers.zeros,
        scale_init: Callable = nnx.initializers.ones,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype)) if use_scale else None
        self.bias = nnx.Param(bias_init(rngs.params(), (num_features,), param_dtype)) if use_bias else None
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x):
        x, scale, bias = _promoted(self.dtype, x, self.scale, self.bias)
        return us.layer_norm(x, scale, bias, epsilon=self.epsilon)


class RMSNorm(nnx.Module):
    """``flax.nnx.RMSNorm`` over the last axis, with unit gradients: ``qjax.unit_scaling.rms_norm``."""

    role: ClassVar[Kind] = "norm"

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_scale: bool = True,
        scale_init: Callable = nnx.initializers.ones,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype)) if use_scale else None
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x):
        x, scale = _promoted(self.dtype, x, self.scale)
        return us.rms_norm(x, scale, epsilon=self.epsilon)


class MultiHeadAttention(nnx.Module):
    """``flax.nnx.MultiHeadAttention`` of unit variance, self-attention if called with one input.

    Parameters are those of ``query``, ``key``, ``value`` and ``out``; between them is
    ``qjax.unit_scaling.dot_product_attention``, whose arguments ``is_causal``, ``mult`` and ``bias`` are here, too.
    ``options`` are those of ``LinearGeneral``, for all four.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        is_causal: bool = False,
        mult: float = 1.0,
        precision: lax.PrecisionLike = None,
        dot_general: DotGeneral = lax.dot_general,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        width = qkv_features or in_features
        if width % num_heads:
            raise ValueError(
                f"nnx.MultiHeadAttention: num_heads {num_heads} must divide the {width} features; set qkv_features."
            )
        heads = (num_heads, width // num_heads)
        self.products: Any = dict(precision=precision, dot_general=dot_general)
        options |= dict(rngs=rngs, **self.products)
        self.query, self.key, self.value = (LinearGeneral(in_features, heads, **options) for _ in range(3))
        self.out = LinearGeneral(heads, out_features or in_features, **options)
        self.is_causal, self.mult = is_causal, mult

    def __call__(self, inputs_q, inputs_k=None, inputs_v=None, *, bias=None, mask=None):
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        query, key, value = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
        options: Any = dict(is_causal=self.is_causal, mult=self.mult, **self.products)
        return self.out(us.dot_product_attention(query, key, value, bias, mask, **options))


class GatedMLP(nnx.Module):
    """Returns ``down(silu_glu(up(x), gate(x)))``, with as many outputs as inputs.

    Its three ``Linear`` layers, which ``options`` are for, are unconstrained: each has the factors of its own, whose
    product is the same forward and backward.
    """

    def __init__(self, in_features: int, hidden_features: int, *, mult: float = 1.0, rngs: nnx.Rngs, **options: Any):
        options |= dict(constraint=None, rngs=rngs)
        self.up, self.gate = (Linear(in_features, hidden_features, **options) for _ in range(2))
        self.down = Linear(hidden_features, in_features, **options)
        self.mult = mult

    def __call__(self, x):
        return self.down(us.silu_glu(self.up(x), self.gate(x), mult=self.mult))


def roles(model: nnx.Module, *, residual: str | None = None) -> dict[str, Any]:
    """Returns the role of every parameter of a model of these layers, in dicts with the paths of the parameters.

    Args:
      model: any nnx module whose parameters are all of layers of this module.
      residual: a pattern for the paths of the parameters in residual branches, such as ``"blocks/.*"``.

    Raises:
      ValueError: for a parameter of another layer, or a pattern that matches nothing.

    >>> from flax import nnx as flax_nnx
    >>> from qjax.unit_scaling import nnx
    >>> nnx.roles(nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0)))
    {'kernel': Role(kind='hidden', fan=2, residual=False)}
    """
    layers = dict(nnx.iter_modules(model))
    shapes = {path: param.shape for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    found = roles_of("nnx.roles", shapes, lambda path: layers.get(path[:-1]), residual)
    return unflatten_dict(dict(zip(shapes, found, strict=True)))


def _promoted(dtype, *arrays) -> tuple:
    values = tuple(x.get_value() if isinstance(x, nnx.Variable) else x for x in arrays)
    return promote_dtype(values, dtype=dtype)
