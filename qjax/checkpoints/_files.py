"""Files of trees with QTensors: safetensors and orbax."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from qjax._safetensors import opened
from qjax.checkpoints._arrays import arrays_of, check_like, from_checked, split, templates_of, to_arrays


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
    return from_checked(caller, arrays, description, like)


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
        arrays = arrays_of(templates_of(caller, description))
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if like is not None:
            (arrays, described), first = split(like), None
            check_like(caller, description["arrays"], described)
        targets = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first)
            for name, x in arrays.items()
        }
        return from_checked(caller, read("params", ocp.args.StandardRestore(targets)), description, like)
