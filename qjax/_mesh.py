"""Meshes with explicit axes, on which JAX asks for the sharding of every reshape."""

from collections.abc import Callable
from typing import Any

import jax


def has_explicit_axes(x) -> bool:
    """Returns whether an array lies on a mesh with explicit axes."""
    return jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def in_auto_axes(fn: Callable, sharding: Any, *args) -> Any:
    """Returns ``fn(*args)`` with the given sharding; within, the compiler shards, as on a mesh with Auto axes.

    Args:
      sharding: that of the result as its type has it, ``jax.typeof(x).sharding``. Without explicit axes it says
        nothing, and the result is that of fn.
    """
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return fn(*args)
    return jax.sharding.auto_axes(fn, out_sharding=sharding)(*args)
