"""``emulate``: a whole function on a machine that has the numbers of one format."""

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from qjax import _arithmetic, _custom, _jaxpr, _sites, _sums
from qjax._chop import RoundingLike
from qjax._modes import Rounding
from qjax._patterns import check_pattern
from qjax._quantizer import Quantizer
from qjax._recipe import Recipe
from qjax.formats import Format

F = TypeVar("F", bound=Callable[..., Any])
Order = Literal["once", "sequential", "pairwise"]
Rules = Mapping[str, Format | str | Quantizer | Recipe | Callable | None]


def emulate(
    fn: F,
    fmt: Format | str,
    *,
    rounding: RoundingLike = Rounding.NEAREST_EVEN,
    saturate: bool = False,
    sums: Order | Mapping[str, Order] = "once",
    rules: Rules | None = None,
    key: Array | None = None,
) -> F:
    """Returns fn as a machine computes it whose numbers are those of a format: rounded after every operation.

    The function is traced, and evaluated again with ``chop`` after every operation on floats, in the order of the
    program. Arguments are rounded as they come in, constants to nearest. This goes into jit, scan, while, cond,
    ``jax.checkpoint``, ``shard_map`` and functions with a derivative of their own, and composes with every
    transformation from outside.

    - Sums, products, quotients and square roots are the exact ones, rounded once. This takes a dtype of 2p + 2
      significant bits for the p of the format: float32 for fp16, bf16 and all that is shorter, float64 for fp32. Where
      the range of the format is that of the dtype (bf16 in float32), results below its smallest normal number are 0.
    - Elementary functions (exp, tanh ...) are those of the dtype, rounded. Integer powers are products.
    - What moves numbers, compares them or picks one (reshape, sort, max, gather ...) is left alone, as are integers.
    - Sums of many terms, dot products and convolutions: see ``sums``.
    - FFTs and decompositions are computed in the dtype, of rounded numbers, and their results rounded. ``operations``
      lists them, and rules put operations in their place: ``rules={"cholesky": qjax.linalg.cholesky}``.
    - ``chop``, ``encode``, ``decode``, ``dot_general`` and ``conv_general_dilated`` of this library stay what they are:
      what they return is rounded.

    Where the format holds all numbers of the dtype, an operation is left as it is: ``emulate(f, "fp32")`` of a float32
    program is that program.

    Args:
      fn: any function that JAX can trace. Arguments and results that are no arrays stay Python values.
      fmt: a format or its name.
      rounding: a ``Rounding`` or its name.
      saturate: whether overflow gives the largest value, as ``chop`` says.
      sums: how many terms are added: "once", in the dtype and in XLA's order, then rounded, as by a wide accumulator;
        "sequential", first to last with a rounding after every addition (and, in dot products and convolutions, after
        every product); or "pairwise", neighbours first, then neighbours of these sums. Or a dict of patterns to these.
      rules: a dict of patterns to what takes the place of fmt for the operations that they match, the first that does:
        a format or its name; a ``Quantizer``; None, to leave the operation as it is; for "dot_general" and
        "conv_general_dilated" a ``Recipe``, by which its operands are rounded before and its sums accumulated; or a
        function of its operands and parameters, whose operations are then rounded. A pattern must match (by
        ``re.fullmatch``) the name of a primitive, or the path of named scopes with this name last:
        ``"attention/.*"``, ``".*/exp"``. "argument" stands for the arguments of fn, "result" for its results. A
        rule is about what operations return: what they are given comes as others have left it, with more bits if
        theirs is a longer format. Round it by a call of ``chop`` or of a function that is emulated itself.
      key: the PRNG key, for stochastic roundings. Each operation, step of a loop and shard draws its own bits.

    Gradients: ``grad(emulate(f))`` is straight-through, the derivative of f at the rounded numbers.
    ``emulate(grad(f))`` rounds the backward pass too, operation by operation.

    Raises:
      TypeError, ValueError: for what is no format, rounding, order or rule; for a pattern that matches nothing; for a
        dtype that is too short for a format; for a primitive without a rule; for a missing key, and for a key that
        nothing would use.

    >>> import jax, jax.numpy as jnp, qjax
    >>> ones = jnp.ones(4096, jnp.float32)
    >>> qjax.emulate(jnp.sum, "fp16", sums="sequential")(ones)
    Array(2048., dtype=float32)
    >>> qjax.emulate(lambda x: x * x + 1, "e4m3")(jnp.float32(0.3))
    Array(1.125, dtype=float32)

    Sources: Higham and Pranesh (2019), Simulating low precision floating-point arithmetic,
    https://doi.org/10.1137/19M1251308 (rounding after every operation); Figueroa (1995), When is double rounding
    innocuous?, https://doi.org/10.1145/221332.221334 (2p + 2); Boldo and Melquiond (2008),
    https://doi.org/10.1109/TC.2007.70819 (rounding to odd, for modes other than to nearest).
    """
    choice = checked("emulate", fmt, rounding, saturate, sums, rules)

    @functools.wraps(fn)
    def emulated(*args, **kwargs):
        program = _jaxpr.trace(fn, args, kwargs)
        plan, draws = planned("emulate", program, choice)
        if draws and key is None:
            raise ValueError(f"emulate: {draws[0]!r} is stochastic; pass key=jax.random.key(...).")
        if key is not None and not draws:
            raise ValueError("emulate: key was given, but nothing is rounded stochastically; leave key out.")
        keys = [None] * 3 if key is None else [jax.random.fold_in(key, i) for i in range(3)]
        arrays = _each(choice.argument, program.arrays, keys[0])
        consts = _each(choice.constant, map(jnp.asarray, program.jaxpr.consts), None)
        out = _jaxpr.evaluate(program.jaxpr.jaxpr, consts, plan, arrays, keys[1])
        return program.output(_each(choice.result, out, keys[2]))

    return emulated  # type: ignore[return-value]


class Choice(NamedTuple):
    """What the arguments of ``emulate`` say.

    Attributes:
      default: what is rounded how, unless a rule says otherwise.
      rules: pairs of a pattern and a Quantizer, Recipe, function or None.
      sums: pairs of a pattern and an order, the last one for all that no other matches.
    """

    default: Quantizer
    rules: tuple[tuple[str, Any], ...]
    sums: tuple[tuple[str, str], ...]

    @property
    def argument(self) -> Quantizer | None:
        """What rounds the arguments."""
        rules = tuple(rule for rule in self.rules if isinstance(rule[1], Quantizer | None))
        return _first(rules, "argument", "argument", ("", self.default))[1]

    @property
    def result(self) -> Quantizer | None:
        """What rounds the results once more."""
        return _first(tuple(r for r in self.rules if r[0] == "result"), "result", "result", ("", None))[1]

    @property
    def constant(self) -> Quantizer:
        """What rounds the arrays that a program holds."""
        return Quantizer(self.default.fmt, saturate=self.default.saturate)


def checked(caller: str, fmt, rounding, saturate: bool, sums, rules) -> Choice:
    default = Quantizer(fmt, rounding, saturate=saturate)
    orders = dict(sums) if isinstance(sums, Mapping) else {".*": sums}
    for pattern, order in orders.items():
        if order not in _sums.ORDERS:
            raise ValueError(f"{caller}: sums must be one of {', '.join(map(repr, _sums.ORDERS))}, got {order!r}.")
        check_pattern(caller, pattern)
    orders.setdefault(".*", "once")
    known = {}
    for pattern, value in (rules or {}).items():
        check_pattern(caller, pattern)
        if not (value is None or isinstance(value, str | Format | Quantizer | Recipe) or callable(value)):
            raise TypeError(
                f"{caller}: rules[{pattern!r}] must be a format, a Quantizer, a Recipe, a function or None, "
                f"got {value!r}."
            )
        is_format = isinstance(value, str | Format)
        known[pattern] = Quantizer(value, default.rounding, saturate=saturate) if is_format else value
        if pattern in ("argument", "result") and not isinstance(known[pattern], Quantizer | None):
            raise TypeError(f"{caller}: rules[{pattern!r}] must be a format, a Quantizer or None, got {value!r}.")
    return Choice(default, tuple(known.items()), tuple(orders.items()))


def _first(rules: tuple, name: str, path: str, default: tuple) -> tuple:
    """Returns the first rule that matches a primitive or its path."""
    return next((r for r in rules if re.fullmatch(r[0], name) or re.fullmatch(r[0], path)), default)


def _each(quantizer: Quantizer | None, arrays, key) -> list:
    folded = (None if key is None else _jaxpr.Key(key).folded(i) for i in itertools.count())
    return [_arithmetic.rounded(x, quantizer, k) for x, k in zip(arrays, folded, strict=False)]


# Functions of this library that round bit patterns, by the names that jit gives them.
_OWN = frozenset(("_chop", "_encode", "_decode", "_expanded", "_contracted", "_quantized_product", "_product_backward"))


class Planned(NamedTuple):
    """What ``emulate`` is about to do.

    Attributes:
      plan: what replaces the equations.
      draws: the quantizers and recipes among them that draw.
    """

    plan: _jaxpr.Plan
    draws: list[Any]


def planned(
    caller: str, program: _jaxpr.Program, choice: Choice, record: Callable | None = None, strict: bool = True
) -> Planned:
    """Returns how a program is emulated, or raises why it cannot be.

    Args:
      record: called with (equation, path, place, kind, what rounds it) for each equation with floats.
      strict: whether a rule that matches nothing is an error.
    """
    used, paths, draws = {"argument", "result"}, set(), []

    def choose(eqn, place: _jaxpr.Place):
        name = eqn.primitive.name
        own = name in ("jit", "pjit") and eqn.params["name"] in _OWN
        if not own and (name in _jaxpr.ENTER or name in _custom.ENTER):
            constants = any(_jaxpr.is_literal(v) and _arithmetic.is_inexact(v) for v in eqn.invars)
            return _jaxpr.Enter(before=_Constants(choice.default) if constants else None, run=_custom.ENTER.get(name))
        kind = "opaque" if own else _arithmetic.kind(eqn)
        if kind == "untouched":
            return _jaxpr.KEEP
        path = "/".join((*(n for n in place.names if not n.startswith(_sites.MODULE)), name))
        pattern, value = _first(choice.rules, name, path, ("", choice.default))
        _, order = _first(choice.sums, name, path, ("", "once"))
        used.add(pattern)
        paths.update((name, path))
        where = lambda: f"{name!r} ({_sites.source(eqn)})"  # noqa: E731
        if kind == "unsupported" and not pattern:
            raise ValueError(
                f"{caller}: no rule says what becomes of the primitive {where()}; rules={{{name!r}: None}} leaves it "
                "as it is, and a format in the place of None rounds its results."
            )
        if kind == "summed" and order != "once" and name not in _arithmetic.ORDERED:
            raise ValueError(
                f"{caller}: the sums of {where()} cannot be {order!r}; pass sums={{{name!r}: 'once', '.*': {order!r}}}."
            )
        if isinstance(value, Recipe) and name not in _sites.OPERATIONS:
            raise TypeError(f"{caller}: the rule {pattern!r} is a Recipe, for products alone; it matches {where()}.")
        recipe = value if isinstance(value, Recipe) else None
        quantizer = choice.default if recipe is not None else value
        if record is not None:
            record(eqn, path, place, kind, value)
        if value is None:
            return _jaxpr.KEEP
        if not isinstance(quantizer, Quantizer):
            assert callable(quantizer)
            return _Instead(quantizer, choice)
        dtypes = {v.aval.dtype for v in eqn.outvars if _arithmetic.is_inexact(v)}
        if kind != "moved" and name not in _arithmetic.EXACT:
            for reason in filter(None, (_arithmetic.unfit(quantizer.fmt, dtype) for dtype in dtypes)):
                raise ValueError(
                    f"{caller}: {reason}, at {where()}; run the program in a longer dtype (float64 has 53: "
                    "jax_enable_x64 and float64 arguments), or give the operation a rule."
                )
        faults = quantizer.faults
        if recipe is None and faults is None and all(_arithmetic.contains(quantizer.fmt, dtype) for dtype in dtypes):
            return _jaxpr.KEEP
        draws.extend(x for x in (quantizer, recipe) if x is not None and x.is_stochastic and kind != "moved")
        return _arithmetic.Rounded(quantizer, order, recipe, kind)

    plan = _jaxpr.plan(program.jaxpr.jaxpr, choose)
    unused = [pattern for pattern, _ in choice.rules if pattern not in used]
    if strict and unused:
        near = difflib.get_close_matches(unused[0], sorted(paths), n=3, cutoff=0.0)
        raise ValueError(
            f"{caller}: the rule {unused[0]!r} matches no operation that an earlier one leaves; the nearest are "
            f"{', '.join(map(repr, near))}."
        )
    if any(jnp.issubdtype(x.dtype, jnp.inexact) for x in program.arrays):
        draws += [q for q in (choice.argument, choice.result) if q is not None and q.is_stochastic]
    return Planned(plan, draws)


@dataclasses.dataclass(frozen=True)
class _Constants:
    """Rounds the constants among the operands of an equation."""

    quantizer: Quantizer

    def __call__(self, eqn, operands):
        return _arithmetic.constants(eqn, operands, self.quantizer)


@dataclasses.dataclass(frozen=True)
class _Instead:
    """A function in the place of an equation, emulated."""

    fn: Callable
    choice: Choice
    name: str = ""

    def __call__(self, eqn, operands, key, state):
        operands = _arithmetic.constants(eqn, operands, self.choice.default)
        program = _jaxpr.trace(self.fn, tuple(operands), eqn.params)
        choice = self.choice._replace(rules=tuple(r for r in self.choice.rules if r[1] is not self.fn))
        plan, _ = planned("emulate", program, choice, strict=False)
        out = _jaxpr.evaluate(program.jaxpr.jaxpr, program.jaxpr.consts, plan, program.arrays, key and key.key)
        out = program.output(out)
        return out if eqn.primitive.multiple_results or not isinstance(out, tuple | list) else out[0]
