"""Block formats against the oracle: every rule, shape of block and kind of scale, and blocks that go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tables import SCALED, finfo, same_bits

import qjax
from qjax import Rounding as R, Scaled
from qjax._blocks import blocks_of

# Of NumPy, where inputs are made.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")

E8M0_RULES = [
    Scaled(element, qjax.E8M0, 8, rule=rule)
    for element in (qjax.E2M1, qjax.E4M3, qjax.Fixed(8, 6, symmetric=True), qjax.Fixed(4))
    for rule in ("floor", "ceil", "rceil", "even")
]
OTHER_RULES = [
    Scaled(qjax.E2M1, qjax.E4M3, 16),
    Scaled(qjax.E2M1, qjax.UE5M3, 16),
    Scaled(qjax.E2M1, qjax.BF16, 16, rule="rceil"),
    Scaled(qjax.Fixed(8), qjax.FP16, "axis"),
    Scaled(qjax.E5M2, qjax.Float(5, 0, specials="finite", signed=False), 32),
    Scaled(qjax.NF4, qjax.E8M0, 32),
    Scaled(qjax.BF16, qjax.FP32, 16),
    Scaled(qjax.Float(8, 1), qjax.BF16, 16, rule="rceil"),
    Scaled(qjax.E4M3, qjax.Float(8, 0, specials="finite", signed=False), 16, rule="ceil"),
    Scaled(Scaled(qjax.Fixed(4), qjax.Float(5, 0, specials="fn", signed=False), 8), qjax.FP32, "axis"),
]


def blocks_that_go_wrong(dtype: str) -> np.ndarray:
    """Returns rows of 40: ordinary ones at many scales, and one for each way in which a block can be special."""
    info, rng = finfo(dtype), np.random.default_rng(0)
    largest, tiny, least = float(info.max), float(info.tiny), float(info.smallest_subnormal)
    powers = np.ldexp(1.0, np.arange(-6, 6))
    rows = [rng.normal(size=40) * np.ldexp(1.0, k) for k in (-20, -8, 0, 3, 12)]
    rows += [np.repeat([0.0, -0.0], 20), np.full(40, largest), rng.uniform(0.5, 1, 40) * largest]
    rows += [rng.uniform(0, 4, 40) * tiny, np.full(40, least), np.arange(40) * least]
    # The largest of a block just below, at and just above a power of two and 1.75 of one.
    for top in (1.0, 1.75, 1.875):
        near = (powers * top).astype(np.dtype(dtype))
        near = np.concatenate(
            [near, np.nextafter(near, np.dtype(dtype).type(0)), np.nextafter(near, np.dtype(dtype).type(9e9))]
        )
        rows += [np.concatenate([[v], rng.uniform(-1, 1, 39) * float(v)]) for v in near]
    for special in (np.nan, np.inf, -np.inf):
        row = rng.normal(size=40)
        row[3] = special
        rows.append(row)
    with np.errstate(over="ignore", under="ignore"):
        return np.stack(rows).astype(np.dtype(dtype))


def check(x: np.ndarray, fmt: Scaled, *roundings: R, axis: int = -1) -> None:
    """Compares x in each rounding, all of one program, with the oracle."""
    dtype = str(x.dtype)
    wide = x.astype(np.float64 if dtype == "float64" else np.float32)
    draw = np.random.default_rng(1).integers(0, 256, x.shape)
    with jax.enable_x64(dtype == "float64"):
        words = jnp.asarray(draw.astype(np.uint8))
        for rounding, ours in zip(roundings, chopped(jnp.asarray(x), words, fmt, roundings, axis), strict=True):
            expected = oracle.round_scaled(wide, fmt, rounding, finfo(dtype), axis=axis, draw=draw, bits=8)
            same_bits(np.ravel(ours), expected.astype(np.float64).ravel(), x.ravel())


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def chopped(x, words, fmt, roundings, axis):
    return [qjax.chop(x, fmt, r, axis=axis, random_bits=words if r.is_stochastic else None) for r in roundings]


@pytest.mark.parametrize("fmt", E8M0_RULES, ids=str)
def test_powers_of_two(fmt):
    check(blocks_that_go_wrong("float32"), fmt, R.NEAREST_EVEN, R.TOWARD_POSITIVE, R.TO_ODD)


@pytest.mark.parametrize("fmt", [*SCALED, *OTHER_RULES], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_all_kinds_of_scales(fmt, dtype):
    fmt, x = qjax.format(fmt), blocks_that_go_wrong(dtype)
    if fmt.block is None:
        for row in x:
            check(row, fmt, R.NEAREST_EVEN)
    else:
        check(x, fmt, R.NEAREST_EVEN)


DRAWN = [fmt for fmt in [*map(qjax.format, SCALED), *OTHER_RULES] if not isinstance(fmt.element, qjax.Codebook)]
DRAWN += [fmt for fmt in E8M0_RULES if fmt.rule == "floor"]
DRAWN += [Scaled(element, qjax.E8M0, 8) for element in map(qjax.format, ("e5m2", "e2m1b5", "e4m0", "e4m3_nosub"))]


@pytest.mark.parametrize("fmt", DRAWN, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_draws(fmt, dtype):
    """Eight random bits an element, on blocks of zeros and of the smallest numbers too."""
    x = np.repeat(blocks_that_go_wrong(dtype), 2, axis=0)
    roundings = [rounding for rounding in R if rounding.is_stochastic] if dtype == "float32" else [R.STOCHASTIC]
    for part in np.split(x, len(x)) if fmt.block is None else [x]:
        check(part, fmt, *roundings)


@pytest.mark.parametrize(
    "name", ["mxfp4", "mxint8", "int8_channel", "int4_g128", "e4m3_128x128", "e4m3_1x128", "nvfp4", "uint4_g32"]
)
@pytest.mark.parametrize("shape", [(33,), (1, 70), (5, 33), (3, 40, 35), (130, 129)])
def test_all_shapes_and_axes(name, shape):
    """Partial last blocks included; no block goes on in the next row."""
    fmt = qjax.format(name)
    if isinstance(fmt.block, tuple) and len(fmt.block) > len(shape):
        pytest.skip("tiles need their axes")
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    axes = range(len(shape)) if isinstance(fmt.block, int | str) else [-1]
    for axis in axes:
        check(x, fmt, R.NEAREST_EVEN, axis=axis)


@pytest.mark.parametrize("name", ["mxfp4", "int8_channel", "nvfp4"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 32)])
def test_empty_arrays_and_scalars(name, shape):
    x = np.ones(shape, np.float32)
    ours = qjax.chop(jnp.asarray(x), name)
    assert ours.shape == shape and np.array_equal(ours, x)


@pytest.mark.parametrize(
    "fmt", [Scaled(qjax.E2M1, qjax.E8M0, 16, rule="mse"), Scaled(qjax.Fixed(4), qjax.FP32, 16, rule="mse")], ids=str
)
def test_the_searched_scale_is_the_best_candidate(fmt):
    """In each block the result is that of a candidate, and its squared error is the least, up to rounding.

    The errors are float32 sums of 16 squares: relative error below 18 2^-24 each, so below 2^-18 between two.
    """
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    ours = np.asarray(qjax.chop(jnp.asarray(x), fmt))
    factors = [1, 2, 0.5] if fmt.power_of_two else [1 - i / 32 for i in range(16)]
    usual = qjax.Scaled(fmt.element, fmt.scale, fmt.block)
    top = qjax.encode(jnp.asarray(x), usual).scales[0]
    scales = np.asarray(qjax.decode(top)) * np.array(factors, np.float32)[:, None, None]
    if not fmt.power_of_two:
        ratio = np.abs(x).max(axis=1, keepdims=True) / np.float32(fmt.element.max)
        scales = ratio * np.array(factors, np.float32)[:, None, None]
    candidates = np.stack([qjax.chop(jnp.asarray(x), usual, scale=jnp.asarray(s)) for s in scales])
    assert (candidates == ours).all(axis=2).any(axis=0).all()
    errors = np.square(candidates.astype(np.float64) - x).sum(axis=2)
    mine = np.square(ours.astype(np.float64) - x).sum(axis=1)
    assert (mine <= errors.min(axis=0) * (1 + 2.0**-18)).all()
    assert mine.sum() < 0.97 * errors[0].sum()


def test_a_given_scale_replaces_the_computed_one():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32))
    for name in ("mxfp4", "int8_channel", "uint4_g32", "nvfp4"):
        q = qjax.encode(x, name)
        assert np.array_equal(qjax.chop(x, name, scale=qjax.decode(q.scales[0])), qjax.chop(x, name))
    assert np.array_equal(
        qjax.chop(x, "int8_tensor", scale=0.5), qjax.chop(x / 0.5, qjax.Fixed(8, symmetric=True)) * 0.5
    )
    # The scale is rounded to its own format, and its sign does not count.
    assert np.array_equal(qjax.chop(x, "mxfp4", scale=-0.27), qjax.chop(x, "mxfp4", scale=0.25))


def test_a_traced_scale_costs_no_recompilation():
    traces = []

    @jax.jit
    def f(x, s):
        traces.append(1)
        return qjax.chop(x, "int8_tensor", scale=s)

    x = jnp.linspace(-1, 1, 9, dtype=jnp.float32)
    assert not np.array_equal(f(x, jnp.float32(0.1)), f(x, jnp.float32(0.2)))
    assert len(traces) == 1


def test_nvfp4_keeps_small_data_by_its_tensor_scale():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    error = [
        float(np.mean(np.square(qjax.chop(jnp.asarray(x * s), "nvfp4") / s - x))) for s in (1.0, 1e-3, 1e-12, 1e12)
    ]
    assert max(error) < 1.05 * min(error) < 0.02


@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 999)])
def test_constants_are_not_rounded_while_compiling(shape):
    """XLA takes a second for a million numbers."""
    program = jax.jit(lambda: qjax.chop(jnp.zeros(shape), "mxfp4")).lower().compile()
    # Of the maxima, and of what is computed from them once a block.
    assert program.as_text().count(" reduce(") == 2


SMALL = [(1, 131), (257, 3), (3, 257), (193, 131), (2, 3, 191), (256, 1, 129)]
# Here blocks are folded, and of the last two shapes several are reduced in one loop.
LARGE = [(2**17 + 5,), (2**16, 1), (67, 1031), (3, 512, 96), (64, 1, 1037), (1030, 1056), (2, 263, 2000)]


@pytest.mark.parametrize(
    "block", [None, "axis", 8, 16, 32, 48, 100, 256, (3,), (2, 128), (32, 32), (128, 128)], ids=str
)
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_maxima_of_blocks(shape, block):
    if isinstance(block, tuple) and len(block) > len(shape):
        pytest.skip("tiles of more axes than the array has")
    x = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
    x[(-1,) * len(shape)] = 2**32 - 1  # in the place where what is left over lies
    axes = range(1 if isinstance(block, tuple) or block is None else len(shape))
    every = [blocks_of(Scaled(qjax.E4M3, qjax.FP32, block), shape, axis) for axis in axes]
    program = jax.jit(lambda x: [of_axis.maximum(x) for of_axis in every])
    for blocks, maxima in zip(every, program(x), strict=True):
        padded = np.pad(x, [(0, n * size - k) for n, size, k in zip(blocks.counts, blocks.sizes, shape, strict=True)])
        split = padded.reshape([k for pair in zip(blocks.counts, blocks.sizes, strict=True) for k in pair])
        assert np.array_equal(maxima, split.max(axis=tuple(range(1, 2 * len(shape), 2))))
