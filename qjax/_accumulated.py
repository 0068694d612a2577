"""The product of an equation as an ``Accumulator`` sums it."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax import _operand, _rows
from qjax._accumulator import Accumulator
from qjax._blocks import Rows
from qjax._kernels._accumulate import Implementation, accumulate
from qjax._kernels._operands import Coded, Unrounded
from qjax._operand import Operand
from qjax._quantizer import Quantizer
from qjax._stored import Axes, Followed
from qjax.formats import Codebook, Fixed, Float, Scaled


class Source(NamedTuple):
    """What an operand is made of: an array, what rounds it, and what it is stored in."""

    array: Any
    quantizer: Quantizer | None
    stored: Followed | None


def accumulated(
    equation,
    accumulator: Accumulator,
    operands: list[Operand],
    sources: list[Source],
    axes: tuple[Axes, Axes],
    *,
    key=None,
    implementation: Implementation | None = None,
):
    """Returns the product of a dot or convolution, but for scales that are constant along the contraction."""
    carried = _carried(operands, accumulator)
    if equation.primitive.name != "dot_general":
        x, y, output = _rows.conv_rows(equation, *carried)
        return output(accumulate(x, y, accumulator, key=key, implementation=implementation))
    x, y, output = _rows.dot_rows(equation, *carried)
    scales = [
        None if o.segments is None else o.segments.reshape(*rows.shape[:2], -1)
        for o, rows in zip(operands, (x, y), strict=True)
    ]
    count = next((s.shape[-1] for s in scales if s is not None), None)
    given = None
    if count is not None:
        shapes = [(*rows.shape[:2], count) for rows in (x, y)]
        given = tuple(jnp.ones(n, np.float32) if s is None else s for s, n in zip(scales, shapes, strict=True))
    made = functools.partial(_made, equation, accumulator, operands, sources, axes, (x, y))
    return output(accumulate(x, y, accumulator, key=key, scales=given, made=made, implementation=implementation))


def _made(equation, accumulator: Accumulator, operands, sources: list[Source], axes, rows) -> tuple:
    """Returns the rows as what a kernel can make them of: floats that it rounds, codes that it decodes."""
    (x, y), (lhs, rhs) = rows, sources
    if isinstance(accumulator.fmt, Fixed):
        return rows
    rounds = lhs.quantizer
    if (
        lhs.stored is None
        and rounds is not None
        and isinstance(rounds.fmt, Float | Fixed)
        and not rounds.is_stochastic
        and rounds.faults is None
        and lhs.array.dtype in (jnp.float32, jnp.bfloat16)
    ):
        raw, _, _ = _rows.dot_rows(equation, lhs.array, operands[1].elements)
        x = Unrounded(raw, rounds)
    apart = operands[1].segments is not None or operands[1].scale is not None
    if rhs.stored is not None and (apart or not isinstance(rhs.stored.source.fmt, Scaled)):
        codes = coded(rhs.stored.source, rhs.stored.axes_of_source(axes[1]))
        y = y if codes is None else codes
    return x, y


def coded(q, axes: Axes) -> Coded | None:
    """Returns a ``QTensor`` as rows of codes of its elements, None if it is not stored so, or has scales in scales."""
    fmt = q.fmt.element if isinstance(q.fmt, Scaled) else q.fmt
    if (
        q.rows != Rows(q.shape, axes.order)
        or axes.batch
        or q.zero_points
        or not isinstance(fmt, Float | Fixed | Codebook)
    ):
        return None
    return Coded(q.codes.reshape(1, -1, q.codes.shape[-1]), fmt) if fmt.bits in (4, 8) else None


def check_register(caller: str, accumulator: Accumulator, operands: list[Operand]) -> None:
    """Raises if a register cannot hold the sums of the elements."""
    fmt = accumulator.fmt
    if any(jnp.finfo(o.elements.dtype).bits > 32 for o in operands):
        raise TypeError(f"{caller}: an Accumulator works on float32; got float64 operands, convert them.")
    if isinstance(fmt, Float):
        return
    fractions, elements = _fractions(operands), [o.fmt for o in operands]
    if fractions is None or sum(fractions) != fmt.fraction_bits:
        raise ValueError(
            f"{caller}: the register {fmt!r} sums integers of {fmt.fraction_bits} fraction bits; the operands have "
            f"{' and '.join(map(repr, elements))}. Give both a Fixed format (with scales that are constant along the "
            "contraction, if any), and the register the sum of their fraction bits."
        )
    first, second = (max(e.max_integer, -e.min_integer) for e in elements if isinstance(e, Fixed))
    if max(first, second) > 2**31 or any(isinstance(e, Fixed) and e.max_integer >= 2**31 for e in elements):
        raise ValueError(
            f"{caller}: elements of a Fixed register fit 32 bits; got {' and '.join(map(repr, elements))}."
        )
    if accumulator.watches and accumulator.chunk * first * second >= 2**31:
        raise ValueError(
            f"{caller}: the sum of {accumulator.chunk} products of {' and '.join(map(repr, elements))} can overflow 32 "
            f"bits unseen; take a chunk of at most {(2**31 - 1) // (first * second)}, or a register that wraps."
        )


def _carried(operands: list[Operand], accumulator: Accumulator) -> list:
    """Returns the elements of operands in the narrowest dtype that the kernels of an accumulator take."""
    if isinstance(accumulator.fmt, Fixed):
        formats = [o.fmt for o in operands if isinstance(o.fmt, Fixed)]
        fits = (t for t in (np.int8, np.int16) if all(_within(fmt, np.iinfo(t)) for fmt in formats))
        dtype = next(fits, np.int32)
        scaled = [
            o.elements.astype(np.float32) * np.float32(2.0**f.fraction_bits)
            for o, f in zip(operands, formats, strict=True)
        ]
        return [jnp.round(x).astype(dtype) for x in scaled]
    fits = all(o.elements.dtype == jnp.bfloat16 or _operand.narrow_float(o.fmt) == jnp.bfloat16 for o in operands)
    return [o.elements.astype(jnp.bfloat16 if fits else np.float32) for o in operands]


def _within(fmt: Fixed, info: np.iinfo) -> bool:
    return info.min <= fmt.min_integer and fmt.max_integer <= info.max


def _fractions(operands: list[Operand]) -> tuple[int, int] | None:
    first, second = (o.fmt for o in operands)
    if isinstance(first, Fixed) and isinstance(second, Fixed):
        return first.fraction_bits, second.fraction_bits
    return None
