"""Patterns of paths: the first that matches a whole path decides."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax

T = TypeVar("T")


def check_pattern(caller: str, pattern) -> None:
    """Raises if a pattern is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{caller}: pattern {pattern!r} is not a regular expression: {error}.") from None


def first_matches(caller: str, rule: Mapping[str, T], paths: Sequence[str], where: str) -> list[T | None]:
    """Returns of each path what the first pattern that matches it stands for, None if there is none.

    Raises:
      ValueError: for a pattern that is the first to match of no path.
    """
    found: list[T | None] = []
    unmatched = dict.fromkeys(rule)
    for path in paths:
        first = next((pattern for pattern in rule if re.fullmatch(pattern, path)), None)
        if first is not None:
            unmatched.pop(first, None)
        found.append(None if first is None else rule[first])
    if unmatched:
        listed = ", ".join(map(repr, paths[:20])) + (" ..." if len(paths) > 20 else "")
        raise ValueError(
            f"{caller}: pattern {next(iter(unmatched))!r} matches no array of {where}; the paths are {listed}. "
            "A pattern must match a whole path that no earlier one matches."
        )
    return found


def path_of(keys: tuple) -> str:
    """Returns a path of a tree as patterns see it, without the boxes that Flax puts around arrays."""
    boxes = [isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value" for key in keys]
    kept = tuple(key for key, box in zip(keys, boxes, strict=True) if not box)
    return jax.tree_util.keystr(kept, simple=True, separator="/")
