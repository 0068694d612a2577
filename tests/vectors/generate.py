"""Makes mx.json and nvfp4.json beside it. Never run by the tests.

python -m venv env && env/bin/pip install torch==2.13.0 torchao==0.18.0 ml_dtypes && env/bin/python generate.py

The vectors of torchao are the output of its own functions on the CPU. Those of TransformerEngine, which has no CPU
build, are computed here from the rules that its sources state, in float32: ``common/util/ptx.cuh`` (float_to_e8m0) for
MXFP8, and the class NVFP4QuantizerRef of ``pytorch/custom_recipes/quantization_ref_nvfp4.py`` for NVFP4.
"""

import json
import pathlib

import ml_dtypes
import numpy as np
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

HERE = pathlib.Path(__file__).parent
F32 = np.float32
ELEMENTS = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e2m3": DTYPE_FP6_E2M3,
    "e3m2": DTYPE_FP6_E3M2,
    "e2m1": torch.float4_e2m1fn_x2,
}
FP8 = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def hexed(codes) -> str:
    return np.asarray(codes, np.uint8).tobytes().hex()


def halves(packed: torch.Tensor) -> np.ndarray:
    """Returns the 4-bit codes of bytes, the low half first."""
    packed = packed.view(torch.uint8).numpy()
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def mx_rows() -> np.ndarray:
    """Returns blocks of 32: normal numbers at many scales; maxima at and next to every boundary of a rule; ties."""
    rng = np.random.default_rng(20251)
    rows = [rng.normal(size=32) * 2.0**k for k in (-118, -60, -9, 0, 5, 60, 110)]
    for top in (1.0, 1.5, 1.75, 1.875, 1.9375, 1.25):
        for side in (0, None, 9):
            largest = F32(top) if side is None else np.nextafter(F32(top), F32(side))
            row = rng.uniform(-0.99, 0.99, 32) * float(largest)
            row[rng.integers(32)] = float(largest) * rng.choice([-1, 1])
            rows.append(row)
    rows.append(np.where(np.arange(32) % 2, 0.0, -0.0))
    rows += [np.arange(-31, 32, 2) / 4, np.arange(-31, 32, 2) / 16, np.arange(1, 64, 2) / 32]
    return np.stack(rows).astype(F32)


def te_mxfp8(x: np.ndarray, element: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scales, codes): the exponent field of amax * (1 / max), and one more if the fraction is not zero."""
    dtype, largest = FP8[element]
    bits = (np.abs(x).max(axis=1) * (F32(1) / F32(largest))).view(np.uint32)
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    up = (fraction > 0) & (exponent != 0xFE) & ~((exponent == 0) & (fraction <= 0x400000))
    scales = (exponent + up).astype(np.uint8)
    inverse = np.ldexp(F32(1), 127 - scales.astype(int))[:, None]
    return scales, np.clip(x * inverse, -largest, largest).astype(dtype).view(np.uint8)


def mx() -> dict:
    x = mx_rows()
    cases = []
    for element, dtype in ELEMENTS.items():
        for mode in ("FLOOR", "CEIL", "EVEN", "RCEIL"):
            scales, codes = to_mx(torch.from_numpy(x), dtype, 32, ScaleCalculationMode[mode])
            codes = halves(codes) if element == "e2m1" else codes.view(torch.uint8).numpy()
            case = {"stack": "torchao", "element": element, "rule": mode.lower()}
            cases.append(case | {"scales": hexed(scales.view(torch.uint8).numpy()), "codes": hexed(codes)})
    for element in FP8:
        scales, codes = te_mxfp8(x, element)
        case = {"stack": "TransformerEngine", "element": element, "rule": "rceil"}
        cases.append(case | {"scales": hexed(scales), "codes": hexed(codes)})
    return {
        "provenance": "x: float32, little-endian, from generate.py. torchao: to_mx of torchao 0.18.0 on torch 2.13.0, "
        "CPU, eager. TransformerEngine: computed in NumPy from the rule of float_to_e8m0 in common/util/ptx.cuh "
        "(e8m0 of amax * (1 / max), rounded up on the bits), x * 2^-e, saturated, to nearest even.",
        "shape": x.shape,
        "x": x.astype("<f4").tobytes().hex(),
        "cases": cases,
    }


def e2m1(x: np.ndarray) -> np.ndarray:
    """Returns the codes of numbers up to 6, ties to even, -0 and what rounds to it included."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (values[1:] + values[:-1]) / 2
    size = np.abs(x).astype(np.float64)
    below, above = np.searchsorted(middles, size, "left"), np.searchsorted(middles, size, "right")
    code = np.where(below % 2 == 0, below, above)
    return (code + 8 * np.signbit(x)).astype(np.uint8)


def te_nvfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scales, codes) as NVFP4QuantizerRef has them, for tiles of 1 x 16 without any option."""
    blocks = x.reshape(len(x), -1, 16)
    encode = F32(448 * 6) / np.abs(x).max()
    decode = F32(1) / encode
    scale = np.abs(blocks).max(axis=2) * (encode * (F32(1) / F32(6)))
    scale = np.clip(scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    with np.errstate(divide="ignore"):
        factor = np.minimum(F32(1) / (scale.astype(F32) * decode), np.finfo(F32).max)
    return scale.view(np.uint8), e2m1(np.clip(blocks * factor[..., None], -6, 6)).reshape(x.shape)


def nvfp4() -> dict:
    cases = []
    sizes = ((1.0, True), (1e-3, True), (2.0**40, True), (1.0, False), (3e-5, False), (7.3e8, False))
    for seed, (size, power) in enumerate(sizes):
        x = (np.random.default_rng(seed).normal(size=(6, 64)) * size).astype(F32)
        # A block of zeros, small blocks, and one whose scale is below the normal numbers of E4M3.
        x[1] *= F32(2.0**-6)
        x[2, :16] = 0
        x[3, 16:32] *= F32(2.0**-15)
        if power:
            x[0, 5] = 2688 * 2.0 ** np.ceil(np.log2(np.abs(x).max() / 2688))
        tensor = per_tensor_amax_to_scale(torch.tensor(np.abs(x).max()))
        scales, codes = nvfp4_quantize(torch.from_numpy(x), 16, tensor)
        te_scales, te_codes = te_nvfp4(x)
        cases.append(
            {
                "shape": x.shape,
                "x": x.astype("<f4").tobytes().hex(),
                "tensor_scale": np.asarray(tensor.numpy(), "<f4").tobytes().hex(),
                "torchao": {"scales": hexed(scales.view(torch.uint8).numpy()), "codes": hexed(halves(codes))},
                "TransformerEngine": {"scales": hexed(te_scales), "codes": hexed(te_codes)},
            }
        )
    return {
        "provenance": "x: float32, little-endian, from generate.py. torchao: nvfp4_quantize with the tensor scale of "
        "per_tensor_amax_to_scale, torchao 0.18.0 on torch 2.13.0, CPU, eager. TransformerEngine: computed in NumPy "
        "from the rules of NVFP4QuantizerRef in pytorch/custom_recipes/quantization_ref_nvfp4.py, tiles of 1 x 16.",
        "cases": cases,
    }


if __name__ == "__main__":
    for name, vectors in (("mx", mx()), ("nvfp4", nvfp4())):
        (HERE / f"{name}.json").write_text(json.dumps(vectors, indent=1) + "\n")
