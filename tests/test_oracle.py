"""The oracle itself, against implementations that others wrote."""

import gfloat
import gmpy2
import numpy as np
import oracle
import pytest
from gfloat import formats
from tables import critical, every, finfo

import qjax
from qjax import Rounding as R

F32, F64 = finfo("float32"), finfo("float64")


def equal(ours: np.ndarray, theirs) -> bool:
    """Returns whether float64 numbers are the same, signs of zeros included."""
    theirs = np.asarray(theirs, np.float64)
    return np.array_equal(ours, theirs, equal_nan=True) and np.array_equal(
        np.signbit(ours) & ~np.isnan(ours), np.signbit(theirs) & ~np.isnan(theirs)
    )


def some(fmt: qjax.Float, dtype: str, number: int) -> np.ndarray:
    """Returns numbers of a dtype: the critical ones of a format, and patterns at random."""
    rng, x = np.random.default_rng(0), critical(fmt, dtype)
    raw = rng.integers(0, 2 ** (8 * x.itemsize), number, f"u{x.itemsize}").view(dtype)
    return np.concatenate([rng.permutation(x)[:number], raw, [0.0, -0.0, np.inf, -np.inf, np.nan]])


@pytest.mark.parametrize("rounding", oracle.DETERMINISTIC, ids=lambda r: r.value)
@pytest.mark.parametrize(
    "name", ["e4m3", "e5m2", "e2m1", "e8m0", "dlfloat16", "binary8p3se", "ue5m3", "e5m10_nosub", "tf32", "e8m3b135"]
)
def test_tables_and_rationals_agree(name, rounding):
    fmt = qjax.format(name)
    for dtype in ("float32", "float64"):
        x = some(fmt, dtype, 300)
        ours = oracle.round_float(x, fmt, rounding, finfo(dtype), exact=True)
        assert equal(ours, oracle.round_float(x, fmt, rounding, finfo(dtype)))


MPFR = {
    R.NEAREST_EVEN: gmpy2.RoundToNearest,
    R.TOWARD_ZERO: gmpy2.RoundToZero,
    R.TOWARD_POSITIVE: gmpy2.RoundUp,
    R.TOWARD_NEGATIVE: gmpy2.RoundDown,
}


@pytest.mark.parametrize("rounding", MPFR, ids=lambda r: r.value)
@pytest.mark.parametrize("name", ["fp16", "bf16", "e5m2", "tf32", "fp32", "e3m4", "e8m3b120", "e9m2"])
def test_mpfr(name, rounding):
    fmt = qjax.format(name)
    # MPFR has 0.1... where IEEE has 1...: its exponents are one more.
    emin, emax = 1 - fmt.bias - fmt.mantissa_bits + 1, 2**fmt.exponent_bits - 2 - fmt.bias + 1
    settings = {"precision": fmt.mantissa_bits + 1, "emin": emin, "emax": emax, "round": MPFR[rounding]}
    x = some(fmt, "float64", 1000)
    with gmpy2.context(gmpy2.ieee(64), subnormalize=True, **settings):
        theirs = [float(gmpy2.mpfr(float(v))) for v in x]
    assert equal(oracle.round_float(x, fmt, rounding, F64, exact=True), theirs)


@pytest.mark.parametrize(
    "name", [n for n in qjax.format_names() if "float" in n and qjax.format(n).bits <= 16 and n != "dlfloat16"]
)
def test_ml_dtypes_from_float32(name):
    """It differs where it is wrong: NaN in FP4 and FP6 is -0; E8M0 errs below 1.5 2^-127, and sends all ties up.

    With one bit of precision all significands are odd, so "even" is that of the code, as in P3109 and gfloat.
    """
    fmt = qjax.format(name)
    x = np.concatenate([every("float32"), critical(fmt, "float32")])
    if fmt.specials == "finite":
        x = x[np.isfinite(x)]
    if not fmt.has_zero:
        x = x[~(np.abs(x) < np.float32(1.5 * 2.0**-127)) & (np.abs(np.frexp(x)[0]) != 0.75)]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        theirs = x.astype(fmt.dtype).astype(np.float64)
    assert equal(oracle.round_float(x, fmt, R.NEAREST_EVEN, F32), theirs)


def test_numpy_from_float64():
    for name, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        x = some(qjax.format(name), "float64", 5000)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            theirs = x.astype(dtype).astype(np.float64)
        assert equal(oracle.round_float(x, qjax.format(name), R.NEAREST_EVEN, F64, exact=True), theirs)


GFLOAT_FORMATS = {
    "e4m3": formats.format_info_ocp_e4m3,
    "e5m2": formats.format_info_ocp_e5m2,
    "e2m3": formats.format_info_ocp_e2m3,
    "e3m2": formats.format_info_ocp_e3m2,
    "e2m1": formats.format_info_ocp_e2m1,
    "e8m0": formats.format_info_ocp_e8m0,
    "fp16": formats.format_info_binary16,
    "bf16": formats.format_info_bfloat16,
    **{f"binary8p{p}se": formats.format_info_p3109(8, p) for p in range(1, 8)},
    "binary6p3se": formats.format_info_p3109(6, 3),
}
GFLOAT_MODES = {
    R.NEAREST_EVEN: gfloat.RoundMode.TiesToEven,
    R.NEAREST_AWAY: gfloat.RoundMode.TiesToAway,
    R.TOWARD_ZERO: gfloat.RoundMode.TowardZero,
    R.TOWARD_POSITIVE: gfloat.RoundMode.TowardPositive,
    R.TOWARD_NEGATIVE: gfloat.RoundMode.TowardNegative,
    R.STOCHASTIC: gfloat.RoundMode.StochasticFastest,
    R.STOCHASTIC_B: gfloat.RoundMode.StochasticFast,
    R.STOCHASTIC_C: gfloat.RoundMode.Stochastic,
}


@pytest.mark.parametrize("rounding", GFLOAT_MODES, ids=lambda r: r.value)
@pytest.mark.parametrize("name", GFLOAT_FORMATS)
def test_gfloat(name, rounding):
    """It has no answer for NaN and infinity where the format has none, nor for what E8M0 has no number for."""
    fmt, info, draws = qjax.format(name), GFLOAT_FORMATS[name], 3
    x = some(fmt, "float32", 500)
    if fmt.specials == "finite":
        x = x[np.isfinite(x)]
    if not fmt.has_zero:
        x = x[x >= fmt.min]
    draw = np.random.default_rng(1).integers(0, 2**draws, x.shape)
    for saturate in (True, False) if fmt.specials != "finite" else (True,):
        theirs = [
            gfloat.round_float(info, float(v), GFLOAT_MODES[rounding], saturate, int(r), draws)
            for v, r in zip(x, draw, strict=True)
        ]
        ours = oracle.round_float(x, fmt, rounding, F32, saturate=saturate, draw=draw, bits=draws)
        assert equal(ours, theirs)
