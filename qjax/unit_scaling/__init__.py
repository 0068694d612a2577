"""Unit scaling and u-muP: every activation, weight and gradient starts with a standard deviation of 1."""

from qjax.unit_scaling._activations import gelu, silu, silu_glu, softmax
from qjax.unit_scaling._attention import dot_product_attention
from qjax.unit_scaling._conv import conv_general_dilated
from qjax.unit_scaling._linear import linear, linear_readout, matmul
from qjax.unit_scaling._losses import cross_entropy
from qjax.unit_scaling._norms import embedding, layer_norm, rms_norm
from qjax.unit_scaling._residual import add, residual_add, residual_split
from qjax.unit_scaling._scale import scale_bwd, scale_fwd
from qjax.unit_scaling._u_mup import Role, residual_taus

__all__ = [
    "Role",
    "add",
    "conv_general_dilated",
    "cross_entropy",
    "dot_product_attention",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_readout",
    "matmul",
    "residual_add",
    "residual_split",
    "residual_taus",
    "rms_norm",
    "scale_bwd",
    "scale_fwd",
    "silu",
    "silu_glu",
    "softmax",
]
