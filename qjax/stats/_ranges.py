"""``calibrate``: a static scale of a tensor from batches of it."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qjax._chop import chop
from qjax.formats import Format, Scaled, format

Method = Literal["max", "percentile", "moving_average", "mse", "output_mse", "kl"]
BINS = 2048


def calibrate(
    batches: Sequence[Array | np.ndarray],
    fmt: Format | str,
    method: Method = "max",
    *,
    percentile: float = 99.99,
    decay: float = 0.9,
    steps: int = 64,
    weights: Array | np.ndarray | None = None,
) -> Array:
    """Returns a scale for ``chop(x, fmt, scale=...)`` of tensors like those of the batches, a float32 scalar.

    The scale is ``T / M``, M the largest element of the format and T the largest magnitude that is not clipped:

    - "max": the largest magnitude of all batches;
    - "percentile": that percentile of all magnitudes (linear between ranks);
    - "moving_average": ``a <- decay a + (1 - decay) max|x|`` over the batches in their order, from the first maximum;
    - "mse": of the maximum times 1/steps, 2/steps ... 1 that of the least ``sum (q - x)^2``;
    - "output_mse": likewise, of ``sum ((q - x) weights)^2``: x of shape (..., n), weights (n, m);
    - "kl": of the multiples of 16 of the 2048 bins of a histogram of magnitudes, that of the least divergence of the
      clipped histogram from the one in which all bins of one rounded value share their weight.

    Args:
      batches: at least one array, all finite.
      fmt: a ``Scaled`` format with one scale a tensor, such as "int8_tensor", without zero point.

    Raises:
      ValueError: for another format or method, no or empty batches, what is not finite, weights that are missing or
        unused, a percentile outside 0 to 100, a decay outside 0 to 1, or fewer steps than 1.

    >>> import jax.numpy as jnp, qjax
    >>> from qjax import stats
    >>> x = jnp.array([0.1, -0.2, 0.3, 12.7], jnp.float32)
    >>> stats.calibrate([x], "int8_tensor")
    Array(0.1, dtype=float32)

    Sources: Wu et al. (2020), Integer quantization for deep learning inference, https://arxiv.org/abs/2004.09602,
    section 5 (maximum, percentile, entropy); Nagel et al. (2021), A white paper on neural network quantization,
    https://arxiv.org/abs/2106.08295, section 3.1 (mean squared error).
    """
    fmt = format(fmt)
    if not isinstance(fmt, Scaled) or fmt.block is not None or fmt.zero_point is not None:
        raise ValueError(
            f"calibrate: fmt must have one scale a tensor and no zero point, like 'int8_tensor', got {fmt!r}."
        )
    methods = ("max", "percentile", "moving_average", "mse", "output_mse", "kl")
    if method not in methods:
        raise ValueError(f"calibrate: method must be one of {', '.join(methods)}, got {method!r}.")
    if (weights is None) == (method == "output_mse"):
        raise ValueError("calibrate: weights are for method='output_mse', which needs them.")
    if not (0 < percentile <= 100 and 0 <= decay <= 1 and steps >= 1):
        raise ValueError(
            f"calibrate: expected a percentile to 100, a decay to 1 and steps >= 1, got {percentile}, {decay}, {steps}."
        )
    arrays = [np.asarray(x, np.float64) for x in batches]
    if not arrays or not all(x.size and np.isfinite(x).all() for x in arrays):
        raise ValueError("calibrate: batches must be arrays with elements, all of them finite, and at least one.")
    sizes = np.concatenate([np.abs(x).ravel() for x in arrays])
    largest = sizes.max()
    if method == "percentile":
        clip = np.percentile(sizes, percentile)
    elif method == "moving_average":
        clip = np.abs(arrays[0]).max()
        for x in arrays[1:]:
            clip = decay * clip + (1 - decay) * np.abs(x).max()
    elif method == "max" or largest == 0:
        clip = largest
    elif method == "kl":
        clip = _by_entropy(sizes, largest, fmt)
    else:
        given = None if weights is None else np.asarray(weights, np.float64)

        def loss(clip: float) -> float:
            errors = [_rounded(x, clip, fmt) - x for x in arrays]
            return sum(float(np.sum(np.square(e if given is None else e @ given))) for e in errors)

        clip = _least(loss, [largest * i / steps for i in range(1, steps + 1)])
    return jnp.float32(clip / fmt.element.max)


def _rounded(x: np.ndarray, clip: float, fmt: Scaled) -> np.ndarray:
    return np.asarray(chop(x.astype(np.float32), fmt, scale=np.asarray(clip / fmt.element.max, np.float32)), np.float64)


def _least(loss: Callable[[float], float], candidates: Sequence[float]) -> float:
    """Returns the largest candidate of the least loss."""
    losses = np.array([loss(c) for c in candidates])
    return candidates[int(np.flatnonzero(losses == losses.min())[-1])]


def _by_entropy(sizes: np.ndarray, largest: float, fmt: Scaled) -> float:
    counts, edges = np.histogram(sizes, BINS, (0, largest))
    middles = (edges[:-1] + edges[1:]) / 2

    def loss(clip: float) -> float:
        kept = round(clip / largest * BINS)
        p = counts[:kept].astype(np.float64)
        p[-1] += counts[kept:].sum()
        _, level = np.unique(_rounded(middles, clip, fmt)[:kept], return_inverse=True)  # of one shape: one program
        there = counts[:kept] > 0  # a bin without elements of its own gets no weight
        weight, members = np.bincount(level, counts[:kept]), np.bincount(level, there)
        q = np.where(there, weight[level] / np.maximum(members[level], 1), 0)
        if q[-1] == 0 < p[-1]:
            return np.inf
        p, q = p / p.sum(), q / max(q.sum(), 1)
        some = p > 0
        return float(np.sum(p[some] * np.log(p[some] / q[some])))

    return _least(loss, [largest * i / BINS for i in range(128, BINS + 1, 16)])
