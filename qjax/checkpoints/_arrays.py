"""A tree with QTensors as arrays and a description of them, which is checked."""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import _carrier
from qjax._blocks import Rows
from qjax._encode import QTensor, encode, is_qtensor
from qjax._patterns import path_of
from qjax._random import counters
from qjax.formats import format

_VERSION = 1


def to_arrays(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a tree with QTensors by name, and a description with checksums, which JSON can hold.

    The codes of "dense/kernel" are "dense/kernel.codes", its scales "dense/kernel.scales.0" and so on. For checkpoints
    of a kind that is not here, or that hold more: store both, and give ``from_arrays`` both.

    Args:
      params: a tree of arrays and QTensors; ``jax.ShapeDtypeStruct`` in the place of arrays are handed on.

    Raises:
      TypeError: for a leaf that is no array of numbers.
      ValueError: for a QTensor that ``encode`` does not make (under ``vmap``, by hand), a codebook whose name hides its
        values, and paths that are not told apart.

    >>> import jax.numpy as jnp, qjax
    >>> arrays, description = qjax.checkpoints.to_arrays({"w": qjax.encode(jnp.ones((2, 32), jnp.float32), "mxfp4")})
    >>> {name: x.shape for name, x in arrays.items()}
    {'w.codes': (2, 16), 'w.scales.0': (2, 1)}
    >>> description["arrays"]["w"]["format"][:36]
    "Scaled(Float(2, 1, specials='finite'"
    """
    arrays, described = split(params)
    whole = not any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays.values())
    return arrays, _sealed({"qjax": _VERSION, "arrays": described, "checksums": _checksums(arrays) if whole else {}})


def from_arrays(arrays: Mapping[str, Any], description: Mapping[str, Any], *, like: Any = None) -> Any:
    """Returns the tree of ``to_arrays``, equal to it bit for bit.

    Args:
      arrays, description: what ``to_arrays`` returned, or was stored of it.
      like: a tree whose structure, formats, shapes and dtypes this must have, of arrays or ``jax.ShapeDtypeStruct``,
        such as ``jax.eval_shape(quantize, params)``; arrays are put where its leaves say (``sharding``). Without it
        the result is of nested dicts.

    Raises:
      ValueError: for what is missing, too much, damaged, or not of the shape, dtype or format that is described or
        expected.
    """
    return from_checked("from_arrays", arrays, description, like)


def from_checked(caller: str, arrays: Mapping[str, Any], description: Any, like: Any) -> Any:
    templates = templates_of(caller, description)
    if like is not None:
        check_like(caller, description["arrays"], split(like)[1])
    expected = arrays_of(templates)
    _check_names(caller, "arrays", set(arrays), set(expected))
    for name, x in expected.items():
        if _shape(arrays[name]) != _shape(x):
            raise ValueError(
                f"{caller}: {name!r} is {_spelled(arrays[name])}, but the description says {_spelled(x)}; the file is "
                "damaged, or was changed by other software."
            )
    wanted = {} if like is None else split(like)[0]
    placed = {name: jax.device_put(x, getattr(wanted.get(name), "sharding", None)) for name, x in arrays.items()}
    sums = description.get("checksums")
    for name, found in _checksums(placed).items():
        if not isinstance(sums, Mapping) or sums.get(name) != found:
            raise ValueError(f"{caller}: {name!r} is damaged: its bytes are not those of the checksum.")
    leaves = {path: _filled(path, template, placed) for path, template in templates.items()}
    if like is not None:
        keys, tree = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_qtensor)
        return tree.unflatten([leaves[path_of(k)] for k, _ in keys])
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return nested.get("", nested)  # a leaf by itself has no path


def _is_array(x) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) and (
        jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
    )


def _shape(x) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name}


def _spelled(x) -> str:
    return f"{np.dtype(x.dtype).name}{list(x.shape)}"


def _checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(x) for name, x in jax.device_get({name: _checksum(x) for name, x in arrays.items()}).items()}


@jax.jit
def _checksum(x):
    """Returns a sum of the bytes of an array, each times an odd number of its place, which a change of one changes."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == bool or np.dtype(x.dtype).itemsize * 8 > _bits(x.dtype):
        x = x.astype(jnp.float32)
    data = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return jnp.sum(data.astype(jnp.uint32) * (2 * counters(data.shape)[0] + 1), dtype=jnp.uint32)


def _bits(dtype) -> int:
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits


def _sealed(description: dict[str, Any]) -> dict[str, Any]:
    """Returns a description with its own checksum."""
    said = {name: x for name, x in description.items() if name != "crc32"}
    return said | {"crc32": zlib.crc32(json.dumps(said, sort_keys=True).encode())}


def split(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a tree by name, and what is said of each leaf by path."""
    arrays, described = {}, {}
    for keys, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        path = path_of(keys)
        if not is_qtensor(x) and not _is_array(x):
            raise TypeError(f"to_arrays: {path!r} must be an array of numbers or a QTensor, got {x!r:.80}.")
        named = _named(path, x)
        if set(named) & set(arrays) or any("/" in path_of((key,)) for key in keys):
            raise ValueError(f"to_arrays: {path!r} has a key with a slash, or is the name of two arrays; rename it.")
        described[path] = _described(path, x)
        arrays |= named
    return arrays, described


def _parts(q: QTensor) -> Iterator[tuple[str, Any]]:
    yield "codes", q.codes
    for kind in ("scales", "zero_points"):
        for i, part in enumerate(getattr(q, kind)):
            yield f"{kind}.{i}", part.codes


def arrays_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of leaves by name, of leaves by path."""
    return {name: x for path, leaf in leaves.items() for name, x in _named(path, leaf).items()}


def _named(path: str, x) -> dict[str, Any]:
    """Returns the arrays of a leaf by name."""
    return {f"{path}.{name}": part for name, part in _parts(x)} if is_qtensor(x) else {path: x}


def _filled(path: str, template, arrays: Mapping[str, Any]):
    """Returns a leaf with its arrays in the place of their shapes."""
    names = list(_named(path, template))
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in names])


def _described(path: str, x) -> dict[str, Any]:
    """Returns what is said of a leaf, or raises if it would not come back from that as it is."""
    said = {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name}
    if not is_qtensor(x):
        _template("to_arrays", path, said)
        return said
    said |= {"format": repr(x.fmt), "axis": x.axis}
    if x.rows is not None:
        said |= {"order": list(x.rows.order), "rows": list(x.shape_of_codes)}
    try:
        known = format(said["format"]) == x.fmt
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"to_arrays: {path!r} is in {x.fmt!r}, and qjax.format knows no such name; make its Codebook without one."
        )
    template = _template("to_arrays", path, said)
    shapes = zip(jax.tree.leaves(x), jax.tree.leaves(template), strict=False)
    if jax.tree.structure(x) != jax.tree.structure(template) or any(_shape(a) != _shape(b) for a, b in shapes):
        raise ValueError(
            f"to_arrays: {path!r} is no QTensor as encode makes it of an array {said['shape']}; encode the whole "
            "array, not its slices under vmap."
        )
    return said


def _template(caller: str, path: str, said: Mapping[str, Any]):
    """Returns a leaf of shapes as it is described."""
    try:
        dtype, shape = jnp.dtype(said["dtype"]), tuple(map(int, said["shape"]))
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(f"{dtype} needs jax_enable_x64")
        if "format" not in said:
            return jax.ShapeDtypeStruct(shape, dtype)
        fmt, axis = format(said["format"]), int(said["axis"])
        order, of_codes = said.get("order"), said.get("rows", shape)
        if order is not None and (sorted(order) != list(range(len(shape))) or math.prod(of_codes) != math.prod(shape)):
            raise ValueError(f"rows {of_codes} of the axes {order} are not those of an array {list(shape)}")
        wide = jax.eval_shape(_carrier.widen, jax.ShapeDtypeStruct(shape, dtype)).dtype
        q = jax.eval_shape(lambda x: encode(x, fmt, axis=axis), jax.ShapeDtypeStruct(tuple(of_codes), wide))
        rows = None if order is None else Rows(shape, tuple(order))
        return dataclasses.replace(q, dtype=dtype, rows=rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{caller}: the description of {path!r} makes no sense: {said!r:.300}: {error}") from error


def templates_of(caller: str, description: Any) -> dict[str, Any]:
    version = description.get("qjax") if isinstance(description, Mapping) else None
    if version != _VERSION or not isinstance(description.get("arrays"), Mapping):
        raise ValueError(
            f"{caller}: expected a description of version {_VERSION}, got {description!r:.80}; it was written by a "
            "newer qjax, or by other software."
        )
    if _sealed(dict(description)) != description:
        raise ValueError(f"{caller}: the description of the arrays is damaged: it is not that of its checksum.")
    return {path: _template(caller, path, said) for path, said in description["arrays"].items()}


def _check_names(caller: str, what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, more = sorted(expected - found), sorted(found - expected)
        said = [
            f"{names[0]!r} and {len(names) - 1} more are {how}"
            for names, how in ((missing, "missing"), (more, "too many"))
            if names
        ]
        raise ValueError(f"{caller}: of the {len(expected)} {what} {'; '.join(said)}.")


def check_like(caller: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises if what is described is not what is expected."""
    _check_names(caller, "arrays of like", set(found), set(expected))
    for path, want in expected.items():
        for name in sorted({*want, *found[path]}):
            if found[path].get(name) != want.get(name):
                raise ValueError(
                    f"{caller}: {path!r} has the {name} {found[path].get(name)}, expected {want.get(name)} as like has "
                    "it; load it without like, or quantize the parameters anew."
                )
