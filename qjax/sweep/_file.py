"""The file of a sweep: a line of JSON for each attempt at a run, whole or not there."""

import json
import os
from pathlib import Path
from typing import BinaryIO

from qjax.sweep._design import key_of

_START = b'{"point": '
_NOT_A_LINE = "sweep: line {} of {} is not one of a sweep: {!r}. Remove it, or take another path."


def append(file: BinaryIO, point: dict, **outcome) -> None:
    """Appends a line, and returns when it is on the disk."""
    file.write(json.dumps({"point": point, **outcome}).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def read(path: Path) -> tuple[dict[frozenset, dict], int]:
    """Returns the result of each finished point, and the size of the file without a last line that a kill has cut."""
    data, results = path.read_bytes() if path.exists() else b"", {}
    *lines, tail = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            key = key_of(entry["point"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(_NOT_A_LINE.format(number, path, line[:40])) from None
        if "result" in entry:
            results[key] = entry["result"]
    if tail[: len(_START)] != _START[: len(tail)]:  # Only what a sweep has begun may be cut off.
        raise ValueError(_NOT_A_LINE.format(len(lines) + 1, path, tail[:40]))
    return results, len(data) - len(tail)
