"""How to spend a budget, and the curves of equal loss and of equal cost."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qjax.laws._law import Model
from qjax.laws._search import argmin, root


class Allocation(NamedTuple):
    """Parameters and tokens, and the loss they are predicted to have."""

    N: float
    D: float
    loss: float


def _tokens(N, flops: float, bits: float, inference_tokens: float):
    return (flops * 16 / bits / N - 2 * inference_tokens) / 6


def optimal_allocation(
    model: Model,
    flops: float,
    *,
    bits: float = 16,
    memory: float = math.inf,
    inference_tokens: float = 0,
    **setting: Any,
) -> Allocation:
    """Returns the N and D of the least loss that a budget allows.

    The budget is ``bits / 16 (6 N D + 2 N inference_tokens) <= flops`` and ``N bits / 8 <= memory``.

    Args:
      model: a law with values.
      flops: of training and inference, in units of 16-bit operations: one of ``bits`` bits costs bits / 16.
      bits: of the arithmetic and of the stored weights.
      memory: bytes for the weights.
      inference_tokens: how many the model is to read and write in its life.
      setting: the law's other columns, the format.

    Raises:
      ValueError: flops, bits or memory is not positive, inference_tokens is negative, or the law has no N and D.

    >>> from qjax import laws
    >>> best = laws.optimal_allocation(laws.CHINCHILLA.published, 1e21)
    >>> f"{best.N:.2e} {best.D:.2e} {best.loss:.3f}"
    '2.22e+09 7.52e+10 2.295'

    Source: Hoffmann et al. (2022), https://arxiv.org/abs/2203.15556, equation 4, for FLOPs; Sardana et al. (2024),
    https://arxiv.org/abs/2401.00448, section 2, for inference; cost proportional to bits as in Kumar et al. (2024).
    """
    if not (flops > 0 and bits > 0 and memory > 0 and inference_tokens >= 0):
        raise ValueError(
            f"optimal_allocation: expected positive flops, bits and memory and no negative inference_tokens, got "
            f"flops={flops}, bits={bits}, memory={memory}, inference_tokens={inference_tokens}"
        )
    _needs_N_and_D("optimal_allocation", model)
    # One token to train on is the least.
    largest = flops * 16 / bits / (6 + 2 * inference_tokens)
    low, high = 0.0, math.log(min(largest, memory * 8 / bits))

    def loss(log_N):
        N = np.exp(log_N)
        return model({**setting, "N": N, "D": _tokens(N, flops, bits, inference_tokens)})

    N = math.exp(argmin(loss, low, high))
    D = _tokens(N, flops, bits, inference_tokens)
    return Allocation(N, D, float(model({**setting, "N": N, "D": D})))


def iso_loss(model: Model, loss: float, N, **setting: Any) -> Float[np.ndarray, "..."]:
    """Returns the tokens with which models of N parameters reach a loss, the fewer if there are two such numbers.

    NaN where no number of tokens up to 10^18 does: the model is too small, or its format too coarse. In
    ``FLOAT_QUANTIZATION`` the loss rises again beyond the critical data size, and the first crossing is returned.

    Raises:
      ValueError: loss is not positive, or the law has no N and D.

    >>> from qjax import laws
    >>> D = laws.iso_loss(laws.CHINCHILLA.published, 2.5, [1e7, 1e9])
    >>> [f"{d:.2e}" for d in D]
    ['nan', '2.53e+10']
    """
    if not loss > 0:
        raise ValueError(f"iso_loss: loss must be positive, got {loss}")
    _needs_N_and_D("iso_loss", model)
    N = np.asarray(N, np.float64)
    grid = np.linspace(0.0, math.log(1e18), 400).reshape((-1,) + (1,) * N.ndim)
    values = model({**setting, "N": N, "D": np.exp(grid)})
    # The bracket ends at the first point of the grid that is low enough, or at the lowest.
    low_enough = values <= loss
    i = np.where(low_enough.any(0), low_enough.argmax(0), values.argmin(0))
    high = grid.ravel()[i]
    return np.exp(root(lambda log_D: model({**setting, "N": N, "D": np.exp(log_D)}) - loss, 0 * high, high))


def iso_compute(model: Model, flops: float, N, *, bits: float = 16, **setting: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that are left for models of N parameters in a compute budget, and their losses.

    ``D = 16 flops / (6 bits N)``, as in ``optimal_allocation``.

    Raises:
      ValueError: flops or bits is not positive, or the law has no N and D.

    >>> from qjax import laws
    >>> D, loss = laws.iso_compute(laws.CHINCHILLA.published, 6e20, [1e9, 1e10])
    >>> [f"{x:.3g}" for x in (*D, *loss)]
    ['1e+11', '1e+10', '2.36', '2.44']
    """
    if not (flops > 0 and bits > 0):
        raise ValueError(f"iso_compute: expected positive flops and bits, got flops={flops}, bits={bits}")
    _needs_N_and_D("iso_compute", model)
    N = np.asarray(N, np.float64)
    D = _tokens(N, flops, bits, 0)
    return D, model({**setting, "N": N, "D": D})


def _needs_N_and_D(caller: str, model: Model):
    if not {"N", "D"} <= {c.name for c in model.law.columns}:
        raise ValueError(f"{caller}: {model.law.name} has no columns N and D; ask a law that has")
