"""Storage: every code survives, layouts are the specifications', bytes are what the bits say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import _packing
from qjax._carrier import carrier

FORMATS = [
    "e4m3", "e5m2", "e3m4", "e2m3", "e3m2", "e2m1", "e8m0", "ue5m3", "ue5m3fn", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz",
    "fp16", "bf16", "dlfloat16", "e1m3", "e1m2finite", "e3m0", "e5m10_nosub", "e2m9b-5", "e8m3b135", "e8m3b120", "e9m2",
    "binary8p1ue", "binary8p1se", "binary8p3se", "binary8p4uf", "binary8p7sf", "binary6p3ue", "binary16p11se",
    "int2", "int3", "int8", "uint8", "q8.8", "uq4.4", "int16", "nf4", "ternary", "binary", "pow2_4", "posit8",
    "posit16", "posit6es0", "takum7",
]  # fmt: skip


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def same(a, b) -> bool:
    return a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_survives_decode_chop_encode(name):
    """Every code that is the only one of its value, that is; others come back as a code of the same value."""
    fmt = qjax.format(name)
    codes = np.arange(2**fmt.bits, dtype=np.uint64)
    with jax.enable_x64(True):
        packed = _packing.pack(jnp.asarray(codes), fmt.bits)
        values = qjax.decode(qjax.QTensor(packed, (), (), fmt, len(codes), np.dtype(np.float64), -1))
        assert np.array_equal(np.unique(np.asarray(values)[np.isfinite(values)]), fmt.values())
        chopped = qjax.chop(values, fmt)
        numbers = np.asarray(~jnp.isnan(values)) | fmt.has_nan
        assert same(np.asarray(chopped)[numbers], np.asarray(values)[numbers])
        again = qjax.encode(chopped, fmt)
        assert same(qjax.decode(again), chopped)
    _, place, count = np.unique(bits(values), return_index=True, return_counts=True)
    single = place[(count == 1) & numbers[place]]
    assert np.array_equal(np.asarray(again.unpacked())[single], codes[single])
    assert len(single) >= len(fmt.values()) - 1


@pytest.mark.parametrize("name", [n for n in FORMATS if qjax.format(n).dtype is not None])
def test_codes_are_those_of_ml_dtypes(name):
    fmt = qjax.format(name)
    values = jnp.asarray(fmt.values().astype(np.float32))
    q = qjax.encode(values, fmt)
    theirs = np.asarray(values).astype(fmt.dtype)
    assert q.to_ml_dtypes().dtype == fmt.dtype
    assert np.array_equal(q.to_ml_dtypes().astype(np.float32), np.asarray(values))
    mask = 2**fmt.bits - 1
    assert np.array_equal(np.asarray(q.unpacked()) & mask, theirs.view(f"u{theirs.dtype.itemsize}") & mask)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 19, 24, 32])
@pytest.mark.parametrize("length", [0, 1, 5, 8, 33])
def test_packing_is_a_bit_stream(width, length):
    codes = np.random.default_rng(width).integers(0, 2**width, (3, length), dtype=np.uint32)
    packed = _packing.pack(jnp.asarray(codes), width)
    assert np.array_equal(_packing.unpack(packed, width, length, np.uint32), codes)
    stream = (codes[..., None] >> np.arange(width, dtype=np.uint32) & 1).reshape(3, -1)
    theirs = np.packbits(stream.astype(np.uint8), axis=-1, bitorder="little")
    assert np.array_equal(np.ascontiguousarray(packed).view(np.uint8).reshape(3, -1), theirs)


@pytest.mark.parametrize(
    ("name", "shape", "nbytes"),
    [
        ("e2m1", (10,), 5), ("e3m2", (4, 8), 4 * 6), ("int3", (7,), 3), ("ternary", (5, 8), 5 * 2), ("e4m3", (), 1),
        ("mxfp4", (2, 64), 64 + 4), ("mxfp6_e2m3", (32,), 24 + 1), ("nvfp4", (4, 64), 128 + 16 + 4),
        ("mxfp8_e4m3", (0, 32), 0),
        ("uint4_g128", (2, 256), 256 + 4 * 4 + 2 * 1), ("dfp16", (100,), 201), ("tf32", (8,), 19),
    ],
)  # fmt: skip
def test_bytes_are_what_the_bits_say(name, shape, nbytes):
    q = qjax.encode(jnp.ones(shape, jnp.float32), name)
    assert (q.shape, q.nbytes) == (shape, nbytes)


SCALED = ["mxfp4", "mxint8", "nvfp4", "dfp8", "int8_channel", "uint4_g32", "e4m3_2x16", "int4_tensor", "nf4_g16"]
SOME = ["e4m3", "e8m0", "bf16", "fp16", "dlfloat16", "e8m3b135", "q8.8", "posit8", *SCALED]
CASES = (
    [(name, "float32", "nearest_even") for name in (*FORMATS, *SCALED)]
    + [(name, dtype, "nearest_even") for name in SOME for dtype in ("float64", "bfloat16", "float16")]
    + [(name, "float32", "stochastic") for name in SOME]
)


@pytest.mark.parametrize(("name", "dtype", "rounding"), CASES)
def test_decode_of_encode_is_chop(name, dtype, rounding):
    with jax.enable_x64(dtype == "float64"):
        c = carrier(np.dtype(dtype))
        rng = np.random.default_rng(0)
        raw = rng.integers(0, 2**c.width, (4, 512), dtype=c.uint).view(c.float)
        scale = np.ldexp(rng.normal(size=(4, 512)), rng.integers(-12, 12, (4, 512))).astype(c.float)
        with np.errstate(over="ignore", invalid="ignore"):
            x = jnp.asarray(np.concatenate([raw, scale]).astype(jnp.dtype(dtype)))
        options = {"key": jax.random.key(1)} if rounding == "stochastic" else {}
        chopped = qjax.chop(x, name, rounding, **options)
        assert same(qjax.decode(qjax.encode(x, name, rounding, **options)), chopped)


def test_a_qtensor_crosses_transformations():
    x = jax.random.normal(jax.random.key(0), (8, 96), jnp.float32)
    q = jax.jit(lambda x: qjax.encode(x, "mxfp6_e3m2"))(x)
    batched = jax.vmap(lambda row: qjax.encode(row, "mxfp6_e3m2"))(x)
    assert same(q.codes, batched.codes) and batched.shape == (8, 96)
    assert same(jax.vmap(qjax.decode)(batched), qjax.decode(q))
    assert same(qjax.decode(jax.device_put(q, jax.devices()[1])), qjax.chop(x, "mxfp6_e3m2"))
    _, rows = jax.lax.scan(lambda carry, row: (carry, qjax.decode(row)), 0, batched)
    assert same(rows, qjax.chop(x, "mxfp6_e3m2"))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_blocks_along_any_axis(axis):
    x = jax.random.normal(jax.random.key(0), (48, 40), jnp.float32)
    q = qjax.encode(x, "mxfp4", axis=axis)
    assert q.scales[0].shape == ((2, 40) if axis == 0 else (48, 2))
    turned = qjax.chop(jnp.moveaxis(x, axis, -1), "mxfp4")
    assert same(qjax.decode(q), jnp.moveaxis(turned, -1, axis))


def test_scales_are_in_their_own_encoding():
    x = jnp.zeros((1, 64), jnp.float32).at[0, 3].set(24.0).at[0, 40].set(2.0**-140)
    q = qjax.encode(x, "mxfp4")
    # 24 = 6 * 2^2: exponent 4 less the element's 2, biased by 127. The tiny block is clamped to the smallest scale.
    assert q.scales[0].codes.tolist() == [[129, 0]]
    assert q.scales[0].to_ml_dtypes().astype(np.float64).tolist() == [[4.0, 2.0**-127]]
    with pytest.raises(TypeError, match="no dtype has the encoding of Codebook"):
        qjax.encode(x, "nf4_g16").to_ml_dtypes()


def test_encode_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match=r"encode: x is complex; encode x\.real and x\.imag"):
        qjax.encode(jnp.ones(3, jnp.complex64), "e4m3")
    with pytest.raises(ValueError, match="have 64 bits, float32 is worked on with 32"):
        qjax.encode(jnp.ones(3, jnp.float32), "fp64")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("fmt", ["e2m1", "e3m2", "e4m3", "mxfp4", "nvfp4", "int4_g8", "e5m6"])
def test_empty_arrays_are_stored(fmt, shape):
    q = qjax.encode(jnp.zeros(shape, jnp.float32), fmt)
    assert q.shape == q.unpacked().shape == qjax.decode(q).shape == shape
