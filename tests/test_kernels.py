"""``qjax.kernels.matmul``: one number whatever computes it, which implementation is taken, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec as P, use_abstract_mesh
from tables import bits

import qjax
from qjax import Accumulator, Fixed, Gemm, Quantizer as Q
from qjax._kernels import _int16, _target, _tiles
from qjax._kernels._cases import CASES
from qjax.kernels import k_major, matmul

TPU = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
NEW_ENOUGH = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax >= 0.11.2")


def few_bits(seed: int, *shape: int) -> jax.Array:
    """Returns small integers, so that float32 sums of their products are exact."""
    return jnp.asarray(np.random.default_rng(seed).integers(-7, 8, shape), jnp.float32)


def weights(seed: int, *shape: int) -> jax.Array:
    """Returns integers with a 7 in every 16 along the last axis but one: integer formats of 4 bits have scale 1."""
    return few_bits(seed, *shape).at[..., ::16, :].set(7)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


INT16 = Q(Fixed(16, 0))
GEMMS = {
    "plain": None,
    "bfloat16": Gemm(Q("bf16"), Q("bf16")),
    "int8": Gemm(Q("int8"), Q("int8")),
    "fp16 register": Gemm(accumulator=Accumulator("fp16", chunk=16)),
    "e4m3, e6m9 register": Gemm(Q("e4m3"), Q("e4m3"), Accumulator("e6m9", "toward_zero", chunk=32)),
    "stochastic": Gemm(accumulator=Accumulator("e5m4", "stochastic", chunk=16)),
    "int16, int32 wraps": Gemm(INT16, INT16, Accumulator(Fixed(32, 0, overflow="wrap"), chunk=16)),
    "int16, int20 saturates": Gemm(INT16, INT16, Accumulator(Fixed(20, 0, overflow="saturate"), chunk=1)),
    "two levels": Gemm(Q("int8_g64"), Q("int8_g64"), Accumulator("fp32", chunk=64, promote=64)),
}


@pytest.mark.parametrize("name", GEMMS)
def test_reference_and_xla_are_the_same_bits_where_sums_are_exact(name):
    gemm = GEMMS[name]
    size = 900.0 if name.startswith("int16") else 1.0
    x, w = size * few_bits(0, 2, 5, 130), size * few_bits(1, 130, 7)
    key = jax.random.key(0) if gemm is not None and gemm.is_stochastic else None
    outs = [matmul(x, w, gemm, key=key, implementation=i) for i in ("reference", "xla", None)]
    assert outs[0].shape == (2, 5, 7) and jnp.isfinite(outs[0]).all() and jnp.any(outs[0] != 0)
    assert all(np.array_equal(bits(outs[0]), bits(out)) for out in outs[1:])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_float32_are_within_the_bound(dtype, implementation):
    """A sum of k products of 24 bits in any order: k - 1 additions and k products, each rounded to half of 2^-23."""
    x, w = normal(0, 6, 500).astype(dtype), normal(1, 500, 9).astype(dtype)
    out = np.float64(matmul(x, w, implementation=implementation, preferred_element_type=np.float32))
    exact, size = np.float64(x) @ np.float64(w), np.abs(np.float64(x)) @ np.abs(np.float64(w))
    assert (np.abs(out - exact) <= 500 * 2.0**-24 * size).all()


def test_products_of_int16_are_exact_modulo_2_32():
    random = np.random.default_rng(0)
    x, y = (random.integers(-(2**15), 2**15, (2, n, 700)) for n in (5, 6))
    x[0, 0], y[0, 0], y[0, 1] = -(2**15), -(2**15), 2**15 - 1
    exact = np.einsum("bmk,bnk->bmn", x, y)
    assert (np.abs(exact) > 2**31).any()
    out = _int16.product(*(jnp.asarray(z, jnp.int16) for z in (x, y)))
    np.testing.assert_array_equal(np.asarray(out), exact.astype(np.int32))


@pytest.mark.parametrize("fmt", ["int4_g32", "mxfp4", "nvfp4", "nf4_g64", "int4_channel", "e4m3", "mxint8"])
def test_stored_weights_are_their_values(fmt):
    x, w = few_bits(0, 4, 96), weights(1, 96, 10)
    q = qjax.encode(w, fmt, axis=0)
    rows = k_major(q)
    assert rows.shape == q.shape and rows.nbytes <= q.nbytes + 10 and k_major(rows) is rows
    np.testing.assert_array_equal(bits(qjax.decode(rows)), bits(qjax.decode(q)))
    if fmt == "nf4_g64":
        return  # its sums are not exact, and their order is that of the layout
    out = matmul(x, q)
    np.testing.assert_array_equal(bits(out), bits(matmul(x, w, Gemm(rhs=Q(fmt)))))
    np.testing.assert_array_equal(bits(out), bits(matmul(x, rows)))
    promoted = Gemm(accumulator=Accumulator("fp32", chunk=16, promote=16))
    np.testing.assert_array_equal(bits(matmul(x, rows, promoted)), bits(matmul(x, q, promoted)))


def test_stored_operands_may_be_either_or_both():
    x, w = qjax.encode(few_bits(0, 3, 32), "mxfp8_e4m3"), qjax.encode(few_bits(1, 32, 5), "mxfp4", axis=0)
    out = matmul(qjax.decode(x), w)
    assert np.array_equal(bits(matmul(x, w)), bits(out))
    assert np.array_equal(bits(matmul(x, qjax.decode(w))), bits(out))
    assert matmul(few_bits(0, 3, 32).astype(jnp.bfloat16), w).dtype == jnp.bfloat16


def test_weights_in_rows_serve_a_quantized_function():
    recipe = qjax.Recipe(Gemm(None, Q("int4_g32")))
    fn = qjax.quantize(lambda params, x: x @ params["kernel"], recipe)
    params, x = {"kernel": weights(0, 64, 8)}, few_bits(1, 3, 64)
    stored = qjax.quantize_params(params, "int4_g32")
    rows = jax.tree.map(k_major, stored, is_leaf=lambda q: isinstance(q, qjax.QTensor))
    assert rows["kernel"].codes.shape == (8, 32)
    np.testing.assert_array_equal(bits(fn(rows, x)), bits(fn(params, x)))


def test_the_gradient_is_that_of_the_plain_product():
    x, w = few_bits(0, 4, 32), few_bits(1, 32, 3)
    gemm = Gemm(Q("e4m3"), None, Accumulator("fp16", chunk=16))
    grads = jax.grad(lambda x, w: matmul(x, w, gemm).sum(), argnums=(0, 1))(x, w)
    np.testing.assert_array_equal(bits(grads[0]), bits(jnp.ones((4, 3), jnp.float32) @ w.T))
    np.testing.assert_array_equal(bits(grads[1]), bits(x.T @ jnp.ones((4, 3), jnp.float32)))
    q = k_major(qjax.encode(w, "int4_g16", axis=0))
    grad = jax.grad(lambda x: matmul(x, q).sum())(x)
    np.testing.assert_array_equal(bits(grad), bits(jnp.ones((4, 3), jnp.float32) @ qjax.decode(q).T))


def test_under_vmap_and_scan():
    x, w = few_bits(0, 3, 4, 32), weights(1, 3, 32, 5)
    gemm = Gemm(None, None, Accumulator("e5m4", chunk=16))
    one_by_one = jnp.stack([matmul(a, b, gemm) for a, b in zip(x, w, strict=True)])
    product = functools.partial(matmul, gemm=gemm)
    np.testing.assert_array_equal(bits(jax.vmap(product)(x, w)), bits(one_by_one))
    _, scanned = jax.lax.scan(lambda c, ab: (c, product(*ab)), 0, (x, w))
    np.testing.assert_array_equal(bits(scanned), bits(one_by_one))
    q = jax.vmap(lambda w: k_major(qjax.encode(w, "int4_g16", axis=0)))(w)
    stored = jax.vmap(matmul)(x, q)
    np.testing.assert_array_equal(bits(stored[1]), bits(matmul(x[1], qjax.encode(w[1], "int4_g16", axis=0))))


# What calls a kernel in a lowered program, by platform, and a device that has it.
HOPPER = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
CALLS = {"tpu": ("tpu_custom_call", TPU), "cuda": ("mosaic_gpu_v2", HOPPER)}


def lowered_for(platform: str, fn, *args, mesh: AbstractMesh | None = None) -> str:
    with use_abstract_mesh(mesh or AbstractMesh((), (), abstract_device=CALLS[platform][1])):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@NEW_ENOUGH
@pytest.mark.parametrize("how", ["accumulator", "weights", "plain", "xla", "float64", "dot_general", "conv"])
def test_a_kernel_is_taken_where_it_can_run(how, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, w = few_bits(0, 8, 256), few_bits(1, 256, 16)
    gemm = Gemm(accumulator=Accumulator("fp16", chunk=64))
    dims = (((1,), (0,)), ((), ()))
    fn = {
        "accumulator": lambda: lowered_for("tpu", lambda x, w: matmul(x, w, gemm), x, w),
        "weights": lambda: lowered_for("tpu", matmul, x, k_major(qjax.encode(w, "int4_g128", axis=0))),
        "plain": lambda: lowered_for("tpu", lambda x, w: matmul(x, w, Gemm(Q("e4m3"), Q("e4m3"))), x, w),
        "xla": lambda: lowered_for("tpu", lambda x, w: matmul(x, w, gemm, implementation="xla"), x, w),
        "float64": lambda: lowered_for("tpu", lambda x, w: matmul(x, w, Gemm(accumulator=Accumulator("fp16"))), x, w),
        "dot_general": lambda: lowered_for(
            "tpu", lambda x, w: qjax.dot_general(x, w, dims, recipe=qjax.Recipe(gemm)), x, w
        ),
        "conv": lambda: lowered_for(
            "tpu",
            lambda x, w: qjax.conv_general_dilated(x, w, (1,), "SAME", recipe=qjax.Recipe(gemm)),
            few_bits(0, 2, 32, 16),
            few_bits(1, 8, 32, 3),
        ),
    }[how]
    assert ("tpu_custom_call" in fn()) == (how not in ("plain", "xla", "float64"))


@NEW_ENOUGH
@pytest.mark.parametrize("platform", CALLS)
def test_on_several_devices_a_kernel_is_taken_within_shard_map(platform):
    x, w = few_bits(0, 64, 256), few_bits(1, 256, 16)
    gemm = Gemm(accumulator=Accumulator("fp16", chunk=64))
    call, device = CALLS[platform]
    mesh = AbstractMesh((8,), ("rows",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    product = lambda x, w: matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), gemm)  # noqa: E731
    assert call not in lowered_for(platform, product, x, w)
    split = jax.shard_map(product, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))
    assert call in lowered_for(platform, split, x, w, mesh=mesh)


SHAPES = r"matmul: shapes must be \(\.\.\., k\) and \(k, n\), got \(4, 32\) and \(4, 32\)"
WEIGHT = r"k_major: a weight has two axes, \(k, n\), got the shape \(32,\)"


def test_wrong_use_is_refused():
    x, w = few_bits(0, 4, 32), few_bits(1, 32, 3)
    q = qjax.encode(w, "mxfp4", axis=0)
    with pytest.raises(ValueError, match=r"must be one of 'reference', 'xla', 'pallas' or None, got 'c'"):
        matmul(x, w, implementation="c")
    with pytest.raises(ValueError, match=SHAPES):
        matmul(x, x)
    with pytest.raises(ValueError, match=r"matmul: rhs is a QTensor, and the Gemm rounds it again; leave its rhs out"):
        matmul(x, q, Gemm(rhs=Q("mxfp4")))
    with pytest.raises(ValueError, match=r"is stored in .* with blocks along axis 1; this product has them along"):
        matmul(x, qjax.encode(w, "mxfp4", axis=1))
    with pytest.raises(ValueError, match=r"matmul: the recipe is stochastic; give key="):
        matmul(x, w, Gemm(accumulator=Accumulator("fp16", "stochastic")))
    with pytest.raises(ValueError, match=WEIGHT):
        k_major(qjax.encode(w[:, 0], "mxfp4"))
    with pytest.raises(ValueError, match=r"k_major: blocks must lie along the first axis, .* along axis -1; encode"):
        k_major(qjax.encode(w, "mxfp4"))
    with pytest.raises(ValueError, match=r"k_major: blocks must lie along the first axis, .* no tiles"):
        k_major(qjax.encode(w, "e4m3_16x16"))


def test_a_named_kernel_that_cannot_run_says_why():
    x, w = few_bits(0, 4, 32), few_bits(1, 32, 3)
    pallas = functools.partial(matmul, implementation="pallas")
    with pytest.raises(
        NotImplementedError, match=r"'pallas' cannot run: the kernels are for TPUs and Hopper GPUs, and"
    ):
        pallas(x, w, Gemm(accumulator=Accumulator("fp16", chunk=16)))
    reason = "a chunk has at least 16 products"
    if jax.__version_info__ < (0, 11, 2):
        reason = r"the kernels need jax >= 0\.11\.2"
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=TPU)), pytest.raises(NotImplementedError, match=reason):
        jax.jit(lambda x, w: pallas(x, w, Gemm(accumulator=Accumulator("fp16")))).trace(x, w)


def test_tiles_are_those_of_the_first_row_that_fits(monkeypatch):
    rows = (
        {"device": "TPU v6", "kind": None, "most_rows": 16, "tiles": [32, 128, 256]},
        {"device": "TPU", "kind": "bfloat16 x bfloat16, rounded float32", "most_rows": None, "tiles": [64, 128, 256]},
    )
    x, fp16 = jnp.zeros((1, 16, 64), jnp.bfloat16), Accumulator("fp16", chunk=16)
    monkeypatch.setattr(_tiles, "table", lambda: rows)
    assert _tiles.tiles_for(x, x, fp16) is None
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=TPU)):
        assert _tiles.tiles_for(x, x, fp16) == (32, 128, 256)
        larger = jnp.zeros((1, 17, 64), jnp.bfloat16)
        assert _tiles.tiles_for(larger, x, fp16) == (64, 128, 256)
        assert _tiles.tiles_for(larger, x, Accumulator("fp32", chunk=16)) is None


def test_the_table_of_tiles_is_in_order():
    kinds = {_tiles.kind_of(*case.operands(1, 1, 256)[:2], case.accumulator) for case in CASES}
    assert len(kinds) > 10
    for row in _tiles.table():
        assert set(row) == {"device", "kind", "most_rows", "tiles", "measured"}
        assert row["kind"] in {None, *kinds}


def test_the_target_is_the_default_device():
    platforms = []
    for device in (None, "cpu", jax.devices()[1]):
        with jax.default_device(device):
            platforms.append(_target.Target.current().platform)
    assert platforms == ["cpu"] * 3
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=HOPPER)):
        assert _target.Target.current().is_hopper
