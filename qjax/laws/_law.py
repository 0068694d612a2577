"""What a scaling law is: a pure function of (parameters, data), with names, units, domains and a citation."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

Levels = tuple[tuple[str, tuple[str, ...]], ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the data that a law needs.

    Attributes:
      name: as the law's function looks it up.
      meaning: what it is, with its unit.
      lower: numbers of the column must be above this, or the law's reference.
      category: whether the column names levels (formats, schemes) rather than holding numbers. The law's function
        then gets the integer index of each row's level, to look up parameters that are ``per`` this column.

    >>> from qjax import laws
    >>> laws.Column("N", "parameters of the model")
    Column(name='N', meaning='parameters of the model', lower=0.0, category=False)
    """

    name: str
    meaning: str
    lower: float = 0.0
    category: bool = False


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a law.

    Attributes:
      name: as the law's function looks it up.
      starts: the values that fits start from; a fit starts from the product over all free parameters.
      domain: the open interval of sensible values. A fit may leave it, and then warns.
      log: whether the fit moves the logarithm, so that the parameter stays positive.
      needs: columns that must vary to tell this parameter from others.
      per: a category column; the parameter then has a value for each of its levels, named ``eff[mxfp4]``.

    >>> from qjax import laws
    >>> laws.CHINCHILLA.parameters[3]
    Parameter(name='alpha', starts=(0.0, 0.5, 1.0, 1.5, 2.0), domain=(0.0, 4.0), log=False, needs=('N',), per=None)
    """

    name: str
    starts: tuple[float, ...]
    domain: tuple[float, float] = (0.0, math.inf)
    log: bool = True
    needs: tuple[str, ...] = ()
    per: str | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Law:
    """A scaling law: the loss as a pure function of parameters and data. A new law is one of these.

    Attributes:
      name: a short name, lower case.
      equation: the equation, as text.
      function: ``function(p, d)`` gives the losses; ``p[name]`` is a scalar, or a vector for a parameter ``per`` a
        category; ``d[name]`` an array over the rows. In jax.numpy, so that it can be differentiated.
      columns, parameters: what it is a function of.
      citation: where it is from.
      constants: published values of the parameters, as pairs.
      tied: pairs (a, b): by default a fit makes parameter a equal to parameter b.
      reference: the column values at which the law is that of full precision; runs to fit may have them.

    Static: hashable by value, the function by identity, so a law crosses ``jit`` as an ordinary argument.

    >>> from qjax import laws
    >>> def function(p, d):
    ...     return p["c"] / d["N"] ** p["alpha"]
    >>> law = laws.Law(
    ...     "kaplan",
    ...     "L = c / N^alpha",
    ...     function,
    ...     (laws.Column("N", "parameters"),),
    ...     (laws.Parameter("c", (1.0, 100.0)), laws.Parameter("alpha", (0.1, 1.0), log=False)),
    ... )
    >>> law.model(c=10.0, alpha=0.5)(N=[100.0, 10000.0])
    array([1. , 0.1])
    """

    name: str
    equation: str
    function: Callable[[Mapping[str, Any], Mapping[str, Any]], jax.Array]
    columns: tuple[Column, ...]
    parameters: tuple[Parameter, ...]
    citation: str = ""
    constants: tuple[tuple[str, float], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    reference: tuple[tuple[str, float], ...] = ()

    @property
    def published(self) -> "Model":
        """The law with its published constants.

        Raises:
          ValueError: the law has none: fit it.
        """
        if not self.constants:
            raise ValueError(f"{self.name}: no published constants; fit the law, or give values with {self.name}.model")
        return self.model(**dict(self.constants))

    def model(self, **parameters: float) -> "Model":
        """Returns the law with values for its parameters.

        Parameters of levels are given as ``**{"eff[mxfp4]": 0.6}``.

        Raises:
          ValueError: a parameter is missing or unknown.
        """
        return Model(self, tuple(parameters.items()))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Model:
    """A law with values for its parameters: it predicts losses, and the questions are asked of it.

    Attributes:
      law: the law.
      values: pairs of name and value; ``parameters`` is the same as a dict.

    Calling it with the law's columns, as keywords or as one mapping, returns the losses, float64. Columns broadcast
    against each other. Infinite precision is ``math.inf``; a NaN among the columns gives NaN.

    >>> from qjax import laws
    >>> laws.FLOAT_QUANTIZATION.published(N=679477248, D=104857600000, E=4, M=3, B=128).round(6)
    np.float64(2.608669)

    Raises:
      ValueError: a column or parameter is missing or unknown, or a level has no parameter.
    """

    law: Law
    values: tuple[tuple[str, float], ...]

    def __post_init__(self):
        wanted = {p.name for p in self.law.parameters}
        given = {name.split("[")[0] for name in self.parameters}
        if wanted != given:
            raise ValueError(
                f"{self.law.name}: expected values of {', '.join(sorted(wanted))}, got {', '.join(sorted(given))}"
            )
        object.__setattr__(self, "values", tuple((name, float(value)) for name, value in self.values))

    @property
    def parameters(self) -> dict[str, float]:
        return dict(self.values)

    def levels(self, column: str) -> tuple[str, ...]:
        """Returns the levels of a category column that have parameters."""
        per = {p.name for p in self.law.parameters if p.per == column}
        return tuple(dict.fromkeys(n.split("[")[1][:-1] for n in self.parameters if n.split("[")[0] in per))

    def __call__(self, data: Mapping[str, Any] | None = None, /, **columns: Any) -> Float[np.ndarray, "..."]:
        given, names = {**(data or {}), **columns}, [c.name for c in self.law.columns]
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"{self.law.name}: column {missing[0]} is missing; expected {', '.join(names)}")
        if unknown := [name for name in columns if name not in names]:
            raise ValueError(f"{self.law.name}: unknown column {unknown[0]}; expected {', '.join(names)}")
        levels = tuple((c.name, self.levels(c.name)) for c in self.law.columns if c.category)
        arrays = np.broadcast_arrays(*(np.asarray(given[name]) for name in names))
        codes = {
            c.name: encode(self.law.name, c, a, dict(levels)) for c, a in zip(self.law.columns, arrays, strict=True)
        }
        flat = expand(self.law, levels)
        theta = np.array([self.parameters[name] for name in flat])
        with jax.enable_x64(True):
            return np.array(_predict(self.law, levels, theta, codes))[()]


def encode(caller: str, column: Column, values: np.ndarray, levels: Mapping[str, tuple[str, ...]]) -> np.ndarray:
    """Returns a column as what a law's function gets: float64 numbers, or the indices of levels."""
    if not column.category:
        return values.astype(np.float64)
    index = {level: i for i, level in enumerate(levels[column.name])}
    if unknown := sorted({str(v) for v in values.ravel()} - set(index)):
        raise ValueError(f"{caller}: {column.name} {unknown[0]!r} has no parameter; expected {', '.join(index)}")
    return np.array([index[str(v)] for v in values.ravel()], np.int64).reshape(values.shape)


def expand(law: Law, levels: Levels) -> tuple[str, ...]:
    """Returns the names of all parameters, one for each level of those that are per a category."""
    of = dict(levels)
    names = ([f"{p.name}[{level}]" for level in of[p.per]] if p.per else [p.name] for p in law.parameters)
    return tuple(name for group in names for name in group)


def unflatten(law: Law, levels: Levels, theta) -> dict[str, Any]:
    """Returns the mapping that a law's function gets of a vector in the order of ``expand``."""
    of, found, start = dict(levels), {}, 0
    for p in law.parameters:
        size = len(of[p.per]) if p.per else 1
        found[p.name] = theta[start : start + size] if p.per else theta[start]
        start += size
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(law: Law, levels: Levels, theta, data):
    return law.function(unflatten(law, levels, theta), data)
