"""The formats, roundings, carriers and inputs that the tests share."""

import functools

import ml_dtypes
import numpy as np
from oracle import count, magnitude

import qjax

# Every kind of special codes, bias, subnormals, sign and width, one a line where they are one family.
FLOATS = [
    "e4m3", "e5m2", "e3m4", "e2m3", "e3m2", "e2m1", "e8m0", "ue5m3", "ue5m3fn",
    "float8_e4m3", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "e4m3finite",
    "fp16", "bf16", "tf32", "dlfloat16", "fp32", "fp64",
    "e1m3", "e1m2finite", "e1m1fn", "e3m0", "ue4m0finite", "e8m1fn",
    "e5m10_nosub", "e4m3fn_nosub", "e8m7_nosub", "e3m0_nosub",
    "e2m9b-5", "e8m3b135", "e8m3b120", "e8m7b120", "e8m3b128", "e9m2", "e11m3", "e7m6fnuz",
    "binary8p1ue", "binary8p1se", "binary8p3se", "binary8p3sf", "binary8p4uf", "binary8p7sf", "binary6p3ue",
    "binary16p11se",
]  # fmt: skip
FIXED = ["int2", "int3", "int4", "int8", "uint8", "q8.8", "uq4.4", "q1.15", "int16", "uint16", "int32"]
FIXED += [qjax.Fixed(8, symmetric=True), qjax.Fixed(4, -3), qjax.Fixed(1), qjax.Fixed(24, 10)]
FIXED += [qjax.Fixed(8, overflow="wrap"), qjax.Fixed(6, 3, signed=False, overflow="wrap")]
CODEBOOKS = ["nf4", "ternary", "binary", "pow2_4", "posit8", "posit6es0", "takum7", "dynamic4", "udynamic8"]
SCALED = [
    "mxfp4",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "mxint8",
    "nvfp4",
    "dfp8",
    "dfp16",
    "int8_channel",
    "uint4_g32",
    "e4m3_2x16",
]
CARRIERS = ("float32", "float64", "bfloat16", "float16")


def bits(x) -> np.ndarray:
    """Returns the bit patterns of an array."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def finfo(dtype: str):
    return ml_dtypes.finfo(np.dtype(dtype))


def with_neighbours(x: np.ndarray) -> np.ndarray:
    """Returns numbers with the next one up and down in their dtype, of either sign."""
    pattern = np.abs(x).view(f"u{x.dtype.itemsize}")
    near = np.concatenate([pattern, pattern + 1, pattern - (pattern > 0)]).view(x.dtype)
    near = near[np.isfinite(near.astype(np.float64))]
    return np.concatenate([near, -near])


@functools.cache
def every(dtype: str) -> np.ndarray:
    """Returns all 2^16 patterns of the upper 16 bits, NaN and infinities included, and their neighbours."""
    width = np.dtype(dtype).itemsize * 8
    uint = np.dtype(f"u{width // 8}")
    upper = np.arange(2**16, dtype=uint) << (width - 16)
    return np.concatenate([upper, upper + 1, upper - 1] if width > 16 else [upper]).view(dtype)


@functools.lru_cache(maxsize=2)
def _points(fmt: qjax.Float) -> np.ndarray:
    """Returns as float64 values of a format, the points halfway between them, and the first too large, all or some."""
    total = count(fmt)
    places = (
        range(total + 1) if total <= 2**16 else {*np.linspace(0, total, 3000).astype(int).tolist(), 0, 1, 2, total - 1}
    )
    pairs = [(magnitude(fmt, i), magnitude(fmt, i + 1)) for i in places]
    sizes = [low for low, _ in pairs] + [(low + high) / 2 for low, high in pairs]
    return np.array([float(s) for s in sizes if s < 2**1024 - 2**970])


@functools.lru_cache(maxsize=4)
@np.errstate(over="ignore", invalid="ignore")
def critical(fmt: qjax.Float, dtype: str) -> np.ndarray:
    """Returns the values of a format, the points halfway between them, the first too large, and their neighbours.

    All of them up to 16 bits, some of each binade beyond.
    """
    rounded = _points(fmt).astype(np.dtype(dtype))
    return with_neighbours(rounded[rounded < np.inf])


def same_bits(ours, theirs: np.ndarray, x: np.ndarray) -> None:
    """Asserts that an array has the bits of the float64 numbers that the oracle expects for x."""
    ours = np.asarray(ours)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.where(np.isnan(theirs), np.nan, theirs).astype(ours.dtype)
    quiet = np.array(np.nan, ours.dtype)
    expected = np.where(np.isnan(theirs), np.abs(quiet), expected)
    assert np.array_equal(expected.astype(np.float64), theirs, equal_nan=True), (
        "the dtype does not hold the expectation"
    )
    wrong = np.flatnonzero(bits(ours) != bits(expected))
    if len(wrong):
        first = wrong[:5]
        raise AssertionError(
            f"{len(wrong)} of {len(x)} differ: x {x[first].tolist()} gave {ours[first].tolist()}, "
            f"expected {expected[first].tolist()}"
        )
