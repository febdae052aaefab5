"""TopK SGD against the paper's loop in NumPy, the quantities of its analysis, and their limits."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.distributed.aggregators import Mean
from fallline.distributed.double_squeeze import double_squeeze
from fallline.distributed.round import Round
from fallline.distributed.rules import Gradient
from fallline.distributed.sharded import Sharded
from fallline.distributed.topk_sparsified import dense_shadow, topk_sparsified
from fallline.parts.codecs import TopK

P, ROWS, D, BATCH, STEPS, K = 3, 6, 10, 2, 20, 3
KEY = jax.random.key(5)
A = np.sin(np.arange(P * ROWS * D) ** 1.5).reshape(P, ROWS, D)
B = np.cos(np.arange(P * ROWS) ** 1.5).reshape(P, ROWS)
X0 = np.sin(1 + np.arange(D))


def squares(x, batch):
    rows, targets = batch
    return 0.5 * (rows @ x - targets) ** 2


def problem(workers=P):
    return Sharded(squares, (A[:workers], B[:workers]), BATCH)


def falling(t):
    return 1.0 / (5 + t)


@functools.cache
def drawn():
    """The rows that the workers' keys draw, (step, worker, batch)."""

    def of_worker(t, worker):
        ask = jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, t), worker), 4)[0]
        return jax.random.randint(ask, (BATCH,), 0, ROWS)

    grid = jnp.meshgrid(jnp.arange(STEPS), jnp.arange(P), indexing="ij")
    return np.asarray(jax.jit(jnp.vectorize(of_worker, signature="(),()->(b)"))(*grid))


def gradients(v, t, workers):
    """G^p(v) of all workers by hand, on the rows that they draw."""
    picked = [(A[p][drawn()[t, p]], B[p][drawn()[t, p]]) for p in range(workers)]
    return np.array([a.T @ (a @ v - b) / BATCH for a, b in picked])


def top(v, k):
    kept = np.argsort(-np.abs(v), kind="stable")[:k]
    return np.where(np.isin(np.arange(v.size), kept), v, 0.0)


def by_hand(k=K, workers=P, step_size=falling):
    """Algorithm 1 with its dense iterate: v, residuals, x and the analysis after each step."""
    v, x, eps, found = X0.copy(), X0.copy(), np.zeros((workers, D)), []
    gamma = np.sqrt((D - k) / D)
    for t in range(STEPS):
        steps = step_size(t) * gradients(v, t, workers)
        acc = eps + steps
        sent = np.array([top(row, k) for row in acc])
        dense, size, before = steps.mean(axis=0), np.linalg.norm(steps.mean(axis=0)), np.linalg.norm(v - x)
        eps, v, x = acc - sent, v - sent.sum(axis=0) / workers, x - dense
        xi = np.linalg.norm(top(acc.mean(axis=0), k) - sent.mean(axis=0)) / size
        gap, bound = np.linalg.norm(v - x), gamma * before + (gamma + xi) * size
        analysis = {
            "gap": gap,
            "xi": xi,
            "left_out": np.linalg.norm(dense - top(dense, k)) / size,
            "lemma_ratio": gap / bound if bound else 0.0,
        }
        found.append((v, eps, x, analysis))
    return found


@eqx.filter_jit
def step(solver, problem, state, key):
    return solver.step(problem, state, key=key)


def states(solver, problem, steps=STEPS):
    """The states after each step."""
    state, found = jax.tree.map(jnp.asarray, solver.init(problem, jnp.asarray(X0), key=None)), []
    for t in range(steps):
        state = step(solver, problem, state, jax.random.fold_in(KEY, t))
        found.append(state)
    return found


# ---- the algorithm --------------------------------------------------------------------------------


def test_iterates_and_residuals_are_the_papers(x64):
    for state, (v, eps, _, _) in zip(states(topk_sparsified(falling, K), problem()), by_hand(), strict=True):
        np.testing.assert_allclose(state.x, v, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state.uplink[:, 0], eps, rtol=0, atol=1e-12)


def test_with_a_constant_step_size_it_may_stand_on_either_side(x64):
    """Residuals of gradients, and the step size on what is sent: the same v, and ε / α."""
    alpha, v, held = 0.1, X0.copy(), np.zeros((P, D))
    last = states(topk_sparsified(alpha, K), problem())[-1]
    for t in range(STEPS):
        acc = held + gradients(v, t, P)
        sent = np.array([top(row, K) for row in acc])
        held, v = acc - sent, v - alpha * sent.mean(axis=0)
    np.testing.assert_allclose(last.x, v, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last.uplink[:, 0], alpha * held, rtol=0, atol=1e-12)


def pulled_apart(x, batch):
    """½(x₀ − b)² + ½·0.1(x₁ − 1)²: the workers disagree on x₀ alone, and loudly."""
    return 0.5 * (x[0] - batch) ** 2 + 0.05 * (x[1] - 1) ** 2


def test_without_residuals_what_workers_agree_on_may_never_be_said(x64):
    apart = Sharded(pulled_apart, np.array([[-1.0], [1.0]]))
    with_residuals = topk_sparsified(lambda t: 0.2 / (1 + t / 200), 1)
    without = Round(with_residuals.worker, TopK(1), Mean(), None, with_residuals.server)
    kept, lost = (fl.minimize(apart, jnp.zeros(2), solver, steps=3000).x for solver in (with_residuals, without))
    np.testing.assert_array_equal(lost, [0.0, 0.0])  # each worker says its x₀, and these cancel
    np.testing.assert_allclose(kept, [0.0, 1.0], atol=0.05)


@pytest.mark.parametrize(("k", "density", "sent"), [(7, None, 7), (None, 0.01, 24), (None, 1e-9, 1), (None, 1.0, 2410)])
def test_everybody_receives_what_all_others_send(x32, k, density, sent):
    wide = Sharded(squares, (np.ones((8, 1, 2410), np.float32), np.ones((8, 1), np.float32)))
    account = topk_sparsified(0.1, k, density=density).account(wide, jnp.zeros(2410, jnp.float32))
    assert (account.up, account.down, account.dense) == (8 * sent, 7 * 8 * sent, 4 * 2410)


# ---- the analysis ---------------------------------------------------------------------------------


def test_the_shadow_says_what_the_analysis_says(x64):
    solver = dense_shadow(topk_sparsified(falling, K))
    found = states(solver, problem())
    for state, (v, _, x, analysis) in zip(found, by_hand(), strict=True):
        np.testing.assert_allclose(state.x, v, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state.virtual, x, rtol=0, atol=1e-12)
        for name, expected in analysis.items():
            np.testing.assert_allclose(getattr(state, name), expected, rtol=1e-9, atol=1e-12)
        assert float(state.identity_error) <= 1e-13
        assert float(state.lemma_ratio) <= 1 + 1e-12
        assert float(state.left_out) <= np.sqrt((D - K) / D)


def test_the_shadow_changes_nothing_and_counts_what_it_asks(x64):
    plain, watched = topk_sparsified(falling, K), dense_shadow(topk_sparsified(falling, K))
    alone = fl.minimize(problem(), X0, plain, steps=STEPS, key=0, every=1)
    beside = fl.minimize(problem(), X0, watched, steps=STEPS, key=0, every=1, record=("value", "xi", "lemma_ratio"))
    np.testing.assert_allclose(beside.x, alone.x, rtol=0, atol=1e-14)
    assert int(beside.calls.minibatch) == 2 * int(alone.calls.minibatch) == 2 * STEPS
    assert len(beside.history["xi"]) == STEPS + 1 and beside.history["xi"].max() > 0.1


@pytest.mark.parametrize(("workers", "k"), [(1, K), (P, D)], ids=["one worker", "all entries"])
def test_xi_is_zero_for_one_worker_and_for_all_entries(x64, workers, k):
    found = states(dense_shadow(topk_sparsified(falling, k)), problem(workers))
    assert max(float(state.xi) for state in found) <= 1e-14
    v, _, x, _ = by_hand(k, workers)[-1]
    np.testing.assert_allclose(found[-1].x, v, rtol=0, atol=1e-12)
    if k == D:
        assert not np.any(found[-1].inner.uplink) and float(found[-1].gap) <= 1e-14
        np.testing.assert_allclose(v, x, rtol=0, atol=1e-14)  # dense SGD


def test_xi_reaches_what_opposite_workers_make_of_it(x64):
    """±5 in one coordinate and 1 in the other, K = 1: the mean is (0, 1), what is sent cancels, so that ξ = 1."""
    apart = Sharded(lambda x, batch: batch * x[0] + x[1], np.array([[-5.0], [5.0]]))
    solver = dense_shadow(topk_sparsified(0.1, 1))
    state = step(solver, apart, jax.tree.map(jnp.asarray, solver.init(apart, jnp.zeros(2), key=None)), None)
    assert float(state.xi) == pytest.approx(1.0, abs=1e-15)
    assert float(state.gap) == pytest.approx(0.1, abs=1e-15)
    assert float(state.lemma_ratio) == pytest.approx(1 / (1 + np.sqrt(0.5)), abs=1e-15)


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0.0, 1), {}, "step_size: got 0.0"),
        ((None, 1), {}, "step_size: got None"),
        ((np.inf, 1), {}, "step_size: got inf"),
        ((0.1, 0), {}, "k: got 0"),
        ((0.1,), {}, "k and density: got None and None"),
        ((0.1, 1), {"density": 0.5}, "k and density: got 1 and 0.5"),
        ((0.1,), {"density": 1.5}, "density: got 1.5"),
        ((0.1, 1), {"exchange": "sliced"}, "downlink: got None"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(fl.InputError, match=f"^{message}"):
        topk_sparsified(*arguments, **options)


def test_more_entries_than_there_are_are_refused(x64):
    for solver in (topk_sparsified(0.1, D + 1), dense_shadow(topk_sparsified(0.1, D + 1))):
        with pytest.raises(fl.InputError, match="^k: got 11"):
            fl.minimize(problem(), X0, solver, steps=1, key=0)


@pytest.mark.parametrize(
    "solver",
    [
        double_squeeze(0.1),
        topk_sparsified(0.1, 1, blocks=2),
        Round(Gradient(), TopK(1), Mean(), None, double_squeeze(0.1).server),
        fl.perturbed_gradient_descent(0.1, radius=0.1, gradient_threshold=1.0, patience=1),
    ],
    ids=["another round", "blocks", "no residual", "no round"],
)
def test_the_shadow_is_of_this_method_alone(solver):
    with pytest.raises(fl.InputError, match="^solver: got"):
        dense_shadow(solver)
