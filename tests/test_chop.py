"""Law 1: chop is correctly rounded, once, for every format, mode and carrier."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tables import CARRIERS, FLOATS, critical, every, finfo, same_bits

import qjax


@pytest.mark.parametrize("rounding", oracle.DETERMINISTIC, ids=lambda r: r.value)
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", CARRIERS)
def test_floats(dtype, name, rounding):
    fmt = qjax.format(name)
    exact = fmt.bits > 19 or fmt.exponent_bits > 10
    x = every(dtype)
    x = np.concatenate([x[:: 97 if exact else 1], critical(fmt, dtype)[:: 17 if exact else 1]])
    with jax.enable_x64(dtype == "float64"):
        expected = oracle.round_float(x, fmt, rounding, finfo(dtype), exact=exact)
        same_bits(qjax.chop(jnp.asarray(x), fmt, rounding), expected, x)
