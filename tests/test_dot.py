"""dot_general: an empty recipe is lax, every part of a recipe is the reference's equation, in any layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import products
from tables import bits

import qjax
from qjax import Gemm, Quantizer as Q, Recipe
from qjax._kernels._target import Target

KEY = jax.random.key(7)
MATRIX = (((1,), (0,)), ((), ()))


def same(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


def equal(a, b) -> bool:
    """Equal in dtype, shape and value; zeros of either sign are equal, for a sum may give either."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)


# name: (lhs shape, rhs shape, dimension numbers)
LAYOUTS = {
    "matrix": ((3, 40), (40, 5), MATRIX),
    "transposed": ((40, 3), (5, 40), (((0,), (1,)), ((), ()))),
    "square": ((6, 6), (6, 6), MATRIX),
    "batched": ((2, 3, 8), (2, 8, 4), (((2,), (1,)), ((0,), (0,)))),
    "batch inside": ((8, 2, 3), (4, 8, 2), (((0,), (1,)), ((1,), (2,)))),
    "two contracted": ((3, 4, 6), (6, 4, 5), (((1, 2), (1, 0)), ((), ()))),
    "three contracted": ((2, 3, 2, 4), (5, 2, 4, 3), (((1, 2, 3), (3, 1, 2)), ((), ()))),
    "attention": ((2, 5, 3, 8), (2, 7, 3, 8), (((3,), (3,)), ((0, 2), (0, 2)))),
    "vectors": ((9,), (9,), (((0,), (0,)), ((), ()))),
    "vector and matrix": ((9,), (9, 4), (((0,), (0,)), ((), ()))),
    "batch of vectors": ((4, 9), (4, 9), (((1,), (1,)), ((0,), (0,)))),
    "outer": ((3,), (4,), (((), ()), ((), ()))),
    "depth 1": ((3, 1), (1, 4), MATRIX),
    "depth 0": ((3, 0), (0, 4), MATRIX),
    "no rows": ((0, 5), (5, 4), MATRIX),
}


def out_shape(lhs, rhs, numbers) -> tuple[int, ...]:
    return jax.eval_shape(lambda x, y: lax.dot_general(x, y, numbers), lhs, rhs).shape


# Law 7.


OPTIONS = ({}, {"precision": lax.Precision.HIGHEST}, {"preferred_element_type": jnp.float32})


@pytest.mark.parametrize(
    ("layout", "dtype", "options"),
    [(layout, "float32", {}) for layout in LAYOUTS]
    + [("batch inside", dtype, o) for dtype in ("float32", "bfloat16", "float16", "float64") for o in OPTIONS],
)
def test_an_empty_recipe_is_lax(layout, dtype, options):
    left, right, numbers = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        lhs, rhs = (jnp.asarray(rng.normal(size=s)).astype(dtype) for s in (left, right))
        out, pullback = jax.vjp(lambda x, y: lax.dot_general(x, y, numbers, **options), lhs, rhs)
        gradient = jnp.asarray(rng.normal(size=out.shape)).astype(out.dtype)
        for recipe in (Recipe(), None):
            ours, pull = jax.vjp(lambda x, y, r=recipe: qjax.dot_general(x, y, numbers, recipe=r, **options), lhs, rhs)
            assert same(ours, out) and all(map(same, pull(gradient), pullback(gradient)))


def test_an_empty_gemm_of_a_recipe_is_lax_too():
    """Where one of the three products is quantized the other two stay lax, bit for bit."""
    rng = np.random.default_rng(1)
    x, w, g = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((5, 64), (64, 7), (5, 7)))
    gemm = Gemm(Q("e5m2"), Q("e5m2"))
    out, pullback = jax.vjp(lambda x, w: lax.dot_general(x, w, MATRIX), x, w)
    plain = (out, *pullback(g))
    for place, name in enumerate(("forward", "dlhs", "drhs")):
        recipe = Recipe(**{name: gemm})
        out, pull = jax.vjp(lambda x, w, r=recipe: qjax.dot_general(x, w, MATRIX, recipe=r), x, w)
        assert [same(a, b) for a, b in zip((out, *pull(g)), plain, strict=True)] == [i != place for i in range(3)]


# Every format.


def whole(rng, shape, largest: float, block: int, step: int = 1) -> np.ndarray:
    """Returns multiples of ``step`` up to ``largest``, and many times it or twice it, so that scales are 1 or 2.

    The scales are those of "absmax" over blocks of the given length along any axis, for elements up to ``largest``.
    """
    end = int(min(largest / step, 40))
    x = rng.integers(-end, end + 1, shape) * step
    top = largest * 2.0 ** rng.integers(0, 2, shape) * rng.choice([-1, 1], shape)
    on = np.zeros(shape, bool)
    for axis, n in enumerate(shape):
        line = [1] * len(shape)
        line[axis] = n
        on |= (np.arange(n) % block == 0).reshape(line)
    return np.where(on, top, x).astype(np.float32)


S = qjax.Scaled
# format: (largest magnitude of the elements, length of the blocks, step of the numbers)
FORMATS = {
    "e4m3": (40, 99), "e2m1": (6, 99), "int8": (127, 99), "q6.2": (31, 99), "bf16": (301, 99), "e6m5": (67, 99),
    "ternary": (3, 99), "posit8": (40, 99),
    "int8_tensor": (127, 99), "int8_channel": (127, 99), "dfp8": (127, 99), "mxfp4": (6, 32),
    S(qjax.Fixed(4, symmetric=True), qjax.FP32, 4): (7, 4), S(qjax.E2M1, qjax.E8M0, 4): (6, 4),
    S(qjax.E4M3, qjax.FP32, (1, 4)): (448, 2, 16), S(qjax.E4M3, qjax.FP32, (4, 4)): (448, 2, 16),
    "e4m3_1x128": (448, 99, 16), "e4m3_128x128": (448, 99, 16),
    S(S(qjax.E2M1, qjax.E4M3, 4), qjax.FP32, None): (2688, 4, 16),
    S(S(qjax.Fixed(4, symmetric=True), qjax.E4M3, 4), qjax.FP32, "axis"): (3136, 4, 16),
}  # fmt: skip


def operands(layout: str, *numbers_of_format):
    left, right, numbers = LAYOUTS[layout]
    rng = np.random.default_rng(len(layout))
    lhs, rhs = (whole(rng, shape, *numbers_of_format) for shape in (left, right))
    return lhs, rhs, whole(rng, out_shape(lhs, rhs, numbers), *numbers_of_format), numbers


def from_rows(result, lhs, rhs, numbers):
    """Returns (out, d lhs, d rhs) of the reference in the layouts of the arguments."""
    out, *gradients = result
    (contract, batch), results = numbers, [out]
    for x, gradient, c, b in zip((lhs, rhs), gradients, contract, batch, strict=True):
        order = [*b, *reference.free_axes(x, b, c), *c]
        results.append(np.transpose(gradient.reshape([x.shape[a] for a in order]), np.argsort(order)))
    return [results[0].reshape(out_shape(lhs, rhs, numbers)), *results[1:]]


def check(fmt, layout: str, mode: str = "eager"):
    quantizer = Q(fmt)
    lhs, rhs, gradient, numbers = operands(layout, *FORMATS[fmt])
    recipe = Recipe(*[Gemm(quantizer, quantizer)] * 3)
    expected = from_rows(reference.linear(lhs, rhs, gradient, numbers, recipe), lhs, rhs, numbers)

    def run(lhs, rhs, gradient):
        out, pullback = jax.vjp(lambda x, y: qjax.dot_general(x, y, numbers, recipe=recipe), lhs, rhs)
        return out, *pullback(gradient)

    arrays = [jnp.asarray(a) for a in (lhs, rhs, gradient)]
    if mode == "vmap":
        ours = [a[1] for a in jax.vmap(run)(*(jnp.stack([jnp.zeros_like(a) + 1, a]) for a in arrays))]
    else:
        ours = (jax.jit(run) if mode == "jit" else run)(*arrays)
    for a, b in zip(ours, expected, strict=True):
        assert equal(a, b), (fmt, layout)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format_equals_the_reference(fmt):
    check(fmt, "matrix")


@pytest.mark.parametrize(
    ("fmt", "layout"),
    [(S(qjax.E2M1, qjax.E8M0, 4), layout) for layout in LAYOUTS if layout not in ("matrix", "batched", "outer")]
    + [("e4m3", layout) for layout in ("transposed", "vectors", "outer", "depth 0", "no rows")]
    + [("int8_channel", "batch inside"), ("int8_channel", "two contracted"), ("int8_tensor", "attention")],
    ids=str,
)
def test_every_layout_equals_the_reference(fmt, layout):
    check(fmt, layout)


@pytest.mark.parametrize("fmt", ["int8", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_xla_pads_no_narrow_product_on_a_gpu(fmt, layout, monkeypatch):
    """Seen on an H200: (3, 40) x (40, 5) of int8 doubled, 16129 among 8 products of bfloat16 rounded to 16128."""
    monkeypatch.setattr(Target, "current", lambda: Target("gpu", "NVIDIA H200"))
    check(fmt, layout, "jit")
    lhs, rhs, _, numbers = operands(layout, *FORMATS[fmt])
    recipe = Recipe(Gemm(Q(fmt), Q(fmt)))
    (eqn,) = products(lambda x, y: qjax.dot_general(x, y, numbers, recipe=recipe), lhs, rhs)
    x, y = (v.aval for v in eqn.invars)
    assert x.dtype == y.dtype == (jnp.bfloat16 if fmt == "bf16" or layout == "depth 0" else jnp.int8)
    _, batch = eqn.params["dimension_numbers"]
    sizes = [n for z, b in zip((x, y), batch, strict=True) for a, n in enumerate(z.shape) if a not in b]
    assert all(n % 16 == 0 for n in sizes)


def test_quantized_operands_are_multiplied_in_full():
    """A TPU and a GPU take bfloat16 and TF32 for float32 where no precision is asked for."""
    x, w = jnp.ones((3, 8), jnp.float32), jnp.ones((8, 5), jnp.float32)
    for asked, taken in ((None, lax.Precision.HIGHEST), (lax.Precision.DEFAULT, lax.Precision.DEFAULT)):
        f = functools.partial(qjax.dot_general, recipe=Recipe(Gemm(Q("e6m9"))), precision=asked)
        (product,) = products(lambda x, w, f=f: f(x, w, MATRIX), x, w)
        assert product.params["precision"] == (taken, taken)


def test_the_result_can_be_transposed_under_jit():
    """XLA's CPU backend has no code for a bfloat16 product that it has merged with a transposition."""
    x, w = jnp.ones((3, 40), jnp.float32), jnp.ones((40, 5), jnp.float32)
    recipe = Recipe(Gemm(Q("e4m3"), Q("e4m3")))
    out = jax.jit(lambda x, w: qjax.dot_general(x, w, MATRIX, recipe=recipe).T)(x, w)
    assert equal(out, np.full((5, 3), 40, np.float32))


@pytest.mark.parametrize("mode", ["jit", "vmap"])
@pytest.mark.parametrize("fmt", ["int8_tensor", S(qjax.E4M3, qjax.FP32, (4, 4))], ids=str)
def test_transformations_equal_the_reference(fmt, mode):
    check(fmt, "batched", mode)


def gradients(f, *args, seed: int = 9):
    """Returns (value, gradients for a random cotangent, the cotangent)."""
    out = jax.eval_shape(f, *args)
    g = jnp.asarray(np.random.default_rng(seed).normal(size=out.shape).astype(np.float32)).astype(out.dtype)

    @jax.jit
    def run(g, *args):
        out, pullback = jax.vjp(f, *args)
        return out, pullback(g)

    return *run(g, *args), g


def normal(*shape, seed: int = 0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def recipe_of(fmt, rounding="nearest_even", **options) -> Recipe:
    q = Q(fmt, rounding, **options)
    return Recipe(Gemm(q, q), Gemm(q, q), Gemm(q, q))


def test_scales_along_the_free_axes_multiply_the_exact_sum():
    """With scales of any value: fl(fl(sum of integers * lhs scale) * rhs scale), where the sum is exact."""
    x, w = normal(7, 40), normal(40, 6, seed=1)
    out = qjax.dot_general(x, w, MATRIX, recipe=Recipe(Gemm(Q("int8_channel"), Q("int8_tensor"))))
    rows, columns = np.asarray(x), np.asarray(w)
    left = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    right = np.abs(columns).max() / np.float32(127)
    integers = np.rint(rows / left).astype(np.int64) @ np.rint(columns / right).astype(np.int64)
    assert equal(out, integers.astype(np.float32) * left * right)


@pytest.mark.parametrize(
    "fmt", ["nf4", S(qjax.NF4, qjax.FP32, 8), "uint4_g32", S(qjax.Fixed(8, signed=False), qjax.E4M3, "axis",
    zero_point=qjax.Fixed(8, signed=False)), "nvfp4", S(qjax.E2M1, qjax.UE5M3, 16)],
    ids=str,
)  # fmt: skip
def test_inexact_scales_are_near_the_reference(fmt):
    """Elements, scales and sums are each rounded in float32.

    A sum of k products in any order has an error of at most k 2^-24 sum |x y| / (1 - k 2^-24) (Higham, 2002, section
    3.1); each of the two operands is rounded once in the reference (element times scale), and the product twice with
    scales apart: 4 more. 1.01 covers the quotient and the second order.
    """
    x, w = normal(5, 40), normal(40, 6, seed=1)
    recipe = recipe_of(fmt)
    out, pulled, g = gradients(lambda x, w: qjax.dot_general(x, w, MATRIX, recipe=recipe), x, w)
    q = Q(fmt)
    a, b, c = np.asarray(x)[None], np.asarray(w).T[None], np.asarray(g)[None]
    for ours, first, second in (
        (out, a, b),
        (pulled[0], c, np.swapaxes(b, 1, 2)),
        (pulled[1], np.swapaxes(a, 1, 2), np.swapaxes(c, 1, 2)),
    ):
        rows = reference.rounded(first, q), reference.rounded(second, q)
        bound = 1.01 * (first.shape[-1] + 4) * 2.0**-24 * reference.dot(*map(np.abs, rows))[0]
        assert (np.abs(np.asarray(ours, np.float64) - reference.dot(*rows)[0]) <= bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_carriers(dtype):
    """Operands are rounded from their own dtype, once; the result is rounded to it at the end."""
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(3)
        x, w = (jnp.asarray(rng.integers(-40, 41, s) * 2.0**-3).astype(dtype) for s in ((5, 24), (24, 6)))
        recipe = recipe_of("e4m3")
        out, pulled, g = gradients(lambda x, w: qjax.dot_general(x, w, MATRIX, recipe=recipe), x, w)
        x4, w4 = (np.asarray(qjax.chop(a, "e4m3", saturate=True)).astype(np.float64) for a in (x, w))
        # Numbers up to 5 in steps of 1/8: sums of 24 products are below 2^10 in steps of 2^-6, exact in float32.
        assert equal(out, (x4 @ w4).astype(np.dtype(dtype)))
        assert pulled[0].dtype == pulled[1].dtype == x.dtype
        wide = "float64" if dtype == "float64" else "float32"
        ours = qjax.dot_general(x, w, MATRIX, preferred_element_type=np.dtype(wide), recipe=recipe)
        assert equal(ours, (x4 @ w4).astype(wide))
        g4 = np.asarray(qjax.chop(g.astype(wide), "e4m3", saturate=True)).astype(np.float64)
        # Random gradients of 4 bits: float32 sums of 6 and 5 products, then one rounding to the dtype.
        for gradient, first, second in ((pulled[0], g4, w4.T), (pulled[1], x4.T, g4)):
            bound = (6 * 2.0**-24 + float(jnp.finfo(dtype).eps) / 2) * 1.01 * (np.abs(first) @ np.abs(second))
            assert (np.abs(np.asarray(gradient).astype(np.float64) - first @ second) <= bound).all()


def test_each_operand_has_its_own_format():
    """Six formats, on square matrices, so that no shape tells the operands apart."""
    formats = ["e4m3", "e5m2", "e3m2", "int4", "e2m3", "e2m1"]
    a, b, c, d, e, f = map(Q, formats)
    recipe = Recipe(Gemm(a, b), Gemm(c, d), Gemm(e, f))
    rng = np.random.default_rng(0)
    x, w, g = (rng.integers(-40, 41, (6, 6)).astype(np.float32) / 4 for _ in range(3))
    out, pullback = jax.vjp(lambda x, w: qjax.dot_general(x, w, MATRIX, recipe=recipe), jnp.asarray(x), jnp.asarray(w))
    dx, dw = pullback(jnp.asarray(g))
    q = {fmt: functools.partial(reference.rounded, quantizer=Q(fmt)) for fmt in formats}
    for ours, first, second in (
        (out, q["e4m3"](x), q["e5m2"](w)),
        (dx, q["e3m2"](g), q["int4"](w).T),
        (dw, q["e2m3"](x).T, q["e2m1"](g)),
    ):
        rows = first[None], second.T[None]
        assert equal(ours, reference.as_float32(reference.dot(*rows), *rows)[0])


def test_blocks_lie_along_the_contraction_of_each_product():
    """One large entry spoils its block alone; where the block lies shows in which results are spoilt."""
    fmt = S(qjax.E2M1, qjax.E8M0, 4)
    x = np.ones((8, 8), np.float32)
    x[0, 0] = 2.0**20
    w, g = np.ones((8, 8), np.float32), np.ones((8, 8), np.float32)
    recipe = Recipe(Gemm(Q(fmt)), drhs=Gemm(Q(fmt)))
    out, pullback = jax.vjp(lambda x, w: qjax.dot_general(x, w, MATRIX, recipe=recipe), jnp.asarray(x), jnp.asarray(w))
    _, dw = pullback(jnp.asarray(g))
    # Forward: blocks along the columns of x, so ones 1 to 3 of row 0 are lost, and no other.
    assert equal(out[:, 0], np.array([2.0**20 + 4] + [8] * 7, np.float32))
    # d w = x^T g: blocks along the rows of x, so ones 1 to 3 of column 0 are lost, and no other.
    assert equal(dw[:, 0], np.array([2.0**20 + 4] + [8] * 7, np.float32))


# Keys.


def test_six_operands_draw_differently():
    """All operands are the same matrix, so equal keys would give equal operands."""
    x = normal(6, 6)
    seen = []
    for place in range(6):
        quantizers: list = [None] * 6
        quantizers[place] = Q("e2m1", "stochastic")
        recipe = Recipe(*[Gemm(*quantizers[i : i + 2]) for i in (0, 2, 4)])
        eye = jnp.eye(6, dtype=jnp.float32)
        # The other operand of the product is the identity: the product is the rounded operand itself.
        lhs, rhs, g = ((x, eye, eye), (eye, x, eye), (eye, eye, x), (eye, x, eye), (x, eye, eye), (eye, eye, x))[place]
        out, pullback = jax.vjp(lambda a, b, r=recipe: qjax.dot_general(a, b, MATRIX, recipe=r, key=KEY), lhs, rhs)
        result = (out, out, *pullback(g)[:1] * 2, *pullback(g)[1:] * 2)[place]
        drawn = np.asarray(result.T if place in (3, 4) else result)
        expected = qjax.chop(x, "e2m1", "stochastic", key=jax.random.fold_in(KEY, place), saturate=True)
        assert equal(drawn, expected)
        seen.append(drawn)
    assert all(not np.array_equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_key_decides_the_draw():
    x, w = normal(4, 16), normal(16, 4, seed=1)
    recipe = recipe_of("e2m1", "stochastic")
    f = functools.partial(qjax.dot_general, dimension_numbers=MATRIX, recipe=recipe)
    assert same(f(x, w, key=KEY), jax.jit(f)(x, w, key=KEY))
    assert not same(f(x, w, key=KEY), f(x, w, key=jax.random.key(8)))
    assert same(f(x, w, key=jax.random.PRNGKey(7)), f(x, w, key=KEY))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(Gemm(Q("e2m1", "stochastic"))),
        Recipe(drhs=Gemm(rhs=Q("e2m1", "stochastic_equal"))),
        Recipe(dlhs=Gemm(accumulator=qjax.Accumulator("fp16", "stochastic"))),
        Recipe(Gemm(rotate=qjax.Hadamard(2, "random"))),
        Recipe(Gemm(rotate_rhs=qjax.Hadamard(2, "random"))),
        Recipe(save_lhs=Q("e4m3", "stochastic")),
    ],
    ids=str,
)
def test_every_stochastic_part_asks_for_a_key(recipe):
    x = normal(4, 4)
    with pytest.raises(ValueError, match="dot_general: the recipe is stochastic; give key="):
        qjax.dot_general(x, x, MATRIX, recipe=recipe)
    qjax.dot_general(x, x, MATRIX, recipe=recipe, key=KEY)


# What is saved.


def saved_bytes(f, *args) -> int:
    """Returns the bytes that the backward pass of f holds, those of the arguments apart."""
    _, pullback = jax.vjp(f, *args)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if not any(leaf is a for a in args))


def test_saving_in_a_format_stores_its_bytes():
    x, w = normal(64, 128), normal(128, 32, seed=1)
    for fmt, expected in (("mxfp4", 64 * 128 // 2 + 64 * 128 // 32), ("e4m3", 64 * 128), ("int8_channel", 64 * 132)):
        recipe = Recipe(save_lhs=Q(fmt))
        f = functools.partial(qjax.dot_general, dimension_numbers=MATRIX, recipe=recipe)
        # w, which is an argument, is kept as it is and not copied.
        assert saved_bytes(f, x, w) == expected
        out, pulled, g = gradients(f, x, w)
        kept = qjax.decode(qjax.encode(x, fmt, saturate=True))
        assert same(out, lax.dot_general(x, w, MATRIX))
        _, pullback = jax.vjp(lambda x, w: lax.dot_general(x, w, MATRIX), kept, w)
        assert all(map(same, pulled, pullback(g)))


def test_a_gradient_product_rounds_what_was_saved():
    x, w = normal(8, 16), normal(16, 4, seed=1)
    recipe = Recipe(drhs=Gemm(Q("e2m1")), save_lhs=Q("e5m2", "stochastic"))
    f = functools.partial(qjax.dot_general, dimension_numbers=MATRIX, recipe=recipe, key=KEY)
    _, pulled, g = gradients(f, x, w)
    kept = qjax.decode(qjax.encode(x, "e5m2", "stochastic", key=jax.random.fold_in(KEY, 18), saturate=True))
    plain = functools.partial(qjax.dot_general, dimension_numbers=MATRIX, recipe=Recipe(drhs=Gemm(Q("e2m1"))))
    _, pullback = jax.vjp(plain, kept, w)
    assert same(pulled[1], pullback(g)[1])


# Estimators and rotations.


@jax.tree_util.register_static
class Halved:
    """An estimator of a user: half the gradient where x is positive, none elsewhere."""

    def __repr__(self):
        return "Halved"

    def __call__(self, x, value, low, high, step):
        return jnp.where(x > 0, x.dtype.type(0.5), x.dtype.type(0))


HALVED = Halved()


def test_estimators_of_a_quantizer():
    x = jnp.array([-9.0, -8.2, -7.5, -0.3, 0.0, 0.5, 7.2, 7.5, 7.7, 20.0], jnp.float32)

    def slope(fmt, estimator):
        return jax.jit(jax.grad(lambda x: Q(fmt, estimator=estimator)(x).sum()))(x).tolist()

    assert slope("int4", qjax.StraightThrough()) == [1] * 10
    assert slope("int4", qjax.Clipped()) == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert slope("int4", qjax.Clipped(0.5)) == [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert slope("int4", qjax.TrustMasked()) == [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert slope("int4", qjax.TrustMasked(1.0)) == [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert slope("int4", HALVED) == [0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    # E2M1 ends at 6, the spacing below it is 2; the codebook at 1, with 0.5 below it.
    assert slope("e2m1", qjax.Clipped()) == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert slope("e2m1", qjax.TrustMasked()) == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert slope("e2m1", qjax.TrustMasked(1.0)) == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert slope("pow2_3", qjax.Clipped()) == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert slope(qjax.Fixed(4, signed=False), qjax.Clipped()) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "fmt", ["int4", S(qjax.Fixed(4), qjax.FP32, 4), "nf4", S(qjax.E2M1, qjax.E8M0, 4), "uint4_g32"]
)
def test_a_gradient_in_forward_mode_and_a_random_draw(fmt):
    x = normal(3, 8) * 4
    q = Q(fmt, "stochastic", estimator=HALVED)
    value, dot = jax.jit(lambda x: jax.jvp(lambda x: q(x, key=KEY), (x,), (jnp.full_like(x, 3),)))(x)
    assert same(value, qjax.chop(x, fmt, "stochastic", key=KEY, saturate=True))
    assert equal(dot, np.where(np.asarray(x) > 0, np.float32(1.5), np.float32(0)))


def test_the_range_of_a_block_follows_its_scale():
    """A given scale of 1/2: the range of int4 is -4 to 3.5 and the spacing 1/2, in units of each block."""
    x = jnp.array([[3.4, 3.6, -3.9, -4.1], [6.8, 7.2, -7.8, -8.2]], jnp.float32)
    fmt, scale = S(qjax.Fixed(4), qjax.FP32, 4), jnp.array([[0.5], [1.0]], jnp.float32)
    slope = jax.jit(jax.grad(lambda x: Q(fmt, estimator=qjax.Clipped())(x, scale=scale).sum()))(x)
    assert equal(slope, np.array([[1, 0, 1, 0], [1, 0, 1, 0]], np.float32))
    # Two levels: 2 times 0.5, and E4M3 scales within.
    two = S(S(qjax.Fixed(4), qjax.E4M3, 4), qjax.FP32, None)
    slope = jax.jit(jax.grad(lambda x: Q(two, estimator=qjax.Clipped())(x, scale=jnp.float32(2.0**-9)).sum()))(x)
    assert np.asarray(slope).min() == 0 and np.asarray(slope).max() == 1


def quest(x, w, q, h=None, signs=None):
    """QuEST: y = Q(x H) Q(w H)^T for w of shape (k, n), by jax's own differentiation of the quantizer."""
    if h is not None:
        x, w = h(x, key=signs), h(w, axis=0, key=signs)
    return lax.dot_general(q(x, axis=1), q(w, axis=0), MATRIX)


@pytest.mark.parametrize(
    ("estimator", "rotate"),
    [
        (qjax.StraightThrough(), qjax.Hadamard(8)),
        (qjax.Clipped(), None),
        (qjax.TrustMasked(), qjax.Hadamard(8, "random")),
        (HALVED, qjax.Hadamard(16)),
    ],
    ids=str,
)
def test_quantized_residuals_have_the_gradient_of_quest(estimator, rotate):
    """y = Q(xH) Q(wH)^T, dx = H^T (mask * dy Q(wH)), dw likewise."""
    x, w = normal(6, 16) * 2, normal(16, 5, seed=1)
    fmt = S(qjax.Fixed(3), qjax.E8M0, 4)
    q = Q(fmt, estimator=estimator)
    random = rotate is not None and rotate.is_stochastic
    recipe = Recipe(Gemm(q, q, rotate=rotate), save_lhs="quantized", save_rhs="quantized")
    f = functools.partial(qjax.dot_general, dimension_numbers=MATRIX, recipe=recipe, key=KEY if random else None)
    out, pulled, g = gradients(f, x, w)
    signs = jax.random.fold_in(KEY, 9) if random else None

    @jax.jit
    def by_hand(x, w, g):
        out, pullback = jax.vjp(functools.partial(quest, q=q, h=rotate, signs=signs), x, w)
        return out, *pullback(g)

    for ours, other in zip((out, *pulled), by_hand(x, w, g), strict=True):
        # The same integers and scales, but for the order of scale and sum, and of the sums of H:
        # (k + 4) 2^-24 of the sum of magnitudes, here below 2^9 for each of k = 16, and 3 levels of H.
        assert np.abs(np.asarray(ours) - np.asarray(other)).max() <= 23 * 2.0**-24 * 2**9
    masked = jax.jit(jax.grad(lambda x: q(x).sum()))(x if rotate is None else rotate(x, key=signs))
    assert (masked.min() < masked.max()) == (not isinstance(estimator, qjax.StraightThrough))


@pytest.mark.parametrize(("save", "free"), [("lhs", False), ("rhs", False), ("neither", True)])
def test_a_gradient_is_rotated_back_if_it_met_a_rotated_operand(save, free):
    """dx = H^T (mask * H (dy w)) where w was kept as it is, and H^T (mask * dy Q(wH)) where its rounded rotation was.

    With ``free`` the operands are rotated along their other axes too, which the result undoes.
    """
    h, free_h = qjax.Hadamard(8), qjax.Hadamard(2)
    q = Q(S(qjax.Fixed(3), qjax.E8M0, 4), estimator=qjax.Clipped())
    x, w = normal(6, 16) * 2, normal(16, 4, seed=1)
    turns = dict(rotate_lhs=free_h, rotate_rhs=free_h) if free else {}
    saves = {} if save == "neither" else {f"save_{save}": "quantized"}
    f = functools.partial(
        qjax.dot_general, dimension_numbers=MATRIX, recipe=Recipe(Gemm(q, q, rotate=h, **turns), **saves)
    )
    _, (dx, dw), g = gradients(f, x, w)

    def turned(x, axis, inverse=False):
        along, across = (h.inverse, free_h.inverse) if inverse else (h, free_h)
        return along(across(x, axis=1 - axis) if free else x, axis=axis)

    @jax.jit
    def by_hand(x, w, g):
        xh, wh = turned(x, 1), turned(w, 0)
        mask_x, mask_w = (jax.grad(lambda a, i=i: q(a, axis=i).sum())(a) for i, a in ((1, xh), (0, wh)))
        met_w = h.inverse(q(wh, axis=0), axis=0) if save == "rhs" else w
        met_x = h.inverse(q(xh, axis=1), axis=1) if save == "lhs" else x
        dx = turned(mask_x * turned(lax.dot_general(g, met_w.T, MATRIX), 1), 1, inverse=True)
        dw = turned(mask_w * turned(lax.dot_general(met_x.T, g, MATRIX), 0), 0, inverse=True)
        return dx, dw, mask_x, mask_w

    theirs_x, theirs_w, mask_x, mask_w = by_hand(x, w, g)
    assert mask_x.min() == 0 and mask_w.min() == 0
    # Sums of at most 8 products and rotations of 8 and 2, of magnitudes below 2^6 in all: 2^-24 2^6 (8 + 4 4 + 8).
    for ours, other in ((dx, theirs_x), (dw, theirs_w)):
        assert np.abs(np.asarray(ours) - np.asarray(other)).max() <= 2.0**-18 * 32


RANDOM = qjax.Hadamard(8, "random")


@pytest.mark.parametrize(
    "turns",
    [
        dict(rotate=qjax.Hadamard(8)),
        dict(rotate_lhs=qjax.Hadamard(8)),
        dict(rotate_rhs=RANDOM),
        dict(rotate=qjax.Hadamard(4), rotate_lhs=RANDOM, rotate_rhs=qjax.Hadamard(8, (1, -1, 1, 1, -1, 1, 1, -1))),
    ],
    ids=str,
)
def test_rotations_leave_the_product(turns):
    """Unquantized, the products are those of lax but for rounding, in all three Gemms and a batched layout.

    A rotation of size n sums in log2 n rounded steps and scales once, so each operand has a relative error, in the
    norm of a block, below (log2 n + 2) 2^-24 a turn; there and back on two operands that is below 30 2^-24 of
    |x| |w| (norms over the contraction), and the sum of 16 products adds 16 2^-24 of it: 2^-18 in all. A rotation of
    the result along other axes mixes rows, of which the norm of the largest stands for all, times sqrt(8).
    """
    x, w = normal(2, 8, 16), normal(2, 16, 8, seed=1)
    numbers = (((2,), (1,)), ((0,), (0,)))
    gemm = Gemm(**turns)
    f = functools.partial(qjax.dot_general, dimension_numbers=numbers, recipe=Recipe(gemm, gemm, gemm))
    out, pulled, g = gradients(functools.partial(f, key=KEY) if gemm.is_stochastic else f, x, w)
    theirs, pullback = jax.vjp(lambda x, w: lax.dot_general(x, w, numbers), x, w)
    largest = max(float(jnp.linalg.norm(a, axis=i).max()) for a in (x, w, g) for i in (1, 2))
    for ours, other in zip((out, *pulled), (theirs, *pullback(g)), strict=True):
        assert 0 < np.abs(np.asarray(ours) - np.asarray(other)).max() <= 2.0**-18 * largest**2 * 8**0.5


def test_halo_rounds_what_is_rotated():
    """HALO level 1: y = (Q(H x) Q(w)) with H undone on the rows of y, and level 2 with the contraction rotated too."""
    x, w = normal(8, 16), normal(16, 8, seed=1)
    h, q = qjax.Hadamard(8), Q("e2m1")
    for gemm, hand in (
        (Gemm(q, q, rotate_lhs=h), lambda: h.inverse(q(h(x, axis=0)) @ q(w), axis=0)),
        (Gemm(q, q, rotate_rhs=h), lambda: h.inverse(q(x) @ q(h(w, axis=1)), axis=1)),
        (
            Gemm(q, q, rotate=h, rotate_lhs=h),
            lambda: h.inverse(q(h(h(x, axis=1), axis=0)) @ q(h(w, axis=0)), axis=0),
        ),
    ):
        out = qjax.dot_general(x, w, MATRIX, recipe=Recipe(gemm))
        # Products of E2M1 numbers, at most 36 with a lowest bit of 1/4, are summed exactly; the rotation of the result
        # is the same function. Only a rounding that fell the other way in the rotated operand could differ.
        assert np.array_equal(out, jax.jit(hand)())
        assert not np.allclose(out, q(x) @ q(w))


def test_saved_tiles_are_stored_with_their_scales():
    """With promotion the scales of tiles are apart from the elements: what is saved has them all the same."""
    q = Q("e4m3_1x8", estimator=HALVED)
    rng = np.random.default_rng(0)
    x, w, g = (whole(rng, shape, 448, 8, 16) for shape in ((4, 24), (24, 4), (4, 4)))
    accumulator = qjax.Accumulator("fp32", chunk=8, promote=8)
    recipe = Recipe(Gemm(q, q, accumulator), save_lhs="quantized", save_rhs="quantized")
    f = functools.partial(qjax.dot_general, dimension_numbers=MATRIX, recipe=recipe)
    _, pullback = jax.vjp(f, jnp.asarray(x), jnp.asarray(w))
    dx, dw = pullback(jnp.asarray(g))
    xq, wq = reference.rounded(x, q), reference.rounded(w.T, q).T
    # All sums are exact: multiples of 2^4 up to 2^10.
    assert equal(dx, g @ wq.T * np.where(x > 0, np.float32(0.5), np.float32(0)))
    assert equal(dw, xq.T @ g * np.where(w > 0, np.float32(0.5), np.float32(0)))


@pytest.mark.parametrize("layout", ["vectors", "vector and matrix", "batch of vectors", "attention"])
def test_tiles_span_no_two_entries_of_a_batch(layout):
    """A vector has no other axis: its tile has one row."""
    left, right, numbers = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-40, 41, s).astype(np.float32) * 8 for s in (left, right))
    x, w = (np.where(np.abs(a) < 320, a, np.float32(448)) for a in (x, w))
    x[(0,) * x.ndim] = 448 * 4
    fmt = S(qjax.E4M3, qjax.E8M0, (4, 4))
    out = qjax.dot_general(jnp.asarray(x), jnp.asarray(w), numbers, recipe=recipe_of(fmt))
    rows = []
    for a, contract, batch in zip((x, w), *numbers, strict=True):
        free = reference.free_axes(a, batch, contract)
        turned = np.transpose(a, (*batch, *free, *contract))
        entries = turned.reshape(-1, *turned.shape[len(batch) :]) if free else turned.reshape(-1, 1, turned.shape[-1])
        rounded = np.stack([reference.rounded(entry, Q(fmt)) for entry in entries])
        rows.append(rounded.reshape(len(entries), -1, turned.shape[-1]))
    assert equal(out, reference.as_float32(reference.dot(*rows), *rows).reshape(out.shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_operand_alone_can_be_quantized_in_any_dtype(dtype):
    x, w = (jnp.asarray(np.random.default_rng(0).integers(-9, 10, s)).astype(dtype) for s in ((4, 8), (8, 3)))
    out = qjax.dot_general(x, w, MATRIX, recipe=Recipe(Gemm(rhs=Q("e2m1"))))
    exact = np.asarray(x).astype(np.float64) @ np.asarray(qjax.chop(w, "e2m1", saturate=True)).astype(np.float64)
    assert equal(out, exact.astype(np.dtype(dtype)))


def test_an_estimator_sees_what_a_bfloat16_operand_was_rounded_to():
    """13.25 in units of 1 / 8 of int16 is exact, but no bfloat16 after it: rounding moved x by nothing."""
    x = jnp.full((1, 1), 1.328125, jnp.bfloat16)
    fmt = qjax.Fixed(16, 7)
    recipe = Recipe(Gemm(Q(fmt, estimator=qjax.TrustMasked(0.0))))
    dx = jax.grad(lambda x: qjax.dot_general(x, jnp.ones_like(x), MATRIX, recipe=recipe).sum().astype(jnp.float32))(x)
    assert dx.item() == 1


# Transformations of a whole program.


def test_a_bias_is_added_to_the_rounded_result():
    """jit must not contract the product with a scale and the sum with a bias, which eager does not."""
    x, w, bias = normal(16, 32), normal(32, 16, seed=1), normal(16, seed=2)[None]
    for recipe in (recipe_of("int8_channel"), Recipe(Gemm(rotate_rhs=qjax.Hadamard(8)))):
        f = functools.partial(qjax.dot_general, dimension_numbers=MATRIX, recipe=recipe)
        eager = np.asarray(f(x, w)) + np.asarray(bias)
        assert same(jax.jit(lambda x, w, f=f: f(x, w) + jnp.broadcast_to(bias, (16, 16)))(x, w), eager)


def test_checkpoint_scan_vmap_and_shards():
    w = normal(3, 16, 16) / 4
    x = normal(8, 16, seed=1)
    recipe = recipe_of(S(qjax.E2M1, qjax.E8M0, 8))

    def layer(x, w):
        return jnp.tanh(qjax.dot_general(x, w, MATRIX, recipe=recipe))

    def loss(layer, w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0] ** 2)

    plain = jax.jit(jax.value_and_grad(functools.partial(loss, layer)))(w, x)
    rematerialized = jax.jit(jax.value_and_grad(functools.partial(loss, jax.checkpoint(layer))))(w, x)
    assert all(map(same, jax.tree.leaves(plain), jax.tree.leaves(rematerialized)))

    def unrolled(w, x):
        for i in range(3):
            x = layer(x, w[i])
        return jnp.sum(x**2)

    assert np.allclose(jax.jit(unrolled)(w, x), plain[0], rtol=2.0**-16)  # tanh may be fused otherwise
    rows = jax.vmap(lambda row: qjax.dot_general(row[None], w[0], MATRIX, recipe=recipe)[0])(x)
    assert equal(rows, qjax.dot_general(x, w[0], MATRIX, recipe=recipe))


def test_a_second_derivative_is_refused_and_not_zero():
    x, w = normal(3, 4), normal(4, 2, seed=1)

    def twice(recipe):
        f = functools.partial(qjax.dot_general, dimension_numbers=MATRIX, recipe=recipe)
        return jax.grad(lambda x: jax.grad(lambda x: (f(x, w) ** 2).sum())(x).sum())(x)

    assert np.abs(twice(Recipe())).min() > 0
    with pytest.raises(NotImplementedError, match="the gradient of a quantized product cannot be differentiated again"):
        twice(recipe_of("e4m3"))


@pytest.mark.parametrize("fmt", ["int8_tensor", S(qjax.E2M1, qjax.E8M0, 8)], ids=str)
def test_shards_give_the_bits_of_one_device(fmt):
    """A per-tensor scale needs the maximum over all devices; sums of few-bit numbers are exact in any order."""
    recipe = recipe_of(fmt)
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.integers(-127, 128, s).astype(np.float32)) for s in ((16, 64), (64, 8)))
    x, w = x.at[3, 5].set(127), w.at[60, 7].set(127)

    def run(x, w):
        out, pullback = jax.vjp(lambda x, w: qjax.dot_general(x, w, MATRIX, recipe=recipe), x, w)
        return out, *pullback(jnp.sign(out) * 127)

    alone = jax.jit(run)(x, w)
    sharded = [
        jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
        for a, spec in ((x, ("rows", "columns")), (w, ("columns", "rows")))
    ]
    assert all(map(equal, jax.jit(run)(*sharded), alone))
