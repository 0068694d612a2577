"""What a law says about formats: how to split bits, how many to take, what data and parameters are worth in them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qjax.laws._law import Model
from qjax.laws._search import argmin, root


class Split(NamedTuple):
    """How to split bits: the best integers, and the optimum over the reals."""

    exponent_bits: int
    mantissa_bits: int
    exponent: float
    mantissa: float


def _float_law(caller: str, model: Model) -> dict[str, float]:
    p = model.parameters
    if missing := [name for name in ("gamma", "delta", "nu") if name not in p]:
        raise ValueError(
            f"{caller}: {model.law.name} has no {missing[0]}; this is a question for FLOAT_QUANTIZATION, or a fit of it"
        )
    return p


def optimal_split(model: Model, bits: int) -> Split:
    """Returns the exponent and mantissa bits, with a sign bit ``bits`` together, of the least quantization error.

    Over the reals ``E = delta bits / (delta + nu) - 1/2`` and ``M = nu bits / (delta + nu) - 1/2``. The best integers
    maximise ``(E + 1/2)^delta (M + 1/2)^nu`` with at least one exponent bit. Neither depends on N, D or B.

    Raises:
      ValueError: the law has no exponent and mantissa, or there are fewer than 2 bits.

    >>> from qjax import laws
    >>> [laws.optimal_split(laws.FLOAT_QUANTIZATION.published, bits)[:2] for bits in (4, 6, 8)]
    [(2, 1), (3, 2), (4, 3)]

    Source: Sun et al. (2025), https://arxiv.org/abs/2501.02423, section 4.1.
    """
    p = _float_law("optimal_split", model)
    if bits < 2:
        raise ValueError(f"optimal_split: bits must be at least 2, a sign and an exponent, got {bits}")
    delta, nu = p["delta"], p["nu"]
    best = max(range(1, bits), key=lambda e: delta * math.log(e + 0.5) + nu * math.log(bits - 0.5 - e))
    return Split(best, bits - 1 - best, delta * bits / (delta + nu) - 0.5, nu * bits / (delta + nu) - 0.5)


def critical_data_size(model: Model, *, N, E, M, B) -> Float[np.ndarray, "..."]:
    """Returns the tokens beyond which more data makes a model of N parameters worse in this format.

    ``D = (d gamma N^alpha (E + 1/2)^delta (M + 1/2)^nu / log2(B))^(1 / (2 beta))``, where ``dL / dD = 0``.

    Raises:
      ValueError: the law has no exponent and mantissa.

    >>> from qjax import laws
    >>> f"{laws.critical_data_size(laws.FLOAT_QUANTIZATION.published, N=1e9, E=4, M=3, B=128):.3g}"
    '2.73e+13'

    Source: Sun et al. (2025), https://arxiv.org/abs/2501.02423, section 4.2.
    """
    p = _float_law("critical_data_size", model)
    N, E, M, B = (np.asarray(x, np.float64) for x in (N, E, M, B))
    bits = p["gamma"] * (E + 0.5) ** p["delta"] * (M + 0.5) ** p["nu"]
    return (p["d"] * bits * N ** p["alpha"] / np.log2(B)) ** (1 / (2 * p["beta"]))


def optimal_precision(
    model: Model, *, B: float, D: float | None = None, N: float | None = None, flops: float | None = None
) -> float:
    """Returns the bits, sign included and over the reals, of the least loss where ``flops = 6/16 bits N D``.

    Every bit is split as ``optimal_split`` does. Say one of:

    - D: the tokens are given, and fewer bits buy more parameters. The budget does not matter.
    - N and flops: the parameters are given, and fewer bits buy more tokens.
    - flops: nothing else is given.

    Raises:
      ValueError: the law has no exponent and mantissa, or something else is given.

    >>> from qjax import laws
    >>> round(laws.optimal_precision(laws.FLOAT_QUANTIZATION.published, D=1e12, B=128), 3)
    5.179

    Source: Sun et al. (2025), https://arxiv.org/abs/2501.02423, section 4.3; the joint optimum is searched over D.
    """
    p = _float_law("optimal_precision", model)
    alpha, beta, bits = p["alpha"], p["beta"], p["delta"] + p["nu"]
    rho = p["gamma"] * p["delta"] ** p["delta"] * p["nu"] ** p["nu"] / bits**bits

    def of_tokens(D):
        return ((bits - alpha) / (p["n"] * alpha * rho) * D**beta * math.log2(B)) ** (1 / bits)

    match D, N, flops:
        case float() | int(), None, None:
            return float(of_tokens(D))
        case None, float() | int(), float() | int():
            g = (beta + bits) / (p["d"] * beta * rho)
            power = g * (flops * 16 / 6) ** (2 * beta) * N ** -(alpha + 2 * beta) * math.log2(B)
            return float(power ** (1 / (bits + 2 * beta)))
        case None, None, float() | int():

            def loss(log_D):
                D = np.exp(log_D)
                P = of_tokens(D)
                return model(
                    N=flops / (6 / 16 * P * D), D=D, E=p["delta"] * P / bits - 0.5, M=p["nu"] * P / bits - 0.5, B=B
                )

            return float(of_tokens(math.exp(argmin(loss, math.log(1e6), math.log(flops)))))
    raise ValueError(f"optimal_precision: expected D, or N and flops, or flops; got D={D}, N={N}, flops={flops}")


def effective_parameters(
    model: Model, data: Mapping[str, Any] | None = None, /, *, reference: Mapping[str, Any] | None = None, **columns: Any
) -> Float[np.ndarray, "..."]:
    """Returns how many parameters at full precision have the loss that N parameters have in a format.

    The root of ``L(N_eff, D, reference) = L(N, D, format)``, sought from N / 10^6 to 10^3 N; NaN if there is none.

    Args:
      model: a law with values.
      data, columns: the columns of the law, arrays or scalars.
      reference: the columns that say full precision, if the law itself has none: ``{"format": "bf16"}``.

    Raises:
      ValueError: the law has no reference, and none is given; a column is missing.

    >>> from qjax import laws
    >>> eff = laws.effective_parameters(laws.QUARTET.published, {"N": 1e8, "D": 1e10, "forward": "quest"},
    ...     backward="bf16", reference={"forward": "bf16"})
    >>> round(float(eff) / 1e8, 4)
    0.6478

    Source: Kumar et al. (2024), https://arxiv.org/abs/2411.04330, section 4, as a definition for every law.
    """
    given = {**(data or {}), **columns}
    full = dict(reference if reference is not None else model.law.reference)
    if not full:
        raise ValueError(
            f"effective_parameters: {model.law.name} has no column values of full precision; say reference={{...}}"
        )
    loss = model(given)
    middle = np.log(np.broadcast_to(np.asarray(given["N"], np.float64), loss.shape))

    def excess(log_N):
        return model({**given, **full, "N": np.exp(log_N)}) - loss

    return np.exp(root(excess, middle - math.log(1e6), middle + math.log(1e3)))[()]
