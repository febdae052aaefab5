"""Channels: which payload arrives, and with which bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.distributed.channels import Corrupts, Delays, Drops, StaleReads

ROUNDS = 4000


def carried(channel, payloads, nothing, key=0):
    """What arrives of payloads stacked by rounds."""

    @jax.jit
    def run(channel, payloads, keys):
        def one(memory, item):
            arrives, memory = channel.carry(item[0], memory, item[1])
            return memory, arrives

        return jax.lax.scan(one, channel.init(nothing), (payloads, keys))[1]

    keys = jax.random.split(jax.random.key(key), len(jax.tree.leaves(payloads)[0]))
    return jax.tree.map(np.asarray, run(channel, payloads, keys))


def numbered(rounds=ROUNDS):
    """Round t sends t + 1, as indices and values: two arrays that belong together."""
    t = jnp.arange(1, rounds + 1)
    return t.astype(jnp.int32), jnp.stack([t, -t], axis=1).astype(jnp.float32)


NOTHING = jnp.int32(0), jnp.zeros(2, jnp.float32)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_a_lost_payload_is_the_last_one_that_arrived(p):
    """The number of losses is binomial: within five standard deviations of p T."""
    indices, values = carried(Drops(p), numbered(), NOTHING)
    t = np.arange(1, ROUNDS + 1)
    lost = indices != t
    assert not lost[0]
    np.testing.assert_array_equal(indices, np.maximum.accumulate(np.where(lost, 0, t)))
    np.testing.assert_array_equal(values, np.stack([indices, -indices], axis=1))  # both are lost, or none
    assert abs(lost.sum() - p * ROUNDS) < 5 * np.sqrt(ROUNDS * p * (1 - p))
    both = np.mean(lost[1:] & lost[:-1])  # a loss does not know of the one before; neighbors share a round
    assert abs(both - p**2) < 5 * np.sqrt(3 * p**2 * (1 - p**2) / ROUNDS)


def test_the_first_payload_always_arrives():
    for key in range(8):
        assert carried(Drops(0.99), numbered(1), NOTHING, key)[0] == 1


def test_nothing_is_lost_with_probability_zero():
    for channel in (Drops(0.0), Corrupts(0.0)):
        for arrived, sent in zip(carried(channel, numbered(50), NOTHING), numbered(50), strict=True):
            np.testing.assert_array_equal(arrived, sent)


def test_the_key_decides():
    first, again, other = (carried(Drops(0.5), numbered(64), NOTHING, key)[0] for key in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_delay_is_a_shift(depth):
    """Nothing at first, then the payload of `depth` rounds ago, however often the line goes round."""
    indices, values = carried(Delays(depth), numbered(17), NOTHING)
    t = np.maximum(np.arange(1, 18) - depth, 0)
    np.testing.assert_array_equal(indices, t)
    np.testing.assert_array_equal(values, np.stack([t, -t], axis=1))


def test_a_longer_delay_than_the_run():
    assert not carried(Delays(9), numbered(5), NOTHING)[0].any()


def test_a_corrupted_word_has_one_other_bit():
    """Words are hit with probability p, and each of 32 bits equally often."""
    p, sent = 0.1, np.random.default_rng(0).integers(0, 2**32, (50, 400), dtype=np.uint32)
    arrived = carried(Corrupts(p), jnp.asarray(sent), jnp.zeros(400, jnp.uint32))
    flipped = np.unpackbits((arrived ^ sent).view(np.uint8).reshape(50, 400, 4), axis=-1).sum(axis=-1)
    assert set(np.unique(flipped)) == {0, 1}
    hits = flipped.sum()
    assert abs(hits - p * sent.size) < 5 * np.sqrt(sent.size * p * (1 - p))
    places = np.log2((arrived ^ sent)[flipped == 1]).astype(int)
    counts = np.bincount(places, minlength=32)
    assert np.all(np.abs(counts - hits / 32) < 5 * np.sqrt(hits / 32))


def test_any_array_of_a_payload_may_be_hit():
    """An index, a value, a bit and a number of 16 bits; dtypes stay."""
    rounds = 400
    sent = (
        jnp.full((rounds, 1), 7, jnp.int32),
        jnp.ones((rounds, 2), jnp.float32),
        jnp.zeros((rounds, 4), bool),
        jnp.ones((rounds, 2), jnp.bfloat16),
    )
    arrived = carried(Corrupts(0.5), sent, jax.tree.map(lambda a: a[0], sent))
    for a, b in zip(arrived, sent, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        words = np.any(a != np.asarray(b), axis=1)
        assert 0 < words.sum() < rounds
    hit = np.any(arrived[0] != 7, axis=1).mean()
    assert abs(hit - 0.5) < 5 * 0.5 / np.sqrt(rounds)


def test_a_number_may_become_anything():
    """One of 32 flips of 1.0 gives an infinity: the highest bit of its exponent."""
    arrived = carried(Corrupts(0.99), jnp.ones((2000, 1), jnp.float32), jnp.zeros(1))
    assert np.isinf(arrived).any()


def test_stale_reads_see_the_last_models():
    """The line holds the newest first; before the run there was only the first model."""
    reads = StaleReads(3)
    line = reads.init({"w": jnp.zeros(2)})
    for t in range(1, 6):
        line = reads.push(line, {"w": jnp.full(2, float(t))})
        np.testing.assert_array_equal(line["w"][:, 0], np.maximum(t - np.arange(4), 0))


def test_every_age_is_equally_likely():
    reads, line = StaleReads(3), {"w": jnp.arange(4.0)[:, None] * jnp.ones(2)}
    keys = jax.random.split(jax.random.key(0), 4000)
    seen = np.asarray(jax.jit(jax.vmap(functools.partial(reads.read, line)))(keys)["w"])
    np.testing.assert_array_equal(seen[:, 0], seen[:, 1])
    counts = np.bincount(seen[:, 0].astype(int))
    assert len(counts) == 4 and np.all(np.abs(counts - 1000) < 5 * np.sqrt(4000 * 3 / 16))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Drops(1.0), "probability: got 1.0; expected a number of at least 0 and below 1"),
        (lambda: Drops(-0.1), "probability: got -0.1"),
        (lambda: Drops(float("nan")), "probability: got nan"),
        (lambda: Drops(True), "probability: got True; expected a number"),
        (lambda: Drops("often"), "probability: got 'often'; expected a number"),
        (lambda: Corrupts(1), "probability: got 1"),
        (lambda: Corrupts([0.1]), r"probability: got \[0.1\]"),
        (lambda: Delays(0), "depth: got 0; expected a whole number of at least 1"),
        (lambda: Delays(1.5), "depth: got 1.5"),
        (lambda: StaleReads(0), "most: got 0; expected a whole number of at least 1"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_numbers_of_any_kind_are_probabilities():
    for p in (np.float32(0.25), np.asarray(0.25), jnp.float32(0.25)):
        assert float(Drops(p).probability) == float(Corrupts(p).probability) == 0.25
