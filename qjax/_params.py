"""``quantize_params``: trained parameters in real storage, in the blocks of the products that they are operands of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qjax import _jaxpr
from qjax._encode import is_qtensor
from qjax._patterns import check_pattern, first_matches, path_of
from qjax._quantizer import Quantizer
from qjax._rows import axes_of_numbers
from qjax._sites import OPERATIONS, marked_site
from qjax._stored import Axes, Followed, has_direction, stored_weight
from qjax.formats import Format

QuantizerLike = Quantizer | Format | str
Rule = QuantizerLike | Mapping[str, QuantizerLike | None] | Callable[[str, Array], QuantizerLike | None]


def quantize_params(
    params: Any, rule: Rule, *, axes: Mapping[str, Axes] | None = None, key: Array | None = None
) -> Any:
    """Returns trained parameters with those that a rule names as ``QTensor``, codes and scales in their real bytes.

    What ``qjax.linen.quantize``, ``qjax.nnx.quantize`` and ``qjax.quantize`` made runs from them as from arrays: a
    product whose recipe has the format of a weight multiplies its codes, bit for bit what it would have rounded the
    weight to; other operations get the values. ``qjax.decode(params)`` brings the values back for a model as it is.

    Args:
      params: a tree of arrays: the parameters of linen, an ``nnx.State``, or any other.
      rule: a format or its name, or a ``Quantizer``, for the weights: the arrays of ``axes``, or else those called
        "kernel" and "embedding". Or a dict of patterns, of which the first that matches a whole path
        ("block_0/attn/query/kernel") decides, None leaving the array as it is; or a function of path and array.
      axes: along which axes the blocks of each array lie, by path: what ``contracted`` finds out. By default those of
        Flax's names: a "kernel" of two axes is contracted over the first, one of four or five is a convolution's, an
        "embedding" is contracted over its last.
      key: the PRNG key, if a rounding is stochastic. Each array draws its own bits.

    Raises:
      TypeError: for a rule that is none.
      ValueError: for a pattern that is no regular expression or matches nothing, for a rule without any array, for
        blocks along axes that nothing says, and for a missing or unused key.

    >>> import jax, jax.numpy as jnp, qjax
    >>> params = {"dense": {"kernel": jnp.ones((64, 32), jnp.float32), "bias": jnp.zeros(32, jnp.float32)}}
    >>> stored = qjax.quantize_params(params, "mxfp4")
    >>> stored["dense"]["kernel"].nbytes, stored["dense"]["kernel"].scales[0].shape
    (1088, (2, 32))
    """
    if isinstance(rule, Mapping):
        for pattern in rule:
            check_pattern("quantize_params", pattern)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    floats = {
        path_of(keys): x for keys, x in leaves if not is_qtensor(x) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    }
    if axes is not None and (unknown := sorted(set(axes) - set(floats))):
        raise ValueError(
            f"quantize_params: axes has {unknown[0]!r}, but the parameters have no such array of floats: "
            f"{', '.join(map(repr, list(floats)[:20]))}. Make it with qjax.contracted(fn, params, ...)."
        )
    quantizers = _quantizers(rule, floats, axes)
    draws = any(q is not None and q.is_stochastic for q in quantizers.values())
    if draws != (key is not None):
        what = "a rounding is stochastic and needs key=jax.random.key(...)" if draws else "nothing draws; leave key out"
        raise ValueError(f"quantize_params: {what}.")

    def stored(number: int, keys, x):
        quantizer = quantizers.get(path := path_of(keys))
        if is_qtensor(x) or quantizer is None:
            return x
        own = jax.random.fold_in(key, number) if key is not None and quantizer.is_stochastic else None
        return stored_weight(x, quantizer, _axes(path, x.ndim, quantizer, axes), own)

    return tree.unflatten([stored(i, keys, x) for i, (keys, x) in enumerate(leaves)])


def _quantizers(rule: Rule, floats: dict[str, Array], axes: Mapping[str, Axes] | None) -> dict[str, Quantizer | None]:
    """Returns what a rule says of each array."""
    if isinstance(rule, Mapping):
        said = dict(zip(floats, first_matches("quantize_params", rule, list(floats), "the parameters"), strict=True))
    elif isinstance(rule, Quantizer | Format | str):
        said = {
            path: rule for path in floats if (_name(path) in ("kernel", "embedding") if axes is None else path in axes)
        }
    elif callable(rule):
        said = {path: rule(path, x) for path, x in floats.items()}
    else:
        raise TypeError(
            "quantize_params: rule must be a format or a Quantizer, a dict of path patterns to these or None, or a "
            f"function of path and array, got {type(rule).__name__}."
        )
    if all(q is None for q in said.values()):
        raise ValueError(
            "quantize_params: the rule quantizes none of the arrays "
            f"{', '.join(map(repr, list(floats)[:20]))}; give a dict of patterns of their paths."
        )
    return {path: q if q is None or isinstance(q, Quantizer) else Quantizer(q) for path, q in said.items()}


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _axes(path: str, ndim: int, quantizer: Quantizer, axes: Mapping[str, Axes] | None) -> Axes | None:
    """Returns the axes of a weight, None if its format has no blocks along any."""
    found = axes.get(path) if axes is not None else _axes_of_name(_name(path), ndim)
    if found is None and has_direction(quantizer.fmt):
        silent = "its name" if axes is None else "axes"
        raise ValueError(
            f"quantize_params: {path!r} has {ndim} axes, and {silent} does not say "
            f"over which it is contracted, along which the blocks of {quantizer.fmt!r} must lie. Pass "
            "axes=qjax.contracted(fn, params, ...) of a function that multiplies by it, or leave it out of the rule."
        )
    return found if found is None or has_direction(quantizer.fmt) else None


def _axes_of_name(name: str, ndim: int) -> Axes | None:
    match name, ndim:
        case "kernel", 2:
            return Axes((0,), (), (1,))
        case "kernel", 4 | 5:
            return Axes(tuple(range(ndim - 1)), (), (ndim - 1,), block=ndim - 2)
        case "embedding", 2:
            return Axes((1,), (), (0,))
    return None


def contracted(fn: Callable, params: Any, *args, **kwargs) -> dict[str, Axes]:
    """Returns the axes over which ``fn(params, *args, **kwargs)`` contracts its parameters, by path.

    These are the arrays that are operands of a dot product or convolution, transposed or converted at most, and also
    those in jit, remat and cond; not slices of stacked parameters in a scan. The function is traced and not run.

    Args:
      fn: a function of the parameters as ``quantize_params`` gets them, such as
        ``lambda params, x: model.apply({"params": params}, x)``; quantized or not.
      params: arrays or ``jax.ShapeDtypeStruct``.
      args, kwargs: the other arguments.

    Raises:
      ValueError: if two products contract an array over different axes.

    >>> import jax, jax.numpy as jnp, qjax
    >>> params = {"w": jnp.ones((4, 2, 3), jnp.float32)}
    >>> qjax.contracted(lambda p, x: jnp.tensordot(x, p["w"], 1), params, jnp.ones((5, 4), jnp.float32))
    {'w': Axes(contract=(0,), batch=(), free=(1, 2), block=None)}
    """
    found: dict[str, Axes] = {}
    program = _jaxpr.trace(fn, (params, *args), kwargs)
    paths = [path_of(keys) for keys, x in jax.tree_util.tree_leaves_with_path(params) if hasattr(x, "dtype")]

    def choose(eqn, place: _jaxpr.Place):
        name = eqn.primitive.name
        if (site := marked_site(place.names)) is not None:
            if name != "custom_vjp_call":
                return _jaxpr.KEEP
            ranks = len(site.lhs.shape), len(site.rhs.shape)
            return _Record(found, site.operation, site.dimension_numbers, ranks, eqn.params.get("num_consts", 0))
        if name in OPERATIONS:
            ranks = tuple(v.aval.ndim for v in eqn.invars)
            return _Record(found, name, eqn.params["dimension_numbers"], ranks, 0)
        return None if name in _jaxpr.ENTER else _jaxpr.KEEP

    def run(*arrays):
        followed = [Followed(x, _Path(path), tuple(range(x.ndim))) for x, path in zip(arrays, paths, strict=False)]
        return _jaxpr.evaluate(program.jaxpr.jaxpr, program.jaxpr.consts, plan, [*followed, *arrays[len(followed) :]])

    plan = _jaxpr.plan(program.jaxpr.jaxpr, choose)
    jax.eval_shape(run, *program.arrays)
    return found


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Path:
    path: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Record:
    """In the place of a product: itself, and a note of the parameters that it has as operands."""

    found: dict[str, Axes]
    operation: str
    numbers: Any
    ranks: tuple[int, ...]
    first: int
    name: str = ""

    def __call__(self, eqn, operands, key, state):
        axes = axes_of_numbers(self.operation, self.numbers, self.ranks)
        for x, where in zip(operands[self.first : self.first + 2], axes, strict=True):
            if isinstance(x, Followed) and isinstance(x.source, _Path):
                mine = x.axes_of_source(where)
                known = self.found.setdefault(x.source.path, mine)
                if known != mine:
                    raise ValueError(
                        f"contracted: {x.source.path!r} is contracted over its axes {known.contract} in one product "
                        f"and over {mine.contract} in another; blocks can lie along one of them alone. Leave it out of "
                        "the rule, or store it in a format without blocks."
                    )
        operands = map(_jaxpr.value_of, operands)
        return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
