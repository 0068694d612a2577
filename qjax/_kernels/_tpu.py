"""The sum of products by an ``Accumulator`` on a TPU: Mosaic, a tile of the result at a time, its registers in VMEM."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax import _operand, _random
from qjax._accumulator import Accumulator, random_bits, register_of
from qjax._elementwise import varying
from qjax._jaxpr import is_literal
from qjax._kernels import _int16, _operands
from qjax._kernels._operands import Coded, Unrounded
from qjax._kernels._tiles import tiles_for
from qjax.formats import Fixed

_LANES, _DEEPEST = 128, 8192
_FLOATS = frozenset(map(jnp.dtype, ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")))


class Tiles(NamedTuple):
    """How much of the problem a step has: rows, columns, and the depth that it should at most have."""

    m: int = 256
    n: int = 256
    k: int = 1024


class Plan(NamedTuple):
    """How a contraction is divided: depths of a chunk, a step and a segment, and the number of steps."""

    chunk: int
    step: int
    segment: int
    steps: int


def plan(accumulator: Accumulator, depth: int, tiles: Tiles, unit: int = _LANES) -> Plan | str:
    """Returns how a contraction is divided into steps of whole chunks and units, or why it cannot be."""
    chunk, promote = accumulator.chunk, accumulator.promote
    if isinstance(accumulator.fmt, Fixed) and not accumulator.watches:
        # Sums modulo 2^32 do not depend on their order.
        chunk = tiles.k if promote is None else math.gcd(promote, tiles.k)
    if chunk < 16:
        return f"a chunk has at least 16 products, got chunk={accumulator.chunk}, promote={promote}; take 'xla'"
    step = math.lcm(chunk, unit)
    if promote is not None and promote % step:
        step = math.lcm(step, promote)
    if step > _DEEPEST:
        return f"chunk={accumulator.chunk} and promote={promote} have no common multiple with {unit} below {_DEEPEST}"
    # Chunks are unrolled: some, not many.
    while promote is None and 2 * step <= tiles.k and step < min(depth, 8 * chunk):
        step *= 2
    steps = max(-(-depth // step), 1)
    return Plan(chunk, step, promote or steps * step, steps)


def refusal(lhs, rhs, accumulator: Accumulator, *, scales=None) -> str | None:
    """Returns why the kernel does not take these operands, or None."""
    x = lhs.x if isinstance(lhs, Unrounded) else lhs
    allowed = {jnp.dtype(np.int8), jnp.dtype(np.int16)} if isinstance(accumulator.fmt, Fixed) else _FLOATS
    for name, dtype in (("lhs", x.dtype), ("rhs", x.dtype if isinstance(rhs, Coded) else rhs.dtype)):
        if dtype not in allowed:
            named = ", ".join(sorted(map(str, allowed)))
            return f"{name} is {dtype}; for the register {accumulator.fmt!r} it must be one of {named}"
    if isinstance(rhs, Coded) and rhs.fmt.bits not in (4, 8):
        return f"codes of 4 or 8 bits are decoded in the kernel, got {rhs.fmt!r}"
    if math.prod((*lhs.shape[:2], rhs.shape[1])) >= 2**32 and accumulator.is_stochastic:
        return f"random bits are counted in 32 bits, and {lhs.shape} x {rhs.shape} has more results"
    found = plan(accumulator, lhs.shape[-1], Tiles(), _unit(rhs))
    return found if isinstance(found, str) else None


def _unit(rhs) -> int:
    return 2 * _LANES if isinstance(rhs, Coded) and rhs.fmt.bits == 4 else _LANES


def accumulate(
    lhs, rhs, accumulator: Accumulator, *, key=None, scales=None, tiles: Tiles | None = None, interpret=False
):
    """Returns the products of rows as ``qjax._kernels._reference.accumulate`` does, by a Mosaic kernel.

    Args:
      lhs: an array of floats or integers, or an ``Unrounded``.
      rhs: an array of the same dtype, or ``Coded``.
      tiles: None for those of the table.
      interpret: ``pltpu.InterpretParams`` to run it on a CPU.
    """
    tiles = tiles or Tiles(*(tiles_for(lhs, rhs, accumulator) or ()))
    return _accumulate(lhs, rhs, key, scales, accumulator, tiles, interpret)


@functools.partial(jax.jit, static_argnames=("accumulator", "tiles", "interpret"))
def _accumulate(lhs, rhs, key, scales, accumulator: Accumulator, tiles: Tiles, interpret):
    (b, m, depth), n = lhs.shape, rhs.shape[1]
    divided = plan(accumulator, depth, tiles, _unit(rhs))
    assert isinstance(divided, Plan)
    chunk, step, segment, steps = divided
    bm, bn = min(tiles.m, _up(m, 32)), min(tiles.n, _up(n, _LANES))
    inputs = _operands_of(lhs, rhs, steps * step, step, bm, bn)
    if key is not None:
        places = jnp.arange(steps * step // chunk)
        words = jax.vmap(lambda place: _random.key_words(jax.random.fold_in(key, place)))(places)
        inputs["words"] = words, pl.BlockSpec(memory_space=pltpu.SMEM)
    if scales is not None:
        # As many as a step has of them, one at least.
        some = max(step // segment, 1)
        block_of = lambda s: s * step // (segment * some)  # noqa: E731
        x, y = (jnp.pad(s, [(0, 0), (0, 0), (0, -s.shape[-1] % some)]).swapaxes(1, 2) for s in scales)
        inputs["lhs_scales"] = _blocked(x[..., None], (1, some, bm, 1), lambda b, i, j, s: (b, block_of(s), i, 0))
        inputs["rhs_scales"] = _blocked(y[..., None, :], (1, some, 1, bn), lambda b, i, j, s: (b, block_of(s), 0, j))
    if _dtype(lhs) == np.int16:
        per = step // chunk
        x, y = (
            _int16.offset(jnp.pad(z, [(0, 0), (0, 0), (0, steps * step - depth)]).reshape(b, -1, steps * per, chunk))
            for z in (lhs, rhs)
        )
        y = y - _int16.modulo(chunk << 14)
        x, y = x.swapaxes(1, 2)[..., None], y.swapaxes(1, 2)[..., None, :]
        inputs["lhs_offsets"] = _blocked(x, (1, per, bm, 1), lambda b, i, j, s: (b, s, i, 0))
        inputs["rhs_offsets"] = _blocked(y, (1, per, 1, bn), lambda b, i, j, s: (b, s, 0, j))

    register = register_of(accumulator)
    state = jax.eval_shape(lambda: register.start((bm, bn)))
    products = _products(lhs, rhs)

    def body(*refs):
        given = dict(zip(inputs, refs, strict=False))
        out, *held = refs[len(inputs) :]
        number = pl.program_id(3)

        def save(values):
            for ref, value in zip(held, values, strict=True):
                ref[...] = value.astype(ref.dtype)

        def flush(place: int):
            """Adds the registers to the total, times the scales of a segment of the step."""
            value = register.read(_loaded(held, state))
            if scales is not None:
                value = value * given["lhs_scales"][0, place] * given["rhs_scales"][0, place]
            out[0] += value
            save(register.start((bm, bn)))

        @pl.when(number == 0)
        def _():
            out[...] = jnp.zeros_like(out)
            save(register.start((bm, bn)))

        for i in range(step // chunk):
            part = products(given["lhs"], given["rhs"], slice(i * chunk, (i + 1) * chunk))
            if "lhs_offsets" in given:
                part = part + given["lhs_offsets"][0, i] + given["rhs_offsets"][0, i]
            words = None
            if key is not None:
                four = [given["words"][number * (step // chunk) + i, j] for j in range(4)]
                words = _random.upper(_random.counter_bits(four, _counters((m, n), (bm, bn))), random_bits(accumulator))
            save(_signed(register.add)(_loaded(held, state), part, words))
            if step % segment == 0 and (i + 1) * chunk % segment == 0:
                flush((i + 1) * chunk // segment - 1)
        if step % segment:
            pl.when(((number + 1) * step % segment == 0) | (number == steps - 1))(lambda: flush(0))

    axes = varying(jax.typeof(inputs["lhs"][0])) | varying(jax.typeof(inputs["rhs"][0]))
    varies = {"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)} if axes else {}
    shape = (b, _up(m, bm), _up(n, bn))
    result = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(shape, np.float32, **varies),
        grid=(b, shape[1] // bm, shape[2] // bn, steps),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=pl.BlockSpec((1, bm, bn), lambda b, i, j, s: (b, i, j)),
        scratch_shapes=[pltpu.VMEM(s.shape, np.int32 if s.dtype == bool else s.dtype) for s in state],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="accumulate",
    )(*(x for x, _ in inputs.values()))
    return result[:, :m, :n]


def _up(size: int, by: int) -> int:
    """Returns the least multiple of a number that is not below a size, and not 0."""
    return max(-(-size // by), 1) * by


def _blocked(x, block: tuple[int, ...], index):
    """Returns an operand of the kernel, padded with zeros to whole blocks, and where its blocks lie."""
    return jnp.pad(x, [(0, -size % by) for size, by in zip(x.shape, block, strict=True)]), pl.BlockSpec(block, index)


def _dtype(operand) -> np.dtype:
    """Returns the dtype of what an operand is made of."""
    match operand:
        case Unrounded():
            return operand.x.dtype
        case Coded():
            return operand.codes.dtype
    return operand.dtype


def _is_halved(rhs) -> bool:
    return isinstance(rhs, Coded) and rhs.fmt.bits == 4


def _unit(rhs) -> int:
    """Returns what the depth of a step is a multiple of: whole vectors, of bytes with two codes too."""
    return 2 * _LANES if _is_halved(rhs) else _LANES


def _operands_of(lhs, rhs, total: int, step: int, bm: int, bn: int) -> dict:
    """Returns the two operands with zeros up to a total depth, by name."""
    x, y = lhs.x if isinstance(lhs, Unrounded) else lhs, rhs.codes if isinstance(rhs, Coded) else rhs
    # Mosaic has no float16.
    x, y = (z.astype(jnp.float32) if z.dtype == jnp.float16 else z for z in (x, y))
    x = jnp.pad(x, [(0, 0), (0, 0), (0, total - x.shape[-1])])
    if not _is_halved(rhs):
        y = jnp.pad(y, [(0, 0), (0, 0), (0, total - y.shape[-1])])
        lhs_in = _blocked(x, (1, bm, step), lambda b, i, j, s: (b, i, s))
        return {"lhs": lhs_in, "rhs": _blocked(y, (1, bn, step), lambda b, i, j, s: (b, j, s))}
    # Of two codes in a byte the first, of an even element, has the low bits.
    x = jnp.moveaxis(x.reshape(*x.shape[:2], total // 2, 2), -1, 1)
    y = jnp.pad(y, [(0, 0), (0, 0), (0, total // 2 - y.shape[-1])])
    lhs_in = _blocked(x, (1, 2, bm, step // 2), lambda b, i, j, s: (b, 0, i, s))
    return {"lhs": lhs_in, "rhs": _blocked(y, (1, bn, step // 2), lambda b, i, j, s: (b, j, s))}


def _products(lhs, rhs):
    """Returns the product of the places of a slice of two operands, as the dtype of the register's sums."""

    def elements(x, dtype=None):
        if isinstance(lhs, Unrounded):
            x = _signed(functools.partial(_operands.rounded, quantizer=lhs.quantizer))(x)
            return x.astype(dtype or _operand.narrow_float(lhs.quantizer.fmt))
        return x

    def dense(x, y, places):
        y = y[0, :, places]
        return _dot(elements(x[0, :, places], y.dtype), y)

    def int16(x, y, places):
        (xh, xl), (yh, yl) = (_int16.halves(z[0, :, places].astype(jnp.int32)) for z in (x, y))
        return (_dot(xh, yh) << 16) + ((_dot(xh, yl) + _dot(xl, yh)) << 8) + _dot(xl, yl)

    def coded(x, y, places):
        codes = y[0, :, places].astype(jnp.int32).astype(jnp.uint32)
        return _decoded_dot(elements(x[0, :, places]), codes, rhs.fmt)

    def halved(x, y, places):
        places = slice(places.start // 2, places.stop // 2)
        codes = y[0, :, places].astype(jnp.int32).astype(jnp.uint32)
        even = _decoded_dot(elements(x[0, 0, :, places]), codes & 15, rhs.fmt)
        return even + _decoded_dot(elements(x[0, 1, :, places]), codes >> 4, rhs.fmt)

    if isinstance(rhs, Coded):
        return halved if _is_halved(rhs) else coded
    return int16 if _dtype(lhs) == np.int16 else dense


def _decoded_dot(x, codes, fmt):
    values = _operands.decoded(codes, fmt)
    dtype = jnp.bfloat16 if x.dtype == _operand.narrow_float(fmt) == jnp.bfloat16 else jnp.float32
    return _dot(x.astype(dtype), values.astype(dtype))


def _dot(x, y):
    total = np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else np.float32
    precision = lax.Precision.HIGHEST if x.dtype == np.float32 else None
    return lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=total)


def _loaded(refs, state) -> tuple:
    """Returns the state of registers, in which flags are booleans."""
    return tuple(ref[...] != 0 if s.dtype == bool else ref[...] for ref, s in zip(refs, state, strict=True))


def _counters(shape: tuple[int, int], tile: tuple[int, int]):
    """Returns the row-major index in the whole result of every element of a tile."""
    row, column = (pl.program_id(1 + a) * tile[a] + lax.broadcasted_iota(np.int32, tile, a) for a in range(2))
    return ((pl.program_id(0) * shape[0] + row) * shape[1] + column).astype(jnp.uint32)


def _signed(fn):
    """Returns a function without minima and maxima of unsigned integers, which the v5e has not.

    Those of signed integers with the top bit flipped are the same.
    """

    def flip(x):
        return lax.bitcast_convert_type(x ^ np.uint32(2**31), np.int32)

    def run(jaxpr, consts, args):
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        read = lambda v: v.val if is_literal(v) else values[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            if "jaxpr" in eqn.params:
                inner = eqn.params["jaxpr"]
                results = run(inner.jaxpr, inner.consts, operands)
            elif eqn.primitive in (lax.max_p, lax.min_p) and eqn.outvars[0].aval.dtype == np.uint32:
                chosen = eqn.primitive.bind(*map(flip, operands))
                results = [lax.bitcast_convert_type(chosen, np.uint32) ^ np.uint32(2**31)]
            else:
                results = eqn.primitive.bind(*operands, **eqn.params)
                results = results if eqn.primitive.multiple_results else [results]
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def signed(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), run(closed.jaxpr, closed.consts, jax.tree.leaves(args)))

    return signed
