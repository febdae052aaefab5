"""Random points: the law of the radius, isotropy, and what counts as a coordinate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fallline.parts.sampling import uniform_ball, unit_vector

pytestmark = pytest.mark.usefixtures("x64")

TRIALS = 4000
KEYS = jax.random.split(jax.random.key(0), TRIALS)


def coordinates(tree):
    """Real coordinates of a batch of points, shape (trials, n)."""
    parts = []
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        parts += [leaf.real, leaf.imag] if np.iscomplexobj(leaf) else [leaf]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1).astype(np.float64)


LIKE = {
    "one real": (np.zeros(1), 1),
    "three real": (np.zeros(3), 3),
    "two complex": (np.zeros(2, complex), 4),
    "a tree": ({"a": np.zeros((2, 2)), "b": np.zeros((), complex), "c": np.zeros(1, np.float32)}, 7),
}


@pytest.mark.parametrize("case", LIKE)
def test_points_are_uniform_in_the_ball(case):
    like, n = LIKE[case]
    radius = 2.5
    points = coordinates(jax.jit(jax.vmap(lambda key: uniform_ball(key, like, radius)))(KEYS))
    assert points.shape == (TRIALS, n)
    lengths = np.linalg.norm(points, axis=1)
    assert lengths.max() <= radius * (1 + 1e-6)
    # P(‖x‖ ≤ s) = (s/r)^n, and nothing else: neighbouring dimensions fail the same test.
    assert scipy.stats.kstest(lengths / radius, lambda s: s**n).pvalue > 0.01
    for wrong in (n / 2, n + 1):
        assert scipy.stats.kstest(lengths / radius, lambda s, m=wrong: s**m).pvalue < 1e-6
    # E[x] = 0 and E[xxᵀ] = r²/(n + 2) I, each within 5 standard deviations.
    variance = radius**2 / (n + 2)
    assert np.all(np.abs(points.mean(0)) < 5 * np.sqrt(variance / TRIALS))
    assert np.all(np.abs(points.T @ points / TRIALS - variance * np.eye(n)) < 5 * 2 * variance / np.sqrt(TRIALS))


def test_the_direction_does_not_depend_on_the_length():
    points = coordinates(jax.jit(jax.vmap(lambda key: uniform_ball(key, np.zeros(3), 1.0)))(KEYS))
    lengths = np.linalg.norm(points, axis=1)
    correlation = np.corrcoef(lengths, points[:, 0] / lengths)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(TRIALS)


def test_shapes_and_types_are_kept():
    like = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(2, jnp.complex64), "c": jnp.zeros((), jnp.float32)}
    point = uniform_ball(jax.random.key(0), like, 1.0)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), point) == jax.tree.map(lambda a: (a.shape, a.dtype), like)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(point))


def test_the_radius_scales_the_point_and_the_key_decides_it():
    key = jax.random.key(5)
    small, large = (uniform_ball(key, np.zeros(4), r) for r in (1e-12, 1.0))
    np.testing.assert_allclose(small, 1e-12 * np.asarray(large), rtol=1e-14)
    assert not np.any(uniform_ball(key, np.zeros(4), 0.0))
    assert not np.array_equal(large, uniform_ball(jax.random.key(6), np.zeros(4), 1.0))


def test_unit_vectors_are_uniform_on_the_sphere(dtype):
    vectors = np.asarray(jax.jit(jax.vmap(lambda key: unit_vector(key, 3, dtype)))(KEYS))
    assert vectors.dtype == dtype
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=4 * np.finfo(dtype).eps)
    # Archimedes: on the sphere in three dimensions each coordinate is uniform on [−1, 1].
    for column in vectors.T.astype(np.float64):
        assert scipy.stats.kstest(column, "uniform", args=(-1, 2)).pvalue > 0.01


def test_a_unit_vector_on_the_line_has_both_signs():
    signs = np.asarray(jax.vmap(lambda key: unit_vector(key, 1, jnp.float64))(KEYS))
    assert set(signs.ravel()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / np.sqrt(TRIALS)
