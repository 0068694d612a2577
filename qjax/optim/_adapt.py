"""``AdaPT``: a controller of the fixed-point format of every weight tensor while a network trains."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from qjax.formats import Fixed, format
from qjax.optim._annealing import chop_fixed

_STRATEGIES = ("min", "mean", "max")
# Of word and fraction, as in the paper.
_MOST_BITS = 32


class AdaPTState(NamedTuple):
    """The state of ``AdaPT``.

    Attributes:
      formats: the ``Fixed`` format of each tensor, a static pytree with the structure of the parameters.
      window: the sums of the normalised gradients since the last switch of each tensor, arrays for ``accumulate``.
      steps: for each tensor, the steps since its last switch.
      lookback: for each tensor, after how many steps the next one is due.
      resolution: for each tensor, the bins of its histograms.
      strategy: of the push-up, "min", "mean" or "max".
      losses: the latest losses.
      visited: the distinct tuples of formats so far: what a jitted step that takes ``formats`` compiled for.
    """

    formats: PyTree
    window: PyTree
    steps: tuple[int, ...]
    lookback: tuple[int, ...]
    resolution: tuple[int, ...]
    strategy: Literal["min", "mean", "max"]
    losses: np.ndarray
    visited: tuple[tuple[Fixed, ...], ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AdaPT:
    """Adaptive precision training: ``<WL, FL>`` of every tensor from its histogram and the diversity of its gradients.

    Each tensor has a fixed-point format of WL bits, FL of them binary places, and a window of ``lookback`` steps. Where
    it ends the tensor goes to another format:

    - push down: by bisection the smallest FL, then the smallest WL, of those up to the present ones, for which
      ``KL(P || Q) <= tolerance``. P and Q are the histograms of the tensor and of the tensor rounded stochastically, in
      ``resolution`` bins from its smallest to its largest value, the outer ones holding what lies beyond. If the
      present format loses information, it stays.
    - push up: by the diversity of the gradients ``D = sum_k |g_k| / |sum_k g_k|``, with every g_k normalised to
      ``|g_k| = 1``. With ``l = ln(D) - 1``, FL grows by s = 1 if l <= 0 or D is infinite; else by the least, the mean
      (rounded up) or the greatest of ``s1 = max(ceil(1 / l^2), 1)`` and ``s2 = max(min(ceil(32 l^2), 32) - FL, 0)``,
      by the strategy. Then ``FL <- min(FL + s, 32 - buffer_bits)`` and
      ``WL <- min(max(WL + 1, FL + s + 1, FL + buffer_bits), 32)``.
    - lookback: ``ceil(momentum clip(max / D, min, max) + (1 - momentum) lookback)``; where that is its maximum or
      minimum, the resolution grows or shrinks by 1.
    - strategy: if the mean of as many losses as the mean lookback is not above the present loss, min goes to mean and
      mean to max; else it is min.

    This is a controller on the host, made of pure functions. ``init`` gives a state; ``accumulate`` is for the jitted
    step; ``update`` comes after an epoch, or any number of steps, and switches the tensors whose window has ended. Pass
    ``state.formats`` to the jitted step as an ordinary argument: formats are static, so it compiles once for each
    distinct tuple of formats, and ``state.visited`` lists these. ``chop_fixed`` rounds to a word without a recompile.

    Args:
      initial: the format of every tensor at first, a ``Fixed`` that saturates, of at most 32 bits, or its name.
      lookback, resolution: the least and the greatest; each starts at its least.
      min_fraction_length: the bisection of FL begins there.
      buffer_bits: by how much WL is at least above FL.
      momentum: of the lookback.
      tolerance: the divergence that counts as none. 0, as in the paper, wants every weight in its bin: with n weights
        in r bins some ``log2(n r)`` binary places. A sample of n numbers has ``r / (2 n)`` from chance alone.
      strategy: of the first push-up.

    Edge cases: a tensor whose elements are equal has one bin, and gets the smallest format. A gradient of zeros counts
    as a step, not as a gradient; a window of such has infinite diversity.

    Raises:
      ValueError: for arguments out of range; in ``update``, for losses without an axis and parameters not finite.

    >>> import jax, jax.numpy as jnp, qjax
    >>> controller = qjax.optim.AdaPT(lookback=(2, 4), resolution=(8, 16))
    >>> w = {"w": jnp.linspace(-1, 1, 64, dtype=jnp.float32)}
    >>> state = controller.init(w)
    >>> for step in range(2):
    ...     state = state._replace(window=controller.accumulate(state.window, w))
    >>> state = controller.update(state, w, jnp.ones(2), key=jax.random.key(0))
    >>> state.formats, len(state.visited)
    ({'w': Fixed(13, 5)}, 2)

    Source: Kummer, Sidak, Reichmann, Gansterer (2021), Adaptive Precision Training (AdaPT),
    https://arxiv.org/abs/2107.13490, section 3. Deviations, where the authors' code is no model: the divergence is that
    of the whole tensor (theirs is of its first row, and of logarithms of probabilities that are none); the bisection
    returns a format that it found without loss (theirs the one below); lookback and strategy are adapted at the end
    of a window, not at every step; biases have formats of their own (theirs have that of the weight before). Their SGD
    also steps along the normalised gradients, which is the user's choice here.
    """

    initial: Fixed | str = "q4.4"
    lookback: tuple[int, int] = (25, 100)
    resolution: tuple[int, int] = (50, 150)
    min_fraction_length: int = 4
    buffer_bits: int = 8
    momentum: float = 0.33
    tolerance: float = 0.0
    strategy: Literal["min", "mean", "max"] = "min"

    def __post_init__(self):
        word = format(self.initial)
        object.__setattr__(self, "initial", word)
        is_word = isinstance(word, Fixed) and word == Fixed(min(word.bits, _MOST_BITS), word.fraction_bits)
        checks = {
            "initial": (is_word, "a signed Fixed of at most 32 bits that saturates"),
            "lookback": (1 <= self.lookback[0] <= self.lookback[1], "(least, greatest), at least 1"),
            "resolution": (1 <= self.resolution[0] <= self.resolution[1], "(least, greatest), at least 1"),
            "min_fraction_length": (0 <= self.min_fraction_length < _MOST_BITS, "0 to 31"),
            "buffer_bits": (0 <= self.buffer_bits < _MOST_BITS, "0 to 31"),
            "momentum": (0 <= self.momentum <= 1, "0 to 1"),
            "tolerance": (self.tolerance >= 0, "at least 0"),
            "strategy": (self.strategy in _STRATEGIES, f"one of {_STRATEGIES}"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f"AdaPT: {name} must be {expected}, got {getattr(self, name)!r}.")

    def init(self, params: PyTree[Float[Array, "..."]]) -> AdaPTState:
        """Returns the state before the first step. Every leaf of ``params`` gets a format."""
        formats = jax.tree.map(lambda _: self.initial, params)
        leaves = jax.tree.leaves(params)
        return AdaPTState(
            formats,
            jax.tree.map(_empty, params),
            (0,) * len(leaves),
            (self.lookback[0],) * len(leaves),
            (self.resolution[0],) * len(leaves),
            self.strategy,
            np.zeros(0),
            (tuple(_words(formats, params)),),
        )

    def accumulate(self, window: PyTree, grads: PyTree[Float[Array, "..."]]) -> PyTree:
        """Returns the window with one more gradient of each tensor; for the jitted step."""
        return jax.tree.map(_accumulated, grads, window)

    def update(
        self, state: AdaPTState, params: PyTree[Float[Array, "..."]], losses: Float[Array, " steps"], *, key: Array
    ) -> AdaPTState:
        """Returns the state with new formats for the tensors whose window has ended; on the host, between steps.

        Args:
          state: with the window that ``accumulate`` returned.
          params: the parameters, unrounded.
          losses: those of the steps since the last update, which are as many.
          key: of stochastic rounding in the push-down.
        """
        if np.ndim(losses) != 1:
            raise ValueError(
                f"AdaPT.update: losses must have one axis, a loss for each step, got shape {np.shape(losses)}."
            )
        seen = np.concatenate([state.losses, np.asarray(losses, np.float64)])[-self.lookback[1] - 1 :]
        state = state._replace(losses=seen, steps=tuple(n + len(losses) for n in state.steps))
        due = [i for i, (n, span) in enumerate(zip(state.steps, state.lookback, strict=True)) if n >= span]
        if not due:
            return state
        leaves, structure = jax.tree.flatten(params)
        words, window = _words(state.formats, params), structure.flatten_up_to(state.window)
        steps, lookbacks, resolutions = list(state.steps), list(state.lookback), list(state.resolution)
        strategy = _next_strategy(state)
        for i in due:
            down = self._push_down(leaves[i], words[i], resolutions[i], jax.random.fold_in(key, i))
            diversity = _diversity(*window[i])
            words[i] = self._push_up(*down, diversity, strategy)
            lookbacks[i], resolutions[i] = self._next_window(lookbacks[i], resolutions[i], diversity)
            window[i], steps[i] = _empty(leaves[i]), 0
        visited = tuple(dict.fromkeys((*state.visited, tuple(words))))
        formats, window = structure.unflatten(words), structure.unflatten(window)
        return AdaPTState(
            formats, window, tuple(steps), tuple(lookbacks), tuple(resolutions), strategy, state.losses, visited
        )

    def _push_down(self, x, word: Fixed, resolution: int, key) -> tuple[int, int]:
        """Returns the smallest (WL, FL) without loss."""
        exact = np.asarray(x, np.float64)
        if not np.isfinite(exact).all():
            raise ValueError("AdaPT.update: params must be finite, got NaN or infinity; the training has diverged.")
        p = _histogram(exact, exact, resolution)

        def loses(bits: int, fraction: int) -> bool:
            rounded = chop_fixed(jnp.asarray(x, np.float32), bits, fraction, "stochastic", key=key)
            return _divergence(p, _histogram(np.asarray(rounded, np.float64), exact, resolution)) > self.tolerance

        fraction = _bisect(lambda f: loses(word.bits, f), self.min_fraction_length, word.fraction_bits)
        return _bisect(lambda b: loses(b, fraction), max(fraction, 1), word.bits), fraction

    def _push_up(self, bits: int, fraction: int, diversity: float, strategy: str) -> Fixed:
        step, excess = 1, math.log(diversity) - 1
        if 0 < excess < math.inf:
            s1 = max(math.ceil(1 / excess**2), 1)
            s2 = max(min(math.ceil(32 * excess**2), 32) - fraction, 0)
            step = {"min": min(s1, s2), "mean": math.ceil((s1 + s2) / 2), "max": max(s1, s2)}[strategy]
        raised = min(fraction + step, _MOST_BITS)
        fraction = min(raised, _MOST_BITS - self.buffer_bits)
        return Fixed(min(max(bits + 1, raised + 1, fraction + self.buffer_bits), _MOST_BITS), fraction)

    def _next_window(self, lookback: int, resolution: int, diversity: float) -> tuple[int, int]:
        least, most = self.lookback
        wanted = math.ceil(min(max(most / diversity, least), most))
        lookback = math.ceil(self.momentum * wanted + (1 - self.momentum) * lookback)
        change = (lookback == most) - (lookback == least)
        return lookback, min(max(resolution + change, self.resolution[0]), self.resolution[1])


def _empty(x):
    return jnp.zeros_like(x, dtype=np.float32), jnp.zeros((), np.int32)


def _accumulated(gradient, window):
    total, count = window
    gradient = gradient.astype(np.float32)
    norm = optax.tree.norm(gradient)
    return total + gradient / jnp.where(norm > 0, norm, 1), count + (norm > 0).astype(np.int32)


def _words(formats: PyTree, params: PyTree) -> list[Any]:
    """Returns the formats in the order of the leaves of the parameters."""
    return jax.tree.structure(params).flatten_up_to(formats)


def _diversity(total, count) -> float:
    norm = float(np.linalg.norm(np.asarray(total, np.float64)))
    return max(int(count) / norm, 1.0) if norm > 0 else math.inf


def _next_strategy(state: AdaPTState) -> Literal["min", "mean", "max"]:
    span = sum(state.lookback) // len(state.lookback)
    if len(state.losses) <= span:
        return state.strategy
    falls = abs(state.losses[-span - 1 : -1].mean()) > abs(state.losses[-1])
    return "min" if falls else _STRATEGIES[min(_STRATEGIES.index(state.strategy) + 1, 2)]


def _histogram(x, exact, bins: int):
    """Returns the share of the elements in each bin of the range of ``exact``."""
    ends = exact.min(), exact.max()
    return np.histogram(np.clip(x, *ends), bins, ends)[0] / x.size


def _divergence(p, q) -> float:
    """Returns the Kullback-Leibler divergence, infinite where q has an empty bin that p has not."""
    held = p > 0
    return float(np.sum(p[held] * np.log(p[held] / q[held]))) if (q[held] > 0).all() else math.inf


def _bisect(loses, low: int, high: int) -> int:
    """Returns the least number from low to high that loses nothing, high if there is none."""
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if loses(middle) else (low, middle)
    return high
