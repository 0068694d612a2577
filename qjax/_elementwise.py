"""Functions of numbers that are traced once and run on arrays of any shape.

The rounding core is some forty operations, each of which JAX traces anew, within ``jax.numpy``, for every shape. As a
program of one number it is traced once for a format, what it works out of constants alone is worked out once, and it
costs an array little more than its primitive operations.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax


class Step(NamedTuple):
    """An operation of a program: its inputs are positions among the arguments and the results so far."""

    function: Callable
    params: dict[str, Any]
    inputs: tuple[int, ...]


def elementwise(fn: Callable, *arrays, static: tuple = ()):
    """Returns ``fn(*arrays, *static)`` of arrays of one shape, where fn works on each of their elements by itself.

    Args:
      fn: hashable, as are ``static``; of numbers it makes a number.
    """
    steps, result = _program(fn, tuple(x.dtype for x in arrays), static, jax.dtypes.canonicalize_dtype(np.float64))
    axes = frozenset().union(*(varying(jax.typeof(x)) for x in arrays))
    values = [_varied(x, axes) for x in arrays]
    for function, params, inputs in steps:
        values.append(function(*(values[i] for i in inputs), **params))
    return values[result]


def varying(aval) -> frozenset[str]:
    """Returns the axes of ``shard_map`` that an array varies over."""
    axes = getattr(aval, "manual_axis_type", None)  # jax 0.9 and before: vma
    return getattr(aval, "vma", frozenset()) if axes is None else axes.varying


def _varied(x, axes: frozenset[str]):
    """Returns x as an array that varies over the axes, which primitive operations want of all their operands."""
    missing = tuple(sorted(axes - varying(jax.typeof(x))))
    return lax.pcast(x, missing, to="varying") if missing else x


@functools.lru_cache(maxsize=1024)
def _program(fn: Callable, dtypes: tuple, static: tuple, widest) -> tuple[list[Step], int]:
    """Returns the operations of fn on numbers and the position of its result; widest is there to be remembered by."""
    numbers = [jax.ShapeDtypeStruct((), dtype) for dtype in dtypes]
    closed = jax.make_jaxpr(lambda *numbers: fn(*numbers, *static))(*numbers)
    steps: list[Step] = []
    constants: dict[tuple[np.dtype, bytes], int] = {}

    def append(function, params, inputs) -> int:
        steps.append(Step(function, params, inputs))
        return len(dtypes) + len(steps) - 1

    def position(value: int | np.ndarray) -> int:
        if isinstance(value, int):
            return value
        name = (value.dtype, value.tobytes())
        if name not in constants:
            constants[name] = append(lax.full_like, {"fill_value": value, "dtype": value.dtype}, (0,))
        return constants[name]

    def run(jaxpr, values) -> list[int | np.ndarray]:
        known = dict(zip(jaxpr.invars, values, strict=True))

        def read(atom) -> int | np.ndarray:
            return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else known[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            if "jaxpr" in eqn.params:
                results = run(eqn.params["jaxpr"].jaxpr, inputs)
            elif any(isinstance(x, int) for x in inputs):
                results = [append(eqn.primitive.bind, eqn.params, tuple(map(position, inputs)))]
            else:
                with jax.ensure_compile_time_eval():
                    results = [np.asarray(eqn.primitive.bind(*inputs, **eqn.params))]
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    (result,) = run(closed.jaxpr, range(len(dtypes)))
    return _living(steps, position(result), len(dtypes))


def _living(steps: list[Step], result: int, arguments: int) -> tuple[list[Step], int]:
    """Returns the steps that the result needs, and its position among them."""
    needed = {result}
    for i in reversed(range(len(steps))):
        if arguments + i in needed:
            needed.update(steps[i].inputs)
    moved = {i: i for i in range(arguments)}
    living = []
    for i, step in enumerate(steps, arguments):
        if i in needed:
            moved[i] = arguments + len(living)
            living.append(step._replace(inputs=tuple(moved[j] for j in step.inputs)))
    return living, moved[result]
