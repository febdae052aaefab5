"""Lanczos and its kin against SciPy's dense eigenvalues and an explicit Krylov basis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from fallline.parts.linalg import (
    conjugate_gradient,
    dense,
    extend_lanczos,
    lanczos_gap,
    leading_eigenpairs,
    leading_eigenvector,
    leading_svd,
    orthonormal_rows,
    ritz_vector,
    start_lanczos,
    subspace_svd,
    tridiagonal_eigh,
)

pytestmark = pytest.mark.usefixtures("x64")

N, CAPACITY = 12, 16


def symmetric(eigenvalues, seed=0):
    n = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return (q * eigenvalues) @ q.T


MATRIX = symmetric(np.array([-3.0, -1, -0.5, 0, 0.1, 0.2, 1, 2, 3, 5, 8, 9]))
START = np.random.default_rng(1).normal(size=N)
START /= np.linalg.norm(START)


def krylov(matrix, start, steps):
    """An orthonormal basis of span{s, As, …} in order, by Gram–Schmidt in long double."""
    basis = [start.astype(np.longdouble)]
    for _ in range(steps - 1):
        w = matrix.astype(np.longdouble) @ basis[-1]
        for _ in range(2):
            for q in basis:
                w = w - (q @ w) * q
        basis.append(w / np.sqrt(w @ w))
    return np.array(basis, np.float64).T


@jax.jit
def lanczos(matrix, start, until):
    return extend_lanczos(lambda v: matrix @ v, start_lanczos(start, CAPACITY), until)


@jax.jit
def combination(matrix, start, weights, steps):
    return ritz_vector(lambda v: matrix @ v, start, weights, steps)


def padded(weights):
    return np.concatenate([weights, np.zeros(CAPACITY - len(weights))])


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_ritz_pairs_are_those_of_the_projected_matrix(steps):
    run = lanczos(MATRIX, START, steps)
    values, weights, beta = tridiagonal_eigh(run)
    basis = krylov(MATRIX, START, steps)
    assert int(run.steps) == steps and bool(run.alive)
    np.testing.assert_allclose(values, scipy.linalg.eigvalsh(basis.T @ MATRIX @ basis), rtol=1e-10, atol=1e-11)
    for value, w in zip(values, weights.T, strict=True):
        y = np.asarray(combination(MATRIX, START, padded(w), steps))
        assert np.linalg.norm(y) == pytest.approx(1, rel=1e-14)
        assert abs(y @ (basis @ w)) == pytest.approx(1, abs=1e-11)
        # The residual is known without the vector.
        assert np.linalg.norm(MATRIX @ y - value * y) == pytest.approx(beta * abs(w[-1]), rel=1e-8, abs=1e-12)


def test_the_whole_space_gives_the_whole_spectrum():
    run = lanczos(MATRIX, START, N)
    values, weights, _ = tridiagonal_eigh(run)
    expected, vectors = scipy.linalg.eigh(MATRIX)
    np.testing.assert_allclose(values, expected, atol=1e-11)
    lowest = np.asarray(combination(MATRIX, START, padded(weights[:, 0]), N))
    assert abs(lowest @ vectors[:, 0]) == pytest.approx(1, abs=1e-12)


def test_a_run_can_be_extended():
    whole = lanczos(MATRIX, START, 9)

    @jax.jit
    def longer(matrix, run, until):
        return extend_lanczos(lambda v: matrix @ v, run, until)

    extended = longer(MATRIX, lanczos(MATRIX, START, 4), 9)
    jax.tree.map(np.testing.assert_array_equal, extended, whole)
    jax.tree.map(np.testing.assert_array_equal, longer(MATRIX, whole, 5), whole)


@pytest.mark.parametrize("dimension", [1, 3])
def test_an_invariant_subspace_ends_the_run(dimension):
    # Coordinates that are exactly zero stay so: nothing but these eigenvalues can be met.
    eigenvalues = np.concatenate([[-3.0, -1, -0.5][:dimension], np.linspace(1, 9, N - dimension)])
    start = np.concatenate([np.full(dimension, dimension**-0.5), np.zeros(N - dimension)])
    run = lanczos(np.diag(eigenvalues), start, N)
    values, weights, beta = tridiagonal_eigh(run)
    assert int(run.steps) == dimension and not bool(run.alive) and beta == 0
    np.testing.assert_allclose(values, eigenvalues[:dimension], atol=1e-13)
    lowest = np.asarray(combination(np.diag(eigenvalues), start, padded(weights[:, 0]), N))
    assert abs(lowest[0]) == pytest.approx(1, abs=1e-12)


def test_zero_and_identity_end_after_one_step():
    for matrix, value in ((0 * MATRIX, 0.0), (7 * np.eye(N), 7.0)):
        run = lanczos(matrix, START, N)
        assert int(run.steps) == 1 and not bool(run.alive)
        assert tridiagonal_eigh(run)[0] == pytest.approx([value])


def test_many_steps_find_the_ends_of_a_large_spectrum(dtype):
    # 300 eigenvalues, 60 steps: orthogonality is long lost in float32, the ends are right all the same.
    eigenvalues = np.concatenate([[-2.0], np.linspace(0, 1, 298), [3.0]]).astype(dtype)
    start = np.random.default_rng(2).normal(size=300)
    start = (start / np.linalg.norm(start)).astype(dtype)
    run = extend_lanczos(lambda v: eigenvalues * v, start_lanczos(jnp.asarray(start), 64), 60)
    values, weights, _ = tridiagonal_eigh(run)
    assert run.current.dtype == dtype
    assert values[[0, -1]] == pytest.approx([-2, 3], abs=100 * float(np.finfo(dtype).eps))
    w = np.zeros(64, dtype)
    w[:60] = weights[:, 0]
    y = np.asarray(ritz_vector(lambda v: eigenvalues * v, jnp.asarray(start), jnp.asarray(w), 60))
    assert abs(y[0]) == pytest.approx(1, abs=1e-5)


# --- the bound of Kuczyński and Woźniakowski ------------------------------------------------------


def test_the_gap_solves_the_bound_for_the_accuracy():
    for n, k, delta in ((100, 12, 0.1), (10**6, 64, 1e-3), (50, 3, 0.5)):
        gap = lanczos_gap(n, k, delta)
        assert 1.648 * np.sqrt(n) * np.exp(-np.sqrt(gap) * (2 * k - 1)) == pytest.approx(delta, rel=1e-12)
    assert lanczos_gap(50, 50, 1e-3) == 0


@pytest.mark.parametrize(("n", "k", "separation"), [(100, 6, 0.1), (100, 12, 0.03)])
def test_the_gap_holds_with_its_probability(n, k, separation):
    # One eigenvalue below a Chebyshev distribution of the rest is nearly the worst case.
    rest = (1 - np.cos(np.pi * (np.arange(n - 1) + 0.5) / (n - 1))) / 2
    eigenvalues = np.concatenate([[0.0], separation + (1 - separation) * rest])
    trials, delta = 2000, 0.1
    starts = np.random.default_rng(0).normal(size=(trials, n))
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    runs = jax.jit(jax.vmap(lambda s: extend_lanczos(lambda v: eigenvalues * v, start_lanczos(s, k), k)))(starts)
    matrices = np.zeros((trials, k, k))
    i = np.arange(k)
    matrices[:, i, i] = runs.diagonal
    matrices[:, i[1:], i[:-1]] = np.asarray(runs.offdiagonal)[:, :-1]  # eigvalsh reads the lower triangle
    errors = np.linalg.eigvalsh(matrices)[:, 0] / (eigenvalues.max() - eigenvalues.min())
    spread = 3 * np.sqrt(delta * (1 - delta) / trials)
    assert np.mean(errors > lanczos_gap(n, k, delta)) <= delta + spread
    # The statement is not empty: half of the gap fails it.
    assert np.mean(errors > lanczos_gap(n, k, delta) / 2) > delta + spread


# --- small dense helpers --------------------------------------------------------------------------


def test_orthonormal_rows_span_the_rows():
    draw = np.random.default_rng(3)
    rows = draw.normal(size=(3, 2)) @ draw.normal(size=(2, 7))  # rank 2
    basis = np.asarray(orthonormal_rows(jnp.asarray(rows), 1e-8))
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-14)
    reference = scipy.linalg.orth(rows.T)
    np.testing.assert_allclose(basis.T @ basis, reference @ reference.T, atol=1e-13)


def test_orthonormal_rows_drop_what_is_below_the_tolerance():
    rows = jnp.diag(jnp.array([1.0, 1e-3, 1e-6]))[:, :3]
    assert [orthonormal_rows(rows, t).shape[0] for t in (1e-2, 1e-4, 1e-7)] == [1, 2, 3]
    assert orthonormal_rows(jnp.zeros((4, 3)), 1e-8).shape == (0, 3)
    assert orthonormal_rows(jnp.zeros((0, 3)), 1e-8).shape == (0, 3)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_dense_is_the_matrix_of_the_map(batch):
    matrix = np.random.default_rng(4).normal(size=(10, 10))  # not symmetric: rows and columns differ
    np.testing.assert_allclose(dense(lambda v: matrix @ v, 10, jnp.float64, batch), matrix, rtol=1e-15)


# ---- leading parts, and linear systems -------------------------------------------------------------

RECTANGLE = np.random.default_rng(3).normal(size=(17, 11))


def test_leading_eigenvector():
    value, vector = jax.jit(lambda start: leading_eigenvector(lambda v: MATRIX @ v, start, N))(START)
    values, vectors = np.linalg.eigh(MATRIX)
    np.testing.assert_allclose(value, values[-1], rtol=1e-12)
    np.testing.assert_allclose(np.abs(vectors[:, -1] @ vector), 1, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-14)


def test_leading_eigenvector_is_the_largest_not_the_farthest_from_zero():
    matrix = symmetric(np.array([-50.0, -20, -3, 0, 1, 2]))
    value, vector = leading_eigenvector(lambda v: matrix @ v, np.ones(6) / np.sqrt(6), 6)
    np.testing.assert_allclose(value, 2, rtol=1e-10)
    np.testing.assert_allclose(matrix @ vector, 2 * vector, atol=1e-8)


def test_leading_eigenvector_of_an_exhausted_krylov_space():
    """Of the identity one step tells all; steps that were not taken must not be taken for eigenvalues."""
    value, vector = leading_eigenvector(lambda v: -3.0 * v, START, 5)
    np.testing.assert_allclose(value, -3, rtol=1e-14)
    np.testing.assert_allclose(vector, START, atol=1e-14)


def test_leading_eigenpairs():
    """The largest ones, although the spectrum reaches as far below zero as above."""
    matrix = symmetric(np.concatenate([[-9.0, -8.5, -7.0], np.linspace(-1, 1, 34), [6.0, 7.5, 10.0]]))
    values, vectors = leading_eigenpairs(lambda block: matrix @ block, 40, 3, jax.random.key(0), np.float64)
    np.testing.assert_allclose(values, [10, 7.5, 6], rtol=1e-10)
    np.testing.assert_allclose(matrix @ np.asarray(vectors), np.asarray(vectors) * [10, 7.5, 6], atol=1e-7)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("tall", [True, False])
def test_leading_svd(tall):
    matrix = RECTANGLE if tall else RECTANGLE.T
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    left, sizes, right = leading_svd(
        lambda block: matrix @ block, lambda block: matrix.T @ block, matrix.shape, 3, jax.random.key(0), np.float64
    )
    np.testing.assert_allclose(sizes, s[:3], rtol=1e-12)
    np.testing.assert_allclose(left * sizes @ right.T, u[:, :3] * s[:3] @ vt[:3], atol=1e-10)
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(right.T @ right, np.eye(3), atol=1e-12)


def test_leading_svd_of_a_large_matrix_with_a_tail():
    """Singular values 0.9^i: 20 sweeps with ten more vectors leave (0.9^11)^40 of the error."""
    generator = np.random.default_rng(4)
    u, v = (np.linalg.qr(generator.normal(size=(n, 60)))[0] for n in (90, 70))
    sizes = 0.9 ** np.arange(60)
    matrix = u * sizes @ v.T
    left, found, right = leading_svd(
        lambda block: matrix @ block, lambda block: matrix.T @ block, (90, 70), 2, jax.random.key(0), np.float64
    )
    np.testing.assert_allclose(found, sizes[:2], rtol=1e-12)
    np.testing.assert_allclose(left * found @ right.T, u[:, :2] * sizes[:2] @ v[:, :2].T, atol=1e-10)


def test_subspace_iteration_from_the_singular_vectors_is_done_at_once():
    u, s, vt = np.linalg.svd(RECTANGLE, full_matrices=False)
    left, sizes, right = subspace_svd(lambda b: RECTANGLE @ b, lambda b: RECTANGLE.T @ b, vt[:4].T, 1)
    np.testing.assert_allclose(sizes, s[:4], rtol=1e-12)
    np.testing.assert_allclose(left * sizes @ right.T, u[:, :4] * s[:4] @ vt[:4], atol=1e-12)


def test_conjugate_gradient():
    positive = symmetric(np.array([0.5, 1, 1, 2, 2, 3, 4, 5, 5, 8, 9, 20.0]))
    b, x0 = np.cos(np.arange(N)), np.sin(np.arange(N))
    residual = b - positive @ x0
    x, steps = conjugate_gradient(lambda v: positive @ v, x0, residual, 1e-12, 100)
    np.testing.assert_allclose(x, np.linalg.solve(positive, b), rtol=1e-10)
    assert int(steps) <= 10  # ten different eigenvalues, up to rounding
    loose, fewer = conjugate_gradient(lambda v: positive @ v, x0, residual, 0.1, 100)
    assert fewer < steps and np.linalg.norm(b - positive @ loose) <= 0.1 * np.linalg.norm(residual)
    assert conjugate_gradient(lambda v: positive @ v, x0, residual, 1e-12, 3)[1] == 3
    there, none = conjugate_gradient(lambda v: positive @ v, x, np.zeros(N), 1e-12, 100)
    assert none == 0 and np.array_equal(there, x)
