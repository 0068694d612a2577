"""qjax: any number format, anywhere in a JAX program, bit for bit."""

from qjax import formats as formats
from qjax._chop import chop
from qjax._encode import QTensor, decode, encode
from qjax._rounding import Rounding
from qjax.formats import *  # noqa: F403

__version__ = "0.1.0"

__all__ = ["QTensor", "Rounding", "chop", "decode", "encode", "formats"]
__all__ += formats.__all__
