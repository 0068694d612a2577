"""optax transformations in low precision, and controllers that change a precision while training."""

from qjax.optim._adamw import adamw_4bit, adamw_8bit, coat_adamw
from qjax.optim._adapt import AdaPT
from qjax.optim._annealing import bit_width_schedule, chop_fixed
from qjax.optim._chop import chop_params, chop_updates
from qjax.optim._chop_state import chop_state
from qjax.optim._gradient_interval import GradientInterval, chop_by_gradient_interval
from qjax.optim._qas import scale_by_qas
from qjax.optim._storage import Expanded

__all__ = [
    "AdaPT",
    "Expanded",
    "GradientInterval",
    "adamw_4bit",
    "adamw_8bit",
    "bit_width_schedule",
    "chop_by_gradient_interval",
    "chop_fixed",
    "chop_params",
    "chop_state",
    "chop_updates",
    "coat_adamw",
    "scale_by_qas",
]
