"""Statistics of a tensor in a format: equal to NumPy in float64, on what is hard on them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import stats
from qjax.stats import _measure
from qjax.stats._stats import COUNTS, PER_OCTAVE

RNG = np.random.default_rng(0)
SHAPE = (8, 64)  # one for most, so that each format compiles once
NORMAL = RNG.normal(size=SHAPE).astype(np.float32)
FAR = np.arange(512).reshape(SHAPE) == 77
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -3e38, 1e-45, 448.0, 464.0, 464.00003, 5.0, -129.0, 0.1, 1e-8, 7e4]
BINADES = np.ldexp(RNG.uniform(1, 2, 512), np.arange(512) % 277 - 149).astype(np.float32)
ARRAYS = {
    "normal": NORMAL,
    "zeros": np.where(FAR, np.float32(-0.0), np.zeros(SHAPE, np.float32)),
    "outlier": np.where(FAR, np.float32(1e4), np.zeros(SHAPE, np.float32)),
    "outlier in noise": np.where(FAR, np.float32(-3e4), NORMAL),
    "subnormals": (RNG.integers(-(2**23), 2**23, SHAPE).astype(np.float64) * 2.0**-149).astype(np.float32),
    "all binades": BINADES.reshape(SHAPE),
    "special": np.array(SPECIAL * 32, np.float32).reshape(SHAPE),
    "largest": np.full(SHAPE, np.finfo(np.float32).max),
    "only NaN": np.full(SHAPE, np.nan, np.float32),
}
SHAPES = {
    "empty": np.zeros((0, 32), np.float32),
    "scalar": np.float32(0.3),
    "long": RNG.normal(size=10_003).astype(np.float32) * np.float32(1e-20),
}
FORMATS = [
    "e4m3", "e5m2", "bf16", "fp16", "fp32", "e8m0", "ue5m3", "int8", "q1.15", qjax.Fixed(8, overflow="wrap"), "nf4",
    "posit8", "mxfp4", "mxint8", "nvfp4", "e4m3_tensor", "int8_channel", "uint4_g32",
]  # fmt: skip


def carrier(x):
    return (52, 1023, np.float64) if x.dtype == np.float64 else (23, 127, np.float32)


def ends(x, fmt, q):
    """Returns where a value is the end of a range that x lies beyond, by more than half the last spacing."""
    if x.size == 0:
        return np.zeros(x.shape, bool)
    if not isinstance(fmt, qjax.Scaled):
        low = fmt.min if isinstance(fmt, qjax.Fixed | qjax.Codebook) or fmt.signed else 0.0
        if isinstance(fmt, qjax.Fixed):
            steps = fmt.eps, fmt.eps
        elif isinstance(fmt, qjax.Codebook):
            steps = fmt.table[-1] - fmt.table[-2], fmt.table[1] - fmt.table[0]
        else:
            steps = (math.ldexp(1.0, fmt.emax - fmt.mantissa_bits),) * 2
        beyond = (x > fmt.max + steps[0] / 2) | ((x < low - steps[1] / 2) if low < 0 else False)
        wraps = isinstance(fmt, qjax.Fixed) and fmt.overflow == "wrap"
        return beyond & np.isfinite(q) & np.full(x.shape, not wraps)
    # Of block formats: the codes of the ends, and what the scales make of the last spacing.
    stored = qjax.encode(jnp.asarray(x, jnp.float32), fmt)
    element, scale = stored.element, np.ones(x.shape)
    for s, level in zip(stored.scales, (fmt, fmt.element), strict=False):
        blocks = qjax._blocks.blocks_of(level, x.shape, -1)
        scale = scale * np.asarray(blocks.spread(qjax.decode(s)), np.float64)
    codes = np.asarray(stored.unpacked()).astype(np.int64)
    if isinstance(element, qjax.Fixed):
        integers = codes - 2**element.bits * (codes >= 2 ** (element.bits - 1)) if element.signed else codes
        at, step = (integers == element.max_integer) | (integers == element.min_integer), element.eps
    else:
        at = (codes & (2 ** (element.bits - 1) - 1)) == element.max_code
        step = math.ldexp(1.0, element.emax - element.mantissa_bits)
    with np.errstate(invalid="ignore"):
        return at & (q != 0) & (np.abs(x) > np.abs(q)) & (np.abs(q - x) > step * scale / 2) & np.isfinite(q)


@np.errstate(all="ignore")
def reference(x32, fmt, q32):
    """Returns the statistics of x and its rounding in float64."""
    mantissa, bias, _ = carrier(x32)
    x, q = np.asarray(x32, np.float64), np.asarray(q32, np.float64)
    finite = np.isfinite(x)
    counts = {
        "size": x.size,
        "zeros": np.sum(x == 0),
        "nans": np.sum(np.isnan(x)),
        "infinities": np.sum(np.isinf(x)),
        "underflows": np.sum(finite & (x != 0) & (q == 0)),
        "saturations": np.sum(ends(x, fmt, q)),
        "to_nan": np.sum(~np.isnan(x) & np.isnan(q)),
        "to_infinity": np.sum(finite & np.isinf(q)),
    }
    some = np.abs(x[finite & (x != 0)])
    fraction, exponent = np.frexp(some)
    lowest = 1 - bias - mantissa
    bins = PER_OCTAVE * (exponent - 1 - lowest) + np.floor((2 * fraction - 1) * PER_OCTAVE).astype(int)
    magnitudes = np.bincount(bins, minlength=PER_OCTAVE * (bias + 1 - lowest))
    kept = np.where(np.isfinite(q), q, 0.0)
    relative = (np.abs(kept - x) / np.abs(x))[finite & (x != 0)]
    sums = [np.sum((v[finite]) ** p) for v, p in ((x, 2), (x, 4), (kept - x, 2))]
    return counts, magnitudes, relative, sums


def error_bins(relative, mantissa):
    """Returns the bins of relative errors."""
    fraction, exponent = np.frexp(relative)
    place = PER_OCTAVE * (exponent - 1 + mantissa + 2) + np.floor((2 * fraction - 1) * PER_OCTAVE) + 1
    return np.where(relative == 0, 0, np.clip(place, 1, PER_OCTAVE * (mantissa + 9) + 1)).astype(int)


def check(x, fmt, **options):
    fmt = qjax.format(fmt)
    mantissa, _, dtype = carrier(x)
    measured = stats.measure(x, fmt, **options)
    q = qjax.chop(x, fmt, **options)
    counts, magnitudes, relative, (square, fourth, noise) = reference(x, fmt, np.asarray(q))
    assert {name: measured.count(name) for name in COUNTS} == counts
    assert np.array_equal(measured.magnitudes, magnitudes)
    # An error and its quotient are rounded once each: a number within two roundings of an edge may be in either bin.
    u = np.finfo(dtype).eps / 2
    found = np.cumsum(np.asarray(measured.errors))
    late, early = (
        np.cumsum(np.bincount(error_bins(relative * (1 + s * 3 * u), mantissa), minlength=len(found))) for s in (1, -1)
    )
    assert np.all((late <= found) & (found <= early)) and found[-1] == len(relative)
    # The bound that measure states; beyond float64's own range for the sums there is nothing to compare with.
    bound = (31 * (math.ceil(math.log(max(x.size, 2), 32)) + 1) + 3) * u
    sums = (measured.squares, 2, square), (measured.fourths, 4, fourth), (measured.noise, 2, noise)
    for slots, power, expected in sums:
        value, up = measured._sum(slots, power)
        if 1e-300 < expected < np.inf or expected == value == 0:
            assert abs(math.ldexp(value, up) - expected) <= bound * expected
    if 1e-300 < square < np.inf and noise > 1e-300:
        assert abs(measured.sqnr - 10 * math.log10(square / noise)) <= 2 * 10 / math.log(10) * 1.01 * bound
    return measured


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_statistics_are_numpy_s(fmt):
    for x in ARRAYS.values():
        check(x, fmt)


@pytest.mark.parametrize("fmt", ["e4m3", "fp16", "posit8"])
def test_statistics_of_saturation(fmt):
    for x in ARRAYS.values():
        check(x, fmt, saturate=True)


@pytest.mark.parametrize("name", SHAPES)
def test_statistics_of_any_shape(name):
    for fmt in ("e4m3", "mxfp4", "e4m3_tensor"):
        check(SHAPES[name], fmt)


@pytest.mark.parametrize("name", ["special", "all binades", "outlier in noise"])
@pytest.mark.parametrize("fmt", ["e4m3", "q1.15", "nf4", "mxfp4", "int8_g16"])
def test_pieces_and_what_is_left_are_the_whole(fmt, name, monkeypatch):
    monkeypatch.setattr(_measure, "PIECE", 128)
    x = np.resize(ARRAYS[name], (41, 32))  # ten pieces, and 32 elements
    assert _measure._divides(_measure.Mode(qjax.format(fmt), None, 1, False, None), x.shape)
    check(x, fmt)
    key = jax.random.key(1)
    pieces = stats.measure(x, fmt, "stochastic", key=key)
    whole = jax.jit(lambda x: stats.measure(x, fmt, "stochastic", key=key))(x)
    for field in ("counts", "magnitudes", "errors"):
        np.testing.assert_array_equal(getattr(pieces, field), getattr(whole, field))


def test_blocks_that_no_piece_holds_are_measured_whole():
    divides = lambda fmt, axis, *shape: _measure._divides(  # noqa: E731
        _measure.Mode(qjax.format(fmt), None, axis, False, None), shape
    )
    assert divides("mxfp4", -1, 3, 64) and divides("mxfp4", 1, 3, 64) and divides("e4m3", 0, 3, 5)
    for fmt, axis in (("mxfp4", 0), ("int8_tensor", -1), ("int8_channel", -1), ("e4m3_1x128", -1), ("int8_g48", -1)):
        assert not divides(fmt, axis, 96, 96)
    assert not divides("mxfp4", -1, 3, 65)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_arrays_are_measured_as_float32(dtype):
    x = jnp.asarray(ARRAYS["all binades"]).astype(dtype)
    wide = np.asarray(x).astype(np.float32)
    assert jax.tree.all(jax.tree.map(np.array_equal, stats.measure(x, "e4m3"), stats.measure(wide, "e4m3")))


def test_float64_is_measured_in_float64():
    with jax.enable_x64(True):
        x = np.ldexp(RNG.uniform(1, 1.5, 2098), np.arange(-1074, 1024))
        measured = check(x, "e5m10", saturate=True)
        assert measured.exponents[0][[0, -1]].tolist() == [-1074, 1023]
        check(RNG.normal(size=10_000), "fp32")


def test_statistics_made_of_the_sums():
    x = np.array([3.0] + [0.0] * 99 + [np.nan, np.inf], np.float32)
    measured = stats.measure(x, "fp32")
    assert (measured.kurtosis, measured.rms, measured.outliers()) == (100, 0.3, 1 / 102)
    assert (measured.sqnr, measured.error_quantile(0.99)) == (math.inf, 0.0)
    tiny = stats.measure(np.full(9, -(2.0**-140), np.float32), "fp32")
    assert (tiny.kurtosis, tiny.rms) == (1, 2.0**-140)
    # E8M0 has no zero: noise without signal.
    assert stats.measure(np.zeros(3, np.float32), "e8m0").sqnr == -math.inf
    empty = stats.measure(np.zeros(0, np.float32), "e4m3")
    assert all(map(math.isnan, (empty.kurtosis, empty.rms, empty.outliers(), empty.error_quantile(0.5))))
    assert math.isnan(empty.share("underflows")) and empty.sqnr == math.inf and len(empty.exponents[0]) == 0


def test_outliers_and_quantiles_are_those_of_a_sorted_array():
    x = RNG.standard_t(3, size=4096).astype(np.float32)
    measured = stats.measure(x, "e4m3")
    threshold = 6 * np.sqrt(np.mean(x.astype(np.float64) ** 2))
    assert np.mean(np.abs(x) >= threshold * 9 / 8) <= measured.outliers() <= np.mean(np.abs(x) >= threshold)
    relative = np.sort(np.abs(np.asarray(qjax.chop(x, "e4m3")).astype(np.float64) - x) / np.abs(x.astype(np.float64)))
    for q in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = relative[math.ceil(q * len(x)) - 1]
        assert exact * (1 - 2**-22) <= measured.error_quantile(q) <= exact * 9 / 8 * (1 + 2**-22)


def test_a_key_draws_what_chop_draws():
    key = jax.random.key(3)
    measured = stats.measure(NORMAL, "e2m1", "stochastic", key=key)
    q = np.asarray(qjax.chop(NORMAL, "e2m1", "stochastic", key=key), np.float64)
    assert measured.count("underflows") == np.sum(q == 0)


def test_parts_add_up():
    x = BINADES
    whole, parts = stats.measure(x, "bf16"), [stats.measure(part, "bf16") for part in (x[:300], x[300:301], x[301:])]
    together = stats.total(parts)
    assert together.counts.dtype == np.int64
    for field in ("counts", "magnitudes", "errors"):
        assert np.array_equal(getattr(together, field), getattr(whole, field))
    # Each sum is within the bound of measure, 65 roundings for 512 terms.
    assert abs(together.sqnr - whole.sqnr) < 4 * 10 / math.log(10) * 65 * 2**-24
    assert math.isclose(together.kurtosis, whole.kurtosis, rel_tol=6 * 65 * 2**-24)
    # As arrays too: in jit, and over a scan.
    _, rows = jax.lax.scan(lambda carry, row: (carry, stats.measure(row, "e4m3")), 0, jnp.asarray(NORMAL))
    assert np.array_equal(jnp.sum(rows.errors, 0), stats.measure(NORMAL, "e4m3").errors)


def test_equal_calls_compile_once():
    from qjax.stats import _measure

    stats.measure(NORMAL, "e4m3")
    before = _measure._measure._cache_size()
    stats.measure(NORMAL + 1, qjax.format("e4m3"))
    assert _measure._measure._cache_size() == before


@pytest.mark.parametrize(
    "text, call",
    [
        ("measure: x is complex; measure x.real and x.imag", lambda: stats.measure(np.complex64(1j), "e4m3")),
        ("measure: x is a float64 NumPy array", lambda: stats.measure(np.ones(3), "e4m3")),
        (
            r"measure: x has 2147483648 elements, .* fewer than 2\^31",
            lambda: jax.eval_shape(lambda x: stats.measure(x, "e4m3"), jax.ShapeDtypeStruct((2**31,), "float32")),
        ),
        ("total: expected statistics of one format and carrier, got none", lambda: stats.total([])),
        (
            "total: expected statistics of one format and carrier, got Float",
            lambda: stats.total([stats.measure(NORMAL, "e4m3"), stats.measure(NORMAL, "e5m2")]),
        ),
    ],
)
def test_refusals(text, call):
    with pytest.raises((TypeError, ValueError), match=text):
        call()
