"""AdamW with its moments in low precision."""

from collections.abc import Callable
from typing import Any

import optax

from qjax.formats import E4M3, FP32, Codebook, Scaled, dynamic
from qjax.optim._chop_state import chop_state
from qjax.optim._storage import Expanded


def coat_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    expand: bool = True,
    block: int = 128,
    min_size: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with both moments in FP8 E4M3, in blocks whose dynamic range is expanded: 2.08 bytes a parameter.

    The arguments are those of ``optax.adamw``; ``expand`` says whether the moments are ``Expanded``; those with fewer
    than ``min_size`` elements stay in full precision.

    >>> import jax, jax.numpy as jnp, qjax
    >>> state = qjax.optim.coat_adamw(1e-3).init({"w": jnp.zeros((1000, 1024), jnp.float32)})
    >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1024000
    2.07812890625

    Source: Xi et al. (2024), COAT, https://arxiv.org/abs/2410.19313, section 4. The weight decay is optax's default.
    """
    storage = Expanded(E4M3, block) if expand else Scaled(E4M3, FP32, block)
    return _adamw(learning_rate, b1, b2, eps, eps_root, weight_decay, mask, storage, storage, min_size)


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    block: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with moments in 8-bit dynamic tree codes, with float32 scales a block: 2.03 bytes a parameter.

    The arguments are those of ``optax.adamw``; moments with fewer than ``min_size`` elements stay in full precision.
    Second moments below 1.6e-7 of the largest of their block become zero, after which the steps of their weights can be
    large.

    >>> import jax, jax.numpy as jnp, qjax
    >>> state = qjax.optim.adamw_8bit(1e-3).init({"w": jnp.zeros((1000, 1024), jnp.float32)})
    >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1024000
    2.03125390625

    Source: Dettmers et al. (2022), 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861; the
    paper's block is 2048, 256 that of later releases. Its stable embedding layer is not part of this.
    """
    mu, nu = (Scaled(dynamic(8, signed), FP32, block) for signed in (True, False))
    return _adamw(learning_rate, b1, b2, eps, eps_root, weight_decay, mask, mu, nu, min_size)


def adamw_4bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    block: int = 128,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with 4-bit moments: a dynamic tree for the first, linear without zero for the second.

    The arguments are those of ``optax.adamw``; moments with fewer than ``min_size`` elements stay in full precision.

    >>> import jax, jax.numpy as jnp, qjax
    >>> state = qjax.optim.adamw_4bit(1e-3).init({"w": jnp.zeros((1000, 1024), jnp.float32)})
    >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1024000
    1.06250390625

    Source: Li, Chen, Zhu (2023), Memory Efficient Optimizers with 4-bit States, https://arxiv.org/abs/2309.01507. The
    second moment has blocks too, as in torchao; the paper's rank-1 normalization is left out.
    """
    linear = Codebook(tuple(i / 16 for i in range(1, 17)), "linear4")
    mu, nu = Scaled(dynamic(4), FP32, block), Scaled(linear, FP32, block)
    return _adamw(learning_rate, b1, b2, eps, eps_root, weight_decay, mask, mu, nu, min_size)


def _adamw(learning_rate, b1, b2, eps, eps_root, weight_decay, mask, mu, nu, min_size):
    return optax.chain(
        chop_state(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root),
            {"mu.*": mu, "nu.*": nu},
            min_size=min_size,
            remat=isinstance(mu, Expanded),
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
