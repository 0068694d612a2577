"""The loss that gives unit gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Integer

from qjax.unit_scaling._scale import scale_bwd, scale_fwd


def cross_entropy(
    logits: Inexact[Array, "*batch classes"], labels: Integer[Array, "*batch"], *, mult: float = 1.0
) -> Inexact[Array, ""]:
    """Returns the mean of ``-log softmax(mult logits)[labels]``, with gradients of unit variance.

    The gradient is not that of the mean: for each logit it is ``(softmax - one_hot) classes / sqrt(classes - 1)``, of
    root mean square 1 while all classes are as probable, whatever the size of the batch. Adam does not see the factor;
    for other optimizers the learning rate absorbs it.

    Args:
      logits: of any float dtype; the loss has it, too.
      labels: indices of the classes, which are at least two.
      mult: the inverse temperature.

    Raises:
      ValueError: if the shapes do not fit, or there is but one class.

    >>> import jax, jax.numpy as jnp, qjax.unit_scaling as us
    >>> jax.value_and_grad(us.cross_entropy)(jnp.zeros((1, 2), jnp.float32), jnp.array([0]))
    (Array(0.6931472, dtype=float32), Array([[-1.,  1.]], dtype=float32))

    Source: Blake, Orr, Luschi (2023), https://arxiv.org/abs/2303.11257, section 4, and the authors' library.
    """
    if logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        raise ValueError(
            "cross_entropy: logits must be (..., classes) with at least two classes and labels (...), "
            f"got {logits.shape} and {labels.shape}."
        )
    classes = logits.shape[-1]
    logits = scale_fwd(scale_bwd(logits, classes / (classes - 1) ** 0.5), mult)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return scale_fwd(-chosen.sum(), 1 / max(labels.size, 1))
