"""``suggest``: a format for each layer, for a budget."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from qjax._coverage import format_text
from qjax._patterns import check_pattern
from qjax._quantizer import Quantizer
from qjax._recipe import Gemm, Recipe
from qjax.formats import Format
from qjax.stats._report import inspect
from qjax.stats._sensitivity import Network, costs


@dataclasses.dataclass(frozen=True)
class Choice:
    """A format for each path.

    Attributes:
      formats: the name of the format by path.
      cost: in the unit that was asked for.
      predicted: the divergence that the sensitivities add up to.
      divergence: the one that the network in these formats has, in nats.
    """

    formats: dict[str, str]
    cost: float
    predicted: float
    divergence: float


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """What ``suggest`` found.

    Attributes:
      best: the choice.
      rule: the rule that ``quantize`` takes, of each path, the rest in full precision.
      uniform: the same format everywhere, by its name, whatever it costs.
      front: the choices of least predicted divergence for budgets from the least to the greatest, ascending in cost.
      sensitivity: the divergence that each path and format is taken to add: paths, then candidates.
      unit: of costs.
    """

    best: Choice
    rule: dict[str, Recipe | None]
    uniform: dict[str, Choice]
    front: list[Choice]
    sensitivity: np.ndarray
    unit: str

    def plot(self, *, axes: Any = None) -> Any:
        """Returns axes with the measured divergence over the cost: the front, the uniform formats and the choice."""
        from qjax.stats._plots import _axes

        axes = _axes(axes)
        axes.plot([c.cost for c in self.front], [c.divergence for c in self.front], "o-", ms=4, lw=1, label="mixed")
        for name, choice in self.uniform.items():
            (mark,) = axes.plot(choice.cost, choice.divergence, "s", ms=6, color="#d55e00")
            axes.annotate(name, (choice.cost, choice.divergence), (5, 3), textcoords="offset points", fontsize=8)
        mark.set_label("one format everywhere")
        axes.plot(self.best.cost, self.best.divergence, "*", ms=13, color="#009e73", label="the suggestion")
        axes.set(xlabel=self.unit.replace("_", " "), ylabel="KL divergence of the output (nats)", yscale="log")
        axes.legend(fontsize="small")
        return axes


def suggest(
    fn: Callable,
    candidates: Sequence[Format | str],
    budget: float,
    *args,
    only: str = ".*",
    unit: Literal["bits", "bytes", "bit_operations"] = "bits",
    sensitivity: Literal["kl", "hessian"] = "kl",
    pairwise: bool = False,
    points: int = 12,
    draws: int = 32,
    key: jax.Array | None = None,
    **kwargs,
) -> Suggestion:
    """Returns a format for each path of a network, of least divergence of the output within a budget.

    Each product gets one candidate for both operands. The divergences that the products are taken to add are summed,
    and the sum is minimized exactly, an integer program, by HiGHS. At the end the network is run in that choice and in
    each single format within the budget, and the best of these is returned: never worse than one format everywhere.

    Args:
      fn: returns logits, their classes along the last axis. linen and nnx modules give the paths, as in ``observe``.
      candidates: formats or their names.
      budget: the greatest cost.
      args, kwargs: those of fn: parameters and a batch of data to measure with.
      only: a regular expression that the whole path of a product must match. The others stay in full precision and cost
        nothing: those of attention, for example, neither of whose operands is a weight.
      unit: of cost. "bits": the average bits of an element of the rhs of the products, that is of the weights; "bytes":
        of all of them; "bit_operations": multiply-adds times the bits of both operands.
      sensitivity: "kl": the KL divergence of the output with that product alone in that format. "hessian": from the
        curvature of that divergence, ``(tr H / 2 n) ||q - x||^2`` over both operands, without running each format.
      pairwise: whether to add what each two products lose together beyond what they lose alone (with "kl"). That takes
        (paths times candidates) squared over 2 runs.
      points: how many budgets the front is made for.
      draws, key: of Hutchinson's estimate, for "hessian".

    Raises:
      ValueError: if the cheapest candidates exceed the budget, for an unknown unit or sensitivity, if nothing can be
        quantized, for a missing key and for one that nothing uses, if ``only`` is no regular expression.

    >>> import jax, jax.numpy as jnp
    >>> from qjax import stats
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> weights = [jax.random.normal(k, (32, 32)) / 4 for k in keys[:2]]
    >>> def fn(weights, x):
    ...     for i, w in enumerate(weights):
    ...         with jax.named_scope(f"layer{i}"):
    ...             x = jnp.tanh(x @ w)
    ...     return x
    >>> x = jax.random.normal(keys[2], (64, 32))
    >>> found = stats.suggest(fn, ["mxfp4", "mxfp8_e4m3"], 6.25, weights, x)
    >>> found.best.cost, sorted(found.best.formats.values())
    (6.25, ['mxfp4', 'mxfp8_e4m3'])

    Sources: Cai et al. (2020), ZeroQ, https://arxiv.org/abs/2001.00281 (KL sensitivity); Dong et al. (2020), HAWQ-V2,
    https://arxiv.org/abs/1911.03852 (trace times squared error); Yao et al. (2021), HAWQ-V3,
    https://arxiv.org/abs/2011.10680 (the integer program).
    """
    if unit not in ("bits", "bytes", "bit_operations"):
        raise ValueError(f"suggest: unit must be 'bits', 'bytes' or 'bit_operations', got {unit!r}.")
    if sensitivity not in ("kl", "hessian") or (sensitivity == "hessian" and pairwise):
        raise ValueError(
            "suggest: sensitivity must be 'kl' or 'hessian', and pairwise goes with 'kl' alone, "
            f"got {sensitivity!r} and {pairwise}."
        )
    if (key is None) == (sensitivity == "hessian"):
        raise ValueError("suggest: key=jax.random.key(...) is for sensitivity='hessian', which needs it.")
    quantizers = [Quantizer(c) for c in candidates]
    recipes = [Recipe(Gemm(q, q)) for q in quantizers]
    names = [c if isinstance(c, str) else format_text(c) for c in candidates]
    check_pattern("suggest", only)
    network = Network("suggest", fn, recipes, args, kwargs, only)
    cost = costs(network.sites, [(q.fmt.bits, q.fmt.bits) for q in quantizers], unit)
    if cost.min(1).sum() > budget * (1 + 1e-12):
        raise ValueError(
            f"suggest: the cheapest formats cost {cost.min(1).sum():.6g} {unit}, more than the budget {budget:.6g}."
        )
    if sensitivity == "kl":
        alone = network.measured()
    else:
        assert key is not None
        alone = _from_curvature(network, fn, recipes, args, kwargs, key, draws)
    pairs = network.interactions(alone) if pairwise else None

    def choice(picked: Sequence[int]) -> Choice:
        rows, picked = range(len(picked)), list(picked)
        predicted = float(alone[rows, picked].sum())
        if pairs is not None:
            predicted += sum(pairs[i, picked[i], j, picked[j]] for j in rows for i in range(j))
        return Choice(
            {path: names[f] for path, f in zip(network.paths, picked, strict=True)},
            float(cost[rows, picked].sum()),
            float(predicted),
            network.divergence([1 + f for f in picked]),
        )

    limits = np.linspace(cost.min(1).sum(), cost.max(1).sum(), points)
    solved = {solve(alone, cost, limit, pairs) for limit in limits}
    front = sorted(map(choice, solved), key=lambda c: c.cost)
    uniform = {name: choice([f] * len(network.paths)) for f, name in enumerate(names)}
    within = [c for c in uniform.values() if c.cost <= budget * (1 + 1e-12)]
    best = min([choice(solve(alone, cost, budget, pairs)), *within], key=lambda c: c.divergence)
    rule: dict[str, Recipe | None] = {re.escape(path): recipes[names.index(f)] for path, f in best.formats.items()}
    if network.left:
        rule[".*"] = None
    return Suggestion(best, rule, uniform, front, alone, unit)


def _from_curvature(network: Network, fn, recipes, args, kwargs, key, draws: int) -> np.ndarray:
    """Returns ``(tr H / 2 n) ||q - x||^2`` of each path and recipe, summed over both operands."""
    curvature = network.curvature(key, draws)
    found = np.zeros((len(network.paths), len(recipes)))
    for f, recipe in enumerate(recipes):
        report = inspect(fn, recipe, *args, backward=False, strict=False, **kwargs)
        for (name, operand), s in report.items():
            path, side = name.partition("#")[0], operand.split(".")[1]
            if path not in curvature:
                continue
            noise, exponent = s._sum(s.noise, 2)
            found[network.paths.index(path), f] += 0.5 * max(curvature[path][side], 0.0) * noise * 2.0**exponent
    return found


def solve(alone: np.ndarray, cost: np.ndarray, budget: float, pairs: np.ndarray | None = None) -> tuple[int, ...]:
    """Returns for each row the column of least sum, with a sum of costs within a budget: exactly, by HiGHS.

    Args:
      pairs: what two choices add together, of shape (rows, columns, rows, columns), of which those with the first row
        before the second count. Each that is not zero gets a variable for the product of the two choices.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    rows, columns = alone.shape
    n = rows * columns
    terms = [] if pairs is None else [t for t in np.argwhere(pairs != 0) if t[0] < t[2]]
    objective = np.concatenate([alone.ravel(), [pairs[tuple(t)] for t in terms] if pairs is not None else []])
    largest = np.abs(objective).max()
    one = lil_array((rows, n + len(terms)))
    for i in range(rows):
        one[i, i * columns : (i + 1) * columns] = 1
    total = np.concatenate([cost.ravel(), np.zeros(len(terms))])[None]
    scale = np.abs(total).max() or 1.0
    constraints = [
        LinearConstraint(one.tocsr(), 1, 1),
        LinearConstraint(total / scale, -np.inf, budget * (1 + 1e-9) / scale),
    ]
    if terms:
        both = lil_array((3 * len(terms), n + len(terms)))
        upper = np.zeros(3 * len(terms))
        for k, (i, f, j, g) in enumerate(terms):
            a, b, z = i * columns + f, j * columns + g, n + k
            both[3 * k, z], both[3 * k, a] = 1, -1  # z <= a
            both[3 * k + 1, z], both[3 * k + 1, b] = 1, -1  # z <= b
            both[3 * k + 2, a] = both[3 * k + 2, b] = 1  # z >= a + b - 1
            both[3 * k + 2, z], upper[3 * k + 2] = -1, 1
        constraints.append(LinearConstraint(both.tocsr(), -np.inf, upper))  # type: ignore[arg-type]
    # HiGHS stops at an absolute gap of 1e-6: in these units far below what matters.
    found = milp(
        objective * (1e6 / largest if largest else 1.0),
        constraints=constraints,
        bounds=Bounds(0, 1),
        integrality=np.concatenate([np.ones(n), np.zeros(len(terms))]),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"suggest: HiGHS found no solution: {found.message}")
    return tuple(int(f) for f in found.x[:n].reshape(alone.shape).argmax(1))
