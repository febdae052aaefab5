"""Dynamical stability against dense algebra: the p² × p² map, bisection on its spectral radius, simulated SGD."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.landscape.dynamical_stability import (
    Condition,
    dynamical_stability,
    largest_stable_step,
    moment_map,
)

N, P = 6, 4
ROWS = np.random.default_rng(0).normal(size=(N, P))
X = np.array([1.0, -2.0, 0.5, 3.0])
Y = ROWS @ X
H = ROWS.T @ ROWS / N


def linear(x, rows):
    return rows @ x


def at(batch_size=1, step_size=0.1, rows=ROWS, x=X, **options):
    x, rows = jnp.asarray(x), jnp.asarray(rows)
    return dynamical_stability(linear, x, rows, rows @ x, step_size=step_size, batch_size=batch_size, **options)


def dense_map(rows, eta, share):
    """T as a matrix on vec(S), from Kronecker products."""
    n, p = rows.shape
    h, eye = rows.T @ rows / n, np.eye(p)
    noise = (1 - share) * np.kron(h, h)
    for g in rows:
        noise += share / n * np.kron(np.outer(g, g), np.outer(g, g))
    return np.eye(p * p) - eta * (np.kron(h, eye) + np.kron(eye, h)) + eta**2 * noise


def by_bisection(rows, share):
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        stable = np.max(np.abs(np.linalg.eigvals(dense_map(rows, middle, share)))) <= 1
        low, high = (middle, high) if stable else (low, middle)
    return low


# ---- exact ---------------------------------------------------------------------------------------


def test_what_is_exact_is_that_of_the_dense_matrix(x64):
    found = at()
    norms = np.sum(ROWS**2, axis=1)
    np.testing.assert_allclose(found.trace.value, np.trace(H), rtol=1e-12)
    np.testing.assert_allclose(found.squared_frobenius.value, np.sum(H**2), rtol=1e-12)
    np.testing.assert_allclose(found.frobenius, np.linalg.norm(H), rtol=1e-12)
    np.testing.assert_allclose(found.largest, np.linalg.eigvalsh(H)[-1], rtol=1e-12)
    np.testing.assert_allclose(found.fourth, np.mean(norms**2), rtol=1e-12)
    assert float(found.trace.error) == float(found.squared_frobenius.error) == float(found.largest_residual) == 0


@pytest.mark.parametrize(("batch", "share"), [(1, 1.0), (2, 0.5), (4, 0.25), (None, 0.0)])
def test_the_largest_stable_step_is_where_the_spectral_radius_reaches_one(x64, batch, share):
    np.testing.assert_allclose(at(batch).largest_step, by_bisection(ROWS, share), rtol=1e-9)


def test_the_steps_of_the_card_s_example(x64):
    steps = [round(float(at(batch).largest_step), 3) for batch in (1, 2, 4, None)]
    assert steps == [0.301, 0.495, 0.728, 1.302]


def test_without_replacement_the_share_is_smaller(x64):
    for batch in (2, 3, 6):
        share = (N - batch) / (batch * (N - 1))
        np.testing.assert_allclose(at(batch, replacement=False).largest_step, by_bisection(ROWS, share), rtol=1e-9)
    np.testing.assert_allclose(at(6, replacement=False).largest_step, 2 / np.linalg.eigvalsh(H)[-1], rtol=1e-9)


def test_neutral_directions_do_not_count(x64):
    """More parameters than examples: the same as in the coordinates of the range."""
    wide = np.random.default_rng(1).normal(size=(4, 9))
    q = np.linalg.qr(wide.T)[0]
    found = at(2, rows=wide, x=np.arange(9.0))
    np.testing.assert_allclose(found.largest_step, by_bisection(wide @ q, 0.5), rtol=1e-8)


def test_a_direction_that_no_example_sees_is_left_out(x64):
    rows = np.concatenate([ROWS, np.zeros((N, 2))], axis=1)
    found = at(1, rows=rows, x=np.arange(6.0))
    np.testing.assert_allclose(found.largest_step, at(1).largest_step, rtol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_map_is_that_of_the_kronecker_products(x64, share):
    moment = np.random.default_rng(2).normal(size=(P, P))  # not symmetric
    moved = moment_map(jnp.asarray(ROWS), jnp.asarray(moment), 0.17, share)
    np.testing.assert_allclose(np.ravel(moved), dense_map(ROWS, 0.17, share) @ moment.ravel(), rtol=1e-12)


@pytest.mark.parametrize("replacement", [True, False])
def test_the_map_is_the_mean_over_all_batches_of_sgd(x64, replacement):
    """E d dᵀ after one step of linearized SGD, over every batch of two that can be drawn."""
    eta, d = 0.2, np.array([0.3, -1.0, 0.4, 0.7])
    pairs = itertools.product(range(N), repeat=2) if replacement else itertools.permutations(range(N), 2)
    moved = [d - eta / 2 * sum(ROWS[i] * (ROWS[i] @ d) for i in pair) for pair in pairs]
    expected = np.mean([np.outer(m, m) for m in moved], axis=0)
    share = 1 / 2 if replacement else (N - 2) / (2 * (N - 1))
    np.testing.assert_allclose(
        moment_map(jnp.asarray(ROWS), jnp.asarray(np.outer(d, d)), eta, share), expected, rtol=1e-12
    )


def test_a_step_within_rounding_of_the_limit(x64):
    values, vectors = np.linalg.eigh(H)
    step = largest_stable_step(jnp.asarray(ROWS @ vectors), jnp.asarray(values), 1.0)
    radius = [np.max(np.abs(np.linalg.eigvals(dense_map(ROWS, f * float(step), 1.0)))) for f in (1 - 1e-6, 1 + 1e-6)]
    assert radius[0] < 1 < radius[1]


def test_alignment_from_its_definition(x64):
    targets = Y + np.array([0.1, -0.2, 0.3, 0.0, 0.05, -0.1])
    with pytest.warns(UserWarning, match="interpolating"):
        found = dynamical_stability(
            linear, jnp.asarray(X), jnp.asarray(ROWS), jnp.asarray(targets), step_size=0.1, batch_size=2
        )
    r = ROWS @ X - targets
    gradients = r[:, None] * ROWS
    noise = gradients.T @ gradients / N - np.outer(gradients.mean(0), gradients.mean(0))
    expected = np.trace(noise @ H) / (np.mean(r**2) * np.sum(H**2))
    np.testing.assert_allclose(found.alignment, expected, rtol=1e-10)
    limit = np.sqrt(2 / expected) / 0.1
    np.testing.assert_allclose(found.conditions["aligned noise"].limit, limit, rtol=1e-10)
    np.testing.assert_allclose(found.residual, np.mean(r**2), rtol=1e-12)


# ---- conditions ----------------------------------------------------------------------------------


def test_which_conditions_a_step_violates(x64):
    trace, largest = np.trace(H), np.linalg.eigvalsh(H)[-1]
    probed = 2 * trace / np.mean(np.sum(ROWS**2, axis=1) ** 2)
    stable = by_bisection(ROWS, 1.0)
    assert stable < probed < 2 / trace < 2 / largest  # the order in which they are lost, with a batch of one
    order = ["largest stable step", "identity", "trace", "largest eigenvalue"]
    for i, limit in enumerate([stable, probed, 2 / trace, 2 / largest]):
        below, above = at(1, 0.999 * limit).violated, at(1, 1.001 * limit).violated
        assert set(below) == set(order[:i]) and set(above) == set(order[: i + 1])


def test_with_larger_batches_the_trace_may_be_larger(x64):
    np.testing.assert_allclose(at(4, 0.1).conditions["trace"].limit, 2 * 4 / 0.1, rtol=1e-12)
    assert "trace" not in at(None, 0.1).conditions


def test_a_condition_within_two_errors_is_open():
    ends = [Condition(jnp.float32(v), jnp.float32(1), jnp.float32(0.1)).violated for v in (0.7, 0.9, 1.1, 1.3)]
    assert ends == [False, None, None, True]


def test_in_words(x64):
    said = str(at(1, 0.5))
    assert "largest stable step 0.3007" in said and "largest stable step: 0.5 <= 0.3007, violated" in said


# ---- a network, exactly and by products ------------------------------------------------------------

INPUTS = np.random.default_rng(3).normal(size=(40, 5)).astype(np.float32)
NET = {
    "in": np.random.default_rng(4).normal(size=(5, 7)).astype(np.float32),
    "out": np.random.default_rng(5).normal(size=7).astype(np.float32),
}


def net(x, inputs):
    return jnp.tanh(inputs @ x["in"]) @ x["out"]


def at_net(**options):
    return dynamical_stability(net, NET, INPUTS, net(NET, INPUTS), step_size=0.01, batch_size=4, **options)


def test_the_estimates_are_within_their_errors_of_the_exact_ones(x32):
    exact, found = at_net(), at_net(exact=False, probes=400)
    jacobian = jax.jacobian(net)(NET, INPUTS)
    rows = np.concatenate([np.asarray(jacobian[k]).reshape(40, -1) for k in ("in", "out")], axis=1).astype(float)
    np.testing.assert_allclose(exact.trace.value, np.sum(rows**2) / 40, rtol=1e-5)
    for name in ("trace", "squared_frobenius"):
        truth, estimate = float(getattr(exact, name).value), getattr(found, name)
        assert 0 < float(estimate.error) < 0.1 * truth
        assert abs(float(estimate.value) - truth) < 4 * float(estimate.error)
    np.testing.assert_allclose(found.fourth, exact.fourth, rtol=1e-5)
    np.testing.assert_allclose(found.largest, exact.largest, rtol=1e-5)
    assert np.isnan(float(found.largest_step)) and np.isnan(float(found.alignment))
    assert found.conditions["largest stable step"].violated is found.conditions["aligned noise"].violated is None
    assert float(found.conditions["trace"].error) == float(found.trace.error)


def test_few_steps_of_lanczos_give_a_value_from_below_with_its_residual(x32):
    exact, found = at_net(), at_net(exact=False, lanczos_steps=3)
    low, residual = float(found.largest), float(found.largest_residual)
    assert low < float(exact.largest) * (1 - 1e-4) and residual > 0
    gradients = jax.vmap(jax.grad(lambda x, row: net(x, row[None])[0]), (None, 0))(NET, INPUTS)
    rows = np.concatenate([np.asarray(g).reshape(40, -1) for g in jax.tree.leaves(gradients)], axis=1)
    eigenvalues = np.linalg.eigvalsh(rows @ rows.T / 40)
    assert np.min(np.abs(eigenvalues - low)) <= residual * (1 + 1e-4)


def test_along_a_compiled_run(x64):
    """Traceable: the trace at each of three points, as outside of `jit`."""
    scales = jnp.array([0.5, 1.0, 2.0])

    def probe(scale):
        return dynamical_stability(
            linear, scale * X, scale * ROWS, scale**2 * Y, step_size=0.1, batch_size=1
        ).trace.value

    traces = jax.jit(lambda: jax.lax.map(probe, scales))()
    np.testing.assert_allclose(traces, np.trace(H) * scales**2, rtol=1e-12)


def test_gradient_descent_stays_exactly_up_to_the_step(x64):
    """The loop itself: a perturbed minimum is found again at 0.99 of the step, and left at 1.01."""
    step = float(at(None).largest_step)

    def end(eta):
        d = np.ones(P)
        for _ in range(3000):
            d = d - eta * H @ d
        return np.linalg.norm(d)

    assert end(0.99 * step) < 1e-3 and end(1.01 * step) > 1e3


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step_size": 0.0}, "step_size: got 0.0"),
        ({"step_size": -1}, "step_size"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 1.5}, "batch_size: got 1.5"),
        ({"batch_size": 7, "replacement": False}, "at most the number of examples, 6"),
        ({"probes": 1}, "probes"),
        ({"inputs": ROWS[:0], "targets": Y[:0]}, "at least one example"),
        ({"targets": Y[:5]}, "share one leading axis"),
        ({"predict": lambda x, rows: jnp.sum(rows @ x)}, "one real number for each of the 6 examples"),
        ({"predict": lambda x, rows: rows}, "one real number for each of the 6 examples"),
        ({"params": {"w": np.arange(4)}}, r"params\['w'\]: got int64\[4\]"),
    ],
)
def test_bad_input(x64, change, said):
    given = {"predict": linear, "params": X, "inputs": ROWS, "targets": Y, "step_size": 0.1, "batch_size": 1, **change}
    predict, params, inputs, targets = (given.pop(name) for name in ("predict", "params", "inputs", "targets"))
    with pytest.raises(fl.InputError, match=said):
        dynamical_stability(predict, params, inputs, targets, **given)


def test_residuals_that_are_not_small_are_said(x64):
    with pytest.warns(UserWarning, match="mean squared residual is 1 of the targets' mean square"):
        dynamical_stability(linear, jnp.zeros(P), jnp.asarray(ROWS), jnp.asarray(Y), step_size=0.1)
