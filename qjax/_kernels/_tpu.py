"""The sum of products by an ``Accumulator`` on a TPU: Mosaic, a tile of the result at a time, its registers in VMEM."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax import _random
from qjax._accumulator import Accumulator, random_bits, register_of
from qjax._elementwise import varying
from qjax._kernels import _int16
from qjax._kernels._operands import Coded, Unrounded
from qjax._kernels._rewritten import rewritten
from qjax._kernels._tiles import tiles_for, whole
from qjax._kernels._tpu_plan import LANES, Plan, Tiles, is_halved, plan, refusal as refusal, unit
from qjax._kernels._tpu_products import RULES, products_of


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
    if 0 in (*lhs.shape[:2], rhs.shape[1]):
        return jnp.zeros((*lhs.shape[:2], rhs.shape[1]), jnp.float32)
    tiles = tiles or Tiles(*(tiles_for(lhs, rhs, accumulator) or ()))
    return _accumulate(lhs, rhs, key, scales, accumulator, tiles, interpret)


@functools.partial(jax.jit, static_argnames=("accumulator", "tiles", "interpret"))
def _accumulate(lhs, rhs, key, scales, accumulator: Accumulator, tiles: Tiles, interpret):
    (b, m, depth), n = lhs.shape, rhs.shape[1]
    divided = plan(accumulator, depth, tiles, unit(rhs))
    assert isinstance(divided, Plan)
    chunk, step, segment, steps = divided
    bm, bn = min(tiles.m, whole(m, 32)), min(tiles.n, whole(n, LANES))
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
    if not isinstance(lhs, Unrounded) and lhs.dtype == np.int16:
        per = step // chunk
        x, y = (jnp.pad(z, [(0, 0), (0, 0), (0, steps * step - depth)]) for z in (lhs, rhs))
        x, y = _int16.offsets(x, y, chunk)
        x, y = x.swapaxes(1, 2)[..., None], y.swapaxes(1, 2)[..., None, :]
        inputs["lhs_offsets"] = _blocked(x, (1, per, bm, 1), lambda b, i, j, s: (b, s, i, 0))
        inputs["rhs_offsets"] = _blocked(y, (1, per, 1, bn), lambda b, i, j, s: (b, s, 0, j))

    register = register_of(accumulator)
    state = jax.eval_shape(lambda: register.start((bm, bn)))
    products = products_of(lhs, rhs)

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
            save(rewritten(register.add, RULES)(_loaded(held, state), part, words))
            if step % segment == 0 and (i + 1) * chunk % segment == 0:
                flush((i + 1) * chunk // segment - 1)
        if step % segment:
            pl.when(((number + 1) * step % segment == 0) | (number == steps - 1))(lambda: flush(0))

    axes = varying(jax.typeof(inputs["lhs"][0])) | varying(jax.typeof(inputs["rhs"][0]))
    varies: dict[str, Any] = {"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)} if axes else {}
    shape = (b, whole(m, bm), whole(n, bn))
    result = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(shape, np.float32, **varies),
        grid=(b, shape[1] // bm, shape[2] // bn, steps),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=pl.BlockSpec((1, bm, bn), lambda b, i, j, s: (b, i, j)),
        scratch_shapes=[pltpu.VMEM(s.shape, jnp.dtype(np.int32 if s.dtype == bool else s.dtype)) for s in state],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="accumulate",
    )(*(x for x, _ in inputs.values()))
    return result[:, :m, :n]


def _blocked(x, block: tuple[int, ...], index):
    """Returns an operand of the kernel, padded with zeros to whole blocks, and where its blocks lie."""
    return jnp.pad(x, [(0, -size % by) for size, by in zip(x.shape, block, strict=True)]), pl.BlockSpec(block, index)


def _operands_of(lhs, rhs, total: int, step: int, bm: int, bn: int) -> dict:
    """Returns the two operands with zeros up to a total depth, by name."""
    x, y = lhs.x if isinstance(lhs, Unrounded) else lhs, rhs.codes if isinstance(rhs, Coded) else rhs
    # Mosaic has no float16.
    x, y = (z.astype(jnp.float32) if z.dtype == jnp.float16 else z for z in (x, y))
    x = jnp.pad(x, [(0, 0), (0, 0), (0, total - x.shape[-1])])
    if not is_halved(rhs):
        y = jnp.pad(y, [(0, 0), (0, 0), (0, total - y.shape[-1])])
        lhs_in = _blocked(x, (1, bm, step), lambda b, i, j, s: (b, i, s))
        return {"lhs": lhs_in, "rhs": _blocked(y, (1, bn, step), lambda b, i, j, s: (b, j, s))}
    # Of two codes in a byte the first, of an even element, has the low bits.
    x = jnp.moveaxis(x.reshape(*x.shape[:2], total // 2, 2), -1, 1)
    y = jnp.pad(y, [(0, 0), (0, 0), (0, total // 2 - y.shape[-1])])
    lhs_in = _blocked(x, (1, 2, bm, step // 2), lambda b, i, j, s: (b, 0, i, s))
    return {"lhs": lhs_in, "rhs": _blocked(y, (1, bn, step // 2), lambda b, i, j, s: (b, j, s))}


def _loaded(refs, state) -> tuple:
    """Returns the state of registers, in which flags are booleans."""
    return tuple(ref[...] != 0 if s.dtype == bool else ref[...] for ref, s in zip(refs, state, strict=True))


def _counters(shape: tuple[int, int], tile: tuple[int, int]):
    """Returns the row-major index in the whole result of every element of a tile."""
    row, column = (pl.program_id(1 + a) * tile[a] + lax.broadcasted_iota(np.int32, tile, a) for a in range(2))
    return ((pl.program_id(0) * shape[0] + row) * shape[1] + column).astype(jnp.uint32)
