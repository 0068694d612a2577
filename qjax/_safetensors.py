"""Safetensors files, opened once their header and size are checked."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def opened(caller: str, path: str | pathlib.Path) -> Iterator[Any]:
    """Opens a safetensors file, whose header and size are checked."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{caller}: needs the package safetensors; pip install 'qjax[checkpoints]'.") from error
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: there is no file {str(path)!r}.")
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{caller}: {str(path)!r} is truncated or no safetensors file ({error}). Download it again; other "
            "checkpoints, pickles among them, are not read: save them with safetensors."
        ) from error
    with file:
        yield file
