"""What XLA makes of the routes that are left to it on a Hopper GPU, compiled without one."""

import functools
import re

import crosscompile
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2) or not crosscompile.is_installed("h100"),
    reason="needs jax >= 0.11.2, jax-cuda13-plugin and jax-cuda13-pjrt",
)

S = functools.partial(jax.ShapeDtypeStruct, (1024, 1024))
HIGHEST = jax.lax.Precision.HIGHEST


def product(x, y):
    total = np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else np.float32
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=HIGHEST, preferred_element_type=total)


def quantized(name: str):
    return functools.partial(qjax.kernels.matmul, gemm=qjax.Gemm(qjax.Quantizer(name), qjax.Quantizer(name)))


def stochastic(x, words):
    return qjax.chop(x, "e4m3", "stochastic", key=jax.random.wrap_key_data(words))


CUBLAS, FP8 = "__cublas$lt$matmul", "__cublas$lt$matmul$f8"
# Each with the library's function that multiplies, if any, and how many other kernels XLA makes, None if transposes
# that its layouts need are among them.
ROUTES = {
    "bfloat16": (product, (S("bfloat16"), S("bfloat16")), CUBLAS, 0),
    "int8": (product, (S("int8"), S("int8")), CUBLAS, 0),
    "e4m3": (product, (S("float8_e4m3fn"), S("float8_e4m3fn")), FP8, 0),
    "int8 weights": (lambda x, w: product(x, w.astype(x.dtype)), (S("bfloat16"), S("int8")), CUBLAS, 1),
    "chop": (lambda x: qjax.chop(x, "e4m3"), (S("float32"),), None, 1),
    "stochastic chop": (stochastic, (S("float32"), jax.ShapeDtypeStruct((2,), np.uint32)), None, 2),
    "mxfp4 chop": (lambda x: qjax.chop(x, "mxfp4"), (S("float32"),), None, 3),
    "quantized to e4m3": (quantized("e4m3"), (S("float32"), S("float32")), CUBLAS, 2),
    "quantized to int8": (quantized("int8_tensor"), (S("float32"), S("float32")), CUBLAS, None),
}


def cases():
    return {name: (function, shapes) for name, (function, shapes, _, _) in ROUTES.items()}


@functools.cache
def compiled() -> dict:
    return crosscompile.compiled("h100-libraries", "test_kernels_xla:cases")


@pytest.mark.parametrize("name", ROUTES)
def test_routes(name):
    report = compiled()[name]
    assert "error" not in report, report["error"]
    entry = report["hlo"][report["hlo"].index("ENTRY") :]
    library, kernels = ROUTES[name][2:]
    assert re.findall(r'custom_call_target="(\S+)"', entry) == ([library] if library else [])
    if name == "quantized to int8":
        assert "s8[1024,1024]" in entry and "bf16" not in entry
    assert kernels is None or len(re.findall(r" fusion\(", entry)) == kernels, entry
