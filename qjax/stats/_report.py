"""``Report``: the statistics of the operands of a function, as a table."""

import collections
import csv
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax import _coverage
from qjax._coverage import format_text
from qjax.stats._observe import OPERANDS, Probes, What, copied, observe, probes, unpacked
from qjax.stats._stats import Stats

COLUMNS = (
    "sqnr",
    "underflows",
    "saturations",
    "to_nan",
    "error_median",
    "kurtosis",
    "outliers",
    "min_exponent",
    "max_exponent",
)


@jax.tree_util.register_pytree_with_keys_class
class Report(Mapping[tuple[str, str], Stats]):
    """The statistics of operands, by (path, operand), in the order of the program; ``str`` of it is a table.

    An operand is named by the product and its place in it: "forward.lhs", "forward.rhs", then those of the gradients of
    lhs and of rhs, "dlhs.lhs" (the gradient of the result) and so on, as in ``qjax.Recipe``. It is a pytree.
    """

    def __init__(self, stats: Mapping[tuple[str, str], Stats]):
        self._stats = dict(stats)

    def __getitem__(self, key: tuple[str, str]) -> Stats:
        return self._stats[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey(key), stats) for key, stats in self._stats.items()], tuple(self._stats)

    @classmethod
    def tree_unflatten(cls, keys, stats):
        return cls(dict(zip(keys, stats, strict=True)))

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict an operand: path, operand, format and all of ``Stats.summary``."""
        return [
            {"path": path, "operand": operand, "format": format_text(s.fmt), **s.summary()}
            for (path, operand), s in self.items()
        ]

    def __str__(self) -> str:
        return table(self.rows(), ("path", "operand", "format", "size", *COLUMNS))

    def to_csv(self, path: str | pathlib.Path) -> None:
        """Writes ``rows`` as a CSV file with a header."""
        rows = self.rows()
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["path", "operand", "format"])
            writer.writeheader()
            writer.writerows(rows)

    def to_pandas(self) -> Any:
        """Returns ``rows`` as a pandas DataFrame with the index (path, operand)."""
        import pandas

        return pandas.DataFrame(self.rows()).set_index(["path", "operand"])


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Returns rows as lines of text under a header."""
    cells = [columns, *([_cell(name, row[name]) for name in columns] for row in rows)]
    return _coverage.table(cells)


_SHARES = ("zeros", "nans", "infinities", "underflows", "saturations", "to_nan", "to_infinity", "outliers")


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    if name in _SHARES:
        return f"{100 * value:.3g} %"
    return f"{value:.1f}" if name == "sqnr" else f"{value:.3g}"


def report(seen: Probes) -> Report:
    """Returns the report of what probes saw: of their gradient, as concrete arrays. The steps of scans are together.

    An operand that no derivative reached has the size 0.
    """
    seen = jax.device_get(seen)
    return Report({(path, o): unpacked(of[o]) for path, of in seen.items() for o in OPERANDS if o in of})


def inspect(
    fn: Callable,
    what: What,
    *args,
    backward: bool = True,
    has_aux: bool = False,
    apply: bool = False,
    key: jax.Array | None = None,
    strict: bool = True,
    **kwargs,
) -> Report:
    """Returns the statistics of all operands of ``fn(*args, **kwargs)`` and of its gradient. It runs once, jitted.

    Args:
      fn: as in ``observe``. With ``backward`` a function that returns the loss, a scalar.
      what, apply, key, strict: as in ``observe``.
      backward: whether there is a backward pass. Without, fn may return anything with a float array in it, and the
        report has the operands of the forward products.
      has_aux: whether fn returns (loss, more).
      args, kwargs: those of fn. nnx modules among them are not changed.

    Raises:
      TypeError, ValueError: as ``observe`` does.

    >>> import jax.numpy as jnp
    >>> from qjax import stats
    >>> def loss(w, x):
    ...     return jnp.sum(jnp.tanh(x @ w) ** 2)
    >>> w, x = jnp.full((4, 2), 1e-4, jnp.float32), jnp.ones((3, 4), jnp.float32)
    >>> found = stats.inspect(loss, "e4m3", w, x)
    >>> [(operand, s.share("underflows")) for (_, operand), s in found.items()][1:4]
    [('forward.rhs', 1.0), ('dlhs.lhs', 1.0), ('dlhs.rhs', 1.0)]
    """
    zeros = probes(fn, what, *args, strict=strict, **kwargs)
    leaves, tree = jax.tree.flatten((args, kwargs))
    dynamic = [isinstance(x, jax.Array) or hasattr(x, "__array__") for x in leaves]

    @jax.jit
    def run(zeros, arrays):
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(rest) if d else x for d, x in zip(dynamic, leaves, strict=True)])

        def floats(probes):
            mine, named = copied(args, kwargs)  # of this trace, so that variables may change
            out = observe(fn, what, probes, apply=apply, key=key, strict=strict)(*mine, **named)
            if backward:
                return out[0] if has_aux else out
            return [x for x in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]

        if backward:
            return jax.grad(floats)(zeros)
        out, pull = jax.vjp(floats, zeros)
        seen = pull(jax.tree.map(jnp.zeros_like, out))[0]
        # What is not returned is not computed.
        forward = ((path, {o: s for o, s in of.items() if o.startswith("forward")}) for path, of in seen.items())
        return collections.OrderedDict(forward)  # a dict would be sorted by its keys

    return report(run(zeros, [x for d, x in zip(dynamic, leaves, strict=True) if d]))
