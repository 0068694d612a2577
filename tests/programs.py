"""What the tests of whole programs share: recipes, and equality of trees bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxprs_in_params

import qjax

EXACT, E4M3, DRAWN = (qjax.Quantizer(*args) for args in (("fp32",), ("e4m3",), ("e4m3", "stochastic")))
# Quantized to float32 a float32 is itself: all is replaced, and nothing may change.
IDENTITY, RECIPE, STOCHASTIC = (qjax.Recipe(*3 * [qjax.Gemm(q, q)]) for q in (EXACT, E4M3, DRAWN))


def products(fn, *args) -> list:
    """Returns the equations of the products of a function, dots and convolutions, at any depth."""

    def of(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive in (lax.dot_general_p, lax.conv_general_dilated_p):
                yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from of(inner)

    return list(of(jax.make_jaxpr(fn)(*args).jaxpr))


def bits(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def same(a, b) -> bool:
    """Whether two trees have the same bits, dtypes, weak types and structure."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype
        and getattr(x, "weak_type", False) == getattr(y, "weak_type", False)
        and np.array_equal(bits(x), bits(y), equal_nan=not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))
        for x, y in leaves
    )


def close(a, b) -> bool:
    """Whether two trees are equal up to what XLA changes when it fuses the operations around a product differently."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.allclose(bits(x), bits(y), rtol=1e-4, atol=1e-5) for x, y in leaves
    )


# Most of the time of a test is compilation.
FAST = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)


def text(f, *args) -> list[str]:
    """Returns the operations of a call, without the names of variables: what has the same ones computes the same bits.

    Sorted, for the independent operations of a backward pass may come in another order (jax 0.12).
    """
    lines = re.sub(r" at 0x\w+", "", str(jax.make_jaxpr(f)(*args))).splitlines()
    return sorted(re.sub(r"\b[a-z]{1,2}\b", "", line).strip(" :") for line in lines)
