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
