"""Formats: their facts, names, representation and refusals."""

import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import Codebook, Fixed, Float, Scaled

ML_FLOATS = [
    "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "bfloat16", "float16",
    "float32", "float64",
]  # fmt: skip


@pytest.mark.parametrize("name", ML_FLOATS)
def test_the_facts_are_those_of_ml_dtypes(name):
    fmt = qjax.format(name)
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    info = ml_dtypes.finfo(dtype)
    assert fmt.dtype == dtype
    assert (fmt.bits, fmt.mantissa_bits) == (info.bits, info.nmant)
    assert (fmt.max, fmt.min_normal, fmt.eps) == (float(info.max), float(info.tiny), float(info.eps))
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.tiny == fmt.min_normal


@pytest.mark.parametrize("name", [n for n in ML_FLOATS if qjax.format(n).bits <= 16])
def test_the_values_are_those_of_ml_dtypes(name):
    fmt = qjax.format(name)
    store = np.uint8 if fmt.bits <= 8 else np.uint16
    with np.errstate(invalid="ignore"):
        every = np.arange(2**fmt.bits, dtype=store).view(fmt.dtype).astype(np.float64)
    assert np.array_equal(np.unique(every[np.isfinite(every)]), fmt.values())


# Each row: a name and some of its facts, from the source that the formats page names.
FACTS = {
    "e4m3": {"max": 448, "min_normal": 2.0**-6, "smallest_subnormal": 2.0**-9, "has_inf": False},
    "e5m2": {"max": 57344, "min_normal": 2.0**-14, "smallest_subnormal": 2.0**-16, "has_inf": True},
    "e2m1": {"max": 6, "smallest_subnormal": 0.5, "has_nan": False},
    "e2m3": {"max": 7.5, "smallest_subnormal": 0.125},
    "e3m2": {"max": 28, "min_normal": 0.25, "smallest_subnormal": 0.0625},
    "e8m0": {"max": 2.0**127, "min": 2.0**-127, "has_zero": False},
    "ue5m3": {"max": 1.875 * 2**15, "min": 0, "smallest_subnormal": 2.0**-17},
    "ue5m3fn": {"max": 1.75 * 2**16},
    "tf32": {"bits": 19, "eps": 2.0**-10, "emin": -126},
    "dlfloat16": {"bits": 16, "max": 2.0**33 - 2**24, "min_normal": 2.0**-31 + 2.0**-40},
    "binary8p3se": {"max": 1.5 * 2**15, "has_inf": True, "has_negative_zero": False, "bias": 16},
    "binary8p3sf": {"max": 1.75 * 2**15, "has_inf": False},
    "binary8p4se": {"max": 224}, "binary8p4sf": {"max": 240},
    "binary8p1ue": {"max": 2.0**125, "smallest_subnormal": 2.0**-127},
    "binary8p3uf": {"max": 1.5 * 2.0**31},
    "e4m3b11": {"bias": 11, "max": 15},
    "e5m10_nosub": {"smallest_subnormal": 2.0**-14},
    "q8.8": {"bits": 16, "max": 127 + 255 / 256, "min": -128},
    "uq4.4": {"bits": 8, "max": 15.9375, "min": 0},
    "int4": {"max": 7, "min": -8}, "uint4": {"max": 15, "min": 0},
    "mxfp4": {"bits": 4.25}, "nvfp4": {"bits": 4.5, "max": 6.0 * 448 * 3.4028234663852886e38}, "mxint8": {"bits": 8.25},
    "e4m3_128x128": {"bits": 8 + 32 / 128**2}, "uint4_g32": {"bits": 4 + 36 / 32},
    "nf4": {"bits": 4, "max": 1}, "ternary": {"bits": 2}, "binary": {"bits": 1},
    "pow2_4": {"bits": 4, "smallest_subnormal": 2.0**-6},
    "dynamic8": {"bits": 8, "max": 1.0},
    "posit8": {"bits": 8, "max": 2.0**24}, "posit16es1": {"max": 2.0**28}, "takum8": {"max": 2.0**239},
}  # fmt: skip


@pytest.mark.parametrize(("name", "facts"), FACTS.items())
def test_the_facts_of_named_formats(name, facts):
    fmt = qjax.format(name)
    assert {k: getattr(fmt, k) for k in facts} == facts


@pytest.mark.parametrize("name", [*qjax.format_names(), *FACTS])
def test_a_format_prints_as_something_to_paste_back(name):
    fmt = qjax.format(name)
    again = eval(repr(fmt), dict(vars(qjax)))
    assert again == fmt and hash(again) == hash(fmt)


def test_every_float_of_the_grammar_has_consistent_facts():
    for exponent_bits in range(1, 12):
        for mantissa_bits in (0, 1, 2, 5, 23, 52):
            for suffix in ("", "fn", "fnuz", "finite", "extended", "_nosub"):
                for unsigned in ("", "u"):
                    name = f"{unsigned}e{exponent_bits}m{mantissa_bits}{suffix}"
                    if name in qjax.format_names():
                        continue
                    try:
                        fmt = qjax.format(name)
                    except ValueError:
                        continue
                    assert isinstance(fmt, Float)
                    assert fmt.bits == (not unsigned) + exponent_bits + mantissa_bits
                    assert 0 < fmt.smallest_subnormal <= fmt.max < float("inf")
                    if fmt.bits <= 12:
                        values = fmt.values()
                        assert values[-1] == fmt.max and values[0] == fmt.min
                        assert values[values > 0][0] == min(fmt.smallest_subnormal, fmt.max)


def test_the_finite_values_number_as_many_as_the_codes_allow():
    assert len(qjax.E4M3.values()) == 256 - 2 - 1
    assert len(qjax.E5M2.values()) == 256 - 8 - 1
    assert len(qjax.format("e4m3fnuz").values()) == 255
    assert len(qjax.E8M0.values()) == 255
    assert len(qjax.E2M1.values()) == 15
    assert len(qjax.format("binary8p3ue").values()) == 254
    assert len(qjax.DLFLOAT16.values()) == 2**16 - 3


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32, 64])
def test_integers_have_their_dtype(bits):
    for prefix in ("", "u"):
        fmt = qjax.format(f"{prefix}int{bits}")
        info = ml_dtypes.iinfo(fmt.dtype)
        assert (fmt.min_integer, fmt.max_integer) == (info.min, info.max)
    assert Fixed(bits, 1).dtype is None


def test_formats_are_static_pytrees():
    import jax

    for fmt in (qjax.E4M3, Fixed(8), qjax.NF4, qjax.MXFP4, qjax.Rounding.TO_ODD):
        leaves, treedef = jax.tree.flatten(fmt)
        assert leaves == [] and jax.tree.unflatten(treedef, leaves) == fmt


REFUSALS = {
    "expected 1 to 11 exponent bits and 0 to 52 mantissa bits, got 12 and 3": lambda: Float(12, 3),
    "specials must be 'ieee'": lambda: Float(4, 3, specials="none"),
    "subnormals must be True, False or 'normal', got 'no'": lambda: Float(4, 3, subnormals="no"),
    "'fnuz' needs a sign bit": lambda: Float(4, 3, specials="fnuz", signed=False),
    "'ieee' has one special code, for infinity, and none for NaN": lambda: Float(4, 0),
    "'fnuz' has NaN in the place of negative zero": lambda: Float(3, 0, specials="fnuz", subnormals="normal"),
    "has no code left for a number": lambda: Float(1, 0, specials="extended", signed=False),
    "has values that no float64 holds": lambda: Float(11, 52, bias=0),
    "Float.values: .* only formats up to 16 bits": qjax.FP32.values,
    "expected 1 to 64 bits": lambda: Fixed(65),
    "overflow must be 'saturate' or 'wrap', got 'clip'": lambda: Fixed(8, overflow="clip"),
    "a symmetric range needs a sign": lambda: Fixed(8, signed=False, symmetric=True),
    "Fixed.values: .* only formats up to 16 bits": lambda: Fixed(32).values(),
    "expected 2 to 2\\^16 finite values, got 1": lambda: Codebook((1.0,)),
    "must ascend strictly": lambda: Codebook((1.0, 1.0)),
    "expected 1 boundaries, each between its two values": lambda: Codebook((0.0, 1.0), boundaries=(2.0,)),
    "posit: expected 2 to 16 bits and es from 0 to 3, got 17 and 2": lambda: qjax.posit(17),
    "takum: expected 2 to 16 bits, got 32": lambda: qjax.takum(32),
    "powers_of_two: expected 2 to 9 bits, got 1": lambda: qjax.powers_of_two(1),
    "dynamic: expected 3 to 8 bits, got 2": lambda: qjax.dynamic(2),
    "element must be a format, got 'e2m1'": lambda: Scaled("e2m1", qjax.E8M0, 32),
    "scale must be a Float, got Fixed": lambda: Scaled(qjax.E2M1, Fixed(8), 32),
    "block must be a positive int, a tuple of them, 'axis' or None, got 0": lambda: Scaled(qjax.E2M1, qjax.E8M0, 0),
    "rule must be 'floor'": lambda: Scaled(qjax.E2M1, qjax.E8M0, 32, rule="max"),
    r"Fixed\(1\) has no number above 0": lambda: Scaled(Fixed(1), qjax.FP32, 32),
    "elements saturate": lambda: Scaled(Fixed(8, overflow="wrap"), qjax.E8M0, 32),
    "a zero point needs an unsigned Fixed element": lambda: Scaled(Fixed(8), qjax.FP32, 32, zero_point=Fixed(8)),
    "around a Scaled element the scale needs a mantissa": lambda: Scaled(qjax.MXFP4, qjax.E8M0, None),
    r"the largest element, 2.034e\+39, is beyond float32, .*; use an element with fewer exponents": lambda: Scaled(
        Scaled(qjax.E2M1, qjax.BF16, 16), qjax.FP32, None
    ),
    "unknown name 'e4m33x'; the nearest are e4m3": lambda: qjax.format("e4m33x"),
    "expected a name or a format, got 8": lambda: qjax.format(8),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((ValueError, TypeError), match=text):
        REFUSALS[text]()
