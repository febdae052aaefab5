"""The k-means problem, Lloyd's algorithm and k-means++ against NumPy, scikit-learn and the exact law of the seeds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare
from sklearn.cluster import KMeans as ScikitKMeans

import fallline as fl
from fallline.clustering.k_means import KMeans, assign, k_means_plus_plus, lloyd
from fallline.clustering.power_k_means import power_k_means

RNG = np.random.default_rng(0)
POINTS = RNG.standard_normal((60, 3)) + 2 * RNG.integers(0, 2, (60, 3))
START = POINTS[[3, 17, 29, 51]]


def distances(points, centers):
    return ((points[:, None] - centers) ** 2).sum(axis=2)


def lloyd_by_hand(points, centers, steps):
    """The centers after each step; one without points stays."""
    found = [centers]
    for _ in range(steps):
        labels = distances(points, centers).argmin(axis=1)
        own = [points[labels == j] for j in range(len(centers))]
        centers = np.array([own[j].mean(axis=0) if len(own[j]) else centers[j] for j in range(len(centers))])
        found.append(centers)
    return np.array(found)


def run(points, start, **kwargs):
    return fl.minimize(KMeans(points), start, lloyd(), **kwargs)


# ---- the problem --------------------------------------------------------------------------------


def test_value_and_gradient_by_hand(dtype):
    points, x = POINTS.astype(dtype), START.astype(dtype) + dtype.type(0.3)
    value, gradient = KMeans(points).value_and_gradient(x)
    labels = distances(points, x).argmin(axis=1)
    expected = [2 * (x[j] - points[labels == j]).sum(axis=0) for j in range(4)]
    rtol = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(value, distances(points, x).min(axis=1).sum(), rtol=rtol)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=100 * rtol)
    np.testing.assert_allclose(KMeans(points).value(x), value, rtol=rtol)
    assert value.dtype == gradient.dtype == dtype


def test_gradient_is_the_derivative_and_its_derivative_the_sizes(x64):
    problem, x = KMeans(POINTS), START + 0.3
    v = RNG.standard_normal(x.shape)
    h = 1e-6
    slope = (problem.value(x + h * v) - problem.value(x - h * v)) / (2 * h)
    np.testing.assert_allclose(slope, np.sum(np.asarray(problem.gradient(x)) * v), rtol=1e-7)
    sizes = np.bincount(distances(POINTS, x).argmin(axis=1), minlength=4)
    np.testing.assert_allclose(problem.hvp(x, v), 2 * sizes[:, None] * v, rtol=1e-14)


def test_narrow_clusters_far_from_the_origin_in_float32(x32):
    """Integers over 2¹¹, added to 4096: exact in float32, while ‖x‖² − 2xᵀθ + ‖θ‖² is wrong by units."""
    offsets = RNG.integers(0, 5, (60, 2))
    points = (4096 + offsets / 2**11).astype(np.float32)
    found = KMeans(points).squared_distances(jnp.asarray(points[:2]))
    np.testing.assert_array_equal(found, distances(offsets, offsets[:2]) / 2.0**22)


def test_what_a_certificate_asks():
    problem = KMeans(POINTS.astype(np.float32))
    assert problem.lower_bound == 0
    assert problem.kinks(START.astype(np.float32)) == ["reduce_min"]


# ---- Lloyd --------------------------------------------------------------------------------------


def test_lloyd_step_by_step(x64):
    steps = 12
    expected = lloyd_by_hand(POINTS, START, steps)
    values = [distances(POINTS, c).min(axis=1).sum() for c in expected]
    for t in (1, 2, 3, steps):
        np.testing.assert_allclose(run(POINTS, START, steps=t).x, expected[t], rtol=1e-13)
    history = run(POINTS, START, steps=steps).history
    taken = len(history["value"])
    np.testing.assert_allclose(history["value"], values[:taken], rtol=1e-13)
    assert np.all(np.diff(history["value"]) <= 0)


@pytest.mark.parametrize("seed", range(4))
def test_lloyd_against_scikit_learn(x64, seed):
    start = POINTS[np.random.default_rng(seed).choice(60, 4, replace=False)]
    theirs = ScikitKMeans(4, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(POINTS)
    ours = run(POINTS, start)
    np.testing.assert_allclose(ours.x, theirs.cluster_centers_, rtol=1e-12)
    np.testing.assert_array_equal(assign(ours.x, POINTS), theirs.labels_)
    assert ours.value == pytest.approx(theirs.inertia_, rel=1e-12)
    assert ours.calls.gradient == theirs.n_iter_


def test_the_end_is_a_fixed_point_and_the_account_is_right(dtype):
    points, start = POINTS.astype(dtype), START.astype(dtype)
    end = run(points, start)
    assert end.status.converged and end.status.met == "Lloyd's own test"
    np.testing.assert_allclose(end.x, lloyd_by_hand(points, np.asarray(end.x), 1)[1], rtol=20 * np.finfo(dtype).eps)
    assert end.gradient_norm <= 1e4 * np.finfo(dtype).eps
    assert end.x.dtype == dtype
    assert end.calls.as_dict() == {"gradient": int(end.steps) + 1}
    again = run(points, end.x)
    assert again.steps == 1 and again.value == pytest.approx(float(end.value), rel=20 * float(np.finfo(dtype).eps))


def test_a_center_without_points_stays(x64):
    start = np.array([[0.0, 0.0], [10.0, 10.0], [1e3, 1e3]])
    points = np.array([[0.0, 1.0], [0.0, -1.0], [9.0, 10.0], [11.0, 10.0]])
    np.testing.assert_array_equal(run(points, start).x, start)


def test_ties_go_to_the_first_center(x64):
    points, start = np.array([[-1.0], [0.0], [1.0]]), np.array([[-1.0], [1.0]])
    np.testing.assert_array_equal(assign(start, points), [0, 0, 1])
    np.testing.assert_array_equal(run(points, start, steps=1).x, [[-0.5], [1.0]])


def test_many_starts_under_vmap(x64):
    starts = np.stack([POINTS[np.random.default_rng(seed).choice(60, 4, replace=False)] for seed in range(5)])
    together = jax.jit(jax.vmap(lambda start: run(POINTS, start, steps=50)))(starts)
    for i, start in enumerate(starts):
        alone = run(POINTS, start, steps=50)
        np.testing.assert_allclose(together.x[i], alone.x, rtol=1e-13)
        assert together.steps[i] == alone.steps


# ---- k-means++ ----------------------------------------------------------------------------------


def law(points, k):
    """The exact probability of each sequence of rows, by the definition."""
    d = distances(points, points)
    found = {}
    for rows in itertools.permutations(range(len(points)), k):
        p = 1 / len(points)
        for m in range(1, k):
            nearest = d[:, rows[:m]].min(axis=1)
            p *= nearest[rows[m]] / nearest.sum()
        found[rows] = p
    return found


@pytest.mark.parametrize("k", [1, 2, 3])
def test_seeds_have_the_law_of_k_means_plus_plus(x64, k):
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    seeds = np.asarray(jax.vmap(lambda key: k_means_plus_plus(key, points, k))(keys))
    rows = (seeds[:, :, None] == points).all(axis=3).argmax(axis=2)
    expected = law(points, k)
    assert sum(expected.values()) == pytest.approx(1)
    counts = [(rows == np.array(sequence)).all(axis=1).sum() for sequence in expected]
    assert sum(counts) == draws  # no row twice
    assert chisquare(counts, draws * np.array(list(expected.values()))).pvalue > 1e-3


def test_seeds_where_points_coincide(dtype):
    points = np.repeat(np.array([[1.0, 2.0], [5.0, 3.0]], dtype), 4, axis=0)
    seeds = np.asarray(k_means_plus_plus(0, points, 4))
    assert seeds.dtype == dtype
    assert {tuple(row) for row in seeds[:2]} == {(1, 2), (5, 3)}  # the two different points come first
    assert {tuple(row) for row in seeds} == {(1, 2), (5, 3)}


def test_all_points_as_seeds_and_the_key_as_a_seed(x64):
    points = POINTS[:5]
    seeds = k_means_plus_plus(5, points, 5)
    np.testing.assert_array_equal(np.sort(seeds, axis=0), np.sort(points, axis=0))
    np.testing.assert_array_equal(seeds, k_means_plus_plus(jax.random.key(5), points, 5))
    assert KMeans(points).value(seeds) == 0


# ---- bad input ----------------------------------------------------------------------------------


def with_nan():
    points = POINTS.copy()
    points[3, 1] = np.nan
    return points


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.arange(6).reshape(3, 2), r"^data: got int64\[3,2\]; expected a real floating array of shape \(rows, d\)$"),
        (POINTS[0], r"^data: got float64\[3\]; expected a real floating array"),
        (POINTS[:0], r"^data: got float64\[0,3\]; expected a real floating array"),
        (POINTS.astype(complex), r"^data: got complex128\[60,3\]; expected a real floating array"),
        (POINTS.tolist(), r"^data: got list; expected a real floating array"),
        (with_nan(), r"^data: got float64\[60,3\] with 1 NaN; expected no NaN"),
    ],
)
@pytest.mark.parametrize("use", [KMeans, lambda data: k_means_plus_plus(0, data, 2), lambda data: assign(START, data)])
def test_bad_data_are_refused(x64, use, data, message):
    with pytest.raises(fl.InputError, match=message):
        use(data)


def test_float64_data_are_not_narrowed(x32):
    for use in (KMeans, lambda data: k_means_plus_plus(0, data, 2)):
        with pytest.raises(fl.InputError, match=r"^data: got float64\[60,3\]; expected float32"):
            use(POINTS)


@pytest.mark.parametrize(
    "start", [START[:, :2], START[0], np.zeros((61, 3)), {"centers": START}, START.astype(complex)], ids=str
)
@pytest.mark.parametrize("solver", [lloyd(), power_k_means()], ids=lambda solver: solver.name)
def test_centers_of_another_shape_are_refused(x64, solver, start):
    with pytest.raises(fl.InputError, match=r"^x0: got .*; expected centers: a real floating array of shape \(k, 3\)"):
        fl.minimize(KMeans(POINTS), start, solver)


def test_no_centers_at_all_are_refused(x64):
    with pytest.raises(fl.InputError, match="^x0: got float64"):
        run(POINTS, START[:0])


@pytest.mark.parametrize(
    ("k", "expected"), [(0, "a whole number of at least 1"), (61, "at most the number of points, 60")]
)
def test_numbers_of_seeds_out_of_range_are_refused(x64, k, expected):
    with pytest.raises(fl.InputError, match=f"^k: got {k}; expected {expected}"):
        k_means_plus_plus(0, POINTS, k)


def test_centers_and_points_of_different_lengths_are_refused(x64):
    with pytest.raises(fl.InputError, match=r"^centers: got float64\[4,2\]; expected rows of length 3"):
        assign(START[:, :2], POINTS)


@pytest.mark.parametrize("solver", [lloyd(), power_k_means()], ids=lambda solver: solver.name)
def test_a_problem_without_points_is_refused(x64, solver):
    with pytest.raises(fl.InputError, match="without the oracle 'squared_distances'"):
        fl.minimize(lambda x: jnp.sum(x**2), START, solver)
