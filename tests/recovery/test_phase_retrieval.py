"""The methods against the papers' updates in NumPy, and what the driver makes of its arguments."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.core.errors import InputError
from fallline.recovery import Amplitude, Dense, Intensity, OversampledFourier, Recovery, coded_diffraction
from fallline.recovery.phase_retrieval import METHODS, Alternating, phase_retrieval, wirtinger

M, N = 120, 12
STEPS = 4


def _numbers(rng, shape, is_complex):
    parts = rng.standard_normal((2, *shape))
    return parts[0] + 1j * parts[1] if is_complex else parts[0]


def _gaussian(is_complex, seed=0):
    rng = np.random.default_rng(seed)
    a, x = _numbers(rng, (M, N), is_complex), _numbers(rng, (N,), is_complex)
    return Dense(a), a, x, rng


def _masks(seed=0):
    """Twelve masks of 12 pixels as an operator, and the matrix that NumPy's transform makes of them."""
    op, rng = coded_diffraction(jax.random.key(seed), (3, 4), 12), np.random.default_rng(seed)
    masks = np.asarray(op.masks)
    columns = [np.fft.fft2(masks.conj() * e.reshape(3, 4), axes=(1, 2)).ravel() for e in np.eye(12)]
    return op, np.stack(columns, axis=1), _numbers(rng, (12,), True), rng


def _distance(z, x):
    turn = np.vdot(z, x)
    return np.linalg.norm(z * turn / abs(turn) - x) / np.linalg.norm(x)


# ---- the papers' updates, one signal and one matrix ------------------------------------------------


def _wirtinger_flow(z, a, y, scale, t):
    u = a @ z
    return z - min(1 - np.exp(-t / 330), 0.2) / scale / len(y) * a.conj().T @ ((np.abs(u) ** 2 - y) * u)


def _truncated_wirtinger_flow(z, a, y, scale, t):
    u = a @ z
    rho = np.sqrt(len(z)) * np.abs(u) / np.linalg.norm(a, axis=1) / np.linalg.norm(z)
    off = np.abs(y - np.abs(u) ** 2)
    kept = (rho >= 0.3) & (rho <= 5) & (off <= 5 * np.mean(off) * rho)
    return z + 2 * 0.2 / len(y) * a.conj().T @ np.where(kept, (y - np.abs(u) ** 2) / np.conj(u), 0)


def _amplitude_flow(weight, real_step, complex_step):
    def step(z, a, y, scale, t):
        u, psi = a @ z, np.sqrt(y)
        mu = complex_step if np.iscomplexobj(z) else real_step
        return z - mu / len(y) * a.conj().T @ (weight(np.abs(u), psi, np.iscomplexobj(z)) * (u - psi * u / np.abs(u)))

    return step


UPDATES = {
    "wirtinger": _wirtinger_flow,
    "truncated-wirtinger": _truncated_wirtinger_flow,
    "amplitude": _amplitude_flow(lambda size, psi, is_complex: 1, 0.6, 1.0),
    "truncated-amplitude": _amplitude_flow(lambda size, psi, is_complex: size >= psi / 1.7, 0.6, 1.0),
    "reweighted-amplitude": _amplitude_flow(
        lambda size, psi, is_complex: size / psi / (size / psi + (5 if is_complex else 10)), 2.0, 4.0
    ),
}


@pytest.mark.parametrize("case", ["real", "complex", "masks"])
@pytest.mark.parametrize("method", list(UPDATES))
def test_the_iterates_are_those_of_the_paper(x64, method, case):
    op, a, x, rng = _masks() if case == "masks" else _gaussian(case == "complex")
    if case != "masks":  # the papers' rows have norm √n on average: scaled to have it exactly
        a = a * np.sqrt(N * M / np.sum(np.abs(a) ** 2))
        op = Dense(a)
    y = np.abs(a @ x) ** 2
    z = x + 0.7 * _numbers(rng, x.shape, np.iscomplexobj(x))
    expected = z
    for t in range(1, STEPS + 1):
        expected = UPDATES[method](expected, a, y, np.mean(y), t)
    shape = op.shape
    solution = phase_retrieval(op, y.reshape(op.out_shape), method, init=z.reshape(shape), steps=STEPS, stop=None)
    assert int(solution.steps) == STEPS
    np.testing.assert_allclose(solution.x, expected.reshape(shape), rtol=1e-11, atol=1e-12)


def test_alternating_solves_the_least_squares_problem_of_the_phases(x64):
    op, a, x, rng = _gaussian(True)
    y, z = np.abs(a @ x) ** 2, x + 0.5 * _numbers(rng, (N,), True)
    expected = z
    for _ in range(3):
        u = a @ expected
        expected = np.linalg.lstsq(a, np.sqrt(y) * u / np.abs(u), rcond=None)[0]
    solution = fl.minimize(Recovery(op, y, loss=Amplitude()), z, Alternating(1e-13, 60), steps=3, stop=None)
    np.testing.assert_allclose(solution.x, expected, rtol=1e-10, atol=1e-11)
    assert int(solution.calls.gradient) == 4 + int(solution.state.products)
    quaternary, _, x, rng = _masks()
    y = np.abs(np.asarray(quaternary.mv(x.reshape(3, 4)))) ** 2
    single = phase_retrieval(quaternary, y, "alternating", init=x.reshape(3, 4) * 1.1 + 0.1, steps=2, stop=None)
    assert int(single.state.products) == 2  # A*A is a multiple of the identity: one product a step


def test_every_method_finds_a_signal_from_its_own_start(x64):
    rng = np.random.default_rng(1)
    a, x = rng.standard_normal((240, 20)), rng.standard_normal(20)
    y = (a @ x) ** 2
    for method in METHODS:
        assert _distance(np.asarray(phase_retrieval(a, y, method).x), x) < 1e-6, method


def test_a_real_image_behind_masks_of_unequal_size_is_found(x64):
    op = coded_diffraction(jax.random.key(2), (16, 16), 12, octanary=True)
    x = jax.random.uniform(jax.random.key(3), (16, 16))
    y = jnp.abs(op.mv(x)) ** 2
    for method in ("truncated-amplitude", "alternating"):
        solution = phase_retrieval(op, y, method, real=True)
        assert not jnp.iscomplexobj(solution.x)
        assert _distance(np.asarray(solution.x).ravel(), np.asarray(x).ravel()) < 1e-5, method


def test_the_step_sizes_of_wirtinger_flow_rise_to_their_limit():
    update = wirtinger(0.2)
    state, sizes = update.init(jnp.zeros(())), []
    for _ in range(100):
        step, state = update.update(jnp.ones(()), state)
        sizes.append(-float(step))
    expected = [min(1 - np.exp(-t / 330), 0.2) for t in range(1, 101)]
    np.testing.assert_allclose(sizes, expected, rtol=1e-5)
    assert sizes[72] < 0.2 == pytest.approx(sizes[73])


def test_a_number_changed_compiles_nothing(x64):
    op, a, x, _ = _gaussian(False)
    problem = Recovery(op, (a @ x) ** 2, loss=Intensity())

    def run(rate, ramp):
        solver = fl.optimizer(wirtinger, learning_rate=rate, ramp=ramp)
        return fl.minimize(problem, 1.1 * x, solver, steps=5, stop=None)

    first, second = run(0.2, 330.0), run(0.1, 3.0)
    assert second.compile_seconds == 0 and float(first.value) != float(second.value)


# ---- pitfalls --------------------------------------------------------------------------------------


def test_wirtinger_flow_that_diverges_is_run_again_with_a_smaller_step_and_says_so(x64):
    rng = np.random.default_rng(1)
    a, x = rng.standard_t(3, (80, 10)), rng.standard_normal(10)  # heavy tails: μ = 0.2 is beyond stability
    y, z = (a @ x) ** 2, 1.05 * x
    with pytest.warns(UserWarning, match=r"wirtinger diverged at step \d+ with step_size 0.2; run again with 0.1"):
        solution = phase_retrieval(a, y, "wirtinger", init=z)
    assert solution.status.converged and _distance(np.asarray(solution.x), x) < 1e-6
    asked = phase_retrieval(a, y, "wirtinger", init=z, step_size=0.2)
    assert asked.status.name == "diverged"


@pytest.mark.parametrize(
    ("method", "m", "condition"),
    [
        ("wirtinger", 29, "m ≥ n log n"),  # 12 log 12 = 29.8
        ("truncated-amplitude", 29, r"m ≥ 2.5 n for real signals and 4 n for complex"),
        ("truncated-wirtinger", 47, r"m ≥ 4 n for real signals and 5 n for complex"),
    ],
)
def test_too_few_measurements_warn_with_the_condition(x64, method, m, condition):
    _, a, x, _ = _gaussian(False)
    y = (a @ x) ** 2
    with pytest.warns(UserWarning, match=rf"y: {m} measurements of 12 .* may be too few for {method}: {condition}"):
        phase_retrieval(a[:m], y[:m], method, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phase_retrieval(a[: m + 1], y[: m + 1], method, steps=1)


def test_rows_of_zeros_do_not_count_as_measurements(x64):
    _, a, x, _ = _gaussian(False)
    a[20:] = 0
    with pytest.warns(UserWarning, match="y: 20 measurements of 12"):
        phase_retrieval(a, (a @ x) ** 2, steps=1)


def test_a_real_signal_behind_a_complex_operator_stays_real_and_is_found(x64):
    op, a, _, rng = _gaussian(True)
    x = rng.standard_normal(N)
    solution = phase_retrieval(op, np.abs(a @ x) ** 2, real=True)
    assert not np.iscomplexobj(solution.x) and _distance(np.asarray(solution.x), x) < 1e-6
    z = x + 0.1
    assert not np.iscomplexobj(phase_retrieval(op, np.abs(a @ x) ** 2, init=z, steps=3).x)


def test_one_plain_fourier_transform_does_not_tell_the_signal(x64):
    """A shift of the reflected signal has the same magnitudes, and the methods fit magnitudes without finding it."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(16)
    plain = OversampledFourier((16,), 1)
    y = np.abs(np.fft.fft(x)) ** 2
    np.testing.assert_allclose(np.abs(np.fft.fft(np.roll(x[::-1], 3))) ** 2, y, rtol=1e-10)
    with pytest.warns(UserWarning, match="16 measurements of 16"):
        solution = phase_retrieval(plain, y, "amplitude", real=True, init="random", steps=500)
    assert float(solution.value) < 1e-8
    assert _distance(np.asarray(solution.x), x) > 0.1


def test_it_runs_inside_jit_and_batches(x64):
    rng = np.random.default_rng(6)
    a, xs = rng.standard_normal((60, 6)), rng.standard_normal((3, 6))

    @jax.jit
    def many(ys):
        return jax.vmap(lambda y: phase_retrieval(a, y, "wirtinger", key=0).x)(ys)

    for z, x in zip(np.asarray(many((xs @ a.T) ** 2)), xs, strict=True):
        assert _distance(z, x) < 1e-6


def test_single_precision_ends_near_the_signal(x32):
    rng = np.random.default_rng(7)
    a, x = rng.standard_normal((120, 12)).astype(np.float32), rng.standard_normal(12).astype(np.float32)
    solution = phase_retrieval(a, (a @ x) ** 2, steps=400)
    assert solution.x.dtype == np.float32 and _distance(np.asarray(solution.x), x) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "wirtingr"}, "method: got 'wirtingr'.*did you mean 'wirtinger'"),
        ({"init": "spectrl"}, "init: got 'spectrl'"),
        ({"method": "lbfgs", "step_size": 0.1}, "step_size: got 0.1; expected none: lbfgs has no step size"),
        ({"step_size": -1.0}, "step_size: got -1.0"),
        ({"key": "a"}, "key: got str"),
    ],
)
def test_bad_arguments(x64, arguments, message):
    _, a, x, _ = _gaussian(False)
    with pytest.raises(InputError, match=message):
        phase_retrieval(a, (a @ x) ** 2, **arguments)
