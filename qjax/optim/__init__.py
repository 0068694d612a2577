"""optax transformations in low precision, and controllers that change a precision while training."""

from qjax.optim._adapt import AdaPT
from qjax.optim._annealing import bit_width_schedule, chop_fixed

__all__ = [
    "AdaPT",
    "bit_width_schedule",
    "chop_fixed",
]
