"""Products of factors against closed forms and a loop in NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline import Verdict
from fallline.landscape import exponential_linear_nets as module
from fallline.landscape.exponential_linear_nets import (
    DepthTimes,
    LinearNet,
    exponential_linear_nets,
    initial_factors,
)

SIZES = {"step_size": 0.02, "tolerance": 1e-2, "steps": 500, "replicas": 8, "key": 3}


def gradient(w, y):
    """Of ½ (∏w − y)²: the product of the other factors, one by one."""
    return (np.prod(w) - y) * np.array([np.prod(np.delete(w, i)) for i in range(len(w))], w.dtype)


def matrix_gradient(w, target):
    product = np.linalg.multi_dot
    eye = np.eye(len(target))
    error = product([eye, *w, eye]) - target
    return np.stack([
        product([eye, *w[:i], eye]).T @ error @ product([eye, *w[i + 1 :], eye]).T for i in range(len(w))
    ])  # fmt: skip


def count(w, y, *, step_size, tolerance, steps, slope=gradient):
    """Steps of gradient descent until ½ (∏w − y)² ≤ tolerance; `steps` + 1 where never, NaN where it overflows."""
    for t in range(steps + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            product = np.prod(w) if w.ndim == 1 else np.linalg.multi_dot([np.eye(len(y)), *w, np.eye(len(y))])
            value = 0.5 * np.sum((product - y) ** 2)
            if not np.isfinite(value):
                return np.nan
            if value <= tolerance:
                return t
            w = w - w.dtype.type(step_size) * slope(w, y)
    return steps + 1


def starts(depth, *options, key=3, replicas=8, **named):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(key), depth), replicas)
    return [np.asarray(initial_factors(k, depth, *options, **named)) for k in keys]


# --- the problem ----------------------------------------------------------------------------------

POINTS = {
    "no zero": np.array([0.7, -1.3, 0.4, 1.1]),
    "one zero": np.array([0.7, 0.0, 0.4, 1.1]),
    "two zeros": np.array([0.0, -1.3, 0.0, 1.1]),
    "one factor": np.array([0.3]),
}


@pytest.mark.parametrize("w", POINTS.values(), ids=POINTS)
def test_gradient_is_that_of_finite_differences_at_zero_factors_too(w, x64):
    f = lambda w: 0.5 * (np.prod(w) + 1.5) ** 2  # noqa: E731
    value, found = LinearNet(-1.5).value_and_gradient(w)
    differences = [(f(w + e) - f(w - e)) / 2e-5 for e in 1e-5 * np.eye(len(w))]
    assert float(value) == pytest.approx(f(w), rel=1e-15) == float(LinearNet(-1.5).value(w))
    np.testing.assert_allclose(found, gradient(w, -1.5), rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(found, differences, atol=1e-9)


@pytest.mark.parametrize("w", POINTS.values(), ids=POINTS)
def test_hessian_is_the_closed_form(w, x64):
    def others(*i):
        return np.prod(np.delete(w, i))

    error, k = np.prod(w) - 0.5, len(w)
    hessian = [[others(i) * others(j) + (error * others(i, j) if i != j else 0) for j in range(k)] for i in range(k)]
    np.testing.assert_allclose(jax.vmap(LinearNet(0.5).hessian(w))(np.eye(k)), hessian, rtol=1e-13, atol=1e-15)


def test_matrices_have_the_gradient_of_finite_differences(x64):
    rng = np.random.default_rng(0)
    w, target = rng.normal(size=(3, 2, 2)), rng.normal(size=(2, 2))
    w[1] = 0.0
    f = lambda w: 0.5 * np.sum((w[0] @ w[1] @ w[2] - target) ** 2)  # noqa: E731
    value, found = LinearNet(target).value_and_gradient(w)
    differences = [(f(w + e) - f(w - e)) / 2e-5 for e in 1e-5 * np.eye(12).reshape(12, 3, 2, 2)]
    assert float(value) == pytest.approx(f(w), rel=1e-15)
    np.testing.assert_allclose(np.ravel(found), differences, atol=1e-9)
    np.testing.assert_allclose(found, matrix_gradient(w, target), atol=1e-14)


def test_the_order_of_matrices_is_that_of_the_product(x64):
    swap, double = np.array([[0.0, 1.0], [1.0, 0.0]]), np.diag([2.0, 1.0])
    assert float(LinearNet(swap @ double).value(np.stack([swap, double]))) == 0
    assert float(LinearNet(double @ swap).value(np.stack([swap, double]))) == 1


def test_differences_of_squares_are_kept_up_to_the_step_size(x64):
    w = np.array([1.4, 0.9, 0.6, 1.2])

    def drift(step_size):
        sgd = fl.optimizer(optax.sgd, learning_rate=step_size)
        end = np.asarray(fl.minimize(LinearNet(-1.0), w, sgd, steps=round(4 / step_size), stop=None).x)
        assert w[2] > 0 > end[2]  # the smallest factor changes its sign
        return np.diff(end**2) - np.diff(w**2)

    # A step changes wᵢ² − wⱼ² by η² (gᵢ² − gⱼ²), and lowers F by η ‖g‖² up to O(η²): in all at most η F(w).
    coarse, fine = drift(4e-3), drift(2e-3)
    assert 1e-3 < np.max(np.abs(coarse)) < 1.05 * 4e-3 * 0.5 * (np.prod(w) + 1) ** 2
    np.testing.assert_allclose(coarse / fine, 2, rtol=0.02)


def test_equal_factors_end_at_zero_where_the_target_has_the_other_sign(x64):
    sgd = fl.optimizer(optax.sgd, learning_rate=0.02)
    end = fl.minimize(LinearNet(-1.0), np.full(3, 1.2), sgd, steps=20_000, stop=None)

    def loop(w, steps):
        for _ in range(steps):
            w -= 0.02 * (w**3 + 1) * w**2
        return w

    np.testing.assert_allclose(end.x, loop(1.2, 20_000), rtol=1e-9)
    assert 0 < loop(1.2, 20_000) < 3e-3 and float(end.value) > 0.5  # w ≈ 1 / (ηt), and F → ½ from above
    (row,) = exponential_linear_nets([3], "near-identity", target=-1.0, scale=0.0, **SIZES).rows
    assert row.censored == 1 and row.overflowed == 0 and row.median == np.inf
    w = loop(1.0, 500)
    np.testing.assert_allclose(row.gradient_norms, np.sqrt(3) * (w**3 + 1) * w**2, rtol=1e-12)


SADDLES = {
    "two of two": (np.zeros(2), Verdict.STRICT_SADDLE, -1.0),
    "two of three": (np.array([0.0, 1.5, 0.0]), Verdict.STRICT_SADDLE, -1.5),
    "three of three": (np.zeros(3), Verdict.SECOND_ORDER_STATIONARY, 0.0),
}


@pytest.mark.parametrize(("w", "verdict", "curvature"), SADDLES.values(), ids=SADDLES)
def test_zero_factors_are_a_saddle_that_is_strict_where_they_are_two(w, verdict, curvature, x64):
    # The Hessian is −y ∏ of the others, in the corner of the two zeros: the eigenvalues ±|y c|.
    certificate = fl.certify(LinearNet(-1.0), w)
    assert certificate.verdict is verdict and certificate.gradient_norm == 0
    assert certificate.rayleigh == pytest.approx(curvature, abs=1e-12)


def test_a_product_that_is_the_target_is_a_global_minimum(x64):
    assert fl.certify(LinearNet(-1.0), np.array([2.0, -0.5, 1.0])).verdict is Verdict.GLOBAL_MINIMUM


# --- starts ---------------------------------------------------------------------------------------

N = 400_000
MOMENTS = {
    # mean, standard deviation, E log|w| and the standard deviation of log|w|
    "xavier": (0.0, 1.0, -(np.euler_gamma + np.log(2)) / 2, np.pi / np.sqrt(8)),
    "xavier-uniform": (0.0, 1.0, np.log(3) / 2 - 1, 1.0),
}


@pytest.mark.parametrize(("name", "moments"), MOMENTS.items(), ids=MOMENTS)
def test_xavier_has_its_moments(name, moments, x64):
    mean, deviation, log_mean, log_deviation = moments
    w = np.asarray(initial_factors(0, N, name))
    assert np.mean(w) == pytest.approx(mean, abs=4 / np.sqrt(N))
    assert np.std(w) == pytest.approx(deviation, abs=4 / np.sqrt(N))
    assert np.mean(np.log(np.abs(w))) == pytest.approx(log_mean, abs=4 * log_deviation / np.sqrt(N))
    if name == "xavier":
        assert log_mean == pytest.approx(-0.6352, abs=5e-5)
    else:
        assert 1.732 < np.max(np.abs(w)) <= np.sqrt(3)


def test_near_identity_and_matrices_have_their_moments(dtype):
    w = initial_factors(0, N, "near-identity", scale=0.1)
    assert w.dtype == dtype and w.shape == (N,)
    assert float(jnp.mean(w)) == pytest.approx(1, abs=4e-1 / np.sqrt(N))
    assert float(jnp.std(w)) == pytest.approx(0.1, abs=4e-1 / np.sqrt(N))
    matrices = np.asarray(initial_factors(0, N // 16, "near-identity", scale=0.1, width=4))
    assert matrices.dtype == dtype and matrices.shape == (N // 16, 4, 4)
    np.testing.assert_allclose(matrices.mean(axis=0), np.eye(4), atol=5 * 0.05 / np.sqrt(N // 16))
    assert np.std(matrices - np.eye(4)) == pytest.approx(0.05, abs=4 * 0.05 / np.sqrt(N))
    assert np.std(initial_factors(0, N // 16, width=4)) == pytest.approx(0.5, abs=2 / np.sqrt(N))


# --- the sweep ------------------------------------------------------------------------------------


def test_the_numbers_of_steps_are_those_of_a_loop_in_numpy(dtype):
    found = exponential_linear_nets((3, 5), **SIZES)
    some = {"step_size": 0.02, "tolerance": 1e-2, "steps": 500}
    for row in found.rows:
        ws = starts(row.depth)
        assert ws[0].dtype == dtype
        expected = [count(w, 1.0, **some) for w in ws]
        np.testing.assert_array_equal(row.steps, expected)
        assert row.censored == np.mean(np.array(expected) == 501) and row.overflowed == 0
    assert 0 < found.rows[1].censored < 0.5  # of both kinds there are some
    row, path = found.rows[1], found.path
    typical = np.argsort(row.steps, kind="stable")[3]
    w = starts(5)[typical]
    for looked, value in zip(path["step"], path["value"], strict=True):
        assert value == pytest.approx(0.5 * (np.prod(w) - 1) ** 2, rel=1e-3)
        assert path["gradient_norm"][looked] == pytest.approx(np.linalg.norm(gradient(w, 1.0)), rel=1e-3)
        w = w - dtype.type(0.02) * gradient(w, 1.0)
    assert len(path["step"]) == row.steps[typical] + 1 and path["value"][-1] <= 1e-2 < path["value"][-2]


def test_one_factor_takes_as_long_as_the_closed_form_says(x64):
    (row,) = exponential_linear_nets([1], **SIZES).rows  # w − y shrinks by 1 − η
    errors = np.array([abs(w[0] - 1) for w in starts(1)])
    np.testing.assert_array_equal(row.steps, np.maximum(0, np.ceil(np.log(np.sqrt(0.02) / errors) / np.log(0.98))))


def test_runs_that_overflow_are_counted_apart(x64):
    options = {"scale": 6.0, "target": -1.0}
    (row,) = exponential_linear_nets([3], "near-identity", **options, **SIZES).rows
    some = {"step_size": 0.02, "tolerance": 1e-2, "steps": 500}
    expected = np.array([count(w, -1.0, **some) for w in starts(3, "near-identity", scale=6.0)])
    lost, late = np.isnan(expected), expected == 501
    assert 0 < lost.sum() < 8
    np.testing.assert_array_equal(row.steps, np.where(lost, 501, expected))
    assert row.overflowed == lost.sum() and row.censored == late.mean()


def test_matrices_take_as_many_steps_as_a_loop_in_numpy(x64):
    options = {**SIZES, "replicas": 2}
    (row,) = exponential_linear_nets([2], target=-1.0, width=3, **options).rows
    some = {"step_size": 0.02, "tolerance": 1e-2, "steps": 500, "slope": matrix_gradient}
    expected = [count(w, -np.eye(3), **some) for w in starts(2, replicas=2, width=3)]
    np.testing.assert_array_equal(row.steps, expected)
    assert max(expected) <= 500


def test_any_solver_goes_in_the_place_of_gradient_descent(x64):
    unit = optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.02))
    (row,) = exponential_linear_nets([3], solver=fl.optimizer(unit), **SIZES).rows

    def direction(w, y):
        return gradient(w, y) / np.linalg.norm(gradient(w, y))

    some = {"step_size": 0.02, "tolerance": 1e-2, "steps": 500, "slope": direction}
    np.testing.assert_array_equal(row.steps, [count(w, 1.0, **some) for w in starts(3)])


class Done(fl.State):
    done: jax.Array


class AtOnce(fl.Solver):
    """Is content wherever it starts."""

    def init(self, problem, x, *, key):
        return Done(x, fl.Calls(), jnp.bool_(True))

    def step(self, problem, state, *, key):
        return state


def test_a_run_that_its_method_ends_elsewhere_has_not_arrived(x64):
    (row,) = exponential_linear_nets([3], "near-identity", target=-1.0, solver=AtOnce(), **SIZES).rows
    assert row.censored == 1 and set(row.steps) == {501} and row.overflowed == 0


def test_a_depth_does_not_depend_on_the_others_and_numbers_never_recompile(x64):
    first = exponential_linear_nets((3, 5), **SIZES).rows[1]
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        alone = exponential_linear_nets([5], **SIZES).rows[0]
        other = {**SIZES, "key": 4, "step_size": 0.03, "tolerance": 0.02, "steps": 900}
        exponential_linear_nets([5], target=-2.0, **other)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    np.testing.assert_array_equal(alone.steps, first.steps)
    assert compiled == []


def test_quantiles_take_runs_at_the_cap_for_infinite():
    def row(*steps, overflowed=0):
        return DepthTimes(3, 100, np.array(steps), np.zeros(len(steps)), overflowed)

    assert row(7, 3, 101, 5).median == 6 and row(7, 3, 101, 5).quartiles == (4, np.inf)
    assert row(7, 3, 101).median == 7
    assert row(7, 101, 101, 5).median == np.inf
    assert row(7, 101, 101, 5, overflowed=1).censored == 0.25
    assert row(4).quartiles == (4, 4)
    shown = str(module.DepthSweep((row(7, 3, 101, 101, overflowed=1),), {})).splitlines()
    assert shown[1].split() == ["3", "inf", "5", "inf", "25.0%", "1"]


def test_an_interrupted_sweep_gives_no_table(x64, monkeypatch):
    status = SimpleNamespace(code=np.array([int(fl.Ending.INTERRUPTED)]))
    monkeypatch.setattr(module, "sweep", lambda *args, **options: SimpleNamespace(status=status))
    with pytest.raises(KeyboardInterrupt):
        exponential_linear_nets([3], **SIZES)


# --- bad input ------------------------------------------------------------------------------------

REFUSED = [
    ({"depths": []}, r"depths: got \[\]"),
    ({"depths": 3}, "depths: got 3"),
    ({"depths": [3, 0]}, "depths: got 0"),
    ({"depths": [2.5]}, "depths: got 2.5"),
    ({"step_size": 0.0}, "step_size: got 0.0"),
    ({"tolerance": 0.0}, "tolerance: got 0.0"),
    ({"tolerance": -1.0}, "tolerance: got -1.0"),
    ({"replicas": 0}, "replicas: got 0"),
    ({"steps": 0}, "steps: got 0"),
    ({"scale": -0.1}, "scale: got -0.1"),
    ({"width": 0}, "width: got 0"),
    ({"initialization": "near-identiy"}, "did you mean 'near-identity'"),
    ({"target": float("nan")}, "target: got nan"),
    ({"target": "one"}, "target: got str"),
    ({"target": np.eye(2, dtype=np.float32)}, r"target: got float32\[2,2\]"),
    ({"key": None}, "key: got None"),
    ({"solver": optax.sgd(0.1)}, "solver"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_bad_input(options, words, x64):
    with pytest.raises(fl.InputError, match=words):
        exponential_linear_nets(**{"depths": [3], "replicas": 2, "key": 0, **options})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LinearNet(np.zeros(3)), r"target: got float64\[3\]"),
        (lambda: LinearNet(np.zeros((2, 3))), r"target: got float64\[2,3\]"),
        (lambda: LinearNet(np.ones(2, int)), "target: got int64"),
        (lambda: LinearNet(np.eye(2)).value(np.zeros(3)), r"x0: got float64\[3\].*\(k, 2, 2\)"),
        (lambda: LinearNet(1.0).value(np.zeros((3, 2, 2))), r"x0: got float64\[3,2,2\].*\(k,\)"),
        (lambda: LinearNet(1.0).value(np.zeros(3, complex)), r"x0: got complex128\[3\]"),
        (lambda: initial_factors(0, 0), "depth: got 0"),
        (lambda: initial_factors(0, 3, "he"), "initialization: got 'he'"),
    ],
)
def test_bad_problems_and_starts(call, words, x64):
    with pytest.raises(fl.InputError, match=words):
        call()
