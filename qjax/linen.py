"""Flax linen: models quantized as they are, and Flax's layers with a recipe.

Parameters, their names, initialisers and checkpoints are Flax's, and so are ``init``, ``apply``, collections and PRNG
streams. The one addition is the stream "quantize", which is drawn from if a recipe that is used is stochastic.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
from flax import linen as nn
from flax.core import lift
from flax.linen import transforms
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from qjax import _program
from qjax._coverage import Coverage
from qjax._rules import Checked, Rule, checked, recipes_of
from qjax._sites import MODULE

M = TypeVar("M", bound=nn.Module)
STATE = "histories"


def quantize(model: M, rule: Rule, *, strict: bool = True) -> M:
    """Returns a model with its dot products and convolutions quantized, and the same parameters.

    It is used as the model: every method of it is quantized, called through ``apply`` or from another module.
    ``init`` runs the model as it is, so parameters are the same bit for bit. A stochastic recipe needs
    ``apply(..., rngs={"quantize": key})``. A recipe with delayed scaling has its state in the collection
    "_overwrite_with_gradient", which ``init`` makes, and whose "gradient" is the next state, as in Flax's own FP8
    layers: ``flax.training.train_state.TrainState`` puts it there.

    Args:
      model: any linen module. It is not changed.
      rule: as ``qjax.quantize`` takes it. Paths are those of the parameters ("block_0/attn/query"), then the named
        scopes within the module; ``jnp.einsum`` opens one with its subscripts.
      strict: as in ``qjax.quantize``. The patterns are checked in ``__call__``; another method is part of the model, so
        a pattern need not match a site in it.

    Raises:
      TypeError, ValueError: for a rule that is none; while it runs, as ``qjax.quantize`` does.

    >>> import jax, jax.numpy as jnp, qjax
    >>> import flax.linen as nn
    >>> import qjax.linen
    >>> e4m3 = qjax.Quantizer("e4m3_tensor")
    >>> x = jnp.ones((2, 4), jnp.float32)
    >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    >>> variables = model.init(jax.random.key(0), x)
    >>> quantized = qjax.linen.quantize(model, {"layers_0": None, ".*": qjax.Recipe(qjax.Gemm(e4m3, e4m3))})
    >>> print(qjax.linen.coverage(quantized, variables, x))
    path     | operation   | shapes              | forward                   | dlhs | drhs | accumulator
    ---------|-------------|---------------------|---------------------------|------|------|------------
    layers_0 | dot_general | f32[2,4] x f32[4,8] | -                         | -    | -    | -
    layers_2 | dot_general | f32[2,8] x f32[8,2] | e4m3_tensor x e4m3_tensor | -    | -    | -
    1 of 2 dots quantized, 33.3 % of the multiply-adds
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"linen.quantize: model must be a flax.linen.Module, got {type(model).__name__}.")
    # A module made in a compact method has its scope already, and is to keep it.
    twin = model.clone() if model.scope is None else copy.copy(model)
    object.__setattr__(twin, "__class__", _quantized(type(model), checked("linen.quantize", rule), strict))
    return twin


def coverage(model: nn.Module, variables: Any, *args, rule: Rule | None = None, **kwargs) -> Coverage:
    """Returns the dot products and convolutions of ``model.apply(variables, ...)``, with the paths that rules match.

    It is ``qjax.coverage``, and takes a rule to see what it would do. An example is at ``quantize``.
    """
    with naming():
        return _program.coverage(model.apply, variables, *args, rule=rule, **kwargs)


def naming() -> AbstractContextManager[None]:
    """Returns a context in which the operations of modules are named by their paths, when they are traced in it."""
    return nn.intercept_methods(_in_scope_of_module)


@functools.lru_cache(maxsize=512)
def _quantized(cls: type[nn.Module], rule: Checked, strict: bool) -> type[nn.Module]:
    """Returns the class of quantized models. Equal rules give one class, so that equal models are equal."""
    return _subclass(cls, "linen.quantize", lambda self: rule, strict, "__call__")


def _subclass(
    cls: type[nn.Module], caller: str, rule_of: Callable[[Any], Checked | None], strict: bool, whole: str, **fields
) -> type[nn.Module]:
    """Returns a subclass whose methods are quantized, one of them by the whole rule."""
    methods = {name: _lifted(cls, name, caller, rule_of, strict, name == whole) for name in _methods(cls)}
    # The name is kept: modules without a name are called after their class.
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **fields, **methods})


def _methods(cls: type[nn.Module]) -> Iterator[str]:
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        public = name == "__call__" or not (name.startswith("_") or hasattr(nn.Module, name))
        if public and inspect.isfunction(method) and not hasattr(method, "nowrap"):
            yield name


def _lifted(cls: type[nn.Module], name: str, caller: str, rule_of, strict: bool, whole: bool) -> Callable[..., Any]:
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        rule = rule_of(self)
        if rule is None or self.scope is None:
            return original(self, *args, **kwargs)
        if self.is_initializing():
            out = original(self, *args, **kwargs)
            if not _has_history(rule):
                return out
        state = self._state.export()

        # As in flax.linen.transforms: the module again, of the class that is not quantized, on the scopes of the trace.
        def on_scopes(scopes, *args, **kwargs):
            fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(cls) if f.init and f.name != "parent"}
            plain, args, kwargs = transforms.set_module_scopes(cls(parent=None, **fields), args, kwargs, scopes)
            object.__setattr__(plain, "_state", state.export())
            with naming():
                out = original(plain, *args, **kwargs)
            self._state.reimport(plain._state)
            return out

        scopes, args, kwargs = transforms.get_module_scopes(self, args, kwargs)

        def pure_and_quantized(scope_fn, repack_fn, variables, rngs, *args, **kwargs):
            def pure(variables, rngs, *args, **kwargs):
                inner = scope_fn(variables, rngs)
                return on_scopes(inner, *args, **kwargs), repack_fn(inner)

            if self.is_initializing():
                options = {"strict": strict, "whole": whole, "root": "/".join(self.scope.path)}
                planned = _program.plan_of(caller, pure, rule, (variables, rngs, *args), kwargs, **options)
                return planned.state, repack_fn(scope_fn(variables, rngs))
            return _program.run(
                caller,
                pure,
                rule,
                (variables, rngs, *args),
                kwargs,
                key=lambda: self.scope.make_rng("quantize") if self.scope.has_rng("quantize") else None,
                state=lambda first: self.scope.get_variable(OVERWRITE_WITH_GRADIENT, STATE, None),
                ask='rngs={"quantize": jax.random.key(...)} to apply',
                ask_state=f"the variables that init of the quantized model makes, with {OVERWRITE_WITH_GRADIENT!r}",
                strict=strict,
                whole=whole,
                root="/".join(self.scope.path),
            )

        lifted = lift.pack(pure_and_quantized, (True,), (True,), (True,), name="quantize", enable_kwargs=True)
        if not self.is_initializing():
            return lifted(scopes, *args, **kwargs)
        if first := lifted(scopes, *args, **kwargs):
            known = self.scope.get_variable(OVERWRITE_WITH_GRADIENT, STATE, {})
            self.scope.put_variable(OVERWRITE_WITH_GRADIENT, STATE, first | known)
        return out

    return method


def _has_history(rule: Checked) -> bool:
    recipes = recipes_of(rule)
    return recipes is None or any(recipe.history is not None for recipe in recipes)


def _in_scope_of_module(call, args, kwargs, context):
    """Names the operations of a module by its path."""
    if context.module.scope is None:
        return call(*args, **kwargs)
    with jax.named_scope(MODULE + "/".join(context.module.path)):
        return call(*args, **kwargs)


def _layer(cls: type[nn.Module]) -> Any:
    """Returns a Flax layer with one more field, ``recipe``."""

    def rule_of(self):
        return None if self.recipe is None else checked(f"linen.{cls.__name__}", self.recipe)

    layer = _subclass(cls, f"linen.{cls.__name__}", rule_of, False, "", __annotations__={"recipe": Any}, recipe=None)
    layer.__module__ = __name__
    layer.__doc__ = (
        f"``flax.linen.{cls.__name__}`` with ``recipe``: a rule as ``quantize`` takes it, None for Flax as it is.\n\n"
        "Parameters, names and initialisers are Flax's. Paths are counted from the layer; sites that a dict does not\n"
        "match stay in full precision."
    )
    return layer


Dense = _layer(nn.Dense)
DenseGeneral = _layer(nn.DenseGeneral)
Einsum = _layer(nn.Einsum)
Conv = _layer(nn.Conv)
ConvLocal = _layer(nn.ConvLocal)
ConvTranspose = _layer(nn.ConvTranspose)
Embed = _layer(nn.Embed)
MultiHeadDotProductAttention = _layer(nn.MultiHeadDotProductAttention)
MultiHeadAttention = _layer(nn.MultiHeadAttention)
LSTMCell = _layer(nn.LSTMCell)
OptimizedLSTMCell = _layer(nn.OptimizedLSTMCell)
GRUCell = _layer(nn.GRUCell)
