"""Order statistics by networks, against NumPy's sort."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.parts.sorting import median, network, order_statistics, trimmed_mean


@pytest.mark.parametrize("n", range(1, 12))
def test_the_network_sorts_every_pattern_of_zeros_and_ones(n):
    """Knuth's principle: what sorts these sorts everything."""
    rows = np.array(list(itertools.product([0, 1], repeat=n))).T.copy()
    for i, j in network(n):
        assert i < j
        rows[[i, j]] = np.minimum(rows[i], rows[j]), np.maximum(rows[i], rows[j])
    assert np.all(np.diff(rows, axis=0) >= 0)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 20, 33])
def test_each_rank_is_that_of_numpy(n):
    x = np.random.default_rng(n).integers(0, 6, (n, 500)).astype(np.float32)  # with ties
    ordered = np.sort(x, axis=0)
    for ranks in ([0], [n - 1], [n // 2, 0], list(range(n))):
        found = order_statistics([jnp.asarray(row) for row in x], ranks)
        np.testing.assert_array_equal(np.stack(found), ordered[ranks])


@pytest.mark.parametrize("n", [1, 2, 5, 8, 31, 32])
def test_median_and_trimmed_mean(n, dtype):
    x = np.random.default_rng(n).normal(size=(n, 3, 40)).astype(dtype)
    found = median(jnp.asarray(x))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.median(x, axis=0), rtol=1e-6)
    for cut in {0, (n - 1) // 2, n // 4}:
        expected = np.sort(x, axis=0)[cut : n - cut].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(trimmed_mean(jnp.asarray(x), cut), expected, rtol=1e-5, atol=1e-6)


def test_infinities_and_nan_are_the_largest():
    x = np.array([[np.nan, 1.0], [2.0, np.inf], [-np.inf, 3.0], [5.0, np.nan], [4.0, -1.0]])
    found = order_statistics([jnp.asarray(row) for row in x], range(5))
    np.testing.assert_array_equal(np.stack(found), np.sort(x, axis=0).astype(np.float32))
    np.testing.assert_array_equal(median(jnp.asarray(x)), [4.0, 3.0])


def test_a_median_compares_less_than_a_sort():
    """What no wanted rank depends on is left out: counted in the program."""

    def taken(ranks, **options):
        """Minima and maxima: two for a comparison of which both results are wanted."""
        made = jax.make_jaxpr(lambda rows: order_statistics(list(rows), ranks, **options))(jnp.zeros((32, 4)))
        return sum(equation.primitive.name in ("min", "max") for equation in made.jaxpr.eqns)

    assert taken(range(32)) == 2 * len(network(32)) == 2 * 191
    assert taken([15, 16]) < 2 * 157
    assert taken([0]) == 31
    assert taken(range(32), as_set=True) == 0
    assert taken(range(8, 24), as_set=True) < taken(range(8, 24)) < 2 * 191


@pytest.mark.parametrize(("n", "first", "last"), [(5, 1, 4), (8, 2, 6), (20, 5, 15), (33, 16, 17), (33, 3, 30)])
def test_a_set_of_ranks_has_the_entries_of_these_ranks(n, first, last):
    x = np.random.default_rng(n).integers(-6, 6, (n, 300)).astype(np.float32)
    found = order_statistics([jnp.asarray(row) for row in x], range(first, last), as_set=True)
    np.testing.assert_array_equal(np.sort(np.stack(found), axis=0), np.sort(x, axis=0)[first:last])


@pytest.mark.parametrize("cut", [-1, 2, 3, 0.5])
def test_bad_cuts(cut):
    with pytest.raises(InputError, match="cut"):
        trimmed_mean(jnp.ones((4, 2)), cut)
