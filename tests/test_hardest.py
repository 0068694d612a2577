"""The fifteen hardest cases, by name, with the answers written out. Wider sweeps of each are in the other files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import bits

import qjax

INF, NAN = float("inf"), float("nan")
KEY = jax.random.key(0)


def check(x, fmt, rounding, expected, *, dtype=np.float32, **options) -> None:
    """Asserts the bits of chop, eager and jitted."""
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray(np.asarray(x, np.float64).astype(dtype))
        expected = np.asarray(expected, np.float64).astype(dtype)
        eager = qjax.chop(x, fmt, rounding, **options)
        jitted = jax.jit(lambda x: qjax.chop(x, fmt, rounding, **options))(x)
        for ours in (eager, jitted):
            assert bits(ours).tolist() == bits(expected).tolist(), (ours, expected)


MODES = ("nearest_even", "toward_zero", "toward_positive", "toward_negative", "to_odd")


@pytest.mark.parametrize(("fmt", "least"), [("bf16", 2.0**-133), ("e8m3", 2.0**-129), ("e8m10", 2.0**-136)])
def test_1_host_subnormals(fmt, least):
    x = [2.0**-149, -(2.0**-149), least / 2, 0.75 * least, -least]
    check(x, fmt, "nearest_even", [0.0, -0.0, 0.0, least, -least])
    check(x, fmt, "toward_positive", [least, -0.0, least, least, -least])
    check(x, fmt, "toward_negative", [0.0, -least, 0.0, 0.0, -least])
    check(x, fmt, "to_odd", [least, -least, least, least, -least])


def test_2_beside_every_power_of_two():
    k = np.arange(-126, 128)
    x = np.ldexp(1.0, k).astype(np.float32)
    up, down = np.nextafter(x, np.float32(INF)), np.nextafter(x, np.float32(0))
    e8m3 = "e8m3"
    for rounding in MODES[:4]:
        check(x, e8m3, rounding, x)
    check(down, e8m3, "toward_zero", np.where(k == -126, 0.875, 0.9375) * x)
    check(down, e8m3, "nearest_even", x)
    check(up, e8m3, "toward_positive", x * 1.125)
    block = np.stack([down, x, up], axis=0)[..., None]
    scale = qjax.encode(jnp.asarray(block), "mxfp4").scales[0]
    # floor(log2 a) less the 2 of E2M1; an exponent below -127 is clamped.
    expected = np.maximum(np.stack([k - 1, k, k]) - 2, -127)
    assert np.array_equal(np.log2(np.asarray(qjax.decode(scale), np.float64))[..., 0], expected)


def test_3_the_overflow_window():
    # The last step of e4m3 is 32: 464 is the tie, and goes to 448, whose code is even.
    x = [464.0, np.nextafter(np.float32(464), np.float32(INF)), 479.0, 1e38, INF, -500.0, -INF]
    nan = [NAN] * 7
    check(x, "e4m3", "nearest_even", [448, *nan[1:]])
    check(x, "e4m3", "nearest_away", nan)
    check(x, "e4m3", "toward_zero", [448, 448, 448, 448, NAN, -448, NAN])
    check(x, "e4m3", "toward_positive", [NAN, NAN, NAN, NAN, NAN, -448, NAN])
    check(x, "e4m3", "to_odd", [448, 448, 448, 448, NAN, -448, NAN])
    for rounding in MODES:
        check(x, "e4m3", rounding, [448, 448, 448, 448, 448, -448, -448], saturate=True)
    # A whole binade above the largest fp16, and one whose biased exponent is all ones.
    check([65519.0, 65520.0, 131072.0], "fp16", "nearest_even", [65504, INF, INF])
    check([65520.0, -65520.0], "fp16", "toward_negative", [65504, -INF])
    check([6.9, 7.1, 1e9, INF], "e2m1", "nearest_even", [6, 6, 6, 6])


def test_4_the_subnormal_boundary_and_the_carry():
    # fp16: 2^-25 (1 + 2^-23) goes up; the largest subnormal and half a step carry into the smallest normal.
    x = [2.0**-25, 2.0**-25 * (1 + 2.0**-23), 1.5 * 2.0**-24, 2.0**-14 - 2.0**-25, 2.0**-14 - 2.0**-24]
    check(x, "fp16", "nearest_even", [0, 2.0**-24, 2.0**-23, 2.0**-14, 2.0**-14 - 2.0**-24])
    check([2.0**-14 * 0.75, 2.0**-15, 2.0**-15 * 1.01], "e5m10_nosub", "nearest_even", [2.0**-14, 0, 2.0**-14])


def test_5_float64_is_rounded_once():
    # By way of float32 the first would be the tie 1 + 2^-8 and go down to 1.
    check([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-50], "bf16", "nearest_even", [1 + 2.0**-7, 1], dtype=np.float64)
    check([1 + 2.0**-11 + 2.0**-50, 2.0**-1074], "fp16", "nearest_even", [1 + 2.0**-10, 0], dtype=np.float64)
    check([2.0**-1074, -(2.0**-1074)], "fp16", "toward_positive", [2.0**-24, -0.0], dtype=np.float64)


def test_6_negative_ties_and_directed_negatives():
    x = [-2.5, -3.5, -2.25, 2.5]
    check(x, "e2m1", "nearest_even", [-2, -4, -2, 2])
    check(x, "e2m1", "nearest_away", [-3, -4, -2, 3])
    check(x, "e2m1", "nearest_zero", [-2, -3, -2, 2])
    check(x, "e2m1", "nearest_odd", [-3, -3, -2, 3])
    check(x, "e2m1", "toward_negative", [-3, -4, -3, 2])
    check(x, "e2m1", "toward_positive", [-2, -3, -2, 3])


def test_7_signed_zero():
    check([0.0, -0.0, -1e-9], "e4m3", "nearest_even", [0.0, -0.0, -0.0])
    check([-1e-9, 1e-9], "e4m3", "toward_positive", [-0.0, 2.0**-9])
    for fmt in ("e4m3fnuz", "binary8p3se", "int8", "ternary"):
        check([0.0, -0.0, -1e-9], fmt, "nearest_even", [0.0, 0.0, 0.0])


def test_8_to_odd():
    check([1.0, 1.25, 1.1, 1.2, 1.3], "e3m2", "to_odd", [1.0, 1.25, 1.25, 1.25, 1.25])
    check([1e9, -1e9, INF], "fp16", "to_odd", [65504, -65504, INF])
    # To odd with two bits more and then to nearest is to nearest at once.
    x = np.random.default_rng(0).normal(size=9999).astype(np.float32)
    x = np.concatenate([x, np.arange(4096, dtype=np.float32) / 1024])
    twice = qjax.chop(qjax.chop(jnp.asarray(x), qjax.Float(8, 5), "to_odd"), qjax.Float(8, 3))
    assert np.array_equal(bits(twice), bits(qjax.chop(jnp.asarray(x), qjax.Float(8, 3))))


def test_9_one_bit_and_unsigned_formats():
    low = 2.0**-127
    check(
        [low, 1.25 * low, 1.5 * low, 1.75 * low, 0.0, 1e-45], "e8m0", "nearest_even", [low, low, low, 2 * low, low, low]
    )
    # A tie goes to the even code: 126 for 0.5, 128 for 2.
    check([0.75, 1.5, 3.0, -1.0, INF, 2.0**127 * 1.75], "e8m0", "nearest_even", [0.5, 2, 2, NAN, NAN, NAN])
    check([-1.0, INF, 0.0], "e8m0", "nearest_even", [low, 2.0**127, low], saturate=True)
    check([-0.0, -1e-9, -1.0, 61440.0, 63488.0], "ue5m3", "nearest_even", [0, 0, NAN, 61440, INF])
    check([-1.0, 1e9], "ue5m3", "nearest_even", [0, 61440], saturate=True)


def test_10_stochastic_by_enumeration():
    draws = jnp.arange(256, dtype=jnp.uint8)
    for fmt, x, high, ups in (
        ("e2m1", 2.25, 3.0, 64),
        ("e4m3", 2.0**-9 * 3 / 16, 2.0**-9, 48),
        ("e5m2", 57344.0 + 1024.0, INF, 32),
        ("bf16", 2.0**-133 / 4, 2.0**-133, 64),
        ("e4m3", 2.0**-30, 2.0**-9, 0),
    ):
        y = qjax.chop(jnp.full(256, x, jnp.float32), fmt, "stochastic", random_bits=draws)
        assert int((np.asarray(y) == high).sum()) == ups
    y = qjax.chop(jnp.full(256, 1.5, jnp.float32), "e2m1", "stochastic", random_bits=draws)
    assert (np.asarray(y) == 1.5).all()


def test_11_keys():
    x = jnp.full((4, 64), 0.3, jnp.float32)
    with pytest.raises(ValueError, match="needs key"):
        jax.jit(lambda x: qjax.chop(x, "e2m1", "stochastic"))(x)
    rows = jax.vmap(lambda row, key: qjax.chop(row, "e2m1", "stochastic", key=key))(x, jax.random.split(KEY, 4))
    assert len({row.tobytes() for row in np.asarray(rows)}) == 4


def test_12_nan_where_the_format_has_none():
    for fmt, expected in (
        ("e2m1", 6),
        ("e3m2", 28),
        ("int8", 0),
        ("q8.8", 0),
        ("nf4", 1),
        ("ternary", 1),
        ("posit8", NAN),
    ):
        check([NAN], fmt, "nearest_even", [expected])
    # A NaN with a low payload is one, not an infinity.
    low = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    assert bits(qjax.chop(jnp.asarray(low), "fp16")).tolist() == [0x7FC00000] * 2


def test_13_block_scales():
    row = np.zeros((1, 40), np.float32)
    assert not np.asarray(qjax.chop(jnp.asarray(row), "mxfp4")).any()
    top = np.full((1, 40), np.finfo(np.float32).max, np.float32)
    assert np.array_equal(qjax.chop(jnp.asarray(top), "mxfp4"), np.full((1, 40), 6 * 2.0**125, np.float32))
    small = np.arange(40, dtype=np.float32)[None] * np.float32(2.0**-149)
    assert np.array_equal(bits(qjax.chop(jnp.asarray(small), "mxfp8_e4m3")), bits(np.zeros((1, 40), np.float32)))
    # Row 1 ends in a partial block of 8; row 2 starts one of its own.
    two = np.concatenate([np.full((1, 40), 1.0), np.full((1, 40), 100.0)]).astype(np.float32)
    assert np.array_equal(qjax.chop(jnp.asarray(two), "mxfp4"), [[1.0] * 40, [96.0] * 40])
    assert qjax.encode(jnp.asarray(two), "mxfp4", axis=0).scales[0].shape == (1, 40)
    for special in (NAN, INF):
        two[0, 35] = special
        y = np.asarray(qjax.chop(jnp.asarray(two), "mxfp4"))
        assert np.isnan(y[0, 32:]).all() and not np.isnan(y[0, :32]).any() and not np.isnan(y[1]).any()


def test_14_the_format_that_contains_the_carrier():
    x = np.array([2.0**-149, -0.0, 1 + 2.0**-23, np.finfo(np.float32).max, INF], np.float32)
    for rounding in MODES:
        check(x, qjax.Float(8, 23), rounding, x.astype(np.float64))
        check([2.0**-1074, 1 + 2.0**-52], qjax.Float(11, 52), rounding, [2.0**-1074, 1 + 2.0**-52], dtype=np.float64)


def test_15_an_operation_in_the_carrier_is_rounded_once():
    """With 24 >= 2 p + 2 bits the float32 sum, product or quotient of p-bit numbers rounds as the exact one."""
    values = np.unique(np.abs(qjax.format("e4m3").values()))
    values = values[values > 0]
    a, b = (v.ravel() for v in np.meshgrid(values, values))
    for operation in (np.add, np.subtract, np.multiply, np.divide):
        once = operation(a, b)  # float64: 53 bits, exact, or with the same answer
        through = operation(a.astype(np.float32), b.astype(np.float32))
        fmt = qjax.Float(8, 10)
        with jax.enable_x64(True):
            direct = np.asarray(qjax.chop(jnp.asarray(once), fmt)).astype(np.float32)
        assert np.array_equal(bits(qjax.chop(jnp.asarray(through), fmt)), bits(direct))
