"""What a wrong call says: function, argument, expected, got, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

X = jnp.ones((4, 48), jnp.float32)
KEY = jax.random.key(0)

REFUSALS = {
    "chop: x is a float64 NumPy array, which JAX would first round to 32 bits": lambda: qjax.chop(np.ones(3), "e4m3"),
    "chop: x is a complex128 NumPy array": lambda: qjax.chop(np.ones(3) * 1j, "e4m3"),
    "encode: x is a float64 NumPy array": lambda: qjax.encode(np.float64(1.0), "e4m3"),
    "chop: x has dtype int32; expected float32": lambda: qjax.chop(jnp.arange(3), "e4m3"),
    "chop: x has dtype int64; expected float32": lambda: qjax.chop(3, "e4m3"),
    "chop: x has dtype float8_e4m3fn": lambda: qjax.chop(jnp.ones(3, jnp.float8_e4m3fn), "e4m3"),
    "chop: x must be an array, got a list": lambda: qjax.chop([1.0], "e4m3"),
    "format: unknown name 'mxfp5'; the nearest are mxfp4": lambda: qjax.chop(X, "mxfp5"),
    "chop: unknown rounding 'nearest'; expected one of nearest_even, ": lambda: qjax.chop(X, "e4m3", "nearest"),
    "needs key=jax.random.key\\(...\\), or the random words themselves as random_bits, got neither": lambda: qjax.chop(
        X, "e4m3", "stochastic"
    ),
    "as random_bits, got both": lambda: qjax.chop(
        X, "e4m3", "stochastic", key=KEY, random_bits=jnp.ones(X.shape, jnp.uint8)
    ),
    "chop: key was given, but rounding 'nearest_even' draws nothing": lambda: qjax.chop(X, "e4m3", key=KEY),
    "chop: random_bits was given, but rounding 'to_odd' draws nothing": lambda: qjax.chop(
        X, "e4m3", "to_odd", random_bits=3
    ),
    "chop: rounding 'stochastic_c' on float32 takes 1 to 30 random bits, got 31": lambda: qjax.chop(
        X, "e4m3", "stochastic_c", key=KEY, random_bits=31
    ),
    "takes 1 to 32 random bits, got 0": lambda: qjax.chop(X, "e4m3", "stochastic", key=KEY, random_bits=0),
    "random_bits must be an int or an unsigned array of shape \\(4, 48\\), got uint8\\[3\\]": lambda: qjax.chop(
        X, "e4m3", "stochastic", random_bits=jnp.ones(3, jnp.uint8)
    ),
    "chop: scale was given, but Float\\(4, 3, specials='fn'\\) has no scale": lambda: qjax.chop(X, "e4m3", scale=1.0),
    "chop: scale must be a float array, got int32": lambda: qjax.chop(X, "int8_channel", scale=jnp.arange(4)),
    "chop: scale of shape \\(3,\\) does not broadcast to \\(4, 2\\), one for each block": lambda: qjax.chop(
        X, "mxfp4", scale=jnp.ones(3, jnp.float32)
    ),
    "chop: axis 2 does not exist in x of shape \\(4, 48\\)": lambda: qjax.chop(X, "mxfp4", axis=2),
    "chop: axis -3 does not exist": lambda: qjax.chop(X, "int8_channel", axis=-3),
    "chop: spec P\\('d', None, 'e'\\) has 3 entries, and x has 2 axes": lambda: qjax.chop(
        X, "mxfp4", spec=jax.P("d", None, "e")
    ),
    "chop: blocks of 32 of Scaled.* would lie across the devices of \\('d',\\), each of which has 48": lambda: (
        qjax.chop(X, "mxfp4", spec=jax.P(None, "d"))
    ),
    "chop: blocks of 3 of Scaled.* would lie across the devices of \\('d',\\), each of which has 4": lambda: qjax.chop(
        X, "e4m3_3x16", spec=jax.P("d")
    ),
    "chop: scales over devices are those of the largest magnitude, but .* has another rule": lambda: qjax.chop(
        X, qjax.Scaled(qjax.Fixed(8), qjax.format("fp32"), None, rule="mse"), spec=jax.P("d")
    ),
    "Quantizer: spec must be a jax.P of mesh axes": lambda: qjax.Quantizer("e4m3", spec=jax.P(jax.P.UNCONSTRAINED)),
    "Quantizer: faults strike the memory of a device": lambda: qjax.Quantizer(
        "e4m3", faults=qjax.Faults(0.5), spec=jax.P()
    ),
    "encode: axis 5 does not exist": lambda: qjax.encode(X, "nvfp4", axis=5),
    "chop: tiles of \\(128, 128\\) need 2 axes, x has shape \\(48,\\)": lambda: qjax.chop(X[0], "e4m3_128x128"),
    "chop: axis=0 was given, but tiles lie over the last axes": lambda: qjax.chop(X, "e4m3_2x2", axis=0),
    "chop: .* wraps 40 bits, more than the 32 that float32 is worked on with": lambda: qjax.chop(
        X, qjax.Fixed(40, overflow="wrap")
    ),
}


def dot(recipe, lhs=X, rhs=X.T, **options):
    return qjax.dot_general(lhs, rhs, (((1,), (0,)), ((), ())), recipe=recipe, **options)


def conv(recipe, groups=1):
    x, w = jnp.ones((1, 4, 6), jnp.float32), jnp.ones((4, 4 // groups, 3), jnp.float32)
    return qjax.conv_general_dilated(x, w, (1,), "SAME", feature_group_count=groups, recipe=recipe)


E4M3, INT8, INT16, STOCHASTIC = (qjax.Quantizer(*a) for a in (("e4m3",), ("int8",), ("int16",), ("e2m1", "stochastic")))
Gemm, Recipe, Accumulator, Hadamard = qjax.Gemm, qjax.Recipe, qjax.Accumulator, qjax.Hadamard
QUANTIZED = Recipe(Gemm(E4M3, E4M3))

REFUSALS |= {
    "Quantizer: estimator must be callable, got 'ste'; use qjax.StraightThrough": lambda: qjax.Quantizer(
        "e4m3", estimator="ste"
    ),
    "Quantizer: unknown rounding 'up'": lambda: qjax.Quantizer("e4m3", "up"),
    "Quantizer: x is a float64 NumPy array": lambda: qjax.Quantizer("e4m3", estimator=qjax.Clipped())(np.ones(3)),
    "Gemm: lhs must be a Quantizer or None, got 'e4m3'": lambda: Gemm("e4m3"),
    "Gemm: accumulator must be an Accumulator or None, got 'fp16'": lambda: Gemm(accumulator="fp16"),
    "Gemm: rotate_rhs must be a Hadamard or None, got 16": lambda: Gemm(rotate_rhs=16),
    "Recipe: drhs must be a Gemm, got None": lambda: Recipe(drhs=None),
    "Recipe: save_lhs must be a Quantizer, 'quantized' or None, got 'fp8'": lambda: Recipe(save_lhs="fp8"),
    "Recipe: rotate_lhs and rotate_rhs of forward cannot go with save='quantized'": lambda: Recipe(
        Gemm(rotate_lhs=Hadamard(4)), save_rhs="quantized"
    ),
    "Recipe: history must be at least 1, got 0": lambda: Recipe(history=0),
    "Recipe: delayed scaling \\(history\\) needs one scale a tensor, got Float": lambda: Recipe(Gemm(E4M3), history=4),
    "Recipe.init: the recipe has no state": lambda: Recipe().init(),
    "dot_general: recipe must be a qjax.Recipe or None, got 'fp8'": lambda: dot("fp8"),
    "dot_general: the recipe is stochastic; give key=": lambda: dot(Recipe(Gemm(STOCHASTIC))),
    "dot_general: key was given, but nothing in the recipe is stochastic": lambda: dot(QUANTIZED, key=KEY),
    "dot_general: key was given, but nothing": lambda: dot(None, key=KEY),
    "dot_general: the recipe needs state=recipe.init": lambda: dot(
        Recipe(Gemm(qjax.Quantizer("e4m3_tensor")), history=4)
    ),
    "dot_general: the recipe has no delayed scaling; leave state out": lambda: dot(QUANTIZED, state={}),
    "dot_general: lhs has dtype int32; only float32": lambda: dot(QUANTIZED, X.astype(jnp.int32)),
    "dot_general: rhs has dtype float8_e5m2; only float32": lambda: dot(QUANTIZED, rhs=X.T.astype(jnp.float8_e5m2)),
    "dot_general: rhs is a float64 NumPy array, which JAX would first round": lambda: dot(
        QUANTIZED, rhs=np.ones((48, 4))
    ),
    "dot_general: lhs must be an array, got a list": lambda: dot(QUANTIZED, [[1.0] * 48]),
    "conv_general_dilated: a convolution can be rotated along its features alone \\(rotate\\), and not": lambda: conv(
        Recipe(Gemm(rotate_lhs=Hadamard(4)))
    ),
    "features alone \\(rotate\\), and not in groups": lambda: conv(Recipe(Gemm(rotate=Hadamard(2))), groups=2),
    "Accumulator: fmt must be a Float or a Fixed, got Codebook": lambda: Accumulator("ternary"),
    "Accumulator: Float\\(8, 22\\) with rounding 'nearest_even' cannot be rounded once": lambda: Accumulator("e8m22"),
    "with rounding 'stochastic' cannot be rounded once": lambda: Accumulator("fp32", "stochastic"),
    "Accumulator: a Fixed register has at most 32 bits, or 31 unsigned, got Fixed\\(40": lambda: Accumulator("int40"),
    "or 31 unsigned, got Fixed\\(32, signed=False": lambda: Accumulator("uint32"),
    "Accumulator: Fixed\\(32\\) sums integers exactly; leave rounding": lambda: Accumulator("int32", "stochastic"),
    "sums integers exactly; leave rounding and saturate out": lambda: Accumulator("int32", saturate=True),
    "Accumulator: chunk must be positive and promote a multiple of it, got chunk=0": lambda: Accumulator(
        "fp16", chunk=0
    ),
    "promote a multiple of it, got chunk=4, promote=6": lambda: Accumulator("fp16", chunk=4, promote=6),
    "Accumulator: detect needs a Fixed register": lambda: Accumulator("fp16", detect=True),
    "dot_general: the register Fixed\\(32\\) sums integers of 0 fraction bits; the operands have Float": lambda: dot(
        Recipe(Gemm(E4M3, INT8, Accumulator("int32")))
    ),
    "the operands have Fixed\\(8, 4\\) and Fixed\\(8\\)": lambda: dot(
        Recipe(Gemm(qjax.Quantizer("q4.4"), INT8, Accumulator("int32")))
    ),
    "conv_general_dilated: the register .* the operands have None and None": lambda: conv(
        Recipe(Gemm(accumulator=Accumulator("int32")))
    ),
    "dot_general: elements of a Fixed register fit 32 bits; got Fixed\\(40": lambda: dot(
        Recipe(Gemm(qjax.Quantizer("int40"), INT8, Accumulator("int32")))
    ),
    "dot_general: the sum of 4 products of Fixed\\(16\\) and .* unseen; take a chunk of at most 1,": lambda: dot(
        Recipe(Gemm(INT16, INT16, Accumulator("int32", chunk=4)))
    ),
    "conv_general_dilated: a convolution in groups takes no spec": lambda: conv(
        QUANTIZED.sharded(jax.P("d"), jax.P(), jax.P("d")), groups=2
    ),
    "dot_general: lhs has 48 elements together on a device, not a multiple of the size of Hadamard\\(size=32": lambda: (
        dot(Recipe(Gemm(qjax.Quantizer("e4m3", spec=jax.P(None, "d")), E4M3, rotate=Hadamard(32))))
    ),
    "Quantizer: blocks of 32 of .* devices of \\('d',\\), each of which has 48 elements together": lambda: dot(
        Recipe(Gemm(qjax.Quantizer("mxfp4", spec=jax.P(None, "d"))))
    ),
    "Recipe.sharded: lhs, rhs and out must be a jax.P, got None": lambda: QUANTIZED.sharded(None, jax.P(), jax.P()),
    "Recipe.sharded: the recipe has a stochastic accumulator, whose bits depend": lambda: Recipe(
        Gemm(accumulator=Accumulator("fp16", "stochastic"))
    ).sharded(jax.P(), jax.P(), jax.P()),
    "quantize_params: codes are stored before they are split over a mesh": lambda: qjax.quantize_params(
        {"kernel": X}, qjax.Quantizer("e4m3", spec=jax.P("d"))
    ),
    "Hadamard: size must be a power of two, got 12": lambda: Hadamard(12),
    "Hadamard: signs must be 2 numbers of 1 and -1, got \\(1, 0\\)": lambda: Hadamard(2, (1, 0)),
    "Hadamard: axis -1 has 48 elements, not a multiple of the size 32": lambda: Hadamard(32)(X),
    "Hadamard: random signs need key=": lambda: Hadamard(4, "random").inverse(X),
}


def test_an_accumulator_refuses_float64():
    with jax.enable_x64(), pytest.raises(TypeError, match="dot_general: an Accumulator works on float32; got float64"):
        x = jnp.ones((2, 2), jnp.float64)
        dot(Recipe(Gemm(accumulator=Accumulator("fp16"))), x, x)


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((ValueError, TypeError), match=text):
        REFUSALS[text]()


@pytest.mark.parametrize("text", ["needs key=jax.random.key", "scale of shape"])
def test_refusals_come_while_tracing_too(text):
    with pytest.raises(ValueError, match=text):
        jax.jit(REFUSALS.get(text) or next(f for t, f in REFUSALS.items() if text in t))()


def test_a_python_float_and_a_float32_numpy_array_are_taken():
    assert qjax.chop(0.3, "e4m3").dtype == jnp.float32
    assert qjax.chop(np.ones(2, np.float32), "e4m3").dtype == jnp.float32
    assert qjax.chop(np.float16(0.3), "e4m3").dtype == jnp.float16
