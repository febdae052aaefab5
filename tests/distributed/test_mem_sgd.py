"""Mem-SGD against the paper's algorithms in NumPy, with the same examples, coordinates and delays drawn outside."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.distributed.aggregators import Total
from fallline.distributed.channels import StaleReads
from fallline.distributed.mem_sgd import ShiftedDecay, mem_sgd
from fallline.distributed.round import Round
from fallline.distributed.rules import Gradient, Step
from fallline.distributed.sharded import Sharded
from fallline.parts.averaging import Averaged
from fallline.parts.codecs import Plain, RandomK, TopK

WORKERS, ROWS, D, STEPS = 3, 8, 6, 12
GAMMA, CONVEXITY, SHIFT = 2.0, 0.5, 9.0
rng = np.random.default_rng(0)
FEATURES, TARGETS = rng.standard_normal((WORKERS, ROWS, D)) / 2, rng.standard_normal((WORKERS, ROWS))
START = rng.standard_normal(D)


def ridge(x, batch):
    """½(aᵀx − b)² + (λ/2)‖x‖², for each row."""
    a, b = batch
    return (a @ x - b) ** 2 / 2 + CONVEXITY / 2 * jnp.sum(x**2)


def problem(workers):
    return Sharded(ridge, (FEATURES[:workers], TARGETS[:workers]), 1)


def settings(**options):
    return {"strong_convexity": CONVEXITY, "shift": SHIFT, "gamma": GAMMA, **options}


def run(solver, workers=1):
    return fl.minimize(problem(workers), START, solver, steps=STEPS, stop=None, key=0)


def top(v, k, key):
    return np.argsort(-np.abs(v), kind="stable")[:k]


def at_random(v, k, key):
    return np.asarray(jax.random.permutation(key, D))[:k]


def by_hand(choose, k, workers=1, most=0):
    """Algorithm 2: iterates, memories, and the sum of all steps η ∇f_i."""
    xs, m, asked = [START], np.zeros((workers, D)), np.zeros(D)
    for t in range(STEPS):
        eta, x = GAMMA / (CONVEXITY * (t + SHIFT)), xs[-1].copy()
        for w in range(workers):
            of_worker = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), t + 1), w)
            rows, coordinates, _, read = jax.random.split(of_worker, 4)
            i = int(jax.random.randint(rows, (1,), 0, ROWS)[0])
            age = int(jax.random.randint(read, (), 0, most + 1)) if most else 0
            seen = xs[max(0, t - age)]
            a, b = FEATURES[w, i], TARGETS[w, i]
            step = eta * (a * (a @ seen - b) + CONVEXITY * seen)
            v = step + m[w]
            g = np.zeros(D)
            kept = choose(v, k, jax.random.split(coordinates, 1)[0])
            g[kept] = v[kept]
            m[w] = v - g
            x, asked = x - g, asked + step
        xs.append(x)
    return np.array(xs), m, asked


def averaged(xs):
    weights = (np.arange(len(xs) - 1) + SHIFT) ** 2
    return weights @ xs[:-1] / weights.sum()


@pytest.mark.parametrize(("codec", "choose"), [(TopK, top), (RandomK, at_random)])
@pytest.mark.parametrize("workers", [1, WORKERS])
def test_it_is_the_algorithm_of_the_paper(x64, codec, choose, workers):
    solution = run(mem_sgd(codec(2), **settings()), workers)
    xs, memory, _ = by_hand(choose, 2, workers)
    np.testing.assert_allclose(solution.state.inner.x, xs[-1], rtol=1e-12)
    np.testing.assert_allclose(solution.state.inner.uplink[:, 0], memory, atol=1e-13)
    np.testing.assert_allclose(solution.x, averaged(xs), rtol=1e-12)


def test_late_reads_are_the_algorithm_with_delays(x64):
    solution = run(mem_sgd(TopK(2), **settings(reads=StaleReads(4))), WORKERS)
    xs, memory, _ = by_hand(top, 2, WORKERS, most=4)
    np.testing.assert_allclose(solution.state.inner.x, xs[-1], rtol=1e-12)
    np.testing.assert_allclose(solution.state.inner.uplink[:, 0], memory, atol=1e-13)
    assert not np.allclose(xs[-1], by_hand(top, 2, WORKERS)[0][-1])


def test_what_is_not_in_the_point_is_in_the_memories(x64):
    """x_t − Σ m_t = x_0 − Σ η_s ∇f_i(x_s), whatever is sent."""
    for codec, choose, workers in ((TopK, top, 1), (RandomK, at_random, WORKERS)):
        state = run(mem_sgd(codec(2), **settings()), workers).state.inner
        asked = by_hand(choose, 2, workers)[2]
        remembered = np.sum(state.uplink, axis=(0, 1))
        assert np.linalg.norm(remembered) > 0.1
        np.testing.assert_allclose(state.x - remembered, START - asked, rtol=1e-12)


def test_with_all_coordinates_it_is_plain_descent(x64):
    solution = run(mem_sgd(TopK(D), **settings()))
    plain = Round(
        Gradient(ShiftedDecay(GAMMA, CONVEXITY, SHIFT)), Plain(), Total(), None, Step(optax.sgd, learning_rate=1.0)
    )
    dense = run(Averaged(plain, 2, SHIFT))
    assert not np.any(solution.state.inner.uplink)
    assert np.array_equal(solution.x, dense.x)


def test_several_workers_with_a_share_of_gamma_and_shift_have_the_steps_of_one():
    """A round of W workers is W steps: γ/(λ(Wt + a)) = (γ/W)/(λ(t + a/W))."""
    one, many = ShiftedDecay(2.0, 0.1, 24.0), ShiftedDecay(2.0 / 8, 0.1, 24.0 / 8)
    for t in (0, 1, 10):
        assert many(t) == pytest.approx(one(8 * t), rel=1e-14)


def test_an_index_and_a_number_are_sent(x64):
    solution = run(mem_sgd(TopK(2), **settings()), WORKERS)
    inner = solution.state.inner
    assert float(inner.bytes_up) == STEPS * WORKERS * 2 * (4 + 8)
    assert float(inner.bytes_down) == STEPS * WORKERS * (WORKERS - 1) * 2 * (4 + 8)  # each hears of all the others
    account = mem_sgd(TopK(2), **settings()).solver.account(problem(WORKERS), START)
    assert (account.up, account.dense) == (24, 48)


def test_it_converges_where_the_same_without_memory_does_not(x64):
    """The minimizer by linear algebra; without memory top-1 never sends what is small."""
    a, b = FEATURES[0] * [4, 1, 1, 1, 1, 1], TARGETS[0]
    shards = Sharded(ridge, (a[None], b[None]), 1)
    best = np.linalg.solve(a.T @ a / ROWS + CONVEXITY * np.eye(D), a.T @ b / ROWS)
    with_memory = mem_sgd(**settings(shift=60.0))
    without = eqx.tree_at(lambda s: s.solver.uplink, with_memory, TopK(1))
    errors = [
        np.linalg.norm(fl.minimize(shards, START, solver, steps=20_000, stop=None, key=0, every=20_000).x - best)
        for solver in (with_memory, without)
    ]
    assert errors[0] < 0.02 * np.linalg.norm(best) < 0.2 * np.linalg.norm(best) < errors[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"strong_convexity": 0.0}, "strong_convexity"),
        ({"strong_convexity": -1.0}, "strong_convexity"),
        ({"shift": 0.5}, "shift"),
        ({"shift": np.inf}, "shift"),
        ({"codec": Plain()}, "codec"),
        ({"codec": "top-1"}, "codec"),
        ({"reads": 3}, "reads"),
    ],
)
def test_bad_input(options, named):
    with pytest.raises(fl.InputError, match=rf"^{named}:"):
        mem_sgd(**settings(**options))


def test_more_coordinates_than_there_are(x64):
    with pytest.raises(fl.InputError, match=r"^k: got 7; expected at most the length of the vector, 6"):
        run(mem_sgd(TopK(D + 1), **settings()))
