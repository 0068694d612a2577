"""coverage: what it lists, and how it is written."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import qjax
import qjax.linen
import qjax.nnx
from qjax import _coverage

MXFP8, GRADIENT = qjax.Quantizer("mxfp8_e4m3"), qjax.Quantizer("mxfp8_e5m2", "stochastic")
PROJECTION = qjax.Recipe(qjax.Gemm(MXFP8, MXFP8), qjax.Gemm(GRADIENT, MXFP8), qjax.Gemm(MXFP8, GRADIENT))
FP16 = qjax.Recipe(qjax.Gemm(accumulator=qjax.Accumulator("fp16", chunk=4)))
RULE = {"block_.*/(attn/(query|key|value|out)|up|down)": PROJECTION, "block_.*/attn/.*": FP16, "embed": None}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attn")(nn.LayerNorm()(x))
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(65, 32, name="embed")
        x = embed(tokens)
        for i in range(1):
            x = Block(name=f"block_{i}")(x)
        return embed.attend(x)


TABLE = """
path                               | operation   | shapes                        | forward                 | dlhs                               | drhs                               | accumulator
-----------------------------------|-------------|-------------------------------|-------------------------|------------------------------------|------------------------------------|-------------------
block_0/attn/query                 | dot_general | f32[4,8,32] x f32[32,2,16]    | mxfp8_e4m3 x mxfp8_e4m3 | mxfp8_e5m2 stochastic x mxfp8_e4m3 | mxfp8_e4m3 x mxfp8_e5m2 stochastic | -
block_0/attn/key                   | dot_general | f32[4,8,32] x f32[32,2,16]    | mxfp8_e4m3 x mxfp8_e4m3 | mxfp8_e5m2 stochastic x mxfp8_e4m3 | mxfp8_e4m3 x mxfp8_e5m2 stochastic | -
block_0/attn/value                 | dot_general | f32[4,8,32] x f32[32,2,16]    | mxfp8_e4m3 x mxfp8_e4m3 | mxfp8_e5m2 stochastic x mxfp8_e4m3 | mxfp8_e4m3 x mxfp8_e5m2 stochastic | -
block_0/attn/...qhd,...khd->...hqk | dot_general | f32[4,8,2,16] x f32[4,8,2,16] | -                       | -                                  | -                                  | fp16 chunk 4, -, -
block_0/attn/...hqk,...khd->...qhd | dot_general | f32[4,8,2,16] x f32[4,2,8,8]  | -                       | -                                  | -                                  | fp16 chunk 4, -, -
block_0/attn/out                   | dot_general | f32[4,8,2,16] x f32[2,16,32]  | mxfp8_e4m3 x mxfp8_e4m3 | mxfp8_e5m2 stochastic x mxfp8_e4m3 | mxfp8_e4m3 x mxfp8_e5m2 stochastic | -
block_0/up                         | dot_general | f32[4,8,32] x f32[32,64]      | mxfp8_e4m3 x mxfp8_e4m3 | mxfp8_e5m2 stochastic x mxfp8_e4m3 | mxfp8_e4m3 x mxfp8_e5m2 stochastic | -
block_0/down                       | dot_general | f32[4,8,64] x f32[64,32]      | mxfp8_e4m3 x mxfp8_e4m3 | mxfp8_e5m2 stochastic x mxfp8_e4m3 | mxfp8_e4m3 x mxfp8_e5m2 stochastic | -
embed                              | dot_general | f32[4,8,32] x f32[32,65]      | -                       | -                                  | -                                  | -
8 of 9 dots quantized, 80.7 % of the multiply-adds
"""  # noqa: E501


def tokens():
    return jnp.zeros((4, 8), jnp.int32)


def test_the_table_of_a_transformer():
    flax = Transformer()
    variables = jax.eval_shape(flax.init, jax.random.key(0), tokens())
    covered = qjax.linen.coverage(flax, variables, tokens(), rule=RULE)
    assert str(covered) == TABLE.strip()
    quantized = qjax.linen.quantize(flax, RULE)
    variables = flax.init(jax.random.key(0), tokens())
    key = {"quantize": jax.random.key(1)}
    assert str(qjax.linen.coverage(quantized, variables, tokens(), rngs=key)) == str(covered)
    assert str(qjax.coverage(quantized.apply, variables, tokens(), rngs=key)) == str(covered)


def loss(params):
    quantized = qjax.linen.quantize(Transformer(), RULE)
    return quantized.apply({"params": params}, tokens(), rngs={"quantize": jax.random.key(1)}).sum()


def test_a_training_step_has_the_sites_of_its_forward_pass():
    """What differentiation makes of a quantized product belongs to it."""
    params = Transformer().init(jax.random.key(0), tokens())["params"]
    forward, step = qjax.coverage(loss, params), qjax.coverage(jax.value_and_grad(jax.checkpoint(loss)), params)
    assert [site for site in step if site.is_quantized] == [site for site in forward if site.is_quantized]
    assert [site.fixed[:18] for site in step.uncovered] == ["", "it is in a gradien", "it is in a gradien"]


def test_products_of_users_are_seen():
    def f(x):
        with jax.named_scope("own"):
            y = qjax.dot_general(x, x, (((1,), (0,)), ((), ())), recipe=FP16)
            z = qjax.dot_general(x, x, (((1,), (0,)), ((), ())), recipe=FP16)
        image = qjax.conv_general_dilated(x[None, None], x[None, None], (1, 1), "SAME", recipe=FP16)
        return y @ z + image[0, 0]

    covered = qjax.coverage(jax.jit(f), jnp.ones((4, 4), jnp.float32))
    assert [(site.path, site.recipe) for site in covered] == [("own", FP16), ("own", FP16), ("", FP16), ("", None)]
    assert covered[2].operation == "conv_general_dilated" and covered[2].multiply_adds == 4 * 4 * 4 * 4
    assert all(site.source.split(":")[0].endswith("test_coverage.py") for site in covered)


def test_loops_count_their_steps():
    def f(x):
        return lax.scan(lambda c, _: (lax.fori_loop(0, 2, lambda _, c: c @ x, c), None), x, None, length=3)[0]

    (site,) = qjax.coverage(f, jax.ShapeDtypeStruct((4, 4), jnp.float32))
    assert site.times == 6 and site.multiply_adds == 6 * 4**3
    assert "f32[4,4] x f32[4,4], 6 times" in str(qjax.Coverage([site]))


def test_formats_without_a_name_are_shown_by_the_names_of_their_parts():
    named = qjax.Scaled(qjax.midrise(4), qjax.E8M0, 4)
    unnamed = qjax.Codebook((-1.0, 0.0, 2.0))
    recipe = qjax.Recipe(qjax.Gemm(qjax.Quantizer(named), qjax.Quantizer(unnamed)))
    table = str(qjax.coverage(jnp.matmul, jnp.ones((2, 4)), jnp.ones((4, 2)), rule=recipe))
    assert "| Scaled(midrise4, e8m0, 4) x Codebook of 3 |" in table


def test_uncovered_is_what_has_no_recipe_or_an_empty_one():
    def f(x):
        return x @ x @ x

    x = jnp.ones((2, 2), jnp.float32)
    recipes = iter([qjax.Recipe(), FP16])
    covered = qjax.coverage(f, x, rule=lambda site: next(recipes))
    assert covered.uncovered == covered[:1] and isinstance(covered.uncovered, qjax.Coverage)
    assert str(covered).endswith("1 of 2 dots quantized, 50.0 % of the multiply-adds")
    assert str(qjax.coverage(lambda x: x, x)).endswith("0 of 0 dots quantized, 0.0 % of the multiply-adds")


def test_nnx_models_are_listed_by_attribute():
    model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 4, rngs=nnx.Rngs(0)))
    covered = qjax.nnx.coverage(model, jnp.ones((1, 4), jnp.float32), rule={"layers/0": FP16, ".*": None})
    assert [(site.path, site.is_quantized) for site in covered] == [("layers/0", True), ("layers/1", False)]


@pytest.mark.parametrize(
    "name",
    [
        "mxfp4",
        "nvfp4",
        "e4m3_tensor",
        "int8_channel",
        "int4_g128",
        "e4m3_1x128",
        "q8.8",
        "uint4",
        "e6m1",
        "nf4",
        "e4m3",
    ],
)
def test_formats_are_written_as_they_are_named(name):
    assert qjax.format(_coverage.format_text(qjax.format(name))) == qjax.format(name)
    assert _coverage.format_text(qjax.format(name)) == name


def test_formats_without_a_name_are_written_out():
    fmt = qjax.Float(3, 2, bias=7)
    assert _coverage.format_text(fmt) == repr(fmt)
