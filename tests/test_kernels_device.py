"""The kernels on a device that has them: ``pytest -m gpu tests``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import bits

import qjax
from qjax import Gemm, Quantizer
from qjax._kernels import _reference
from qjax._kernels._accumulate import accumulate, kernels_for
from qjax._kernels._cases import CASES
from qjax._kernels._operands import carried
from qjax.kernels import k_major, matmul

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device():
    if jax.default_backend() == "cpu":
        pytest.skip("needs a GPU or a TPU")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", [(2, 200, 300, 1100), (1, 16, 1024, 2048)], ids=str)
def test_the_bits_of_the_reference(case, shape):
    batch, m, n, k = shape
    lhs, rhs, options = case.operands(m, n, k, batch=batch, exact=True)
    reason = kernels_for(lhs, rhs, case.accumulator, options.get("scales"))
    if isinstance(reason, str):
        pytest.skip(reason)
    arrays = carried(lhs, rhs)
    out = accumulate(*arrays, case.accumulator, made=lambda: (lhs, rhs), implementation="pallas", **options)
    wanted = _reference.accumulate(*arrays, case.accumulator, **options)
    if np.any(apart := case.apart(lhs, rhs, **options)):
        assert (np.abs(out - wanted) <= apart).all()
    else:
        # The bits of a NaN are those of the operation that made it.
        np.testing.assert_array_equal(*(bits(np.where(np.isnan(z), np.float32(np.nan), z)) for z in (out, wanted)))


FORMATS = ("e4m3", "q4.4", "nf4", "mxfp4", "nvfp4", "int8_channel", "uint4_g32", "e4m3_128x128", "dynamic8")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_chop_has_the_bits_of_the_cpu(fmt, rounding):
    x = np.random.default_rng(0).standard_normal((256, 512), np.float32)
    key = jax.random.key(1) if rounding == "stochastic" else None
    chop = jax.jit(lambda x: qjax.chop(x, fmt, rounding, key=key))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = chop(x)
    np.testing.assert_array_equal(bits(chop(x)), bits(wanted))


@pytest.mark.parametrize("shape", [(3, 5, 40), (4, 4, 15), (1, 7, 9), (64, 64, 63), (100, 70, 1500)], ids=str)
@pytest.mark.parametrize("fmt", ["int8", "bf16"])
def test_small_products_are_exact(fmt, shape):
    (m, n, k), random = shape, np.random.default_rng(0)
    x, w = (random.integers(-127, 128, size).astype(np.float32) for size in ((m, k), (k, n)))
    recipe = qjax.Recipe(Gemm(Quantizer(fmt), Quantizer(fmt)))
    out = qjax.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe)
    np.testing.assert_array_equal(out, x.astype(np.float64) @ w)


def test_stored_weights_serve_from_their_codes():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.integers(-7, 8, (16, 512)), jnp.bfloat16)
    w = jnp.asarray(random.integers(-7, 8, (512, 256)), jnp.float32).at[::16].set(7)
    q = k_major(qjax.encode(w, "int4_g128", axis=0))
    wanted = matmul(
        x, w, Gemm(rhs=Quantizer("int4_g128")), implementation="reference", preferred_element_type=np.float32
    )
    for implementation in ("xla", "pallas", None):
        out = matmul(x, q, implementation=implementation, preferred_element_type=np.float32)
        np.testing.assert_array_equal(bits(out), bits(wanted))
