"""Decompositions and solves in plain JAX, for ``emulate`` to round operation by operation.

Each mirrors the function of that name in ``jax.lax.linalg``, which is a call of LAPACK that no emulation sees into, and
can take its place in a whole program: ``emulate(f, fmt, rules={"lu": qjax.linalg.lu})``. The operations come in the
order of the classical right-looking algorithms (Golub and Van Loan, 2013, Matrix computations, 4th edition, sections
3.1, 3.4, 4.2 and 5.2): one multiplication and one subtraction for each update, which are two roundings.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

Matrix = Float[Array, "*batch m n"]


def lu(x: Matrix) -> tuple[Matrix, Int[Array, "*batch k"], Int[Array, "*batch m"]]:
    """Returns the LU decomposition with partial pivoting of matrices, ``x[permutation] = l u``.

    Gaussian elimination: in step k the row with the largest magnitude in column k becomes row k, the multipliers are
    ``x[i, k] / x[k, k]``, and ``x[i, j] - l[i, k] u[k, j]`` replaces the rows below it. Where a pivot is zero so are
    its multipliers.

    Args:
      x: real matrices, (..., m, n).

    Returns:
      As ``jax.lax.linalg.lu``: u, and below its diagonal l, whose diagonal of ones is left out; the pivots, the row
      that each row was exchanged with, (..., min(m, n)); the permutation of the rows, (..., m).

    Raises:
      TypeError: for complex matrices.

    >>> import jax.numpy as jnp, qjax
    >>> from qjax import linalg
    >>> linalg.lu(jnp.array([[1.0, 2.0], [4.0, 2.0]], jnp.float32))
    (Array([[4.  , 2.  ],
           [0.25, 1.5 ]], dtype=float32), Array([1, 1], dtype=int32), Array([1, 0], dtype=int32))
    """
    return _vectorized("lu", _lu, "(m,n)->(m,n),(k),(m)", x)


def cholesky(x: Float[Array, "*batch n n"], *, symmetrize_input: bool = True) -> Float[Array, "*batch n n"]:
    """Returns the lower triangular l of ``x = l l^T``, NaN where x is not positive definite.

    In step k ``l[k, k] = sqrt(x[k, k])``, ``l[i, k] = x[i, k] / l[k, k]``, and x[i, j] becomes
    ``x[i, j] - l[i, k] l[j, k]``.

    Args:
      x: real symmetric matrices, (..., n, n).
      symmetrize_input: whether ``(x + x^T) / 2`` is decomposed; else what is above the diagonal does not count.

    Raises:
      TypeError: for complex matrices.

    >>> import jax.numpy as jnp
    >>> from qjax import linalg
    >>> linalg.cholesky(jnp.array([[4.0, 2.0], [2.0, 10.0]], jnp.float32))
    Array([[2., 0.],
           [1., 3.]], dtype=float32)
    """
    if symmetrize_input:
        x = (x + jnp.swapaxes(x, -1, -2)) / x.dtype.type(2)
    return _vectorized("cholesky", _cholesky, "(n,n)->(n,n)", x)


def qr(
    x: Matrix, *, pivoting: bool = False, full_matrices: bool = True, use_magma: bool | None = None
) -> tuple[Array, Array]:
    """Returns the QR decomposition of matrices by Householder reflections, ``x = q r``.

    In step k the reflection ``1 - tau v v^T`` with ``v = (1, x[k+1:, k] / (x[k, k] - b))``, ``b = -sign(x[k, k])
    |x[k:, k]|`` and ``tau = (b - x[k, k]) / b`` takes column k to (b, 0 ...). Where x is zero below the diagonal
    already it does nothing.

    Args:
      x: real matrices, (..., m, n).
      pivoting, use_magma: must be left out; they are here for the signature of ``jax.lax.linalg.qr``.
      full_matrices: whether q is (m, m) and r (m, n), rather than (m, k) and (k, n) with k = min(m, n).

    Raises:
      TypeError: for complex matrices.
      ValueError: for pivoting.

    >>> import jax.numpy as jnp
    >>> from qjax import linalg
    >>> q, r = linalg.qr(jnp.array([[3.0, 5.0], [4.0, 0.0]], jnp.float32))
    >>> r
    Array([[-5., -3.],
           [ 0., -4.]], dtype=float32)
    """
    if pivoting:
        raise ValueError("qr: pivoting is not supported; leave it out, or use jax.lax.linalg.qr.")
    k = min(x.shape[-2:])
    q, r = _vectorized("qr", _qr, "(m,n)->(m,m),(m,n)", x)
    return (q, r) if full_matrices else (q[..., :k], r[..., :k, :])


def triangular_solve(
    a: Float[Array, "*batch n n"],
    b: Matrix,
    *,
    left_side: bool = False,
    lower: bool = False,
    transpose_a: bool = False,
    conjugate_a: bool = False,
    unit_diagonal: bool = False,
) -> Matrix:
    """Returns x with ``op(a) x = b`` or ``x op(a) = b`` for a triangular matrix a, by substitution.

    In its turn ``x[j] = b[j] / a[j, j]``, and ``a[i, j] x[j]`` is taken off the b[i] that are left.

    Args:
      a: real triangular matrices, (..., n, n).
      b: the other side, (..., n, m), or (..., m, n) unless left_side.
      left_side: whether a is to the left of x.
      lower: whether a is lower triangular; what is on the other side of the diagonal does not count.
      transpose_a: whether op(a) is the transpose of a.
      conjugate_a: ignored, for a is real.
      unit_diagonal: whether the diagonal counts as ones.

    Raises:
      TypeError: for complex matrices.

    >>> import jax.numpy as jnp
    >>> from qjax import linalg
    >>> a, b = jnp.array([[2.0, 0.0], [1.0, 4.0]], jnp.float32), jnp.array([[2.0], [9.0]], jnp.float32)
    >>> linalg.triangular_solve(a, b, left_side=True, lower=True)
    Array([[1.],
           [2.]], dtype=float32)
    """
    # x op(a) = b is op(a)^T x^T = b^T.
    if transpose_a == left_side:
        a, lower = jnp.swapaxes(a, -1, -2), not lower
    if not left_side:
        b = jnp.swapaxes(b, -1, -2)
    solve = functools.partial(_substitute, lower=lower, unit_diagonal=unit_diagonal)
    x = _vectorized("triangular_solve", solve, "(n,n),(n,m)->(n,m)", a, b)
    return x if left_side else jnp.swapaxes(x, -1, -2)


def _vectorized(name: str, fn, signature: str, *args):
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in args):
        raise TypeError(f"{name}: matrices must be real, got {args[0].dtype}; use jax.lax.linalg.{name}.")
    return jnp.vectorize(fn, signature=signature)(*args)


def _lu(x):
    m, n = x.shape
    rows, columns = jnp.arange(m), jnp.arange(n)

    def step(k, state):
        x, permutation, pivots = state
        pivot = jnp.argmax(jnp.where(rows >= k, jnp.abs(x[:, k]), -1))
        order = jnp.where(rows == k, pivot, jnp.where(rows == pivot, k, rows))
        x, permutation = x[order], permutation[order]
        below = rows > k
        head = x[k, k]
        column = jnp.where(below & (head != 0), x[:, k] / jnp.where(head == 0, 1, head), 0)
        rest = x - column[:, None] * x[k][None, :]
        x = jnp.where(below[:, None] & (columns > k)[None, :], rest, x)
        x = jnp.where(below[:, None] & (columns == k)[None, :], column[:, None], x)
        return x, permutation, pivots.at[k].set(pivot.astype(jnp.int32))

    k = min(m, n)
    start = x, jnp.arange(m, dtype=jnp.int32), jnp.zeros(k, jnp.int32)
    x, permutation, pivots = jax.lax.fori_loop(0, k, step, start)
    return x, pivots, permutation


def _cholesky(x):
    rows = jnp.arange(len(x))

    def step(k, state):
        x, lower = state
        diagonal = jnp.sqrt(x[k, k])
        column = jnp.where(rows > k, x[:, k] / diagonal, jnp.where(rows == k, diagonal, 0))
        rest = x - column[:, None] * column[None, :]
        after = rows > k
        return jnp.where(after[:, None] & after[None, :], rest, x), lower.at[:, k].set(column)

    return jax.lax.fori_loop(0, len(x), step, (x, jnp.zeros_like(x)))[1]


def _qr(x):
    m, n = x.shape
    rows = jnp.arange(m)

    def step(k, state):
        q, r = state
        column = jnp.where(rows >= k, r[:, k], 0)
        head = column[k]
        norm = jnp.sqrt(jnp.sum(column * column))
        beta = jnp.where(head < 0, norm, -norm)
        idle = ~jnp.any(jnp.where(rows > k, column, 0) != 0)
        scaled = column / jnp.where(idle, 1, head - beta)
        v = jnp.where(rows > k, scaled, jnp.where(rows == k, 1, 0).astype(x.dtype))
        tau = jnp.where(idle, 0, (beta - head) / jnp.where(idle, 1, beta))
        r = r - (tau * v)[:, None] * (v @ r)[None, :]
        r = jnp.where(((rows == k)[:, None] & (jnp.arange(n) == k)[None, :]) & ~idle, beta, r)
        r = jnp.where((rows > k)[:, None] & (jnp.arange(n) == k)[None, :], 0, r)
        q = q - (q @ v)[:, None] * (tau * v)[None, :]
        return q, r

    return jax.lax.fori_loop(0, min(m - 1, n), step, (jnp.eye(m, dtype=x.dtype), x))


def _substitute(a, b, *, lower: bool, unit_diagonal: bool):
    rows = jnp.arange(len(a))

    def step(i, b):
        j = i if lower else len(a) - 1 - i
        row = b[j] if unit_diagonal else b[j] / a[j, j]
        left = rows > j if lower else rows < j
        rest = b - a[:, j][:, None] * row[None, :]
        return jnp.where(left[:, None], rest, b).at[j].set(row)

    return jax.lax.fori_loop(0, len(a), step, b)
