"""Optimizer states in real low-precision storage."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qjax._patterns import check_pattern, first_matches
from qjax.optim._keys import check_key, first_key, map_with_keys, next_key
from qjax.optim._storage import Storage, StorageLike, Stored, as_storage, restored, stored

Rule = StorageLike | Mapping[str, StorageLike | None] | Callable[[str, jax.Array], StorageLike | None]


class ChoppedState(NamedTuple):
    """The state of ``chop_state``: that of the inner transformation, some arrays as ``Stored``, and the next key."""

    inner: Any
    key: Any = None


def chop_state(
    tx: optax.GradientTransformation,
    rule: Rule,
    *,
    min_size: int = 0,
    key: jax.Array | None = None,
    remat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose state is held in low precision between steps, as codes and scales, and else tx.

    In a step the state is decoded, tx updates it in full precision, and it is encoded again; the update is computed
    from the state before that. So it is what a fused low-bit optimizer computes, with its bytes between steps.

    Args:
      tx: any transformation.
      rule: how to hold the floating-point arrays of the state: a format or its name, a ``Quantizer`` for another
        rounding, or an ``Expanded``. Or a dict of patterns, the first that matches a whole path, such as ``mu/w`` of
        ``optax.scale_by_adam``, decides, None leaves the array as it is; or a function of path and array.
        Blocks lie along the last axis where it is a multiple of the block, else over all elements.
      min_size: arrays with fewer elements stay as they are.
      key: the PRNG key, if a rounding is stochastic; each step and each array draws anew.
      remat: whether a compiled step decodes what is ``Expanded`` anew, and runs tx anew, for the updates, for the
        scales and for the codes. That is faster for a tx of few operations an element, such as
        ``optax.scale_by_adam``: what three loops read XLA stores, in full precision.

    Raises:
      ValueError: for a pattern that is no regular expression, in ``init`` for one that matches no array, and for a
        missing or unused key.

    >>> import jax, jax.numpy as jnp, optax, qjax
    >>> tx = qjax.optim.chop_state(optax.adam(1e-3), {".*/mu": "dynamic8_g256", ".*/nu": "udynamic8_g256"})
    >>> state = tx.init(jnp.zeros(1024, jnp.float32))
    >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    2084
    """
    rules = _Rules(rule, min_size)
    if rules.known is not None:
        check_key("chop_state", rules.known, key)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        inner = tx.init(params)
        storages = rules.storages(inner)
        if rules.known is None:
            check_key("chop_state", [s.is_stochastic for s in storages if s is not None], key)
        return ChoppedState(_held(inner, inner, storages, first_key(key)), first_key(key))

    def update(updates, state, params=None, **extra_args):
        key, own = next_key(state.key)

        def updated(reading: int):
            free = functools.partial(_free, reading=reading)
            inner = jax.tree.map(free, state.inner, is_leaf=lambda x: isinstance(x, Stored))
            return tx.update(updates, inner, params, **extra_args)

        first = updated(0)
        inner, again = (updated(reading)[1] if remat else first[1] for reading in (1, 2))
        return first[0], ChoppedState(_held(inner, again, rules.storages(inner), own), key)

    return optax.GradientTransformationExtraArgs(init, update)


class _Rules:
    """A checked rule.

    Attributes:
      known: whether each storage that it names is stochastic, None if it is a function, which may return any.
    """

    def __init__(self, rule: Rule, min_size: int):
        self.min_size, self.patterns, self.known = min_size, None, None
        if isinstance(rule, Mapping):
            for pattern in rule:
                check_pattern("chop_state", pattern)
            self.patterns = {p: None if s is None else as_storage(s) for p, s in rule.items()}
            self.known = [s is not None and s.is_stochastic for s in self.patterns.values()]
        elif callable(rule) and not isinstance(rule, Storage):
            self.rule = rule
        else:
            storage = as_storage(rule)
            self.rule, self.known = lambda path, x: storage, [storage.is_stochastic]

    def storages(self, state) -> list[Storage | None]:
        """Returns the storage of each leaf of a state, or raises what the rule misses."""
        leaves = jax.tree_util.tree_leaves_with_path(state)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        floats = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for _, x in leaves]
        if not any(floats):
            raise ValueError("chop_state: the state of tx has no floating-point array; leave chop_state out.")
        named = [path for path, is_float in zip(paths, floats, strict=True) if is_float]
        matches = iter(first_matches("chop_state", self.patterns or {}, named, "the state"))
        found: list[Storage | None] = []
        for path, (_, x), is_float in zip(paths, leaves, floats, strict=True):
            storage = None
            if is_float and self.patterns is not None:
                storage = next(matches)
            elif is_float:
                storage = self.rule(path, x)
                storage = None if storage is None else as_storage(storage)
            found.append(storage if storage is not None and x.size >= self.min_size else None)
        return found


def _held(state, again, storages: list[Storage | None], key):
    each = zip(storages, jax.tree.leaves(again), strict=True)

    def hold(x, key):
        storage, again = next(each)
        return x if storage is None else stored(storage, x, key if storage.is_stochastic else None, again=again)

    return map_with_keys(hold, state, key)


def _free(x, reading: int):
    return restored(x, reading) if isinstance(x, Stored) else x
