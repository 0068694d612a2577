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

from qjax import _carrier


class Static(NamedTuple):
    """An argument that is no array."""

    value: Any


class Step(NamedTuple):
    """An operation of a program: its inputs are constants, or positions among the arguments and the results so far."""

    function: Callable
    params: dict[str, Any]
    inputs: tuple[int | np.ndarray, ...]


def elementwise(fn: Callable, *args):
    """Returns ``fn(*args)``, where fn works on each element of the arrays among ``args`` by itself.

    Args:
      fn: hashable; of numbers in the place of arrays it makes a number, or a tree of them.
      args: trees of arrays, all of one shape, and of hashable things.
    """
    leaves, structure = jax.tree.flatten(args)
    values = [x for x in leaves if isinstance(x, jax.Array)]
    kinds = tuple(x.dtype if isinstance(x, jax.Array) else Static(x) for x in leaves)
    steps, results, tree = _program(fn, structure, kinds, jax.dtypes.canonicalize_dtype(np.float64))
    axes = frozenset().union(*(varying(jax.typeof(x)) for x in values))
    values = [_varied(x, axes) for x in values]
    for function, params, inputs in steps:
        operands = (values[i] if isinstance(i, int) else _varied(i, axes) for i in inputs)
        values.append(function(*operands, **params))
    return tree.unflatten([values[i] if isinstance(i, int) else i for i in results])


# A function of its own: outside, arrays of constants would be values that a scan hands from step to step.
@jax.jit
def _select(which, *cases):
    return lax.select_n(which, *(x if x.ndim else lax.full_like(which, x, x.dtype) for x in cases))


def _divide(a, b):
    """Returns the quotient of arrays and constants."""
    a, b = (x if x.ndim else lax.full_like(y, x, x.dtype) for x, y in ((a, b), (b, a)))
    return _carrier.divide(a, b)


def varying(aval) -> frozenset[str]:
    """Returns the axes of ``shard_map`` that an array varies over."""
    axes = getattr(aval, "manual_axis_type", None)  # jax 0.9 and before: vma
    return getattr(aval, "vma", frozenset()) if axes is None else axes.varying


def _varied(x, axes: frozenset[str]):
    """Returns x as an array that varies over the axes, which primitive operations want of all their operands."""
    missing = axes and axes - varying(jax.typeof(x))
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


@functools.lru_cache(maxsize=1024)
def _program(fn: Callable, structure, kinds: tuple, widest):
    """Returns the operations of fn on numbers, its results, as inputs of steps are, and how they are nested.

    Args:
      fn: as for ``elementwise``.
      structure: of its arguments.
      kinds: for each leaf of them the dtype of an array, or what is static.
      widest: what is traced depends on it.
    """

    def of_numbers(*numbers):
        left = iter(numbers)
        return fn(*structure.unflatten(kind.value if isinstance(kind, Static) else next(left) for kind in kinds))

    dtypes = [kind for kind in kinds if not isinstance(kind, Static)]
    closed, shape = jax.make_jaxpr(of_numbers, return_shape=True)(*(jax.ShapeDtypeStruct((), d) for d in dtypes))
    steps: list[Step] = []

    def run(closed, values) -> list[int | np.ndarray]:
        jaxpr, known = closed.jaxpr, dict(zip(closed.jaxpr.invars, values, strict=True))
        # Within ``ensure_compile_time_eval`` what follows from constants alone is worked out already.
        known.update(zip(jaxpr.constvars, map(np.asarray, closed.consts), strict=True))

        def read(atom) -> int | np.ndarray:
            return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else known[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            # The branches of a quotient are those of devices, none of which is chosen here.
            divides = eqn.params.get("name") == "divide"
            function, params = (_divide, {}) if divides else (eqn.primitive.bind, eqn.params)
            if "jaxpr" in eqn.params and not divides:
                results = run(eqn.params["jaxpr"], inputs)
            elif eqn.primitive is lax.select_n_p and not isinstance(inputs[0], int):
                results = [inputs[1 + int(inputs[0])]]
            elif any(isinstance(x, int) for x in inputs):
                if eqn.primitive is lax.select_n_p:
                    function = _select
                if eqn.primitive is lax.not_p and eqn.invars[0].aval.dtype == bool:
                    # Mosaic GPU has no complement of booleans.
                    function, params, inputs = lax.xor_p.bind, {}, [*inputs, np.array(True)]
                steps.append(Step(function, params, tuple(inputs)))
                results = [len(dtypes) + len(steps) - 1]
            else:
                with jax.ensure_compile_time_eval():
                    results = [np.asarray(function(*inputs, **params))]
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    results = run(closed, range(len(dtypes)))
    return *_living(steps, results, len(dtypes)), jax.tree.structure(shape)


def _living(steps: list[Step], results: list[int | np.ndarray], arguments: int):
    """Returns the steps that results need, and their positions among them; constants as they are."""
    needed = {i for i in results if isinstance(i, int)}
    for i in reversed(range(len(steps))):
        if arguments + i in needed:
            needed.update(j for j in steps[i].inputs if isinstance(j, int))
    moved = {i: i for i in range(arguments)}
    living = []
    for i, step in enumerate(steps, arguments):
        if i in needed:
            moved[i] = arguments + len(living)
            living.append(step._replace(inputs=tuple(moved[j] if isinstance(j, int) else j for j in step.inputs)))
    return living, [moved[i] if isinstance(i, int) else i for i in results]
