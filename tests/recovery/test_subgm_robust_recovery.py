"""The sub-gradient method with a small start against the paper's formulas in NumPy, and what a short schedule does."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.recovery import PSD, Absolute, Dense, Recovery
from fallline.recovery.subgm_robust_recovery import (
    check_schedule,
    sign_rip,
    signal_size,
    small_signs,
    subgm_robust_recovery,
)

N, M = 12, 400
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MATRICES = RNG.standard_normal((M, N, N))
BASIS = np.linalg.qr(RNG.standard_normal((N, 2)))[0]
SIGNAL = BASIS @ BASIS.T
CLEAN = np.einsum("kij,ij->k", MATRICES, SIGNAL)
OUTLIERS = np.where(RNG.random(M) < 0.25, 10 * RNG.standard_normal(M), 0)
START = 0.1 * RNG.standard_normal((N, 4))
GAIN = (MATRICES**2).sum() / N**2  # the problem's measure of m


def problem(noise=OUTLIERS, rank=4, dtype=np.float64):
    op = Dense(MATRICES.reshape(M, -1).astype(dtype), (N, N))
    return Recovery(op, (CLEAN + noise).astype(dtype), PSD(rank), Absolute())


def q_by_hand(u, y):
    signs = np.sign(np.einsum("kij,ij->k", MATRICES, u @ u.T) - y)
    return np.einsum("k,kij->ij", signs, (MATRICES + MATRICES.transpose(0, 2, 1)) / 2) / GAIN


def run_by_hand(u, y, steps, eta0, rho=1.0, schedule="geometric"):
    """The last point, and f along the way."""
    values = []
    for t in range(steps + 1):
        values.append(np.abs(np.einsum("kij,ij->k", MATRICES, u @ u.T) - y).sum() / GAIN)
        if t == steps:
            return u, np.array(values)
        q = q_by_hand(u, y)
        eta = {"geometric": eta0 * rho**t / np.linalg.norm(q), "loss": eta0 * values[-1], "constant": eta0}[schedule]
        u = u - eta * q @ u


def error(x):
    return np.linalg.norm(x @ x.T - SIGNAL) / np.linalg.norm(SIGNAL)


def solve(noise=OUTLIERS, alpha=1e-4, rank=4, solver=None, steps=1500):
    p = problem(noise, rank)
    return fl.minimize(p, small_signs(alpha)(p, KEY), solver or subgm_robust_recovery(), steps=steps)


# ---- the algorithm --------------------------------------------------------------------------------


def test_signal_gradient_is_twice_less_what_pulls_the_factor(x64):
    p = problem()
    value, e = eqx.filter_jit(lambda p, x: p.signal_gradient(x))(p, START)
    q = q_by_hand(START, CLEAN + OUTLIERS)
    np.testing.assert_allclose((e + e.T) / 2, q, atol=1e-13)
    again, gradient = eqx.filter_jit(lambda p, x: p.value_and_gradient(x))(p, START)
    np.testing.assert_allclose(gradient, 2 * q @ START, atol=1e-13)
    np.testing.assert_allclose(value, again, rtol=1e-14)
    np.testing.assert_allclose(value, np.abs(np.einsum("kij,ij->k", MATRICES, START @ START.T) - p.y).sum() / GAIN)


@pytest.mark.parametrize(("schedule", "eta0"), [("geometric", 0.2), ("loss", 0.05), ("constant", 0.1)])
def test_iterates_are_the_papers(x64, schedule, eta0):
    solver = subgm_robust_recovery(eta0, 0.95, schedule=schedule)
    steps = 25
    solution = fl.minimize(problem(), START, solver, steps=steps, record=("value", "gradient_norm", "growth"))
    x, values = run_by_hand(START, CLEAN + OUTLIERS, steps, eta0, 0.95, schedule)
    np.testing.assert_allclose(solution.x, x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(solution.history["value"], values, rtol=1e-10)
    slope = 2 * q_by_hand(x, CLEAN + OUTLIERS) @ x
    np.testing.assert_allclose(solution.gradient_norm, np.linalg.norm(slope), rtol=1e-9)
    growth = solution.history["growth"]
    np.testing.assert_allclose(growth[-1] / growth[0], np.linalg.norm(x @ x.T) / np.linalg.norm(START @ START.T))


def test_start_is_small_and_of_the_signs(x64):
    p = problem()
    c = -q_by_hand(np.zeros((N, 1)), CLEAN + OUTLIERS)
    values, vectors = np.linalg.eigh(c)
    best = vectors[:, -4:] * np.maximum(values[-4:], 0) @ vectors[:, -4:].T
    x = small_signs(1e-3)(p, KEY)
    np.testing.assert_allclose(x @ x.T, 1e-6 * best, atol=1e-14)
    wild = small_signs(1e-3)(problem(1e6 * OUTLIERS), KEY)  # only the signs count
    np.testing.assert_allclose(wild @ wild.T, x @ x.T, atol=1e-7)


# ---- what it recovers -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_recovers_without_knowing_the_rank_whatever_the_outliers(x64, scale):
    solution = solve(scale * OUTLIERS)
    assert solution.status.converged and error(solution.x) <= 1e-3
    assert 0.3 <= solution.state.growth <= 1.5


def test_exactly_the_rank_is_recovered_to_the_last_step(x64):
    assert error(solve(rank=2).x) <= 1e-6


def test_error_falls_with_the_start(x64):
    assert error(solve(alpha=1e-4).x) <= error(solve(alpha=1e-1).x) / 10


def test_loss_proportional_steps_reach_rounding_without_noise(x64):
    solver = subgm_robust_recovery(0.5, schedule="loss")
    assert error(solve(0 * OUTLIERS, 1e-3, rank=2, solver=solver, steps=400).x) <= 1e-10


# ---- growth ---------------------------------------------------------------------------------------


def test_size_is_that_of_the_signal(x64):
    clean = np.random.default_rng(1).standard_normal((20_000, 4))
    p = Recovery(3 * clean, (3 * clean @ np.array([1.0, 2.0, 2.0, 0.0])), None, Absolute())
    np.testing.assert_allclose(signal_size(p), 3.0, rtol=0.03)


def unchecked(p, x0, solver, steps):
    """A run inside `jit`, where nobody can look at the start."""

    @jax.jit
    def run(x0):
        solution = fl.minimize(p, x0, solver, steps=steps)
        return solution.x, solution.state.growth, solution.status.code

    return run(x0)


def test_too_short_a_schedule_is_refused_and_its_run_does_not_say_converged(x64):
    p, short = problem(), subgm_robust_recovery(0.1, 0.985)
    x0 = small_signs(1e-4)(p, KEY)
    with pytest.raises(fl.InputError, match=r"decay: got 0\.985.* has not grown .*; try decay=0\.99\d") as refusal:
        check_schedule(p, x0, short)
    with pytest.raises(fl.InputError, match="has not grown"):
        fl.minimize(p, x0, short, steps=2)
    x, growth, ending = unchecked(p, x0, short, 1500)
    assert ending == fl.Ending.STEP_LIMIT and growth < 1e-2
    np.testing.assert_allclose(error(x), 1, atol=1e-2)
    advised = float(str(refusal.value).split("decay=")[1])
    longer = subgm_robust_recovery(0.1, advised)
    check_schedule(p, x0, longer, rank=2)
    assert error(fl.minimize(p, x0, longer, steps=10_000).x) <= 1e-2


def test_growth_of_the_linear_phase_is_bounded_by_the_prediction(x64):
    p, short = problem(), subgm_robust_recovery(0.1, 0.9, tolerance=1e-12)
    x0 = 1e-6 * START
    q = -q_by_hand(x0, CLEAN + OUTLIERS)
    values, vectors = np.linalg.eigh(q)
    x = unchecked(p, x0, short, 300)[0]
    steps = 0.1 * 0.9 ** np.arange(300)
    factors = np.prod(1 + steps[:, None] * values / np.linalg.norm(q), axis=0)
    np.testing.assert_allclose(vectors.T @ x, factors[:, None] * (vectors.T @ x0), rtol=1e-8, atol=1e-20)
    assert np.all(factors <= np.exp(0.1 / 0.1 * values / np.linalg.norm(q)))


# ---- Sign-RIP -------------------------------------------------------------------------------------


def test_sign_rip_is_the_supremum_by_hand(x64):
    noise = np.where(OUTLIERS == 0, 0, 5.0)
    op = Dense(2 * MATRICES.reshape(M, -1), (N, N))
    deviations = sign_rip(op, 2, key=KEY, noise=noise, samples=3)
    for key, deviation in zip(jax.random.split(KEY, 3), deviations, strict=True):
        u = np.asarray(jax.random.normal(key, (N, 2), jnp.float64))
        x = u @ u.T / np.linalg.norm(u @ u.T)
        scaled = MATRICES / np.sqrt((MATRICES**2).sum() / (M * N * N))
        signs = np.sign(np.einsum("kij,ij->k", scaled, x) + noise)
        q = np.einsum("k,kij->ij", signs, (scaled + scaled.transpose(0, 2, 1)) / 2) / M
        phi = math.sqrt(2 / math.pi) * np.exp(-(noise**2) / 2).mean()
        values = np.linalg.svd(q / phi - x)[1]
        np.testing.assert_allclose(deviation, np.sqrt((values[:2] ** 2).sum()), rtol=1e-10)


def test_sign_rip_falls_with_the_number_of_measurements(x64):
    few = sign_rip(Dense(MATRICES[:100].reshape(100, -1), (N, N)), 1, key=KEY, samples=20)
    many = sign_rip(Dense(MATRICES.reshape(M, -1), (N, N)), 1, key=KEY, samples=20)
    assert 1.5 <= few.mean() / many.mean() <= 2.7  # 1/√m


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size: got 0.0"),
        ({"decay": 1.0}, "decay: got 1.0; expected a number above 0 and below 1"),
        ({"decay": 0.0}, "decay: got 0.0"),
        ({"tolerance": 0.0}, "tolerance: got 0.0"),
        ({"schedule": "geometrical"}, r"schedule: got 'geometrical'.*did you mean 'geometric'"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(fl.InputError, match=message):
        subgm_robust_recovery(**options)


def test_bad_start_and_rank_are_refused(x64):
    with pytest.raises(fl.InputError, match="alpha: got 0"):
        small_signs(0)
    with pytest.raises(fl.InputError, match="rank: got 13; expected at most the smaller dimension, 12"):
        problem(rank=13)
