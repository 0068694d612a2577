"""Serving: models run from codes as they run from weights, files hold them in their bytes, exports are one program."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.linen
import qjax.nnx

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 6, 64), jnp.float32)
IMAGE = jax.random.normal(jax.random.key(2), (2, 5, 5, 32), jnp.float32)


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def same(a, b) -> bool:
    """Whether two trees have the same structure, static parts, dtypes and bits."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(bits(x), bits(y)) for x, y in leaves
    )


def recipe(fmt) -> qjax.Recipe:
    """Both operands in a format, for in some einsums the weight is the lhs."""
    return qjax.Recipe(qjax.Gemm(qjax.Quantizer(fmt), qjax.Quantizer(fmt)))


# Scales per tensor, per channel and in blocks, with and without a mantissa, of two levels, in tiles, with zero points.
FORMATS = ["e4m3", "int8_tensor", "int8_channel", "mxfp4", "mxfp6_e2m3", "nvfp4", "int4_g32", "uint4_g16", "nf4_g16"]
FORMATS += ["e4m3_16x16"]

LINEN = {
    "Dense": (lambda: nn.Dense(48), (X,)),
    "DenseGeneral": (lambda: nn.DenseGeneral((3, 8), axis=(-2, -1)), (X,)),
    "Einsum": (lambda: nn.Einsum((64, 2, 24), "abc,cde->adbe"), (X,)),
    "Conv": (lambda: nn.Conv(24, (3, 3), strides=2), (IMAGE,)),
    "Conv in groups": (lambda: nn.Conv(24, (3,), feature_group_count=2), (X,)),
    "ConvTranspose": (lambda: nn.ConvTranspose(24, (3, 3), strides=(2, 2)), (IMAGE,)),
    "MultiHeadAttention": (lambda: nn.MultiHeadAttention(2), (X,)),
    "LSTMCell": (lambda: nn.LSTMCell(32), ((X[:, 0, :32], X[:, 1, :32]), X[:, 2])),
    "remat": (lambda: nn.remat(nn.Dense)(48), (X,)),
    "RNN": (lambda: nn.RNN(nn.GRUCell(32)), (X,)),
}
NNX = {
    "Linear": (lambda rngs: nnx.Linear(64, 48, rngs=rngs), (X,)),
    "LinearGeneral": (lambda rngs: nnx.LinearGeneral((6, 64), (3, 8), axis=(-2, -1), rngs=rngs), (X,)),
    "Einsum": (lambda rngs: nnx.Einsum("abc,cde->adbe", (64, 2, 24), rngs=rngs), (X,)),
    "Conv": (lambda rngs: nnx.Conv(32, 24, (3, 3), rngs=rngs), (IMAGE,)),
    "MultiHeadAttention": (lambda rngs: nnx.MultiHeadAttention(2, 64, decode=False, rngs=rngs), (X,)),
}


CASES = [("Dense", fmt) for fmt in FORMATS]
CASES += [(name, fmt) for name in LINEN if name != "Dense" for fmt in ("int8_channel", "nvfp4", "int4_g16")]


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_linen_layers_run_from_codes(name, fmt):
    make, args = LINEN[name]
    model = make()
    params = model.init(KEY, *args)["params"]
    axes = qjax.contracted(lambda p, *args: model.apply({"params": p}, *args), params, *args)
    assert {path for path in axes} == {path for path in paths(params) if path.endswith("kernel")}
    stored = qjax.quantize_params(params, fmt, axes=axes)
    served = qjax.linen.quantize(model, recipe(fmt))
    run = jax.jit(lambda p, *args: served.apply({"params": p}, *args))
    assert same(run(stored, *args), run(params, *args))


def paths(tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


@pytest.mark.parametrize("name", NNX)
@pytest.mark.parametrize("fmt", ["int8_channel", "nvfp4", "int4_g16"])
def test_nnx_layers_run_from_codes(name, fmt):
    make, args = NNX[name]
    model = make(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    axes = qjax.contracted(lambda p, *args: nnx.merge(graphdef, p, rest)(*args), params, *args)
    stored = qjax.quantize_params(params, fmt, axes=axes)
    assert axes and all(path.endswith("kernel") for path in axes)
    served = qjax.nnx.quantize(model, recipe(fmt))
    expected = nnx.jit(lambda m, *args: m(*args))(served, *args)
    nnx.update(served, stored)
    assert same(nnx.jit(lambda m, *args: m(*args))(served, *args), expected)
