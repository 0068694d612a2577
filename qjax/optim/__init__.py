"""optax transformations in low precision."""

from qjax.optim._adamw import adamw_4bit, adamw_8bit, coat_adamw
from qjax.optim._chop import chop_params, chop_updates
from qjax.optim._chop_state import chop_state
from qjax.optim._storage import Expanded

__all__ = [
    "Expanded",
    "adamw_4bit",
    "adamw_8bit",
    "chop_params",
    "chop_state",
    "chop_updates",
    "coat_adamw",
]
