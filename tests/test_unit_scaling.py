"""Unit scaling: every factor of the table, unit deviations, the layers, and the learning rates of u-muP."""

import functools

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
import qjax.linen
import qjax.unit_scaling as us
from qjax.optim import scale_by_u_mup
from qjax.unit_scaling import linen, nnx

CONV = dict(window_strides=(2, 2), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2)


def normal(*shapes, seed=0):
    """Returns arrays of standard normal numbers; an integer is a seed of its own."""
    draws = np.random.default_rng(seed)
    return tuple(jnp.asarray(draws.standard_normal(shape), jnp.float32) for shape in shapes)


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


# The plain operations, as the papers write them.
def plain_linear(x, kernel, bias=None):
    y = jnp.tensordot(x, kernel, 1)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def plain_layer_norm(x, scale, bias):
    y = jax.nn.standardize(x, epsilon=1e-6)
    return y * jnp.broadcast_to(scale, y.shape) + jnp.broadcast_to(bias, y.shape)


def plain_rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * jnp.broadcast_to(scale, x.shape)


def plain_add(x, y):
    return x + jnp.broadcast_to(y, x.shape)


def between(a, lower, upper):
    return np.exp((1 - a) * np.log(lower) + a * np.log(upper))


RELU = (2 / (1 - 1 / np.pi)) ** 0.5
part = functools.partial
# The operation, the plain one, shapes of the arguments, and the factors of the output and of each gradient.
FACTORS = {
    "matmul": (part(us.matmul, constraint=None), jnp.matmul, [(8, 16), (16, 4)], [16**-0.5, 4**-0.5, 8**-0.5]),
    "matmul, stacked": (us.matmul, jnp.matmul, [(3, 8, 16), (3, 16, 4)], [16**-0.5] * 3),
    "matmul, left": (part(us.matmul, constraint="to_left_grad_scale"), jnp.matmul, [(8, 5), (5, 4)], [4**-0.5] * 3),
    "matmul, right": (part(us.matmul, constraint="to_right_grad_scale"), jnp.matmul, [(8, 5), (5, 4)], [8**-0.5] * 3),
    "matmul, gmean": (
        part(us.matmul, constraint="gmean"), jnp.matmul, [(8, 5), (5, 4)], [(8 * 5 * 4) ** (-1 / 6)] * 3,
    ),
    "matmul, hmean": (
        part(us.matmul, constraint="hmean"), jnp.matmul, [(9, 4), (4, 16)], [3 / (3 + 2 + 4)] * 3,
    ),
    "linear": (us.linear, plain_linear, [(2, 4, 16), (16, 64), (64,)], [1 / 4, 1 / 4, 8**-0.5, 8**-0.5]),
    "linear, free": (part(us.linear, constraint=None), plain_linear, [(8, 16), (16, 64)], [1 / 4, 1 / 8, 8**-0.5]),
    "linear, gmean": (
        part(us.linear, constraint="gmean"), plain_linear, [(8, 16), (16, 64)], [32**-0.5, 32**-0.5, 8**-0.5],
    ),
    "linear, amean": (part(us.linear, constraint="amean"), plain_linear, [(8, 16), (16, 64)], [3 / 16] * 2 + [8**-0.5]),
    "linear, gradient": (
        part(us.linear, constraint="to_grad_input_scale"), plain_linear, [(8, 16), (16, 64)], [1 / 8] * 2 + [8**-0.5],
    ),
    "linear, axes": (
        part(us.linear, axes=2, constraint=None), part(jnp.tensordot, axes=2),
        [(2, 4, 3, 5), (3, 5, 7)], [15**-0.5, 7**-0.5, 8**-0.5],
    ),
    "linear_readout": (us.linear_readout, plain_linear, [(8, 16), (16, 64)], [1 / 16, 1 / 8, 8**-0.5]),
    "conv": (
        part(us.conv_general_dilated, constraint=None, **CONV), part(jax.lax.conv_general_dilated, **CONV),
        [(2, 9, 9, 4), (3, 3, 2, 8)], [(2 * 9) ** -0.5, (4 * 2 / (8 * 9)) ** 0.5, (2 * 4 * 4) ** -0.5],
    ),
    "add": (us.add, plain_add, [(3, 4), (3, 4)], [2**-0.5] * 3),
    "add, broadcast": (part(us.add, constraint=None), plain_add, [(3, 4), (4,)], [2**-0.5, 1, 3**-0.5]),
    "add, one element": (us.add, plain_add, [(3, 4), ()], [1, 1, 1]),
    "gelu": (us.gelu, jax.nn.gelu, [(64,)], [between(0.8, 2, RELU)] * 2),
    "gelu, exact, sharp": (
        part(us.gelu, approximate=False, mult=2.0, constraint=None), lambda x: jax.nn.gelu(x * 2, False) / 2,
        [(64,)], [between(1 / (1 + 0.25 / 4), 2, RELU), between(1 / (1 + 0.25 / 4), 2, 2**0.5)],
    ),
    "silu": (
        part(us.silu, mult=2.0, constraint=None), lambda x: x * jax.nn.sigmoid(x * 2),
        [(64,)], [between(1 / (1 + 0.25 / 4), 2, RELU), between(1 / (1 + 1 / 4), 2, 2**0.5)],
    ),
    "silu_glu": (
        part(us.silu_glu, mult=2.0), lambda x, g: x * g * jax.nn.sigmoid(g * 2),
        [(64,), (64,)], [between(0.8, 2, 2**0.5)] * 3,
    ),
    "softmax": (us.softmax, jax.nn.softmax, [(4, 64)], [between(0.2, 64, 8)] * 2),
    "softmax, free": (
        part(us.softmax, axis=0, mult=2.0, constraint=None), lambda x: jax.nn.softmax(x * 2, 0),
        [(4, 64)], [between(0.5, 4, 2), between(0.5, 2, 2**0.5)],
    ),
    "layer_norm": (us.layer_norm, plain_layer_norm, [(2, 4, 16), (16,), (16,)], [1, 1, 8**-0.5, 8**-0.5]),
    "rms_norm": (us.rms_norm, plain_rms_norm, [(8, 16), (16,)], [1, 1, 8**-0.5]),
    "embedding": (
        lambda table: us.embedding(table, jnp.arange(12).reshape(3, 4) % 5),
        lambda table: table[jnp.arange(12).reshape(3, 4) % 5], [(5, 4)], [1, (5 / 12) ** 0.5],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTORS)
def test_outputs_and_gradients_are_the_plain_ones_times_the_factor(name):
    ours, plain, shapes, (out, *gradients) = FACTORS[name]
    args = normal(*shapes)
    (y, pull), (plain_y, plain_pull) = jax.vjp(ours, *args), jax.vjp(plain, *args)
    # Eager, the operations are the same ones; the factor, computed in another way, may be the next float32.
    close = functools.partial(np.testing.assert_allclose, rtol=3 * 2**-24)
    close(y, plain_y * np.float32(out))
    (g,) = normal(y.shape, seed=1)
    for ours_of, plain_of, factor in zip(pull(g), plain_pull(g), gradients, strict=True):
        close(ours_of, plain_of * np.float32(factor))


@pytest.mark.parametrize("name", FACTORS)
def test_operations_compile_once_and_batch(name):
    ours, _, shapes, _ = FACTORS[name]
    args = [np.asarray(x) for x in normal(*[(3, *shape) for shape in shapes])]

    def with_gradients(*args):
        y, pull = jax.vjp(ours, *args)
        return y, pull(jnp.ones_like(y))

    jitted = jax.jit(with_gradients)
    one_by_one = [jitted(*(x[i] for x in args)) for i in range(3)]
    assert jitted._cache_size() == 1
    batched = jax.jit(jax.vmap(with_gradients))(*args)
    stacked = jax.tree.map(lambda *x: np.stack(x), *one_by_one)
    # Sums of at most 64 terms of size 10 in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=64 * 10 * 2**-24), batched, stacked)


def test_scale_fwd_and_scale_bwd():
    (x, g) = normal((8,), (8,))
    y, pull = jax.vjp(us.scale_fwd, x, jnp.float32(0.3))
    same((y, *pull(g)), (x * np.float32(0.3), g, jnp.zeros(())))
    y, pull = jax.vjp(us.scale_bwd, x, jnp.float32(0.3))
    same((y, *pull(g)), (x, g * np.float32(0.3), jnp.zeros(())))
    assert us.scale_fwd(x.astype(jnp.bfloat16), 0.3).dtype == jnp.bfloat16
    special = jnp.array([np.nan, np.inf, -0.0], jnp.float32)
    same(us.scale_bwd(special, 2), special)


@pytest.mark.parametrize("name", ["linear", "gelu", "softmax", "layer_norm"])
def test_forward_mode_is_the_transpose_of_reverse_mode(name):
    ours, _, shapes, _ = FACTORS[name]
    args, tangents = normal(*shapes), normal(*shapes, seed=1)
    y, forward = jax.jvp(ours, args, tangents)
    (g,) = normal(y.shape, seed=2)
    backward = jax.vjp(ours, *args)[1](g)
    # Both are one sum of terms of size 1, some 1000 of them.
    np.testing.assert_allclose(jnp.vdot(forward, g), sum(map(jnp.vdot, tangents, backward)), atol=1000 * 2**-20)


def test_residual_branches_have_unit_gradients_and_the_gradient_is_that_of_the_sum():
    (x, g) = normal((8,), (8,))
    tau = 0.5
    branch, skip = us.residual_split(x, tau)
    same((branch, skip), (x, x))

    def f(x, to_branch):
        branch, skip = us.residual_split(x, tau)
        return us.residual_add(jnp.sin(branch) + to_branch, skip, tau)

    y, pull = jax.vjp(f, x, jnp.zeros_like(x))
    a, b = tau / np.sqrt(1 + tau**2), 1 / np.sqrt(1 + tau**2)
    # Some rounded operations on numbers below 4.
    close = functools.partial(np.testing.assert_allclose, atol=16 * 2**-24)
    close(y, a * np.sin(x) + b * x)
    of_x, of_branch = pull(g)
    close(of_x, (a * np.cos(x) + b) * g)
    same(of_branch, g)


def test_tau_may_be_traced():
    taus = jnp.array(us.residual_taus(3), jnp.float32).ravel()
    (x,) = normal((4,))

    def layer(x, tau):
        branch, skip = us.residual_split(x, tau)
        return us.residual_add(jnp.tanh(branch), skip, tau)

    by_scan = jax.grad(lambda x: jax.lax.scan(lambda x, tau: (layer(x, tau), None), x, taus)[0].sum())(x)
    unrolled = jax.grad(lambda x: functools.reduce(layer, map(float, taus), x).sum())(x)
    np.testing.assert_allclose(by_scan, unrolled, rtol=32 * 2**-24)


def test_residual_taus():
    """Against the recurrence of the paper: the variance of the stream, of which each branch adds its share."""
    for layers, mult, ratio in ((1, 1.0, 1.0), (3, 0.5, 2.0), (6, 2.0, 0.25)):
        mlp = mult * np.sqrt(2 / (1 + ratio**2))
        shares = np.array([ratio * mlp, mlp] * layers) ** 2 / layers
        stream = 1 + np.concatenate([[0], np.cumsum(shares)[:-1]])
        taus = us.residual_taus(layers, residual_mult=mult, residual_attn_ratio=ratio)
        np.testing.assert_allclose(np.ravel(taus), np.sqrt(shares / stream), rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_plain_one_over_sigma(causal, masked):
    q, k, v, bias = normal((2, 8, 2, 16), (2, 8, 2, 16), (2, 8, 2, 16), (1, 2, 1, 8))
    mask = jnp.array(np.arange(8) != 3)[None, None, None] if masked else None
    sigma = np.float32(between(1 / (1 + 4 * 16 / 4), np.sqrt((np.log(8) if causal else 1) / 8), 1))
    ours = functools.partial(us.dot_product_attention, bias=bias, mask=mask, is_causal=causal, mult=2.0)
    plain = functools.partial(jax.nn.dot_product_attention, bias=bias, mask=mask, is_causal=causal, scale=2 / 16)
    (y, pull), (plain_y, plain_pull) = jax.vjp(ours, q, k, v), jax.vjp(plain, q, k, v)
    # Three sums of 8 or 16 terms below 8 and an exponential, in another order.
    close = functools.partial(np.testing.assert_allclose, atol=8 * 40 * 2**-24)
    close(y, plain_y / sigma)
    (g,) = normal(y.shape, seed=1)
    jax.tree.map(lambda mine, theirs: close(mine, theirs / sigma), pull(g), plain_pull(g))


def test_attention_with_one_causal_key_is_its_value():
    q, k, v = normal(*[(2, 1, 2, 16)] * 3)
    same(us.dot_product_attention(q, k, v, is_causal=True), v)


@pytest.mark.parametrize("mult", [1.0, 0.5])
def test_cross_entropy(mult):
    logits, labels = normal((6, 10))[0], np.arange(6) % 10
    value, gradient = jax.value_and_grad(us.cross_entropy)(logits, jnp.array(labels), mult=mult)
    p = np.exp(mult * np.float64(logits))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(value, -np.log(p[range(6), labels]).mean(), rtol=16 * 2**-24)
    # One exponential and a sum of 10 in float32; the factor is 10 / 3.
    np.testing.assert_allclose(gradient, (p - np.eye(10)[labels]) * 10 / 3, atol=4 * 16 * 2**-24)


def shapes_of(n):
    tokens = jnp.arange(4 * n) % n
    return {
        "matmul": (part(us.matmul, constraint=None), [(64, n), (n, 128)]),
        "linear": (us.linear, [(64, n), (n, n)]),
        "linear, wide": (part(us.linear, constraint=None), [(64, n), (n, 4 * n)]),
        "conv": (part(us.conv_general_dilated, window_strides=(1,), padding="VALID"), [(4, n, 64), (n, n, 3)]),
        "add": (us.add, [(n,), (n,)]),
        "gelu": (us.gelu, [(64, n)]),
        "silu": (us.silu, [(64, n)]),
        "silu_glu": (us.silu_glu, [(64, n), (64, n)]),
        "softmax": (part(us.softmax, constraint=None), [(64, n)]),
        "layer_norm": (us.layer_norm, [(64, n), (n,), (n,)]),
        "rms_norm": (us.rms_norm, [(64, n), (n,)]),
        "embedding": (lambda table: us.embedding(table, tokens), [(n, 32)]),
        "attention": (us.dot_product_attention, [(2, n, 2, 16)] * 3),
        "causal attention": (part(us.dot_product_attention, is_causal=True), [(2, n, 2, 16)] * 3),
        "cross_entropy": (lambda x: us.cross_entropy(x, jnp.arange(64) % n), [(64, n)]),
    }


# Gradients of query and key are small, as their influence is; the loss is what it is.
NOT_1 = {"attention": (1, 2), "causal attention": (1, 2), "cross_entropy": (0,)}


@pytest.mark.parametrize("n", [64, 256, 1024])
@pytest.mark.parametrize("name", shapes_of(64))
def test_deviations_are_near_1(name, n):
    f, shapes = shapes_of(n)[name]
    if n == 1024 and name == "conv":
        shapes = [(4, 256, 16), (256, 256, 3)]
    args = normal(*shapes)
    shape = jax.eval_shape(f, *args).shape
    (g,) = normal(shape, seed=1) if shape else (jnp.float32(1),)

    @jax.jit
    def of_output_and_gradients(args, g):
        y, pull = jax.vjp(f, *args)
        return [jnp.sqrt(jnp.square(x).mean()) for x in (y, *pull(g))]

    deviations = list(map(float, of_output_and_gradients(args, g)))
    checked = [d for i, d in enumerate(deviations) if i not in NOT_1.get(name, ())]
    assert all(0.5 <= d <= 2 for d in checked), deviations


RECIPE = qjax.recipes.FP8


def test_products_run_in_a_recipe():
    dot = functools.partial(qjax.dot_general, recipe=RECIPE)
    x, w = normal((8, 16), (16, 4))
    numbers = (((1,), (0,)), ((), ()))
    y, pull = jax.vjp(functools.partial(us.linear, constraint=None, dot_general=dot), x, w)
    plain_y, plain_pull = jax.vjp(lambda x, w: dot(x, w, numbers), x, w)
    (g,) = normal(y.shape, seed=1)
    gx, gw = plain_pull(g)
    same((y, *pull(g)), (plain_y / 4, gx / 2, gw * np.float32(8**-0.5)))
    same(us.matmul(x, w, dot_general=dot), plain_y / 4)
    qkv = normal(*[(2, 8, 2, 16)] * 3)
    assert not np.array_equal(us.dot_product_attention(*qkv, dot_general=dot), us.dot_product_attention(*qkv))
    lhs, rhs = normal((2, 9, 9, 4), (3, 3, 2, 8))
    conv = functools.partial(qjax.conv_general_dilated, recipe=RECIPE)
    ours = us.conv_general_dilated(lhs, rhs, conv_general_dilated=conv, **CONV)
    np.testing.assert_allclose(ours, conv(lhs, rhs, **CONV) * np.float32(18**-0.5), rtol=2**-23)


def test_sharded_arrays_give_the_same():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    x, w = normal((16, 64), (64, 32))
    shard = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    f = jax.jit(jax.grad(lambda w, x: us.gelu(us.linear(x, w)).sum()))
    # Sums of 16 terms of size 1 in another order.
    np.testing.assert_allclose(f(w, shard), f(w, x), atol=16 * 4 * 2**-24)


KEY = jax.random.key(0)
(X,) = normal((2, 8, 16))
(IMAGE,) = normal((2, 8, 8, 4))
TOKENS = jnp.arange(16).reshape(2, 8) % 11
BIAS = {"use_bias": True}
# The linen layer, the arguments of both modules, those of the nnx constructor alone, and the input.
LAYERS = {
    "Dense": ("Linear", (32,), BIAS, (16,), X),
    "DenseGeneral": ("LinearGeneral", ((4, 8),), BIAS, (16,), X),
    "DenseReadout": ("LinearReadout", (32,), BIAS, (16,), X),
    "Conv": ("Conv", (8, (3, 3)), BIAS | {"strides": 2, "padding": 1, "feature_group_count": 2}, (4,), IMAGE),
    "Embed": ("Embed", (11, 16), {}, (), TOKENS),
    "LayerNorm": ("LayerNorm", (), {}, (16,), X),
    "RMSNorm": ("RMSNorm", (), {}, (16,), X),
    "MultiHeadDotProductAttention": ("MultiHeadAttention", (4,), BIAS, (), X),
    "GatedMLP": ("GatedMLP", (), {}, (), X),
}


def layer(name):
    """Returns a linen layer and one of nnx."""
    nnx_name, args, options, first, _ = LAYERS[name]
    make_linen, make_nnx = getattr(linen, name), functools.partial(getattr(nnx, nnx_name), rngs=flax.nnx.Rngs(0))
    if name == "GatedMLP":
        return make_linen(24), make_nnx(16, 24)
    if name == "MultiHeadDotProductAttention":
        return make_linen(4, is_causal=True, **options), make_nnx(4, 16, is_causal=True, **options)
    return make_linen(*args, **options), make_nnx(*first, *args, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_parameters_of_flax_and_agree(name):
    x = LAYERS[name][-1]
    model, twin = layer(name)
    params = model.init(KEY, x)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        starts_at = {"bias": 0.0, "scale": 1.0}.get(path[-1].key)
        assert starts_at is None or (leaf == starts_at).all()
        # 3 standard errors of the deviation of the smallest weight, 144 numbers.
        assert starts_at is not None or abs(leaf.std() - 1) < 3 / np.sqrt(2 * 144)
    _, args, options, _, _ = LAYERS[name]
    if hasattr(flax.linen, name):
        theirs = getattr(flax.linen, name)(*args, **options).init(KEY, x)["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, theirs)
    state = flax.nnx.state(twin, flax.nnx.Param)
    pure = flax.nnx.to_pure_dict(state)
    assert jax.tree.map(jnp.shape, pure) == jax.tree.map(jnp.shape, params)
    flax.nnx.replace_by_pure_dict(state, params)
    flax.nnx.update(twin, state)
    same(twin(x), model.apply({"params": params}, x))
    assert linen.roles(model, x) == nnx.roles(twin)


def test_layers_by_hand():
    params = linen.Dense(32, use_bias=True).init(KEY, X)["params"]
    same(linen.Dense(32, use_bias=True).apply({"params": params}, X), us.linear(X, params["kernel"], params["bias"]))
    model = linen.Conv(8, (3, 3), use_bias=True)
    params = model.init(KEY, IMAGE)["params"]
    gradient = jax.grad(lambda p: model.apply({"params": p}, IMAGE).sum())(params)
    np.testing.assert_allclose(gradient["bias"], np.full(8, (2 * 8 * 8) ** 0.5), rtol=2**-22)
    model = linen.Embed(11, 16)
    table = model.init(KEY, TOKENS)["params"]["embedding"]
    attended = model.apply({"params": {"embedding": table}}, X, method="attend")
    same(attended, us.linear_readout(X, table.T))
    twin = nnx.Embed(11, 16, rngs=flax.nnx.Rngs(0))
    same(twin.attend(X), us.linear_readout(X, twin.embedding[...].T))
    half = linen.Dense(32, dtype=jnp.bfloat16)
    assert half.apply(half.init(KEY, X), X).dtype == jnp.bfloat16


class Block(flax.linen.Module):
    tau: float

    @flax.linen.compact
    def __call__(self, x):
        branch, skip = us.residual_split(x, self.tau)
        branch = linen.GatedMLP(32, name="mlp")(linen.RMSNorm(name="norm")(branch))
        return us.residual_add(branch, skip, self.tau)


class Model(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, tokens):
        x = linen.Embed(11, 16, name="embed")(tokens)
        for i in range(2):
            x = Block(0.5, name=f"block_{i}")(x)
        return linen.DenseReadout(11, use_bias=True, name="head")(linen.LayerNorm(name="norm")(x))


class TwinBlock(flax.nnx.Module):
    def __init__(self, rngs):
        self.norm, self.mlp = nnx.RMSNorm(16, rngs=rngs), nnx.GatedMLP(16, 32, rngs=rngs)

    def __call__(self, x):
        branch, skip = us.residual_split(x, 0.5)
        return us.residual_add(self.mlp(self.norm(branch)), skip, 0.5)


def test_models_quantize_and_cover():
    model = Model()
    variables = model.init(KEY, TOKENS)
    quantized = qjax.linen.quantize(model, RECIPE)
    coverage = qjax.coverage(quantized.apply, variables, TOKENS)
    assert len(coverage) == 7 and not coverage.uncovered
    loss = lambda p, m: us.cross_entropy(m.apply({"params": p}, TOKENS), TOKENS)  # noqa: E731
    plain, rounded = (jax.jit(jax.grad(loss), static_argnums=1)(variables["params"], m) for m in (model, quantized))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rounded), strict=True):
        assert 0 < jnp.linalg.norm((a - b).ravel()) < 0.3 * jnp.linalg.norm(a.ravel())


ROLES = {
    "embed/embedding": ("input", 16, False),
    "block_0/mlp/up/kernel": ("hidden", 16, True),
    "block_1/mlp/down/kernel": ("hidden", 32, True),
    "block_1/norm/scale": ("norm", None, True),
    "norm/bias": ("bias", None, False),
    "head/kernel": ("output", None, False),
    "head/bias": ("bias", None, False),
}


def test_learning_rates_of_a_model():
    """By the table of the paper: 1/sqrt(fan) of input and hidden weights, 1/sqrt(depth) in branches."""
    params = Model().init(KEY, TOKENS)["params"]
    roles = linen.roles(Model(), TOKENS, residual="block_.*")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    found = flax.traverse_util.flatten_dict(roles, sep="/")
    for path, (kind, fan, residual) in ROLES.items():
        assert found[path] == us.Role(kind, fan, residual)
    for given in (roles, lambda path, leaf: found[path]):
        rule = scale_by_u_mup(given, depth=2)
        updates, _ = jax.jit(rule.update)(params, rule.init(params))
        scaled = flax.traverse_util.flatten_dict(updates, sep="/")
        for path, (_, fan, residual) in ROLES.items():
            factor = (fan or 1) ** -0.5 * (2**-0.5 if residual else 1)
            np.testing.assert_allclose(scaled[path], flat[path] * factor, rtol=3 * 2**-24)


def test_learning_rates_of_nnx_partition_and_masked():
    model = TwinBlock(flax.nnx.Rngs(0))
    roles = nnx.roles(model, residual=".*")
    optimizer = flax.nnx.Optimizer(
        model, optax.chain(scale_by_u_mup(roles, depth=4), optax.sgd(1.0)), wrt=flax.nnx.Param
    )
    before = model.mlp.down.kernel[...]
    state = flax.nnx.state(model, flax.nnx.Param)
    same(
        scale_by_u_mup(roles, depth=4).update(state, optax.EmptyState())[0].mlp.down.kernel[...],
        before * np.float32((32 * 4) ** -0.5),
    )
    optimizer.update(model, flax.nnx.state(model, flax.nnx.Param))
    np.testing.assert_allclose(model.mlp.down.kernel[...], before * (1 - (32 * 4) ** -0.5), rtol=4 * 2**-24)

    params = dict(zip("ab", normal((16, 2), (16, 2)), strict=True))
    roles = {"a": "hidden", "b": us.Role("hidden", fan=4)}
    masked = optax.masked(scale_by_u_mup(roles), {"a": True, "b": False})
    same(masked.update(params, masked.init(params))[0], {"a": params["a"] / 4, "b": params["b"]})
    parted = optax.partition({"u": scale_by_u_mup(roles), "none": optax.identity()}, {"a": "none", "b": "u"})
    same(parted.update(params, parted.init(params))[0], {"a": params["a"], "b": params["b"] / 2})
    update = jax.jit(scale_by_u_mup(roles).update)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for _ in range(2):
        assert update(half, optax.EmptyState())[0]["a"].dtype == jnp.bfloat16
    assert update._cache_size() == 1


def test_one_step_changes_the_features_as_much_at_every_width():
    """Adam with the factors: the second hidden layer moves by the same; without them the more the wider it is."""

    def moved(width, rule):
        x, y, *weights = normal((64, 16), (64, 4), (16, width), (width, width), (width, 4))
        params = dict(zip(("first", "second", "head"), weights, strict=True))

        def features(p):
            return us.gelu(us.linear(us.gelu(us.linear(x, p["first"])), p["second"]))

        optimizer = optax.chain(optax.scale_by_adam(), rule, optax.scale(-0.5))
        loss = lambda p: optax.squared_error(us.linear_readout(features(p), p["head"]), y).mean()  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):  # optax adds int32 and float32
            updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params))
        return float((features(optax.apply_updates(params, updates)) - features(params)).std())

    rule = scale_by_u_mup({"first": "hidden", "second": "hidden", "head": "output"})
    with_rule, without = ([moved(width, r) for width in (64, 256, 1024)] for r in (rule, optax.identity()))
    print(with_rule, without)
    assert max(with_rule) < 1.5 * min(with_rule)
    assert without[2] > 2 * without[0]


E = jnp.ones
ERRORS = {
    "matmul: a and b must be": lambda: us.matmul(E((2, 3)), E((4, 2))),
    "matmul: constraint must be None or one of to_output_scale, to_left": lambda: us.matmul(
        E((2, 2)), E((2, 2)), constraint="to_grad_input_scale"
    ),
    "linear: the last 1 axes of x": lambda: us.linear(E((2, 3)), E((4, 2))),
    "linear_readout: the last 2 axes of x": lambda: us.linear_readout(E((2, 3)), E((3, 2)), axes=2),
    "linear: constraint must be None or one of .*got 'xavier'": lambda: us.linear(E(2), E((2, 2)), constraint="xavier"),
    "conv_general_dilated: constraint must": lambda: us.conv_general_dilated(
        E((1, 1, 4)), E((1, 1, 2)), (1,), "VALID", constraint="x"
    ),
    "gelu: constraint must": lambda: us.gelu(E(2), constraint="x"),
    "dot_product_attention: query, key and value must be": lambda: us.dot_product_attention(
        E((1, 4, 4, 8)), E((1, 4, 2, 8)), E((1, 4, 2, 8))
    ),
    "cross_entropy: logits must be": lambda: us.cross_entropy(E((2, 1)), jnp.zeros(2, int)),
    "residual_taus: layers must be at least 1, got 0": lambda: us.residual_taus(0),
    "Role: kind must be one of input, hidden, .*'weight'": lambda: us.Role("weight"),
    "linen.MultiHeadDotProductAttention: num_heads 3 must divide the 16": lambda: linen.MultiHeadDotProductAttention(
        3
    ).init(KEY, X),
    "nnx.MultiHeadAttention: num_heads 3 must divide the 16": lambda: nnx.MultiHeadAttention(
        3, 16, rngs=flax.nnx.Rngs(0)
    ),
    "linen.roles: 'kernel' is of no layer with a role": lambda: linen.roles(flax.linen.Dense(3, use_bias=False), X),
    "nnx.roles: 'kernel' is of no layer with a role": lambda: nnx.roles(
        flax.nnx.Linear(2, 3, use_bias=False, rngs=flax.nnx.Rngs(0))
    ),
    "linen.roles: residual 'block' matches none of the paths kernel": lambda: linen.roles(
        linen.Dense(3), X, residual="block"
    ),
    "scale_by_u_mup: roles says nothing of 'b'; its paths are a": lambda: scale_by_u_mup({"a": "norm"}).update(
        {"b": E(2)}, optax.EmptyState()
    ),
    "scale_by_u_mup: 'a' is in a residual branch; give depth": lambda: scale_by_u_mup(
        {"a": us.Role("norm", residual=True)}
    ).update({"a": E(2)}, optax.EmptyState()),
    "scale_by_u_mup: depth was given, but no role is residual": lambda: scale_by_u_mup({"a": "norm"}, depth=2).update(
        {"a": E(2)}, optax.EmptyState()
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    with pytest.raises(ValueError, match=text):
        ERRORS[text]()
