"""optax transformations in low precision."""

from qjax.optim._galore import GaLoreState, Projection, galore
from qjax.optim._loss_scaling import LossScalingState, loss_scale, loss_scaling
from qjax.optim._sgd_sai import ScaleBySgdSaiState, scale_by_sgd_sai, sgd_sai
from qjax.optim._stable_spam import ScaleByStableSpamState, scale_by_stable_spam, stable_spam

__all__ = ["galore", "loss_scale", "loss_scaling", "scale_by_sgd_sai", "scale_by_stable_spam", "sgd_sai", "stable_spam"]
__all__ += ["GaLoreState", "LossScalingState", "Projection", "ScaleBySgdSaiState", "ScaleByStableSpamState"]
