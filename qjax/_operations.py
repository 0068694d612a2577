"""``operations``: what ``emulate`` does with each operation of a function, as a table."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable

from qjax import _emulate, _jaxpr, _sites
from qjax._chop import RoundingLike
from qjax._coverage import format_text, table
from qjax._modes import Rounding
from qjax._quantizer import Quantizer
from qjax._recipe import Recipe
from qjax.formats import Format


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a program, and what ``emulate`` does with it.

    Attributes:
      path: of the named scopes around it, then the name of its primitive.
      kind: "rounded" (once, after it), "summed" (many additions, rounded as ``sums`` says), "opaque" (an algorithm in
        the dtype, rounded as a whole), "moved" (nothing to round), "replaced" by a function of the rules, or "kept".
      rounding: what its results are rounded to, and how; "" where they are not.
      times: how often scans run it.
      source: the line of the user that asked for it.
    """

    path: str
    kind: str
    rounding: str
    times: int = 1
    source: str = dataclasses.field(default="", compare=False)


class Operations(tuple[Operation, ...]):
    """The operations on floats of a program, in its order; ``str`` of it is a table that counts equal ones."""

    @property
    def opaque(self) -> "Operations":
        """Those that are not emulated operation by operation."""
        return Operations(operation for operation in self if operation.kind == "opaque")

    def __str__(self) -> str:
        counts = Counter()
        for operation in self:
            counts[operation.path, operation.kind, operation.rounding] += operation.times
        rows = [("operation", "kind", "rounding", "times")]
        rows += [(path, kind, rounding or "-", str(n)) for (path, kind, rounding), n in counts.items()]
        return table(rows)


def operations(
    fn: Callable,
    *args,
    fmt: Format | str,
    rounding: RoundingLike = Rounding.NEAREST_EVEN,
    sums: _emulate.Order | dict[str, _emulate.Order] = "once",
    rules: _emulate.Rules | None = None,
    **kwargs,
) -> Operations:
    """Returns what ``emulate(fn, fmt, ...)(*args, **kwargs)`` does with each operation on floats; it is not run.

    Args:
      fn: any function that JAX can trace.
      args, kwargs: its arguments, arrays or ``jax.ShapeDtypeStruct``.
      fmt, rounding, sums, rules: as in ``emulate``.

    Raises:
      TypeError, ValueError: as ``emulate`` does.

    >>> import jax, jax.numpy as jnp, qjax
    >>> x = jnp.ones((2, 2), jnp.float32)
    >>> print(qjax.operations(lambda x: jnp.tanh(jax.lax.linalg.qr(x)[1] @ x + 1), x, fmt="fp16"))
    operation   | kind    | rounding | times
    ------------|---------|----------|------
    qr          | opaque  | fp16     | 1
    dot_general | summed  | fp16     | 1
    add         | rounded | fp16     | 1
    tanh        | rounded | fp16     | 1
    """
    choice = _emulate.checked("operations", fmt, rounding, False, sums, rules)
    found: list[Operation] = []

    def record(eqn, path, place, kind, value):
        if value is None:
            kind, shown = "kept", ""
        elif callable(value) and not isinstance(value, Quantizer | Recipe):
            kind, shown = "replaced", getattr(value, "__name__", "a function")
        else:
            quantizer = choice.default if isinstance(value, Recipe) else value
            mode = "" if quantizer.rounding is Rounding.NEAREST_EVEN else f" {quantizer.rounding.value}"
            shown = "" if kind == "moved" else format_text(quantizer.fmt) + mode
        found.append(Operation(path, kind, shown, math.prod(place.steps), _sites.source(eqn)))

    _emulate.planned("operations", _jaxpr.trace(fn, args, kwargs), choice, record)
    return Operations(found)
