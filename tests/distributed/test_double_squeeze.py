"""DoubleSqueeze against the paper's loop in NumPy, its invariant for any codec, and what memories are for."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.distributed.double_squeeze import double_squeeze
from fallline.distributed.round import Round
from fallline.distributed.sharded import Sharded
from fallline.parts.codecs import QSGD, Plain, RandomK, Signs, Split, TopK

N, ROWS, D, BATCH, ROUNDS = 4, 6, 12, 3, 25
KEY = jax.random.key(7)
A = np.sin(np.arange(N * ROWS * D) ** 1.5).reshape(N, ROWS, D)
B = np.cos(np.arange(N * ROWS) ** 1.5).reshape(N, ROWS)
X0 = np.sin(1 + np.arange(D))


def squares(x, batch):
    rows, targets = batch
    return 0.5 * (rows @ x - targets) ** 2


def problem(dtype=np.float64):
    return Sharded(squares, (A.astype(dtype), B.astype(dtype)), BATCH)


@functools.cache
def drawn():
    """The rows that the workers' keys draw, (round, worker, batch)."""

    def of_worker(round_, worker):
        ask = jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, round_), worker), 4)[0]
        return jax.random.randint(ask, (BATCH,), 0, ROWS)

    grid = jnp.meshgrid(jnp.arange(ROUNDS), jnp.arange(N), indexing="ij")
    return np.asarray(jax.jit(jnp.vectorize(of_worker, signature="(),()->(b)"))(*grid))


def gradient(x, worker, round_):
    """A worker's gradient by hand, on the rows that it draws."""
    rows = drawn()[round_, worker]
    a, b = A[worker][rows], B[worker][rows]
    return a.T @ (a @ x - b) / BATCH


@eqx.filter_jit
def step(solver, problem, state, key):
    return solver.step(problem, state, key=key)


def states(solver, problem, rounds, x0=X0, key=KEY):
    """The state before each round, and the last."""
    found = [jax.tree.map(jnp.asarray, solver.init(problem, jnp.asarray(x0), key=None))]
    for t in range(rounds):
        found.append(step(solver, problem, found[-1], jax.random.fold_in(key, t)))
    return found


def one_bit(v):
    return np.linalg.norm(v) / np.sqrt(v.size) * np.where(v >= 0, 1.0, -1.0)


def one_bit_mean(v):
    return np.abs(v).mean() * np.where(v >= 0, 1.0, -1.0)


def top(k):
    def q(v):
        kept = np.argsort(-np.abs(v), kind="stable")[:k]
        return np.where(np.isin(np.arange(v.size), kept), v, 0.0)

    return q


def in_halves(q):
    return lambda v: np.concatenate([q(half) for half in np.split(v, 2)])


def by_hand(q, rounds, step_size):
    """The paper's algorithm box: x, the workers' memories and the server's after each round."""
    x, own, server, found = X0.copy(), np.zeros((N, D)), np.zeros(D), []
    for t in range(rounds):
        v = np.array([gradient(x, i, t) for i in range(N)]) + own
        sent = np.array([q(row) for row in v])
        own = v - sent
        v = server + sent.mean(axis=0)
        answer = q(v)
        server = v - answer
        x = x - step_size(t) * answer
        found.append((x, own.copy(), server.copy()))
    return found


# ---- the algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "q", "options"),
    [
        (None, one_bit, {}),
        (Signs("l1"), one_bit_mean, {}),
        (TopK(3), top(3), {}),
        (None, in_halves(one_bit), {"blocks": 2}),
        (Split(TopK(2), (6, 6)), in_halves(top(2)), {}),
    ],
    ids=["1-bit", "1-bit l1", "top-k", "1-bit in blocks", "top-k of layers"],
)
def test_iterates_and_memories_are_the_papers(x64, codec, q, options):
    found = states(double_squeeze(0.1, codec, **options), problem(), ROUNDS)[1:]
    for state, (x, own, server) in zip(found, by_hand(q, ROUNDS, lambda t: 0.1), strict=True):
        np.testing.assert_allclose(state.x, x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.asarray(state.uplink).reshape(N, D), own, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.asarray(state.downlink).reshape(D), server, rtol=0, atol=1e-12)


def test_a_schedule_multiplies_after_both_compressions(x64):
    found = states(double_squeeze(lambda t: 0.2 / (1 + t), TopK(3)), problem(), ROUNDS)
    expected = by_hand(top(3), ROUNDS, lambda t: 0.2 / (1 + t))[-1]
    np.testing.assert_allclose(found[-1].x, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[-1].uplink[:, 0], expected[1], rtol=0, atol=1e-12)


def test_a_bit_cannot_say_zero(x64):
    flat = Sharded(squares, (np.zeros((1, 1, 4)), np.ones((1, 1))))  # the gradient is 0 everywhere
    last = states(double_squeeze(0.1), flat, 1, np.ones(4))[-1]
    np.testing.assert_array_equal(last.x, np.ones(4))  # sign(0) = 1, times the scale 0


# ---- the invariant --------------------------------------------------------------------------------

CODECS = [Signs("l2"), Signs("l1"), TopK(3), RandomK(2), QSGD(4), Split(TopK(2), (6, 6)), Plain()]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_the_virtual_point_moves_as_sgd_does(x64, codec):
    """x_t − γ(δ_{t−1} + Σ_i δ⁽ⁱ⁾_{t−1}/n) takes plain steps along the gradients at x_t, whatever the codec."""
    step_size, found = 0.1, states(double_squeeze(0.1, codec), problem(), ROUNDS)
    dense = X0.copy()
    for t, (before, after) in enumerate(zip(found, found[1:], strict=False)):
        dense = dense - step_size * np.mean([gradient(np.asarray(before.x), i, t) for i in range(N)], axis=0)
        held = np.asarray(after.downlink[0]) + np.mean(after.uplink[:, 0], axis=0)
        np.testing.assert_allclose(np.asarray(after.x) - step_size * held, dense, rtol=0, atol=1e-12)


def test_a_codec_without_error_is_sgd(x64):
    last = states(double_squeeze(0.1, Plain()), problem(), 10)[-1]
    x = by_hand(lambda v: v, 10, lambda t: 0.1)[-1][0]
    np.testing.assert_allclose(last.x, x, rtol=0, atol=1e-12)
    assert not np.any(last.uplink) and not np.any(last.downlink)


# ---- what memories are for ------------------------------------------------------------------------


def pulled_apart(x, batch):
    """½(x₀ − b)² + ½·0.1(x₁ − 1)²: the workers disagree on x₀ alone, and loudly."""
    return 0.5 * (x[0] - batch) ** 2 + 0.05 * (x[1] - 1) ** 2


def test_without_memories_what_workers_agree_on_may_never_be_said(x64):
    apart = Sharded(pulled_apart, np.array([[-1.0], [1.0]]))
    squeezed = double_squeeze(0.1, TopK(1))
    without = Round(squeezed.worker, TopK(1), squeezed.aggregator, TopK(1), squeezed.server)
    x0 = jnp.zeros(2)
    with_memory, bare = (fl.minimize(apart, x0, solver, steps=2000).x for solver in (squeezed, without))
    np.testing.assert_array_equal(bare, x0)  # each worker says its x₀, and these cancel
    np.testing.assert_allclose(with_memory, [0.0, 1.0], atol=0.1)  # the top-1 steps go on for ever


# ---- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (None, 4 * 76 + 4),  # 76 words of bits, and a scale
        (TopK(30), 30 * 8),  # an index and a value each
        (TopK(density=0.01), 24 * 8),
        (Plain(), 4 * 2410),
    ],
)
def test_both_directions_cost_what_the_codec_says(x32, codec, expected):
    size = 2410
    wide = Sharded(squares, (np.ones((N, 1, size), np.float32), np.ones((N, 1), np.float32)))
    account = double_squeeze(0.1, codec).account(wide, jnp.zeros(size, jnp.float32))
    assert (account.up, account.down, account.dense) == (expected, expected, 4 * size)
    assert isinstance(codec, Plain) or 20 * account.up <= account.dense


def test_a_run_counts_the_bytes_of_all_workers(x64):
    last = states(double_squeeze(0.1), problem(), 3)[-1]
    assert float(last.bytes_up) == float(last.bytes_down) == 3 * N * (4 + 8)  # a word of 12 bits, and a float64


def test_memories_are_wider_than_a_narrow_point(x32):
    narrow = problem(dtype=jnp.bfloat16)
    after = states(double_squeeze(0.1), narrow, 1, jnp.asarray(X0, jnp.bfloat16))[-1]
    assert after.x.dtype == jnp.bfloat16 and after.uplink.dtype == after.downlink.dtype == jnp.float32


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "step_size: got 0.0"),
        ((-1.0,), "step_size: got -1.0"),
        ((np.nan,), "step_size: got nan"),
        ((0.1, "signs"), "codec: got str"),
        ((0.1, top(3)), "codec: got function"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(fl.InputError, match=f"^{message}"):
        double_squeeze(*arguments)


def test_what_does_not_fit_the_problem_is_refused(x64):
    for solver, name in ((double_squeeze(0.1, TopK(D + 1)), "k"), (double_squeeze(0.1, blocks=D + 1), "blocks")):
        with pytest.raises(fl.InputError, match=f"^{name}: got 13"):
            fl.minimize(problem(), jnp.asarray(X0), solver, steps=1, key=0)
    with pytest.raises(fl.InputError, match="workers"):
        fl.minimize(lambda x: jnp.sum(x**2), jnp.asarray(X0), double_squeeze(0.1), steps=1)
