"""GaLore and Q-GaLore: an optimizer in a low-rank subspace of the gradients, whose basis is held in a few bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from qjax._encode import QTensor, decode, encode
from qjax._quantizer import Quantizer
from qjax.formats import Format, format
from qjax.optim._chop import chop_params
from qjax.optim._chop_state import chop_state


class Projection(NamedTuple):
    """The subspace of one matrix.

    Attributes:
      basis: the first singular vectors of a gradient, on the matrix's shorter side, as rows; in the format.
      first: the first of them, in float32.
      cosines: |cos| between the first vector and the one before it, newest last; -inf until there are that many.
      gap: the number of steps from one basis to the next.
      computed: how many bases there have been.
    """

    basis: QTensor | Float[Array, "rank short"]
    first: Float[Array, " short"]
    cosines: Float[Array, " queue"]
    gap: Int[Array, ""]
    computed: Int[Array, ""]


class GaLoreState(NamedTuple):
    """The state of ``galore``.

    Attributes:
      count: steps taken.
      projections: a ``Projection`` in the place of each matrix that is projected, None in that of the other tensors.
      inner: the state of the inner transformation, of the projected shapes.
    """

    count: jax.typing.ArrayLike
    projections: Any
    inner: optax.OptState


def galore(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    projection: Format | str | None = "uint4_g256",
    update_gap: int = 200,
    cos_threshold: float | None = 0.4,
    queue_size: int = 5,
    scale: float = 0.25,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that runs another one on gradients projected to a subspace of a few dimensions.

    For a gradient G of shape (m, n) with m >= n, Q holds its first ``rank`` right singular vectors as rows: ``inner``
    gets ``G Q^T``, of shape (m, rank), and of its update u the result is ``scale u Q``. With m < n they are the left
    ones, ``Q G`` and ``scale Q^T u``. So the state of ``inner`` has the projected size. Q is computed anew at the steps
    0, gap, 2 gap, ...; after each but the first the cosine of its first vector with the one before is put in a queue,
    and the gap is doubled if the mean of a full queue is at least ``cos_threshold``: a subspace that has settled is
    looked for less often.

    Args:
      inner: for example ``optax.scale_by_adam()``. It gets no parameters, whose shapes are others: put weight decay
        and the learning rate after ``galore``.
      rank: the dimensions of the subspace. Matrices with a side no longer than this, and tensors that are no matrices,
        go to ``inner`` as they are.
      projection: the format that Q is held in, a QTensor with blocks along each singular vector; None: float32.
      update_gap: the first gap, in steps.
      cos_threshold: see above; None keeps the gap.
      queue_size: how many cosines the mean is taken of.
      scale: multiplies the updates of projected matrices.

    The cosine is taken without its sign, since that of a singular vector is arbitrary: the authors' code keeps the
    sign, so that a settled subspace can have a mean near 0. A gradient of zeros gives an arbitrary subspace, until the
    next is due; one with a NaN makes the updates of its matrix NaN for as long: see ``loss_scaling``. The SVD is within
    ``lax.cond``: steps between do not pay for it, except under ``vmap``, where all of them do.

    Raises:
      ValueError: for a rank, gap or queue below 1; at ``init``, if no matrix is large enough to be projected.

    >>> import jax.numpy as jnp, optax, qjax.optim
    >>> optimizer = qjax.optim.galore(optax.scale_by_adam(), rank=4)
    >>> state = optimizer.init({"kernel": jnp.zeros((64, 32), jnp.float32), "bias": jnp.zeros(32, jnp.float32)})
    >>> state.inner.mu["kernel"].shape, state.inner.mu["bias"].shape
    ((64, 4), (32,))
    >>> state.projections["kernel"].basis.fmt.element.bits, state.projections["kernel"].basis.shape
    (4, (4, 32))

    Sources: Zhao et al. (2024), GaLore, https://arxiv.org/abs/2403.03507, algorithm 2; Zhang et al. (2024), Q-GaLore,
    https://arxiv.org/abs/2407.08296, sections 3.2 and 3.3. GaLore itself is ``projection=None, cos_threshold=None``.
    Deviations: the sign of the cosine; groups lie along each singular vector, where the code divides the flattened
    matrix; the side is the paper's, the shorter one, and ``optax.contrib.galore`` takes the longer.
    """
    for name, value in (("rank", rank), ("update_gap", update_gap), ("queue_size", queue_size)):
        if value < 1:
            raise ValueError(f"galore: {name} must be at least 1, got {value}.")
    fmt = None if projection is None else format(projection)
    inner = optax.with_extra_args_support(inner)

    def held(basis):
        return basis if fmt is None else encode(basis, fmt)

    def empty(p):
        if not _is_projected(p, rank):
            return None
        basis = jnp.zeros((rank, min(p.shape)), jnp.float32)
        none = jnp.full(queue_size, -jnp.inf, jnp.float32)
        return Projection(held(basis), basis[0], none, jnp.array(update_gap, jnp.int32), jnp.zeros((), jnp.int32))

    def init(params):
        projections = jax.tree.map(empty, params)
        shapes = [p.shape for p in jax.tree.leaves(params)]
        if shapes and not jax.tree.leaves(projections):
            raise ValueError(
                f"galore: no tensor is a matrix with both sides over rank {rank}, the shapes are {shapes}; "
                "choose a lower rank, or use the inner transformation alone."
            )
        low = jax.tree.map(_projected, params, projections)
        return GaLoreState(jnp.zeros((), jnp.int32), projections, inner.init(low))

    def renewed(g, p: Projection, count) -> Projection:
        def new():
            tall = (g if _is_tall(g.shape) else g.T).astype(jnp.float32)
            basis = jnp.linalg.svd(tall, full_matrices=False)[2][:rank]
            cosine = jnp.where(p.computed == 0, -jnp.inf, jnp.abs(basis[0] @ p.first))
            cosines = jnp.append(p.cosines[1:], cosine)
            settled = cos_threshold is not None and jnp.mean(cosines) >= cos_threshold
            gap = jnp.where(settled, 2 * p.gap, p.gap)
            return Projection(held(basis), basis[0], cosines, gap, p.computed + 1)

        return jax.lax.cond(count % p.gap == 0, new, lambda: p)

    def update(updates, state, params=None, **extra_args):
        projections = jax.tree.map(
            lambda g, p: None if p is None else renewed(g, p, state.count), updates, state.projections
        )
        low = jax.tree.map(_projected, updates, projections)
        low, inner_state = inner.update(low, state.inner, None, **extra_args)
        full = jax.tree.map(
            lambda g, u, p: u if p is None else scale * _restored(u, p, g.shape),
            updates,
            low,
            projections,
        )
        return full, GaLoreState(optax.safe_increment(state.count), projections, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_projected(p, rank: int) -> bool:
    return p.ndim == 2 and min(p.shape) > rank


def _is_tall(shape: tuple[int, ...]) -> bool:
    return shape[0] >= shape[1]


def _basis(p: Projection, dtype):
    return (decode(p.basis) if isinstance(p.basis, QTensor) else p.basis).astype(dtype)


def _projected(g, p: Projection | None):
    if p is None:
        return g
    basis = _basis(p, g.dtype)
    return g @ basis.T if _is_tall(g.shape) else basis @ g


def _restored(u, p: Projection, shape: tuple[int, ...]):
    basis = _basis(p, u.dtype)
    return u @ basis if _is_tall(shape) else basis.T @ u


def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    key: Array,
    weights: Format | str = "uint8_g256",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    min_size: int = 4096,
    weight_decay: float = 0.0,
    mask: Any = None,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns the Q-GaLore optimizer: 8-bit Adam in INT4 subspaces, weights rounded stochastically to INT8.

    It is a chain of ``galore`` around ``chop_state`` around Adam, weight decay, the learning rate, and ``chop_params``
    for the matrices that are projected. Round these once at the start, as ``chop_params`` says.

    Args:
      learning_rate: a number or a schedule. The paper's 130M model has 0.015, with rank 256.
      rank: of the subspaces.
      key: the PRNG key of the rounding of weights; each step and each matrix draws anew.
      weights: the format of the weights, with blocks along the last axis.
      b1, b2, eps: of Adam.
      min_size: moments with fewer elements stay in full precision.
      weight_decay, mask: as in ``optax.add_decayed_weights``.
      kwargs: of ``galore``.

    >>> import jax, jax.numpy as jnp, optax, qjax
    >>> optimizer = qjax.optim.q_galore(0.015, 4, key=jax.random.key(0))
    >>> params = {"kernel": qjax.chop(jnp.linspace(-1, 1, 2048, dtype=jnp.float32).reshape(64, 32), "uint8_g256")}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> qjax.encode(params["kernel"], "uint8_g256").nbytes
    2368

    Source: Zhang et al. (2024), Q-GaLore, https://arxiv.org/abs/2407.08296, algorithm 1. Deviations: those of
    ``galore``. In the authors' code the layers whose weights are INT8 are listed by name.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    adam = chop_state(adam, {"mu.*": "dynamic8_g256", "nu.*": "udynamic8_g256"}, min_size=min_size)
    return optax.chain(
        galore(adam, rank, **kwargs),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        optax.masked(
            chop_params(Quantizer(weights, "stochastic"), key=key),
            lambda tree: jax.tree.map(lambda p: _is_projected(p, rank), tree),
        ),
    )
