"""The Mosaic kernel for TPUs: the bits of the reference in the interpreter, and compiled for three generations."""

import functools

import crosscompile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import bits

from qjax import Accumulator, Fixed, Float, format
from qjax._kernels import _reference
from qjax._kernels._cases import CASES
from qjax._kernels._operands import Coded, carried

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernels need jax >= 0.11.2", allow_module_level=True)

from jax.experimental.pallas import tpu as pltpu

from qjax._kernels import _tpu

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SMALL = _tpu.Tiles(32, 128, 256)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_bits_of_the_reference(case):
    """Several tiles each way, the last ones partial, two in the batch."""
    lhs, rhs, options = case.operands(40, 150, 600, batch=2, exact=True)
    out = _tpu.accumulate(lhs, rhs, case.accumulator, tiles=SMALL, interpret=INTERPRET, **options)
    wanted = _reference.accumulate(*carried(lhs, rhs), case.accumulator, **options)
    assert len(np.unique(wanted)) > 10
    if np.any(apart := case.apart(lhs, rhs, **options)):
        assert (np.abs(out - wanted) <= apart).all()
    else:
        np.testing.assert_array_equal(bits(out), bits(wanted))


def test_registers_overflow_in_the_cases():
    """The tables' operands reach what they are there for."""
    for case in CASES:
        if not isinstance(case.accumulator.fmt, Fixed) or case.accumulator.promote:
            continue
        lhs, rhs, _ = case.operands(8, 8, 600)
        exact = np.einsum("bmk,bnk->bmn", *(np.asarray(x, np.int64) for x in (lhs, rhs)))
        assert (np.abs(exact) > case.accumulator.fmt.max_integer).any()


def test_empty_operands():
    register, none = Accumulator("fp16", chunk=16), jnp.zeros((1, 3, 0), jnp.bfloat16)
    assert _tpu.accumulate(jnp.zeros((1, 0, 64), jnp.bfloat16), jnp.zeros((1, 3, 64), jnp.bfloat16), register).size == 0
    out = _tpu.accumulate(none, none, register, interpret=INTERPRET)
    np.testing.assert_array_equal(bits(out), bits(jnp.zeros((1, 3, 3), jnp.float32)))


FLOATS = [c for c in CASES if isinstance(c.accumulator.fmt, Float) and c.letter in "ae" and "64" in c.name]


@pytest.mark.parametrize("case", FLOATS, ids=lambda case: case.name)
def test_within_the_bound_on_normal_numbers(case):
    lhs, rhs, options = case.operands(16, 40, 300)
    out = _tpu.accumulate(lhs, rhs, case.accumulator, tiles=SMALL, interpret=INTERPRET, **options)
    wanted = _reference.accumulate(*carried(lhs, rhs), case.accumulator, **options)
    assert (np.abs(np.float64(out) - np.float64(wanted)) <= case.bound(lhs, rhs)).all()


def test_what_the_kernel_does_not_take():
    x = jnp.ones((1, 8, 256), jnp.bfloat16)
    refusal = _tpu.refusal
    fp16 = Accumulator("fp16", chunk=64)
    assert refusal(x, x, fp16) is None
    assert "chunk has at least 16 products, got chunk=8" in refusal(x, x, Accumulator("fp16", chunk=8))
    odd = Accumulator("fp16", chunk=333, promote=999)
    assert "chunk=333 and promote=999 have no common multiple with 128 below" in refusal(x, x, odd)
    assert "lhs is int8; for the register Float(5, 10) it must be one of float32, bfloat16" in refusal(
        x.astype(jnp.int8), x, fp16
    )
    assert "rhs is uint8; for the register Fixed(32) it must be one of int8, int16" in refusal(
        x.astype(jnp.int8), x.astype(jnp.uint8), Accumulator(Fixed(32, 0))
    )

    x8 = x.astype(jnp.int8)
    mixed = refusal(x8, x.astype(jnp.int16), Accumulator(Fixed(32), chunk=16))
    assert "the operands are int8 and int16; take one dtype, or two of 8-bit floats" in mixed
    assert refusal(x.astype(jnp.float8_e4m3fn), x.astype(jnp.float8_e5m2), fp16) is None
    many = jax.ShapeDtypeStruct((1, 2**16, 64), jnp.bfloat16)
    assert "random bits are counted in 32 bits" in refusal(many, many, Accumulator("fp16", "stochastic", chunk=16))
    codes = Coded(jnp.zeros((1, 8, 96), jnp.uint8), format("e3m2"))
    assert "codes of 4 or 8 bits are decoded in the kernel, got Float(3, 2" in refusal(x, codes, fp16)


def cases() -> dict:
    """Returns every case and shape as a function of shapes, for the compiler."""

    def function(case, lhs, rhs, scales, words):
        key = None if words is None else jax.random.wrap_key_data(words)
        assert _tpu.refusal(lhs, rhs, case.accumulator) is None
        return _tpu.accumulate(lhs, rhs, case.accumulator, key=key, scales=scales)

    def shapes(case, shape):
        lhs, rhs, options = jax.eval_shape(lambda: case.operands(*shape))
        words = jax.ShapeDtypeStruct((2,), np.uint32) if "key" in options else None
        return lhs, rhs, options.get("scales"), words

    return {
        f"{case.name} {shape}": (functools.partial(function, case), shapes(case, shape)) for case, shape in COMPILED
    }


def first_shapes() -> dict:
    """Returns every case in one shape."""
    firsts = {f"{case.name} {case.shapes[0]}" for case in CASES}
    return {name: case for name, case in cases().items() if name in firsts}


COMPILED = [(case, shape) for case in CASES for shape in case.shapes] + [(CASES[2], (512, 512, 2048))]  # whole tiles
LOWERED = [f"{case.name} {shape}" for case, shape in COMPILED]


@pytest.mark.parametrize("name", LOWERED if not crosscompile.is_installed("v5e") else LOWERED[::7])
def test_lowering(name):
    """That needs no compiler but jax's own: all where there is no other, which lowers them too."""
    function, shapes = cases()[name]
    assert "tpu_custom_call" in crosscompile.lowered("v6e", function, *shapes).as_text()


def test_vmap_is_an_axis_of_the_grid():
    function, shapes = cases()[LOWERED[0]]
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((3, *s.shape), s.dtype), shapes)
    assert crosscompile.lowered("v6e", jax.vmap(function), *stacked).as_text().count("tpu_custom_call") == 1


@pytest.mark.skipif(not crosscompile.is_installed("v5e"), reason="needs libtpu")
@pytest.mark.parametrize("target, chosen", [("v6e", cases), ("v5e", first_shapes), ("tpu7x", first_shapes)])
def test_every_case_compiles(target, chosen):
    reports = crosscompile.compiled(target, f"test_kernels_tpu:{chosen.__name__}")
    assert set(reports) == set(chosen())
    assert not {name: report["error"] for name, report in reports.items() if "error" in report}
    assert all("tpu_custom_call" in report["hlo"] for report in reports.values())
