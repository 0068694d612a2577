"""Flax linen layers of unit variance, and the roles of their parameters.

They have the names, the shapes and, as far as they go, the fields of Flax's own. All weights start with a standard
deviation of 1, and ``use_bias`` is False unless it is set, as in the authors' library.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import canonicalize_padding
from jax import lax

from qjax import unit_scaling as us
from qjax.unit_scaling._conv import channels_last, each
from qjax.unit_scaling._linear import DotGeneral
from qjax.unit_scaling._scale import Constraint
from qjax.unit_scaling._u_mup import Kind, roles_of

UNIT = nn.initializers.normal(1.0)


class DenseGeneral(nn.Module):
    """``flax.linen.DenseGeneral`` of unit variance: ``qjax.unit_scaling.linear`` over the last ``axes`` axes.

    The kernel has the input axes, then those of ``features``. ``constraint``, ``precision`` and ``dot_general`` are
    those of the function.
    """

    features: int | Sequence[int]
    axes: int = 1
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = UNIT
    bias_init: Callable = nn.initializers.zeros
    precision: lax.PrecisionLike = None
    constraint: Constraint | None = "to_output_scale"
    dot_general: DotGeneral = lax.dot_general

    role: ClassVar[Kind] = "hidden"
    operation: ClassVar[Callable] = staticmethod(us.linear)

    @nn.compact
    def __call__(self, inputs):
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        shape = inputs.shape[inputs.ndim - self.axes :] + features
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, features, self.param_dtype) if self.use_bias else None
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        options = dict(constraint=self.constraint, precision=self.precision, dot_general=self.dot_general)
        return self.operation(inputs, kernel, bias, axes=self.axes, **options)


class Dense(DenseGeneral):
    """``flax.linen.Dense`` of unit variance: ``qjax.unit_scaling.linear``.

    >>> import jax, jax.numpy as jnp
    >>> from qjax.unit_scaling import linen
    >>> x = jax.random.normal(jax.random.key(0), (64, 256))
    >>> y, _ = linen.Dense(256).init_with_output(jax.random.key(1), x)
    >>> y.std()
    Array(1.000..., dtype=float32)
    """


class DenseReadout(DenseGeneral):
    """The last layer of a network, ``qjax.unit_scaling.linear_readout`` with the parameters of ``flax.linen.Dense``."""

    constraint: Constraint | None = None

    role: ClassVar[Kind] = "output"
    operation: ClassVar[Callable] = staticmethod(us.linear_readout)


class Conv(nn.Module):
    """``flax.linen.Conv`` of unit variance: ``qjax.unit_scaling.conv_general_dilated``, for (batch, ..., features)."""

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Any = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: lax.PrecisionLike = None
    kernel_init: Callable = UNIT
    bias_init: Callable = nn.initializers.zeros
    constraint: Constraint | None = "to_output_scale"
    conv_general_dilated: Callable = lax.conv_general_dilated

    role: ClassVar[Kind] = "hidden"

    @nn.compact
    def __call__(self, inputs):
        size = tuple(self.kernel_size)
        shape = (*size, inputs.shape[-1] // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = us.conv_general_dilated(
            inputs,
            kernel,
            each(self.strides, size),
            canonicalize_padding(self.padding, len(size)),
            each(self.kernel_dilation, size),
            channels_last(inputs.ndim),
            self.feature_group_count,
            constraint=self.constraint,
            precision=self.precision,
            conv_general_dilated=self.conv_general_dilated,
        )
        return y if bias is None else y + jnp.broadcast_to(us.scale_bwd(bias, (y.shape[-1] / y.size) ** 0.5), y.shape)


class Embed(nn.Module):
    """``flax.linen.Embed`` of unit variance: ``qjax.unit_scaling.embedding``; ``attend`` is ``linear_readout``."""

    num_embeddings: int
    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Callable = UNIT

    role: ClassVar[Kind] = "input"

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(self, inputs):
        (embedding,) = promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        return us.embedding(embedding, inputs)

    def attend(self, query):
        query, embedding = promote_dtype(query, self.embedding, dtype=self.dtype)
        return us.linear_readout(query, embedding.T)


class LayerNorm(nn.Module):
    """``flax.linen.LayerNorm`` over the last axis, with unit gradients: ``qjax.unit_scaling.layer_norm``."""

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable = nn.initializers.zeros
    scale_init: Callable = nn.initializers.ones

    role: ClassVar[Kind] = "norm"

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
        return us.layer_norm(x, scale, bias, epsilon=self.epsilon)


class RMSNorm(nn.Module):
    """``flax.linen.RMSNorm`` over the last axis, with unit gradients: ``qjax.unit_scaling.rms_norm``."""

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Callable = nn.initializers.ones

    role: ClassVar[Kind] = "norm"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype) if self.use_scale else None
        x, scale = promote_dtype(x, scale, dtype=self.dtype)
        return us.rms_norm(x, scale, epsilon=self.epsilon)


class MultiHeadDotProductAttention(nn.Module):
    """``flax.linen.MultiHeadDotProductAttention`` of unit variance, self-attention if called with one input.

    Parameters are those of ``query``, ``key``, ``value`` and ``out``; between them is
    ``qjax.unit_scaling.dot_product_attention``, whose arguments ``is_causal``, ``mult`` and ``bias`` are here, too.
    """

    num_heads: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    use_bias: bool = False
    is_causal: bool = False
    mult: float = 1.0
    precision: lax.PrecisionLike = None
    kernel_init: Callable = UNIT
    dot_general: DotGeneral = lax.dot_general

    @nn.compact
    def __call__(self, inputs_q, inputs_k=None, inputs_v=None, *, bias=None, mask=None):
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        width = self.qkv_features or inputs_q.shape[-1]
        if width % self.num_heads:
            raise ValueError(
                f"linen.MultiHeadDotProductAttention: num_heads {self.num_heads} must divide the {width} features; "
                "set qkv_features."
            )
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        products: Any = dict(precision=self.precision, dot_general=self.dot_general)
        options: Any = dict(use_bias=self.use_bias, kernel_init=self.kernel_init, **dtypes, **products)
        heads = (self.num_heads, width // self.num_heads)
        named = zip(("query", "key", "value"), (inputs_q, inputs_k, inputs_v), strict=True)
        query, key, value = (DenseGeneral(heads, name=name, **options)(x) for name, x in named)
        y = us.dot_product_attention(
            query, key, value, bias, mask, is_causal=self.is_causal, mult=self.mult, **products
        )
        return DenseGeneral(self.out_features or inputs_q.shape[-1], axes=2, name="out", **options)(y)


class GatedMLP(nn.Module):
    """Returns ``down(silu_glu(up(x), gate(x)))``, with as many outputs as inputs.

    Its three ``Dense`` layers are unconstrained: each has the factors of its own, whose product is the same forward and
    backward.
    """

    hidden_features: int
    mult: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: lax.PrecisionLike = None
    kernel_init: Callable = UNIT
    dot_general: DotGeneral = lax.dot_general

    @nn.compact
    def __call__(self, x):
        options: Any = {
            f: getattr(self, f) for f in ("dtype", "param_dtype", "precision", "kernel_init", "dot_general")
        }
        up, gate = (Dense(self.hidden_features, constraint=None, name=n, **options)(x) for n in ("up", "gate"))
        y = us.silu_glu(up, gate, mult=self.mult)
        return Dense(x.shape[-1], constraint=None, name="down", **options)(y)


def roles(model: nn.Module, *args, residual: str | None = None, **kwargs) -> Any:
    """Returns the role of every parameter of a model of these layers, as a pytree of ``qjax.unit_scaling.Role``.

    Args:
      model: any linen module whose parameters are all of layers of this module.
      *args, **kwargs: what ``model.init`` takes after the key; it is traced, not run.
      residual: a pattern for the paths of the parameters in residual branches, such as ``"block_.*"``.

    Raises:
      ValueError: for a parameter of another layer, or a pattern that matches nothing.

    >>> import jax.numpy as jnp
    >>> from qjax.unit_scaling import linen
    >>> linen.roles(linen.Dense(3), jnp.ones((1, 2), jnp.float32))["kernel"]
    Role(kind='hidden', fan=2, residual=False)
    """
    layers = {}

    def noted(call, args, kwargs, context):
        layers[context.module.path] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(noted):
        params = jax.eval_shape(lambda key: model.init(key, *args, **kwargs)["params"], jax.random.key(0))

    named, structure = jax.tree_util.tree_flatten_with_path(params)
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in named}
    found = roles_of("linen.roles", shapes, lambda path: layers.get(path[:-1]), residual)
    return jax.tree.unflatten(structure, found)
