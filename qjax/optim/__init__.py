"""optax transformations in low precision, and controllers that change a precision while training."""

from qjax.optim._adapt import AdaPT
from qjax.optim._annealing import bit_width_schedule, chop_fixed
from qjax.optim._gradient_interval import GradientInterval, chop_by_gradient_interval
from qjax.optim._qas import scale_by_qas

__all__ = [
    "AdaPT",
    "GradientInterval",
    "bit_width_schedule",
    "chop_by_gradient_interval",
    "chop_fixed",
    "scale_by_qas",
]
