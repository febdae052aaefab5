"""The statistics of claims against sums of binomials and against linear algebra."""

from math import comb

import numpy as np
import pytest

from fallline.claims.statistics import binomial_interval, fit_line


def at_least(k, n, p):
    """The probability of at least k successes in n trials, as a sum."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize("confidence", [0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 5), (3, 10), (19, 20), (12, 12), (50, 100)])
def test_clopper_and_pearson_solve_their_equations(k, n, confidence):
    low, high = binomial_interval(k, n, confidence)
    tail = (1 - confidence) / 2
    assert low == 0 if k == 0 else at_least(k, n, low) == pytest.approx(tail, rel=1e-9)
    assert high == 1 if k == n else 1 - at_least(k + 1, n, high) == pytest.approx(tail, rel=1e-9)
    assert low <= k / n <= high


def test_all_of_n_successes_in_closed_form():
    # (α/2)^(1/n): 36 of 36 is the first whose interval at 95% lies above 0.9.
    assert binomial_interval(36, 36)[0] == pytest.approx(0.025 ** (1 / 36), rel=1e-12)
    assert binomial_interval(35, 35)[0] < 0.9 < binomial_interval(36, 36)[0]


def test_a_line_is_fitted_as_by_the_normal_equations():
    generator = np.random.default_rng(0)
    x = generator.standard_normal(12)
    y = 3 - 2 * x + 0.1 * generator.standard_normal(12)
    design = np.stack([np.ones(12), x], axis=1)
    (intercept, slope), residual = np.linalg.lstsq(design, y)[:2]
    error = np.sqrt(residual[0] / 10 * np.linalg.inv(design.T @ design)[1, 1])
    line = fit_line(x, y)
    assert (line.slope, line.intercept) == (pytest.approx(slope, rel=1e-12), pytest.approx(intercept, rel=1e-12))
    assert line.slope_error == pytest.approx(error, rel=1e-10)
    assert line.r_squared == pytest.approx(1 - residual[0] / np.sum((y - y.mean()) ** 2), rel=1e-10)
