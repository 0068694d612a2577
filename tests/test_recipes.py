"""Every named recipe against the equations of its source, in NumPy float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.linen import fp8_ops

import qjax
from qjax import Accumulator, Fixed, Hadamard, Scaled, recipes

TOKENS, INPUTS, OUTPUTS = 256, 128, 128
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((TOKENS, INPUTS)).astype(np.float32))
W = jnp.asarray((RNG.standard_normal((INPUTS, OUTPUTS)) / 8).astype(np.float32))
G = jnp.asarray((RNG.standard_normal((TOKENS, OUTPUTS)) * 1e-2).astype(np.float32))
KEY = jax.random.key(5)
NUMBERS = (((1,), (0,)), ((), ()))


def q(x, fmt, axis, key=None):
    """Returns x rounded, in float64; the blocks of tiles lie along the axis too."""
    fmt = qjax.format(fmt)
    options = {"saturate": True} | ({} if key is None else {"rounding": "stochastic", "key": key})
    if _tiled(fmt):
        x = jnp.moveaxis(x, axis, -1)
        return np.moveaxis(np.asarray(qjax.chop(x, fmt, **options), np.float64), -1, axis)
    return np.asarray(qjax.chop(x, fmt, axis=axis, **options), np.float64)


def _tiled(fmt) -> bool:
    return isinstance(fmt, Scaled) and (isinstance(fmt.block, tuple) or _tiled(fmt.element))


def number(i):
    return jax.random.fold_in(KEY, i)


def each_afresh(x, w=None, g=None, stochastic=False, rotation=None):
    """y = Q(x) Q(w), dx = Q(g) Q(w)', dw = Q(x)' Q(g), every operand in blocks along its contraction."""
    w, g = w or x, g or x
    dlhs, drhs = (number(2), number(5)) if stochastic else (None, None)
    turn = rotation or (lambda a: a)

    def products():
        yield q(X, x, 1), q(W, w, 0)
        yield q(G, g, 1, dlhs), q(W, w, 1).T
        yield q(turn(X), x, 0).T, q(turn(G), g, 0, drhs)

    return products()


def kept(x, w, gradient=lambda g: g):
    """The backward products have the rounded forward operands."""
    xq, wq = (np.asarray(X, np.float64) if x is None else q(X, x, 1)), q(W, w, 0)
    g = gradient(np.asarray(G, np.float64))
    return [(xq, wq), (g, wq.T if x is not None or w is not None else W.T), (xq.T, g)]


def halo(level):
    fmt = Scaled(Fixed(8, symmetric=True), qjax.FP32, None)
    h = Hadamard(128)
    xq, wq = (q(h(X), fmt, 1), q(h(W, axis=0), fmt, 0)) if level else (q(X, fmt, 1), q(W, fmt, 0))
    back = h if level else None
    g = q(G, fmt, 1)
    turned = q(h(G, axis=0), fmt, 1) if level == 2 else g
    return [(xq, wq), (turned, wq.T, back, h if level == 2 else None), (xq.T, g, None, back)]


def quest(bits):
    fmt = recipes.quest(bits).forward.lhs.fmt
    h = Hadamard(128)
    xh, wh = h(X), h(W, axis=0)
    xq, wq = q(xh, fmt, 1), q(wh, fmt, 0)
    clip = fmt.rule.clip
    operands = []
    for a, aq, axis in ((xh, xq, 1), (wh, wq, 0)):
        rms = np.sqrt(np.mean(np.square(np.asarray(a, np.float64)), axis=axis, keepdims=True))
        half_step = clip * rms / (2**bits - 1)
        trusted = np.abs(a) <= 1.3 * clip * rms if bits == 1 else np.abs(aq - a) <= half_step
        operands.append(trusted)
    g = np.asarray(G, np.float64)
    return [(xq, wq), (g, wq.T, (operands[0], h), None), (xq.T, g, None, (operands[1], h))]


def quartet(stochastic):
    fmt = recipes.quartet().forward.lhs.fmt
    backward = recipes.quartet().dlhs.lhs.fmt
    h, r = Hadamard(32), Hadamard(32, "random")
    xh, wh = h(X), h(W, axis=0)
    xq, wq = q(xh, fmt, 1), q(wh, fmt, 0)
    masks = []
    for a, axis in ((xh, 1), (wh, 0)):
        rows = np.moveaxis(np.asarray(a, np.float64), axis, -1)
        blocks = rows.reshape(*rows.shape[:-1], -1, 32)
        rms = np.sqrt(np.mean(blocks**2, axis=-1, keepdims=True))
        scale = 2.0 ** np.round(np.log2(2.92247856 * rms / 6))
        masks.append(np.moveaxis((np.abs(blocks) <= 6 * scale).reshape(rows.shape), -1, axis))

    def rounded(a, axis, product, place):
        turned = r(jnp.asarray(a, jnp.float32), axis=axis, key=number(9 + product))
        return q(turned, backward, axis, number(2 * product + place) if stochastic else None)

    return [
        (xq, wq),
        (rounded(G, 1, 1, 0), rounded(wq, 1, 1, 1).T, (masks[0], h), None),
        (rounded(xq, 0, 2, 0).T, rounded(G, 0, 2, 1), None, (masks[1], h)),
    ]


def mxfp4_hadamard():
    fmt, h = recipes.mxfp4_hadamard().dlhs.lhs.fmt, Hadamard(64, "random")
    turn = lambda a, axis, product: h(a, axis=axis, key=number(9 + product))  # noqa: E731
    return [
        (np.asarray(X, np.float64), np.asarray(W, np.float64)),
        (q(turn(G, 1, 1), fmt, 1, number(2)), q(turn(W, 1, 1), fmt, 1, number(3)).T),
        (q(turn(X, 0, 2), fmt, 0, number(4)).T, q(turn(G, 0, 2), fmt, 0, number(5))),
    ]


FP8_TENSOR = (Scaled(qjax.E4M3, qjax.FP32, None), None, Scaled(qjax.E5M2, qjax.FP32, None))
NVFP4_WEIGHT = Scaled(Scaled(qjax.E2M1, qjax.E4M3, (16, 16)), qjax.FP32, None)
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
WORD, SHORT = (Scaled(Fixed(bits, symmetric=True), qjax.E8M0, None) for bits in (16, 15))
TILES = ("e4m3_1x128", "e4m3_128x128", "e4m3_1x128")
CASES = {
    "FP8": (recipes.FP8, lambda: each_afresh("e4m3", g="e5m2")),
    "FP8_HYBRID": (recipes.FP8_HYBRID, lambda: each_afresh(*FP8_TENSOR)),
    "MXFP8": (recipes.MXFP8, lambda: each_afresh("mxfp8_e4m3")),
    "MXFP6": (recipes.MXFP6, lambda: each_afresh("mxfp6_e2m3", g="mxfp6_e3m2")),
    "MXFP4_NEAREST": (recipes.MXFP4_NEAREST, lambda: each_afresh("mxfp4")),
    "MXFP4_STOCHASTIC": (recipes.MXFP4_STOCHASTIC, lambda: each_afresh("mxfp4", stochastic=True)),
    "NVFP4_TRAINING": (
        recipes.NVFP4_TRAINING,
        lambda: each_afresh(
            "nvfp4", NVFP4_WEIGHT, "nvfp4", stochastic=True, rotation=functools.partial(Hadamard(16, SIGNS), axis=0)
        ),
    ),
    "deepseek_v3": (recipes.deepseek_v3(), lambda: each_afresh(*TILES)),
    "INT8": (recipes.INT8, lambda: kept("int8_channel", "int8_channel")),
    "INT4_WEIGHTS": (recipes.INT4_WEIGHTS, lambda: kept(None, "int4_g128")),
    "BF16_OPERANDS": (recipes.BF16_OPERANDS, lambda: each_afresh("bf16")),
    "dfp16": (recipes.dfp16(32), lambda: each_afresh(WORD)),
    "dfp16, shifted": (
        recipes.dfp16(shift=True),
        lambda: [(q(a, SHORT, axis), q(b, WORD, axis)) for a, b, axis in ((X, W, 1), (G, W.T, 1), (X.T, G, 1))],
    ),
    "halo(0)": (recipes.halo(0), lambda: halo(0)),
    "halo(1)": (recipes.halo(1), lambda: halo(1)),
    "halo(2)": (recipes.halo(2), lambda: halo(2)),
    **{f"quest({b})": (recipes.quest(b), functools.partial(quest, b)) for b in (1, 2, 4, 8)},
    "quartet": (recipes.quartet(), lambda: quartet(False)),
    "quartet, stochastic": (recipes.quartet("stochastic"), lambda: quartet(True)),
    "mxfp4_hadamard": (recipes.mxfp4_hadamard(), mxfp4_hadamard),
}


@pytest.mark.parametrize(("chain", "shift", "overflows"), [(2, False, 0), (4, True, 0), (4, False, 4), (8, True, 4)])
def test_dfp16_overflow(chain, shift, overflows):
    """Two products of 15 bits fit a register of 31, of either sign, and four with one bit less; no more."""
    signs = jnp.array([[1.0], [-1.0]], jnp.float32)
    # -32767.6 is not rounded to -32768, of which two squares would overflow.
    x = jnp.full((1, 8), -32767.6, jnp.float32)
    recipe = recipes.dfp16(chain, shift=shift, detect=True)
    found = qjax.dot_general(signs * x, (signs * x).T, NUMBERS, recipe=recipe)
    assert jnp.isnan(found).sum() == overflows
    wrapping = qjax.dot_general(signs * x, (signs * x).T, NUMBERS, recipe=recipes.dfp16(chain, shift=shift))
    assert bool((jnp.sign(wrapping) == signs * signs.T).all()) == (not overflows)


def products(recipe, **more):
    options = {"key": KEY} if recipe.is_stochastic else {}
    y, transpose = jax.vjp(lambda x, w: qjax.dot_general(x, w, NUMBERS, recipe=recipe, **options, **more), X, W)
    return y, *transpose(G)


@pytest.mark.parametrize("name", CASES)
def test_equations(name):
    """Sums of n products in float32, in any order, are within n 2^-24 of the sum of magnitudes (Higham 2002, 4.2).

    Four more roundings: two scales, the product with them, the result. Rotating a result back, by sums of 2^k numbers
    of norm-preserving weights, adds k + 1 and spreads the error of 2^k elements: their bound is rotated likewise.
    """
    recipe, reference = CASES[name]
    for got, (lhs, rhs, *then) in zip(jax.jit(lambda: products(recipe))(), reference(), strict=True):
        expected, size = lhs @ rhs, np.abs(lhs) @ np.abs(rhs)
        bound = (lhs.shape[1] + 4) * 2.0**-24 * size
        for axis, step in zip((1, 0), then, strict=False):
            if step is None:
                continue
            mask, rotation = step if isinstance(step, tuple) else (None, step)
            if mask is not None:
                expected, bound = expected * mask, bound * mask
            matrix = np.asarray(rotation(jnp.eye(rotation.size, dtype=jnp.float32)), np.float64)
            turn = lambda a, m, axis=axis: np.moveaxis(  # noqa: E731
                (np.moveaxis(a, axis, -1).reshape(-1, m.shape[0]) @ m).reshape(np.moveaxis(a, axis, -1).shape), -1, axis
            )
            size = turn(np.abs(expected), np.abs(matrix))
            expected, bound = turn(expected, matrix), turn(bound, np.abs(matrix)) + 9 * 2.0**-24 * size
        assert (np.abs(np.asarray(got, np.float64) - expected) <= bound).all(), name


@pytest.mark.parametrize(("fmt", "chunk"), [("bf16", 64), ("fp16", 64), ("fp16", 1)])
def test_accumulated(fmt, chunk):
    """acc = round(acc + sum of a chunk), in the format of the register."""
    recipe = recipes.accumulated(fmt, chunk)
    got = np.asarray(products(recipe)[0][:4, :4])
    x, w = q(X, fmt, 1)[:4], q(W, fmt, 0)[:, :4]
    acc = np.zeros((4, 4))
    for k in range(0, INPUTS, chunk):
        part = (x[:, k : k + chunk] @ w[k : k + chunk]).astype(np.float32)
        acc = np.asarray(qjax.chop(jnp.asarray((acc + part).astype(np.float32)), fmt), np.float64)
    # The sum of a chunk may differ in its last bit, so that a rounding goes the other way: once, by one unit.
    unit = 2.0 ** np.floor(np.log2(np.abs(acc))) * qjax.format(fmt).eps
    assert (np.abs(got - acc) <= (0 if chunk == 1 else 2) * unit).all()


def test_fp8_hybrid_is_that_of_flax():
    """With delayed scaling, step for step: the same scales and codes; sums and products of scales may round otherwise.

    Both are float32: a sum of n products errs by n 2^-24 of the sum of magnitudes at most, each way.
    """
    layer = nn.Dense(OUTPUTS, use_bias=False, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)
    variables = layer.init(KEY, X) | {"params": {"kernel": W}}
    state = recipes.FP8_DELAYED.init()

    @jax.jit
    def ours(x, w, g, state):
        dot = lambda x, w, state: qjax.dot_general(x, w, NUMBERS, recipe=recipes.FP8_DELAYED, state=state)  # noqa: E731
        y, transpose = jax.vjp(dot, x, w, state)
        return y, *transpose(g)

    @jax.jit
    def flax(variables, x, g):
        y, transpose = jax.vjp(layer.apply, variables, x)
        gradients, dx = transpose(g)
        return y, dx, gradients["params"]["kernel"], gradients["_overwrite_with_gradient"]

    for growth in (1.0, 2.0, 30.0, 0.5, 1e-3):
        x, g = X * growth, G * growth
        *mine, state = ours(x, W, g, state)
        *theirs, overwritten = flax(variables, x, g)
        variables = variables | {"_overwrite_with_gradient": overwritten}
        sizes = [np.abs(x) @ np.abs(W), np.abs(g) @ np.abs(W).T, np.abs(x).T @ np.abs(g)]
        for a, b, size, n in zip(mine, theirs, sizes, (INPUTS, OUTPUTS, TOKENS), strict=True):
            # 1.125: rounding to E4M3 or E5M2 makes magnitudes larger by at most an eighth.
            assert (np.abs(a - b) <= 2 * (n + 4) * 2.0**-24 * 1.125**2 * size).all()


def test_delayed_scaling_needs_its_state():
    with pytest.raises(ValueError, match=r"dot_general: the recipe needs state=recipe.init\(\)"):
        products(recipes.FP8_DELAYED)
    with pytest.raises(ValueError, match="has no delayed scaling; leave state out"):
        products(recipes.FP8, state=recipes.FP8_DELAYED.init())
    with pytest.raises(ValueError, match=r"Recipe\.init: the recipe has no state"):
        recipes.FP8.init()
    with pytest.raises(ValueError, match="needs one scale a tensor, got Float"):
        dataclasses.replace(recipes.FP8, history=4)


def test_the_history_forgets():
    recipe = dataclasses.replace(recipes.FP8_HYBRID, history=2)
    state = recipe.init()
    for growth, largest in ((8.0, [8, 0]), (1.0, [1, 8]), (1.0, [1, 1])):
        dot = lambda x, state: qjax.dot_general(x, W, NUMBERS, recipe=recipe, state=state)  # noqa: E731
        x = jnp.ones_like(X) * growth
        y, transpose = jax.vjp(dot, x, state)
        _, state = transpose(jnp.ones_like(y))
        assert state["lhs"].tolist() == largest


@pytest.mark.parametrize("subscripts", ["ij,jk->ik", "ij,jk->ki", "ij,kj->ki", "hij,hjk->hki"])
def test_the_first_operand_of_einsum_is_the_lhs(subscripts):
    """Also where jnp.einsum swaps the operands of the product."""
    first, second = subscripts.split("->")[0].split(",")
    sizes = dict(h=2, i=3, j=32, k=5)
    x, w = (jnp.asarray(RNG.normal(size=[sizes[s] for s in part]).astype(np.float32)) for part in (first, second))
    recipe = recipes.INT4_WEIGHTS
    wq = q(w, "int4_g128", second.index("j"))
    y, transpose = jax.vjp(lambda x, w: qjax.einsum(subscripts, x, w, recipe=recipe), x, w)
    np.testing.assert_allclose(y, np.einsum(subscripts, x, wq), rtol=0, atol=36 * 2.0**-24 * 32 * 16)
    dx = np.einsum(f"{subscripts.split('->')[1]},{second}->{first}", np.ones(y.shape), wq)
    np.testing.assert_allclose(transpose(jnp.ones_like(y))[0], dx, rtol=0, atol=9 * 2.0**-24 * 5 * 4)


REFUSALS = {
    "halo: level must be 0, 1 or 2, got 3": lambda: recipes.halo(3),
    "quest: bits must be 1 to 8, got 9": lambda: recipes.quest(9),
    "midrise: expected 1 to 8 bits, got 9": lambda: qjax.midrise(9),
    "Accumulator: fmt must be a Float or a Fixed": lambda: Accumulator("mxfp4"),
    "Hadamard: axis 1 has 128 elements, not a multiple of the size 256": lambda: Hadamard(256)(X, axis=1),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((ValueError, TypeError), match=text):
        REFUSALS[text]()
