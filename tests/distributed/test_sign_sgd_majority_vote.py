"""Majority vote against the paper's algorithm in NumPy, and what is exact of it: medians, equal gradients, scales."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import fallline as fl
from fallline.distributed.aggregators import Majority
from fallline.distributed.attacks import RandomSigns, SignFlip
from fallline.distributed.round import Round
from fallline.distributed.rules import Gradient, Step
from fallline.distributed.sharded import Sharded
from fallline.distributed.sign_sgd_majority_vote import (
    density,
    sign_failure_bound,
    sign_sgd_majority_vote,
    signal_to_noise,
)
from fallline.parts.codecs import Plain

ROWS, D, BATCH, STEPS = 6, 7, 3, 15
rng = np.random.default_rng(0)
FEATURES, TARGETS = rng.standard_normal((5, ROWS, D)), rng.standard_normal((5, ROWS))
START = rng.standard_normal(D)


def squares(x, batch):
    a, b = batch
    return (a @ x - b) ** 2 / 2


def points(x, batch):
    """½‖x − c‖², whose gradient is x − c."""
    return jnp.sum((x - batch) ** 2, axis=1) / 2


def run(solver, problem=None, x0=START, steps=STEPS):
    problem = Sharded(squares, (FEATURES, TARGETS), BATCH) if problem is None else problem
    return fl.minimize(problem, x0, solver, steps=steps, stop=None, key=0)


def falling(t):
    """Steps whose sum is infinite."""
    return 0.5 / (1 + t)


def by_hand(beta, step_size, decay, workers=5, flipped=0):
    """Algorithm 1, a zero and an even tie counted as +1."""
    x, v = START, np.zeros((workers, D))
    for t in range(STEPS):
        votes = np.zeros(D)
        for m in range(workers):
            of_worker = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), t + 1), m)
            rows = np.asarray(jax.random.randint(jax.random.split(of_worker, 4)[0], (BATCH,), 0, ROWS))
            a, b = FEATURES[m, rows], TARGETS[m, rows]
            v[m] = beta * v[m] + (1 - beta) * a.T @ (a @ x - b) / BATCH
            sign = np.where(v[m] >= 0, 1, -1)
            votes += -sign if m >= workers - flipped else sign
        x = x - step_size(t) * (np.where(votes >= 0, 1, -1) + decay * x)
    return x


@pytest.mark.parametrize(
    ("beta", "decay", "flipped"),
    [(0.0, 0.0, 0), (0.9, 0.0, 0), (0.9, 0.3, 2)],
    ids=["signSGD", "Signum", "adversaries"],
)
def test_it_is_the_algorithm_of_the_paper(x64, beta, decay, flipped):
    solver = sign_sgd_majority_vote(0.03, beta, weight_decay=decay, attack=SignFlip(flipped))
    np.testing.assert_allclose(run(solver).x, by_hand(beta, lambda t: 0.03, decay, flipped=flipped), rtol=1e-12)


def test_an_even_tie_is_a_vote_for_plus(x64):
    problem = Sharded(squares, (FEATURES[:4], TARGETS[:4]), BATCH)
    found = run(sign_sgd_majority_vote(falling, 0.0, weight_decay=0.1), problem).x
    np.testing.assert_allclose(found, by_hand(0.0, falling, 0.1, workers=4), rtol=1e-12)


def test_where_all_gradients_vanish_every_coordinate_moves(x64):
    """sign(0) = 1, as the authors pack it; with no vote for zeros the point would stay."""
    problem = Sharded(points, np.zeros((2, 1, 3)))
    assert np.array_equal(run(sign_sgd_majority_vote(0.25), problem, np.zeros(3), 1).x, np.full(3, -0.25))
    silent = Round(Gradient(), Plain(), Majority("zero"), Plain(), Step(optax.sgd, learning_rate=0.25))
    assert np.array_equal(run(silent, problem, np.zeros(3), 1).x, np.zeros(3))


def test_it_converges_to_the_median_not_to_the_mean(x64):
    """Three workers with targets 1, 2, 10 meet at 2, within the last step; the mean is 13/3."""
    problem = Sharded(points, np.array([1.0, 2.0, 10.0])[:, None, None])
    end = run(sign_sgd_majority_vote(falling, 0.0), problem, np.array([3.0]), 40_000).x[0]
    assert abs(float(end) - 2) <= falling(39_999)


def equal_gradients(attack):
    """Nine workers with the same data, all of it at each step."""
    problem = Sharded(squares, (np.repeat(FEATURES[:1], 9, axis=0), np.repeat(TARGETS[:1], 9, axis=0)))
    return run(sign_sgd_majority_vote(0.01, 0.9, attack=attack), problem).x


def test_with_equal_gradients_just_under_half_inverted_changes_no_bit_and_more_turns_the_run_around(x64):
    honest = equal_gradients(None)
    assert np.array_equal(equal_gradients(SignFlip(4)), honest)
    turned = equal_gradients(SignFlip(5, beyond_tolerance=True))
    first = np.sign(FEATURES[0].T @ (FEATURES[0] @ START - TARGETS[0]))
    assert np.all((honest - START) * first < 0) and np.all((turned - START) * first > 0)


def test_the_sizes_of_gradients_do_not_matter(x64):
    """A scale of 2⁻²⁰ changes no sign, and so no bit: neither signs nor decay have seen it."""
    scaled = Sharded(lambda x, batch: squares(x, batch) * 2.0**-20, (FEATURES, TARGETS), BATCH)
    solver = sign_sgd_majority_vote(0.03, weight_decay=0.3)
    assert np.array_equal(run(solver).x, run(solver, scaled).x)


def test_random_signs_of_the_honest_ones_are_outvoted(x64):
    """With one honest sign and 9 workers, four random ones cannot turn five votes."""
    assert np.array_equal(equal_gradients(RandomSigns(4)), equal_gradients(None))


def test_a_coordinate_is_one_bit_each_way(x32):
    problem = Sharded(points, np.zeros((3, 2, 100), np.float32))
    account = sign_sgd_majority_vote(0.1).account(problem, np.zeros(100, np.float32))
    assert (account.up, account.down, account.dense) == (16, 16, 400)  # ⌈100/32⌉ words
    state = run(sign_sgd_majority_vote(0.1), problem, np.ones(100, np.float32), 5).state
    assert float(state.bytes_up) == float(state.bytes_down) == 5 * 3 * 16


@pytest.mark.parametrize("s", [0.3, 1.0, 1.155, 2.0, 3.0])
def test_the_failure_of_a_sign_is_within_the_bound(x64, s):
    """Probabilities that noise of variance 1 is below −S, in closed form."""
    bound = float(sign_failure_bound(s))
    for law in (stats.norm(), stats.laplace(scale=np.sqrt(0.5)), stats.uniform(-np.sqrt(3), 2 * np.sqrt(3))):
        assert law.std() == pytest.approx(1)
        assert law.cdf(-s) <= bound + 1e-15
    assert bound == pytest.approx(2 / 9 / s**2 if s > 2 / np.sqrt(3) else 0.5 - s / np.sqrt(12), rel=1e-14)


def test_the_bound_is_met_by_uniform_noise_and_broken_by_two_points(x64):
    s = np.array([0.0, 0.3, 1.0, 2 / np.sqrt(3)])
    np.testing.assert_allclose(sign_failure_bound(s), stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)).cdf(-s), rtol=1e-12)
    assert np.all(np.asarray(sign_failure_bound(s[1:3])) < 0.5)  # ±1, where half of the noise is at or below −S
    np.testing.assert_allclose(sign_failure_bound(2 / np.sqrt(3) * (1 + 1e-9)), 1 / 6, rtol=1e-8)


def test_densities(x64):
    assert float(density(jnp.array([3.0, -3.0, 3.0]))) == pytest.approx(1, rel=1e-15)
    assert float(density(jnp.eye(8)[2])) == pytest.approx(1 / 8, rel=1e-15)
    normal = np.random.default_rng(1).standard_normal(400_000)
    assert float(density(normal)) == pytest.approx(2 / np.pi, rel=5e-3)  # (E|v|)²/E v² of a normal entry


def test_signal_to_noise():
    gradients = np.array([[1.0, -4.0, 2.0], [3.0, -2.0, 2.0], [2.0, 0.0, 2.0]], np.float32)
    np.testing.assert_allclose(signal_to_noise(gradients), [2.0, 1.0, np.inf], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sign_sgd_majority_vote(0.0), "step_size"),
        (lambda: sign_sgd_majority_vote(0.1, 1.0), "beta"),
        (lambda: sign_sgd_majority_vote(0.1, -0.1), "beta"),
        (lambda: sign_sgd_majority_vote(0.1, weight_decay=-1.0), "weight_decay"),
        (lambda: run(sign_sgd_majority_vote(0.1, attack=SignFlip(3))), "attack"),
    ],
)
def test_bad_input(make, named):
    with jax.enable_x64(True), pytest.raises(fl.InputError, match=rf"^{named}:"):
        make()
