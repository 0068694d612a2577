"""Accumulators against the reference: float registers in exact sums, integer registers in Python's integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import reference
from tables import bits

import qjax
from qjax import Accumulator, Gemm, Quantizer as Q, Recipe, Rounding as R, _random

MATRIX = (((1,), (0,)), ((), ()))
KEY = jax.random.key(5)


def run(x: np.ndarray, w: np.ndarray, accumulator: Accumulator, lhs=None, rhs=None, key=None) -> np.ndarray:
    """Returns the product of rows (b, m, k) and (b, n, k) under jit."""
    numbers = (((2,), (2,)), ((0,), (0,)))
    recipe = Recipe(Gemm(lhs, rhs, accumulator))
    f = jax.jit(functools.partial(qjax.dot_general, dimension_numbers=numbers, recipe=recipe))
    return np.asarray(f(jnp.asarray(x), jnp.asarray(w), key=key))


def few_bits(seed: int, *shape: int, high: int = 32, power: int = 0) -> np.ndarray:
    """Returns integers below ``high`` times powers of two, so that float64 sums of products are exact."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-high + 1, high, shape) * 2.0 ** rng.integers(-power, power + 1, shape)).astype(np.float32)


REGISTERS = ["fp16", "bf16", "e5m2", "dlfloat16", qjax.Float(8, 13), qjax.Float(8, 21), "e4m3", "e5m10_nosub"]


@pytest.mark.parametrize(
    ("fmt", "chunk"), [*((fmt, 1) for fmt in REGISTERS), ("fp16", 2), ("e5m2", 16), (qjax.Float(8, 13), 16)], ids=str
)
def test_float_registers(fmt, chunk):
    """The last chunk is partial: 21 products."""
    x, w = few_bits(0, 1, 3, 21, high=8, power=1), few_bits(1, 1, 2, 21, high=8, power=1)
    accumulator = Accumulator(fmt, chunk=chunk)
    expected = reference.float_register(x, w, accumulator)
    assert np.isfinite(expected).all() and np.array_equal(run(x, w, accumulator), expected)


@pytest.mark.parametrize("fmt", ["fp16", qjax.Float(8, 20)])
def test_products_are_rounded_before_they_are_added(fmt):
    """Random float32 operands, of which the products have 48 bits: jit must not contract them into the sum."""
    x, w = np.random.default_rng(0).normal(size=(2, 1, 4, 30)).astype(np.float32)
    register = np.zeros((1, 4, 4))
    for k in range(30):
        total = reference.exact_sum(register, (x[:, :, None, k] * w[:, None, :, k]).astype(np.float64))
        register = oracle.round_float(total, qjax.format(fmt), R.NEAREST_EVEN, reference.F32)
    assert np.array_equal(run(x, w, Accumulator(fmt)), register)


@pytest.mark.parametrize("rounding", oracle.DETERMINISTIC, ids=lambda r: r.value)
def test_every_mode(rounding):
    x, w = few_bits(2, 2, 3, 12, power=3), few_bits(3, 2, 3, 12, power=3)
    accumulator = Accumulator("e5m4", rounding, chunk=3, saturate=rounding is R.TO_ODD)
    assert np.array_equal(run(x, w, accumulator), reference.float_register(x, w, accumulator))


def test_the_order_is_that_of_the_contraction():
    """1 + 2^-11 + 2^-11 in fp16: one after the other both are lost to ties, in the other order they count."""
    x = np.array([[[1, 2.0**-11, 2.0**-11], [2.0**-11, 2.0**-11, 1]]], np.float32)
    ones = np.ones((1, 1, 3), np.float32)
    assert run(x, ones, Accumulator("fp16"))[0, :, 0].tolist() == [1, 1 + 2.0**-10]
    assert run(x, ones, Accumulator("fp16", chunk=3))[0, :, 0].tolist() == [1 + 2.0**-10] * 2


@pytest.mark.parametrize("sign", [1, -1])
def test_a_register_rounds_the_exact_sum_once(sign):
    """1.5 ulp of fp16, 2^-11 beside 1, and a tail far below float32: it breaks the tie, which float32 would not see.

    The float32 sum of 1 + 2^-11 and 2^-30 is 1 + 2^-11, a tie of fp16 that goes to 1; the exact sum goes up.
    """
    register, part = 1.0, 2.0**-11 + 2.0**-34
    x = np.array([[[register, 2.0**-11], [1 + 2.0**-10, 2.0**-11]]], np.float32) * sign
    tail = np.float32(1 + 2.0**-23)
    w = np.array([[[1, tail]]], np.float32)
    del part
    accumulator = Accumulator("fp16")
    ours = run(x, w, accumulator)
    assert np.array_equal(ours, reference.float_register(x, w, accumulator))
    assert ours[0, 0, 0] == sign * (1 + 2.0**-10)
    # What a plain float32 addition before rounding would give.
    added = x[0, 0, 0] + x[0, 0, 1] * tail
    assert np.float32(added) == sign * (1 + 2.0**-11) and qjax.chop(jnp.float32(added), "fp16") == sign
    # Just below the tie, from the other side.
    w = np.array([[[1, 1 - 2.0**-24]]], np.float32)
    assert run(x, w, accumulator)[0, 1, 0] == sign * (1 + 2.0**-10)
    for mode, expected in (("toward_zero", 1), ("to_odd", 1 + 2.0**-10)):
        assert run(x, w, Accumulator("fp16", mode))[0, 0, 0] == sign * expected


@pytest.mark.parametrize("seed", range(2))
def test_exact_sums_of_far_apart_numbers(seed):
    """Float32 parts of 24 bits up to 20 binades below the register: most sums need 30 bits and more."""
    rng = np.random.default_rng(seed)
    x = (rng.integers(2**23, 2**24, (1, 24, 6)) * 2.0 ** rng.integers(-40, -20, (1, 24, 6))).astype(np.float32)
    x *= rng.choice([-1, 1], x.shape).astype(np.float32)
    one = np.ones((1, 1, 6), np.float32)
    for fmt, rounding in ((qjax.Float(8, 21), R.NEAREST_EVEN), ("fp16", R.TOWARD_POSITIVE), ("bf16", R.NEAREST_AWAY)):
        accumulator = Accumulator(fmt, rounding)
        assert np.array_equal(run(x, one, accumulator), reference.float_register(x, one, accumulator))


def test_float32_itself_is_the_addition_of_float32():
    x, w = np.random.default_rng(0).normal(size=(2, 1, 3, 20)).astype(np.float32)
    total = np.zeros((1, 3, 3), np.float32)
    for k in range(20):
        total = total + x[:, :, None, k] * w[:, None, :, k]
    assert np.array_equal(run(x, w, Accumulator("fp32")), total)


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic_equal"])
def test_stochastic_registers(rounding):
    """Chunk i draws words of its own, from fold_in(key of the accumulator, i), one for each entry of the result."""
    x, w = few_bits(4, 1, 4, 12, power=2), few_bits(5, 1, 5, 12, power=2)
    accumulator = Accumulator("e5m2", rounding, chunk=4)
    key = jax.random.fold_in(KEY, 6)
    words = [np.asarray(_random.random_words(jax.random.fold_in(key, place), (1, 4, 5), 32, 32)) for place in range(3)]
    ours = run(x, w, accumulator, key=KEY)
    assert np.array_equal(ours, reference.float_register(x, w, accumulator, words))
    assert not np.array_equal(ours, run(x, w, accumulator, key=jax.random.key(6)))


def test_a_stochastic_register_is_unbiased():
    """Seventeen products 2^-6 onto 1 in E5M2, whose spacing at 1 is 1/4: to nearest they are all lost.

    Each addition goes up with probability 1/16 from any grid point below 2, so the mean of a result of 16 additions is
    2 - 1 + 16/64 = 1.25 and its variance is at most 16 (1/4)^2 / 16. The mean of 4096 is within 5 of its deviations.
    """
    x = np.array([[[1.0] + [2.0**-6] * 16]], np.float32)
    ones = np.ones((1, 4096, 17), np.float32)
    assert run(x, ones[:, :1], Accumulator("e5m2"))[0, 0, 0] == 1
    mean = run(x, ones, Accumulator("e5m2", "stochastic"), key=KEY).mean()
    assert abs(mean - 1.25) < 5 * (1 / 4) / 64


def test_overflow_of_a_float_register():
    x, one = np.full((1, 1, 4), 30000, np.float32), np.ones((1, 1, 4), np.float32)
    assert run(x, one, Accumulator("fp16")).item() == np.inf
    assert run(x, one, Accumulator("fp16", "toward_zero")).item() == 65504
    assert run(x, one, Accumulator("fp16", saturate=True)).item() == 65504
    assert np.isnan(run(x, one, Accumulator("e4m3")).item())


def test_empty_and_short_contractions():
    accumulator = Accumulator("fp16", chunk=4, promote=8)
    assert np.array_equal(
        run(np.ones((1, 2, 0), np.float32), np.ones((1, 3, 0), np.float32), accumulator), np.zeros((1, 2, 3))
    )
    assert run(np.ones((1, 1, 1), np.float32), np.ones((1, 1, 1), np.float32), accumulator).item() == 1
    assert run(np.ones((1, 0, 3), np.float32), np.ones((1, 2, 3), np.float32), accumulator).shape == (1, 0, 2)


# Promotion.


@pytest.mark.parametrize("depth", [40, 7])
def test_promotion(depth):
    x, w = few_bits(6, 1, 3, depth, power=2), few_bits(7, 1, 4, depth, power=2)
    accumulator = Accumulator("e5m3", "toward_zero", chunk=4, promote=8)
    register = functools.partial(reference.float_register, accumulator=accumulator)
    assert np.array_equal(run(x, w, accumulator), reference.promoted(x, w, accumulator, register))


def test_promotion_recovers_what_a_tensor_core_loses():
    """DeepSeek-V3, section 3.3.2: 14 bits that truncate, 32 products at a time, with and without promotion every 128.

    Truncation of a register of size s loses up to an ulp, 2^-13 s, on average half of that, always toward zero. A sum
    of k products of variance 1 walks to sqrt(j) at product j, so k / 32 roundings lose about
    sum_j 2^-14 sqrt(32 j) (j = 1 to k / 32) times the mean of |s| over its root mean square and the mean of
    2^floor(log2) over a binade (0.80 and 0.72), of which a walk keeps the sign with its end about 3 times in 4:
    1.6e-3 sqrt(k) for k = 4096 with 128 roundings; published is 3.3e-3 in the norm, 1.3e-4 with promotion, a sum of
    32 segments whose errors are independent. A factor of 1.5 either way is asserted, and 20 between the two.
    """
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=(1, 64, 4096)).astype(np.float32) for _ in range(2))
    exact = x[0].astype(np.float64) @ w[0].T.astype(np.float64)
    errors = []
    for promote in (None, 128):
        out = run(x, w, Accumulator(qjax.Float(8, 13), "toward_zero", chunk=32, promote=promote))[0]
        errors.append(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    assert 3.29e-3 / 1.5 < errors[0] < 3.29e-3 * 1.5
    assert 1.28e-4 / 1.5 < errors[1] < 1.28e-4 * 1.5
    assert errors[0] > 20 * errors[1]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("e4m3_1x8", "e4m3_8x8"),
        ("e4m3_16x16", "e4m3_1x8"),
        ("e4m3_channel", "e4m3_1x16"),
        (qjax.Scaled(qjax.E4M3, qjax.E8M0, 4), "e4m3_8x8"),
    ],
    ids=str,
)
def test_block_scales_multiply_what_is_promoted(left, right):
    """y[m, n] = sum_g sx[m, g] sw[n, g] (sum over k in g of X W): with segments of 8, the last one partial.

    Blocks of 8 and 16 are whole segments. Scales of a channel multiply the result; those of blocks of 4 the elements.
    """
    rng = np.random.default_rng(0)
    depth = 36
    # Elements of one or two binades, so that sums are exact.
    x, w = (rng.uniform(1, 2, s) * rng.choice([-1, 1], s) for s in ((20, depth), (12, depth)))
    x, w = (x * 2.0 ** rng.integers(-3, 4, (20, 1))).astype(np.float32), w.astype(np.float32)
    accumulator = Accumulator(qjax.Float(8, 13), "toward_zero", chunk=4, promote=8)

    def operand(x, fmt):
        """Returns (elements, scale of each segment, scale of each row)."""
        fmt, ones = qjax.format(fmt), np.ones((len(x), -(-depth // 8)), np.float32)
        if fmt.block == 4:
            return np.asarray(qjax.chop(jnp.asarray(x), fmt)), ones, ones[:, :1]
        height, width = fmt.block if isinstance(fmt.block, tuple) else (1, depth)
        scale = np.zeros_like(x)
        for i in range(0, len(x), height):
            for j in range(0, depth, width):
                tile = slice(i, i + height), slice(j, j + width)
                scale[tile] = np.abs(x[tile]).max() / np.float32(448)
        elements = np.asarray(qjax.chop(jnp.asarray(x / scale), "e4m3", saturate=True))
        return (elements, ones, scale[:, :1]) if width == depth else (elements, scale[:, ::8], ones[:, :1])

    (a, segment_a, row_a), (b, segment_b, row_b) = operand(x, left), operand(w, right)
    register = functools.partial(reference.float_register, accumulator=accumulator)
    expected = reference.promoted(a[None], b[None], accumulator, register, (segment_a[None], segment_b[None]))
    ours = run(x[None], w[None], accumulator, Q(left), Q(right))
    assert np.array_equal(ours[0], expected[0] * row_a * row_b.T)


# Integers.


def integers(seed: int, *shape: int, fmt="int8") -> np.ndarray:
    fmt = qjax.format(fmt)
    rng = np.random.default_rng(seed)
    return (rng.integers(fmt.min_integer, fmt.max_integer + 1, shape) * 2.0**-fmt.fraction_bits).astype(np.float32)


F = qjax.Fixed


@pytest.mark.parametrize(
    "accumulator",
    [
        Accumulator("int32", chunk=4),
        Accumulator("int16", chunk=3),
        Accumulator(F(16, overflow="wrap"), chunk=3),
        Accumulator(F(20, overflow="wrap")),
        Accumulator(F(20)),
        Accumulator(F(16), chunk=5, detect=True),
        Accumulator(F(16, overflow="wrap"), chunk=2, detect=True),
        Accumulator(F(12, signed=False, overflow="wrap")),
        Accumulator(F(16, symmetric=True), chunk=2),
        Accumulator(F(31, signed=False, overflow="wrap"), chunk=2),
    ],
    ids=str,
)
def test_integer_registers(accumulator):
    x, w = integers(0, 2, 3, 23), integers(1, 2, 4, 23)
    ours = run(x, w, accumulator, Q("int8"), Q("int8"))
    expected = reference.integer_register(x, w, accumulator, (0, 0))
    assert np.array_equal(ours, expected, equal_nan=True)


def test_fraction_bits_add_up():
    x, w = integers(2, 1, 3, 10, fmt="q3.5"), integers(3, 1, 2, 10, fmt="q5.3")
    for fmt in (F(16, 8), F(18, 8, overflow="wrap")):
        ours = run(x, w, Accumulator(fmt, chunk=2), Q("q3.5"), Q("q5.3"))
        assert np.array_equal(ours, reference.integer_register(x, w, Accumulator(fmt, chunk=2), (5, 3)))


@pytest.mark.parametrize("overflow", ["wrap", "saturate", "detect"])
def test_two_worst_products_of_int16_fit_and_three_do_not(overflow):
    """Das et al. (2018), section 4: 2 (2^15 - 1)^2 < 2^31 <= 3 (2^15 - 1)^2."""
    fmt = F(32, overflow="saturate" if overflow == "saturate" else "wrap")
    accumulator = Accumulator(fmt, detect=overflow == "detect")
    for sign in (1, -1):
        x, w = np.full((1, 1, 3), 32767, np.float32), np.full((1, 1, 3), sign * 32767, np.float32)
        two, three = (run(x[..., :n], w[..., :n], accumulator, Q("int16"), Q("int16")).item() for n in (2, 3))
        assert two == np.float32(sign * 2 * 32767**2)
        wrapped = np.float32((np.full(3, 32767, np.int32) * np.int32(sign * 32767)).sum(dtype=np.int32))
        ends = {1: np.float32(2**31 - 1), -1: np.float32(-(2**31))}
        assert np.array_equal(
            three, {"wrap": wrapped, "saturate": ends[sign], "detect": np.nan}[overflow], equal_nan=True
        )


@pytest.mark.parametrize("length", [2, 8, 64])
def test_chains_of_dfp_16(length):
    """Random int16 with wrapping int32 registers, flushed to float32 every ``length`` products; NumPy's int32 wraps."""
    rng = np.random.default_rng(length)
    x, w = (rng.integers(-(2**15), 2**15, s).astype(np.float32) for s in ((1, 3, 200), (1, 4, 200)))
    accumulator = Accumulator(F(32, overflow="wrap"), promote=length)
    total = np.zeros((3, 4), np.float32)
    wrapped = 0
    for start in range(0, 200, length):
        a, b = (v[0, :, start : start + length].astype(np.int64) for v in (x, w))
        exact = a @ b.T
        total = total + exact.astype(np.int32).astype(np.float32)
        wrapped += int((exact != exact.astype(np.int32)).sum())
    assert np.array_equal(run(x, w, accumulator, Q("int16"), Q("int16"))[0], total)
    assert (wrapped == 0) == (length == 2)
    # One bit less in one operand: chains of four worst products fit.
    short = np.floor(x / 2)
    detected = run(short, w, Accumulator(F(32), promote=min(length, 4), detect=True), Q(F(15)), Q("int16"))
    assert np.isfinite(detected).all()


def test_shared_exponents_of_dfp_multiply_the_register():
    """DFP-16, a power of two a tensor: the integers are summed, then both scales multiply."""
    x, w = integers(4, 3, 9, fmt="int16") * 2.0**-7, integers(5, 9, 2, fmt="int16") * 2.0**3
    x[0, 0], w[0, 0] = 32767 * 2.0**-7, 32767 * 2.0**3
    dfp = Q("dfp16")
    recipe = Recipe(Gemm(dfp, dfp, Accumulator(F(32, overflow="wrap"), promote=2)))
    ours = qjax.dot_general(jnp.asarray(x), jnp.asarray(w), MATRIX, recipe=recipe)
    a, b = (x * 2.0**7).astype(np.int64), (w * 2.0**-3).astype(np.int64)
    total = np.zeros((3, 2), np.float32)
    for start in range(0, 9, 2):
        total = total + (a[:, start : start + 2] @ b[start : start + 2]).astype(np.float32)
    assert np.array_equal(ours, total * np.float32(2.0**-4))


def test_a_wrapping_register_wraps_at_any_depth():
    """Also where the sum of a chunk overflows 32 bits."""
    x, w = np.full((1, 1, 300), 32767, np.float32), np.full((1, 1, 300), 32767, np.float32)
    exact = 300 * 32767**2
    expected = np.float32((exact + 2**31) % 2**32 - 2**31)
    for chunk in (1, 300):
        assert run(x, w, Accumulator(F(32, overflow="wrap"), chunk=chunk), Q("int16"), Q("int16")).item() == expected


# Transformations and gradients.


@pytest.mark.parametrize(
    "accumulator", [Accumulator("fp16", chunk=2, promote=4), Accumulator("int32", chunk=3)], ids=str
)
def test_transformations_and_layouts(accumulator):
    x, w = integers(6, 5, 2, 3), integers(7, 3, 2, 5, 4)
    numbers = (((0, 2), (2, 0)), ((1,), (1,)))
    q = Q("int8")
    recipe = Recipe(*[Gemm(q, q, accumulator)] * 3)
    f = functools.partial(qjax.dot_general, dimension_numbers=numbers, recipe=recipe)

    def grads(x, w):
        out, pullback = jax.vjp(f, x, w)
        return out, *pullback(jnp.sign(out) * 3)

    eager = grads(jnp.asarray(x), jnp.asarray(w))
    rows, columns = reference.canonical(x, w, numbers)
    register = functools.partial(
        reference.float_register if isinstance(accumulator.fmt, qjax.Float) else reference.integer_register,
        accumulator=accumulator,
        **{} if isinstance(accumulator.fmt, qjax.Float) else {"fractions": (0, 0)},
    )
    total = reference.promoted(rows, columns, accumulator, register) if accumulator.promote else register(rows, columns)
    assert np.array_equal(eager[0].reshape(total.shape), total)
    stacked = jax.vmap(grads)(*(jnp.stack([jnp.asarray(a)] * 2) for a in (x, w)))
    for one, jitted, batched in zip(eager, jax.jit(grads)(x, w), stacked, strict=True):
        assert np.array_equal(bits(one), bits(jitted)) and np.array_equal(bits(one), bits(batched[1]))
    # The gradient of rhs: sum over m of lhs and gradient, in the layout of rhs.
    g = (np.sign(total) * 3).astype(np.float32)
    turned = np.swapaxes(rows, 1, 2), np.swapaxes(g, 1, 2)
    total = reference.promoted(*turned, accumulator, register) if accumulator.promote else register(*turned)
    back = np.transpose(total.reshape(2, 5, 3, 4), (2, 0, 1, 3))
    assert np.array_equal(eager[2], back)


CONVOLUTIONS = {
    "same": dict(window_strides=(1, 1), padding="SAME"),
    "strided": dict(window_strides=(2, 3), padding=((1, 2), (0, 1))),
    "dilated": dict(window_strides=(1, 2), padding=((0, 1), (2, 0)), rhs_dilation=(2, 1), lhs_dilation=(1, 2)),
    "depthwise": dict(window_strides=(2, 1), padding="SAME", feature_group_count=2),
    "cropped": dict(window_strides=(1, 1), padding=((-1, 0), (0, -2))),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_products_of_patches(name):
    """Small integers, of which all sums are exact: the result and both gradients are those of lax."""
    options = CONVOLUTIONS[name]
    x, w = integers(8, 2, 2, 7, 8) % 8, integers(9, 4, 2 // options.get("feature_group_count", 1), 3, 3) % 8
    q = Q("int8")
    recipe = Recipe(*[Gemm(q, q, Accumulator("int32", chunk=2, promote=4))] * 3)

    def results(conv, **more):
        out, pullback = jax.vjp(lambda x, w: conv(x, w, **options, **more), jnp.asarray(x), jnp.asarray(w))
        return out, *pullback(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape) % 5)

    ours = results(qjax.conv_general_dilated, recipe=recipe)
    for mine, theirs in zip(ours, results(jax.lax.conv_general_dilated), strict=True):
        assert np.array_equal(mine, theirs)


def test_an_empty_convolution():
    recipe = Recipe(Gemm(Q("int8"), Q("int8"), Accumulator("int32")))
    x, w = jnp.ones((2, 3, 2, 5), jnp.float32), jnp.ones((4, 3, 3, 3), jnp.float32)
    out, pullback = jax.vjp(lambda x, w: qjax.conv_general_dilated(x, w, (1, 1), "VALID", recipe=recipe), x, w)
    assert out.shape == (2, 4, 0, 3)
    assert [np.asarray(g).tolist() == np.zeros(g.shape).tolist() for g in pullback(out)] == [True, True]
