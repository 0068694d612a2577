"""optax transformations in low precision, and controllers that change a precision while training."""

from qjax.optim._adamw import adamw_4bit, adamw_8bit, coat_adamw
from qjax.optim._adapt import AdaPT
from qjax.optim._annealing import bit_width_schedule, chop_fixed
from qjax.optim._chop import chop_params, chop_updates
from qjax.optim._chop_state import chop_state
from qjax.optim._galore import galore, q_galore
from qjax.optim._gradient_interval import GradientInterval, chop_by_gradient_interval
from qjax.optim._loss_scaling import loss_scale, loss_scaling
from qjax.optim._qas import scale_by_qas
from qjax.optim._sgd_sai import scale_by_sgd_sai, sgd_sai
from qjax.optim._stable_spam import scale_by_stable_spam, stable_spam
from qjax.optim._storage import Expanded
from qjax.optim._u_mup import scale_by_u_mup

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
    "galore",
    "loss_scale",
    "loss_scaling",
    "q_galore",
    "scale_by_qas",
    "scale_by_sgd_sai",
    "scale_by_stable_spam",
    "scale_by_u_mup",
    "sgd_sai",
    "stable_spam",
]
