"""``Site``: a dot product or convolution of a program, and where it is."""

import contextlib
import dataclasses
import math
import pathlib
import sys
import zlib
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from qjax import _jaxpr
from qjax._recipe import Recipe

OPERATIONS = frozenset({"dot_general", "conv_general_dilated"})

MODULE = "@"
"""How a scope begins that names a module by its path in the model: it stands for all the scopes around it."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A dot product or convolution of a program, and what is quantized in it.

    Attributes:
      path: of the module, then the named scopes within it; ``jnp.einsum`` opens one with its subscripts.
      operation: "dot_general" or "conv_general_dilated".
      lhs, rhs, out: the shapes and dtypes of the operands and of the result.
      dimension_numbers: those of lax.
      recipe: what is quantized, None for full precision.
      source: the line of the user that asked for it.
      steps: the lengths of the scans around it, outermost first.
      fixed: why it cannot be quantized where it is, or "".
      unsteady: the operation around it that may run it otherwise than once a step, or "".
    """

    path: str
    operation: str
    lhs: jax.ShapeDtypeStruct
    rhs: jax.ShapeDtypeStruct
    out: jax.ShapeDtypeStruct
    dimension_numbers: Any
    recipe: Recipe | None = None
    source: str = dataclasses.field(default="", compare=False)
    steps: tuple[int, ...] = ()
    fixed: str = ""
    unsteady: str = ""

    @property
    def times(self) -> int:
        """How often scans run it."""
        return math.prod(self.steps)

    @property
    def multiply_adds(self) -> int:
        """How many products it sums, in all the times that it runs."""
        if self.operation == "dot_general":
            (contracted, _), _ = self.dimension_numbers
            each = math.prod(self.lhs.shape[a] for a in contracted)
        else:
            each = math.prod(self.rhs.shape) // self.rhs.shape[self.dimension_numbers.rhs_spec[0]]
        return self.times * math.prod(self.out.shape) * each

    @property
    def is_quantized(self) -> bool:
        """Whether any of it is."""
        return self.recipe is not None and not self.recipe.is_empty


# What the quantized operations of this process are, by the scope that marks them in a jaxpr. A scope is text, and this
# text is the same in every process, so that several of them compile the same program.
_MARKED: dict[str, Site] = {}
_MARK = "qjax["


@contextlib.contextmanager
def marked(eqn, recipe: Recipe):
    """Marks what it is around as a quantized operation, that of lax being an equation, for ``find`` to see."""
    site = dataclasses.replace(_site(eqn), recipe=recipe, fixed="it is quantized already")
    mark = f"{_MARK}{zlib.crc32(repr(site).encode()):08x}]"
    _MARKED[mark] = site
    with jax.named_scope(mark):
        yield


def marked_site(names: tuple[str, ...]) -> Site | None:
    """Returns the quantized operation that is marked by one of the scopes, None if there is none."""
    return next((_MARKED[name] for name in names if name in _MARKED), None)


def _site(eqn) -> Site:
    lhs, rhs, out = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in (*eqn.invars[:2], eqn.outvars[0]))
    return Site("", eqn.primitive.name, lhs, rhs, out, eqn.params["dimension_numbers"])


def find(program: _jaxpr.Program, replace: Callable[[Site], Hashable | None], root: str = "") -> _jaxpr.Plan:
    """Returns the plan that replaces each site of a program by what ``replace`` answers, asked in their order.

    Args:
      root: the path of the module that paths are counted from.
    """
    seen = set()

    def placed(site: Site, names: tuple[str, ...], eqn, place: _jaxpr.Place) -> Site:
        return dataclasses.replace(
            site, path=_path(names, root), source=source(eqn), steps=place.steps, unsteady=place.unsteady
        )

    def choose(eqn, place: _jaxpr.Place):
        marks = [i for i, name in enumerate(place.names) if name in _MARKED]
        if marks:
            if place.gradient or not _jaxpr.holds(eqn, OPERATIONS):
                return _jaxpr.KEEP
            # Each call is one equation, until differentiation takes it apart: then the parts are of one place.
            names = place.names[: marks[0] + 1]
            where = (place.position, names, id(eqn) if eqn.primitive.name == "custom_vjp_call" else None)
            if where not in seen:
                seen.add(where)
                replace(placed(_MARKED[names[-1]], names[:-1], eqn, place))
            return _jaxpr.KEEP
        if eqn.primitive.name not in OPERATIONS:
            return None
        site = _site(eqn)
        return replace(placed(dataclasses.replace(site, fixed=_fixed(site, place)), place.names, eqn, place))

    return _jaxpr.plan(program.jaxpr.jaxpr, choose)


def _path(names: tuple[str, ...], root: str) -> str:
    for i, name in reversed(list(enumerate(names))):
        if name.startswith(MODULE):
            path = name[len(MODULE) :]
            if path == root or path.startswith(f"{root}/"):
                path = path[len(root) + 1 :]
            names = (path, *names[i + 1 :])
            break
    return "/".join(filter(None, names))


def current_module() -> str:
    """Returns the path of the module whose scope this is called in, or ""."""
    from jax.extend import source_info_util

    names = [s.name for s in source_info_util.current_name_stack().stack if s.name.startswith(MODULE)]
    return names[-1][len(MODULE) :] if names else ""


def _fixed(site: Site, place: _jaxpr.Place) -> str:
    if place.inside:
        return f"it is inside a {place.inside}, whose own rules say what happens"
    if place.gradient:
        return "it is in a gradient; quantize first, then differentiate: grad(quantize(f)), not quantize(grad(f))"
    dtypes = {x.dtype for x in (site.lhs, site.rhs)}
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return f"its operands are {' and '.join(sorted(map(str, dtypes)))}, not float"
    return ""


def source(eqn) -> str:
    """Returns the innermost line outside the libraries that asked for an equation, as file:line."""
    from jax.extend import source_info_util

    libraries = [pathlib.Path(__file__).parent] + [
        pathlib.Path(sys.modules[name].__file__ or "").parent for name in ("flax",) if name in sys.modules
    ]
    lines = source_info_util.summarize(eqn.source_info, num_frames=1000).splitlines()
    users = [line for line in lines if not any(line.startswith(str(folder)) for folder in libraries)]
    line, *_ = (users or lines or ["unknown"])[-1].rsplit(" (", 1)
    return ":".join(line.split(":")[:2])
