"""What the TPU kernel takes, and how it walks along the contraction."""

import math
from typing import NamedTuple

from qjax._accumulator import Accumulator
from qjax._kernels._operands import Coded, Unrounded
from qjax.formats import Fixed

LANES = 128
_DEEPEST = 8192
_FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


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


def plan(accumulator: Accumulator, depth: int, tiles: Tiles, unit: int = LANES) -> Plan | str:
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
    allowed = ("int8", "int16") if isinstance(accumulator.fmt, Fixed) else _FLOATS
    dtypes = {"lhs": lhs.x.dtype if isinstance(lhs, Unrounded) else lhs.dtype}
    if not isinstance(rhs, Coded):
        dtypes["rhs"] = rhs.dtype
    for name, dtype in dtypes.items():
        if str(dtype) not in allowed:
            return f"{name} is {dtype}; for the register {accumulator.fmt!r} it must be one of {', '.join(allowed)}"
    one = len(set(dtypes.values())) == 1 or all(str(dtype).startswith("float8") for dtype in dtypes.values())
    if not isinstance(lhs, Unrounded) and not one:
        return f"the operands are {dtypes['lhs']} and {dtypes['rhs']}; take one dtype, or two of 8-bit floats"
    if isinstance(rhs, Coded) and rhs.fmt.bits not in (4, 8):
        return f"codes of 4 or 8 bits are decoded in the kernel, got {rhs.fmt!r}"
    if math.prod((*lhs.shape[:2], rhs.shape[1])) >= 2**32 and accumulator.is_stochastic:
        return f"random bits are counted in 32 bits, and {lhs.shape} x {rhs.shape} has more results"
    found = plan(accumulator, lhs.shape[-1], Tiles(), unit(rhs))
    return found if isinstance(found, str) else None


def is_halved(rhs) -> bool:
    return isinstance(rhs, Coded) and rhs.fmt.bits == 4


def unit(rhs) -> int:
    """Returns what the depth of a step is a multiple of: whole vectors, of bytes with two codes too."""
    return 2 * LANES if is_halved(rhs) else LANES
