"""qjax: any number format, anywhere in a JAX program, bit for bit."""

from qjax import checkpoints as checkpoints, formats as formats, kernels as kernels, recipes as recipes
from qjax._accumulator import Accumulator
from qjax._chop import chop
from qjax._coverage import Coverage
from qjax._dot import conv_general_dilated, dot_general
from qjax._emulate import emulate
from qjax._encode import QTensor, decode, encode
from qjax._faults import Faults
from qjax._hadamard import Hadamard
from qjax._modes import Rounding
from qjax._operations import Operations, operations
from qjax._params import contracted, quantize_params
from qjax._program import coverage, einsum, quantize, quantize_state
from qjax._quantizer import Clipped, Quantizer, StraightThrough, TrustMasked
from qjax._recipe import Gemm, Recipe
from qjax._significance import Significant, significant_digits
from qjax._sites import Site
from qjax.formats import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "Clipped",
    "Coverage",
    "Faults",
    "Gemm",
    "Hadamard",
    "Operations",
    "QTensor",
    "Quantizer",
    "Recipe",
    "Rounding",
    "Significant",
    "Site",
    "StraightThrough",
    "TrustMasked",
    "checkpoints",
    "chop",
    "contracted",
    "conv_general_dilated",
    "coverage",
    "decode",
    "dot_general",
    "einsum",
    "emulate",
    "encode",
    "formats",
    "kernels",
    "operations",
    "quantize",
    "quantize_params",
    "quantize_state",
    "recipes",
    "significant_digits",
]
__all__ += formats.__all__
