"""``quantize`` and ``coverage``: the dot products of a whole function quantized, and shown."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from qjax import _dot, _jaxpr
from qjax._coverage import Coverage
from qjax._encode import decode, is_qtensor
from qjax._recipe import Recipe
from qjax._rules import Checked, Rule, assigned, checked, named
from qjax._sites import Site, find
from qjax._stored import Followed

F = TypeVar("F", bound=Callable[..., Any])


State = dict[str, dict[str, Array]]


def quantize(fn: F, rule: Rule, *, key: Array | None = None, state: State | None = None, strict: bool = True) -> F:
    """Returns fn with its dot products and convolutions quantized.

    The function is traced, and evaluated again with ``qjax.dot_general`` and ``qjax.conv_general_dilated`` in the place
    of lax's. All else is as it was, bit for bit. This goes into jit, scan, while, cond, ``jax.checkpoint`` and
    ``shard_map``, and composes with every transformation from outside. Nothing is remembered from call to call, so
    what was compiled before does not matter.

    Args:
      fn: any function that JAX can trace. Arguments and results that are no arrays stay Python values. A ``QTensor``
        among the arguments is the array of its values to fn; a product that it is an operand of, transposed or
        converted at most, and whose recipe has its format, multiplies its codes as they are.
      rule: a ``Recipe`` for every site; or a dict of path patterns to a ``Recipe``, or to None for full precision, of
        which the first that matches the whole path (``re.fullmatch``) counts; or a function of a ``Site`` that returns
        one of both. ``qjax.coverage`` shows the sites and their paths.
      key: the PRNG key, if a recipe is stochastic. Each site, each step of a loop and each shard draws its own bits; a
        site whose recipe is ``sharded`` those of the places of elements in the whole.
      state: for recipes with delayed scaling, that of ``quantize_state``; its "gradient" is the next one.
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
        return run("quantize", fn, known, args, kwargs, key=key, state=state, strict=strict)

    return quantized  # type: ignore[return-value]


def quantize_state(fn: Callable, rule: Rule, *args, strict: bool = True, **kwargs) -> State:
    """Returns the first state of ``quantize(fn, rule)(*args, **kwargs)``: that of each site with delayed scaling.

    The keys are paths, followed by #2, #3 ... where a path has several sites; in a scan the arrays have an entry for
    each step. The function is traced and not run.

    Raises:
      TypeError, ValueError: as ``quantize`` does.

    >>> import jax, jax.numpy as jnp, qjax
    >>> from qjax import recipes
    >>> def f(x, w):
    ...     return jnp.sum(x @ w)
    >>> x, w = jnp.ones((2, 4), jnp.float32), jnp.ones((4, 2), jnp.float32)
    >>> state = qjax.quantize_state(f, recipes.FP8_DELAYED, x, w)
    >>> loss = lambda w, state: qjax.quantize(f, recipes.FP8_DELAYED, state=state)(x, w)
    >>> dw, state = jax.grad(loss, argnums=(0, 1))(w, state)
    >>> {path: float(histories["rhs"][0]) for path, histories in state.items()}
    {'': 1.0}
    """
    return plan_of("quantize_state", fn, checked("quantize_state", rule), args, kwargs, strict=strict).state


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
            mine = [not _jaxpr.is_literal(v) and v in of_first for v in eqn.invars]
            if eqn.primitive.name == "dot_general":
                found.append(not mine[0])
            for _, inner in _jaxpr.jaxprs_of(eqn):
                for body in inner:
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
    state: State | Callable[[State], State | None] | None = None,
    ask: str = "key=jax.random.key(...)",
    ask_state: str = "state=qjax.quantize_state(...)",
    strict: bool,
    whole: bool = True,
    root: str = "",
) -> Any:
    """Returns ``fn(*args, **kwargs)`` quantized.

    Args:
      key: the key, or a function that makes it, called only if it is needed.
      state: the state of delayed scaling, or a function that makes it of the first one, called only if it is needed.
      ask, ask_state: what the user has to pass for them.
      whole: whether the rule is about this function alone.
      root: the path of the module that the rule's paths are counted from.
    """
    program, plan, stochastic, first = plan_of(caller, fn, rule, args, kwargs, strict=strict, whole=whole, root=root)
    if callable(key):
        key = key() if stochastic else None
    if stochastic and key is None:
        raise ValueError(f"{caller}: the recipe of {named(stochastic[0])} is stochastic; pass {ask}.")
    if key is not None and not stochastic:
        raise ValueError(f"{caller}: key was given, but no recipe that is used draws anything; leave key out.")
    if callable(state):
        state = state(first) if first else None
    if first and (state is None or not set(first) <= set(state)):
        missing = next(iter(set(first) - set(state or {})))
        raise ValueError(f"{caller}: the recipe of {missing!r} has delayed scaling; pass {ask_state}.")
    if state is not None and not first:
        raise ValueError(f"{caller}: state was given, but no recipe that is used has delayed scaling; leave state out.")
    return program.output(_jaxpr.evaluate(program.jaxpr.jaxpr, program.jaxpr.consts, plan, program.arrays, key, state))


class Planned(NamedTuple):
    """What ``quantize`` is about to do.

    Attributes:
      program: the traced call.
      plan: what replaces its products.
      stochastic: the sites that draw.
      state: the first state of those with delayed scaling.
    """

    program: _jaxpr.Program
    plan: _jaxpr.Plan
    stochastic: list[Site]
    state: State


def plan_of(
    caller: str, fn: Callable, rule: Checked, args: tuple, kwargs: dict[str, Any], *, strict, whole=True, root=""
) -> Planned:
    """Returns how ``fn(*args, **kwargs)`` is quantized; the arguments are those of ``run``."""
    program = _opened(fn, args, kwargs)
    sites: list[Site] = []
    find(program, sites.append, root)
    recipes = assigned(caller, rule, sites, strict=strict, whole=whole)
    answers, stochastic, state = iter(recipes), [], {}

    def replace(site: Site):
        recipe = next(answers)
        if site.recipe is not None or recipe is None or recipe.is_empty:
            return None
        if recipe.is_stochastic:
            stochastic.append(site)
        if recipe.history is None:
            return Quantized(recipe)
        name = site.path if site.path not in state else f"{site.path}#{_count(state, site.path) + 1}"
        state[name] = {k: jnp.broadcast_to(h, (*site.steps, *h.shape)) for k, h in recipe.init().items()}
        return Quantized(recipe, name)

    return Planned(program, find(program, replace, root), stochastic, state)


def _opened(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> _jaxpr.Program:
    """Returns the program of ``fn(*args, **kwargs)`` with an array for each ``QTensor``, which it is followed from."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_qtensor)
    values = [decoded(x) for x in leaves]
    args, kwargs = jax.tree.unflatten(tree, values)
    program = _jaxpr.trace(fn, args, kwargs)
    sources = {id(value): leaf for value, leaf in zip(values, leaves, strict=True) if is_qtensor(leaf)}
    arrays = [Followed(x, sources[id(x)], tuple(range(x.ndim))) if id(x) in sources else x for x in program.arrays]
    return program._replace(arrays=arrays)


def decoded(x):
    """Returns the values of a leaf, of shapes alone the shapes of those."""
    if is_qtensor(x) and isinstance(x.codes, jax.ShapeDtypeStruct):
        return jax.eval_shape(decode, x)
    return decode(x) if is_qtensor(x) else x


def _count(state: State, path: str) -> int:
    return sum(name == path or name.startswith(f"{path}#") for name in state)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized operation in the place of lax's."""

    recipe: Recipe
    name: str = ""

    @property
    def draws_by_place(self) -> bool:
        return self.recipe.draws_by_place

    def __call__(self, eqn, operands, key, state):
        operation = getattr(_dot, eqn.primitive.name)
        options = {name: value for name, value in eqn.params.items() if value is not None}
        options |= {"key": key.key} if self.recipe.is_stochastic else {}
        options |= {"state": state} if self.recipe.history is not None else {}
        return operation(*operands, **options, recipe=self.recipe)


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
    find(_opened(fn, args, kwargs), sites.append)
    if rule is not None:
        recipes = assigned("coverage", checked("coverage", rule), sites, strict=False)
        sites = [dataclasses.replace(site, recipe=recipe) for site, recipe in zip(sites, recipes, strict=True)]
    return Coverage(sites)
