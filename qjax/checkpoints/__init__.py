"""Files of quantized parameters: codes and scales in their real bytes, and a description that is checked.

A checkpoint is arrays and a description of them, which is JSON: the format, shape, dtype and blocks of each, and
checksums. No code is stored, and none is run: never a pickle.
"""

from qjax.checkpoints._arrays import from_arrays, to_arrays
from qjax.checkpoints._files import load_orbax, load_safetensors, save_orbax, save_safetensors

__all__ = ["from_arrays", "load_orbax", "load_safetensors", "save_orbax", "save_safetensors", "to_arrays"]
