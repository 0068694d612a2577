"""What the output of a network loses if a product is quantized: measured, or from curvature."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax import _dot, _jaxpr
from qjax._recipe import Recipe
from qjax._sites import Site, find
from qjax.stats._observe import copied, hidden, through


class Network:
    """A function whose products can each be in one of several recipes, chosen while it runs.

    Attributes:
      paths: of the products that ``only`` matches, in the order of the program; products of one path have one choice.
      left: the paths of those that stay in full precision.
      sites: the sites of each path.
    """

    def __init__(
        self,
        caller: str,
        fn: Callable,
        recipes: Sequence[Recipe],
        args: tuple,
        kwargs: dict[str, Any],
        only: str = ".*",
    ):
        self.caller, self.fn, self.recipes, self._only = caller, fn, tuple(recipes), re.compile(only)
        self.left: dict[str, None] = {}
        # Arrays are arguments of what is compiled, not constants in it.
        leaves, self._tree = jax.tree.flatten((args, kwargs))
        self._dynamic = [isinstance(x, jax.Array | np.ndarray) for x in leaves]
        self._leaves = leaves
        self._arrays = [x for d, x in zip(self._dynamic, leaves, strict=True) if d]
        self.sites: dict[str, list[Site]] = {}
        self._names: dict[str, Site] = {}
        jax.eval_shape(lambda arrays: self._run(arrays, None, self._found), self._arrays)
        if not self.sites:
            near = ", ".join(map(repr, difflib.get_close_matches(only, self.left, n=3, cutoff=0.0)))
            others = "" if only == ".*" else f" whose path matches {only!r}; the nearest are {near}"
            raise ValueError(f"{caller}: there is no dot product or convolution that can be quantized{others}.")
        self.paths = list(self.sites)

    def _found(self, site: Site, name: str) -> None:
        self.sites.setdefault(site.path, []).append(site)
        self._names[name] = site

    def _run(self, arrays, state, replacement: Callable):
        rest = iter(arrays)
        filled = [next(rest) if d else x for d, x in zip(self._dynamic, self._leaves, strict=True)]

        def run(pure, *args, **kwargs):
            program = _jaxpr.trace(pure, args, kwargs)
            count: dict[str, int] = {}

            def replace(site: Site):
                if hidden(site) or not self._only.fullmatch(site.path):
                    if site.recipe is None:
                        self.left[site.path] = None
                    return None
                count[site.path] = count.get(site.path, 0) + 1
                return replacement(site, f"{site.path}#{count[site.path]}")

            plan, jaxpr = find(program, replace), program.jaxpr
            return program.output(_jaxpr.evaluate(jaxpr.jaxpr, jaxpr.consts, plan, program.arrays, None, state))

        args, kwargs = jax.tree.unflatten(self._tree, filled)
        return through(self.fn, *copied(args, kwargs), run)

    @functools.cached_property
    def _chosen(self) -> Callable:
        @jax.jit
        def chosen(arrays, choices):
            index = dict(zip(self.paths, choices, strict=True))
            state = {name: jnp.broadcast_to(index[site.path], site.steps) for name, site in self._names.items()}
            return _log_probabilities(self._run(arrays, state, lambda site, name: _Choice(name, self.recipes)))

        return chosen

    def divergence(self, choices: Sequence[int]) -> float:
        """Returns the divergence from the output in full precision, of a choice for each path: 0, or 1 + its recipe.

        It is ``KL(p || q)`` in nats, the mean over all but the last axis of the output, p and q the softmax over that.
        """
        exact = self._exact
        found = self._chosen(self._arrays, jnp.asarray(choices, jnp.int32))
        return float(_divergence(exact, found))

    @functools.cached_property
    def _exact(self) -> Array:
        return self._chosen(self._arrays, jnp.zeros(len(self.paths), jnp.int32))

    def measured(self) -> np.ndarray:
        """Returns the divergence of each path and recipe with all other products in full precision."""
        found = np.zeros((len(self.paths), len(self.recipes)))
        for i, f in np.ndindex(*found.shape):
            found[i, f] = self.divergence([(1 + f) if j == i else 0 for j in range(len(self.paths))])
        return found

    def interactions(self, alone: np.ndarray) -> np.ndarray:
        """Returns what two paths in a recipe each lose together beyond what they lose alone, (path, recipe) twice."""
        found = np.zeros(alone.shape * 2)
        for i, f in np.ndindex(*alone.shape):
            for j, g in np.ndindex(*alone.shape):
                if i < j:
                    choices = np.zeros(len(self.paths), int)
                    choices[[i, j]] = 1 + f, 1 + g
                    found[i, f, j, g] = self.divergence(choices.tolist()) - alone[i, f] - alone[j, g]
        return found

    def curvature(self, key: Array, draws: int) -> dict[str, dict[str, float]]:
        """Returns the mean diagonal entry of the Hessian of the divergence, by path, for lhs and rhs.

        By Hutchinson's estimate of the traces of its blocks, ``E[v (H v)]`` with random signs v, all blocks at once:
        what one has of the others has mean zero.
        """
        zeros = {
            name: {
                side: jnp.zeros((*site.steps, *getattr(site, side).shape), getattr(site, side).dtype)
                for side in ("lhs", "rhs")
            }
            for name, site in self._names.items()
        }
        exact = self._exact

        def loss(shifts):
            out = self._run(self._arrays, shifts, lambda site, name: _Shifted(name))
            return _divergence(exact, _log_probabilities(out))

        @jax.jit
        def traces(key):
            keys = jax.random.split(key, len(jax.tree.leaves(zeros)))
            signs = jax.tree.unflatten(
                jax.tree.structure(zeros),
                [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, jax.tree.leaves(zeros), strict=True)],
            )
            _, product = jax.jvp(jax.grad(loss), (zeros,), (signs,))
            return jax.tree.map(lambda v, h: jnp.mean(v * h), signs, product)

        sums = [traces(k) for k in jax.random.split(key, draws)]
        means = jax.tree.map(lambda *x: float(np.mean([float(v) for v in x])), *sums)
        sizes = {name: {side: x.size for side, x in of.items()} for name, of in zeros.items()}
        found: dict[str, dict[str, float]] = {}
        for path in self.paths:
            names = [name for name, site in self._names.items() if site.path == path]
            found[path] = {
                side: sum(means[n][side] * sizes[n][side] for n in names) / sum(sizes[n][side] for n in names)
                for side in ("lhs", "rhs")
            }
        return found


def _log_probabilities(out) -> Array:
    (logits,) = jax.tree.leaves(out)
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, np.float32)), axis=-1)


def _divergence(exact, found):
    return jnp.mean(jnp.sum(jnp.exp(exact) * (exact - found), axis=-1))


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A product in one of several recipes, by the index that is its state."""

    name: str
    recipes: tuple[Recipe, ...]

    def __call__(self, eqn, operands, key, state):
        options = {name: value for name, value in eqn.params.items() if value is not None}
        operation = getattr(_dot, eqn.primitive.name)
        branches = [functools.partial(operation, **options, recipe=recipe) for recipe in (None, *self.recipes)]
        return lax.switch(state, branches, *operands)


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """A product of operands to which its state is added."""

    name: str

    def __call__(self, eqn, operands, key, state):
        lhs, rhs = operands
        return eqn.primitive.bind(lhs + state["lhs"], rhs + state["rhs"], **eqn.params)


def costs(sites: Mapping[str, Sequence[Site]], widths: Sequence[tuple[float, float]], unit: str) -> np.ndarray:
    """Returns the cost of each path and recipe, in a unit that adds up; widths are the bits of lhs and rhs."""
    found = np.zeros((len(sites), len(widths)))
    stored = sum(int(np.prod(site.rhs.shape)) * site.times for of in sites.values() for site in of)
    for i, of in enumerate(sites.values()):
        elements = sum(int(np.prod(site.rhs.shape)) * site.times for site in of)
        multiply_adds = sum(site.multiply_adds for site in of)
        for f, (lhs, rhs) in enumerate(widths):
            found[i, f] = {
                "bits": rhs * elements / stored,
                "bytes": rhs * elements / 8,
                "bit_operations": lhs * rhs * multiply_adds,
            }[unit]
    return found
