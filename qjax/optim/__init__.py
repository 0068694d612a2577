"""optax transformations in low precision."""

from qjax.optim._u_mup import scale_by_u_mup

__all__ = ["scale_by_u_mup"]
