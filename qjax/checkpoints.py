"""Files of quantized parameters: codes and scales in their real bytes, and a description that is checked.

A checkpoint is arrays and a description of them, which is JSON: the format, shape, dtype and blocks of each. No code is
stored, and none is run: never a pickle.
"""

import dataclasses
import json
import math
import pathlib
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
from qjax._safetensors import opened
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
    arrays, described = _split(params)
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
    return _from_arrays("from_arrays", arrays, description, like)


def _from_arrays(caller: str, arrays: Mapping[str, Any], description: Any, like: Any) -> Any:
    templates = _templates(caller, description)
    if like is not None:
        _check_like(caller, description["arrays"], _split(like)[1])
    expected = {name: x for path, template in templates.items() for name, x in _named(path, template).items()}
    _check_names(caller, "arrays", set(arrays), set(expected))
    for name, x in expected.items():
        if _shape(arrays[name]) != _shape(x):
            raise ValueError(
                f"{caller}: {name!r} is {_spelled(arrays[name])}, but the description says {_spelled(x)}; the file is "
                "damaged, or was changed by other software."
            )
    wanted = {} if like is None else _split(like)[0]
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
    return nested


def save_safetensors(path: str | pathlib.Path, params: Any) -> None:
    """Writes a tree with QTensors to a safetensors file: what ``to_arrays`` makes of it, the description in the header.

    Raises:
      ImportError: if the package safetensors is not installed.
      TypeError, ValueError: as ``to_arrays`` does.
    """
    arrays, description = to_arrays(params)
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(
            "save_safetensors: needs the package safetensors; pip install 'qjax[checkpoints]'."
        ) from error
    held = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
    save_file(held, path, {"qjax": json.dumps(description)})


def load_safetensors(path: str | pathlib.Path, *, like: Any = None) -> Any:
    """Returns the tree that ``save_safetensors`` wrote, equal bit for bit.

    Args:
      path: the file.
      like: as in ``from_arrays``.

    Raises:
      ImportError: if the package safetensors is not installed.
      FileNotFoundError: if there is no file.
      ValueError: for a file that is truncated, damaged, of another kind or not like ``like``; it says what is wrong.
    """
    caller = "load_safetensors"
    with opened(caller, path) as file:
        try:
            description = json.loads((file.metadata() or {})["qjax"])
        except (KeyError, ValueError):
            raise ValueError(
                f"{caller}: {str(path)!r} has no description of QTensors, so it was not written by save_safetensors; "
                "read it with safetensors.flax.load_file, then qjax.quantize_params."
            ) from None
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    return _from_arrays(caller, arrays, description, like)


def save_orbax(path: str | pathlib.Path, params: Any) -> None:
    """Writes a tree with QTensors to an orbax checkpoint, sharded arrays by shards; ``path`` must not exist.

    It has two items, "params" and "qjax": those of ``to_arrays``, as a standard tree and as JSON.

    Raises:
      TypeError, ValueError: as ``to_arrays`` does, and as orbax does if there is something at the path.
    """
    import orbax.checkpoint as ocp

    arrays, description = to_arrays(params)
    items = ocp.args.Composite(params=ocp.args.StandardSave(arrays), qjax=ocp.args.JsonSave(description))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(pathlib.Path(path).absolute(), args=items)


def load_orbax(path: str | pathlib.Path, *, like: Any = None) -> Any:
    """Returns the tree that ``save_orbax`` wrote, equal bit for bit.

    Args:
      path: of the checkpoint.
      like: as in ``from_arrays``; each device reads its shards. Without it arrays are whole, on the first device.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: for a checkpoint that is damaged, of another kind, or not like ``like``, with what is wrong in it.
    """
    import orbax.checkpoint as ocp

    caller, path = "load_orbax", pathlib.Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{caller}: there is no checkpoint {str(path)!r}.")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:

        def read(item: str, what: Any) -> Any:
            try:
                return checkpointer.restore(path, args=ocp.args.Composite(**{item: what}))[item]
            except Exception as error:  # of many kinds: of orbax, of tensorstore, of JSON, of the operating system
                raise ValueError(
                    f"{caller}: the item {item!r} of {str(path)!r} cannot be read, so that it is damaged or was not "
                    f"written by save_orbax: {type(error).__name__}: {str(error)[:500]}"
                ) from error

        description = read("qjax", ocp.args.JsonRestore())
        templates = _templates(caller, description)
        if like is None:
            first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            arrays = {name: x for path, template in templates.items() for name, x in _named(path, template).items()}
        else:
            first = None
            arrays, described = _split(like)
            _check_like(caller, description["arrays"], described)
        targets = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first)
            for name, x in arrays.items()
        }
        return _from_arrays(caller, read("params", ocp.args.StandardRestore(targets)), description, like)


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


def _split(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a tree by name, and what is said of each leaf by path."""
    arrays, described = {}, {}
    for keys, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        path = path_of(keys)
        if not is_qtensor(x) and not _is_array(x):
            raise TypeError(f"to_arrays: {path!r} must be an array of numbers or a QTensor, got {x!r:.80}.")
        named = _named(path, x)
        if set(named) & set(arrays) or any("/" in path_of((key,)) for key in keys):
            raise ValueError(f"to_arrays: {path!r} has a key with a slash, or is the name of two arrays; rename it.")
        described[path] = _described(path, x) if is_qtensor(x) else _shape(x)
        _template("to_arrays", path, described[path])
        arrays |= named
    return arrays, described


def _parts(q: QTensor) -> Iterator[tuple[str, Any]]:
    yield "codes", q.codes
    for kind in ("scales", "zero_points"):
        for i, part in enumerate(getattr(q, kind)):
            yield f"{kind}.{i}", part.codes


def _named(path: str, x) -> dict[str, Any]:
    """Returns the arrays of a leaf by name."""
    return {f"{path}.{name}": part for name, part in _parts(x)} if is_qtensor(x) else {path: x}


def _filled(path: str, template, arrays: Mapping[str, Any]):
    """Returns a leaf with its arrays in the place of their shapes."""
    names = list(_named(path, template))
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in names])


def _described(path: str, q: QTensor) -> dict[str, Any]:
    said = {"format": repr(q.fmt), "shape": list(q.shape), "dtype": np.dtype(q.dtype).name, "axis": q.axis}
    if q.rows is not None:
        said |= {"order": list(q.rows.order), "rows": list(q.shape_of_codes)}
    try:
        known = format(said["format"]) == q.fmt
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"to_arrays: {path!r} is in {q.fmt!r}, and qjax.format knows no such name; make its Codebook without one."
        )
    template = _template("to_arrays", path, said)
    if jax.tree.structure(q) != jax.tree.structure(template) or any(
        _shape(a) != _shape(b) for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(template), strict=True)
    ):
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
        fmt, axis, order, of_codes = (
            format(said["format"]),
            int(said["axis"]),
            said.get("order"),
            said.get("rows", shape),
        )
        if order is not None and (sorted(order) != list(range(len(shape))) or math.prod(of_codes) != math.prod(shape)):
            raise ValueError(f"rows {of_codes} of the axes {order} are not those of an array {list(shape)}")
        wide = jax.eval_shape(_carrier.widen, jax.ShapeDtypeStruct(shape, dtype)).dtype
        q = jax.eval_shape(lambda x: encode(x, fmt, axis=axis), jax.ShapeDtypeStruct(tuple(of_codes), wide))
        rows = None if order is None else Rows(shape, tuple(order))
        return dataclasses.replace(q, dtype=dtype, rows=rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{caller}: the description of {path!r} makes no sense: {said!r:.300}: {error}") from error


def _templates(caller: str, description: Any) -> dict[str, Any]:
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


def _check_like(caller: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises if what is described is not what is expected."""
    _check_names(caller, "arrays of like", set(found), set(expected))
    for path, want in expected.items():
        for name in sorted({*want, *found[path]}):
            if found[path].get(name) != want.get(name):
                raise ValueError(
                    f"{caller}: {path!r} has the {name} {found[path].get(name)}, expected {want.get(name)} as like has "
                    "it; load it without like, or quantize the parameters anew."
                )
