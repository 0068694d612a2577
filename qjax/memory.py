"""The memory of a training step: what parameters, gradients, optimizer and saved activations take, and what is sent."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax._coverage import table
from qjax._jaxpr import is_literal, jaxprs_of
from qjax.collectives import wire_bytes


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes on all devices together, each array counted once, and on one device; None where that is not known."""

    total: int | None
    device: int | None


class Memory(dict[str, Bytes]):
    """The bytes of a training step by what they are for; printed as a table, in units of 2^20."""

    def __str__(self) -> str:
        def text(count: int | None) -> str:
            return "-" if count is None else f"{count / 2**20:.2f}"

        rows = [(name, text(row.total), text(row.device)) for name, row in self.items()]
        return table([("", "MiB", "on a device"), *rows])


def nbytes(tree: Any) -> Bytes:
    """Returns the bytes of the arrays of a tree: live ones, or shapes such as ``jax.eval_shape`` gives.

    A ``QTensor`` is its codes and scales. On a device lies the shard of an array that has a sharding, or all of it.

    >>> import jax, jax.numpy as jnp, qjax
    >>> from qjax import memory
    >>> memory.nbytes({"w": qjax.encode(jnp.ones((64, 32), jnp.float32), "mxfp4"), "b": jnp.ones(64, jnp.float32)})
    Bytes(total=1344, device=1344)
    """
    total = device = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        shard = x.shape if sharding is None else sharding.shard_shape(x.shape)
        total += math.prod(x.shape) * _itemsize(x.dtype)
        device += math.prod(shard) * _itemsize(x.dtype)
    return Bytes(total, device)


def _itemsize(dtype) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize


def saved(fn: Callable, params: Any, *args) -> int:
    """Returns the bytes that the forward pass of ``fn(params, *args)`` keeps for the gradient of its first argument.

    They are counted from the trace of the function, each array once and arguments not at all. So what
    ``jax.checkpoint`` computes again is not among them, and what a recipe saves in codes counts as codes. The compiler
    may keep less, by computing again what is cheap.

    Args:
      params, args: arrays, or their shapes: nothing is computed.

    >>> import jax, jax.numpy as jnp
    >>> from qjax import memory
    >>> loss = lambda w, x: jnp.sum(jnp.exp(x @ w))
    >>> memory.saved(loss, jax.ShapeDtypeStruct((64, 32), "float32"), jax.ShapeDtypeStruct((8, 64), "float32"))
    1024
    """

    def residuals(params, *args):
        return jax.vjp(lambda params: fn(params, *args), params)[1]

    jaxpr = jax.make_jaxpr(residuals)(params, *args).jaxpr
    kept = set(_sources(jaxpr)) - set(jaxpr.invars) - {None}
    return sum(math.prod(v.aval.shape) * _itemsize(v.aval.dtype) for v in kept)


def _sources(jaxpr) -> list[Any]:
    """Returns for each result of a jaxpr the variable that it is, a constant being None, also through jit."""
    same: dict[Any, Any] = {}

    def source(v):
        return None if is_literal(v) else same.get(v, v)

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit", "closed_call"):
            (_, (inner,)) = next(jaxprs_of(eqn))
            handed = dict(zip(inner.invars, map(source, eqn.invars), strict=True))
            same |= {v: handed[found] for v, found in zip(eqn.outvars, _sources(inner), strict=True) if found in handed}
    return [source(v) for v in jaxpr.outvars]


def training(loss: Callable, params: Any, *args, state: Any = None, step: jax.stages.Compiled | None = None) -> Memory:
    """Returns the memory of a training step.

    Args:
      loss: of ``(params, *args)``, quantized or not.
      params, args: arrays, or their shapes: with ``jax.ShapeDtypeStruct`` a network that fits no machine is counted
        too, its share of a device with the shardings that the shapes have.
      state: that of the optimizer, arrays or ``jax.eval_shape(optimizer.init, params)``.
      step: the compiled training step, for what only the compiler knows: what it keeps meanwhile on a device beside
        arguments and results, and what a device sends.

    The entries are "parameters", "gradients" (as large), "optimizer state", "saved activations" (see ``saved``), and
    with a step "temporaries" and one for each kind of collective operation (see ``collectives.wire_bytes``).

    >>> import jax, jax.numpy as jnp, optax, qjax
    >>> from qjax import memory, recipes
    >>> loss = qjax.quantize(lambda w, x: jnp.sum(jnp.exp(x @ w)), recipes.MXFP8)
    >>> w, x = jax.ShapeDtypeStruct((4096, 4096), "float32"), jax.ShapeDtypeStruct((512, 4096), "float32")
    >>> print(memory.training(loss, w, x, state=jax.eval_shape(optax.adam(1e-3).init, w)))
                      | MiB    | on a device
    ------------------|--------|------------
    parameters        | 64.00  | 64.00
    gradients         | 64.00  | 64.00
    optimizer state   | 128.00 | 128.00
    saved activations | 8.00   | -
    """
    found = Memory()
    found["parameters"] = found["gradients"] = nbytes(params)
    if state is not None:
        found["optimizer state"] = nbytes(state)
    found["saved activations"] = Bytes(saved(loss, params, *args), None)
    if step is not None:
        analysis = step.memory_analysis()
        if analysis is not None:
            found["temporaries"] = Bytes(None, analysis.temp_size_in_bytes)
        for name, sent in sorted(wire_bytes(step).items()):
            found[f"sent by {name}"] = Bytes(None, sent)
    return found
