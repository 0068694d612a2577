"""Flax nnx: models quantized as they are, and Flax's layers with a recipe.

Variables, their paths and checkpoints are Flax's. Two additions, neither an ``nnx.Param``: with a stochastic recipe a
module has a stream of keys, ``quantize_keys``; with delayed scaling it has ``quantize_histories`` once it has run.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

from qjax import _program
from qjax._coverage import Coverage
from qjax._rules import Checked, Rule, checked, recipes_of
from qjax._sites import MODULE, current_module

M = TypeVar("M", bound=nnx.Module)
KEYS, HISTORIES = "quantize_keys", "quantize_histories"


class Histories(nnx.Variable):
    """The state of the sites with delayed scaling, of which the next one is the "gradient" of this one.

    A quantized model has it as ``quantize_histories`` from its first call on. Differentiate with respect to it too, as
    with ``nnx.DiffState(0, (nnx.Param, qjax.nnx.Histories))``, and put what comes in its place: ``nnx.update``.
    """


def quantize(model: M, rule: Rule, *, strict: bool = True, rngs: nnx.Rngs | None = None) -> M:
    """Returns a model with its dot products and convolutions quantized, of the same Variables.

    It is used as the model, whose class it is a subclass of: it has its attributes and submodules, and every method is
    quantized. Variables are shared, so what trains one trains both; ``nnx.state``, ``nnx.Optimizer``, ``nnx.grad``,
    ``nnx.jit`` and checkpoints see the paths of Flax. A submodule called by itself is the model's, not quantized.

    Args:
      model: any nnx module. It is not changed.
      rule: as ``qjax.quantize`` takes it. Paths are those of the modules ("blocks/0/attn/query"), then the named scopes
        within the module; ``jnp.einsum`` opens one with its subscripts.
      strict: as in ``qjax.quantize``. The patterns are checked in ``__call__``; another method is part of the model, so
        a pattern need not match a site in it.
      rngs: for stochastic recipes, with a stream "quantize" of which the model gets a fork: ``nnx.Rngs(quantize=0)``.

    Raises:
      TypeError, ValueError: for a rule that is none, a missing stream or rngs that nothing would use; while it runs, as
        ``qjax.quantize`` does.

    >>> import jax.numpy as jnp, qjax
    >>> from flax import nnx
    >>> import qjax.nnx
    >>> e4m3 = qjax.Quantizer("e4m3_tensor")
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    >>> quantized = qjax.nnx.quantize(model, {"layers/0": None, ".*": qjax.Recipe(qjax.Gemm(e4m3, e4m3))})
    >>> print(qjax.nnx.coverage(quantized, jnp.ones((2, 4), jnp.float32)))
    path     | operation   | shapes              | forward                   | dlhs | drhs | accumulator
    ---------|-------------|---------------------|---------------------------|------|------|------------
    layers/0 | dot_general | f32[2,4] x f32[4,8] | -                         | -    | -    | -
    layers/2 | dot_general | f32[2,8] x f32[8,2] | e4m3_tensor x e4m3_tensor | -    | -    | -
    1 of 2 dots quantized, 33.3 % of the multiply-adds
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"nnx.quantize: model must be a flax.nnx.Module, got {type(model).__name__}.")
    known = checked("nnx.quantize", rule)
    twin = _as(model, _quantized(type(model), known, strict))
    _give_keys("nnx.quantize", twin, known, rngs)
    if rngs is not None and not hasattr(twin, KEYS):
        raise ValueError("nnx.quantize: rngs was given, but no recipe of the rule draws anything; leave rngs out.")
    return twin


def coverage(model: nnx.Module, *args, rule: Rule | None = None, **kwargs) -> Coverage:
    """Returns the dot products and convolutions of ``model(*args, **kwargs)``, as ``qjax.coverage`` does.

    The model is not run, and its state stays as it is. An example is at ``quantize``.
    """
    graphdef, state = nnx.split(model)

    def fn(state, args, kwargs):
        copy = nnx.merge(graphdef, state)
        with _named(copy, ""):
            copy(*args, **kwargs)

    return _program.coverage(fn, state, args, kwargs, rule=rule)


def modules(tree) -> list[nnx.Module]:
    """Returns the modules among the leaves of a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Module))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Module)]


def functional(fn: Callable, args: tuple, kwargs: dict[str, Any], run: Callable) -> Any:
    """Returns ``fn(*args, **kwargs)`` by way of ``run(pure, state)``, the modules among the arguments named by path."""

    def call(args, kwargs):
        with contextlib.ExitStack() as stack:
            for module in modules((args, kwargs)):
                stack.enter_context(_named(module, ""))
            return fn(*args, **kwargs)

    return _functional(call, (args, kwargs), run)


def _as(model: M, cls: type[M]) -> M:
    """Returns a module of a class with the attributes of another one."""
    twin = object.__new__(cls)
    vars(twin).update(vars(model))
    return twin


def _give_keys(caller: str, module: nnx.Module, rule: Checked, rngs: nnx.Rngs | None) -> None:
    """Gives a module a stream of keys of its own, if its rule draws."""
    recipes = recipes_of(rule)
    draws = rngs is not None if recipes is None else any(recipe.is_stochastic for recipe in recipes)
    if draws and (rngs is None or "quantize" not in rngs):
        raise ValueError(
            f"{caller}: a recipe is stochastic; pass rngs with a stream for it, nnx.Rngs(..., quantize=0)."
        )
    if draws:
        assert rngs is not None
        setattr(module, KEYS, rngs["quantize"].fork())


@functools.lru_cache(maxsize=512)
def _quantized(cls: type[nnx.Module], rule: Checked, strict: bool) -> type[nnx.Module]:
    """Returns a subclass whose methods are quantized. Equal rules give one class, so that equal models compile once."""
    methods = _lifted_methods(cls, "nnx.quantize", lambda self: rule, strict, "__call__")
    return _subclass(cls, **methods)


def _subclass(cls: type[nnx.Module], **attributes) -> type[nnx.Module]:
    kept = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    options = {} if getattr(cls, "_pytree__is_pytree", True) else {"pytree": False}
    make: Any = type(cls)
    return make(cls.__name__, (cls,), kept | attributes, **options)


def _methods(cls: type[nnx.Module]) -> Iterator[str]:
    for name in dir(cls):
        public = name == "__call__" or not (name.startswith("_") or hasattr(nnx.Module, name))
        if public and inspect.isfunction(inspect.getattr_static(cls, name)):
            yield name


def _lifted_methods(cls: type[nnx.Module], caller: str, rule_of, strict: bool, whole: str) -> dict[str, Any]:
    """Returns the methods of a class quantized, one of them by the whole rule."""
    return {name: _lifted(cls, name, caller, rule_of, strict, name == whole) for name in _methods(cls)}


def _lifted(cls: type[nnx.Module], name: str, caller: str, rule_of, strict: bool, whole: bool) -> Callable[..., Any]:
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        rule = rule_of(self)
        if rule is None:
            return original(self, *args, **kwargs)
        root, keys = current_module(), getattr(self, KEYS, None)
        # The keys stay outside: what is drawn from them inside the trace would be undone at its end.
        plain = _as(self, cls)
        vars(plain).pop(KEYS, None)
        vars(plain).pop(HISTORIES, None)

        def call(plain, args, kwargs):
            with _named(plain, root):
                return original(plain, *args, **kwargs)

        held = getattr(self, HISTORIES, None)
        known: dict[str, Any] = {} if held is None else held.get_value()
        missing: dict[str, Any] = {}

        def histories(first):
            missing.update({path: first[path] for path in first if path not in known})
            return missing | known

        def run(pure, state):
            return _program.run(
                caller,
                pure,
                rule,
                (state,),
                {},
                key=lambda: None if keys is None else keys(),
                state=histories,
                ask="rngs=nnx.Rngs(..., quantize=0) when it is made",
                strict=strict,
                whole=whole,
                root=root,
            )

        out = _functional(call, (plain, args, kwargs), run)
        vars(self).update(vars(plain))
        if missing:  # set here, for a Variable belongs to the trace that makes it
            setattr(self, HISTORIES, Histories(missing | known))
        return out

    return method


def _functional(call: Callable, nodes: tuple, run: Callable) -> Any:
    """Returns ``call(*nodes)`` by way of ``run(pure, state)``, a pure function of the state, and updates the nodes.

    Only Variables that change are written, so that a model which an outer transformation closes over can be called; if
    more than values changes, such as attributes, nnx updates the nodes as a whole.
    """
    tag = "qjax"
    found: dict[str, Any] = {}
    with nnx.update_context(tag):
        with nnx.split_context(tag) as context:
            graphdef, state = context.split(nodes)

        def pure(state):
            with nnx.merge_context(tag, inner=True) as context:
                copies = context.merge(graphdef, state)
            variables, (structure, before) = _variables(copies), nnx.split(copies)
            values = [jax.tree.leaves(v.get_raw_value()) for v in variables]
            out = call(*copies)
            new_structure, after = nnx.split(copies)
            changed = [
                (i, v.get_raw_value())
                for i, (v, old) in enumerate(zip(variables, values, strict=True))
                if _differ(jax.tree.leaves(v.get_raw_value()), old)
            ]
            others = _differ(jax.tree.leaves(after), jax.tree.leaves(before)) - sum(
                _differ(jax.tree.leaves(value), values[i]) for i, value in changed
            )
            if new_structure == structure and not others and not _variables(out):
                found["changed"] = [i for i, _ in changed]
                return out, [value for _, value in changed]
            with nnx.split_context(tag) as context:
                found["graphdef"], state = context.split((copies, out))
            return state

        result = run(pure, state)
        if "graphdef" in found:
            with nnx.merge_context(tag, inner=False) as context:
                return context.merge(found["graphdef"], result)[1]
        out, values = result
        variables = _variables(nodes)
        for i, value in zip(found["changed"], values, strict=True):
            variables[i].set_raw_value(value)
        return out


def _variables(nodes) -> list[nnx.Variable]:
    return [node for _, node in nnx.iter_graph(nodes) if isinstance(node, nnx.Variable)]


def _differ(new: list, old: list) -> int:
    """Returns how many of the values are others."""
    return sum(a is not b for a, b in zip(new, old, strict=False)) + abs(len(new) - len(old))


@contextlib.contextmanager
def _named(model: nnx.Module, root: str) -> Iterator[None]:
    """Names the operations of each module in a local copy of a model by its path."""
    modules = [(module, type(module), path) for path, module in nnx.iter_modules(model)]
    for module, cls, path in modules:
        object.__setattr__(module, "__class__", _in_scope(cls, "/".join(filter(None, (root, *map(str, path))))))
    try:
        yield
    finally:
        for module, cls, _ in modules:
            object.__setattr__(module, "__class__", cls)


@functools.lru_cache(maxsize=4096)
def _in_scope(cls: type[nnx.Module], path: str) -> type[nnx.Module]:
    """Returns a subclass whose methods run in a scope with a path."""

    def scoped(name):
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self, *args, **kwargs):
            with jax.named_scope(MODULE + path):
                return original(self, *args, **kwargs)

        return method

    return _subclass(cls, **{name: scoped(name) for name in _methods(cls)})


def _layer(cls: type[nnx.Module]) -> Any:
    """Returns a Flax layer whose constructor also takes ``recipe``."""
    caller, original = f"nnx.{cls.__name__}", getattr(cls, "__init__")  # noqa: B009, its signature is not object's

    def init(self, *args, recipe: Rule | None = None, rngs: nnx.Rngs, **kwargs):
        original(self, *args, rngs=rngs, **kwargs)
        self.recipe = None if recipe is None else checked(caller, recipe)
        if self.recipe is not None:
            _give_keys(caller, self, self.recipe, rngs)

    layer = _subclass(cls, __init__=init, **_lifted_methods(cls, caller, lambda self: self.recipe, False, ""))
    layer.__module__ = __name__
    layer.__doc__ = (
        f"``flax.nnx.{cls.__name__}`` with ``recipe``: a rule as ``quantize`` takes it, None for Flax as it is.\n\n"
        "Variables, their names and initialisers are Flax's. Paths are counted from the layer; sites that a dict does\n"
        "not match stay in full precision. A stochastic recipe needs a stream: ``rngs=nnx.Rngs(0, quantize=1)``."
    )
    return layer


Linear = _layer(nnx.Linear)
LinearGeneral = _layer(nnx.LinearGeneral)
Einsum = _layer(nnx.Einsum)
Conv = _layer(nnx.Conv)
ConvTranspose = _layer(nnx.ConvTranspose)
Embed = _layer(nnx.Embed)
MultiHeadAttention = _layer(nnx.MultiHeadAttention)
LSTMCell = _layer(nnx.LSTMCell)
OptimizedLSTMCell = _layer(nnx.OptimizedLSTMCell)
GRUCell = _layer(nnx.GRUCell)
