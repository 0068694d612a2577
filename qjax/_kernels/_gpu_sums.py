"""The Hopper kernel of ``accumulate``: a warp-specialised pipeline that ends in the register of an accumulator.

One warpgroup copies tiles of the operands to shared memory; the others multiply them in the tensor cores, 64 rows
each, and hold in their registers the sum of the chunk, the register of the accumulator, and the total of what was
promoted. What is multiplied, and how, is a ``Products``: each kind of operand has a file of its own.
"""

# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false, reportArgumentType=false

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax import _carrier, _random
from qjax._accumulator import Accumulator, random_bits, register_of
from qjax._kernels._gpu_plan import Plan, Tiles
from qjax._kernels._rewritten import rewritten
from qjax._kernels._tiles import whole

# What is copied to shared memory starts at multiples of 128 bytes there: of so many 32-bit words.
WORDS = 32


class Load(NamedTuple):
    """An operand in global memory, of which each step of the pipeline reads a tile.

    Attributes:
      array: ``(b, rows, elements)``.
      of_columns: whether its rows are the columns of the result.
    """

    array: jax.Array
    of_columns: bool


class Products(NamedTuple):
    """How products of tiles are summed.

    Attributes:
      loads: the operands.
      sum: ``sum(tiles, shape, scratch)`` makes the sum of the products of tiles, references to one for each load, in
        the dtype of the register's sums.
      offsets: None, or int32 ``(b, rows, steps)`` and ``(b, columns, steps)`` to add to the sums of steps.
      scratch: None, or the dtype of a tile in shared memory that each warpgroup has to itself.
    """

    loads: tuple[Load, ...]
    sum: Callable
    offsets: tuple[jax.Array, jax.Array] | None = None
    scratch: np.dtype | None = None


class Carry(NamedTuple):
    """What goes from step to step; empty where nothing has to."""

    total: tuple = ()
    state: tuple = ()
    part: tuple = ()


def accumulate(
    products: Products,
    accumulator: Accumulator,
    plan: Plan,
    tiles: Tiles,
    *,
    counts: tuple[int, int, int],
    strides: tuple[int, int, int],
    key=None,
    scales=None,
    interpret=None,
):
    """Returns the sums of products, ``(b, rows, columns)`` float32, of operands padded to whole tiles.

    Args:
      counts: b, rows and columns, whole tiles.
      strides: by how much the counter of random words grows along each of them.
      key: for a stochastic accumulator.
      scales: None, or ``(b, rows, segments)`` and ``(b, columns, segments)``, where there are several segments.
    """
    register = register_of(accumulator)
    register = register._replace(add=rewritten(register.add, {lax.floor_p: _floor}))
    batch, rows, columns = counts
    shape = (64, tiles.columns)
    # An only chunk is added to the register once, after the last step.
    is_late = plan.chunks == 1 and key is None
    holds_state = not is_late and (plan.length > 1 or not plan.holds_total)
    # Columns of the result that go to global memory at a time.
    staged = math.gcd(tiles.columns, 32)
    arrays = [load.array for load in products.loads]
    vectors = [(products.offsets, lambda step: step), (scales, plan.segment)]
    vectors = [(pair, block_of) for pair, block_of in vectors if pair is not None]
    sizes = (tiles.rows, tiles.columns)
    for pair, _ in vectors:
        arrays.extend(_spread(jnp.swapaxes(v, 1, 2), size) for v, size in zip(pair, sizes, strict=True))
    if key is not None:
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(plan.chunks * plan.splits))
        arrays.append(_spread(jax.vmap(_random.key_words)(keys)[None], 4))

    scratch = [plgpu.SMEM((tiles.groups, 64, staged), jnp.float32, transforms=swizzled(staged, jnp.float32))]
    if products.scratch is not None:
        transforms = swizzled(plan.depth, products.scratch)
        scratch.append(plgpu.SMEM((tiles.groups, 64, plan.depth), products.scratch, transforms=transforms))

    def kernel(*refs):
        inputs, (out_ref, staging, *own) = refs[: len(arrays)], refs[len(arrays) :]
        block, row, column = (lax.axis_index(name) for name in ("block", "row", "column"))
        b, first = block // plan.splits, block % plan.splits * plan.steps
        group = lax.axis_index("group")
        mine = pl.ds(group * 64, 64)

        def at(tile, step):
            return tile, first + step

        def across(tile, block_of, step):
            return block_of(first + step), tile

        specs = []
        for array, of_columns in products.loads:
            size, tile = (tiles.columns, column) if of_columns else (tiles.rows, row)
            options = {"transforms": swizzled(plan.depth, array.dtype)}
            specs.append(plgpu.BlockSpec((size, plan.depth), functools.partial(at, tile), **options))
        for _, block_of in vectors:
            for size, tile in zip(sizes, (row, column), strict=True):
                specs.append(plgpu.BlockSpec((1, whole(size, WORDS)), functools.partial(across, tile, block_of)))
        if key is not None:
            specs.append(plgpu.BlockSpec((1, WORDS), lambda step: ((first + step) // plan.pieces, 0)))

        def step_of(indices, *refs_and_carry):
            (step,) = indices
            *refs, carry = refs_and_carry
            pairs = zip(refs, products.loads, strict=False)
            tile_refs = [r if load.of_columns else r.at[mine] for r, load in pairs]
            part = products.sum(tile_refs, shape, own[0].at[group] if own else None)
            offsets, scale, words = read(refs[len(products.loads) :])
            if offsets is not None:
                part = part + offsets[0] + offsets[1]
            if plan.holds_parts:
                part = carry.part[0] + part
            if is_late:
                return Carry(part=(part,))
            return either(
                plan.ends_chunk(step),
                lambda: ended(step, part, carry, scale, words),
                lambda: carry._replace(part=(part,)),
            )

        def read(refs):
            """Returns the offsets, the scales and the random words of a step."""
            given: list[Any] = [None, None, None]
            refs = list(refs)
            for i, there in enumerate((products.offsets, scales)):
                if there is not None:
                    of_row, of_column = refs.pop(0)[0, mine], refs.pop(0)[0, pl.ds(0, tiles.columns)]
                    given[i] = tuple(lax.broadcast_in_dim(v, shape, (a,)) for a, v in enumerate((of_row, of_column)))
            if key is not None:
                given[2] = [refs[0][0, i] for i in range(4)]
            if any(g is not None for g in given):
                # Copies of a later step, which take another way to memory, overwrite what was read.
                plgpu.commit_smem()
            return given

        def ended(step, part, carry: Carry, scale, words):
            """Returns the carry after the end of a chunk."""
            random = None if words is None else drawn(words)
            state = register.add(carry.state or started(), part, random)
            kept = Carry(carry.total, state, zeros(plan.holds_parts, register.sums))
            if not plan.holds_total:
                return kept

            def promoted():
                value = register.read(state)
                if scale is not None:
                    value = _carrier.apart(value * scale[0] * scale[1])
                return Carry((carry.total[0] + value,), started() if holds_state else (), kept.part)

            return either(plan.ends_segment(step), promoted, lambda: kept)

        def drawn(words):
            """Returns a random word for each sum."""
            by = [np.uint32(stride % 2**32) for stride in strides]
            first_row, first_column = row * tiles.rows + group * 64, column * tiles.columns
            corner = (b, first_row, first_column)
            counters = sum(at.astype(jnp.uint32) * stride for at, stride in zip(corner, by, strict=True))
            for axis in range(2):
                along = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
                counters = counters + along.astype(jnp.uint32) * by[axis + 1]
            return _random.upper(_random.counter_bits(words, counters), random_bits(accumulator))

        def zeros(are_held: bool, dtype):
            return (plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA),) if are_held else ()

        def started():
            return tuple(plgpu.layout_cast(x, plgpu.Layout.WGMMA) for x in register.start(shape))

        def compute(pipeline):
            total = zeros(plan.holds_total, np.float32)
            state = started() if holds_state else ()
            carry = pipeline(Carry(total, state, zeros(plan.holds_parts or is_late, register.sums)))
            # The sum of 0 and -0 is 0, in the reference too.
            state = register.add(started(), carry.part[0], None) if is_late else carry.state
            result = carry.total[0] if plan.holds_total else jnp.float32(0) + register.read(state)
            out = out_ref.at[
                block, pl.ds(row * tiles.rows + group * 64, 64), pl.ds(column * tiles.columns, tiles.columns)
            ]
            for start in range(0, tiles.columns, staged):
                plgpu.wait_smem_to_gmem(0)
                staging[group] = result[:, start : start + staged]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging.at[group], out.at[:, pl.ds(start, staged)])
            plgpu.wait_smem_to_gmem(0)

        plgpu.emit_pipeline_warp_specialized(
            step_of,
            grid=(plan.steps,),
            memory_registers=40,  # with 64, two warpgroups wait forever for more than a block has
            wg_axis="group",
            num_compute_wgs=tiles.groups,
            max_concurrent_steps=tiles.stages,
            in_specs=specs,
            compute_context=compute,
        )(*(ref.at[b if ref.shape[0] > 1 else 0] for ref in inputs))

    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch * plan.splits, rows, columns), jnp.float32),
        grid=(batch * plan.splits, columns // tiles.columns, rows // tiles.rows),
        grid_names=("block", "column", "row"),
        num_threads=tiles.groups + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(*arrays)
    if plan.splits == 1:
        return parts
    parts = parts.reshape(batch, plan.splits, rows, columns)
    return functools.reduce(jnp.add, (parts[:, i] for i in range(plan.splits)))


def _spread(v, size: int):
    """Returns vectors ``(b, n, tiles * size)`` with zeros up to whole words of copies after every tile."""
    wide = whole(size, WORDS)
    if wide == size:
        return v
    apart = jnp.pad(v.reshape(*v.shape[:2], -1, size), ((0, 0), (0, 0), (0, 0), (0, wide - size)))
    return apart.reshape(*v.shape[:2], -1)


def multiplied(multiply: Callable, shape: tuple[int, int], *dtypes):
    """Returns what ``multiply(*accumulators)`` adds up in accumulators of the tensor cores, which start at zero."""

    def run(*accumulators):
        multiply(*accumulators)
        return tuple(a[...] for a in accumulators)

    return pl.run_scoped(run, *(plgpu.ACC(shape, dtype) for dtype in dtypes))


def _floor(x):
    """Returns the floor of floats, which Mosaic does not have."""
    whole = x.astype(jnp.int32).astype(x.dtype)
    return jnp.where(jnp.abs(x) < 2.0**23, jnp.where(whole > x, whole - 1, whole), x)


def either(condition, yes: Callable, no: Callable):
    """Returns ``yes()`` or ``no()``; where the condition is known without a branch in the kernel."""
    if isinstance(condition, bool):
        return yes() if condition else no()
    return lax.cond(condition, yes, no)


def swizzled(depth: int, dtype):
    """Returns the layout of tiles in shared memory that have rows of so many elements."""
    bits = 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    swizzle = next((s for s in (128, 64, 32) if depth * bits // 8 % s == 0), None)
    if swizzle is None:
        return ()
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
