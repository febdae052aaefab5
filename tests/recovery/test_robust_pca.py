"""Robust PCA against the algorithm in NumPy, with partition for the thresholds, and what its card says of α."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.recovery.robust_pca import RobustPCA, clip_rows, robust_pca, robust_pca_start, row_bound, trim
from fallline.recovery.structures import Factors

D, R = 120, 3
KEY = jax.random.key(0)


def kept_by_hand(a, alpha):
    """Where T_α keeps: among the ⌈αn⌉ largest of the row and of the column."""
    sizes, (n1, n2) = np.abs(a), a.shape
    k_row, k_column = (max(1, math.ceil(round(alpha * n, 9))) for n in (n2, n1))
    rows = np.partition(sizes, n2 - k_row, axis=1)[:, n2 - k_row]
    columns = np.partition(sizes, n1 - k_column, axis=0)[n1 - k_column]
    return (sizes >= rows[:, None]) & (sizes >= columns)


def run_by_hand(y, u, v, alpha, steps, gamma=1.5, mu=math.inf, mask=None, step_size=0.5):
    """Iterates and values in units of σ₁; with a mask, P_Ω and 1/p."""
    seen = np.ones_like(y) if mask is None else mask
    p = seen.mean()
    y = seen * y
    sigma = np.linalg.svd((y - np.where(kept_by_hand(y, p * alpha), y, 0)) / p)[1][0]
    bounds = [math.sqrt(2 * mu * a.shape[1] / len(a)) * np.linalg.norm(a, 2) for a in (u, v)]

    def clip(a, bound):
        return a * np.minimum(1, bound / np.linalg.norm(a, axis=1, keepdims=True))

    u, v = clip(u, bounds[0]), clip(v, bounds[1])
    found = []
    for _ in range(steps + 1):
        off = y - seen * (u @ v.T)
        s = np.where(kept_by_hand(off, p * gamma * alpha), off, 0)
        g, d = (s - off) / p, u.T @ u - v.T @ v
        found.append((u, v, s, (p * (g**2).sum() / 2 + (d**2).sum() / 8) / sigma))
        u, v = (
            clip(u - step_size / sigma * (g @ v + u @ d / 2), bounds[0]),
            clip(v - step_size / sigma * (g.T @ u - v @ d / 2), bounds[1]),
        )
    return found


def regular_errors(rng, n, count):
    """A pattern with exactly `count` entries in each row and each column."""
    offsets = rng.permutation(n)[:count]
    pattern = np.isin((np.arange(n)[:, None] - np.arange(n)) % n, offsets)
    return pattern[rng.permutation(n)][:, rng.permutation(n)]


def instance(scale=1.0, share=0.1, seed=0):
    """M, and Y with errors uniform on ±5r/d times a scale."""
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((2, D, R)) / math.sqrt(D)
    errors = scale * rng.uniform(-5 * R / D, 5 * R / D, (D, D))
    return u @ v.T, u @ v.T + regular_errors(rng, D, round(share * D)) * errors


def rectangle():
    rng = np.random.default_rng(4)
    low_rank = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 20))
    y = low_rank + 9 * (rng.random((30, 20)) < 0.05) * rng.standard_normal((30, 20))
    return y, (rng.random((30, 20)) < 0.8), Factors(rng.standard_normal((30, 2)), rng.standard_normal((20, 2)))


def error(m, low_rank):
    return np.linalg.norm(low_rank - m) / np.linalg.norm(m)


def solve(y, alpha, steps=300, dtype=np.float64, **options):
    problem = RobustPCA(y.astype(dtype), R, alpha)
    solution = fl.minimize(problem, robust_pca_start(problem, KEY), robust_pca(**options), steps=steps)
    return problem, solution


# ---- the sparse estimator -------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.15, 0.3, 0.99])
def test_trim_is_the_k_th_largest_of_row_and_column(x64, alpha):
    a = np.random.default_rng(0).standard_normal((30, 20))
    np.testing.assert_array_equal(trim(jnp.asarray(a), alpha), kept_by_hand(a, alpha))


def test_trim_counts_as_written_whatever_the_rounding(x32):
    a = jnp.asarray(np.random.default_rng(0).standard_normal((1, 300)), jnp.float32)
    for alpha, count in ((0.1, 30), (1.5 * 0.1, 45), (0.101, 31), (1e-5, 1)):
        per_row = trim(jnp.tile(a, (2, 1)), jnp.float32(alpha))  # in two equal rows every column ties
        assert int(per_row[0].sum()) == count


def test_trim_keeps_ties_and_needs_both_tests(x64):
    tied = np.array([[2.0, -2.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(trim(jnp.asarray(tied), 0.25), kept_by_hand(tied, 0.25))
    assert int(trim(jnp.asarray(tied), 0.25)[0].sum()) == 2  # the column test takes the −2, beside the 3
    column = np.zeros((20, 20))
    column[:, 4] = np.arange(1.0, 21.0)  # dense: every entry is the largest of its row
    assert int(trim(jnp.asarray(column), 0.1)[:, 4].sum()) == 2


# ---- the algorithm --------------------------------------------------------------------------------


def test_start_is_the_svd_of_the_trimmed_matrix(x64):
    _, y = instance()
    problem = RobustPCA(y, R, 0.1)
    left, values, right = np.linalg.svd(y - np.where(kept_by_hand(y, 0.1), y, 0))
    x = robust_pca_start(problem, KEY)
    np.testing.assert_allclose(x.left @ x.right.T, left[:, :R] * values[:R] @ right[:R], atol=1e-9)
    np.testing.assert_allclose(x.left.T @ x.left, x.right.T @ x.right, atol=1e-9)
    np.testing.assert_allclose(problem.unit, values[0], rtol=1e-9)


@pytest.mark.parametrize(("mu", "partial"), [(math.inf, False), (0.8, False), (math.inf, True)])
def test_iterates_are_the_papers(x64, mu, partial):
    y, seen, x0 = rectangle()
    problem = RobustPCA(y, 2, 0.1, observed=seen if partial else None)
    steps = 12
    solver = robust_pca(0.4, incoherence=mu)
    solution = fl.minimize(problem, x0, solver, steps=steps)
    by_hand = run_by_hand(y, *x0, 0.1, steps, mu=mu, mask=seen.astype(float) if partial else None, step_size=0.4)
    np.testing.assert_allclose(solution.x.left, by_hand[-1][0], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(solution.x.right, by_hand[-1][1], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(solution.history["value"], [found[3] for found in by_hand], rtol=1e-8)
    np.testing.assert_allclose(problem.parts(solution.x)[1], by_hand[-1][2], rtol=1e-8, atol=1e-10)
    if mu < 1:  # the bound is felt
        assert np.any(np.linalg.norm(x0.left, axis=1) > 1.05 * row_bound(x0.left, mu))


def test_gradient_is_that_of_the_value_while_the_errors_stay(x64):
    y, seen, x0 = rectangle()
    problem = RobustPCA(y, 2, 0.1, observed=seen)
    value, h = eqx.filter_jit(lambda problem, x: problem.value(x)), 1e-6
    gradient = eqx.filter_jit(lambda problem, x: problem.gradient(x))(problem, x0)
    along = Factors(*(np.cos(np.arange(a.size)).reshape(a.shape) for a in x0))
    ends = [value(problem, jax.tree.map(lambda a, b, s=s: a + s * h * b, x0, along)) for s in (1, -1)]
    slope = sum(float(np.vdot(g, a)) for g, a in zip(gradient, along, strict=True))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-6)


def test_clipped_rows_keep_their_direction(x64):
    x = Factors(jnp.asarray([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), jnp.ones((2, 2)))
    clipped = clip_rows(x, Factors(jnp.asarray(1.0), jnp.asarray(jnp.inf)))
    np.testing.assert_allclose(clipped.left, [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], rtol=1e-15)
    np.testing.assert_array_equal(clipped.right, x.right)


# ---- what it recovers -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_recovers_whatever_the_size_of_the_errors(x64, scale):
    m, y = instance(scale)
    problem, solution = solve(y, 0.1)
    low_rank, sparse = problem.parts(solution.x)
    assert solution.status.converged and error(m, low_rank) <= 1e-7
    assert np.max(np.abs(sparse - (y - m))) <= 1e-7  # entries that are no errors are as small as the misfit
    assert float(problem.distance(solution.x, Factors(m, np.eye(D)))) <= 1e-7


def test_alpha_must_fit(x64):
    m, y = instance()
    errors = {alpha: error(m, solve(y, alpha)[0].parts(solve(y, alpha)[1].x)[0]) for alpha in (0.03, 0.1, 0.15, 0.5)}
    assert errors[0.1] <= 1e-7 and errors[0.15] <= 1e-4
    assert errors[0.03] >= 0.01 and errors[0.5] >= 0.01


def test_one_row_with_too_many_errors_spoils_the_start(x64):
    m, y = instance(100.0)
    y = y.copy()
    y[7, : round(0.4 * D)] += 100.0
    problem, solution = solve(y, 0.1)
    assert error(m, problem.parts(solution.x)[0]) >= 0.1


def test_recovers_from_some_of_the_entries_in_single_precision(x32):
    m, y = instance()
    seen = np.random.default_rng(5).random((D, D)) < 0.7
    problem = RobustPCA(np.where(seen, y, np.nan).astype(np.float32), R, 0.15, observed=seen)
    solution = fl.minimize(problem, robust_pca_start(problem, KEY), robust_pca(), steps=500)
    low_rank, sparse = problem.parts(solution.x)
    assert solution.status.converged and solution.x.left.dtype == np.float32  # the tolerance is not below its rounding
    assert error(m, low_rank) <= 2e-5
    assert np.all(sparse[~seen] == 0)


def test_any_optimizer_runs_on_the_problem(x64):
    import optax

    m, y = instance()
    problem = RobustPCA(y, R, 0.1)
    plain = fl.optimizer(optax.sgd, learning_rate=0.5)
    solution = fl.minimize(problem, robust_pca_start(problem, KEY), plain, steps=40, stop=None)
    ours = solve(y, 0.1, steps=40)[1]
    np.testing.assert_allclose(solution.x.left, ours.x.left, rtol=1e-9, atol=1e-12)


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, "alpha: got 0.0; expected a finite number above 0"),
        ({"alpha": 1.0}, "alpha: got 1.0; expected a number above 0 and below 1"),
        ({"gamma": 1.0}, "gamma: got 1.0; expected a number above 1"),
        ({"alpha": 0.8}, "gamma: got 1.5; expected at most 1 / alpha = 1.25"),
        ({"rank": 9}, "rank: got 9; expected at most the smaller dimension, 6"),
        ({"rank": 0}, "rank: got 0; expected a whole number of at least 1"),
        ({"y": np.full((8, 6), np.nan, np.float32)}, "y: got nan at [0, 0]; expected finite numbers"),
        ({"y": np.ones(8, np.float32)}, "y: got float32[8]; expected a matrix"),
        ({"observed": np.ones((8, 5), bool)}, "observed: got bool[8,5]; expected booleans of the shape of y, (8, 6)"),
        ({"observed": np.ones((8, 6), np.float32)}, "observed: got float32[8,6]; expected booleans"),
        ({"observed": np.zeros((8, 6), bool)}, "observed: got no entry; expected at least one"),
    ],
)
def test_bad_problems_are_refused(x32, change, message):
    y = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    options = {"y": y, "rank": 2, "alpha": 0.1, **change}
    with pytest.raises(fl.InputError) as refusal:
        RobustPCA(**options)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("options", [{"step_size": 0.0}, {"incoherence": 0.0}, {"tolerance": -1.0}])
def test_bad_numbers_are_refused(options):
    with pytest.raises(fl.InputError, match=next(iter(options))):
        robust_pca(**options)
