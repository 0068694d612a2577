"""The kernels for Hopper GPUs: bits in the interpreter, lowering, and the instructions that they compile to."""

import functools
import re

import crosscompile
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Accumulator, Fixed

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernels need jax >= 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax._kernels import _gpu, _gpu_plan, _reference

BF16, F16, E4M3, E5M2 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"))
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
KEY = jax.random.key(7)


def wrapping(bits: int) -> Fixed:
    return Fixed(bits, overflow="wrap")


def drawn(shape, dtype, high: int, power: int = 0):
    """Returns operands ``(b, m, k)`` and ``(b, n, k)``: integers below ``high`` times powers of two."""
    b, m, n, k = shape
    rng = np.random.default_rng(k)
    numbers = (rng.integers(-high, high, (b, r, k)) * 2.0 ** rng.integers(-power, power + 1, (b, r, k)) for r in (m, n))
    return [jnp.asarray(x, dtype) for x in numbers]


def assert_equals_reference(lhs, rhs, accumulator, *, scaled=False, **options):
    scales = None
    if scaled:
        rng, segments = np.random.default_rng(1), _reference.divided(accumulator, lhs.shape[-1])[2]
        scales = tuple(jnp.asarray(rng.normal(size=(*x.shape[:2], segments)), jnp.float32) for x in (lhs, rhs))
    key = KEY if accumulator.is_stochastic else None
    ours = _gpu.accumulate(lhs, rhs, accumulator, key=key, scales=scales, interpret=INTERPRET, **options)
    theirs = _reference.accumulate(lhs, rhs, accumulator, key=key, scales=scales)
    assert np.array_equal(np.asarray(ours).view(np.uint32), np.asarray(theirs).view(np.uint32))


# Sums of chunks have at most 24 bits, whatever their order.
@pytest.mark.parametrize(
    ("dtype", "accumulator", "depth"),
    [
        (BF16, Accumulator("fp16", chunk=16), 40),
        (F16, Accumulator("e5m2", "to_odd", chunk=48, promote=96, saturate=True), 200),
        (E4M3, Accumulator("bf16", chunk=128), 200),
        (E5M2, Accumulator("fp16", chunk=16), 40),
        (BF16, Accumulator("e5m2", chunk=256, promote=512), 1030),
        (BF16, Accumulator("e5m2", "stochastic", chunk=64), 150),
        (BF16, Accumulator("fp16", "stochastic_c", chunk=64, promote=64), 150),
        (np.int8, Accumulator("bf16", chunk=32), 70),
    ],
    ids=str,
)
def test_float_registers(dtype, accumulator, depth):
    """Rows, columns and depth are not whole tiles."""
    assert_equals_reference(*drawn((2, 70, 30, depth), dtype, 8, power=1 if dtype == BF16 else 0), accumulator)


@pytest.mark.parametrize("dtype", [E4M3, np.int8, BF16], ids=str)
def test_scales_of_segments(dtype):
    lhs, rhs = drawn((2, 70, 30, 300), dtype, 8)
    assert_equals_reference(lhs, rhs, Accumulator("fp32", chunk=128, promote=128), scaled=True)


@pytest.mark.parametrize("depth", [500, 100])
def test_scales_of_several_chunks_and_of_all(depth):
    lhs, rhs = drawn((1, 70, 30, depth), BF16, 8)
    assert_equals_reference(lhs, rhs, Accumulator("e5m2", chunk=64, promote=128), scaled=True)


def test_two_formats_of_eight_bits():
    lhs, rhs = drawn((1, 64, 64, 64), E4M3, 8)
    assert_equals_reference(lhs, rhs.astype(E5M2), Accumulator("e5m2", chunk=32))


@pytest.mark.parametrize(
    "accumulator",
    [
        Accumulator(wrapping(32)),
        Accumulator(wrapping(12), promote=64),
        Accumulator("int16", chunk=32),
        Accumulator(wrapping(16), chunk=32, promote=64, detect=True),
        Accumulator("int8", chunk=16, detect=True),
    ],
    ids=str,
)
def test_integer_registers(accumulator):
    assert_equals_reference(*drawn((1, 70, 30, 200), np.int8, 128), accumulator)


@pytest.mark.parametrize(
    "accumulator",
    [
        Accumulator(wrapping(32)),
        Accumulator(wrapping(20), promote=128),
        Accumulator("int32", chunk=32),
        Accumulator(wrapping(32), chunk=64, promote=128, detect=True),
    ],
    ids=str,
)
def test_integers_of_sixteen_bits(accumulator):
    """All of int16, so that most sums overflow 32 bits."""
    lhs, rhs = drawn((1, 70, 30, 300), np.int16, 2**15)
    exact = np.asarray(lhs, np.int64)[0] @ np.asarray(rhs, np.int64)[0].T
    assert (np.abs(exact) >= 2**31).mean() > 0.4
    assert_equals_reference(lhs, rhs, accumulator, scaled=accumulator.promote is not None)


def test_any_tiles_give_the_same_bits():
    lhs, rhs = drawn((1, 70, 40, 130), BF16, 8, power=1)
    accumulator = Accumulator("fp16", "stochastic", chunk=64)
    for tiles in (_gpu_plan.Tiles(1, 32, 32, 2), _gpu_plan.Tiles(3, 96, 64, 5)):
        assert_equals_reference(lhs, rhs, accumulator, tiles=tiles)


def test_empty_operands():
    empty = jnp.zeros((1, 0, 64), jnp.bfloat16)
    assert _gpu.accumulate(empty, jnp.zeros((1, 3, 64), jnp.bfloat16), Accumulator("fp16", chunk=16)).shape == (1, 0, 3)
    nothing = jnp.zeros((1, 3, 0), jnp.bfloat16)
    assert_equals_reference(nothing, nothing, Accumulator("fp16", chunk=16))


S = jax.ShapeDtypeStruct


def operands(lhs, rhs=None, depth: int = 512):
    return S((1, 256, depth), lhs), S((1, 256, depth), rhs or lhs)


@pytest.mark.parametrize(
    ("lhs", "rhs", "accumulator", "reason"),
    [
        (np.float32, None, Accumulator("fp16", chunk=16), "float32 operands to TF32"),
        (np.uint8, None, Accumulator("int32", chunk=32), "read uint8 operands as signed"),
        (np.int32, None, Accumulator("int32", chunk=32), "take no int32 operands"),
        (BF16, F16, Accumulator("fp16", chunk=16), "the operands are bfloat16 and float16"),
        (np.int8, E4M3, Accumulator("fp16", chunk=32), "the operands are int8 and float8_e4m3fn"),
        (BF16, None, Accumulator("int32", chunk=16), "a Fixed register sums integers"),
        (np.int16, None, Accumulator("fp16", chunk=32), "int16 operands need a Fixed register"),
        (BF16, None, Accumulator("fp16", chunk=8), "sum 16 products at a time, and chunk is 8; take a multiple of 16"),
        (np.int16, None, Accumulator("int32", chunk=16), "summed 32 at a time, and chunk is 16; take a multiple of 32"),
    ],
    ids=str,
)
def test_what_the_kernels_refuse(lhs, rhs, accumulator, reason):
    assert reason in _gpu.unsuited(*operands(lhs, rhs), accumulator)


def test_they_refuse_more_counters_than_random_words_have():
    lhs, rhs = S((2, 2**16, 64), BF16), S((2, 2**16, 64), BF16)
    assert "in 32 bits" in _gpu.unsuited(lhs, rhs, Accumulator("fp16", "stochastic", chunk=16))


def test_they_refuse_other_devices():
    assert "need a Hopper GPU (H100, H200), and this is" in _gpu.refusal(*operands(BF16), Accumulator("fp16", chunk=16))


def case(lhs, rhs, accumulator, scaled=False):
    """Returns a function and its shapes, for the compiler."""
    segments = _reference.divided(accumulator, 512)[2]
    shapes = [*operands(lhs, rhs), *((S((1, 256, segments), np.float32),) * 2 if scaled else ())]

    def function(x, y, *scales):
        assert _gpu.refusal(x, y, accumulator) is None
        return _gpu.accumulate(x, y, accumulator, key=KEY if accumulator.is_stochastic else None, scales=scales or None)

    return function, shapes


CASES = {
    "bf16, chunk 64": (case(BF16, BF16, Accumulator("bf16", chunk=64)), "f32.bf16.bf16"),
    "f16, chunk 16": (case(F16, F16, Accumulator("fp16", chunk=16)), "f32.f16.f16"),
    "e4m3, chunk 128": (case(E4M3, E4M3, Accumulator("e5m2", "to_odd", chunk=128)), "f32.e4m3.e4m3"),
    "chunk 256": (case(BF16, BF16, Accumulator(qjax.Float(8, 13), chunk=256, promote=512)), "f32.bf16.bf16"),
    "stochastic": (case(BF16, BF16, Accumulator("e5m2", "stochastic", chunk=64, promote=128), True), "f32.bf16.bf16"),
    "fp8 scales": (case(E4M3, E5M2, Accumulator("fp32", chunk=128, promote=128), True), "f32.e4m3.e5m2"),
    "int8 scales": (case(np.int8, np.int8, Accumulator("fp32", chunk=128, promote=128), True), "s32.s8.s8"),
    "int8 wraps": (case(np.int8, np.int8, Accumulator(wrapping(32))), "s32.s8.s8"),
    "int8 saturates": (case(np.int8, np.int8, Accumulator("int16", chunk=32, detect=True)), "s32.s8.s8"),
    "int16 wraps": (case(np.int16, np.int16, Accumulator(wrapping(32))), "s32.s8.s8"),
    "int16 scales": (case(np.int16, np.int16, Accumulator(wrapping(32), promote=256), True), "s32.s8.s8"),
    "int16 saturates": (case(np.int16, np.int16, Accumulator("int32", chunk=64, promote=128)), "s32.s8.s8"),
}


def cases():
    return {name: compiled for name, (compiled, _) in CASES.items()}


def test_lowering():
    """That needs no compiler but jax's own."""
    for name in ("bf16, chunk 64", "int16 saturates"):
        function, shapes = CASES[name][0]
        assert "mosaic_gpu_v2" in crosscompile.lowered("h100", function, *shapes).as_text()


def test_vmap_is_an_axis_of_the_grid():
    function, shapes = CASES["bf16, chunk 64"][0]
    stacked = [S((3, *s.shape), s.dtype) for s in shapes]
    assert crosscompile.lowered("h100", jax.vmap(function), *stacked).as_text().count("mosaic_gpu_v2") == 1


@functools.cache
def compiled():
    return crosscompile.compiled("h100", "test_kernels_gpu:cases")


@pytest.mark.skipif(not crosscompile.is_installed("h100"), reason="needs jax-cuda13-plugin and jax-cuda13-pjrt")
@pytest.mark.parametrize("name", CASES)
def test_instructions(name):
    """The tensor cores multiply what they are meant to, no sum is contracted, and no register goes to memory."""
    report = compiled()[name]
    assert "error" not in report, report["error"]
    (ptx,), (ptxas,) = (
        [text for file, text in report["dumped"].items() if file.endswith(end)] for end in (".ptx", "s")
    )
    types = CASES[name][1]
    products = re.findall(r"wgmma\.mma_async\S+m64n\d+k\d+\.(\S+)", ptx)
    assert products and set(products) == {types}
    assert "fma." not in ptx
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in ptxas, ptxas
