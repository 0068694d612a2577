"""The kernels for Hopper GPUs: bits in the interpreter, lowering, and the instructions that they compile to."""

import functools
import re

import crosscompile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import bits

import qjax
from qjax import Accumulator, Fixed, Quantizer

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernels need jax >= 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax._kernels import _gpu, _gpu_codes, _gpu_plan, _reference
from qjax._kernels._cases import CASES, Case
from qjax._kernels._operands import Coded, Unrounded, carried, decoded

BF16, F16, E4M3, E5M2 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"))
INTERPRET = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


def wrapping(count: int) -> Fixed:
    return Fixed(count, overflow="wrap")


def in_reach(lhs, rhs):
    """Returns operands with float32 ones, which the kernels refuse, as bfloat16 beside what is made in the kernel."""
    return (lhs, rhs.astype(BF16)) if isinstance(lhs, Unrounded) else (lhs, rhs)


def assert_is_the_reference(case: Case, shape, **options):
    batch, m, n, k = shape
    lhs, rhs, given = case.operands(m, n, k, batch=batch, exact=True)
    lhs, rhs = in_reach(lhs, rhs)
    assert _gpu.unsuited(lhs, rhs, case.accumulator) is None
    ours = _gpu.accumulate(lhs, rhs, case.accumulator, interpret=INTERPRET, **given, **options)
    theirs = _reference.accumulate(*carried(lhs, rhs), case.accumulator, **given)
    assert len(np.unique(theirs)) > 10
    if np.any(apart := case.apart(lhs, rhs, **given)):
        assert (np.abs(ours - theirs) <= apart).all()
    else:
        np.testing.assert_array_equal(bits(ours), bits(theirs))


REFUSED = [case for case in CASES if case.dtype == "float32" and case.chop is None]
TAKEN = [case for case in CASES if case not in REFUSED]


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_the_bits_of_the_reference(case):
    """Rows, columns and depth are not whole tiles."""
    assert_is_the_reference(case, (1, 70, 30, 300))


# Sums of chunks have at most 24 bits, whatever their order.
@pytest.mark.parametrize(
    ("dtype", "accumulator", "depth"),
    [
        ("float16", Accumulator("e5m2", "to_odd", chunk=48, promote=96, saturate=True), 200),
        ("float8_e5m2", Accumulator("fp16", chunk=16), 40),
        ("bfloat16", Accumulator(qjax.Float(8, 13), chunk=256, promote=512), 1030),
        ("bfloat16", Accumulator("e5m2", chunk=64, promote=128), 100),
        ("bfloat16", Accumulator("e5m2", "stochastic", chunk=256), 70),
        ("bfloat16", Accumulator("fp16", "stochastic_c", chunk=64, promote=64), 150),
        ("int8", Accumulator("bf16", chunk=32), 70),
        ("int8", Accumulator("fp32", chunk=128, promote=128), 300),
        ("int8", Accumulator("int16", chunk=16, detect=True), 100),
        ("int8", Accumulator(wrapping(12), promote=64), 200),
        ("int16", Accumulator(wrapping(32), chunk=32, promote=64, detect=True), 150),
    ],
    ids=str,
)
def test_other_divisions_of_the_contraction(dtype, accumulator, depth):
    assert_is_the_reference(Case("", dtype, accumulator), (2, 66, 10, depth))


@pytest.mark.parametrize("fmt", ["e3m0", "q1.3", "e5m2", qjax.Codebook(tuple(range(9)), first_code=3)], ids=str)
def test_other_codes(fmt):
    """Depths that zeros pad, in groups as short as codes allow."""
    assert_is_the_reference(Case("", BF16, Accumulator("fp32", chunk=32, promote=32), weights=fmt), (2, 3, 70, 80))


@pytest.mark.parametrize("fmt", ["int4", "uint4", "e2m1", "nf4", "e1m2", "e3m0", "int4_codebook"])
def test_every_code_of_four_bits(fmt):
    """The terms in bfloat16 add up to the value, whichever way they are found."""
    fmt = qjax.Codebook(tuple(range(12))) if fmt == "int4_codebook" else qjax.format(fmt)
    codes = jnp.arange(16)
    terms = [*_gpu_codes.terms(codes.astype(jnp.int4), fmt)]
    total = sum(term.astype(jnp.float32) for term in terms)
    np.testing.assert_array_equal(total, decoded(codes.astype(jnp.uint32), fmt))
    assert len(terms) == (3 if fmt == qjax.format("nf4") else 1)


def test_any_tiles_give_the_same_bits():
    stochastic = Case("", "bfloat16", Accumulator("fp16", "stochastic", chunk=64))
    for tiles in (_gpu_plan.Tiles(1, 32, 32, 2), _gpu_plan.Tiles(3, 96, 64, 5)):
        assert_is_the_reference(stochastic, (1, 70, 40, 130), tiles=tiles)
    weights = Case("", "bfloat16", Accumulator("fp32", chunk=32, promote=32), weights="int4")
    for splits in (2, 3, 100):
        assert_is_the_reference(weights, (2, 4, 70, 330), tiles=_gpu_plan.Tiles(2, 8, 256, 4, splits))


def test_floats_beside_codes_are_rounded_too():
    case = Case("", "bfloat16", Accumulator("fp32", chunk=128), weights="int4")
    lhs, rhs, _ = case.operands(4, 64, 128, exact=True)
    lhs = Unrounded(lhs.astype(jnp.float32) * 1.1, Quantizer("e4m3"))
    ours = _gpu.accumulate(lhs, rhs, case.accumulator, interpret=INTERPRET)
    np.testing.assert_array_equal(ours, _reference.accumulate(*carried(lhs, rhs), case.accumulator))


@pytest.mark.parametrize("case", [c for c in CASES if c.letter == "a" and "64" in c.name and c.dtype == "bfloat16"])
def test_within_the_bound_on_normal_numbers(case):
    lhs, rhs, options = case.operands(16, 40, 300)
    out = _gpu.accumulate(lhs, rhs, case.accumulator, interpret=INTERPRET, **options)
    wanted = _reference.accumulate(*carried(lhs, rhs), case.accumulator, **options)
    assert (np.abs(np.float64(out) - np.float64(wanted)) <= case.bound(lhs, rhs)).all()


def test_empty_operands():
    empty, accumulator = jnp.zeros((1, 0, 64), BF16), Accumulator("fp16", chunk=16)
    assert _gpu.accumulate(empty, jnp.zeros((1, 3, 64), BF16), accumulator).shape == (1, 0, 3)
    nothing = jnp.zeros((1, 3, 0), BF16)
    assert not _gpu.accumulate(nothing, nothing, accumulator, interpret=INTERPRET).any()


S = jax.ShapeDtypeStruct


def operands(lhs, rhs=None, depth: int = 512):
    return S((1, 256, depth), lhs), S((1, 256, depth), rhs or lhs)


FP16 = Accumulator("fp16", chunk=64)


@pytest.mark.parametrize(
    ("lhs", "rhs", "accumulator", "reason"),
    [
        (np.float32, None, FP16, "float32 operands to TF32"),
        (np.uint8, None, Accumulator("int32", chunk=32), "read uint8 operands as signed"),
        (np.int32, None, Accumulator("int32", chunk=32), "take no int32 operands"),
        (BF16, F16, FP16, "the operands are bfloat16 and float16"),
        (np.int8, E4M3, FP16, "the operands are int8 and float8_e4m3fn"),
        (BF16, None, Accumulator("int32", chunk=16), "a Fixed register sums integers"),
        (np.int16, None, FP16, "int16 operands need a Fixed register"),
        (BF16, None, Accumulator("fp16", chunk=8), "sum 16 products of bfloat16 at a time, and chunk is 8"),
        (np.int16, None, Accumulator("int32", chunk=16), "sum 32 products of int16 at a time, and chunk is 16"),
    ],
    ids=str,
)
def test_what_the_kernels_refuse(lhs, rhs, accumulator, reason):
    assert reason in _gpu.unsuited(*operands(lhs, rhs), accumulator)


def test_what_they_do_not_make_in_registers():
    x, y = operands(BF16)
    codes = S((1, 256, 512), np.uint8)
    for fmt in ("uint8", "e4m3fnuz"):
        coded = Coded(codes, qjax.format(fmt))
        assert "are not decoded in the kernels for GPUs" in _gpu.unsuited(x, coded, FP16)
    coded = Coded(codes, qjax.format("int4"))
    assert "by bfloat16, and the other is float16" in _gpu.unsuited(S(x.shape, F16), coded, FP16)
    assert "sum 32 products" in _gpu.unsuited(S((1, 4, 1024), BF16), coded, Accumulator("fp16", chunk=16))
    assert "do not fit bfloat16" in _gpu.unsuited(Unrounded(x, Quantizer("fp16")), y, FP16)
    assert "the other is float32" in _gpu.unsuited(Unrounded(x, Quantizer("e4m3")), S(y.shape, np.float32), FP16)


def test_they_refuse_more_counters_than_random_words_have():
    lhs, rhs = S((2, 2**16, 64), BF16), S((2, 2**16, 64), BF16)
    assert "in 32 bits" in _gpu.unsuited(lhs, rhs, Accumulator("fp16", "stochastic", chunk=16))


def test_they_refuse_other_devices():
    assert "need a Hopper GPU (H100, H200), and this is" in _gpu.refusal(*operands(BF16), FP16)
    assert all("TF32" in _gpu.unsuited(*case.operands(8, 8, 64)[:2], case.accumulator) for case in REFUSED)


def compilable(case: Case, m: int = 256):
    """Returns a function and the shapes of its arguments."""
    shapes = jax.eval_shape(lambda: case.operands(m, 512, 1024))
    lhs, rhs, options = shapes
    if isinstance(lhs, Unrounded):
        rhs = S(rhs.shape, BF16)

    def function(lhs, rhs, options):
        assert _gpu.refusal(lhs, rhs, case.accumulator) is None
        key = jax.random.key(0) if case.accumulator.is_stochastic else None
        return _gpu.accumulate(lhs, rhs, case.accumulator, key=key, **options)

    return function, [lhs, rhs, {name: x for name, x in options.items() if name != "key"}]


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_lowering(case):
    """That needs no compiler but jax's own."""
    function, shapes = compilable(case)
    assert crosscompile.lowered("h100", function, *shapes).as_text().count("mosaic_gpu_v2") == 1


def test_vmap_is_an_axis_of_the_grid():
    function, shapes = compilable(TAKEN[0])
    stacked = jax.tree.map(lambda s: S((3, *s.shape), s.dtype), shapes)
    assert crosscompile.lowered("h100", jax.vmap(function), *stacked).as_text().count("mosaic_gpu_v2") == 1


TWO_LEVELS = Accumulator("fp32", chunk=128, promote=128)
# Those that hold most in registers, small batches, short groups, and two formats of 8 bits.
OTHERS = {
    "all arrays": compilable(Case("", "bfloat16", Accumulator(qjax.Float(8, 13), chunk=256, promote=512))),
    "all arrays, stochastic": compilable(
        Case("", "float8_e4m3fn", Accumulator("e5m6", "stochastic_b", chunk=32, promote=256))
    ),
    "all arrays of int16": compilable(
        Case("", "int16", Accumulator(wrapping(32), chunk=256, promote=512, detect=True))
    ),
    "int8 wraps": compilable(Case("", "int8", Accumulator(wrapping(32)))),
    "int8 x scales": compilable(Case("", "int8", TWO_LEVELS)),
    "one row": compilable(Case("", "bfloat16", TWO_LEVELS, weights="int4"), m=1),
    "64 rows": compilable(Case("", "bfloat16", TWO_LEVELS, weights="e2m1"), m=64),
    "groups of 32": compilable(Case("", "bfloat16", Accumulator("fp32", chunk=32, promote=32), weights="int4"), m=32),
    "fixed point": compilable(Case("", "bfloat16", Accumulator("bf16", chunk=64), chop="q3.4")),
}


def cases():
    return {case.name: compilable(case, m=16 if case.weights else 256) for case in TAKEN} | OTHERS


@functools.cache
def compiled():
    return crosscompile.compiled("h100", "test_kernels_gpu:cases")


TYPES = {
    "bfloat16": "f32.bf16.bf16",
    "float16": "f32.f16.f16",
    "float8_e4m3fn": "f32.e4m3.e4m3",
    "float8_e5m2": "f32.e5m2.e5m2",
    "int8": "s32.s8.s8",
    "int16": "s32.s8.s8",
}


@pytest.mark.skipif(not crosscompile.is_installed("h100"), reason="needs jax-cuda13-plugin and jax-cuda13-pjrt")
@pytest.mark.parametrize("name", [case.name for case in TAKEN] + list(OTHERS))
def test_instructions(name):
    """The tensor cores multiply what they are meant to, no sum is contracted, and no register goes to memory."""
    report = compiled()[name]
    assert "error" not in report, report["error"]
    files = report["dumped"].items()
    (ptx,), (ptxas,) = ([text for file, text in files if file.endswith(end)] for end in (".ptx", ".ptxas"))
    made = set(re.findall(r"wgmma\.mma_async\S+m64n\d+k\d+\.(\S+)", ptx))
    case = next((case for case in TAKEN if case.name == name), None)
    assert len(made) == 1 and made <= set(TYPES.values())
    assert case is None or made == {TYPES["bfloat16" if case.chop or case.weights else case.dtype]}
    assert "fma.rn.f32" not in ptx
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in ptxas, ptxas
    # Warpgroups that ask for more registers than the block was started with wait for them forever.
    (threads,), (started,) = re.findall(r"\.maxntid (\d+)", ptx), re.findall(r"Used (\d+) registers", ptxas)
    (copying,), (computing,) = (re.findall(rf"setmaxnreg\.{way}\S+ (\d+)", ptx) for way in ("dec", "inc"))
    groups = int(threads) // 128
    assert int(copying) + (groups - 1) * int(computing) <= groups * int(started)
