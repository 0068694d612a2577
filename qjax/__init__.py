"""qjax: any number format, anywhere in a JAX program, bit for bit."""

from qjax._chop import chop as chop
from qjax._encode import QTensor as QTensor
from qjax._encode import decode as decode
from qjax._encode import encode as encode
from qjax._rounding import Rounding as Rounding
from qjax.formats import *  # noqa: F403

__version__ = "0.1.0"
