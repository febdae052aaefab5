"""Power k-means against the paper's formulas in NumPy, its identities and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.clustering.k_means import KMeans, assign, lloyd
from fallline.clustering.power_k_means import PowerKMeans, log_power_mean, log_tangent, power_k_means

RNG = np.random.default_rng(0)
POINTS = RNG.standard_normal((60, 3)) + 2 * RNG.integers(0, 2, (60, 3))
START = POINTS[[3, 17, 29, 51]]
RECORD = ("value", "gradient_norm", "s", "surrogate")
POWERS = [-120.0, -20.0, -3.0, -1.0, -0.2, 0.5, 1.0]


def distances(points, centers):
    return ((points[:, None] - centers) ** 2).sum(axis=2)


def power_mean(y, s):
    return np.mean(y**s, axis=1) ** (1 / s)


def weights(y, s):
    """∂M_s/∂y as the paper writes it."""
    return y ** (s - 1) * np.mean(y**s, axis=1, keepdims=True) ** (1 / s - 1) / y.shape[1]


def by_hand(points, centers, steps, s0=-1.0, eta=1.05, anneal_every=1, s_min=-120.0):
    """Centers, powers, surrogates and labels, from the first point on, and the step at which the run ends."""
    s, found, same, end = s0, [], 0, None
    for t in range(steps + 1):
        if t:
            w = weights(distances(points, centers), s)
            centers = (w.T @ points) / w.sum(axis=0)[:, None]
            s = max(eta * s, s_min) if t % anneal_every == 0 else s
        d = distances(points, centers)
        labels = d.argmin(axis=1)
        same = same + 1 if t and (labels == found[-1][3]).all() else 0
        if end is None and same >= 5 and s <= max(-20.0, s_min):
            end = t
        found.append((centers, s, power_mean(d, s).sum(), labels, d.min(axis=1).sum()))
    return [np.array(column) for column in zip(*found, strict=True)], end


def run(points, start, solver=None, **kwargs):
    return fl.minimize(KMeans(points), start, solver or power_k_means(), record=RECORD, **kwargs)


# ---- the power mean and its tangent ---------------------------------------------------------------


@pytest.mark.parametrize("s", POWERS)
def test_power_mean_and_weights(x64, s):
    y = distances(POINTS[:20], START + 0.1)
    log_mean = log_power_mean(jnp.log(y), s)
    np.testing.assert_allclose(np.exp(log_mean), power_mean(y, s), rtol=1e-12)
    w = np.exp(log_tangent(jnp.log(y), log_mean, s))
    np.testing.assert_allclose(w, weights(y, s), rtol=1e-11)
    np.testing.assert_allclose((w * y).sum(axis=1), power_mean(y, s), rtol=1e-12)  # Euler: M_s is homogeneous
    # The derivative by differences, in a direction.
    v, h = RNG.standard_normal(y.shape) * y, 1e-6
    slope = (power_mean(y + h * v, s) - power_mean(y - h * v, s)) / (2 * h)
    np.testing.assert_allclose((w * v).sum(axis=1), slope, rtol=1e-5, atol=1e-6)


def test_power_mean_falls_with_s_from_the_mean_to_the_minimum(x64):
    y = distances(POINTS, START + 0.1)
    means = [np.exp(log_power_mean(jnp.log(y), s)) for s in (1.0, 0.5, -0.5, -1.0, -3.0, -20.0, -120.0, -1e6)]
    np.testing.assert_allclose(means[0], y.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(means[3], 1 / (1 / y).mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(means[-1], y.min(axis=1), rtol=1e-5)  # min · 4^{1e-6}
    for higher, lower in zip(means, means[1:], strict=False):
        assert np.all(lower < higher)


@pytest.mark.parametrize("s", POWERS)
def test_tangent_majorizes(x64, s):
    """M_s is concave for s ≤ 1: M_s(z) ≤ M_s(y) + ⟨∂M_s(y), z − y⟩."""
    y, z = distances(POINTS, START + 0.1), distances(POINTS, START[::-1] + RNG.standard_normal((4, 3)))
    log_mean = log_power_mean(jnp.log(y), s)
    tangent = np.exp(log_mean) + (np.exp(log_tangent(jnp.log(y), log_mean, s)) * (z - y)).sum(axis=1)
    assert np.all(np.exp(log_power_mean(jnp.log(z), s)) <= tangent * (1 + 1e-12))


# ---- the run --------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"s0": -3.0, "eta": 1.3, "s_min": -25.0},
    {"s0": -0.5, "eta": 1.2, "anneal_every": 4},
    {"s0": -2.0, "s_min": -2.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_step_by_step(x64, settings):
    steps = 70
    start = START + 0.1  # not on the points: the paper's formulas divide by the distances
    (centers, s, surrogates, labels, values), end = by_hand(POINTS, start, steps, **settings)
    for t in (1, 2, 5):
        np.testing.assert_allclose(run(POINTS, start, power_k_means(**settings), steps=t).x, centers[t], rtol=1e-10)
    solution = run(POINTS, start, power_k_means(**settings), steps=steps)
    t = int(solution.steps)
    assert t == (steps if end is None else end)
    assert solution.status.converged == (end is not None)
    np.testing.assert_allclose(solution.x, centers[t], rtol=1e-9)
    np.testing.assert_allclose(solution.history["s"], s[: t + 1], rtol=1e-13)
    np.testing.assert_allclose(solution.history["surrogate"], surrogates[: t + 1], rtol=1e-10)
    np.testing.assert_allclose(solution.history["value"], values[: t + 1], rtol=1e-10)
    np.testing.assert_array_equal(assign(solution.x, POINTS), labels[t])


def test_the_cases_above_end_in_different_ways():
    ends = [by_hand(POINTS, START + 0.1, 70, **settings)[1] for settings in SETTINGS]
    assert len(set(ends)) == 4 and None in ends


@pytest.mark.parametrize("settings", SETTINGS)
def test_surrogate_never_rises(dtype, settings):
    points, start = POINTS.astype(dtype), START.astype(dtype)
    history = run(points, start, power_k_means(**settings), steps=200).history
    rounding = 10 * np.finfo(dtype).eps
    assert np.all(np.diff(history["surrogate"]) <= rounding * history["surrogate"][:-1])
    assert np.all(history["value"] <= history["surrogate"] * (1 + rounding))
    if history["s"][-1] < history["s"][0]:
        assert history["surrogate"][-1] < 0.9 * history["surrogate"][0]


def test_state_is_of_its_point(dtype):
    points, start = POINTS.astype(dtype), START.astype(dtype)
    solution = run(points, start, steps=30)
    value, gradient = KMeans(points).value_and_gradient(solution.x)
    tolerance = 50 * float(np.finfo(dtype).eps)
    assert float(solution.value) == pytest.approx(float(value), rel=tolerance)
    assert float(solution.gradient_norm) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e3 * tolerance)
    assert float(solution.state.surrogate) == pytest.approx(
        power_mean(distances(points, np.asarray(solution.x)).astype(float), float(solution.state.s)).sum(),
        rel=tolerance,
    )
    assert solution.calls.as_dict() == {"gradient": 31}
    assert solution.x.dtype == dtype


def test_centers_stay_in_the_convex_hull(dtype):
    points, start = POINTS.astype(dtype), 5 * START.astype(dtype)  # the start is outside
    directions = RNG.standard_normal((50, 3))
    width = directions @ points.T
    for steps in (1, 2, 10):
        along = directions @ np.asarray(run(points, start, steps=steps).x).T
        slack = 10 * np.finfo(dtype).eps * np.abs(width).max()
        assert np.all(along <= width.max(axis=1)[:, None] + slack)
        assert np.all(along >= width.min(axis=1)[:, None] - slack)


# ---- limits ---------------------------------------------------------------------------------------


def test_far_down_a_step_is_lloyds(x64):
    for steps in (1, 3):
        ours = run(POINTS, START, power_k_means(-1e6, s_min=-1e6), steps=steps)
        theirs = fl.minimize(KMeans(POINTS), START, lloyd(), steps=steps)
        np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-12)


def test_at_1_every_center_goes_to_the_mean(x64):
    end = run(POINTS, START, PowerKMeans(1.0, 1.0, 1, 1.0), steps=1)
    np.testing.assert_allclose(end.x, np.tile(POINTS.mean(axis=0), (4, 1)), rtol=1e-13)
    assert end.history["surrogate"][0] == pytest.approx(distances(POINTS, START).mean(axis=1).sum())


def test_fixed_at_minus_1_the_end_is_stationary_for_harmonic_means(x64):
    """k-harmonic means: Σᵢ w_ij (xᵢ − θ_j) = 0 with the weights of s = −1."""
    never_done = power_k_means(-1.0, s_min=-2.0, anneal_every=10**6)
    x = np.asarray(run(POINTS, START + 0.1, never_done, steps=2000).x)
    w = weights(distances(POINTS, x), -1.0)
    np.testing.assert_allclose((w.T @ POINTS) / w.sum(axis=0)[:, None], x, rtol=1e-10)


# ---- numbers at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("s", [-120.0, -1.0])
def test_a_center_on_a_point(dtype, s):
    """At D = 0 the weight of the coincident center is k^{−1/s}, that of the others 0."""
    points = POINTS.astype(dtype)
    state = run(points, points[[3, 17, 29, 51]], power_k_means(s), steps=0).state
    w = np.asarray(jnp.exp(log_tangent(state.log_ratios, state.log_means, state.s)))
    tolerance = 100 * np.finfo(dtype).eps
    for j, i in enumerate([3, 17, 29, 51]):
        np.testing.assert_allclose(w[i], np.where(np.arange(4) == j, 4 ** (-1 / s), 0), rtol=tolerance, atol=1e-30)
    # Such a point adds nothing to the surrogate.
    others = np.delete(np.arange(60), [3, 17, 29, 51])
    expected = power_mean(distances(points[others], points[[3, 17, 29, 51]]).astype(float), s).sum()
    assert float(state.surrogate) == pytest.approx(expected, rel=float(tolerance))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_float32_at_s_120(scale):
    """Powers of D overflow float32 at once; from centers on points the run is still that of float64."""
    ends = []
    for dtype in (np.float64, np.float32):
        with jax.enable_x64(dtype == np.float64):
            points = (scale * POINTS).astype(dtype)
            solution = run(points, points[[3, 17, 29, 51]], power_k_means(-120.0), steps=6)
            assert all(np.isfinite(solution.history[name]).all() for name in RECORD)
            assert np.isfinite(np.asarray(solution.x)).all()
            ends.append(np.asarray(solution.x, np.float64) / scale)
    np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=5e-6)


def test_a_center_far_from_all_points_comes_back(x32):
    """All of its weights underflow; scaled by the largest they do not."""
    start = START.astype(np.float32)
    start[0] = 1e6
    solution = run(POINTS.astype(np.float32), start, power_k_means(-120.0), steps=1)
    nearest = POINTS[distances(POINTS, start[:1].astype(float))[:, 0].argsort()]
    assert np.isfinite(np.asarray(solution.x)).all()
    assert np.abs(np.asarray(solution.x)).max() <= np.abs(nearest).max()


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"s0": 0.0}, r"^s0: got 0.0; expected a finite number below 0$"),
        ({"s0": 1.0}, r"^s0: got 1.0; expected a finite number below 0$"),
        ({"s0": float("nan")}, r"^s0: got nan; expected a finite number below 0$"),
        ({"s0": float("-inf")}, r"^s0: got -inf; expected a finite number below 0$"),
        ({"s0": "low"}, r"^s0: got 'low'; expected a finite number below 0$"),
        ({"s0": [-1.0]}, r"^s0: got \[-1.0\]; expected a finite number below 0$"),
        ({"eta": 1.0}, r"^eta: got 1.0; expected a finite number above 1$"),
        ({"eta": 0.5}, r"^eta: got 0.5; expected a finite number above 1$"),
        ({"eta": float("inf")}, r"^eta: got inf; expected a finite number above 1$"),
        ({"anneal_every": 0}, r"^anneal_every: got 0; expected a whole number of at least 1$"),
        ({"anneal_every": 1.5}, r"^anneal_every: got 1.5; expected a whole number of at least 1$"),
        ({"s_min": 0.0}, r"^s_min: got 0.0; expected a finite number below 0$"),
        ({"s0": -9.0, "s_min": -3.0}, r"^s_min: got -3.0; expected at most s0 = -9$"),
    ],
)
def test_bad_numbers_are_refused(settings, message):
    with pytest.raises(fl.InputError, match=message):
        power_k_means(**settings)


def test_nan_in_the_start_is_refused(x64):
    start = START.copy()
    start[1, 2] = np.nan
    with pytest.raises(fl.InputError, match="^x0: got .* with 1 NaN"):
        run(POINTS, start)
