"""Randomly initialized gradient descent for phase retrieval, against NumPy and the population's closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline import Ending, InputError, Objective, minimize
from fallline.recovery import (
    PSD,
    Amplitude,
    Dense,
    Intensity,
    Recovery,
    Squared,
    coded_diffraction,
    leave_one_out,
    random,
    random_init_phase_retrieval,
    random_signs,
    recover,
    state_evolution,
)

M, N, STEPS = 300, 20, 12
RECORD = ("value", "gradient_norm", "signal", "perpendicular")


def data(m=M, n=N, seed=0, size=1.7):
    """Rows, a signal, its intensities, and a start of the signal's norm; all in NumPy."""
    draw = np.random.default_rng(seed)
    a, x = draw.normal(size=(m, n)), draw.normal(size=n)
    x *= size / np.linalg.norm(x)
    y = (a @ x) ** 2
    return a, x, y, draw.normal(size=n) * np.sqrt(np.mean(y) / n)


def iterate(a, y, x, step_size, steps, scale=None, left_out=None):
    """The paper's update; the sum over the gain ‖A‖²_F/n in place of m."""
    points, gain = [x], np.sum(a**2) / a.shape[1]
    scale = np.mean(y) if scale is None else scale
    kept = np.arange(len(a)) != left_out
    for _ in range(steps):
        u = a @ x
        x = x - step_size / scale * a.T @ (kept * (u**2 - y) * u) / gain
        points.append(x)
    return np.array(points)


def test_a_run_is_the_papers_iteration(x64):
    a, truth, y, x0 = data()
    points = iterate(a, y, x0, 0.1, STEPS)
    run = minimize(
        Recovery(a, y, loss=Intensity()), x0, random_init_phase_retrieval(0.1, truth), steps=STEPS, record=RECORD
    )
    np.testing.assert_allclose(run.x, points[-1], rtol=1e-11)
    along = points @ truth / np.linalg.norm(truth)
    across = np.linalg.norm(points - np.outer(along, truth) / np.linalg.norm(truth), axis=1)
    np.testing.assert_allclose(run.history["signal"], np.abs(along), rtol=1e-10)
    np.testing.assert_allclose(run.history["perpendicular"], across, rtol=1e-10)
    gain, unit = np.sum(a**2) / N, np.mean(y)
    values = np.sum(((points @ a.T) ** 2 - y) ** 2, axis=1) / 4 / gain / unit
    np.testing.assert_allclose(run.history["value"], values, rtol=1e-10)
    assert run.calls.as_dict() == {"gradient": STEPS + 1}


def test_the_answer_does_not_depend_on_the_scale_of_the_rows(x64):
    a, _, y, x0 = data()
    solver = random_init_phase_retrieval(0.1)
    plain = minimize(Recovery(a, y, loss=Intensity()), x0, solver, steps=STEPS)
    scaled = minimize(Recovery(a / 8, y / 64, loss=Intensity()), x0, solver, steps=STEPS)
    np.testing.assert_allclose(scaled.x, plain.x, rtol=1e-11)


def test_a_random_start_recovers_the_signal_up_to_its_sign(x64):
    a, truth, y, _ = data()
    solver = random_init_phase_retrieval(0.1, truth)
    run = recover(a, y, loss=Intensity(), init="random", solver=solver, steps=500, record=("signal", "perpendicular"))
    assert run.status.converged
    assert min(np.linalg.norm(run.x - truth), np.linalg.norm(run.x + truth)) <= 1e-7 * np.linalg.norm(truth)
    distance = np.hypot(run.history["signal"] - np.linalg.norm(truth), run.history["perpendicular"])
    assert distance[0] > 0.5 * np.linalg.norm(truth)
    late = distance[distance < 0.01]
    assert np.all(np.diff(late) < 0)  # the second stage: every step is nearer


def test_random_starts_have_the_norm_that_the_data_tell(x64):
    a, _, y, _ = data()
    problem = Recovery(a, y, loss=Intensity())
    starts = jax.vmap(lambda key: random()(problem, key))(jax.random.split(jax.random.key(0), 2000))
    radius = np.sum(y) / (np.sum(a**2) / N)
    spread = np.sqrt(2 / N / 2000)  # of the mean of 2,000 times χ²₂₀/20
    assert abs(np.mean(np.sum(np.square(starts), axis=1)) / radius - 1) < 4 * spread


def test_a_start_of_norm_root_n_is_lost(x64):
    a, truth, y, x0 = data()
    start = x0 / np.sqrt(np.mean(y) / N)  # N(0, I)
    run = minimize(Recovery(a, y, loss=Intensity()), start, random_init_phase_retrieval(0.1), steps=100)
    assert run.status.ending == Ending.DIVERGED and np.all(np.isfinite(run.x))


def test_an_infinite_sample_follows_the_state_evolution(x64):
    """Gauss–Hermite nodes in two dimensions integrate the gradient's polynomial of degree 4 without an error."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    pairs = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    probability = np.outer(weights, weights).reshape(-1) / np.sum(weights) ** 2
    x, eta, steps = np.array([0.05, 0.9]), 0.1, 40
    path = [x]
    for _ in range(steps):
        u = pairs @ x
        x = x - eta * pairs.T @ (probability * (u**2 - pairs[:, 0] ** 2) * u)
        path.append(x)
    alpha, beta = state_evolution(0.05, 0.9, eta, steps)
    np.testing.assert_allclose(np.stack([alpha, beta], 1), np.array(path), rtol=1e-12)


def test_the_population_leaves_the_saddle_unless_it_is_exactly_on_it():
    alpha, beta = state_evolution(np.array([0.0, 1e-8, 0.0]), np.array([1.0, 1.0, 0.0]), 0.1, 400)
    assert np.all(alpha[:, 0] == 0) and abs(beta[-1, 0] - 1 / np.sqrt(3)) < 1e-12  # the saddle
    assert abs(alpha[-1, 1] - 1) < 1e-12 and beta[-1, 1] < 1e-12  # the signal
    assert np.all(alpha[:, 2] == 0) and np.all(beta[:, 2] == 0)  # the maximum
    near = (alpha[1:, 1] / beta[1:, 1]) / (alpha[:-1, 1] / beta[:-1, 1])
    assert abs(near[40] - (1 + 0.3 * 2 / 3) / 1) < 1e-3  # at ‖x‖² = 1/3 the ratio grows by 1 + 2η


def test_the_rates_at_the_signal_are_those_of_the_linearization():
    alpha, beta = state_evolution(np.array([1 - 1e-7, 1.0]), np.array([0.0, 1e-7]), 0.1, 1)
    assert abs((1 - alpha[1, 0]) / 1e-7 - (1 - 0.6)) < 1e-6
    assert abs(beta[1, 1] / 1e-7 - (1 - 0.2)) < 1e-6


def test_the_runs_without_one_measurement_are_those_of_numpy(x64):
    a, truth, y, x0 = data(m=200)
    rows = [0, 57, 199]
    problem = Recovery(a, y, loss=Intensity())
    found = leave_one_out(problem, x0, random_init_phase_retrieval(0.1), rows, STEPS)
    whole = iterate(a, y, x0, 0.1, STEPS)
    for k, row in enumerate(rows):
        without = iterate(a, y, x0, 0.1, STEPS, left_out=row)
        apart = np.linalg.norm(without - whole, axis=1) / np.linalg.norm(whole, axis=1)
        np.testing.assert_allclose(found[:, k], apart, rtol=1e-8, atol=1e-15)
    assert found.shape == (STEPS + 1, 3) and np.all(found[0] == 0) and np.max(found) < 0.2


def test_no_measurement_alone_decides_where_a_run_goes(x64):
    """Without the largest term the run stays near; without half of the measurements it does not."""
    a, truth, y, x0 = data(m=1000, n=50)
    problem = Recovery(a, y, loss=Intensity())
    found = leave_one_out(problem, x0, random_init_phase_retrieval(0.1), np.arange(1000), 30)
    half = iterate(a[:500], y[:500], x0, 0.1, 30, scale=np.mean(y))
    whole = iterate(a, y, x0, 0.1, 30)
    other = np.linalg.norm(half - whole, axis=1) / np.linalg.norm(whole, axis=1)
    assert np.max(found[1:21]) < 0.5 * np.max(other[1:21])
    assert np.median(found[20]) < 0.05 * other[20]


def test_random_signs_change_the_rows_along_the_signal_alone(x64):
    a, truth, y, _ = data()
    problem = random_signs(Recovery(a, y, loss=Intensity()), truth, jax.random.key(0))
    matrix, unit = np.asarray(problem.op.matrix), truth / np.linalg.norm(truth)
    np.testing.assert_allclose((matrix @ truth) ** 2, y, rtol=1e-9)
    np.testing.assert_allclose(matrix - np.outer(matrix @ unit, unit), a - np.outer(a @ unit, unit), atol=1e-12)
    flipped = np.mean(np.sign(matrix @ unit) != np.sign(a @ unit))
    assert 0.35 < flipped < 0.65


@pytest.mark.parametrize(
    ("problem", "x0", "message"),
    [
        (Objective(lambda x: jnp.sum(x**2)), np.ones(4, np.float32), "oracle"),
        (Recovery(jnp.ones((9, 4)), jnp.ones(9), loss=Squared()), np.ones(4, np.float32), "the loss Intensity"),
        (Recovery(jnp.ones((9, 4)), jnp.ones(9), loss=Amplitude()), np.ones(4, np.float32), "the loss Intensity"),
        (Recovery(jnp.ones((9, 4)), jnp.ones(9), loss=Intensity()), np.ones(4, np.complex64), "a real array"),
    ],
    ids=["no recovery", "linear", "amplitudes", "complex"],
)
def test_other_problems_are_refused(problem, x0, message):
    with pytest.raises(InputError, match=message):
        minimize(problem, x0, random_init_phase_retrieval())


def test_low_rank_is_refused(x32):
    problem = Recovery(Dense(jnp.ones((9, 4)), (2, 2)), jnp.ones(9), PSD(1), Squared())
    with pytest.raises(InputError, match="PSD; expected one of a Vector"):
        minimize(problem, jnp.ones((2, 1)), random_init_phase_retrieval())


def test_numbers_are_checked():
    for step_size in (0, -0.1, np.nan, "a"):
        with pytest.raises(InputError, match="step_size"):
            random_init_phase_retrieval(step_size)
    with pytest.warns(UserWarning, match="0.3 may diverge"):
        random_init_phase_retrieval(0.3)
    for signal in (np.zeros(3, np.float32), np.ones(3, np.complex64), np.arange(3)):
        with pytest.raises(InputError, match="signal"):
            random_init_phase_retrieval(signal=signal)
    with pytest.raises(InputError, match="step_size"):
        state_evolution(0.1, 0.9, 0.0, 3)


def test_a_signal_of_another_shape_is_refused(x32):
    problem = Recovery(jnp.ones((9, 4)), jnp.ones(9), loss=Intensity())
    with pytest.raises(InputError, match="signal.*the shape of x0"):
        minimize(problem, jnp.ones(4), random_init_phase_retrieval(signal=jnp.ones(3)))
    with pytest.raises(InputError, match="record"):
        minimize(problem, jnp.ones(4), random_init_phase_retrieval(), record=("signal",))


def test_too_few_measurements_are_warned_of(x32):
    problem = Recovery(jnp.ones((3, 4)), jnp.ones(3), loss=Intensity())
    with pytest.warns(UserWarning, match="3 measurements of 4 coordinates"):
        minimize(problem, jnp.ones(4), random_init_phase_retrieval(), steps=1)


def test_images_behind_masks_are_vectors_too(x64):
    """A real image under a complex operator: the gradient's real part, and leaving out counts pixels of all masks."""
    draw = np.random.default_rng(2)
    op = coded_diffraction(jax.random.key(1), (4, 5), 10)
    truth = jnp.asarray(draw.normal(size=(4, 5)))
    y = jnp.abs(op.mv(truth)) ** 2
    x0 = jnp.asarray(draw.normal(size=(4, 5)))
    solver = random_init_phase_retrieval(0.1, truth)
    problem = Recovery(op, y, loss=Intensity())
    run = minimize(problem, x0, solver, steps=3000, stop=None)
    assert float(problem.distance(run.x, truth)) < 1e-6
    found = leave_one_out(problem, x0, solver, [0, y.size - 1], 5)
    assert np.all(found[1:] > 0) and np.all(found < 0.5)
    with pytest.raises(InputError, match="rows"):
        leave_one_out(problem, x0, solver, [y.size], 5)
    with pytest.raises(InputError, match="Dense"):
        random_signs(problem, truth, jax.random.key(0))
