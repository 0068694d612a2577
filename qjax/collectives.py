"""Sums and gathers over the devices of a mesh with codes and scales on the wire, for use under ``jax.shard_map``.

Each mirrors the function of its name in ``jax.lax``, with a format after the axis. What a device sends is encoded, what
it receives is decoded, and sums are float32 (float64 for float64), in the order of the devices or of a ring.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax._chop import RoundingLike, _rounding_named
from qjax._encode import decode, encode
from qjax._modes import Rounding
from qjax.formats import Format, Scaled, format

Order = Literal["direct", "ring"]


class Feedback(NamedTuple):
    """What error feedback keeps of an array: the errors of what was sent, to be sent with the next one.

    Attributes:
      terms: of the device's own array, in its shape.
      sums: of the piece of the sum that the device rounded, (pieces' length,).
    """

    terms: Any
    sums: Any


class _Wire(NamedTuple):
    """How arrays are sent."""

    fmt: Format
    rounding: Rounding
    saturate: bool

    def send(self, move: Callable, rows, keys):
        """Returns what arrives of rows, each of them with scales of its own, when their codes are moved."""
        put = functools.partial(encode, fmt=self.fmt, rounding=self.rounding, saturate=self.saturate)
        stored = jax.vmap(lambda row, key: put(row, key=key), (0, None if keys is None else 0))(rows, keys)
        return jax.vmap(decode)(jax.tree.map(move, stored)), jax.vmap(decode)(stored)


def psum(
    x: Any,
    axis_name: str,
    fmt: Format | str,
    rounding: RoundingLike = Rounding.NEAREST_EVEN,
    *,
    order: Order = "direct",
    saturate: bool = False,
    key: Array | None = None,
    feedback: Any = None,
) -> Any:
    """Returns the sum of x over the devices of a mesh axis, ``jax.lax.psum``, with codes on the wire.

    The elements of x, in a row and padded with zeros, are cut into a piece for each device. Each device gets its piece
    of all others (a reduce-scatter), and sends the sum of it to all (an all-gather). So every device has the same
    bits, and sends ``2 (n - 1) / n`` times the codes and scales of x.

    - "direct": ``round(round(x_0) + round(x_1) + ...)``, in the order of the devices: each term is rounded once, where
      it is sent, and the sum once. The terms go by an all-to-all.
    - "ring": ``round(... round(round(x_1) + x_2) + ... + x_0)`` for the first piece, one device later for each further
      one: the partial sum is rounded at every hop, as by reductions in the network or in a ring.

    Blocks lie along the elements within a piece; a scale a tensor is one a piece.

    Args:
      x: float arrays, a tree of them.
      axis_name: of the mesh axis, under ``jax.shard_map``.
      fmt: a format or its name, without tiles.
      rounding, saturate: as in ``chop``.
      order: "direct" or "ring".
      key: the PRNG key of a stochastic rounding, the same on all devices or not: each draws its own bits.
      feedback: None, or what the last call returned beside the sum, ``init_feedback`` at first. What rounding left out
        is added to the next x and to the next sum; then a pair is returned. With "direct" alone.

    Gradient: that of ``jax.lax.psum``, in full precision.

    Raises:
      TypeError, ValueError: for an unknown order, tiles, feedback in a ring, a missing key or one that is not used.

    >>> import functools, jax, jax.numpy as jnp
    >>> from qjax import collectives
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> total = functools.partial(collectives.psum, axis_name="data", fmt="mxfp8_e4m3")
    >>> total = jax.shard_map(total, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    >>> total(jnp.full((1, 4), 0.3, jnp.float32))
    Array([[0.3125, 0.3125, 0.3125, 0.3125]], dtype=float32)

    Sources: Seide et al. (2014), 1-bit stochastic gradient descent, https://doi.org/10.21437/Interspeech.2014-274
    (error feedback); Tang et al. (2021), 1-bit Adam, https://arxiv.org/abs/2102.02888, section 4 (of the terms and of
    the sums); Patarasuk and Yuan (2009), https://doi.org/10.1016/j.jpdc.2008.09.002 (rings).
    """
    wire = _checked("psum", fmt, rounding, saturate, key, order)
    if feedback is not None and order == "ring":
        raise ValueError("psum: feedback is for order='direct'; in a ring the partial sums have no owner to keep it.")
    leaves, tree = jax.tree.flatten(x)
    kept = [None] * len(leaves) if feedback is None else tree.flatten_up_to(feedback)
    sums, following = [], []
    for number, (leaf, errors) in enumerate(zip(leaves, kept, strict=True)):
        own = None if key is None else jax.random.fold_in(key, number)
        fn = functools.partial(_psum, wire=wire, axis_name=axis_name, order=order)
        found = _straight_through(lambda y: lax.psum(y, axis_name), fn, leaf, own, errors)
        sums.append(found[0])
        following.append(found[1])
    total = tree.unflatten(sums)
    return total if feedback is None else (total, tree.unflatten(following))


def psum_scatter(
    x: Any,
    axis_name: str,
    fmt: Format | str,
    rounding: RoundingLike = Rounding.NEAREST_EVEN,
    *,
    scatter_dimension: int = 0,
    tiled: bool = False,
    order: Order = "direct",
    saturate: bool = False,
    key: Array | None = None,
) -> Any:
    """Returns each device's piece of the sum of x, ``jax.lax.psum_scatter``, with codes on the wire.

    Terms, or the partial sums of a ring, are rounded where they are sent, as in ``psum``; the sum itself is not.
    Blocks lie along the last axis of a piece.

    Args:
      x: float arrays, a tree of them.
      axis_name, scatter_dimension, tiled: as in ``jax.lax.psum_scatter``.
      fmt, rounding, order, saturate, key: as in ``psum``.

    Gradient: that of ``jax.lax.psum_scatter``, in full precision.

    Raises:
      TypeError, ValueError: as ``psum``; if the devices do not divide the dimension.
    """
    wire = _checked("psum_scatter", fmt, rounding, saturate, key, order)
    n, whole = lax.axis_size(axis_name), functools.partial(lax.psum_scatter, axis_name=axis_name)
    whole = functools.partial(whole, scatter_dimension=scatter_dimension, tiled=tiled)

    def scattered(y, key, _):
        rows = jnp.moveaxis(y, scatter_dimension, 0)
        rows = rows.reshape(n, rows.shape[0] // n, *rows.shape[1:]) if tiled else rows
        piece = _reduce(rows, key, wire, axis_name, order)[0].astype(y.dtype)
        return (jnp.moveaxis(piece, 0, scatter_dimension) if tiled else piece), None

    def each(number, y):
        size = y.shape[scatter_dimension]
        if size % n if tiled else size != n:
            raise ValueError(
                f"psum_scatter: dimension {scatter_dimension} has {size} elements for {n} devices; "
                + ("it must be a multiple of them." if tiled else "it must have one each, or pass tiled=True.")
            )
        return _straight_through(whole, scattered, y, None if key is None else jax.random.fold_in(key, number), None)[0]

    return _mapped(each, x)


def all_gather(
    x: Any,
    axis_name: str,
    fmt: Format | str,
    rounding: RoundingLike = Rounding.NEAREST_EVEN,
    *,
    axis: int = 0,
    tiled: bool = False,
    saturate: bool = False,
    key: Array | None = None,
) -> Any:
    """Returns the arrays of all devices, ``jax.lax.all_gather``, with codes on the wire: ``round(x_0), round(x_1) ...``

    A device gets back its own array rounded, as all others do. Blocks lie along the last axis of x.

    Args:
      x: float arrays, a tree of them.
      axis_name, axis, tiled: as in ``jax.lax.all_gather``.
      fmt, rounding, saturate, key: as in ``psum``.

    Gradient: that of ``jax.lax.all_gather``, in full precision.

    Raises:
      TypeError, ValueError: as ``psum``.
    """
    wire = _checked("all_gather", fmt, rounding, saturate, key)

    def gathered(y, key, _):
        keys = None if key is None else _own(key, axis_name)[None]
        found, _ = wire.send(lambda leaf: lax.all_gather(leaf[0], axis_name), y[None], keys)
        found = jnp.moveaxis(found, 0, axis)
        return (found.reshape(*y.shape[:axis], -1, *y.shape[axis + 1 :]) if tiled else found), None

    def each(number, y):
        whole = functools.partial(lax.all_gather, axis_name=axis_name, axis=axis, tiled=tiled)
        return _straight_through(whole, gathered, y, None if key is None else jax.random.fold_in(key, number), None)[0]

    return _mapped(each, x)


def init_feedback(x: Any, axis_size: int) -> Any:
    """Returns the ``Feedback`` of ``psum`` before the first step, zeros, for a tree of arrays and a number of devices.

    Each device has its own: outside ``shard_map`` add an axis of devices, and shard it.

    >>> import jax.numpy as jnp
    >>> from qjax import collectives
    >>> collectives.init_feedback(jnp.ones((3, 5), jnp.float32), 8).sums.shape
    (2,)
    """
    return jax.tree.map(
        lambda y: Feedback(jnp.zeros(y.shape, _wide(y)), jnp.zeros(-(-y.size // axis_size), _wide(y))), x
    )


def _checked(caller: str, fmt, rounding, saturate: bool, key, order: str = "direct") -> _Wire:
    if order not in ("direct", "ring"):
        raise ValueError(f"{caller}: order must be 'direct' or 'ring', got {order!r}.")
    fmt, rounding = format(fmt), _rounding_named(caller, rounding)
    level = fmt
    while isinstance(level, Scaled):
        if isinstance(level.block, tuple):
            raise ValueError(f"{caller}: tiles of {level.block} cannot be cut into pieces; take blocks along one axis.")
        level = level.element
    if rounding.is_stochastic != (key is not None):
        what = "needs key=jax.random.key(...)" if key is None else "draws nothing; leave key out"
        raise ValueError(f"{caller}: rounding {rounding.value!r} {what}.")
    return _Wire(fmt, rounding, saturate)


def _wide(x) -> np.dtype:
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def _mapped(fn: Callable, x):
    leaves, tree = jax.tree.flatten(x)
    return tree.unflatten([fn(number, leaf) for number, leaf in enumerate(leaves)])


def _own(key, axis_name: str):
    return jax.random.fold_in(key, lax.axis_index(axis_name))


def _straight_through(linear: Callable, fn: Callable, x, key, state):
    """Returns ``fn(x, key, state)``, a result and a state, with the derivative of a linear function of x."""
    outer = jax.custom_jvp(fn)

    @outer.defjvp
    def rule(primals, tangents):
        out, following = outer(*primals)
        return (out, following), (linear(tangents[0]), jax.tree.map(jnp.zeros_like, following))

    return outer(x, key, state)


def _psum(x, key, errors: Feedback | None, *, wire: _Wire, axis_name: str, order: Order):
    n = lax.axis_size(axis_name)
    flat = x.astype(_wide(x)).reshape(-1)
    if errors is not None:
        flat = flat + errors.terms.reshape(-1)
    length = -(-flat.size // n)
    rows = jnp.pad(flat, (0, n * length - flat.size)).reshape(n, length)
    keys = [None, None] if key is None else [jax.random.fold_in(key, i) for i in range(2)]
    piece, sent = _reduce(rows, keys[0], wire, axis_name, order)
    if errors is not None:
        piece = piece + errors.sums
    own = None if keys[1] is None else _own(keys[1], axis_name)[None]
    gather = functools.partial(lax.all_gather, axis_name=axis_name, to="invarying")
    total, mine = wire.send(lambda leaf: gather(leaf[0]), piece[None], own)
    if errors is not None:
        left = (rows - sent).reshape(-1)[: flat.size].reshape(x.shape)
        errors = Feedback(left, piece - mine[0])
    return total.reshape(-1)[: flat.size].reshape(x.shape).astype(x.dtype), errors


def _reduce(rows, key, wire: _Wire, axis_name: str, order: Order):
    """Returns the sum over the devices of the row of this one, and the rows as the others see them."""
    n, place = lax.axis_size(axis_name), lax.axis_index(axis_name)
    rows = rows.astype(_wide(rows))
    own = None if key is None else _own(key, axis_name)
    if order == "direct":
        swap = functools.partial(lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True)
        terms, sent = wire.send(swap, rows, None if own is None else jax.random.split(own, n))
        return functools.reduce(jnp.add, terms), sent
    to_next = functools.partial(lax.ppermute, axis_name=axis_name, perm=[(i, (i + 1) % n) for i in range(n)])
    partial = rows[(place - 1) % n]
    for hop in range(n - 1):
        keys = None if own is None else jax.random.fold_in(own, hop)[None]
        received, _ = wire.send(to_next, partial[None], keys)
        partial = received[0] + rows[(place - 2 - hop) % n]
    return partial, rows


_COLLECTIVE = re.compile(
    r"^[^=]*= (?P<shapes>.*?) (?P<name>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"(?P<dtype>pred|bf16|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]")
# {{0,1},{2,3}}, [groups,size]<=[...], or, from jax 0.12 on, mesh['a'=2,'b'=4] {'b'}.
_GROUPS = re.compile(
    r"replica_groups=(\{\{(?P<first>[\d,]*)\}|\[\d+,(?P<size>\d+)\]|mesh\[(?P<mesh>[^\]]*)\] \{(?P<axes>[^}]*)\})"
)


def wire_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns how many bytes a device sends in a compiled program, for each kind of collective operation in it.

    They are counted from the shapes in the text of the program, with the least that its device must send: for b bytes
    of result over n devices ``(n - 1) / n b`` in an all-gather and an all-to-all, twice that in an all-reduce,
    ``(n - 1) b`` in a reduce-scatter, b in a permutation. What a loop repeats is counted once.

    Raises:
      ValueError: if the devices of an operation cannot be read from the text.

    >>> import jax, jax.numpy as jnp
    >>> from qjax import collectives
    >>> collectives.wire_bytes(jax.jit(jnp.sin).lower(jnp.ones(3, jnp.float32)).compile())
    {}
    """
    found: dict[str, int] = {}
    for line in (compiled.as_text() or "").splitlines():
        operation = _COLLECTIVE.search(line)
        if operation is None:
            continue
        size = sum(_nbytes(array) for array in _ARRAY.finditer(operation["shapes"]))
        name = operation["name"]
        n = 1 if name == "collective-permute" else _group_size(line)
        sent = {
            "all-gather": size * (n - 1) // n,
            "all-to-all": size * (n - 1) // n,
            "all-reduce": 2 * size * (n - 1) // n,
            "reduce-scatter": size * (n - 1),
            "collective-permute": size,
        }
        found[name] = found.get(name, 0) + sent[name]
    return found


def _group_size(line: str) -> int:
    """Returns how many devices take part in each group of a collective operation."""
    groups = _GROUPS.search(line)
    if groups is None:
        raise ValueError(f"wire_bytes: the replica groups of this operation cannot be read: {line.strip()}")
    if groups["mesh"]:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups["mesh"]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", groups["axes"]))
    return int(groups["size"] or len(groups["first"].split(",")))


def _nbytes(array: re.Match) -> int:
    bits = 8 if array["dtype"] == "pred" else int(re.findall(r"\d+", array["dtype"])[0])
    return math.prod(int(n) for n in array["shape"].split(",") if n) * bits // 8
