"""``quantize`` and ``coverage``: the dot products of a whole function quantized, and shown."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array

from qjax import _dot, _jaxpr
from qjax._coverage import Coverage
from qjax._recipe import Recipe
from qjax._rules import Checked, Rule, assigned, checked, named
from qjax._sites import Site, find

F = TypeVar("F", bound=Callable[..., Any])


def quantize(fn: F, rule: Rule, *, key: Array | None = None, strict: bool = True) -> F:
    """Returns fn with its dot products and convolutions quantized.

    The function is traced, and evaluated again with ``qjax.dot_general`` and ``qjax.conv_general_dilated`` in the place
    of lax's. All else is as it was, bit for bit. This goes into jit, scan, while, cond, ``jax.checkpoint`` and
    ``shard_map``, and composes with every transformation from outside. Nothing is remembered from call to call, so
    what was compiled before does not matter.

    Args:
      fn: any function that JAX can trace. Arguments and results that are no arrays stay Python values.
      rule: a ``Recipe`` for every site; or a dict of path patterns to a ``Recipe``, or to None for full precision, of
        which the first that matches the whole path (``re.fullmatch``) counts; or a function of a ``Site`` that returns
        one of both. ``qjax.coverage`` shows the sites and their paths.
      key: the PRNG key, if a recipe is stochastic. Each site, each step of a loop and each shard draws its own bits.
      strict: whether a pattern that matches no site and a site that no pattern matches are errors.

    Gradients: write ``grad(quantize(f))``. The gradient products then follow the recipe; in ``quantize(grad(f))`` they
    could not be told from forward ones, and are refused. Functions with a derivative of their own (``jax.custom_vjp``,
    ``jax.custom_jvp``) keep it: they stay as they are, and products in them are refused, as are those in kernels and
    callbacks. Use ``qjax.dot_general`` in there, and give their paths None.

    Raises:
      TypeError, ValueError: for a rule that is none, matches nothing or leaves a site out, for a site that cannot be
        quantized where it is, for a missing key, and for a key that nothing would use.

    >>> import jax, jax.numpy as jnp, qjax
    >>> e2m1 = qjax.Quantizer("e2m1")
    >>> recipe = qjax.Recipe(qjax.Gemm(e2m1, e2m1))
    >>> def f(x, w):
    ...     return jax.nn.relu(x @ w).sum()
    >>> x, w = jnp.full((2, 4), 0.3, jnp.float32), jnp.full((4, 2), 0.7, jnp.float32)
    >>> f(x, w), qjax.quantize(f, recipe)(x, w)
    (Array(3.36, dtype=float32), Array(4., dtype=float32))
    """
    known = checked("quantize", rule)

    @functools.wraps(fn)
    def quantized(*args, **kwargs):
        return run("quantize", fn, known, args, kwargs, key=key, strict=strict)

    return quantized  # type: ignore[return-value]


def einsum(
    subscripts: str,
    /,
    *operands,
    recipe: Recipe | None,
    key: Array | None = None,
    optimize: str | bool | list[tuple[int, ...]] = "auto",
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
) -> Array:
    """Returns ``jax.numpy.einsum(subscripts, *operands, ...)`` with its dot products quantized.

    Of two operands the first is the lhs of the recipe, also where ``jax.numpy.einsum`` swaps them. Of more, the lhs of
    each product is that of lax, which ``qjax.coverage`` shows.

    Args:
      subscripts, operands, optimize, precision, preferred_element_type, out_sharding: as in ``jax.numpy.einsum``.
      recipe: a ``Recipe``; an empty one or None is ``jax.numpy.einsum``, bit for bit.
      key: the PRNG key of a stochastic recipe. Each product draws its own bits.

    Raises:
      TypeError, ValueError: as ``quantize`` does; if there is no product to quantize.

    >>> import jax.numpy as jnp, qjax
    >>> int4 = qjax.Quantizer("int4")
    >>> x = jnp.array([[1.4, 2.6]], jnp.float32)
    >>> qjax.einsum("ij,kj->ik", x, x, recipe=qjax.Recipe(qjax.Gemm(int4, int4)))
    Array([[10.]], dtype=float32)
    """
    fn = functools.partial(
        jnp.einsum,
        subscripts,
        optimize=optimize,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if recipe is None or (isinstance(recipe, Recipe) and recipe.is_empty):
        return fn(*operands)
    if isinstance(recipe, Recipe) and len(operands) == 2 and _swaps(fn, operands):
        recipe = recipe.swapped()
    return run("einsum", fn, checked("einsum", recipe), operands, {}, key=key, strict=True)


def _swaps(fn: Callable, operands: tuple) -> bool:
    """Returns whether the product that a function of two operands makes has the second one first."""
    found: list[bool] = []

    def visit(jaxpr, first):
        of_first = {v for v, mine in zip(jaxpr.invars, first, strict=True) if mine}
        for eqn in jaxpr.eqns:
            mine = [v in of_first for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)]
            if eqn.primitive.name == "dot_general":
                found.append(not mine[0])
            for body in (p.jaxpr for p in eqn.params.values() if isinstance(p, jax.extend.core.ClosedJaxpr)):
                visit(body, mine)
            of_first |= set(eqn.outvars) if any(mine) else set()

    visit(jax.make_jaxpr(fn)(*operands).jaxpr, (True, False))
    return found[:1] == [True]


def run(
    caller: str,
    fn: Callable,
    rule: Checked,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    key: Array | Callable[[], Array | None] | None,
    ask: str = "key=jax.random.key(...)",
    strict: bool,
    whole: bool = True,
    root: str = "",
) -> Any:
    """Returns ``fn(*args, **kwargs)`` quantized.

    Args:
      key: the key, or a function that makes it, called only if it is needed.
      ask: what the user has to pass for it.
      whole: whether the rule is about this function alone.
      root: the path of the module that the rule's paths are counted from.
    """
    program = _jaxpr.trace(fn, args, kwargs)
    sites: list[Site] = []
    find(program, sites.append, root)
    recipes = assigned(caller, rule, sites, strict=strict, whole=whole)
    stochastic = [
        s for s, r in zip(sites, recipes, strict=True) if s.recipe is None and r is not None and r.is_stochastic
    ]
    if callable(key):
        key = key() if stochastic else None
    if stochastic and key is None:
        raise ValueError(f"{caller}: the recipe of {named(stochastic[0])} is stochastic; pass {ask}.")
    if key is not None and not stochastic:
        raise ValueError(f"{caller}: key was given, but no recipe that is used draws anything; leave key out.")
    answers = iter(recipes)

    def replace(site: Site):
        recipe = next(answers)
        return None if site.recipe is not None or recipe is None or recipe.is_empty else _Replacement(recipe)

    plan = find(program, replace, root)
    return program.output(_jaxpr.evaluate(program.jaxpr.jaxpr, program.jaxpr.consts, plan, program.arrays, key))


@dataclasses.dataclass(frozen=True)
class _Replacement:
    """A quantized operation in the place of lax's."""

    recipe: Recipe

    def __call__(self, eqn, operands, key):
        operation = getattr(_dot, eqn.primitive.name)
        params = {name: value for name, value in eqn.params.items() if value is not None}
        return operation(*operands, **params, recipe=self.recipe, key=key if self.recipe.is_stochastic else None)


def coverage(fn: Callable, *args, rule: Rule | None = None, **kwargs) -> Coverage:
    """Returns the dot products and convolutions of ``fn(*args, **kwargs)``, and what each operand is quantized to.

    Args:
      fn: any function that JAX can trace; with what ``qjax.quantize`` made of it, what is quantized is seen in its
        jaxpr. It is not run.
      args: its arguments, arrays or ``jax.ShapeDtypeStruct``.
      rule: a rule as ``qjax.quantize`` takes it, to see what it would do. It may leave sites out.
      kwargs: its keyword arguments.

    Raises:
      TypeError, ValueError: as ``quantize`` with ``strict=False``.

    >>> import jax.numpy as jnp, qjax
    >>> e4m3 = qjax.Quantizer("e4m3_tensor")
    >>> x = jnp.ones((2, 4), jnp.float32)
    >>> print(qjax.coverage(lambda x: x @ x.T, x, rule=qjax.Recipe(qjax.Gemm(e4m3, e4m3))))
    path | operation   | shapes              | forward                   | dlhs | drhs | accumulator
    -----|-------------|---------------------|---------------------------|------|------|------------
         | dot_general | f32[2,4] x f32[4,2] | e4m3_tensor x e4m3_tensor | -    | -    | -
    1 of 1 dots quantized, 100.0 % of the multiply-adds
    """
    sites: list[Site] = []
    find(_jaxpr.trace(fn, args, kwargs), sites.append)
    if rule is not None:
        recipes = assigned("coverage", checked("coverage", rule), sites, strict=False)
        sites = [dataclasses.replace(site, recipe=recipe) for site, recipe in zip(sites, recipes, strict=True)]
    return Coverage(sites)
