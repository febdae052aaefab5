"""Rounds: blocks and exchanges against NumPy, what is conserved, what is counted, and any composition of parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fallline import minimize
from fallline.core import loop
from fallline.core.errors import InputError
from fallline.distributed import (
    Adopt,
    Corrupts,
    Delays,
    Drops,
    Gradient,
    IterativeFiltering,
    LargeNoise,
    LittleIsEnough,
    LocalSteps,
    Majority,
    Mean,
    Median,
    Momentum,
    NotANumber,
    Round,
    Sharded,
    SignFlip,
    StaleReads,
    Step,
    Total,
    TrimmedMean,
)
from fallline.distributed.round import codec_of
from fallline.parts.codecs import QSGD, Plain, RandomK, Signs, Split, TopK
from fallline.parts.feedback import ErrorFeedback

N, ROWS, D, RATE = 5, 4, 7, 0.125
DRAWN = np.random.default_rng(3)
A, B = DRAWN.normal(size=(N, ROWS, D)), DRAWN.normal(size=(N, ROWS))
START = DRAWN.normal(size=D)
SGD = Step(optax.sgd, learning_rate=RATE)


def squares(x, batch):
    rows, sides = batch
    return (rows @ x - sides) ** 2 / 2


def problem(dtype=np.float32, batch_size=None, **options):
    return Sharded(squares, (A.astype(dtype), B.astype(dtype)), batch_size, **options)


def gradients(x):
    """Of each worker, (n, d)."""
    return np.einsum("nrd,nr->nd", A, np.einsum("nrd,d->nr", A, x) - B) / ROWS


def run(solver, steps, dtype=np.float32, batch_size=None, key=0):
    """Only the first and the last point are measured."""
    return minimize(problem(dtype, batch_size), START.astype(dtype), solver, steps=steps, key=key, every=1000)


@pytest.fixture
def compilations():
    """The seconds of each compilation so far; clear it where counting begins."""
    found = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# --- known answers -------------------------------------------------------------------------------------------------


def top_of_pieces(v):
    """The largest entry of each of the pieces 0–2, 3–5 and 6."""
    said = np.zeros_like(v)
    for piece in (slice(0, 3), slice(3, 6), slice(6, 7)):
        j = piece.start + np.argmax(np.abs(v[piece]))
        said[j] = v[j]
    return said


def test_pieces_have_codecs_and_memories_of_their_own(x64):
    """Three pieces of 7 numbers; both exchanges are NumPy's loop, and each other to the bit."""
    x, memory, kept = START.copy(), np.zeros((N, D)), np.zeros(D)
    for _ in range(9):
        v = gradients(x) + memory
        said = np.stack([top_of_pieces(row) for row in v])
        memory, total = v - said, said.mean(0) + kept
        answer = top_of_pieces(total)
        kept, x = total - answer, x - RATE * answer
    link, found = ErrorFeedback(TopK(1)), []
    for exchange in ("gathered", "sliced"):
        solution = run(Round(Gradient(), link, Mean(), link, SGD, blocks=3, exchange=exchange), 9, np.float64)
        np.testing.assert_allclose(solution.x, x, rtol=1e-10)
        np.testing.assert_allclose(solution.state.uplink.reshape(N, 9)[:, :D], memory, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(solution.state.downlink.reshape(9)[:D], kept, rtol=1e-9, atol=1e-12)
        assert not solution.state.uplink.reshape(N, 9)[:, D:].any()  # what only fills up the last piece
        found.append(bits((solution.x, solution.state.uplink, solution.state.downlink)))
    assert found[0] == found[1]


def test_a_delay_moves_by_old_gradients(x64):
    """x_{t+1} = x_t − η mean g(x_{t−2}), and not at all in the first two rounds."""
    points = [START] * 3
    for _ in range(6):
        points.append(points[-1] - RATE * gradients(points[-3]).mean(0))
    solution = run(Round(Gradient(), Plain(), Mean(), None, SGD, channel=Delays(2)), 8, np.float64)
    np.testing.assert_allclose(solution.x, points[-1], rtol=1e-11)


def test_stale_models_are_of_the_last_rounds(x64):
    """A round's step is the mean of gradients at one of the last three models, for each worker."""
    solver = Round(Gradient(), Plain(), Mean(), None, SGD, reads=StaleReads(2))
    points = [run(solver, steps, np.float64).x for steps in range(6)]
    for t in range(5):
        ages = [gradients(points[max(t - age, 0)]) for age in range(3)]
        step = (points[t] - points[t + 1]) / RATE * N
        choices = np.stack(np.meshgrid(*[range(3)] * N, indexing="ij"), -1).reshape(-1, N)
        sums = sum(np.stack(ages)[choices[:, i], i] for i in range(N))
        assert np.abs(sums - step).max(1).min() < 1e-10
    assert np.abs(points[5] - run(Round(Gradient(), Plain(), Mean(), None, SGD), 5, np.float64).x).max() > 1e-3


@pytest.mark.parametrize(
    ("downlink", "down"), [(None, 4 * 3 * 8), (Signs(), 3 * (4 + 4)), (ErrorFeedback(Plain()), 3 * 3 * 4)]
)
def test_the_account(downlink, down):
    """Three pieces of three numbers, up an index and a value each; down what the four others sent, or the answer."""
    account = Round(Gradient(), TopK(1), Mean(), downlink, SGD, blocks=3).account(problem(), START.astype(np.float32))
    assert (account.up, account.down, account.dense, account.transport) == (3 * 8, down, 7 * 4, 0)


# --- any composition -----------------------------------------------------------------------------------------------

VOTES = Signs("none")
CODECS = [QSGD(3), TopK(1), RandomK(1), Signs("l1"), VOTES, Plain()]  # the simplest last: the first come first
AGGREGATORS = [TrimmedMean(1), Median(), Mean(), Majority(), Total(), IterativeFiltering(1.0)]
ATTACKS = [LittleIsEnough, LargeNoise, NotANumber, SignFlip, None]
SERVERS = [Step(optax.adam, learning_rate=0.1), SGD]
DOWNLINKS = [ErrorFeedback(TopK(1)), ErrorFeedback(QSGD(3)), Signs("l1"), Plain(), None]


@st.composite
def rounds(draw):
    """A round of any parts; every second one is such that something is conserved."""
    codec, blocks = draw(st.sampled_from(CODECS)), draw(st.sampled_from([3, 2, 1]))
    downlink = draw(st.sampled_from(DOWNLINKS))
    exchange = "gathered" if downlink is None else draw(st.sampled_from(["sliced", "gathered"]))
    if draw(st.booleans()):
        return Round(Gradient(), ErrorFeedback(codec), Mean(), downlink, SGD, blocks=blocks, exchange=exchange)
    channels = [Drops(0.5), Corrupts(0.01), None] + [Delays(2)] * (codec is not VOTES)
    if blocks == 1 and draw(st.booleans()):
        codec = Split(codec, (3, 4))
    worker = draw(st.sampled_from([LocalSteps(2, 0.1), Momentum(0.5), Gradient(0.5), Gradient()]))
    attack = draw(st.sampled_from(ATTACKS))
    return Round(
        worker,
        draw(st.sampled_from([codec, ErrorFeedback(codec)])),
        draw(st.sampled_from(AGGREGATORS if blocks == 1 and exchange == "gathered" else AGGREGATORS[:-1])),
        downlink,
        Adopt() if isinstance(worker, LocalSteps) else draw(st.sampled_from(SERVERS)),
        channel=draw(st.sampled_from(channels)),
        attack=attack and attack(1, beyond_tolerance=True),
        reads=draw(st.sampled_from([StaleReads(2), None])),
        blocks=blocks,
        exchange=exchange,
    )


@functools.cache
def size_of(codec, n):
    """Bytes of a real payload."""
    payload = jax.jit(lambda v, key: codec.encode(v, key=key))(np.ones(n, np.float32), jax.random.key(0))
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(payload))


@settings(
    max_examples=7, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(solver=rounds(), batch_size=st.sampled_from([None, 2]))
def test_any_composition(solver, batch_size):
    solution = run(solver, 3, batch_size=batch_size)
    state = solution.state
    # Three rounds, or the last point before the one that was lost: finite in any case.
    assert np.isfinite(solution.x).all()
    if solution.status.name == "diverged":
        assert int(state.rounds) < int(solution.steps) <= 3 and "not finite" in str(solution.status)
    else:
        assert solution.status.name == "step limit" and int(state.rounds) == 3
    # The same key, the same bits.
    again = run(solver, 3, batch_size=batch_size)
    assert bits((state, solution.history)) == bits((again.state, again.history))
    # Bytes as declared are bytes of payloads, of all workers and rounds.
    account = solver.account(problem(), START.astype(np.float32))
    piece, done = -(-D // solver.blocks), int(state.rounds)
    up = solver.blocks * size_of(codec_of(solver.uplink), piece)
    down = (N - 1) * up if solver.downlink is None else solver.blocks * size_of(codec_of(solver.downlink), piece)
    assert (account.up, account.down, account.dense) == (up, down, 4 * D)
    assert (float(state.bytes_up), float(state.bytes_down)) == (done * N * up, done * N * down)
    # One question to all workers in a round, or one for each local step.
    each = 2 if isinstance(solver.worker, LocalSteps) else 1
    assert state.calls.as_dict() == ({} if not done else {"minibatch" if batch_size else "gradient": each * done})
    # With error feedback and the mean nothing is lost: where it has not been sent, it is kept.
    ordinary = solver.channel is solver.attack is solver.reads is None and isinstance(solver.worker, Gradient)
    lossless = solver.downlink is None or isinstance(solver.downlink, ErrorFeedback | Plain)
    remembers = isinstance(solver.uplink, ErrorFeedback) and type(solver.aggregator) is Mean
    if ordinary and lossless and remembers and solver.worker.step_size is None and batch_size is None:
        assert_conserved(solver, solution)


def assert_conserved(solver, solution):
    """x_3 + η (mean of the workers' memories + the server's) reads as x_0 − η Σ mean g(x_t)."""
    points = [run(solver, steps).x for steps in (0, 1, 2)]
    expected = START - RATE * sum(gradients(np.float64(x)).mean(0) for x in points)
    kept = np.asarray(solution.state.uplink, np.float64).reshape(N, -1)[:, :D].mean(0)
    if solution.state.downlink is not None:
        kept = kept + np.asarray(solution.state.downlink, np.float64).reshape(-1)[:D]
    np.testing.assert_allclose(solution.x - RATE * kept, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("codec", "downlink", "options"),
    [
        (TopK(1), ErrorFeedback(Signs("l1")), {"blocks": 2, "exchange": "sliced"}),
        (QSGD(3), None, {"blocks": 3}),
        (Split(Signs("l2"), (3, 4)), ErrorFeedback(RandomK(1)), {}),
    ],
)
def test_what_is_not_sent_is_kept(codec, downlink, options):
    """Here always, and with a memory that is not empty."""
    solver = Round(Gradient(), ErrorFeedback(codec), Mean(), downlink, SGD, **options)
    solution = run(solver, 3)
    assert np.abs(solution.state.uplink).max() > 1e-2
    assert_conserved(solver, solution)


# --- what is compiled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: Round(
            Gradient(a), TopK(1), Mean(), None, Step(optax.adam, learning_rate=a, b1=b), channel=Drops(b)
        ),
        lambda a, b: Round(
            Momentum(b),
            Plain(),
            IterativeFiltering(a),
            None,
            Step(optax.sgd, learning_rate=a, momentum=b),
            channel=Corrupts(b),
            attack=LargeNoise(1, scale=a),
        ),
        lambda a, b: Round(LocalSteps(2, a), Plain(), Mean(), None, Adopt(), attack=SignFlip(1, scale=b)),
    ],
    ids=["gradient", "momentum", "local"],
)
def test_numbers_compile_nothing(make, compilations, monkeypatch):
    """Other numbers, of other kinds, and chunks of one step each."""
    run(make(0.125, 0.25), 2)
    numbers = np.float32(0.5), jnp.float32(0.75)
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 0.0)
    compilations.clear()
    run(make(0.25, 0.5), 4)
    run(make(*numbers), 4)
    assert compilations == []


# --- bad input -----------------------------------------------------------------------------------------------------


def of(worker=None, uplink=None, aggregator=None, downlink=None, server=None, **options):
    return Round(worker or Gradient(), uplink or Plain(), aggregator or Mean(), downlink, server or SGD, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: of(worker=Gradient), r"worker: got the class Gradient; expected a worker rule such as Gradient\(\)"),
        (lambda: of(worker=SGD), "worker: got Step; expected a worker rule"),
        (lambda: of(uplink=Mean()), "uplink: got Mean; expected a codec"),
        (lambda: of(aggregator="mean"), r"aggregator: got str; expected an aggregator such as Mean\(\)"),
        (lambda: of(downlink=0.1), "downlink: got float; expected a codec .* or None"),
        (lambda: of(server=optax.sgd(0.1)), "server: got .*; expected a server rule such as Step"),
        (lambda: of(channel=0.1), r"channel: got float; expected a channel such as Drops\(0.1\), or None"),
        (lambda: of(channel=StaleReads(1)), "channel: got StaleReads"),
        (lambda: of(attack=1), r"attack: got int; expected an attack such as SignFlip\(1\), or None"),
        (lambda: of(reads=Delays(1)), r"reads: got Delays; expected StaleReads\(most\), or None"),
        (lambda: of(blocks=0), "blocks: got 0; expected a whole number of at least 1"),
        (lambda: of(blocks=2.5), "blocks: got 2.5"),
        (
            lambda: of(exchange="slice"),
            r"exchange: got 'slice'; expected one of gathered, sliced \(did you mean 'sliced'",
        ),
        (lambda: of(exchange="sliced"), 'downlink: got None; expected a codec, for exchange="sliced"'),
        (
            lambda: of(aggregator=IterativeFiltering(1.0), blocks=2),
            "aggregator: got IterativeFiltering; .*by coordinate",
        ),
        (
            lambda: of(aggregator=IterativeFiltering(1.0), downlink=Plain(), exchange="sliced"),
            'aggregator: got IterativeFiltering; expected one by coordinate, .* or exchange="sliced"',
        ),
    ],
)
def test_parts_that_do_not_fit_together(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: of(blocks=8), "blocks: got 8; expected at most the size of the point, 7"),
        (lambda: of(uplink=TopK(8)), "k: got 8; expected at most the length of the vector, 7"),
        (lambda: of(uplink=ErrorFeedback(TopK(4)), blocks=2, downlink=Plain()), None),
        (lambda: of(uplink=TopK(5), blocks=2), "k: got 5; expected at most the length of the vector, 4"),
        (lambda: of(downlink=RandomK(4), blocks=3), "k: got 4; expected at most the length of the vector, 3"),
        (lambda: of(uplink=Split(Plain(), (3, 3))), r"sizes: got \(3, 3\); .*that of the vector, 7"),
        (lambda: of(aggregator=TrimmedMean(3)), r"cut: got 3; expected less than half of the 5 workers"),
        (
            lambda: of(attack=SignFlip(3), aggregator=Median()),
            "attack: got 3 Byzantine workers of 5; expected fewer than",
        ),
        (lambda: of(attack=SignFlip(5)), "attack: got 5 Byzantine workers"),
        (
            lambda: of(server=Step(optax.lbfgs)),
            "server: got lbfgs, .*; expected an Optax optimizer that needs the grad",
        ),
    ],
)
def test_what_does_not_fit_the_problem_is_refused_before_anything_compiles(make, words, compilations, x32):
    if words is None:  # the limit itself fits
        make().check(problem(), jnp.asarray(START, jnp.float32))
        return
    compilations.clear()
    with pytest.raises(InputError, match=words):
        run(make(), 1)
    assert compilations == []


@pytest.mark.parametrize("uplink", [Signs("none"), ErrorFeedback(Signs("none")), Split(Signs("none"), (3, 4))])
def test_a_delay_needs_a_word_for_nothing(uplink):
    with pytest.raises(InputError, match="channel: got Delays; expected an uplink that can say nothing"):
        run(of(uplink=uplink, channel=Delays(1)), 1)


@pytest.mark.parametrize("uplink", [TopK(6), Split(QSGD(1), (3, 4)), Signs(), RandomK(5)])
def test_codecs_that_have_one_may_be_delayed(uplink):
    """Whatever their k and sizes are."""
    of(uplink=uplink, channel=Delays(1)).check(problem(), jnp.asarray(START, jnp.float32))


@pytest.mark.parametrize(
    "make",
    [
        lambda: of(uplink=QSGD(1)),
        lambda: of(downlink=ErrorFeedback(RandomK(1))),
        lambda: of(channel=Drops(0.1)),
        lambda: of(attack=LargeNoise(1)),
        lambda: of(reads=StaleReads(1)),
    ],
)
def test_who_draws_needs_a_key(make):
    assert make().random and not of(channel=Delays(1), attack=SignFlip(1)).random
    with pytest.raises(
        InputError, match="key: got None; expected a key of jax.random or an integer seed: Round is rand"
    ):
        run(make(), 1, key=None)
