"""Thresholds of the largest entries against NumPy's partition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.parts.selection import threshold_of_largest

find = jax.jit(threshold_of_largest, static_argnames="axis")


def at_least_the_kth(a, k, axis):
    """Entries of magnitude at least the k-th largest of their line, by sorting."""
    sizes = np.sort(np.abs(np.asarray(a, np.float64)), axis=axis)
    kth = np.take(sizes, [sizes.shape[axis] - k], axis=axis)
    return np.abs(np.asarray(a, np.float64)) >= kth


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_the_k_largest(dtype, axis, k):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((12, 12)) * 10.0 ** rng.integers(-30, 30, (12, 12))
    a = jnp.asarray(a, dtype)
    t = find(a, k, axis)
    assert t.dtype == a.dtype
    np.testing.assert_array_equal(np.abs(a) >= t, at_least_the_kth(a, k, axis))
    np.testing.assert_array_equal(np.sum(np.abs(a) >= t, axis=axis), k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_are_all_kept(x32, dtype):
    a = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (12, 12)), dtype)  # many zeros, too
    for k in (1, 2, 7, 12):
        np.testing.assert_array_equal(np.abs(a) >= find(a, k, 1), at_least_the_kth(a, k, 1))


def test_zeros_and_more_than_there_are(x32):
    assert np.all(find(jnp.zeros((12, 12)), 3, 0) == 0)
    a = jnp.asarray(np.random.default_rng(2).standard_normal((12, 12)), jnp.float32)
    assert np.all(np.abs(a) >= find(a, 13, 1))


def test_nan_and_infinity_are_the_largest(x32):
    a = jnp.asarray([[1.0, -jnp.inf, 0.5, 2.0], [jnp.nan, 3.0, 1.0, 2.0]])
    t = threshold_of_largest(a, 2, 1)
    np.testing.assert_array_equal(~(np.abs(a) < t), [[False, True, False, True], [True, True, False, False]])


def test_lanes_of_a_batch_are_independent(x64):
    a = jnp.asarray(np.random.default_rng(3).standard_normal((3, 5, 8)))
    batched = jax.vmap(lambda a: threshold_of_largest(a, 3, 1))(a)
    np.testing.assert_array_equal(batched, jnp.stack([find(lane, 3, 1) for lane in a]))
