"""Matrix completion against dense masks in NumPy, least squares row by row, and what the card calls exact."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse

import fallline as fl
from fallline.recovery import Entries, Factors, Recovery, TwoFactors
from fallline.recovery.completion_least_squares import completion_least_squares
from fallline.recovery.matrix_completion import (
    METHODS,
    completion_problem,
    matrix_completion,
    observed,
    trimmed_spectral,
)

RNG = np.random.default_rng(0)
N1, N2, R = 60, 45, 2
LEFT, RIGHT = RNG.standard_normal((N1, R)), RNG.standard_normal((N2, R))
TRUTH = LEFT @ RIGHT.T
COUNT = 1200


def sample(sure=(), never=()):
    """A mask of as many entries as every other, with all of some rows and nothing of others."""
    order = np.random.default_rng(1).random((N1, N2))  # the same whichever tests ran before
    order[list(sure)] -= 1
    order[list(never)] += 1
    return order <= np.sort(order, axis=None)[COUNT - 1]


MASK = sample()
ROWS, COLUMNS = np.nonzero(MASK)
DATA = (ROWS, COLUMNS, TRUTH[ROWS, COLUMNS], (N1, N2), R)
SHARE = MASK.mean()

SQUARE = LEFT @ LEFT.T
UPPER = np.triu(RNG.random((N1, N1)) < 0.5)
BOTH = UPPER | UPPER.T


def top(matrix):
    """σ₁, and the balanced factors of the leading part."""
    u, s, vt = np.linalg.svd(matrix)
    return s[0], u[:, :R] * np.sqrt(s[:R]), vt[:R].T * np.sqrt(s[:R])


def error(x, truth):
    left, right = x if isinstance(x, Factors) else (x, x)
    return np.linalg.norm(np.asarray(left) @ np.asarray(right).T - truth) / np.linalg.norm(truth)


def test_the_start_is_the_truncated_svd_of_the_dense_masked_matrix(x64):
    sigma, left, right = top(MASK * TRUTH / SHARE)
    problem = completion_problem(*DATA)
    start = trimmed_spectral(problem, jax.random.key(0))
    np.testing.assert_allclose(start.left @ start.right.T, left @ right.T, atol=1e-6 * sigma)
    np.testing.assert_allclose(problem.unit, sigma, rtol=1e-8)


def test_gradient_descent_is_the_papers_with_a_dense_mask(x64):
    sigma, left, right = top(MASK * TRUTH / SHARE)
    start, rate, balance = Factors(jnp.asarray(left), jnp.asarray(right)), 0.3, 0.7
    for _ in range(5):
        e, b = MASK * (left @ right.T - TRUTH) / SHARE, left.T @ left - right.T @ right
        steps = e @ right + balance / 2 * left @ b, e.T @ left - balance / 2 * right @ b
        left, right = (f - rate / sigma * d for f, d in zip((left, right), steps, strict=True))
    found = matrix_completion(*DATA, init=start, step_size=rate, balance=balance, steps=5, stop=None)
    np.testing.assert_allclose(found.x.left, left, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.x.right, right, rtol=1e-7, atol=1e-9)
    e, b = MASK * (left @ right.T - TRUTH), left.T @ left - right.T @ right
    value = (np.sum(e**2) / (2 * SHARE) + balance / 8 * np.sum(b**2)) / sigma
    np.testing.assert_allclose(found.value, value, rtol=1e-7)


def test_symmetric_gradient_descent_mirrors_and_counts_once(x64):
    share = BOTH.mean()
    sigma = np.linalg.eigvalsh(BOTH * SQUARE / share)[-1]
    x = start = LEFT + 0.1 * RNG.standard_normal(LEFT.shape)
    for _ in range(5):
        x = x - 0.2 / sigma * (BOTH * (x @ x.T - SQUARE) / share) @ x
    i, j = np.nonzero(BOTH)
    a, b = np.nonzero(UPPER)
    for rows, columns in ((i, j), (a, b), (b, a)):  # both triangles, the upper one, the lower one
        problem = completion_problem(rows, columns, SQUARE[rows, columns], (N1, N1), R, psd=True)
        np.testing.assert_allclose(problem.gain, share, rtol=1e-12)
        found = matrix_completion(
            rows, columns, SQUARE[rows, columns], (N1, N1), R, psd=True, init=jnp.asarray(start), steps=5, stop=None
        )
        np.testing.assert_allclose(found.x, x, rtol=1e-7, atol=1e-9)


def test_projected_gradient_descent_clips_rows(x64):
    sigma, left, right = top(MASK * TRUTH / SHARE)
    start, mu = Factors(jnp.asarray(left), jnp.asarray(right)), 1.05
    most = [np.sqrt(2 * mu * R / len(f)) * np.linalg.norm(f, 2) for f in (left, right)]
    clipped = 0
    for _ in range(4):
        e, b = MASK * (left @ right.T - TRUTH) / SHARE, left.T @ left - right.T @ right
        moved = (
            left - 0.5 / sigma * (e @ right + 0.25 * left @ b),
            right - 0.5 / sigma * (e.T @ left - 0.25 * right @ b),
        )
        lengths = [np.linalg.norm(f, axis=1, keepdims=True) for f in moved]
        clipped += sum(int(np.sum(n > c)) for n, c in zip(lengths, most, strict=True))
        left, right = (f * np.minimum(1, c / n) for f, n, c in zip(moved, lengths, most, strict=True))
    assert clipped > 0
    found = matrix_completion(*DATA, method="projected_gradient", init=start, incoherence=mu, steps=4, stop=None)
    np.testing.assert_allclose(found.x.left, left, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.x.right, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_alternating_least_squares_is_least_squares_row_by_row(x64, ridge):
    noisy = TRUTH + 0.1 * RNG.standard_normal(TRUTH.shape)
    right = RNG.standard_normal((N2, R))
    start = Factors(jnp.zeros((N1, R)), jnp.asarray(right))
    pads = np.sqrt(ridge) * np.eye(R), np.zeros(R)

    def solved(other, matrix, mask):
        rows = []
        for values, known in zip(matrix, mask, strict=True):
            system, targets = np.vstack([other[known], pads[0]]), np.concatenate([values[known], pads[1]])
            rows.append(np.linalg.lstsq(system, targets)[0])
        return np.array(rows)

    for _ in range(2):
        left = solved(right, noisy, MASK)
        right = solved(left, noisy.T, MASK.T)
    found = matrix_completion(
        ROWS, COLUMNS, noisy[ROWS, COLUMNS], (N1, N2), R,
        method="alternating_least_squares", ridge=ridge, init=start, steps=2, stop=None,
    )  # fmt: skip
    np.testing.assert_allclose(found.x.left, left, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.x.right, right, rtol=1e-9, atol=1e-11)

    gaps = MASK * (left @ right.T - noisy)
    scale = SHARE * np.linalg.svd(MASK * noisy / SHARE)[1][0]
    value = (np.sum(gaps**2) + ridge * (np.sum(left**2) + np.sum(right**2))) / 2
    slopes = gaps @ right + ridge * left, gaps.T @ left + ridge * right
    np.testing.assert_allclose(found.value, value / scale, rtol=1e-7)
    np.testing.assert_allclose(found.gradient_norm, np.hypot(*map(np.linalg.norm, slopes)) / scale, rtol=1e-7)
    values = found.history["value"]
    assert np.all(np.diff(values[1:]) <= 1e-12 * values[1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_completes_the_matrix(x64, method):
    wants_more = method == "singular_value_projection"
    with pytest.warns(UserWarning, match="wants at least 10 times") if wants_more else nullcontext():
        found = matrix_completion(*DATA, method=method, steps=2000)
    assert found.status.converged and error(found.x, TRUTH) < 1e-6


@pytest.mark.parametrize("method", ["gradient", "projected_gradient", "scaled_gradient"])
def test_every_symmetric_method_completes_the_matrix(x64, method):
    i, j = np.nonzero(UPPER)
    found = matrix_completion(i, j, SQUARE[i, j], (N1, N1), R, psd=True, method=method, steps=2000)
    assert found.status.converged and error(found.x, SQUARE) < 1e-6


def test_any_solver_and_a_random_start(x64):
    found = matrix_completion(*DATA, method=fl.optimizer(optax.lbfgs), init="random", key=1)
    assert found.status.converged and error(found.x, TRUTH) < 1e-6


def test_float32_stays_float32(x32):
    data = (ROWS, COLUMNS, TRUTH[ROWS, COLUMNS].astype(np.float32), (N1, N2), R)
    found = matrix_completion(*data, method="alternating_least_squares", steps=20, stop=None)
    assert found.x.left.dtype == np.float32 and error(found.x, TRUTH) < 1e-5


def test_a_heavy_row_is_left_out_of_the_start_and_found_all_the_same(x64):
    mask = sample(sure=[7])
    big = TRUTH.copy()
    big[7] *= 10
    i, j = np.nonzero(mask)
    assert mask[7].sum() == N2 > 2 * len(i) / N1
    trimmed = mask.copy()
    trimmed[7] = False
    problem = completion_problem(i, j, big[i, j], (N1, N2), R)
    sigma, left, right = top(trimmed * big / mask.mean())
    start = trimmed_spectral(problem, jax.random.key(0))
    np.testing.assert_allclose(start.left @ start.right.T, left @ right.T, atol=1e-5 * sigma)
    np.testing.assert_allclose(start.left[7], 0, atol=1e-10)
    found = matrix_completion(i, j, big[i, j], (N1, N2), R, method="alternating_least_squares")
    assert error(found.x, big) < 1e-6


def test_observed_takes_nan_as_missing_and_zeros_as_known(x64):
    dense = np.where(MASK, TRUTH, np.nan)
    rows, columns, values, shape = observed(dense)
    np.testing.assert_array_equal(np.stack([rows, columns]), np.stack([ROWS, COLUMNS]))
    np.testing.assert_array_equal(values, DATA[2])
    assert shape == (N1, N2)
    stored = scipy.sparse.coo_array((np.array([0.0, 2.0]), (np.array([1, 0]), np.array([3, 2]))), (2, 5))
    rows, columns, values, shape = observed(stored.tocsr())
    assert set(zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)) == {(1, 3, 0.0), (0, 2, 2.0)}
    assert shape == (2, 5)
    with pytest.raises(fl.InputError, match="matrix"):
        observed(np.arange(6).reshape(2, 3))


def changed(**other):
    names = ("rows", "columns", "values", "shape", "rank")
    return {**dict(zip(names, DATA, strict=True)), **other}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"values": np.where(np.arange(len(ROWS)) == 3, np.nan, DATA[2])}, r"values: got nan at the entry \(0, "),
        ({"values": DATA[2].astype(int)}, "values"),
        ({"values": DATA[2][1:]}, "values"),
        ({"rows": np.append(ROWS[:-1], N1)}, "rows: got from 0 to 60"),
        ({"rows": np.append(ROWS[:-1], ROWS[0]), "columns": np.append(COLUMNS[:-1], COLUMNS[0])}, "2 times"),
        ({"rank": 46}, "rank: got 46"),
        ({"rank": 0}, "rank"),
        ({"method": "gradiant"}, "did you mean 'gradient'"),
        ({"ridge": -1.0}, "ridge"),
        ({"step_size": 0.0}, "step_size"),
        ({"method": "projected_gradient", "incoherence": 0.0}, "incoherence"),
        ({"psd": True, "values": np.ones(len(ROWS))}, "square"),
        ({"psd": True, "method": "alternating_least_squares"}, "psd"),
        ({"init": "nowhere"}, "init"),
    ],
)
def test_what_cannot_be_used_is_refused(x64, other, what):
    with pytest.raises(fl.InputError, match=what):
        matrix_completion(**changed(**other))


def test_symmetric_entries_that_differ_are_refused(x64):
    i, j = np.nonzero(BOTH)
    values = SQUARE[i, j]
    values[i > j] += 1
    with pytest.raises(fl.InputError, match="different ones at"):
        matrix_completion(i, j, values, (N1, N1), R, psd=True)


def test_an_empty_row_and_too_few_entries_warn_and_a_thin_row_wants_a_ridge(x64):
    i, j = np.nonzero(sample(never=[11]))
    with pytest.warns(UserWarning, match=r"1 rows without an entry \(the first is 11\)"):
        completion_problem(i, j, TRUTH[i, j], (N1, N2), R)
    with (
        pytest.warns(UserWarning, match="without an entry"),
        pytest.raises(fl.InputError, match="ridge: got 0 with 0 entries"),
    ):
        matrix_completion(i, j, TRUTH[i, j], (N1, N2), R, method="alternating_least_squares")
    with pytest.warns(UserWarning, match="without an entry"):
        found = matrix_completion(
            i, j, TRUTH[i, j], (N1, N2), R, method="alternating_least_squares", ridge=1e-3, steps=20, stop=None
        )
    np.testing.assert_array_equal(found.x.left[11], 0)
    with pytest.warns(UserWarning, match="1200 entries are 1.1 times the 1116 degrees of freedom"):
        completion_problem(ROWS, COLUMNS, DATA[2], (N1, N2), 12)


def test_the_solver_wants_entries_and_two_factors(x64):
    dense = Recovery(jnp.ones((5, N1 * N2)).at[:, 0].set(2.0), jnp.ones(5))
    with pytest.raises(fl.InputError, match="Entries"):
        fl.minimize(dense, jnp.ones(N1 * N2), completion_least_squares(), steps=1)
    psd = Recovery(Entries(np.array([0, 1]), np.array([1, 0]), (3, 3)), jnp.ones(2), TwoFactors(1))
    with pytest.raises(fl.InputError, match="ridge"):
        fl.minimize(psd, Factors(jnp.ones((3, 1)), jnp.ones((3, 1))), completion_least_squares(-1.0), steps=1)
