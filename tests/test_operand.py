"""The dtypes that products run in: proved to hold every value, and to be the narrowest that do."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from programs import products
from tables import CODEBOOKS, FIXED, FLOATS, SCALED

import qjax
from qjax import Gemm, Quantizer as Q, Recipe, _operand

MATRIX = (((1,), (0,)), ((), ()))
F32 = np.dtype(np.float32)
INT8, BF16 = np.dtype(np.int8), np.dtype(ml_dtypes.bfloat16)
GRAMMAR = [f"e{e}m{m}{s}" for e in (2, 3, 4, 5, 8) for m in (0, 1, 3, 6, 7, 8) for s in ("fn", "finite")]
GRAMMAR += [
    "ue4m3",
    "e2m1b3",
    "e3m4b-20",
    "e4m2b60",
    "e2m1b-60",
    "e2m2b126",
    "e2m5b1",
    "e2m6b1fn",
    "uint7",
    "uint9",
    "int9",
]
GRAMMAR += [
    "q1.7",
    "q4.4",
    "uq0.8",
    "uq0.7",
    "q8.50",
    "pow2_2",
    "pow2_3",
    "pow2_4",
    "pow2_5",
    "posit6",
    "posit8es0",
    "posit12",
]
UNSCALED = [*FLOATS, *FIXED, *CODEBOOKS, *GRAMMAR]
UNSCALED += [
    qjax.Fixed(8, 140),
    qjax.Fixed(8, -125),
    qjax.Fixed(3, 61),
    qjax.Codebook((-1.0, 0.5, 3.0)),
    qjax.Codebook((0.0, 2.0**-100)),
]


def listed(fmt) -> np.ndarray | None:
    """Returns those values of a format that float32 holds as normal numbers, or None if there are too many to list."""
    fmt = qjax.format(fmt)
    if getattr(fmt, "bits", 99) > 16:
        return None
    with np.errstate(over="ignore", under="ignore"):
        values = fmt.values()
        held = values.astype(np.float32)
    normal = (np.abs(values) >= 2.0**-126) & np.isfinite(held) & (held == values)
    return values[normal | (values == 0)]


def held_by(values: np.ndarray, dtype: np.dtype) -> bool:
    """Whether a dtype holds numbers exactly; int8 as integers in units of their lowest bit, if 2^-60 to 2^40."""
    if dtype == BF16:
        return bool((values.astype(BF16).astype(np.float64) == values).all())
    nonzero = values[values != 0]
    if not len(nonzero):
        return True
    mantissa, exponent = np.frexp(nonzero)
    integers = np.ldexp(mantissa, 53).astype(np.int64)
    lowest = (exponent - 53 + np.log2((integers & -integers).astype(np.float64))).min()
    scaled = values * 2.0**-lowest
    return bool(-60 <= lowest <= 40 and (scaled >= -128).all() and (scaled <= 127).all())


@pytest.mark.parametrize("fmt", UNSCALED, ids=str)
def test_the_carrier_is_the_narrowest_that_holds_every_value(fmt):
    values = listed(fmt)
    chosen = _operand.narrow_dtype(qjax.format(fmt), F32)
    if values is None:
        assert chosen == F32
        return
    assert chosen in (INT8, BF16, F32)
    if not values.any():
        return
    if chosen == INT8:
        unit = 2.0 ** _operand.lowest_bit(qjax.format(fmt))
        assert np.array_equal((values / unit).astype(np.int8) * unit, values) and held_by(values, INT8)
    elif chosen == BF16:
        assert held_by(values, BF16) and not held_by(values, INT8)
    else:
        assert not held_by(values, BF16) and not held_by(values, INT8)


BLOCKS = ["mxfp8_e5m2", "mxfp6_e2m3", "e4m3_1x128", "int4_g32"]
BLOCKS += [
    qjax.Scaled(element, scale, 4)
    for element, scale in (
        (qjax.E2M1, qjax.E4M3),
        (qjax.Fixed(9), qjax.E8M0),
        (qjax.Fixed(10), qjax.E8M0),
        (qjax.TERNARY, qjax.E5M2),
        (qjax.E3M4, qjax.E4M3),
    )
]


@pytest.mark.parametrize("fmt", [*SCALED, *BLOCKS], ids=str)
def test_the_carrier_holds_elements_times_scales(fmt):
    """All elements by all scales of 8 bits; of float32 scales, all significands of 8 bits and some of 24."""
    fmt = qjax.format(fmt)
    chosen = _operand.narrow_dtype(fmt, F32)
    if fmt.zero_point is not None or isinstance(fmt.element, qjax.Scaled):
        assert chosen == F32
        return
    elements = fmt.element.values()
    scales = fmt.scale.values() if fmt.scale.bits <= 16 else np.concatenate([1 + np.arange(128) / 128, [1 + 2.0**-23]])
    products = np.ravel(np.multiply.outer(elements, scales[scales > 0]))
    products = products[(np.abs(products) >= 2.0**-126) & (np.abs(products) < 2.0**128)]
    assert chosen == (BF16 if held_by(products, BF16) else F32)


def test_other_carriers_stay_wide():
    for dtype in (np.dtype(np.float64),):
        assert _operand.narrow_dtype(qjax.E4M3, dtype) == dtype


def test_elements_apart_from_a_zero_point_are_held():
    """Scales that are rounded down make a zero point beyond the element: uint7 less 135 is not an int8."""
    fmt = qjax.Scaled(qjax.Fixed(7, signed=False), qjax.E4M3, "axis", zero_point=qjax.Fixed(8, signed=False))
    x = np.zeros((1, 8), np.float32)
    x[0] = -np.linspace(0, 127 * 1.0624, 8)
    eye = np.eye(8, dtype=np.float32)
    out = qjax.dot_general(jnp.asarray(x), jnp.asarray(eye), MATRIX, recipe=Recipe(Gemm(Q(fmt), Q("int8"))))
    assert np.array_equal(out, qjax.chop(jnp.asarray(x), fmt))
    assert float(qjax.decode(qjax.encode(jnp.asarray(x), fmt).zero_points[0])[0, 0]) > 128


def dtypes_of(f, *args) -> tuple[str, str, str]:
    """Returns the dtypes of the operands and the result of the one product of a function."""
    (equation,) = products(f, *args)
    return tuple(v.aval.dtype.name for v in (*equation.invars, *equation.outvars))


def product(x, w, lhs, rhs, **options):
    gemm = Gemm(lhs and Q(lhs), rhs and Q(rhs))
    return qjax.dot_general(x, w, MATRIX, recipe=Recipe(gemm), **options)


def operands(depth: int, dtype="float32"):
    rng = np.random.default_rng(depth)
    x, w = (rng.integers(-127, 128, s).astype(np.float32) for s in ((2, depth), (depth, 3)))
    return jnp.asarray(x).astype(dtype), jnp.asarray(w).astype(dtype)


@pytest.mark.parametrize(
    ("lhs", "rhs", "depth", "dtype", "expected"),
    [
        ("int8", "int8", 2048, "float32", ("int8", "int8", "int32")),
        ("int8_channel", "int8_tensor", 2048, "float32", ("int8", "int8", "int32")),
        ("int8", "int8", 2**17 - 1, "float32", ("int8", "int8", "int32")),
        ("int8", "int8", 2**17, "float32", ("bfloat16", "bfloat16", "float32")),
        ("int8", "e4m3", 64, "float32", ("bfloat16", "bfloat16", "float32")),
        ("bf16", "mxfp4", 64, "float32", ("bfloat16", "bfloat16", "float32")),
        ("e4m3", "fp16", 64, "float32", ("float32", "float32", "float32")),
        ("e4m3", None, 64, "float32", ("float32", "float32", "float32")),
        ("e4m3", None, 64, "bfloat16", ("bfloat16", "bfloat16", "float32")),
        ("e4m3", None, 64, "float16", ("float32", "float32", "float32")),
        ("int8", "int8", 2048, "float64", ("float64", "float64", "float64")),
    ],
)
def test_which_dtype_a_product_runs_in(lhs, rhs, depth, dtype, expected):
    with jax.enable_x64(dtype == "float64"):
        x, w = (jax.ShapeDtypeStruct(s, dtype) for s in ((2, depth), (depth, 3)))
        assert dtypes_of(lambda x, w: product(x, w, lhs, rhs), x, w) == expected


def test_a_precision_that_names_an_algorithm_keeps_the_dtype():
    x, w = operands(2048)
    for precision, expected in (
        (lax.DotAlgorithmPreset.F32_F32_F32, "float32"),
        (lax.DotAlgorithmPreset.BF16_BF16_F32, "float32"),
        (lax.Precision.HIGHEST, "int8"),
        ((lax.Precision.DEFAULT, lax.Precision.HIGH), "int8"),
        ("highest", "int8"),
    ):
        found = dtypes_of(lambda x, w, p=precision: product(x, w, "int8", "int8", precision=p), x, w)
        assert found[:2] == (expected, expected)


@pytest.mark.parametrize(
    ("lhs", "rhs"), [("int8", "int8"), ("int8_tensor", "int8_tensor"), ("e3m2", "int4"), ("mxfp4", "ternary")]
)
@pytest.mark.parametrize("depth", [64, 2048])
def test_the_narrow_dtype_changes_no_bit(lhs, rhs, depth):
    """Sums of 2048 products of at most 8 and 8 bits stay below 2^24 times their lowest bit only for small data."""
    x, w = operands(depth)
    x, w = (
        jnp.where(jnp.arange(depth).reshape(s) % (depth // 32) == 0, a, jnp.sign(a))
        for a, s in ((x, (1, -1)), (w, (-1, 1)))
    )
    x, w = x.at[0, 0].set(127), w.at[0, 0].set(127)
    narrow = product(x, w, lhs, rhs)
    wide = product(x, w, lhs, rhs, precision=lax.DotAlgorithmPreset.F32_F32_F32)
    assert np.array_equal(narrow, wide)


def test_the_largest_int8_sums_are_exact():
    """2^17 - 1 products of -128 by -128 fit int32; one more would not, and is summed in float32."""
    for depth in (2**17 - 1, 2**17):
        x = jnp.full((1, depth), -128, jnp.float32)
        out = product(x, x.T, "int8", "int8")
        assert out.item() == np.float32(depth * 2**14)


def test_units_far_from_one_are_not_lost():
    """Integers of 2^-100 and 2^100: their product is 1, and those of 2^125 overflow only where they are not zero."""
    small, large = qjax.Fixed(4, 100), qjax.Fixed(4, -100)
    x, w = jnp.array([[3 * 2.0**-100, 0]], jnp.float32), jnp.array([[5 * 2.0**100], [2.0**100]], jnp.float32)
    assert product(x, w, small, large).item() == 15
    top = qjax.Fixed(2, -125)
    zero = jnp.zeros((1, 2), jnp.float32)
    assert product(zero, zero.T, top, top).item() == 0


def test_subnormals_count_as_zero_in_every_dtype():
    x, w = jnp.full((2, 8), 2.0**-130, jnp.float32), jnp.full((8, 2), 2.0**20, jnp.float32)
    for fmt in ("bf16", "fp32", "e8m3"):
        assert not np.asarray(product(x, w, fmt, fmt)).any()
