"""Sampled entries: products against scipy.sparse, whatever the pattern, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import fallline as fl
from fallline.recovery import PSD, Entries, Factors, Recovery, TwoFactors

RNG = np.random.default_rng(0)
N1, N2, R = 23, 17, 3


def pattern(kind):
    """Rows and columns, in an order of no meaning."""
    if kind == "uniform":
        flat = np.flatnonzero(RNG.random(N1 * N2) < 0.4)
    elif kind == "all":
        flat = np.arange(N1 * N2)
    elif kind == "one":
        flat = np.array([5 * N2 + 2])
    else:  # a full row, a full column, the rest empty
        flat = np.unique(np.concatenate([4 * N2 + np.arange(N2), np.arange(N1) * N2 + 16]))
    return np.divmod(RNG.permutation(flat), N2)


@jax.jit
def products(op, v, left, right):
    """P_Ω(L Rᵀ), E R and Eᵀ L."""
    times, transposed = op.backproject(v)
    return op.mv_product(left, right), times(right), transposed(left)


@pytest.mark.parametrize("kind", ["uniform", "all", "one", "heavy"])
def test_products_are_those_of_scipys_sparse_matrix(x64, kind):
    rows, columns = pattern(kind)
    left, right, v = RNG.standard_normal((N1, R)), RNG.standard_normal((N2, R)), RNG.standard_normal(len(rows))
    op = Entries(rows, columns, (N1, N2))
    sparse = scipy.sparse.csr_matrix((v, (rows, columns)), (N1, N2))
    measured, by_right, by_left = products(op, v, left, right)

    np.testing.assert_allclose(measured, (left @ right.T)[rows, columns], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(by_right, sparse @ right, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(by_left, sparse.T @ left, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(op.adjoint(jnp.asarray(v)), sparse.toarray())


def test_the_adjoint_is_one(x64):
    rows, columns = pattern("uniform")
    op = Entries(rows, columns, (N1, N2))
    left, right, v = RNG.standard_normal((N1, R)), RNG.standard_normal((N2, R)), RNG.standard_normal(len(rows))
    measured, by_right, by_left = products(op, v, left, right)
    np.testing.assert_allclose(np.sum(left * by_right), v @ measured, rtol=1e-13)
    np.testing.assert_allclose(np.sum(right * by_left), v @ measured, rtol=1e-13)


def test_an_operator_made_under_jit_gives_the_same(x64):
    rows, columns = pattern("uniform")
    right, v = RNG.standard_normal((N2, R)), RNG.standard_normal(len(rows))

    @jax.jit
    def product(rows, columns):
        return Entries(rows, columns, (N1, N2)).backproject(v)[0](right)

    sparse = scipy.sparse.csr_matrix((v, (rows, columns)), (N1, N2))
    np.testing.assert_allclose(product(rows, columns), sparse @ right, rtol=1e-13, atol=1e-13)


def test_another_pattern_of_as_many_entries_compiles_nothing(x64):
    traced = []

    @jax.jit
    def product(op, v, right):
        traced.append(1)
        return op.backproject(v)[0](right)

    for _ in range(3):
        rows, columns = np.divmod(RNG.permutation(N1 * N2)[:100], N2)
        product(Entries(rows, columns, (N1, N2)), jnp.ones(100), jnp.ones((N2, R)))
    assert len(traced) == 1


def test_gain_is_the_share_that_is_known_and_exact_in_float32(x32):
    rows, columns = pattern("uniform")
    op = Entries(rows, columns, (N1, N2))
    assert op.count == len(rows)
    assert float(op.gain) == np.float32(len(rows) / (N1 * N2))
    wide = Entries(np.array([0, 99_999]), np.array([5, 299_999]), (100_000, 300_000))
    assert float(wide.gain) == np.float32(2 / 3e10)
    left, right = jnp.ones((100_000, 1)), jnp.ones((300_000, 1))
    np.testing.assert_array_equal(wide.mv_product(left, right), [1, 1])


@pytest.mark.parametrize("psd", [True, False])
def test_gradients_are_finite_differences(x64, psd):
    n2 = N1 if psd else N2
    rows, columns = np.divmod(RNG.permutation(N1 * n2)[:150], n2)
    problem = Recovery(
        Entries(rows, columns, (N1, n2)), jnp.asarray(RNG.standard_normal(150)), PSD(R) if psd else TwoFactors(R)
    )
    draw = [RNG.standard_normal((2, n, R)) for n in (N1, n2)]
    point, direction = (jnp.asarray(draw[0][k]) if psd else Factors(draw[0][k], draw[1][k]) for k in (0, 1))
    value, gradient = jax.jit(lambda x: problem.value(x)), jax.jit(lambda x: problem.value_and_gradient(x)[1])
    h = 1e-5
    forth, back = (jax.tree.map(lambda a, d, s=s: a + s * h * d, point, direction) for s in (1, -1))
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient(point), direction)), strict=True))
    np.testing.assert_allclose(slope, (value(forth) - value(back)) / (2 * h), rtol=1e-8)
    # Second derivatives go through the same sums.
    bent = jax.jvp(gradient, (point,), (direction,))[1]
    sides = gradient(forth), gradient(back)
    for b, p, m in zip(*map(jax.tree.leaves, (bent, *sides)), strict=True):
        np.testing.assert_allclose(b, (p - m) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("rows", "columns", "what"),
    [
        ([0, 1, 0], [2, 1, 2], r"the entry \(0, 2\) 2 times"),
        ([0, 3], [0, 0], "rows: got from 0 to 3"),
        ([0, -1], [0, 0], "rows: got from -1 to 0"),
        ([0, 1], [0, 4], "columns: got from 0 to 4"),
        ([0, 1], [0, 1, 2], "columns: got"),
        ([], [], "no entry"),
        ([0.5], [1.0], "rows: got"),
    ],
)
def test_what_is_no_set_of_entries_is_refused(rows, columns, what):
    as_array = (lambda a: np.array(a)) if rows else (lambda a: np.array(a, int))
    with pytest.raises(fl.InputError, match=what):
        Entries(as_array(rows), as_array(columns), (3, 4))


def test_a_dense_array_that_is_too_large_is_refused():
    op = Entries(np.array([0, 5]), np.array([1, 7]), (100_000, 20_000))
    with pytest.raises(fl.InputError, match=r"a dense 100000 × 20000 array, 8.0 GB"):
        op.adjoint(jnp.ones(2, jnp.float32))
