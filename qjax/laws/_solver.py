"""Least squares and Huber's loss from many starts at once: Levenberg and Marquardt with iterated weights."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class _State(NamedTuple):
    z: Array
    r: Array
    jacobian: Array
    objective: Array
    damping: Array
    growth: Array
    steps: Array
    done: Array


def huber(r: Float[Array, " n"], delta) -> Float[Array, " n"]:
    """Returns r^2 / 2 where |r| <= delta, and delta (|r| - delta / 2) beyond; delta may be infinite."""
    size = jnp.abs(r)
    near = jnp.minimum(size, delta)
    return jnp.where(size <= delta, 0.5 * size**2, near * (size - 0.5 * near))


def minimize(
    residuals: Callable[[Array], Float[Array, " n"]],
    start: Float[Array, " p"],
    weights: Float[Array, " n"],
    delta: Float[Array, ""],
    max_steps: int,
) -> tuple[Float[Array, " p"], Float[Array, ""], Array]:
    """Returns a local minimiser of ``sum_i weights_i huber(residuals_i)``, its objective and the number of steps.

    Each step solves the normal equations with Huber's weights ``min(1, delta / |r|)``, whose quadratic lies above the
    loss and touches it (Holland and Welsch 1977), with Marquardt's damping by the diagonal and Nielsen's rule for its
    size (Madsen, Nielsen and Tingleff 2004, section 3.2). Steps that do not descend are not taken. It ends when a
    step promises less than 1e-14 of the objective, or the objective is that of rounding errors.
    """

    def evaluate(z):
        r, push = jax.linearize(residuals, z)
        return r, jax.vmap(push, out_axes=1)(jnp.eye(len(z))), jnp.sum(weights * huber(r, delta))

    def step(s: _State) -> _State:
        size = jnp.abs(s.r)
        bend = weights * jnp.where(size <= delta, 1.0, delta / jnp.maximum(size, 1e-300))
        gradient = s.jacobian.T @ (bend * s.r)
        hessian = (s.jacobian * bend[:, None]).T @ s.jacobian
        diagonal = jnp.diag(hessian)
        # A parameter without influence has no scale of its own: it takes part of the largest and stays put.
        scale = s.damping * jnp.maximum(diagonal, 1e-14 * jnp.max(diagonal) + 1e-290)
        factor = jnp.linalg.cholesky(hessian + jnp.diag(scale))
        move = -jax.scipy.linalg.cho_solve((factor, True), gradient)
        promised = 0.5 * move @ (scale * move - gradient)
        r, jacobian, objective = evaluate(s.z + move)
        taken = (objective < s.objective) & jnp.all(jnp.isfinite(jacobian))
        gain = jnp.clip((s.objective - objective) / jnp.maximum(promised, 1e-300), 0.0, 1.0)
        damping = s.damping * jnp.where(taken, jnp.maximum(0.2, 1 - (2 * gain - 1) ** 3), s.growth)
        done = ~(promised > 1e-14 * s.objective) | (s.objective < 1e-30) | (damping > 1e15)
        return _State(
            z=jnp.where(taken, s.z + move, s.z),
            r=jnp.where(taken, r, s.r),
            jacobian=jnp.where(taken, jacobian, s.jacobian),
            objective=jnp.where(taken, objective, s.objective),
            damping=jnp.maximum(damping, 1e-14),
            growth=jnp.where(taken, 2.0, 2 * s.growth),
            steps=s.steps + 1,
            done=done,
        )

    r, jacobian, objective = evaluate(start)
    bad = ~(jnp.isfinite(objective) & jnp.all(jnp.isfinite(jacobian)))
    first = _State(start, r, jacobian, objective, jnp.array(1e-2), jnp.array(2.0), jnp.array(0), bad)
    last = jax.lax.while_loop(lambda s: (s.steps < max_steps) & ~s.done, step, first)
    return last.z, jnp.where(bad, jnp.inf, last.objective), last.steps


@functools.partial(jax.jit, static_argnames=("problem", "max_steps", "lanes"))
def minimize_many(problem, starts, data, log_loss, weights, delta, *, max_steps: int, lanes: int = 256):
    """Returns ``minimize`` of all rows of ``starts``, with the weights of each; a group of lanes ends with its slowest.

    Args:
      problem: static; ``problem.log_prediction(z, data)`` gives the logarithms of the predicted losses.
      weights: shape (n,), the same for all, or (starts, n).
    """

    def one(arguments):
        start, weights = arguments
        return minimize(lambda z: problem.log_prediction(z, data) - log_loss, start, weights, delta, max_steps)

    # Groups of one size, the last filled up: a rest of another size would be a program of its own.
    count = len(starts)
    size = math.ceil(count / math.ceil(count / lanes))
    places = np.minimum(np.arange(math.ceil(count / size) * size), count - 1)
    weights = jnp.broadcast_to(weights, (count, len(log_loss)))
    found = jax.lax.map(one, (starts[places], weights[places]), batch_size=size)
    return jax.tree.map(lambda x: x[:count], found)
