"""Law 1: chop is correctly rounded, once, for every format, mode and carrier."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tables import CARRIERS, CODEBOOKS, FIXED, FLOATS, critical, every, finfo, same_bits, with_neighbours

import qjax
from qjax import Rounding as R

# Of NumPy, where inputs are made.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (cast|ldexp):RuntimeWarning")


def chopped(x, fmt, **options):
    """Returns x in each deterministic mode with its name: of one program, which compiles twice as fast as eight."""
    program = jax.jit(lambda x: [qjax.chop(x, fmt, rounding, **options) for rounding in oracle.DETERMINISTIC])
    return zip(oracle.DETERMINISTIC, program(jnp.asarray(x)), strict=True)


@pytest.mark.parametrize("dtype", CARRIERS)
@pytest.mark.parametrize("name", FLOATS)
def test_floats(name, dtype):
    fmt = qjax.format(name)
    wide = oracle.is_wide(fmt)
    x = np.concatenate([every(dtype)[:: 97 if wide else 1], critical(fmt, dtype)[:: 17 if wide else 1]])
    with jax.enable_x64(dtype == "float64"):
        for rounding, values in chopped(x, fmt):
            same_bits(values, oracle.round_float(x, fmt, rounding, finfo(dtype)), x)


@pytest.mark.parametrize(
    "name", ["e4m3", "e5m2", "e2m1", "e8m0", "ue5m3", "e4m3fnuz", "binary8p3se", "binary8p4uf", "bf16", "fp16"]
)
def test_saturated_floats(name):
    fmt = qjax.format(name)
    x = np.concatenate([every("float32"), critical(fmt, "float32")])
    for rounding, values in chopped(x, fmt, saturate=True):
        same_bits(values, oracle.round_float(x, fmt, rounding, finfo("float32"), saturate=True), x)


@pytest.mark.parametrize("name", FIXED, ids=str)
@pytest.mark.parametrize("dtype", CARRIERS)
def test_fixed(dtype, name):
    fmt = qjax.format(name)
    steps = np.random.default_rng(0).integers(4 * fmt.min_integer - 4, 4 * fmt.max_integer + 5, 3000)
    steps = np.concatenate(
        [steps, 2 * fmt.max_integer + np.arange(-4, 5), 2 * fmt.min_integer + np.arange(-4, 5), np.arange(-9, 9)]
    )
    near = np.ldexp(steps.astype(np.float64), -1 - fmt.fraction_bits)
    near = near.astype(np.dtype(dtype))
    x = np.concatenate([every(dtype)[::5], with_neighbours(near[np.isfinite(near)])])
    with jax.enable_x64(dtype == "float64"):
        for rounding, values in chopped(x, fmt):
            same_bits(values, oracle.round_fixed(x, fmt, rounding, finfo(dtype)), x)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (qjax.Fixed(17, 149), "float32"),  # all among the subnormals of the dtype
        (qjax.Fixed(12, 140), "float32"),
        (qjax.Fixed(9, -126), "float32"),  # few of its numbers are in the range of the dtype
        (qjax.Fixed(8, -16), "float16"),  # none but 0
        (qjax.Float(4, 3, bias=-15, specials="fn"), "float16"),
        (qjax.Float(4, 3, bias=-30, specials="fn"), "float16"),
        (qjax.Float(7, 2, bias=149, subnormals="normal"), "float32"),
        (qjax.Float(8, 10, bias=128, subnormals="normal"), "bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("saturate", [False, True])
def test_formats_at_the_ends_of_the_dtype(fmt, dtype, saturate):
    x, held = every(dtype)[:: 1 if dtype == "float16" else 7], finfo(dtype)
    x = np.concatenate(
        [x, with_neighbours(np.geomspace(float(held.smallest_subnormal), float(held.tiny), 500).astype(dtype))]
    )
    if isinstance(fmt, qjax.Fixed):
        for rounding, values in chopped(x, fmt):
            same_bits(values, oracle.round_fixed(x, fmt, rounding, held), x)
    else:
        for rounding, values in chopped(x, fmt, saturate=saturate):
            same_bits(values, oracle.round_float(x, fmt, rounding, held, saturate=saturate), x)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_codebooks(dtype, name, saturate):
    fmt = qjax.format(name)
    table = np.array(fmt.table)
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2, fmt.boundaries or [0.0]]).astype(dtype)
    x = np.concatenate([every(dtype)[::97], with_neighbours(points[np.isfinite(points)])])
    with jax.enable_x64(dtype == "float64"):
        for rounding, values in chopped(x, fmt, saturate=saturate):
            same_bits(values, oracle.round_codebook(x, fmt, rounding, finfo(dtype), saturate=saturate), x)


@st.composite
def floats(draw):
    """Any format of up to 7 exponent bits that the constructor takes, with its numbers in the range of float32."""
    exponent_bits, mantissa_bits = draw(st.integers(1, 7)), draw(st.integers(0, 10))
    options = {
        "bias": 2 ** (exponent_bits - 1) + draw(st.integers(-9, 9)),
        "specials": draw(st.sampled_from(["ieee", "fn", "fnuz", "finite", "extended"])),
        "signed": draw(st.booleans()),
        "subnormals": draw(st.sampled_from([True, False, "normal"])),
    }
    try:
        return qjax.Float(exponent_bits, mantissa_bits, **options)
    except ValueError:
        hypothesis.reject()


@hypothesis.settings(max_examples=20)
@hypothesis.given(floats(), st.sampled_from(list(R)), st.booleans())
def test_any_float(fmt, rounding, saturate):
    x = np.concatenate([every("float32")[::97], critical(fmt, "float32")[::3]])
    draw = np.random.default_rng(0).integers(0, 256, x.shape) if rounding.is_stochastic else np.zeros(1, int)
    words = jnp.asarray(draw.astype(np.uint8)) if rounding.is_stochastic else None
    ours = qjax.chop(jnp.asarray(x), fmt, rounding, saturate=saturate, random_bits=words)
    theirs = oracle.round_float(x, fmt, rounding, finfo("float32"), saturate=saturate, draw=draw, bits=8)
    same_bits(ours, theirs, x)


DRAWS = [(name, "float32") for name in ("e4m3", "e2m1", "bf16", "e8m0", "ue5m3", "e5m10_nosub", "dlfloat16", "tf32")]
DRAWS += [
    (name, "float32")
    for name in ("binary8p3se", "e8m3b135", "q8.8", "int4", "e8m7_nosub", "e9m2", "e8m3b128", "e4m0fnuz")
]
DRAWS += [(qjax.Float(8, 0, bias=bias, specials="fn"), "float32") for bias in (127, 149)]
DRAWS += [(qjax.Fixed(17, 149), "float32")]
DRAWS += [("e4m3", "float64"), ("fp16", "float64"), ("e5m2", "bfloat16"), ("e4m3", "float16")]
STOCHASTIC = [rounding for rounding in R if rounding.is_stochastic]


@pytest.mark.parametrize(
    "rounding", [R.STOCHASTIC, R.STOCHASTIC_B, R.STOCHASTIC_C, R.STOCHASTIC_EQUAL], ids=lambda r: r.value
)
@pytest.mark.parametrize(("name", "dtype"), DRAWS)
def test_every_draw_of_eight_bits(name, dtype, rounding):
    """Law 6: over all 2^N draws the number that goes up is the rule's, exactly, for each draw indeed."""
    fmt = qjax.format(name)
    rng = np.random.default_rng(0)
    if isinstance(fmt, qjax.Float):
        points = critical(fmt, dtype)
        ends = np.ldexp(rng.uniform(0.4, 1.1, 60), 1) * [[fmt.max], [fmt.min_normal], [fmt.smallest_subnormal]]
    else:
        points = np.ldexp(rng.integers(-9 * fmt.max_integer, 9 * fmt.max_integer, 200) / 8.0, -fmt.fraction_bits)
        ends = rng.normal(size=100) * fmt.max
    x = np.concatenate([rng.permutation(points)[:200], np.ravel(ends), rng.permutation(every(dtype))[:200]])
    x = x.astype(np.dtype(dtype))
    x, draw = np.broadcast_to(x, (256, len(x))), np.broadcast_to(np.arange(256)[:, None], (256, len(x)))
    options = {"draw": draw.ravel(), "bits": 8}
    round_to = oracle.round_float if isinstance(fmt, qjax.Float) else oracle.round_fixed
    with jax.enable_x64(dtype == "float64"):
        ours = qjax.chop(jnp.asarray(x), fmt, rounding, random_bits=jnp.asarray(draw.astype(np.uint8)))
        same_bits(ours.ravel(), round_to(x.ravel(), fmt, rounding, finfo(dtype), **options), x.ravel())


@pytest.mark.parametrize("name", ["e4m3", "fp16", "bf16", "e2m1", "ue5m3", "q8.8", "int4"])
def test_the_word_that_just_goes_up(name):
    """Below the smallest value, down to 2^-50 of it: the least of the 2^32 words that goes up, and its neighbours."""
    fmt = qjax.format(name)
    smallest = fmt.smallest_subnormal if isinstance(fmt, qjax.Float) else fmt.eps
    significands = np.random.default_rng(0).integers(2**23, 2**24, (50, 20))
    significands[:, :3] = [2**23, 2**23 + 1, 2**24 - 1]
    x = (significands * 2.0 ** (-24.0 - np.arange(50)[:, None]) * smallest).astype(np.float32)
    least = 2**32 - np.floor(x.astype(np.float64) / smallest * 2**32)
    for offset in (-1, 0, 1):
        word = np.clip(least + offset, 0, 2**32 - 1).astype(np.uint32)
        ours = qjax.chop(jnp.asarray(x), fmt, "stochastic", random_bits=jnp.asarray(word))
        assert np.array_equal(ours, np.where(word >= least, np.float32(smallest), np.float32(0)))


@pytest.mark.parametrize("count", [1, 3, 10, 23, 32])
def test_a_key_draws_that_many_bits(count):
    from qjax._random import random_words

    key, fmt = jax.random.key(7), qjax.E4M3
    x = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
    draw = np.asarray(random_words(key, x.shape, count, 32)).astype(np.int64) >> (32 - count)
    ours = qjax.chop(jnp.asarray(x), fmt, "stochastic", key=key, random_bits=count)
    same_bits(
        ours.ravel(),
        oracle.round_float(x.ravel(), fmt, R.STOCHASTIC, finfo("float32"), draw=draw.ravel(), bits=count),
        x.ravel(),
    )


@pytest.mark.parametrize("name", ["nf4", "ternary", "pow2_4", "posit8"])
def test_stochastic_codebooks(name):
    """Over all draws of 8 bits the number that goes to the far neighbour is floor(256 d).

    The distance d is a float32 quotient of a difference of two: off by at most 2^-24 |x| / gap from the difference and
    3 2^-24 d from the rest, so that the count can be one off where 256 d is that near to an integer.
    """
    fmt = qjax.format(name)
    table = np.array(fmt.table)
    rng = np.random.default_rng(0)
    low = rng.integers(0, len(table) - 1, 300)
    x = (table[low] + rng.uniform(size=300) * (table[low + 1] - table[low])).astype(np.float32)
    low = np.clip(np.searchsorted(table, x, side="right") - 1, 0, len(table) - 2)
    words = jnp.asarray(np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 300)))
    ours = np.asarray(qjax.chop(jnp.broadcast_to(x, (256, 300)), fmt, "stochastic", random_bits=words)).astype(
        np.float64
    )
    near, far = np.where(
        np.abs(table[low]) <= np.abs(table[low + 1]), [table[low], table[low + 1]], [table[low + 1], table[low]]
    )
    assert ((ours == near.astype(np.float32)) | (ours == far.astype(np.float32))).all()
    steps = 256 * (x - near) / (far - near)
    slack = 256 * 2.0**-24 * (np.abs(x / (far - near)) + 3)
    went = (ours == far.astype(np.float32)).sum(axis=0)
    assert (np.floor(steps - slack) <= went).all() and (went <= np.floor(steps + slack)).all()
    exact = jnp.asarray(table[np.abs(table) < 1e30].astype(np.float32))
    again = qjax.chop(exact, fmt, "stochastic", random_bits=jnp.full(exact.shape, 255, jnp.uint8))
    assert np.array_equal(again, exact)
