"""A function evaluated again with some of its equations replaced: what ``quantize`` and ``coverage`` are made of.

Three steps: ``trace`` makes the jaxpr of a function, ``plan`` asks of each of its equations what is to replace it, and
``evaluate`` runs the jaxpr with the replacements. Equations without a replacement in them are bound as they are.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import _random
from qjax._elementwise import varying
from qjax._stored import Followed, Lost

if TYPE_CHECKING:
    from jax.extend import core

Plan = tuple[tuple[int, Any], ...]
"""What replaces the equations of a jaxpr: (position, replacement) pairs, hashable.

A replacement is a hashable callable ``(equation, operands, Key or None, state) -> outputs`` with a ``name``, that of
its entry in the state or "", and it may have ``draws_by_place``, if it needs no key of its own in each shard; or it is
an ``Enter``.
"""


class Key(NamedTuple):
    """The key of a replacement.

    Attributes:
      key: a PRNG key.
      words: eight words that are drawn from it, or None.
    """

    key: Any
    words: Any = None

    def folded(self, number) -> "Key":
        """Returns a key made of it and a number."""
        return Key(jax.random.fold_in(self.key, number))

    def whitened(self) -> Any:
        """Returns what ``chop`` takes for a key, of which the words are drawn already if they are there."""
        return self.key if self.words is None else _random.Whitened(self.words)


def folded(key: Key | None, number) -> Key | None:
    """Returns ``key.folded(number)``, None for None."""
    return None if key is None else key.folded(number)


class Enter(NamedTuple):
    """What replaces an equation with jaxprs of its own: itself, with these replaced.

    Attributes:
      plans: (name of the parameter, the plan of each of its jaxprs) pairs; ``plan`` fills them in.
      before: None, or a hashable callable (equation, operands) -> operands.
      run: None, or a hashable callable (equation, plans, operands, key) -> outputs, in the place of the usual one.
    """

    plans: tuple[tuple[str, tuple[Plan, ...]], ...] = ()
    before: Callable | None = None
    run: Callable | None = None


class Program(NamedTuple):
    """A traced call.

    Attributes:
      jaxpr: of the arrays alone.
      arrays: the arrays among the arguments.
      output: makes what the function returns from what the jaxpr returns.
    """

    jaxpr: "core.ClosedJaxpr"
    arrays: list[Any]
    output: Callable[[Sequence[Any]], Any]


class Place(NamedTuple):
    """Where in a program an equation is.

    Attributes:
      names: its name stack, outermost first.
      gradient: whether differentiation made it: it is part of a backward pass.
      steps: the lengths of the scans around it, outermost first.
      unsteady: the outermost operation around it that may run it otherwise than once a step, or "".
      inside: the outermost operation around it that ``evaluate`` does not enter, or "".
      position: of the equations around it.
    """

    names: tuple[str, ...] = ()
    gradient: bool = False
    steps: tuple[int, ...] = ()
    unsteady: str = ""
    inside: str = ""
    position: tuple[int, ...] = ()


KEEP = "keep"
"""The answer to ``plan`` that leaves an equation as it is, with all that is in it."""


def trace(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> Program:
    """Returns the program of ``fn(*args, **kwargs)``; leaves that are no arrays stay Python values."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    dynamic = [isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) for x in leaves]
    found: list[Any] = []

    # A function of its own for each call: JAX remembers traces by the function, and this one may close over state.
    def flat(*arrays):
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(rest) if d else x for d, x in zip(dynamic, leaves, strict=True)])
        out, out_tree = jax.tree.flatten(fn(*args, **kwargs))
        found[:] = out_tree, [None if isinstance(x, jax.Array) else (x,) for x in out]
        return [x for x in out if isinstance(x, jax.Array)]

    arrays = [x for d, x in zip(dynamic, leaves, strict=True) if d]
    arrays = [x if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else jnp.asarray(x) for x in arrays]
    jaxpr = jax.make_jaxpr(flat)(*arrays)
    out_tree, static = found

    def output(values: Sequence[Any]) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(out_tree, [next(rest) if x is None else x[0] for x in static])

    return Program(jaxpr, arrays, output)


def plan(jaxpr: "core.Jaxpr", choose: Callable[[Any, Place], Hashable | None], place: Place = Place()) -> Plan:  # noqa: B008
    """Returns what ``choose(equation, place)`` answers for each equation, however deep, in the order of the program.

    Args:
      choose: returns a replacement, ``KEEP``, or None or an ``Enter``, to be asked about the jaxprs in the equation.
    """
    found: list[tuple[int, Any]] = []
    for i, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        stack = eqn.source_info.name_stack.stack
        here = place._replace(
            names=place.names + tuple(s.name for s in stack if type(s).__name__ == "Scope"),
            gradient=place.gradient or any(s.name == "transpose" for s in stack if type(s).__name__ == "Transform"),
        )
        answer = choose(eqn, here)
        if answer is not None and not isinstance(answer, Enter):
            if answer is not KEEP:
                found.append((i, answer))
            continue
        enter = answer or Enter()
        within = here._replace(
            steps=here.steps + ((eqn.params["length"],) if name == "scan" else ()),
            unsteady=here.unsteady or (name if name in ("while", "cond", "shard_map") else ""),
            inside=here.inside or ("" if name in ENTER or enter.run else name),
            position=(*here.position, i),
        )
        plans = tuple((param, tuple(plan(b, choose, within) for b in bodies)) for param, bodies in jaxprs_of(eqn))
        if enter.before is not None or any(any(p) for _, p in plans):
            found.append((i, enter._replace(plans=plans)))
    return tuple(found)


def is_literal(atom) -> bool:
    """Returns whether an operand of an equation is a constant."""
    return hasattr(atom, "val")


def jaxprs_of(eqn) -> Iterator[tuple[str, list[Any]]]:
    """Yields the parameters of an equation that hold jaxprs, with these."""
    for name, value in eqn.params.items():
        values = value if isinstance(value, tuple | list) else (value,)
        bodies = [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns")]
        if bodies:
            yield name, bodies


def holds(eqn, primitives: frozenset[str]) -> bool:
    """Returns whether an equation is one of the primitives or has one in it."""
    return eqn.primitive.name in primitives or any(
        holds(e, primitives) for _, bodies in jaxprs_of(eqn) for body in bodies for e in body.eqns
    )


def evaluate(
    jaxpr: "core.Jaxpr", consts: Sequence[Any], plan: Plan, args: Sequence[Any], key=None, state: dict | None = None
) -> list[Any]:
    """Returns the outputs of a jaxpr with the equations of a plan replaced.

    Arguments that are ``Followed`` stay so through transpositions, conversions between floats, and into operations that
    have replacements in them. Replacements are given them, all else their values.

    With a key, each replacement gets one of its own: the number of the replacement is folded in, in loops that of the
    iteration, in ``shard_map`` that of the shard, unless it draws by place. Of the state each gets the entry of its
    name, in a scan its step's.
    """
    from jax.extend import source_info_util  # loads Pallas, which `import qjax` should not

    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if is_literal(atom) else env[atom]

    numbered = {position: (number, replacement) for number, (position, replacement) in enumerate(plan)}
    keys = words = None
    if key is not None:  # All at once: each by itself takes as long to compile as the rounding.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(plan), dtype=jnp.uint32))
        words = jax.vmap(functools.partial(_random.key_words, count=8))(keys)
    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(v) for v in eqn.invars]
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
            if i not in numbered:
                out = eqn.primitive.bind(*map(value_of, operands), **eqn.primitive.get_bind_params(eqn.params))
                if eqn.primitive.name in _FOLLOWING and isinstance(operands[0], Followed):
                    out = _FOLLOWING[eqn.primitive.name](operands[0], out, eqn.params)
            else:
                number, replacement = numbered[i]
                own = None if keys is None or words is None else Key(keys[number], words[number])
                if isinstance(replacement, Enter):
                    if replacement.run is not None:
                        operands = [value_of(x) for x in operands]
                    elif eqn.primitive.name in ("while", "shard_map"):
                        operands = [_lost(x) for x in operands]
                    if replacement.before is not None:
                        operands = replacement.before(eqn, operands)
                    plans = dict(replacement.plans)
                    if replacement.run is not None:
                        out = replacement.run(eqn, plans, operands, own and own.key)
                    else:
                        out = ENTER[eqn.primitive.name](eqn.params, plans, operands, own and own.key, state)
                else:
                    axes = set().union(*(varying(v.aval) for v in eqn.invars))
                    out = OfShard(replacement, axes)(eqn, operands, own, state and state.get(replacement.name))
        env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
    return [value_of(read(v)) for v in jaxpr.outvars]


def value_of(x):
    """Returns the array that an operand is."""
    return x.value if isinstance(x, Followed) else x


def _lost(x):
    """Returns an operand that is not followed into what it is given to."""
    return Followed(x.value, Lost(getattr(x.source, "fmt", None)), ()) if isinstance(x, Followed) else x


def _transposed(x: Followed, out, params) -> Followed:
    lost = isinstance(x.source, Lost)
    return Followed(out, x.source, () if lost else tuple(x.order[a] for a in params["permutation"]))


def _converted(x: Followed, out, params):
    return Followed(out, x.source, x.order) if jnp.issubdtype(out.dtype, jnp.floating) else out


_FOLLOWING = {"transpose": _transposed, "convert_element_type": _converted}
"""The operations that an array is followed through: from it, their result and parameters to what is followed then."""


def run(closed: Any, plan: Plan, args: Sequence[Any], key, state=None) -> list[Any]:
    """Returns what ``evaluate`` does for a jaxpr, closed or not."""
    jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
    return evaluate(jaxpr, consts, plan, args, key, state)


def _names(plan: Plan) -> set[str]:
    """Returns the names of the replacements in a plan, however deep."""
    inner = [p for _, r in plan if isinstance(r, Enter) for _, plans in r.plans for p in plans]
    return {r.name for _, r in plan if not isinstance(r, Enter)}.union(*map(_names, inner))


class OfShard(NamedTuple):
    """A replacement with a key of its own in each shard along some axes, unless it draws by place."""

    replacement: Callable
    axes: Iterable[str]

    @property
    def name(self) -> str:
        return self.replacement.name  # type: ignore[attr-defined]

    def __call__(self, eqn, operands, key: Key | None, state):
        if key is not None and not getattr(self.replacement, "draws_by_place", False):
            for axis in sorted(self.axes):
                key = key.folded(jax.lax.axis_index(axis))
        return self.replacement(eqn, operands, key, state)


def _of_shards(plan: Plan, axes: tuple[str, ...]) -> Plan:
    """Returns a plan with a key of its own for each replacement, however deep, in each shard."""

    def mine(replacement):
        if not isinstance(replacement, Enter):
            return OfShard(replacement, axes)
        plans = tuple((name, tuple(_of_shards(p, axes) for p in inner)) for name, inner in replacement.plans)
        return replacement._replace(plans=plans)

    return tuple((position, mine(replacement)) for position, replacement in plan)


def _call(params, plans, args, key, state):
    (name, (body,)) = next(iter(plans.items()))
    return run(params[name], body, args, key, state)


def _jit(params, plans, args, key, state):
    # Equal plans share one compiled function, so that a jitted helper is not compiled again in each eager call.
    names = ("in_shardings", "out_shardings", "donated_invars", "keep_unused", "inline", "compiler_options_kvs", "name")
    settings = tuple((name, params[name]) for name in names)
    if any(map(_is_specified, params["in_shardings"])):  # those of arrays, which codes do not have
        args = [value_of(x) for x in args]
    return _jitted(params["jaxpr"], plans["jaxpr"][0], settings)(key, state, *args)


@functools.lru_cache(maxsize=512)
def _jitted(jaxpr: "core.ClosedJaxpr", plan: Plan, settings: tuple):
    def fn(key, state, *args):
        return tuple(run(jaxpr, plan, args, key, state))

    s = dict(settings)
    fn.__name__ = fn.__qualname__ = s["name"]
    shardings = {}
    if any(map(_is_specified, s["in_shardings"])):
        shardings["in_shardings"] = (None, None, *s["in_shardings"])
    if any(map(_is_specified, s["out_shardings"])):
        shardings["out_shardings"] = s["out_shardings"]
    return jax.jit(
        fn,
        donate_argnums=tuple(i + 2 for i, donated in enumerate(s["donated_invars"]) if donated),
        keep_unused=s["keep_unused"],
        inline=s["inline"],
        compiler_options=dict(s["compiler_options_kvs"]) or None,
        **shardings,
    )


def _is_specified(sharding) -> bool:
    return type(sharding).__name__ != "UnspecifiedValue"


def _remat(params, plans, args, key, state):
    cse = params["prevent_cse"]
    fn = jax.checkpoint(
        lambda key, state, *args: run(params["jaxpr"], plans["jaxpr"][0], args, key, state),
        prevent_cse=cse if isinstance(cse, bool) else (False, *cse),
        policy=params["policy"],
    )
    return fn(key, state, *args)


def _scan(params, plans, args, key, state):
    if "ft_in" in params:  # jax 0.12
        consts, init, xs = (list(part) for part in params["ft_in"].update(args).unpack())
    else:
        start, end = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, init, xs = args[:start], args[start:end], args[end:]
    init, xs = [value_of(x) for x in init], [_lost(x) for x in xs]
    steps = None if key is None else jnp.arange(params["length"], dtype=jnp.uint32)
    mine = state and {name: state[name] for name in _names(plans["jaxpr"][0]) & set(state)}

    def body(carry, x):
        step, state, x = x
        own = None if key is None else jax.random.fold_in(key, step)
        out = run(params["jaxpr"], plans["jaxpr"][0], [*consts, *carry, *x], own, state)
        return out[: len(init)], out[len(init) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params}
    carry, ys = jax.lax.scan(body, init, (steps, mine, xs), **options)
    return [*carry, *ys]


def _while(params, plans, args, key, state):
    of_cond, of_body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    step = None if key is None else jnp.uint32(0)

    def part(name, number, consts, state):
        step, carry = state
        own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), step)
        return run(params[name], plans[name][0], [*consts, *carry], own)

    def cond(state):
        return part("cond_jaxpr", 0, args[:of_cond], state)[0]

    def body(state):
        carry = part("body_jaxpr", 1, args[of_cond:of_body], state)
        return None if key is None else state[0] + jnp.uint32(1), carry

    return jax.lax.while_loop(cond, body, (step, [value_of(x) for x in args[of_body:]]))[1]


def _cond(params, plans, args, key, state):
    index, *operands = args
    branches = [
        functools.partial(lambda branch, plan, *args: run(branch, plan, args, key), branch, plan)
        for branch, plan in zip(params["branches"], plans["branches"], strict=True)
    ]
    return jax.lax.switch(index, branches, *operands)


def _shard_map(params, plans, args, key, state):
    axes = params.get("newly_manual_axes", params.get("manual_axes"))
    plan = plans["jaxpr"][0]
    if not params["check_vma"]:  # then no operand says what it varies over
        plan = _of_shards(plan, tuple(sorted(axes)))

    def fn(key, *args):
        return tuple(run(params["jaxpr"], plan, args, key))

    return jax.shard_map(
        fn,
        mesh=params["mesh"],
        in_specs=(jax.P(), *params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=axes,
        check_vma=params["check_vma"],
    )(key, *args)


ENTER: dict[str, Callable[..., Any]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "call": _call,
    "eval_jaxpr": _call,
    "remat": _remat,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
"""How to run the operations with jaxprs in them: from (parameters, plans, operands, key, state) to outputs.

What is unsteady (``Place``) hands no state on.
"""
