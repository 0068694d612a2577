"""``linalg``: LAPACK's results where it computes the same, and backward errors within the bounds of the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qjax import emulate, linalg

RANDOM = np.random.default_rng(0)


def matrix(*shape):
    return RANDOM.normal(size=shape)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


U = 2.0**-53


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7), (1, 1), (2, 3, 6, 6)])
def test_lu_is_the_decomposition_of_lax(shape):
    x = matrix(*shape)
    found, pivots, permutation = map(np.asarray, linalg.lu(x))
    wanted = jax.lax.linalg.lu(x)
    assert [y.dtype for y in (found, pivots, permutation)] == [y.dtype for y in wanted]
    np.testing.assert_array_equal(pivots, wanted[1])
    np.testing.assert_array_equal(permutation, wanted[2])
    k = min(shape[-2:])
    lower = np.tril(found, -1)[..., :k] + np.eye(shape[-2], k)
    upper = np.triu(found)[..., :k, :]
    # |x - l u| <= gamma_k |l| |u|, and as much for the product here: Higham (2002), Accuracy and stability of numerical
    # algorithms, theorem 9.3, with k u < 0.01.
    residual = np.abs(np.take_along_axis(x, permutation[..., None], -2) - lower @ upper)
    assert (residual <= 1.01 * (2 * k) * U * (np.abs(lower) @ np.abs(upper))).all()


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (3, 5, 5)])
def test_cholesky_factors(shape):
    x = matrix(*shape)
    x = x @ np.swapaxes(x, -1, -2) + np.eye(shape[-1])
    lower = np.asarray(linalg.cholesky(x))
    assert (np.triu(lower, 1) == 0).all()
    # |x - l l^T| <= gamma_(n + 1) |l| |l^T|: Higham (2002), theorem 10.3, and a unit for the product here.
    bound = 1.01 * (2 * shape[-1] + 1) * U * (np.abs(lower) @ np.swapaxes(np.abs(lower), -1, -2))
    assert (np.abs(x - lower @ np.swapaxes(lower, -1, -2)) <= bound).all()
    above = x + np.triu(np.ones_like(x), 1)
    np.testing.assert_array_equal(linalg.cholesky(above, symmetrize_input=False), lower)
    assert np.isnan(linalg.cholesky(-x)).any()


@pytest.mark.parametrize("full_matrices", [True, False])
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7), (1, 3), (2, 6, 3)])
def test_qr_factors(shape, full_matrices):
    x = matrix(*shape)
    q, r = map(np.asarray, linalg.qr(x, full_matrices=full_matrices))
    wanted = jax.lax.linalg.qr(x, full_matrices=full_matrices)
    assert (q.shape, r.shape) == tuple(y.shape for y in wanted)
    assert (np.tril(r, -1) == 0).all()
    # Higham (2002), theorem 19.4: |x - q r|_F <= sqrt(n) gamma_(c m) |x|_F with a small c, 10 here.
    m, n = shape[-2:]
    bound = np.sqrt(n) * 10 * m * U
    size = np.linalg.norm(x, axis=(-2, -1))
    assert (np.linalg.norm(x - q @ r, axis=(-2, -1)) <= bound * size).all()
    gram = np.swapaxes(q, -1, -2) @ q - np.eye(q.shape[-1])
    assert (np.linalg.norm(gram, axis=(-2, -1)) <= np.sqrt(m) * 10 * m * U).all()
    np.testing.assert_array_less(np.abs(np.abs(r) - np.abs(wanted[1])).max(), 1e3 * bound * size.max())


def test_qr_of_what_is_triangular_already():
    x = np.triu(matrix(4, 4))
    q, r = linalg.qr(x)
    np.testing.assert_array_equal(q, np.eye(4))
    np.testing.assert_array_equal(r, x)


@pytest.mark.parametrize("left_side", [True, False])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("transpose_a", [True, False])
@pytest.mark.parametrize("unit_diagonal", [True, False])
def test_triangular_systems(left_side, lower, transpose_a, unit_diagonal):
    options = dict(left_side=left_side, lower=lower, transpose_a=transpose_a, unit_diagonal=unit_diagonal)
    a, b = matrix(2, 5, 5) + 3 * np.eye(5), matrix(*((2, 5, 3) if left_side else (2, 3, 5)))
    x = np.asarray(linalg.triangular_solve(a, b, **options))
    triangle = np.tril(a) if lower else np.triu(a)
    if unit_diagonal:
        triangle = triangle - triangle * np.eye(5) + np.eye(5)
    t = np.swapaxes(triangle, -1, -2) if transpose_a else triangle
    # |b - t x| <= gamma_n |t| |x|: Higham (2002), theorem 8.5, and n units for the product here.
    product, size = (t @ x, np.abs(t) @ np.abs(x)) if left_side else (x @ t, np.abs(x) @ np.abs(t))
    assert (np.abs(b - product) <= 1.01 * 2 * 5 * U * size).all()


def test_singular_matrices_are_decomposed():
    x = np.ones((3, 3))
    found, _, _ = linalg.lu(x)
    np.testing.assert_array_equal(found, [[1, 1, 1], [1, 0, 0], [1, 0, 0]])


def by_elimination(a):
    """Returns the LU decomposition in NumPy float16, in loops over scalars."""
    a, n = np.array(a, np.float16), len(a)
    order = np.arange(n)
    for k in range(n):
        p = k + np.argmax(np.abs(a[k:, k]))
        a[[k, p]], order[[k, p]] = a[[p, k]], order[[p, k]]
        for i in range(k + 1, n):
            a[i, k] = a[i, k] / a[k, k]
            for j in range(k + 1, n):
                a[i, j] = a[i, j] - a[i, k] * a[k, j]
    return a, order


def test_lu_emulated_in_fp16_is_that_of_float16():
    x = matrix(12, 12)
    wanted, order = by_elimination(x)
    for fn, rules in ((linalg.lu, None), (jax.lax.linalg.lu, {"lu": linalg.lu})):
        found, _, permutation = jax.jit(emulate(fn, "fp16", rules=rules))(x)
        np.testing.assert_array_equal(np.asarray(found).astype(np.float16), wanted)
        np.testing.assert_array_equal(permutation, order)


def test_a_solve_is_emulated_operation_by_operation():
    a, b = matrix(6, 6), matrix(6)
    rules = {"lu": linalg.lu, "triangular_solve": linalg.triangular_solve}
    found = emulate(jnp.linalg.solve, "fp16", rules=rules)(a, b)
    lower_upper, order = by_elimination(a)
    x = np.array(b, np.float16)[order]
    for j in range(6):
        for i in range(j + 1, 6):
            x[i] = x[i] - lower_upper[i, j] * x[j]
    for j in reversed(range(6)):
        x[j] = x[j] / lower_upper[j, j]
        for i in range(j):
            x[i] = x[i] - lower_upper[i, j] * x[j]
    np.testing.assert_array_equal(np.asarray(found).astype(np.float16), x)
    opaque = emulate(jnp.linalg.solve, "fp16")(a, b)
    assert np.abs(opaque - scipy.linalg.solve(a, b)).max() < np.abs(found - scipy.linalg.solve(a, b)).max()


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"lu: matrices must be real, got complex128; use jax.lax.linalg.lu."):
        linalg.lu(jnp.eye(2, dtype=jnp.complex128))
    with pytest.raises(ValueError, match=r"qr: pivoting is not supported; leave it out, or use jax.lax.linalg.qr."):
        linalg.qr(jnp.eye(2), pivoting=True)
