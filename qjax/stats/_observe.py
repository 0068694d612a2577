"""``observe``: the operands of all products of a function, in the forward and the backward pass, for who asks."""

import collections
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax import _carrier, _dot, _jaxpr, _product, _rows
from qjax._dot import Static, given_to, settings, with_product
from qjax._operand import prepared
from qjax._quantizer import Quantizer
from qjax._recipe import Gemm, Recipe
from qjax._rules import Checked, Rule, assigned, checked
from qjax._sites import Site, find
from qjax._stored import Axes
from qjax.formats import Float, Format, Scaled
from qjax.stats._measure import of_error, of_signal
from qjax.stats._stats import Stats, sizes

What = Rule | Format | str
Probes = dict[str, dict[str, Any]]
PRODUCTS = ("forward", "dlhs", "drhs")
OPERANDS = tuple(f"{product}.{operand}" for product in PRODUCTS for operand in ("lhs", "rhs"))
# Of which tensor each operand is: 0 lhs, 1 rhs, 2 the gradient of the result.
_TENSORS = dict(zip(OPERANDS, (0, 1, 2, 1, 0, 2), strict=True))


def probes(fn: Callable, what: What, *args, strict: bool = True, **kwargs) -> Probes:
    """Returns the probes of ``observe(fn, what, probes)(*args, **kwargs)``: zeros, of which the gradient is asked.

    The keys are the paths of the products, followed by #2, #3 ... where a path has several; then the operands, such as
    "dlhs.rhs". The function is traced and not run.

    Args:
      what, strict: as in ``observe``.

    Raises:
      TypeError, ValueError: as ``observe`` does; if no product of the function can be observed.
    """
    return probes_of("probes", fn, rule_of("probes", what), args, kwargs, strict=strict)


def probes_of(
    caller: str, fn: Callable, rule: Checked, args: tuple, kwargs: dict[str, Any], *, strict: bool, values: bool = False
) -> Probes:
    """Returns the probes for statistics, or for the operands themselves."""
    found: list[Probes] = []

    def run(pure, *args, **kwargs):
        planned = planned_of(caller, pure, rule, args, kwargs, strict=strict, values=values)
        found.append(planned.probes)
        return planned.program.output([jnp.zeros(x.shape, x.dtype) for x in planned.program.jaxpr.out_avals])

    through(fn, *copied(args, kwargs), run)
    return found[0]


def copied(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns arguments in which nnx modules are copies, whose variables may change."""
    if "flax.nnx" in sys.modules:
        from qjax import nnx

        if nnx.modules((args, kwargs)):
            return sys.modules["flax.nnx"].clone((args, kwargs))
    return args, kwargs


def observe(
    fn: Callable, what: What, probes: Probes, *, apply: bool = False, key: Array | None = None, strict: bool = True
) -> Callable:
    """Returns fn with its products observed: it computes the same, and the "gradient" of the probes is what they saw.

    For each operand of each ``dot_general`` and ``conv_general_dilated``, and of the two products of its gradients,
    that is a ``Stats`` in a form that gradients have; ``report`` makes the tables of it. Blocks lie as they do in
    ``qjax.quantize``. So with ``jax.value_and_grad(..., argnums=(0, 1))`` a training step has both the gradients and
    the statistics, from one forward and backward pass.

    What is not on the way to the result that is differentiated (behind ``stop_gradient``) has no statistics, nor has
    what is inside a while, cond or shard_map, or a function with a derivative of its own.

    Args:
      fn: any function that JAX can trace. linen modules in it and nnx modules among its arguments give the paths.
      what: a format, for all operands; or a rule as ``qjax.quantize`` takes it, whose recipes say what each operand is
        measured in. Operands without a quantizer are measured in their own dtype, in which they have no error.
      probes: of ``probes(fn, what, ...)``, or some of them: then the other products are not observed.
      apply: whether the products are quantized as well, so that the operands are those of the quantized network.
      key: for stochastic recipes.
      strict: as in ``qjax.quantize``.

    Raises:
      TypeError, ValueError: as ``qjax.quantize`` does; for a recipe with delayed scaling; for probes of another
        function.

    >>> import jax, jax.numpy as jnp
    >>> from qjax import stats
    >>> def loss(w, x):
    ...     return jnp.sum(jnp.tanh(x @ w) ** 2)
    >>> w, x = jnp.full((4, 2), 1e-4, jnp.float32), jnp.ones((3, 4), jnp.float32)
    >>> probes = stats.probes(loss, "e4m3", w, x)
    >>> gradient = jax.grad(lambda w, p: stats.observe(loss, "e4m3", p)(w, x), argnums=(0, 1))
    >>> dw, seen = gradient(w, probes)
    >>> stats.report(seen)["", "forward.rhs"].share("underflows")
    1.0
    """
    known = rule_of("observe", what)

    @functools.wraps(fn)
    def observed(*args, **kwargs):
        def run(pure, *args, **kwargs):
            p = planned_of("observe", pure, known, args, kwargs, strict=strict, apply=apply, asked=probes)
            if unknown := sorted(set(probes) - set(p.probes)):
                raise ValueError(
                    f"observe: the probes are those of another function: there is no product {unknown[0]!r}, but "
                    f"{', '.join(map(repr, p.probes))}. Make them with stats.probes(fn, what, ...)."
                )
            if p.stochastic and key is None:
                raise ValueError("observe: a recipe is stochastic; pass key=jax.random.key(...).")
            if key is not None and not p.stochastic:
                raise ValueError("observe: key was given, but no recipe that is used draws anything; leave key out.")
            jaxpr = p.program.jaxpr
            return p.program.output(_jaxpr.evaluate(jaxpr.jaxpr, jaxpr.consts, p.plan, p.program.arrays, key, probes))

        return through(fn, args, kwargs, run)

    return observed


def rule_of(caller: str, what: What) -> Checked:
    if isinstance(what, str | Format):
        gemm = Gemm(Quantizer(what), Quantizer(what))
        what = Recipe(gemm, gemm, gemm)
    return checked(caller, what)


def through(fn: Callable, args: tuple, kwargs: dict[str, Any], run: Callable) -> Any:
    """Returns ``fn(*args, **kwargs)`` by way of ``run(pure, *args, **kwargs)``, operations named by Flax's modules."""
    with contextlib.ExitStack() as stack:
        if "flax.linen" in sys.modules:
            from qjax import linen

            stack.enter_context(linen.naming())
        if "flax.nnx" in sys.modules:
            from qjax import nnx

            if nnx.modules((args, kwargs)):
                return nnx.functional(fn, args, kwargs, run)
        return run(fn, *args, **kwargs)


class Planned(NamedTuple):
    program: _jaxpr.Program
    plan: _jaxpr.Plan
    probes: Probes
    stochastic: bool


def planned_of(
    caller: str,
    fn: Callable,
    rule: Checked,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    strict: bool,
    apply: bool = False,
    values: bool = False,
    asked: Probes | None = None,
) -> Planned:
    """Returns how ``fn(*args, **kwargs)`` is observed, for its statistics or for the operands themselves.

    Args:
      asked: the probes that there are, None for all. What has none is left as it is, unless it is to be quantized.
    """
    if asked is not None:
        values = any("gradient" in probe for probe in asked.values())
    program = _jaxpr.trace(fn, args, kwargs)
    sites: list[Site] = []
    find(program, sites.append)
    seen = [site for site in sites if not hidden(site)]
    if not seen:
        why = f": {hidden(sites[0])}" if sites else ""
        raise ValueError(f"{caller}: there is no dot product or convolution that can be observed{why}.")
    recipes = iter(assigned(caller, rule, [dataclasses.replace(site, fixed="") for site in seen], strict=strict))
    found: Probes = collections.OrderedDict()  # a dict would be sorted by its keys
    stochastic = False

    def replace(site: Site):
        nonlocal stochastic
        if hidden(site):
            return None
        recipe = next(recipes) or Recipe()
        if recipe.history is not None:
            raise ValueError(
                f"{caller}: the recipe of {site.path!r} has delayed scaling, whose scales are those of a training run; "
                "take a recipe with current scaling, dataclasses.replace(recipe, history=None)."
            )
        stochastic = stochastic or recipe.is_stochastic
        number = 1 + sum(name == site.path or name.startswith(f"{site.path}#") for name in found)
        name = site.path if number == 1 else f"{site.path}#{number}"
        empty = _tensors(site) if values else {operand: _empty(site, recipe, operand) for operand in OPERANDS}
        found[name] = jax.tree.map(lambda x: jnp.zeros((*site.steps, *x.shape), x.dtype), empty)
        if asked is not None and name not in asked and not (apply and not recipe.is_empty):
            return None
        return _Observed(recipe, name, apply, values)

    plan = find(program, replace)
    return Planned(program, plan, found, stochastic)


def hidden(site: Site) -> str:
    """Returns why a site cannot be observed, or ""."""
    if site.fixed:
        return site.fixed
    return f"it is inside a {site.unsteady}" if site.unsteady else ""


def _tensors(site: Site) -> dict[str, Any]:
    return {"lhs": site.lhs, "rhs": site.rhs, "gradient": site.out}


def _quantizer(recipe: Recipe, operand: str) -> Quantizer | None:
    product, side = operand.split(".")
    return getattr(getattr(recipe, product), side)


def _dtype(dtype: Any) -> Format:
    """Returns the format of a dtype."""
    info = jnp.finfo(dtype)
    return Float(info.nexp, info.nmant)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["row"], meta_fields=["fmt"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Statistics as a gradient can hold them: a row of exact floats, integers as their lower 16 bits and the others."""

    row: Any
    fmt: Format


_INTEGERS = ("counts", "magnitudes", "errors")
_SUMS = ("squares", "fourths", "noise")


def _empty(site: Site, recipe: Recipe, operand: str) -> Packed:
    """Returns the packed statistics of nothing."""
    array = (site.lhs, site.rhs, site.out)[_TENSORS[operand]]
    quantizer = _quantizer(recipe, operand)
    c = _carrier.carrier(array.dtype)
    length = sum(n * (1 + (name in _INTEGERS)) for name, n in sizes(c).items())
    return Packed(jnp.zeros(length, c.float), _dtype(array.dtype) if quantizer is None else quantizer.fmt)


def packed(stats: Stats) -> Packed:
    integers = jnp.concatenate([getattr(stats, name) for name in _INTEGERS])
    low, high = (x.astype(stats.squares.dtype) for x in (integers & 0xFFFF, integers >> 16))
    return Packed(jnp.concatenate([low, high, *(getattr(stats, name) for name in _SUMS)]), stats.fmt)


def unpacked(stats: Packed) -> Stats:
    """Returns the statistics of packed ones, on the host; those of the steps of scans together."""
    rows = np.asarray(stats.row, np.float64).reshape(-1, np.shape(stats.row)[-1]).sum(0)
    lengths = sizes(_carrier.carrier(stats.row.dtype))
    count = sum(lengths[name] for name in _INTEGERS)
    low, high, sums = np.split(rows, [count, 2 * count])
    integers = low.astype(np.int64) + (high.astype(np.int64) << 16)
    fields = {}
    for names, values in ((_INTEGERS, integers), (_SUMS, sums)):
        ends = np.cumsum([lengths[name] for name in names])[:-1]
        fields |= dict(zip(names, np.split(values, ends), strict=True))
    return Stats(**fields, fmt=stats.fmt)


@dataclasses.dataclass(frozen=True)
class _Observed:
    """An operation in the place of lax's that computes the same; the gradient of its probe are the statistics."""

    recipe: Recipe
    name: str
    apply: bool
    values: bool

    def __call__(self, eqn, operands, key, state):
        operation = getattr(lax, eqn.primitive.name)
        options = {name: value for name, value in eqn.params.items() if value is not None}
        static = Static(operation, settings(options), self.recipe, tuple(x.dtype for x in operands))
        drawn = None if key is None else key.key
        if state is None:
            return _operation(static, self.apply, drawn)(*operands)
        return _observed(static, (self.apply, self.values), *operands, drawn, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed(static: Static, mode: tuple[bool, bool], lhs, rhs, key, probe):
    return _operation(static, mode[0], key)(lhs, rhs)


def _operation(static: Static, apply: bool, key) -> Callable:
    if not apply or static.recipe.is_empty:
        return static.product
    quantized = getattr(_dot, static.operation.__name__)
    key = key if static.recipe.is_stochastic else None
    return functools.partial(quantized, **dict(static.options), recipe=static.recipe, key=key)


def _observed_forward(static, mode, lhs, rhs, key, probe):
    out, pull = jax.vjp(_operation(static, mode[0], key), lhs, rhs)
    return out, (pull, lhs, rhs, key)


def _observed_backward(static, mode, residuals, gradient):
    pull, lhs, rhs, key = residuals
    if mode[1]:
        return *pull(gradient), None, {"lhs": lhs, "rhs": rhs, "gradient": gradient}
    seen = _seen(static, lhs, rhs, gradient, key)
    return *pull(gradient), None, {operand: packed(stats) for operand, stats in seen.items()}


_observed.defvjp(_observed_forward, _observed_backward)


@functools.partial(jax.jit, static_argnums=0)
def _seen(static: Static, lhs, rhs, gradient, key) -> dict[str, Stats]:
    """Returns the statistics of the six operands."""
    tensors = (lhs, rhs, gradient)
    signals = [of_signal(_carrier.widen(x)) for x in tensors]
    known: dict[Any, dict[str, Array]] = {}
    found = {}
    for number, product in enumerate(PRODUCTS):
        gemm = getattr(static.recipe, product)
        given = given_to(key, None, number, gemm)
        laid = _operands(static, number, gemm, given, *tensors)
        for side in ("lhs", "rhs"):
            operand = f"{product}.{side}"
            place, quantizer = _TENSORS[operand], getattr(gemm, side)
            fmt = _dtype(tensors[place].dtype) if quantizer is None else quantizer.fmt
            turned = gemm.rotate is not None or getattr(gemm, f"rotate_{side}") is not None
            if quantizer is None and not turned:
                quantizer = Quantizer(fmt)
            # Rounding that looks at no neighbours is the same in both products of a tensor.
            alone = quantizer is not None and not (turned or quantizer.is_stochastic or isinstance(fmt, Scaled))
            if not (alone and (place, quantizer) in known):
                rounding = Quantizer(fmt) if quantizer is None else quantizer
                wide, mode, drawn, _ = prepared(laid[side][0], rounding, laid[side][1], given[side])
                errors = of_error(wide, mode, random=drawn)
                known[place, quantizer] = errors | (of_signal(wide) if turned else signals[place])
            found[operand] = Stats(**known[place, quantizer], fmt=fmt)
    return found


def _operands(static: Static, number: int, gemm: Gemm, given: dict, lhs, rhs, gradient) -> dict[str, tuple[Any, Axes]]:
    """Returns the operands of a product before they are rounded in it, and their axes."""
    found: dict[str, tuple[Any, Axes]] = {}

    def record(equation, left, right, swap: bool):
        axes = _rows.axes_of(equation)
        groups = equation.params.get("feature_group_count", 1)
        sides = ("rhs", "lhs") if swap else ("lhs", "rhs")
        for side, x, where, split in zip(sides, (left, right), axes, (groups, 1), strict=True):
            turn = getattr(gemm, f"rotate_{side}")
            turned = _product.rotated(x, gemm.rotate, where, given["rotate"])
            turned = _product.rotated(turned, turn, where, given[f"rotate_{side}"], free=True)
            found[side] = _product.by_groups(turned, where, split) if split > 1 else (turned, where)
        out = equation.outvars[0].aval
        return jnp.zeros(out.shape, out.dtype)  # Of no use: nothing is multiplied here.

    if number == 0:
        with_product(jax.make_jaxpr(static.product)(lhs, rhs), record, lhs, rhs)
    elif number == 1:
        transposed = functools.partial(static.transpose, 0, mine=lhs)
        with_product(jax.make_jaxpr(transposed)(gradient, rhs), record, gradient, rhs)
    else:
        # The transpose takes (gradient, lhs), the recipe says (lhs, gradient).
        transposed = functools.partial(static.transpose, 1, mine=rhs)
        flipped = functools.partial(_flipped, record)
        with_product(jax.make_jaxpr(transposed)(gradient, lhs), flipped, gradient, lhs)
    return found


def _flipped(record, equation, left, right, swap: bool):
    return record(equation, left, right, not swap)
