"""Named recipes, with their sources. The lhs is taken for the activations and the rhs for the weights, as in Flax.

Constants are recipes; what has a parameter in its source is a function that returns one.
"""

import dataclasses
from typing import Literal

from qjax._accumulator import Accumulator
from qjax._chop import RoundingLike
from qjax._hadamard import Hadamard
from qjax._modes import Rounding
from qjax._quantizer import Clipped, Quantizer, TrustMasked
from qjax._recipe import Gemm, Recipe
from qjax.formats import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    E8M0,
    FP16,
    FP32,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    Codebook,
    Fixed,
    Float,
    Format,
    Rms,
    Scaled,
    format,
    midrise,
)


def uniform(
    activations: Format | str,
    gradients: Format | str | None = None,
    weights: Format | str | None = None,
    *,
    gradient_rounding: RoundingLike = Rounding.NEAREST_EVEN,
    accumulator: Accumulator | None = None,
) -> Recipe:
    """Returns the recipe that rounds every operand of the three products, each afresh along its own contraction.

    Args:
      activations: the format of the activations.
      gradients, weights: those of the gradients and weights, by default that of the activations.
      gradient_rounding: how gradients are rounded; the rest to nearest.
      accumulator: of all three products.

    >>> from qjax import recipes
    >>> recipes.uniform("mxfp4", gradient_rounding="stochastic").is_stochastic
    True
    """
    x, w = Quantizer(activations), Quantizer(weights or activations)
    g = Quantizer(gradients or activations, gradient_rounding)
    return Recipe(Gemm(x, w, accumulator), Gemm(g, w, accumulator), Gemm(x, g, accumulator))


def _tensor(element: Format) -> Scaled:
    return Scaled(element, FP32, None)


FP8 = uniform(E4M3, E5M2)
"""E4M3 for weights and activations, E5M2 for gradients, no scales.

Source: Micikevicius et al. (2022), FP8 formats for deep learning, https://arxiv.org/abs/2209.05433, section 3; there
each tensor may have a scale, which is ``FP8_HYBRID``.
"""

FP8_HYBRID = uniform(_tensor(E4M3), _tensor(E5M2))
"""As ``FP8``, with one scale a tensor from its largest magnitude ("current scaling").

Source: as ``FP8``; NVIDIA Transformer Engine, recipe ``Float8CurrentScaling``. Deviation: the scale is float32, amax
divided by the largest value of the format; Transformer Engine takes the reciprocal, and can round it to a power of two.
"""

FP8_DELAYED = dataclasses.replace(FP8_HYBRID, history=1024)
"""As ``FP8_HYBRID``, with scales from the largest magnitudes of the last 1024 steps ("delayed scaling").

Source: Micikevicius et al. (2022), section 4; NVIDIA Transformer Engine, recipe ``DelayedScaling``; the state is handed
on as in ``flax.linen.fp8_ops``, whose scales these are. Deviation: a history of zeros gives the scale 1.
"""

MXFP8 = uniform(MXFP8_E4M3)
"""MXFP8 with E4M3 elements for all operands.

Source: OCP Microscaling Formats 1.0 (2023); Rouhani et al. (2023), https://arxiv.org/abs/2310.10537, section 4. The
scale is that of OCP ("floor"), which may saturate the largest elements; Transformer Engine's never does ("rceil").
"""

MXFP6 = uniform(MXFP6_E2M3, MXFP6_E3M2)
"""MXFP6: E2M3 for weights and activations, E3M2 for gradients. Source: as ``MXFP8``.

Deviation: Rouhani et al. train with E3M2 for all; E2M3, which they prefer for inference, is the finer one.
"""

MXFP4_NEAREST = uniform(MXFP4)
"""MXFP4 for all operands, to nearest. Source: as ``MXFP8``."""

MXFP4_STOCHASTIC = uniform(MXFP4, gradient_rounding="stochastic")
"""MXFP4 for all operands, the gradients rounded stochastically.

Source: Tseng et al. (2025), Training LLMs with MXFP4, https://arxiv.org/abs/2502.20586, section 3. Deviation: OCP's
scale saturates the largest elements, so that the estimate is biased there; ``mxfp4_hadamard`` is unbiased.
"""

# 4/3 of E2M1: with the scale 2^ceil(log2(amax / 8)) nothing saturates.
_THREE_QUARTERS = Scaled(Codebook(tuple(sorted({float(v) * 4 / 3 for v in E2M1.values()}))), E8M0, 32, rule="rceil")


def mxfp4_hadamard(size: int = 64, rounding: RoundingLike = Rounding.STOCHASTIC) -> Recipe:
    """Returns MXFP4 in the backward pass alone: both operands in a random rotation, rounded without saturation.

    Args:
      size: of the Hadamard blocks; it must divide the outputs of a layer and the number of tokens.
      rounding: "stochastic" makes the gradient unbiased.

    >>> from qjax import recipes
    >>> recipes.mxfp4_hadamard(32).dlhs.rotate
    Hadamard(size=32, signs='random')

    Source: Tseng et al. (2025), https://arxiv.org/abs/2502.20586, algorithm 3. Elements are multiplied by 3/4 before
    rounding and the product by 16/9 there; here the elements are 4/3 of E2M1. A block maximum that is a power of two
    gets half their scale.
    """
    q = Quantizer(_THREE_QUARTERS, rounding)
    gradient = Gemm(q, q, rotate=Hadamard(size, "random"))
    return Recipe(Gemm(), gradient, gradient)


# The fixed random signs of the rotation in NVIDIA's recipe.
_NVFP4_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_nvfp4 = Quantizer(Scaled(Scaled(E2M1, E4M3, 16), FP32, None))
_nvfp4_gradient = Quantizer(_nvfp4.fmt, "stochastic")
_nvfp4_weight = Quantizer(Scaled(Scaled(E2M1, E4M3, (16, 16)), FP32, None))

NVFP4_TRAINING = Recipe(
    Gemm(_nvfp4, _nvfp4_weight),
    Gemm(_nvfp4_gradient, _nvfp4_weight),
    Gemm(_nvfp4, _nvfp4_gradient, rotate=Hadamard(16, _NVFP4_SIGNS)),
)
"""NVFP4: two-level scales, weights in 16 x 16 blocks, stochastic gradients, rotated operands of the weight gradient.

The number of tokens must be a multiple of 16. Source: NVIDIA (2025), Pretraining large language models with NVFP4,
https://arxiv.org/abs/2509.25149, section 4; the signs are those of Transformer Engine. Deviation: which layers stay in
high precision (the last ones) is for the rule of ``quantize`` to say.
"""

_E4M3_TILE = Quantizer(Scaled(E4M3, FP32, (1, 128)))
_E4M3_SQUARE = Quantizer(Scaled(E4M3, FP32, (128, 128)))


def deepseek_v3(accumulator: Accumulator | None = None) -> Recipe:
    """Returns E4M3 for all operands, with scales for tiles of 1 x 128 and for blocks of 128 x 128 of the weights.

    Args:
      accumulator: by default the partial sums of 128 products are float32 and are promoted with their scales.
        ``Accumulator(Float(8, 13), "toward_zero", chunk=32, promote=128)`` is the register of Hopper's tensor cores as
        the paper found it.

    >>> from qjax import recipes
    >>> recipes.deepseek_v3().forward.rhs.fmt.block
    (128, 128)

    Source: DeepSeek-V3 (2024), https://arxiv.org/abs/2412.19437, section 3.3.
    """
    accumulator = accumulator or Accumulator(FP32, chunk=128, promote=128)
    x, w = _E4M3_TILE, _E4M3_SQUARE
    return Recipe(Gemm(x, w, accumulator), Gemm(x, w, accumulator), Gemm(x, x, accumulator))


_INT8 = Quantizer(Scaled(Fixed(8, symmetric=True), FP32, "axis"))

INT8 = Recipe(Gemm(_INT8, _INT8), save_lhs="quantized", save_rhs="quantized")
"""W8A8: activations a token and weights an output channel in int8, summed in int32; straight-through gradients.

Source: Jacob et al. (2018), https://arxiv.org/abs/1712.05877; Krishnamoorthi (2018), https://arxiv.org/abs/1806.08342.
Deviation: the activations are symmetric, their scales computed anew.
"""

INT4_WEIGHTS = Recipe(Gemm(None, Quantizer(Scaled(Fixed(4, symmetric=True), FP32, 128))), save_rhs="quantized")
"""Weights in int4 with a scale for 128 inputs; activations as they are; straight-through gradients.

Source: Frantar et al. (2023), GPTQ, https://arxiv.org/abs/2210.17323, section 4 (the groups). Deviation: symmetric.
"""

BF16_OPERANDS = uniform(BF16)
"""All operands in bfloat16, summed in float32. Source: Kalamkar et al. (2019), https://arxiv.org/abs/1905.12322."""


def accumulated(fmt: Format | str, chunk: int = 1, operands: Format | str | None = None) -> Recipe:
    """Returns a recipe whose products are summed in a format, for studies of the accumulator.

    Args:
      fmt: the format of the register.
      chunk: how many products are summed before the register rounds.
      operands: the format of all operands, by default that of the register.

    >>> from qjax import recipes
    >>> recipes.accumulated("fp16", chunk=64).forward.accumulator.chunk
    64

    Source: Wang et al. (2018), https://arxiv.org/abs/1812.08011, section 2 (chunks of 64).
    """
    return uniform(operands or fmt, accumulator=Accumulator(fmt, chunk=chunk))


BF16_ACCUMULATE = accumulated(BF16, 64)
"""All operands and the accumulator in bfloat16, 64 products at a time. Source: that of ``accumulated``."""

FP16_ACCUMULATE = accumulated(FP16, 64)
"""All operands and the accumulator in fp16, 64 products at a time. Source: that of ``accumulated``."""


def dfp16(chain: int | None = 64, *, shift: bool = False, detect: bool = False) -> Recipe:
    """Returns dynamic fixed point: int16 operands with one exponent a tensor, pairs of products summed in int32.

    Chains of 2 cannot overflow, nor can chains of 4 with the shift; longer ones rely on the operands. In study 03 a
    small network trains with the shift and chains of 32; with either alone, some of its runs fail.

    Args:
      chain: after how many products the register is flushed to float32; None: never.
      shift: whether the lhs gives up one bit, so that twice as many products fit.
      detect: whether a register that overflows gives NaN; else it wraps.

    >>> from qjax import recipes
    >>> recipes.dfp16(chain=32).forward.accumulator.promote
    32

    Source: Das et al. (2018), Mixed precision training of convolutional neural networks using integer operations,
    https://arxiv.org/abs/1802.00930, sections 3 and 4; integers are sign and magnitude there, so that the smallest of
    two's complement is left out. Deviations: the shifted operand is rounded to 15 bits once, not
    to 16 and then shifted; the length of the chain is not published.
    """
    register = Accumulator(Fixed(32, overflow="wrap"), chunk=2, promote=chain, detect=detect)
    word, short = (Quantizer(Scaled(Fixed(bits, symmetric=True), E8M0, None)) for bits in (16, 15))
    lhs = short if shift else word
    gemm = Gemm(lhs, word, register)
    return Recipe(gemm, gemm, gemm)


def halo(level: Literal[0, 1, 2], element: Format | str = "int8", size: int = 128) -> Recipe:
    """Returns HALO's products of a level: all operands with one scale a tensor, outliers spread by rotations.

    Args:
      level: 0: no rotation. 1: the forward operands along the contraction. 2: also the gradient of the output along the
        tokens, for the gradient of the input.
      element: "int8" or "e4m3" in the paper.
      size: of the Hadamard blocks; it must divide the inputs (and at level 2 the tokens).

    >>> from qjax import recipes
    >>> recipes.halo(2).dlhs.rotate_lhs
    Hadamard(size=128, signs=None)

    Source: Ashkboos et al. (2025), HALO, https://arxiv.org/abs/2501.02625, section 4, in the variant that reuses the
    rotated forward operands in the backward pass. Deviation: block rotations; the paper's span the whole axis.
    """
    if level not in (0, 1, 2):
        raise ValueError(f"halo: level must be 0, 1 or 2, got {level!r}.")
    inner = format(element)
    if isinstance(inner, Fixed):
        inner = Fixed(inner.bits, inner.fraction_bits, symmetric=True)
    q = Quantizer(_tensor(inner))
    rotation = Hadamard(size) if level else None
    return Recipe(
        Gemm(q, q, rotate=rotation),
        Gemm(q, None, rotate_lhs=rotation if level == 2 else None),
        Gemm(None, q),
        save_lhs="quantized",
        save_rhs="quantized",
    )


# The clipping points of least squared error for a normal distribution, as the authors' code has them.
_QUEST_CLIPS = {
    1: 0.7978845587,
    2: 1.4935346200,
    3: 2.0510683541,
    4: 2.5139305786,
    5: 2.9160938835,
    6: 3.2765972826,
    7: 3.6010497188,
    8: 3.8849386788,
}
_QUEST_FP4_CLIP = 2.92247856


def quest(bits: Literal[1, 2, 3, 4, 5, 6, 7, 8], size: int = 128) -> Recipe:
    """Returns QuEST: both operands rotated, rounded to a grid that is best for normal numbers, with a trust mask.

    Args:
      bits: of weights and activations.
      size: of the Hadamard blocks; it must divide the inputs of a layer.

    The backward products have the rounded forward operands and are not rounded; gradients pass where rounding moved an
    element by at most half a step, in the rotated frame.

    >>> from qjax import recipes
    >>> recipes.quest(4).forward.lhs.fmt.rule.clip
    2.5139305786

    Source: Panferov et al. (2025), QuEST, https://arxiv.org/abs/2502.05003, section 3. With one bit the mask is at 1.3
    scales, as in the authors' code. Deviation: the backward products are in float32, not in bfloat16.
    """
    if bits not in _QUEST_CLIPS:
        raise ValueError(f"quest: bits must be 1 to 8, got {bits!r}.")
    fmt = Scaled(midrise(bits), FP32, "axis", rule=Rms(_QUEST_CLIPS[bits]))
    q = Quantizer(fmt, estimator=TrustMasked(0.5) if bits > 1 else Clipped(margin=0.15))
    return Recipe(Gemm(q, q, rotate=Hadamard(size)), save_lhs="quantized", save_rhs="quantized")


def quartet(rounding: RoundingLike = Rounding.NEAREST_EVEN, size: int = 32) -> Recipe:
    """Returns Quartet: all three products in MXFP4, the forward operands as in QuEST.

    Args:
      rounding: of the backward operands: to nearest in the last version of the paper, "stochastic" in the first two.
      size: of the Hadamard blocks; it must divide inputs, outputs and tokens.

    >>> from qjax import recipes
    >>> recipes.quartet().is_stochastic  # the signs of the rotation
    True

    Source: Castro et al. (2025), Quartet, https://arxiv.org/abs/2505.14669, algorithm 1. The exponent of the scale is
    the nearest, which has the error that the paper's table 2 prints; the authors' code takes the one below. The
    backward elements are those of ``mxfp4_hadamard``.
    """
    fmt = Scaled(E2M1, E8M0, 32, rule=Rms(_QUEST_FP4_CLIP, "nearest"))
    q, backward = Quantizer(fmt, estimator=Clipped()), Quantizer(_THREE_QUARTERS, rounding)
    gradient = Gemm(backward, backward, rotate=Hadamard(size, "random"))
    return Recipe(Gemm(q, q, rotate=Hadamard(size)), gradient, gradient, save_lhs="quantized", save_rhs="quantized")


HOPPER = Accumulator(Float(8, 13), "toward_zero", chunk=32)
"""The accumulator of Hopper's FP8 tensor cores as DeepSeek-V3 found it: some 14 bits, truncated.

Source: DeepSeek-V3 (2024), https://arxiv.org/abs/2412.19437, section 3.3.2.
"""
