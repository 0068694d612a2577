"""MX and NVFP4 against codes and scales of torchao and TransformerEngine, bit for bit (see vectors/generate.py)."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import qjax

HERE = pathlib.Path(__file__).parent / "vectors"
MX, NVFP4 = (json.loads((HERE / f"{name}.json").read_text()) for name in ("mx", "nvfp4"))

# Where qjax differs: the rows, and why.
DIFFERENT = {
    # The scale is 2^-127, a float32 subnormal: torchao divides by 2^-126 instead (by 1 in "rceil"), yet stores the
    # code of 2^-127, so it decodes to half of x, or to nothing. qjax rounds x on the grid of the scale it stores.
    ("torchao", "e5m2", "floor"): [0],
    ("torchao", "e5m2", "ceil"): [0],
    ("torchao", "e5m2", "even"): [0],
    # The maximum is the number after 1.75 times a power of two: torchao takes the ceiling of a float32 logarithm, in
    # which the difference is lost, and saturates. qjax and TransformerEngine decide on the bits.
    ("torchao", "e5m2", "rceil"): [0, 15],
    ("torchao", "e4m3", "rceil"): [15],
}


def numbers(text: str, dtype: str, shape) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), dtype).reshape(shape)


@pytest.mark.parametrize("case", MX["cases"], ids=lambda c: f"{c['stack']}-{c['element']}-{c['rule']}")
def test_mx(case):
    x = numbers(MX["x"], "<f4", MX["shape"])
    fmt = qjax.Scaled(qjax.format(case["element"]), qjax.E8M0, 32, rule=case["rule"])
    q = qjax.encode(jnp.asarray(x), fmt)
    same = np.asarray(q.scales[0].codes) == numbers(case["scales"], "u1", (len(x), 1))
    same &= (np.asarray(q.unpacked()) == numbers(case["codes"], "u1", x.shape)).all(axis=1, keepdims=True)
    assert np.flatnonzero(~same).tolist() == DIFFERENT.get((case["stack"], case["element"], case["rule"]), [])


@pytest.mark.parametrize("stack", ["torchao", "TransformerEngine"])
@pytest.mark.parametrize("case", NVFP4["cases"], ids=lambda c: c["tensor_scale"])
def test_nvfp4(case, stack):
    """qjax has TransformerEngine's numbers, also with tensor scales that are no powers of two.

    torchao raises block scales below 2^-6, the smallest normal number of E4M3, to it: a block of zeros has the scale
    2^-6, and small blocks lose up to 3 bits. qjax and TransformerEngine use the subnormals of E4M3, and 0.
    """
    x = numbers(case["x"], "<f4", case["shape"])
    q = qjax.encode(jnp.asarray(x), "nvfp4")
    assert np.array_equal(np.ravel(q.scales[0].codes), numbers(case["tensor_scale"], "<u4", 1))
    scales, codes = np.asarray(q.scales[1].codes), np.asarray(q.unpacked())
    theirs = numbers(case[stack]["scales"], "u1", scales.shape)
    raised = np.zeros(scales.shape, bool)
    if stack == "torchao":
        raised = scales < 8
        assert raised.sum() == 2 and (theirs[raised] == 8).all()
    assert np.array_equal(scales[~raised], theirs[~raised])
    same = codes.reshape(*scales.shape, 16) == numbers(case[stack]["codes"], "u1", (*scales.shape, 16))
    assert same[~raised].all() and (stack != "torchao" or not same[3, 1].all())
