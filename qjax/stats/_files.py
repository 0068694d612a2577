"""``measure_file``: the statistics of the tensors of a checkpoint, read a piece at a time."""

import contextlib
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax._blocks import levels
from qjax._encode import decode, encode
from qjax.formats import Format, Scaled, format
from qjax.stats._measure import measure
from qjax.stats._stats import Stats, total

PIECE = 2**22
"""The elements that are read and measured at a time."""
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def measure_file(
    path: str | pathlib.Path,
    formats: Sequence[Format | str],
    *,
    tensors: str = ".*",
    progress: Callable[[int], Any] | None = None,
) -> dict[tuple[str, str], Stats]:
    """Returns the statistics of every float tensor of a safetensors file in each format, by (tensor, format).

    The file is mapped into memory and read in pieces of 2^22 elements, so it may be larger than memory. Overflow
    saturates. Blocks lie along the last axis, the one that the weights of PyTorch's linear layers are contracted over.
    The statistics are those of the whole tensor: pieces hold whole blocks, and a scale of the tensor is found in a pass
    of its own. One that needs more than the largest magnitude ("mse", ``Rms``, zero points) reads its tensor whole.

    Args:
      path: the file.
      formats: formats or their names; the keys have what is given.
      tensors: a regular expression that the whole name of a tensor must match.
      progress: called with the number of bytes that were measured.

    Raises:
      ImportError: if the package safetensors is not installed.
      ValueError: if the file is truncated or no safetensors file, no tensor matches, or a format has no such name.
      FileNotFoundError: if there is no file.

    ``python -m qjax.stats FILE --formats e4m3,mxfp4,int8_channel`` prints the table.
    """
    named = {str(fmt): format(fmt) for fmt in formats}
    found: dict[tuple[str, str], Stats] = {}
    with opened(path) as file:
        for name in chosen(file, path, tensors):
            array = file.get_slice(name)
            shape = tuple(array.get_shape())
            for label, fmt in named.items():
                with jax.enable_x64(True) if array.get_dtype() == "F64" else contextlib.nullcontext():
                    found[name, label] = _measured(lambda: file.get_tensor(name), array, shape, fmt)  # noqa: B023
            if progress is not None:
                progress(size_of(array))
    return found


def size_of(array: Any) -> int:
    """Returns the bytes of a tensor of a file."""
    return _FLOATS[array.get_dtype()] * math.prod(array.get_shape())


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[Any]:
    """Opens a safetensors file, whose header and size are checked."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("measure_file: needs the package safetensors; pip install 'qjax[checkpoints]'.") from error
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"measure_file: there is no file {str(path)!r}.")
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"measure_file: {str(path)!r} is truncated or no safetensors file ({error}). Download it again; other "
            "checkpoints, pickles among them, are not read: save them with safetensors."
        ) from error
    with file:
        yield file


def chosen(file: Any, path: str | pathlib.Path, tensors: str = ".*") -> list[str]:
    """Returns the names of the float tensors that match."""
    every = sorted(file.keys())
    names = [name for name in every if re.fullmatch(tensors, name) and file.get_slice(name).get_dtype() in _FLOATS]
    if not names:
        kinds = sorted({file.get_slice(name).get_dtype() for name in every})
        raise ValueError(
            f"measure_file: no tensor of {str(path)!r} that is {', '.join(_FLOATS)} matches {tensors!r}; it has "
            f"{len(every)} tensors ({', '.join(every[:3])} ...) of {', '.join(kinds)}."
        )
    return names


def _measured(whole: Callable, array: Any, shape: tuple[int, ...], fmt: Format) -> Stats:
    if math.prod(shape) <= PIECE or _needs_all(fmt):
        return measure(whole(), fmt, saturate=True)
    scale = None
    if isinstance(fmt, Scaled) and fmt.block is None:
        largest = [np.max(np.abs(array[piece])) for piece in pieces(shape, 1, 1)]
        scale = decode(encode(jnp.max(jnp.stack(largest)), fmt).scales[0])
    return total(measure(array[piece], fmt, scale=scale, saturate=True) for piece in pieces(shape, *_units(fmt, shape)))


def _needs_all(fmt: Format) -> bool:
    """Returns whether pieces cannot hold whole blocks, or a scale needs more than the largest magnitude."""
    if any(isinstance(level.block, tuple) and len(level.block) > 2 for level in levels(fmt)):
        return True
    if any(level.block is None for level in levels(fmt)[1:]):
        return True
    if not isinstance(fmt, Scaled) or fmt.block is not None:
        return False
    return fmt.zero_point is not None or not isinstance(fmt.rule, str) or fmt.rule == "mse"


def _units(fmt: Format, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns of how many rows and columns a piece must hold multiples, to hold whole blocks."""
    rows, columns = 1, 1
    for level in levels(fmt):
        block = level.block
        if block == "axis":
            columns = shape[-1]
        elif isinstance(block, int):
            columns = math.lcm(columns, block)
        elif isinstance(block, tuple):
            columns, rows = math.lcm(columns, block[-1]), math.lcm(rows, *block[:-1])
    return rows, columns


def pieces(shape: tuple[int, ...], rows: int, columns: int) -> Iterator[tuple[slice, ...]]:
    """Yields slices that divide an array into pieces of about ``PIECE`` elements, in multiples of rows and columns."""
    first, *others = shape
    inner = math.prod(others)
    unit = columns if not others else rows if len(others) == 1 else 1
    if inner * unit <= PIECE or not others:
        step = max(PIECE // (inner * unit), 1) * unit
        for i in range(0, first, step):
            yield (slice(i, min(i + step, first)), *(slice(0, n) for n in others))
    else:
        for i in range(0, first, unit):
            for piece in _within(tuple(others), unit, rows, columns):
                yield (slice(i, min(i + unit, first)), *piece)


def _within(shape: tuple[int, ...], times: int, rows: int, columns: int) -> Iterator[tuple[slice, ...]]:
    """Yields the pieces of the axes that are left, of which ``times`` are read at once."""
    first, *others = shape
    if others:
        yield from pieces(shape, rows, columns)
    else:
        step = max(PIECE // (times * columns), 1) * columns
        for i in range(0, first, step):
            yield (slice(i, min(i + step, first)),)
