"""Keys in the state of a transformation: one for each step, split over the arrays of a tree."""

from collections.abc import Callable, Iterable
from typing import Any

import jax


def check_key(caller: str, stochastic: Iterable[bool], key) -> None:
    """Raises if a key is missing, or if nothing would use it."""
    if any(stochastic) and key is None:
        raise ValueError(f"{caller}: the rounding is stochastic and needs key=jax.random.key(...), got None.")
    if not any(stochastic) and key is not None:
        raise ValueError(f"{caller}: key was given, but no rounding is stochastic; leave key out.")


def first_key(key):
    """Returns the key of a first state, an array of its own, so that a donated state does not take the caller's."""
    return None if key is None else jax.random.fold_in(key, 0)


def next_key(key):
    """Returns the keys of the next step and of this one, None if there is none."""
    return (None, None) if key is None else tuple(jax.random.split(key))


def fold_in(key, data: int):
    return None if key is None else jax.random.fold_in(key, data)


def map_with_keys(fn: Callable[[Any, Any], Any], tree, key):
    """Returns ``fn(leaf, key)`` of every leaf, each with a key of its own, None if there is none."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([fn(leaf, fold_in(key, i)) for i, leaf in enumerate(leaves)])
