"""What the runs say about each parameter: covariances, and warnings about those that they do not determine."""

import numpy as np
from jaxtyping import Float

from qjax.laws._problem import Problem

# The largest relative change of any predicted loss, for a relative change of a parameter, that counts as none.
_DEAD = 1e-5
# The least singular value, relative to the largest, of the Jacobian with columns of length 1.
_SINGULAR = 1e-9


def covariance_of(problem: Problem, natural, residuals, jacobian, delta: float) -> Float[np.ndarray, "p p"]:
    """Returns the covariance of the free parameters, that of an M-estimator with symmetric errors.

    ``n / (n - p) mean(psi^2) / mean(psi')^2 (J' J)^-1`` with psi the derivative of Huber's loss; for least squares the
    usual ``s^2 (J' J)^-1``. Where delta is narrower than ``MAD n^(-1/5)``, the mean of psi' is taken in a window of
    that width, since it estimates a density. NaN for parameters that are not identified, and if n <= p.

    Source: Huber (1981), Robust statistics, section 7.6, equation 6.5 without its correction K.
    """
    n, p = jacobian.shape
    covariance, (dead, blurred) = np.full((p, p), np.nan), unidentified(jacobian)
    good = ~(dead | blurred)
    if n <= p or not good.any():
        return covariance
    size, width = np.abs(residuals), delta
    if not np.isinf(delta):
        width = max(delta, np.median(size) * 1.4826 * n**-0.2, 1e-300)
    # psi and psi' relative to delta, so that delta = 0 is a limit like others.
    psi = residuals if np.isinf(width) else np.clip(residuals, -delta, delta) if delta else np.sign(residuals)
    bend = np.mean(size <= width) * (1.0 if np.isinf(width) or delta == width else (delta or 1.0) / width)
    alive = jacobian[:, ~dead]
    inverse = np.linalg.pinv(alive.T @ alive, hermitian=True)
    slope = np.where(problem.log, natural, 1.0)[~dead]
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = n / (n - p) * np.mean(psi**2) / bend**2 * inverse * np.outer(slope, slope)
    covariance[np.ix_(~dead, ~dead)] = scaled
    covariance[blurred] = covariance[:, blurred] = np.nan
    return covariance


def unidentified(jacobian) -> tuple[np.ndarray, np.ndarray]:
    """Returns masks of the parameters without influence, and of those that others can stand in for."""
    dead = np.abs(jacobian).max(0) < _DEAD
    blurred = np.zeros_like(dead)
    if not dead.all():
        alive = jacobian[:, ~dead] / np.linalg.norm(jacobian[:, ~dead], axis=0)
        _, values, vectors = np.linalg.svd(alive, full_matrices=True)
        values = np.pad(values, (0, len(vectors) - len(values)))
        null = vectors[values < _SINGULAR * values[0]]
        blurred[~dead] = (np.abs(null) > 0.05).any(0)
    return dead, blurred


def warnings_of(problem: Problem, natural, residuals, jacobian, delta: float) -> tuple[str, ...]:
    """Returns a sentence for every parameter that has run away or is not identified."""
    found, (dead, blurred) = [], unidentified(jacobian)
    errors = np.sqrt(np.diag(covariance_of(problem, natural, residuals, jacobian, delta)))
    for i, name in enumerate(problem.free):
        value, (low, high) = natural[i], problem.parameter(name).domain
        if dead[i]:
            change = np.abs(jacobian[:, i]).max()
            found.append(
                f"{name} = {value:.3g} has run away or has no influence: a change of it changes no predicted loss by "
                f"more than {change:.0e} of that, relatively; fix it, or add runs that depend on it"
            )
        elif not low < value < high:
            found.append(f"{name} = {value:.3g} has run away: it is outside ({low:g}, {high:g})")
        elif errors[i] > abs(value):
            found.append(f"{name} = {value:.3g} is barely identified: its standard error is {errors[i]:.2g}")
    if blurred.any():
        names = ", ".join(np.array(problem.free)[blurred])
        found.append(f"{names} are not identified: the runs determine only a combination of them; fix or tie some")
    return tuple(found)
