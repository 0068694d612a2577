"""conv_general_dilated: lax with an empty recipe, the reference's loops with any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from tables import bits

import qjax
from qjax import Accumulator, Gemm, Quantizer as Q, Recipe, Scaled

NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
BLOCK = Scaled(qjax.E2M1, qjax.E8M0, 4)

# name: (lhs shape, rhs shape, strides, padding, lhs dilation, rhs dilation, groups, batch groups), features second.
CASES = {
    "plain": ((2, 8, 5, 4), (6, 8, 3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1, 1),
    "strides and padding": ((2, 5, 6, 5), (3, 5, 3, 3), (2, 1), ((1, 2), (0, 1)), (1, 1), (1, 1), 1, 1),
    "negative padding": ((1, 4, 7, 5), (3, 4, 2, 2), (1, 2), ((-1, 0), (2, -1)), (1, 1), (1, 1), 1, 1),
    "dilations": ((1, 4, 4, 5), (2, 4, 2, 3), (1, 2), ((1, 0), (2, 2)), (2, 1), (2, 2), 1, 1),
    "groups": ((2, 12, 4, 3), (4, 6, 2, 2), (1, 1), ((1, 1), (0, 0)), (1, 1), (1, 1), 2, 1),
    "depthwise": ((2, 6, 5), (12, 1, 3), (2,), ((1, 1),), (1,), (1,), 6, 1),
    "batch groups": ((6, 5, 4, 3), (8, 5, 2, 2), (1, 1), ((0, 1), (0, 0)), (1, 1), (1, 1), 1, 2),
    "one dimension": ((3, 8, 9), (4, 8, 3), (2,), ((1, 0),), (1,), (2,), 1, 1),
    "three dimensions": ((1, 4, 3, 4, 3), (3, 4, 2, 2, 2), (1, 2, 1), ((0, 0), (1, 1), (0, 1)), *[(1,) * 3] * 2, 1, 1),
    "one by one": ((2, 8, 3, 3), (5, 8, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1, 1),
    "no spatial axes": ((3, 8), (5, 8), (), (), (), (), 1, 1),
}  # fmt: skip


def whole(rng, shape) -> np.ndarray:
    """Returns integers that E2M1 rounds, in blocks or not, and of which float32 sums are exact."""
    return rng.choice([-29, -13, -7, -5, -3, -1, 0, 1, 2, 3, 5, 9, 17, 30], shape).astype(np.float32)


def arrays(case: str):
    lhs, rhs, *rest = CASES[case]
    rng = np.random.default_rng(len(case))
    x, w = whole(rng, lhs), whole(rng, rhs)
    return x, w, whole(rng, reference.out_shape(lhs, rhs, *rest)), rest


def convolution(rest, dimension_numbers=None, **options):
    strides, padding, lhs_dilation, rhs_dilation, groups, batch_groups = rest
    operation = qjax.conv_general_dilated if "recipe" in options else lax.conv_general_dilated
    return functools.partial(
        operation,
        window_strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=groups,
        batch_group_count=batch_groups,
        **options,
    )


def run(f, x, w, g):
    out, pullback = jax.vjp(f, x, w)
    return out, *pullback(g)


def same(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


@pytest.mark.parametrize("case", CASES)
def test_an_empty_recipe_is_lax(case):
    x, w, g, rest = arrays(case)
    x, w, g = (jnp.asarray(a) / 7 for a in (x, w, g))
    assert all(map(same, run(convolution(rest, recipe=Recipe()), x, w, g), run(convolution(rest), x, w, g)))


def expected(x, w, g, rest, q):
    """Returns (out, d lhs, d rhs) from loops over all products; each of them rounds its operands afresh.

    Blocks lie along what is summed: forward along the input features of a group, for d lhs along the output features
    of a group, for d rhs along the batch, within a group of it.
    """
    groups, batch_groups = rest[-2:]
    triples = list(reference.places(x.shape, w.shape, *rest))
    r = functools.partial(reference.rounded_in_groups, quantizer=q)
    forward = r(x, axis=1, groups=groups), r(w, axis=1, groups=1)
    out = reference.gathered(triples, 0, g.shape, *forward, 1, 2)
    split = groups * batch_groups
    to_lhs = r(g, axis=1, groups=split), r(w, axis=0, groups=split)
    dlhs = reference.gathered(triples, 1, x.shape, *to_lhs, 0, 2)
    to_rhs = r(x, axis=0, groups=batch_groups), r(g, axis=0, groups=1)
    drhs = reference.gathered(triples, 2, w.shape, *to_rhs, 1, 0)
    return [a.astype(np.float32) for a in (out, dlhs, drhs)]


@pytest.mark.parametrize(
    ("case", "fmt"), [*((case, BLOCK) for case in CASES), ("dilations", "e2m1"), ("batch groups", "e2m1")], ids=str
)
def test_every_geometry_equals_the_loops(case, fmt):
    x, w, g, rest = arrays(case)
    gemm = Gemm(Q(fmt), Q(fmt))
    f = convolution(rest, recipe=Recipe(gemm, gemm, gemm))
    ours = jax.jit(functools.partial(run, f))(*map(jnp.asarray, (x, w, g)))
    for a, b in zip(ours, expected(x, w, g, rest, Q(fmt)), strict=True):
        assert np.array_equal(a, b)


def test_one_scale_multiplies_the_result():
    x, w, g, rest = arrays("groups")
    for a in (x, w, g):
        a.flat[0] = 127
    gemm = Gemm(Q("int8_tensor"), Q("int8_tensor"))
    f = convolution(rest, recipe=Recipe(gemm, gemm, gemm))
    ours = jax.jit(functools.partial(run, f))(*map(jnp.asarray, (x / 4, w * 2, g)))
    factors = (np.float32(f) for f in (1 / 2, 2, 1 / 4))
    for a, b, factor in zip(ours, expected(x, w, g, rest, Q("int8")), factors, strict=True):
        assert np.array_equal(a, b * factor)


def test_a_channel_of_a_kernel_is_all_that_an_output_sums():
    """One scale an output feature multiplies the result; the lhs has one for each pixel, over its features."""
    x, w, g, rest = arrays("plain")
    scale = np.abs(w).max(axis=(1, 2, 3), keepdims=True)
    w = w * (127 / scale)
    recipe = Recipe(Gemm(None, Q("int8_channel")))
    out = convolution(rest, recipe=recipe)(jnp.asarray(x), jnp.asarray(w.astype(np.float32)))
    s = np.abs(w.astype(np.float32)).max(axis=(1, 2, 3), keepdims=True) / np.float32(127)
    integers = np.rint(w.astype(np.float32) / s)
    triples = list(reference.places(x.shape, w.shape, *rest))
    sums = reference.gathered(triples, 0, g.shape, x, integers, 1, 2).astype(np.float32)
    assert np.array_equal(out, sums * s[:, 0, 0, 0].reshape(1, -1, 1, 1))

    x[:, 0] = 127
    out = convolution(rest, recipe=Recipe(Gemm(Q("int8_channel"))))(jnp.asarray(x), jnp.asarray(integers))
    assert np.array_equal(out, reference.gathered(triples, 0, g.shape, x, integers, 1, 2))


@pytest.mark.parametrize(
    ("numbers", "gemm"),
    [
        (NHWC, Gemm(Q(BLOCK), Q(BLOCK))),
        (("CHWN", "IHWO", "HNWC"), Gemm(Q(BLOCK), Q(BLOCK))),
        (("HNCW", "WOIH", "NCWH"), Gemm(Q("int8"), Q("int8"), Accumulator("int32"))),
    ],
    ids=str,
)
def test_every_layout_is_the_same_convolution(numbers, gemm):
    x, w, g, rest = arrays("groups")
    recipe = Recipe(gemm, gemm, gemm)
    specs = lax.conv_dimension_numbers(x.shape, w.shape, ("NCHW", "OIHW", "NCHW"))
    plain = jax.jit(functools.partial(run, convolution(rest, specs, recipe=recipe)))(*map(jnp.asarray, (x, w, g)))
    spec = (
        numbers
        if isinstance(numbers, lax.ConvDimensionNumbers)
        else lax.conv_dimension_numbers((1,) * 4, (1,) * 4, numbers)
    )
    # The specification says where batch, feature and spatial axes are; transposing by its inverse puts them there.
    turned = [np.transpose(a, np.argsort(s)) for a, s in zip((x, w, g), spec, strict=True)]
    ours = jax.jit(functools.partial(run, convolution(rest, numbers, recipe=recipe)))(*map(jnp.asarray, turned))
    for mine, theirs, s in zip(ours, plain, (spec[2], spec[0], spec[1]), strict=True):
        assert np.array_equal(np.transpose(mine, s), theirs)


# Accumulators.


def register(products: list[float], accumulator: Accumulator) -> float:
    """Returns the sum of products in a register: chunks in the order of (in feature, window)."""
    lhs = np.array(products, np.float32).reshape(1, 1, -1)
    ones = np.ones_like(lhs)
    if isinstance(accumulator.fmt, qjax.Float):
        return reference.float_register(lhs, ones, accumulator).item()
    return reference.integer_register(lhs, ones, accumulator, (0, 0)).item()


FLOAT, WRAPPING = Accumulator("e5m3", chunk=3), Accumulator(qjax.Fixed(9, overflow="wrap"), chunk=2)


@pytest.mark.parametrize(
    ("case", "accumulator"),
    [
        ("strides and padding", FLOAT),
        ("dilations", WRAPPING),
        ("groups", FLOAT),
        ("depthwise", Accumulator(qjax.Fixed(8))),
        ("batch groups", WRAPPING),
        ("three dimensions", FLOAT),
        ("no spatial axes", FLOAT),
    ],
    ids=str,
)
def test_accumulators_sum_in_the_order_of_features_and_windows(case, accumulator):
    """Every output sums over all in features and windows; what lies in the padding, or between dilated, is 0."""
    x, w, g, rest = arrays(case)
    strides, padding, lhs_dilation, rhs_dilation, groups, batch_groups = rest
    # The padding is written out, so that its zeros are among the products too.
    dilated = lax.pad(
        jnp.asarray(x),
        jnp.float32(0),
        [(0, 0, 0)] * 2 + [(*p, d - 1) for p, d in zip(padding, lhs_dilation, strict=True)],
    )
    dilated = np.asarray(dilated)
    none = ((0, 0),) * len(padding)
    terms: dict = {}
    for place, left, right in reference.places(
        dilated.shape, w.shape, strides, none, (1,) * len(padding), rhs_dilation, groups, batch_groups
    ):
        terms.setdefault(place, []).append(float(dilated[left]) * float(w[right]))
    theirs = np.zeros(g.shape, np.float32)
    for place, products in terms.items():
        theirs[place] = register(products, accumulator)
    q = Q("int8") if isinstance(accumulator.fmt, qjax.Fixed) else None
    ours = jax.jit(convolution(rest, recipe=Recipe(Gemm(q, q, accumulator))))(jnp.asarray(x), jnp.asarray(w))
    assert np.array_equal(ours, theirs)


def test_accumulators_of_gradients():
    """In 32-bit integers the order does not count: the gradients are the exact ones."""
    for case in ("strides and padding", "groups", "batch groups", "dilations"):
        x, w, g, rest = arrays(case)
        gemm = Gemm(Q("int8"), Q("int8"), Accumulator("int32"))
        ours = jax.jit(functools.partial(run, convolution(rest, recipe=Recipe(gemm, gemm, gemm))))(
            *map(jnp.asarray, (x, w, g))
        )
        for a, b in zip(ours, expected(x, w, g, rest, Q("int8")), strict=True):
            assert np.array_equal(a, b)


# Estimators, rotations, what is saved, and transformations.


@pytest.mark.parametrize(
    ("fmt", "case"),
    [(BLOCK, "plain"), (BLOCK, "groups"), (Scaled(qjax.Fixed(3), qjax.E8M0, "axis"), "groups")],
    ids=str,
)
def test_estimators_know_the_block_of_each_element(fmt, case):
    x, w, g, rest = arrays(case)
    q = Q(fmt, estimator=qjax.Clipped())
    f = convolution(rest, recipe=Recipe(Gemm(q, q), save_lhs="quantized", save_rhs="quantized"))
    _, dx, dw = jax.jit(functools.partial(run, f))(*map(jnp.asarray, (x, w, g)))
    groups = rest[-2]
    channel = isinstance(q.fmt, Scaled) and q.fmt.block == "axis"

    def mask(x, axis, split):
        slope = jax.jit(jax.grad(lambda part: q(part, axis=axis).sum()))
        return np.concatenate([slope(part) for part in np.split(x, split, axis)], axis)

    flat = w.reshape(len(w), -1)
    mask_x, mask_w = mask(x, 1, groups), mask(flat, 1, 1).reshape(w.shape) if channel else mask(w, 1, 1)
    assert mask_x.min() == mask_w.min() == 0
    xq = reference.rounded_in_groups(x, q, 1, groups)
    wq = reference.rounded(flat, q).reshape(w.shape) if channel else reference.rounded(w, q, 1)
    _, theirs_x, theirs_w = jax.jit(functools.partial(run, convolution(rest)))(*map(jnp.asarray, (xq, wq, g)))
    # Sums of numbers of few bits are exact, in any order.
    assert np.array_equal(dx, theirs_x * mask_x) and np.array_equal(dw, theirs_w * mask_w)


def test_a_rotation_of_the_features_leaves_the_convolution():
    """The bound is that of test_dot.py: 2^-18 of the norms of what is summed, here of 8 features and 6 places."""
    x, w, _, rest = arrays("plain")
    x, w = jnp.asarray(x) / 7, jnp.asarray(w) / 7
    for rotate in (qjax.Hadamard(8), qjax.Hadamard(4, "random")):
        key = jax.random.key(0) if rotate.is_stochastic else None
        ours = convolution(rest, recipe=Recipe(Gemm(rotate=rotate)), key=key)(x, w)
        assert 0 < np.abs(ours - convolution(rest)(x, w)).max() <= 2.0**-18 * np.linalg.norm(x) * np.linalg.norm(w)
    q, h = Q("e2m1"), qjax.Hadamard(8)
    ours = convolution(rest, recipe=Recipe(Gemm(q, q, rotate=h)))(x, w)
    assert np.array_equal(ours, convolution(rest)(q(h(x, axis=1)), q(h(w, axis=1))))


def test_saved_in_a_format():
    x, w, g, rest = arrays("plain")
    x, w = jnp.asarray(x), jnp.asarray(w)
    f = convolution(rest, recipe=Recipe(save_lhs=Q("e2m1"), save_rhs=Q("int8")))
    _, pullback = jax.vjp(f, x, w)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)) == x.size // 2 + w.size
    _, theirs = jax.vjp(convolution(rest), qjax.chop(x, "e2m1", saturate=True), w)
    assert all(map(np.array_equal, pullback(jnp.asarray(g)), theirs(jnp.asarray(g))))


def test_lists_and_arrays_are_taken():
    x, w, _, _ = arrays("one dimension")
    recipe = Recipe(Gemm(Q("int8"), Q("int8")))
    f = functools.partial(qjax.conv_general_dilated, jnp.asarray(x), jnp.asarray(w), recipe=recipe)
    out = f((2,), ((1, 1),))
    for strides, padding in (([2], [[1, 1]]), (np.array([2]), np.array([[1, 1]])), ([np.int64(2)], [(1, 1)])):
        assert np.array_equal(f(strides, padding), out)


def test_vmap_and_keys():
    x, w, g, rest = arrays("groups")
    f = convolution(rest, recipe=Recipe(*[Gemm(Q(BLOCK), Q("int8_tensor"))] * 3))
    batch = [jnp.stack([jnp.asarray(a), jnp.asarray(a) * 2]) for a in (x, w, g)]
    stacked = jax.jit(jax.vmap(functools.partial(run, f)))(*batch)
    single = jax.jit(functools.partial(run, f))(*(a[1] for a in batch))
    assert all(np.array_equal(a[1], b) for a, b in zip(stacked, single, strict=True))

    recipe = Recipe(Gemm(Q("e2m1", "stochastic")))
    key = jax.random.key(1)
    rest = CASES["plain"][2:]
    x, w = arrays("plain")[:2]
    drawn = convolution(rest, recipe=recipe, key=key)(jnp.asarray(x) / 7, jnp.asarray(w))
    xq = qjax.chop(jnp.asarray(x) / 7, "e2m1", "stochastic", key=jax.random.fold_in(key, 0), saturate=True)
    assert np.array_equal(drawn, convolution(rest)(xq, jnp.asarray(w)))
