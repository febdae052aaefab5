"""Attacks against their formulas, on the wire, and against rules that tolerate them or do not."""

import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline import Ending
from fallline.core.errors import InputError
from fallline.distributed.aggregators import IterativeFiltering, Majority, Mean, Median, Total, TrimmedMean
from fallline.distributed.attacks import (
    InnerProduct,
    LargeNoise,
    LittleIsEnough,
    NotANumber,
    Place,
    RandomSigns,
    SaddlePoint,
    SignFlip,
    flip_labels,
)
from fallline.distributed.round import Round
from fallline.distributed.rules import Gradient, Step
from fallline.distributed.sharded import Sharded
from fallline.parts.codecs import QSGD, Plain, Signs, TopK
from fallline.parts.feedback import ErrorFeedback

N, B, M = 9, 3, 7
HONEST = np.random.default_rng(0).standard_normal((N, M)) * np.arange(1.0, M + 1)


def place(x=None, seed=0, first=0):
    return Place(jnp.zeros(M) if x is None else jnp.asarray(x), jax.random.key(seed), first)


def said(attack, where=None):
    """What the Byzantine workers say; the others are as they were."""
    out = np.asarray(attack.messages(jnp.asarray(HONEST), place() if where is None else where))
    np.testing.assert_array_equal(out[: N - B], np.asarray(jnp.asarray(HONEST))[: N - B])
    assert out.shape == HONEST.shape
    return out[N - B :]


# --- formulas -------------------------------------------------------------------------------------


def test_attacks_that_are_formulas(x64):
    own, mean, std = HONEST[N - B :], HONEST[: N - B].mean(axis=0), HONEST[: N - B].std(axis=0)
    np.testing.assert_allclose(said(SignFlip(B, 2.5)), -2.5 * own, rtol=1e-14)
    np.testing.assert_allclose(said(InnerProduct(B, 0.5)), np.tile(-0.5 * mean, (B, 1)), rtol=1e-13)
    np.testing.assert_allclose(said(LittleIsEnough(B, 1.5)), np.tile(mean - 1.5 * std, (B, 1)), rtol=1e-12)
    assert np.isnan(said(NotANumber(B))).all()


@pytest.mark.parametrize(("n", "b"), [(9, 3), (10, 3), (50, 12), (50, 24)])
def test_a_little_is_enough_for_a_majority(n, b, x64):
    """z of the paper's Algorithm 3, with the normal distribution of the standard library."""
    honest = np.random.default_rng(1).standard_normal((n, 4))
    supporters = n // 2 + 1 - b
    z = statistics.NormalDist().inv_cdf((n - b - supporters) / (n - b))
    out = np.asarray(LittleIsEnough(b).messages(jnp.asarray(honest), place()))[-1]
    np.testing.assert_allclose(out, honest[: n - b].mean(axis=0) - z * honest[: n - b].std(axis=0), rtol=1e-10)


def test_attacks_that_draw(x64):
    own = HONEST[N - B :]
    flipped = said(RandomSigns(B))
    np.testing.assert_array_equal(np.abs(flipped), np.abs(own))
    many = np.stack([said(RandomSigns(B), place(seed=s)) / own for s in range(200)])
    assert set(np.unique(many)) == {-1.0, 1.0}
    assert abs(many.mean()) < 5 / np.sqrt(many.size)  # five standard deviations
    noise = np.stack([said(LargeNoise(B, 7.0), place(seed=s)) for s in range(200)])
    assert abs(noise.mean()) < 5 * 7 / np.sqrt(noise.size)
    assert abs(noise.std() / 7 - 1) < 5 / np.sqrt(2 * noise.size)
    np.testing.assert_array_equal(said(LargeNoise(B), place(seed=3)), said(LargeNoise(B), place(seed=3)))


def test_the_saddle_point_attack_pushes_back_on_escape_coordinates_alone(x64):
    mean, std = HONEST[: N - B].mean(axis=0), HONEST[: N - B].std(axis=0)
    saddle, x = np.arange(M) / 10.0, np.arange(M) / 10.0 + np.array([1, -1, 1, -1, 0, 1, -1])
    escape = np.array([True, True, False, False, True, False, True])
    back = np.array([1, -1, 0, 0, 1, 0, -1])  # the sign of x − s, + on s itself
    loud = said(SaddlePoint(B, saddle, escape, strength=50.0), place(x))
    np.testing.assert_allclose(loud, np.tile(mean + 50 * back, (B, 1)), rtol=1e-12)
    stealthy = said(SaddlePoint(B, saddle, escape, stealth=1.5), place(x))
    np.testing.assert_allclose(stealthy, np.tile(mean + 1.5 * std * back, (B, 1)), rtol=1e-12)


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_the_saddle_point_attack_knows_which_coordinates_a_block_has(pieces, x64):
    """Block by block, the last filled up with zeros, it says what it says at once."""
    saddle, escape, x = np.linspace(-1, 1, M), np.arange(M) % 2 == 0, np.zeros(M)
    whole = SaddlePoint(B, saddle, escape, strength=9.0)
    size = -(-M // pieces)
    padded = np.pad(HONEST, ((0, 0), (0, size * pieces - M)))
    parts = [
        whole.messages(
            jnp.asarray(padded[:, at : at + size]),
            place(np.pad(x, (0, size * pieces - M))[at : at + size], first=jnp.int32(at)),
        )
        for at in range(0, size * pieces, size)
    ]
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[N - B :, :M], said(whole, place(x)), rtol=1e-14)


def test_no_byzantine_workers_change_nothing():
    np.testing.assert_array_equal(NotANumber(0).messages(jnp.asarray(HONEST), place()), jnp.asarray(HONEST))


def test_labels_are_flipped_for_the_last_workers():
    labels = np.arange(12).reshape(4, 3) % 10
    flipped = flip_labels(labels, 2, 10)
    np.testing.assert_array_equal(flipped, [[0, 1, 2], [3, 4, 5], [3, 2, 1], [0, 9, 8]])
    np.testing.assert_array_equal(labels, np.arange(12).reshape(4, 3) % 10)  # a copy
    np.testing.assert_array_equal(flip_labels(labels, 0, 10), labels)


# --- in a round -----------------------------------------------------------------------------------


def pulled(x, batch):
    return batch @ x


def problem(n=N, m=M, **options):
    """Worker i's gradient is row i of HONEST wherever it is."""
    return Sharded(pulled, np.asarray(HONEST, np.float32)[:n, None, :m], **options)


def aggregate(attack, rule=None, codec=None, **options):
    """Minus the step of one round with step size 1 from 0: the aggregate."""
    uplink, rule = Plain() if codec is None else codec, Total() if rule is None else rule
    one = Round(Gradient(), uplink, rule, None, Step(optax.sgd, learning_rate=1.0), attack=attack, **options)
    state = one.init(problem(), jnp.zeros(M, jnp.float32), key=jax.random.key(0))
    return -np.asarray(one.step(problem(), state, key=jax.random.key(0)).x)


def test_a_round_adds_up_honest_and_byzantine_messages():
    expected = HONEST[: N - B].sum(axis=0) - 4 * HONEST[N - B :].sum(axis=0)
    np.testing.assert_allclose(aggregate(SignFlip(B, 4.0)), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(aggregate(SignFlip(B, 4.0), blocks=3), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("codec", [Signs("l1"), TopK(2), ErrorFeedback(TopK(2))], ids=["signs", "top", "feedback"])
def test_a_byzantine_message_is_one_that_the_wire_can_carry(codec):
    """Its words go through decode∘encode, and it flips what the codec made of its honest gradient."""
    rows, plain = jnp.asarray(HONEST, jnp.float32), codec.codec if isinstance(codec, ErrorFeedback) else codec
    decoded = np.stack([plain.decode(plain.encode(row), M) for row in rows])
    forged = np.stack([plain.decode(plain.encode(jnp.asarray(-4 * row)), M) for row in decoded[N - B :]])
    expected = decoded[: N - B].sum(axis=0) + forged.sum(axis=0)
    np.testing.assert_allclose(aggregate(SignFlip(B, 4.0), codec=codec), expected, rtol=1e-5, atol=1e-5)


def test_through_signs_a_byzantine_worker_has_one_vote_however_loud():
    loud = aggregate(SaddlePoint(B, np.ones(M), np.ones(M, bool), strength=1e6), Majority("zero"), Signs("none"))
    honest = np.where(HONEST[: N - B] >= 0, 1, -1).sum(axis=0)
    np.testing.assert_array_equal(loud, np.sign(honest - B))  # x = 0 lies below the saddle: −1 of each
    quantized = aggregate(NotANumber(B), Median(), QSGD(4))
    assert np.isfinite(quantized).all()


def test_the_attack_of_a_round_knows_the_place():
    """x − s has both signs; the push of a strength that is the sum's own scale is exact."""
    saddle = np.where(np.arange(M) % 2 == 0, 1.0, -1.0).astype(np.float32)
    attack = SaddlePoint(B, saddle, np.arange(M) < 5, strength=10.0)
    mean = HONEST[: N - B].mean(axis=0)
    expected = N * mean + B * np.where(np.arange(M) < 5, -10 * saddle, 0)
    for blocks in (1, 2, 7):
        np.testing.assert_allclose(aggregate(attack, blocks=blocks), expected, rtol=1e-5, atol=1e-4)


ATTACKS = [
    SignFlip(B, 5.0),
    RandomSigns(B),
    LargeNoise(B),
    LittleIsEnough(B),
    InnerProduct(B, 3.0),
    NotANumber(B),
    SaddlePoint(B, np.zeros(M), np.ones(M, bool)),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_robust_rules_stay_among_the_honest(attack):
    low, high = HONEST[: N - B].min(axis=0), HONEST[: N - B].max(axis=0)
    for rule in (Median(), TrimmedMean(B)):
        out = aggregate(attack, rule)
        assert np.all((low - 1e-5 <= out) & (out <= high + 1e-5))


def test_filtering_takes_nothing_from_liars_that_stand_out():
    for attack in (LargeNoise(B, 1e6), NotANumber(B), SaddlePoint(B, np.zeros(M), np.ones(M, bool), strength=1e6)):
        out = aggregate(attack, IterativeFiltering(150.0))
        np.testing.assert_allclose(out, HONEST[: N - B].mean(axis=0), rtol=1e-2, atol=1e-2)


# --- more than tolerated --------------------------------------------------------------------------


def attacked_round(attack, rule):
    return Round(Gradient(), Plain(), rule, None, Step(optax.sgd, learning_rate=0.1), attack=attack)


@pytest.mark.parametrize(
    ("rule", "b", "said"),
    [
        (Median(), 5, "fewer than half of the workers, which is what Median tolerates"),
        (Majority(), 5, "fewer than half of the workers, which is what Majority tolerates"),
        (IterativeFiltering(1.0), 5, "fewer than half of the workers, which is what IterativeFiltering tolerates"),
        (TrimmedMean(2), 3, "at most cut = 2 workers, which is what TrimmedMean tolerates"),
    ],
)
def test_more_liars_than_tolerated_are_refused_with_the_condition(rule, b, said):
    x = np.zeros(M, np.float32)
    with pytest.raises(InputError, match=f"^attack: got {b} Byzantine workers of {N}; expected {said}$"):
        fl.minimize(problem(), x, attacked_round(SignFlip(b), rule), steps=1)
    attacked_round(SignFlip(b - 1), rule).check(problem(), x)
    attacked_round(SignFlip(b, beyond_tolerance=True), rule).check(problem(), x)
    attacked_round(SignFlip(b), Mean()).check(problem(), x)  # it tolerates nothing, and says so by breaking


@pytest.mark.parametrize("b", [N, N + 1])
def test_somebody_must_be_honest(b):
    with pytest.raises(InputError, match=f"^attack: got {b} Byzantine workers; expected fewer than the {N} workers"):
        attacked_round(SignFlip(b, beyond_tolerance=True), Mean()).check(problem(), np.zeros(M, np.float32))
    with pytest.raises(InputError, match=f"^byzantine: got {b}; expected fewer than the {N} workers"):
        SignFlip(b).messages(jnp.asarray(HONEST), place())


@pytest.mark.parametrize(("saddle", "escape", "argument"), [(M - 1, M, "saddle"), (M, M + 1, "escape")])
def test_a_saddle_of_another_size_is_refused(saddle, escape, argument):
    attack = SaddlePoint(B, np.zeros(saddle), np.ones(escape, bool))
    with pytest.raises(InputError, match=rf"^{argument}: got an array .*\({M},\), the size of the point"):
        attacked_round(attack, Median()).check(problem(), np.zeros(M, np.float32))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: SignFlip(-1), "byzantine"),
        (lambda: SignFlip(1.5), "byzantine"),
        (lambda: flip_labels(np.zeros((2, 3)), 1, 10), "labels"),  # not integers
        (lambda: flip_labels(np.zeros(3, int), 1, 10), "labels"),
        (lambda: flip_labels(np.zeros((2, 0), int), 1, 10), "labels"),
        (lambda: flip_labels(np.full((2, 3), 10), 1, 10), "labels"),
        (lambda: flip_labels(np.full((2, 3), -1), 1, 10), "labels"),
        (lambda: flip_labels(np.zeros((2, 3), int), 3, 10), "byzantine"),
        (lambda: flip_labels(np.zeros((2, 3), int), -1, 10), "byzantine"),
    ],
)
def test_bad_input(make, argument):
    with pytest.raises(InputError, match=f"^{argument}: got"):
        make()


# --- lost workers ---------------------------------------------------------------------------------


def squares(x, batch):
    return jnp.sum((x - batch) ** 2, axis=1)


def squares_in_a_ball(x, batch):
    """What of some workers exists where ‖x‖² < 1/2 alone."""
    centers, fragile = batch
    return squares(x, centers) + jnp.sqrt(0.5 - fragile * (x @ x))


def with_lost(workers):
    """Nine workers around their centers; the data of some are lost."""
    data = np.asarray(HONEST, np.float32)[:, None].copy()
    data[list(workers)] = np.nan
    return Sharded(squares, data)


@pytest.mark.parametrize("every", [1, 50])
def test_with_the_mean_a_worker_that_is_lost_on_the_way_ends_the_run_and_is_named(every):
    fragile = np.arange(N)[:, None] == 4
    data = np.asarray(HONEST, np.float32)[:, None], fragile.astype(np.float32)
    solver, x0 = attacked_round(None, Mean()), np.full(M, 0.1, np.float32)
    solution = fl.minimize(Sharded(squares_in_a_ball, data), x0, solver, steps=100, every=every)
    assert solution.status.ending is Ending.DIVERGED
    assert "worker 4 sent a message that is not finite" in str(solution.status)
    assert np.isfinite(solution.x).all() and solution.x @ solution.x < 0.5


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(2), IterativeFiltering(5000.0)], ids=repr)
def test_robust_rules_take_a_lost_worker_for_one_vote(rule):
    """The run goes on: descent to the rule's own center of the honest ones."""
    state, lost = None, with_lost([0, 7])
    one = attacked_round(None, rule)
    state = one.init(lost, jnp.zeros(M, jnp.float32), key=None)
    step = jax.jit(lambda state: one.step(lost, state, key=None))
    for _ in range(80):
        state = step(state)
    assert np.isfinite(float(state.batch_value))
    sound = np.delete(HONEST, [0, 7], axis=0)
    low, high = sound.min(axis=0), sound.max(axis=0)
    assert np.all((low <= state.x) & (state.x <= high))
    if isinstance(rule, IterativeFiltering):  # nobody stands out of the seven: their mean
        np.testing.assert_allclose(state.x, sound.mean(axis=0), rtol=1e-4, atol=1e-4)
    else:  # two values of NaN at the upper end of nine gradients 2(x − c), that is below the centers
        ranked = np.sort(np.concatenate([np.full((2, M), -np.inf), sound]), axis=0)
        centers = ranked[4] if isinstance(rule, Median) else ranked[2:7].mean(axis=0)
        np.testing.assert_allclose(state.x, centers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lost", "attack", "blocks", "words"),
    [
        ([], None, 1, ""),
        ([4], None, 1, "worker 4 sent a message that is not finite"),
        ([1, 3], None, 2, "workers 1, 3 sent messages that are not finite"),
        ([2], NotANumber(2), 3, "workers 2, 7, 8 sent messages that are not finite"),
        (range(9), None, 1, "all workers sent messages that are not finite"),
        ([8], SaddlePoint(1, np.zeros(M), np.ones(M, bool)), 1, ""),  # its own message never leaves it
    ],
)
def test_the_cause_names_who_sent_what_is_not_finite(lost, attack, blocks, words):
    one = Round(Gradient(), Plain(), Mean(), None, Step(optax.sgd, learning_rate=0.1), attack=attack, blocks=blocks)
    where = with_lost(lost)
    state = one.init(where, jnp.zeros(M, jnp.float32), key=None)
    assert one.cause(where, state, key=None) == words


def test_every_attack_repeats_with_its_key():
    for attack, rule in itertools.product((RandomSigns(B), LargeNoise(B)), (Median(),)):
        np.testing.assert_array_equal(aggregate(attack, rule), aggregate(attack, rule))
        assert attacked_round(attack, rule).random and not attacked_round(SignFlip(B), rule).random


@pytest.mark.parametrize(("rule", "end"), [(Median(), 1.0), (TrimmedMean(3), 1.0), (Mean(), (6 * 1 + 3 * 8) / 9)])
def test_flipped_labels_move_the_mean_and_not_the_robust_rules(rule, end):
    """Workers with the labels 0, 1, 2 and squared losses: those of three become 9, 8, 7."""
    labels = flip_labels(np.tile([0, 1, 2], (N, 1)), 3, 10).astype(np.float32)
    problem = Sharded(lambda x, batch: 0.5 * (x - batch) ** 2, labels)
    solver = Round(Gradient(), Plain(), rule, None, Step(optax.sgd, learning_rate=0.5))
    run = fl.minimize(problem, np.float32(0), solver, steps=60)
    np.testing.assert_allclose(run.x, end, rtol=1e-6)
