"""Laws 2, 5, 6 and 9: algebra, transformations, keys and gradients."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec
from tables import CODEBOOKS, FLOATS, SCALED, bits, every

import qjax
from qjax import Rounding as R

# Of NumPy, on ml_dtypes.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SOME = ["e4m3", "e5m2", "e2m1", "e8m0", "fp16", "bf16", "dlfloat16", "e4m3fnuz", "q8.8", "int4", "nf4", "posit8"]
NEGATED = {R.TOWARD_POSITIVE: R.TOWARD_NEGATIVE, R.TOWARD_NEGATIVE: R.TOWARD_POSITIVE}


def same(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


def numbers(dtype="float32") -> jax.Array:
    return jnp.asarray(np.sort(every(dtype)[np.isfinite(every(dtype))][::11]))


def all_modes(fmt, options, **rest):
    """Returns a function that rounds in each mode, all by one program."""
    program = jax.jit(lambda x: [qjax.chop(x, fmt, r, **(options if r.is_stochastic else {}), **rest) for r in R])
    return lambda x: dict(zip(R, map(np.asarray, program(x)), strict=True))


@pytest.mark.parametrize("name", SOME)
def test_idempotent_monotone_and_odd(name):
    fmt, x = qjax.format(name), np.asarray(numbers())
    # One draw for all: rounding with a fixed threshold is monotone too.
    chop = all_modes(fmt, {"random_bits": jnp.full(x.shape, 77, jnp.uint8)}, saturate=True)
    values, mirrored = chop(x), chop(-x)
    for rounding, y in values.items():
        assert same(chop(y)[rounding], y)
        positive = y if getattr(fmt, "signed", True) else y[x >= 0]
        assert (np.diff(positive) >= 0).all()
        if getattr(fmt, "signed", True) and np.array_equal(fmt.values(), -fmt.values()[::-1]):
            assert np.array_equal(-mirrored[NEGATED.get(rounding, rounding)], y)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", "float32"),
        ("fp64", "float64"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("fp64", "float32"),
        ("fp32", "bfloat16"),
        ("fp32", "float16"),
        ("e9m30", "float32"),
    ],
)
def test_identity_when_the_format_contains_the_carrier(name, dtype):
    x = every(dtype)
    number = ~np.isnan(x)
    with jax.enable_x64(dtype == "float64"):
        for y in all_modes(name, {"key": jax.random.key(0)})(x).values():
            assert np.array_equal(bits(y)[number], bits(x)[number])
            assert np.isnan(y[~number]).all()


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 64)).astype(np.float32) * 4)
KEY = jax.random.key(3)


@pytest.mark.parametrize("name", [*SOME, *SCALED])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_eager_jit_vmap_scan(name, rounding):
    options = {"key": KEY} if rounding == "stochastic" else {}
    chop = functools.partial(qjax.chop, fmt=name, rounding=rounding)
    y = chop(X, **options)
    assert same(jax.jit(chop)(X, **options), y)
    with jax.disable_jit():
        assert same(chop(X, **options), y)
    rows = jnp.stack([chop(row, **options) for row in X])
    assert same(jax.vmap(lambda row: chop(row, **options))(X), rows)
    assert same(jax.lax.scan(lambda carry, row: (carry, chop(row, **options)), 0, X)[1], rows)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_positive", "to_odd", "stochastic"])
def test_inside_a_pallas_body(name, rounding):
    """The words of a stochastic mode come as an operand, so that each tile has its own."""
    x, words = X[0], jax.random.bits(KEY, X[0].shape, jnp.uint32)
    draws = rounding == "stochastic"

    def body(x_ref, words_ref, y_ref):
        y_ref[...] = qjax.chop(x_ref[...], name, rounding, random_bits=words_ref[...] if draws else None)

    y = pl.pallas_call(body, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x, words)
    assert same(y, qjax.chop(x, name, rounding, random_bits=words if draws else None))


@pytest.mark.parametrize("name", ["e4m3", "q8.8", "nf4", "mxfp4", "int8_channel", "nvfp4", "e4m3_2x16"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_sharded(name, rounding):
    options = {"key": KEY} if rounding == "stochastic" else {}
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = jax.device_put(X, NamedSharding(mesh, PartitionSpec("a", None, "b")))
    y = jax.jit(lambda x: qjax.chop(x, name, rounding, **options))(sharded)
    assert y.sharding.is_equivalent_to(sharded.sharding, 3)
    assert same(y, qjax.chop(X, name, rounding, **options))


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_in_shard_map(rounding):
    """The number and its random words need not vary over the same axes of the mesh."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    draws = rounding == "stochastic"

    def shared(x):
        return qjax.chop(x, "e4m3", rounding, key=KEY if draws else None)

    def own(x):
        key = jax.random.fold_in(KEY, jax.lax.axis_index("d"))
        return qjax.chop(x, "e4m3", rounding, key=key if draws else None)

    rows = jnp.resize(X, (8, 48))
    shard = jax.shard_map(shared, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))
    assert same(shard(rows), jnp.concatenate([shared(row[None]) for row in rows]))
    whole = jax.shard_map(own, mesh=mesh, in_specs=jax.P(), out_specs=jax.P("d") if draws else jax.P())
    keys = [jax.random.fold_in(KEY, i) for i in range(8)] if draws else [None]
    assert same(whole(rows), jnp.concatenate([qjax.chop(rows, "e4m3", rounding, key=key) for key in keys]))


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "int8_channel", "int8_tensor"])
def test_blocks_of_complex_arrays_are_those_of_their_parts(fmt, axis):
    real, imag = X[0], 3 * X[1]
    z = qjax.chop(jax.lax.complex(real, imag), fmt, axis=axis)
    assert same(z.real, qjax.chop(real, fmt, axis=axis)) and same(z.imag, qjax.chop(imag, fmt, axis=axis))


def test_keys():
    """Law 6: one key, one draw, for all rows of a vmap too; a key split per row or step draws afresh."""
    x = jnp.full((8, 512), 0.3, jnp.float32)
    chop = functools.partial(qjax.chop, fmt="e2m1", rounding="stochastic")
    assert same(chop(x, key=KEY), chop(x, key=KEY))
    assert not same(chop(x, key=KEY), chop(x, key=jax.random.key(4)))
    shared = jax.vmap(lambda row: chop(row, key=KEY))(x)
    assert all(same(row, shared[0]) for row in shared)
    split = jax.vmap(lambda row, key: chop(row, key=key))(x, jax.random.split(KEY, 8))
    assert len({row.tobytes() for row in np.asarray(split)}) == 8
    _, steps = jax.lax.scan(lambda c, key: (c, chop(x[0], key=key)), 0, jax.random.split(KEY, 8))
    assert same(steps, split)
    # A frozen draw would be a constant of the compiled program.
    f = jax.jit(lambda key: chop(x, key=key))
    assert not same(f(jax.random.key(0)), f(jax.random.key(1)))
    assert same(chop(x, key=jax.random.PRNGKey(3)), chop(x, key=KEY))


@pytest.mark.parametrize("name", [*SOME, *SCALED])
def test_the_gradient_is_straight_through(name):
    x = X
    f = functools.partial(qjax.chop, fmt=name)
    tangent = jnp.sin(x)
    y, y_dot = jax.jvp(f, (x,), (tangent,))
    assert same(y, f(x)) and same(y_dot, tangent)
    _, pullback = jax.vjp(f, x)
    assert same(pullback(tangent)[0], tangent)
    assert same(jax.vmap(jax.grad(lambda row: f(row).sum()))(x), jnp.ones_like(x))


def test_the_gradient_of_a_scale_is_that_of_lsq():
    """d/ds of s round(x / s) with the rounding straight-through: round(x / s) - x / s inside, the end outside."""
    x = jnp.array([0.26, -1.3, 9.0, -20.0], jnp.float32)

    def f(s):
        return qjax.chop(x, "int4_tensor", scale=s)

    _, dot = jax.jvp(f, (jnp.float32(0.5),), (jnp.float32(1),))
    assert np.allclose(dot, [1 - 0.52, -3 + 2.6, 7, -7], rtol=0, atol=4e-7)  # one division each, of at most 8
    assert np.isclose(jax.grad(lambda s: f(s).sum())(jnp.float32(0.5)), dot.sum())


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_numbers_go_by_parts(dtype):
    with jax.enable_x64(dtype == "complex128"):
        rng = np.random.default_rng(0)
        x = jnp.asarray((rng.normal(size=(3, 32)) + 1j * rng.normal(size=(3, 32))).astype(dtype))
        for name in ("e4m3", "mxfp4"):
            y = qjax.chop(x, name)
            assert y.dtype == dtype
            assert same(y.real, qjax.chop(x.real, name)) and same(y.imag, qjax.chop(x.imag, name))
        y = qjax.chop(jax.lax.complex(x.real, x.real), "e2m1", "stochastic", key=KEY)
        assert not same(y.real, y.imag)


@given(
    st.floats(width=32),
    st.floats(width=32),
    st.sampled_from(FLOATS + CODEBOOKS),
    st.sampled_from(["nearest_even", "toward_zero", "to_odd"]),
)
def test_order_is_kept(a, b, name, rounding):
    a, b = sorted([np.float32(a), np.float32(b)]) if not np.isnan(a + b) else (np.float32(0), np.float32(1))
    y = np.asarray(qjax.chop(np.array([abs(a), abs(b)]), name, rounding, saturate=True))
    assert (y[0] <= y[1]) == (abs(a) <= abs(b)) or y[0] == y[1]


@given(
    st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32),
    st.integers(-20, 20),
    st.sampled_from(["mxfp4", "mxfp8_e5m2", "dfp8"]),
)
def test_power_of_two_blocks_are_equivariant(x, k, name):
    row = np.array([x, 0.3 * x, -0.01 * x], np.float32)
    row = np.where(np.abs(row) < 2.0**-60, np.float32(0), row)
    scaled = qjax.chop(np.ldexp(row, k), name)
    assert same(scaled, np.ldexp(np.asarray(qjax.chop(row, name)), k))


FINGERPRINTS = """
import zlib, jax.numpy as jnp, numpy as np, qjax
x = jnp.asarray((np.arange(2**16, dtype=np.uint32) << 16 | 0x8001).view(np.float32).reshape(512, 128))
for name in ("e4m3", "fp16", "bf16", "e8m3b135", "q8.8", "nf4", "mxfp4", "int8_channel"):
    for rounding in ("nearest_even", "toward_positive"):
        print(name, rounding, zlib.crc32(np.asarray(qjax.chop(x, name, rounding)).tobytes()))
"""


def test_fast_math_changes_nothing():
    """The flag lets XLA re-associate floats, which makes the identity of an add and subtract."""
    texts = []
    for flags in ("", "--xla_cpu_enable_fast_math=true"):
        run = [sys.executable, "-c", FINGERPRINTS]
        environment = os.environ | {"XLA_FLAGS": flags}
        texts.append(subprocess.run(run, env=environment, capture_output=True, check=True, text=True).stdout)
    assert texts[0] == texts[1] and texts[0].count("\n") == 16
