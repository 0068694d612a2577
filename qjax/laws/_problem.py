"""Which parameters of a law a fit moves, and where it starts from."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qjax.laws._data import Runs
from qjax.laws._law import Law, Levels, encode, expand, unflatten


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Problem:
    """Which parameters of a law are free, and how the vector that a fit moves becomes them.

    The fitted vector z has an entry for each free name: its logarithm, or itself. ``source`` says for every parameter
    of the law which entry of (free, fixed) it is.
    """

    law: Law
    levels: Levels
    free: tuple[str, ...]
    fixed: tuple[float, ...]
    source: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return expand(self.law, self.levels)

    @functools.cached_property
    def log(self) -> np.ndarray:
        return np.array([self.parameter(name).log for name in self.free], bool)

    def parameter(self, name: str):
        return next(p for p in self.law.parameters if p.name == name.split("[")[0])

    def natural(self, z):
        """Returns the free parameters, and of a batch of vectors a batch."""
        return jnp.where(self.log, jnp.exp(jnp.where(self.log, z, 0.0)), z)

    def fitted(self, natural: np.ndarray) -> np.ndarray:
        return np.where(self.log, np.log(np.where(self.log, natural, 1.0)), natural)

    def all_of(self, natural):
        return jnp.concatenate([natural, jnp.array(self.fixed, jnp.float64)])[np.array(self.source)]

    def encode(self, runs: Runs) -> dict[str, np.ndarray]:
        return {c.name: encode("fit", c, runs.columns[c.name], dict(self.levels)) for c in self.law.columns}

    def log_prediction(self, z, data):
        return jnp.log(self.law.function(unflatten(self.law, self.levels, self.all_of(self.natural(z))), data))


def pose(caller: str, runs: Runs, fixed: Mapping[str, float], tied: Mapping[str, str]) -> Problem:
    """Returns the problem; the levels are those of the runs and those of fixed parameters."""
    law, found = runs.law, runs.levels
    for p in law.parameters:
        if p.per:
            held = [name[len(p.name) + 1 : -1] for name in fixed if name.startswith(f"{p.name}[")]
            found[p.per] = tuple(dict.fromkeys([*held, *found[p.per]]))
    levels = tuple(found.items())
    names = expand(law, levels)
    for kind, given in (("fixed", [*fixed]), ("tied", [*tied, *tied.values()])):
        if unknown := [name for name in given if name not in names]:
            raise ValueError(
                f"{caller}: {kind} has {unknown[0]!r}; the parameters of {law.name} are {', '.join(names)}"
            )
    # A parameter that is fixed is not tied; one that is tied to a fixed one has its value.
    ties = {a: b for a, b in tied.items() if a not in fixed}
    if chain := sorted(set(ties) & set(ties.values())):
        raise ValueError(f"{caller}: {chain[0]!r} is tied and tied to; tie both to the third parameter")
    free = tuple(name for name in names if name not in fixed and name not in ties)
    index = {name: i for i, name in enumerate([*free, *fixed])}
    source = tuple(index[ties.get(name, name)] for name in names)
    return Problem(law, levels, free, tuple(map(float, fixed.values())), source)


def starting_points(caller: str, problem: Problem, starts: Mapping[str, Sequence[float]]) -> Float[np.ndarray, "s p"]:
    """Returns the fitted vectors to start from: the product of the starts of all free parameters."""
    free = {*problem.free, *(name.split("[")[0] for name in problem.free)}
    if unknown := sorted(set(starts) - free):
        raise ValueError(f"{caller}: starts has {unknown[0]!r}; the free parameters are {', '.join(problem.free)}")
    grid = [starts.get(n, starts.get(n.split("[")[0], problem.parameter(n).starts)) for n in problem.free]
    natural = np.array(list(itertools.product(*grid)), np.float64)
    if bad := [
        n for n, log, column in zip(problem.free, problem.log, natural.T, strict=True) if log and not (column > 0).all()
    ]:
        raise ValueError(f"{caller}: starts of {bad[0]!r} must be positive, got {[*starts[bad[0].split('[')[0]]]}")
    return problem.fitted(natural)
