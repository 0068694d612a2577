"""The annotations of the public functions hold: beartype checks arguments and results, shapes and dtypes included."""

import beartype
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import jaxtyped

import qjax

chop, encode, decode = (jaxtyped(f, typechecker=beartype.beartype) for f in (qjax.chop, qjax.encode, qjax.decode))
KEY = jax.random.key(0)

CALLS = {
    "float32": lambda: chop(jnp.ones((2, 3), jnp.float32), "e4m3"),
    "bfloat16 and a scalar": lambda: chop(jnp.bfloat16(1), qjax.MXFP4),
    "complex": lambda: chop(jnp.ones(3, jnp.complex64), "fp16", qjax.Rounding.TO_ODD),
    "NumPy": lambda: chop(np.ones(3, np.float32), "q8.8"),
    "Python": lambda: chop(0.1, "posit8"),
    "a key": lambda: chop(jnp.ones((2, 3), jnp.float32), "e4m3", "stochastic", key=KEY, random_bits=8),
    "words": lambda: chop(jnp.ones(3, jnp.float32), "e4m3", "stochastic", random_bits=jnp.ones(3, jnp.uint8)),
    "a scale": lambda: chop(jnp.ones((2, 3), jnp.float32), "mxfp4", scale=jnp.ones((2, 1), jnp.float32)),
    "traced": lambda: jax.jit(lambda x, s: chop(x, "mxfp4", scale=s))(jnp.ones(3, jnp.float32), jnp.float32(1)),
    "encode": lambda: decode(encode(jnp.ones((2, 3), jnp.float32), "nvfp4", axis=0)),
    "encode, stochastic": lambda: encode(jnp.ones(3, jnp.float32), "int8", "stochastic", key=KEY),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_match_their_annotations(call):
    CALLS[call]()


def test_a_wrong_call_does_not():
    with pytest.raises(Exception, match="rounding"):
        chop(jnp.ones(3, jnp.float32), "e4m3", "nearest")
