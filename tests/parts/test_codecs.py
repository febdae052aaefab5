"""Codecs: what arrives, against NumPy, and how many bytes it took."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallline.core.errors import InputError
from fallline.parts.codecs import QSGD, Plain, RandomK, Signs, Split, TopK, largest, pack, unpack

KEY = jax.random.key(3)
CODECS = {
    "plain": Plain(),
    "top-k": TopK(5),
    "top share": TopK(density=0.1),
    "random-k": RandomK(7),
    "l1": Signs("l1"),
    "l2": Signs("l2"),
    "votes": Signs("none"),
    "ternary": QSGD(1, norm="max"),
    "qsgd": QSGD(7),
}


def vector(n, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def sent(codec, v, key=KEY):
    """The payload, and what arrives of it."""
    payload = codec.encode(jnp.asarray(v), key=key)
    return payload, np.asarray(codec.decode(payload, len(v)))


def largest_of_numpy(sizes, k):
    """By size, descending, then by index: a stable sort."""
    return np.sort(np.argsort(-sizes, kind="stable")[:k])


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([1, 2, 4, 8, 16]), n=st.integers(1, 200), seed=st.integers(0, 9))
def test_packed_numbers_come_back(bits, n, seed):
    numbers = np.random.default_rng(seed).integers(0, 2**bits, n).astype(np.uint32)
    words = pack(jnp.asarray(numbers), bits)
    assert words.dtype == jnp.uint32 and len(words) == -(-n * bits // 32)
    np.testing.assert_array_equal(unpack(words, bits, n), numbers)


@pytest.mark.parametrize(("n", "k"), [(5, 5), (1000, 1), (1000, 3), (1000, 17), (4099, 10), (4099, 4099)])
def test_the_largest_are_those_of_a_stable_sort(n, k):
    for values in (vector(n), np.random.default_rng(1).integers(0, 4, n).astype(np.float32), np.zeros(n, np.float32)):
        np.testing.assert_array_equal(largest(jnp.asarray(np.abs(values)), k), largest_of_numpy(np.abs(values), k))


@pytest.mark.parametrize("name", CODECS)
def test_the_bytes_are_those_of_the_payload(name):
    codec, v = CODECS[name], vector(100)
    payload, arrived = sent(codec, v)
    assert arrived.shape == (100,) and arrived.dtype == np.float32
    assert codec.nbytes(100) == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(payload))


def test_how_many_bytes_they_are():
    """Bits of n = 1000 entries in words of 4 bytes; an index and a value take 8, a scale 4."""
    expected = {"plain": 4000, "top-k": 40, "top share": 800, "random-k": 56}
    expected |= {"l1": 132, "l2": 132, "votes": 128, "ternary": 256, "qsgd": 504}
    assert {name: codec.nbytes(1000) for name, codec in CODECS.items()} == expected


def test_sparse_codecs_keep_what_they_say():
    v = vector(50)
    arrived = sent(TopK(6), v)[1]
    kept = largest_of_numpy(np.abs(v), 6)
    np.testing.assert_array_equal(arrived[kept], v[kept])
    assert np.count_nonzero(arrived) == 6
    arrived = sent(RandomK(6), v)[1]
    assert np.count_nonzero(arrived) == 6 and np.all((arrived == 0) | (arrived == v))


def test_random_k_is_uniform():
    """2,000 draws of 3 of 12: each entry 500 times on average, with standard deviation 19."""
    keys = jax.random.split(KEY, 2000)
    indices = jax.vmap(lambda key: RandomK(3).encode(jnp.ones(12), key=key)[0])(keys)
    assert all(len(set(row)) == 3 for row in np.asarray(indices).tolist())
    assert np.all(np.abs(np.bincount(np.asarray(indices).reshape(-1), minlength=12) - 500) < 5 * 19)


@pytest.mark.parametrize("scale", ["l1", "l2", "none"])
def test_signs_carry_their_scale(scale):
    v = np.array([0.5, -2.0, 0.0, -0.0, 1e-30, -3.0, 4.0], np.float32)
    size = {"l1": np.abs(v).mean(), "l2": np.linalg.norm(v) / np.sqrt(7), "none": 1}[scale]
    np.testing.assert_allclose(sent(Signs(scale), v)[1], size * np.where(v >= 0, 1, -1), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8), k=st.integers(1, 8))
def test_contractions(values, k):
    """‖v − Q(v)‖² ≤ (1 − k/n) ‖v‖² for top-k, and 1 − ‖v‖₁²/(n‖v‖²) for signs with the ℓ1 scale."""
    v = np.asarray(values, np.float32)
    whole = np.sum(v.astype(np.float64) ** 2)
    left = np.sum((sent(TopK(k), v)[1].astype(np.float64) - v) ** 2)
    assert left <= (1 - k / 8) * whole * (1 + 1e-6)
    left = np.sum((sent(Signs("l1"), v)[1].astype(np.float64) - v) ** 2)
    assert left == pytest.approx(whole - np.sum(np.abs(v.astype(np.float64))) ** 2 / 8, rel=1e-4, abs=1e-5 * whole)


def test_the_l2_scale_is_no_contraction_for_a_sparse_vector():
    """‖v − Q(v)‖² = 2 ‖v‖² (1 − ‖v‖₁ / (√n ‖v‖)), above ‖v‖² here."""
    v = np.eye(1, 100, dtype=np.float32)[0]
    assert np.sum((sent(Signs("l2"), v)[1] - v) ** 2) == pytest.approx(2 * (1 - 1 / 10), rel=1e-5)


@pytest.mark.parametrize("codec", [QSGD(1), QSGD(4), QSGD(1, norm="max"), QSGD(127, norm="max")])
def test_qsgd_is_unbiased_and_on_its_grid(codec):
    v = vector(12)
    keys = jax.random.split(KEY, 4000)
    arrived = np.asarray(jax.vmap(lambda key: codec.decode(codec.encode(jnp.asarray(v), key=key), 12))(keys))
    size = np.abs(v).max() if codec.norm == "max" else np.linalg.norm(v)
    levels = arrived * codec.levels / size
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    assert np.all(np.abs(levels - v * codec.levels / size) < 1 + 1e-3)
    error = size / codec.levels / 2 / np.sqrt(4000)  # at most, of each mean
    assert np.all(np.abs(arrived.mean(axis=0) - v) < 5 * error)


SIZES = (30, 7, 63)


def test_pieces_have_a_payload_each():
    """Each piece is the codec's own work: the two largest of each, and the ℓ1 scale of each."""
    v = vector(100)
    pieces = np.split(v, [30, 37])
    kept = np.zeros(100, np.float32)
    for at, piece in zip((0, 30, 37), pieces, strict=True):
        chosen = at + largest_of_numpy(np.abs(piece), 2)
        kept[chosen] = v[chosen]
    np.testing.assert_array_equal(sent(Split(TopK(2), SIZES), v)[1], kept)
    signs = np.concatenate([np.abs(piece).mean() * np.where(piece >= 0, 1, -1) for piece in pieces])
    np.testing.assert_allclose(sent(Split(Signs("l1"), SIZES), v)[1], signs, rtol=1e-6)


def test_a_share_is_of_each_piece():
    """A tenth of 30, of 7 and of 63: 3, 1 and 6, at 8 bytes each."""
    assert Split(TopK(density=0.1), SIZES).nbytes(100) == 8 * (3 + 1 + 6)
    assert Split(Signs(), SIZES).nbytes(100) == 4 * (1 + 1 + 2) + 3 * 4
    assert Split(QSGD(1), SIZES).nbytes(100) == 4 * (2 + 1 + 4) + 3 * 4  # 2 bits each: 16 to a word


def test_pieces_draw_for_themselves():
    """Equal pieces would have equal payloads if they had one key."""
    codec = Split(RandomK(3), (50, 50))
    first, second = codec.encode(jnp.ones(100), key=KEY)
    assert codec.random and not np.array_equal(first[0], second[0])
    again = codec.encode(jnp.ones(100), key=KEY)
    np.testing.assert_array_equal(again[0][0], first[0])
    assert not Split(TopK(3), (50, 50)).random


def test_one_piece_is_the_codec_itself():
    v = vector(40)
    for codec in (TopK(3), Signs("l2"), Plain()):
        np.testing.assert_array_equal(sent(Split(codec, [40]), v)[1], sent(codec, v)[1])


@pytest.mark.parametrize("name", [*CODECS, "pieces"])
@pytest.mark.parametrize("count", [5, 70])
def test_the_total_is_the_sum_of_what_they_say(name, count):
    """In order; of 70 in a loop. The reference sums what `decode` gives in float64."""
    codec = {**CODECS, "pieces": Split(TopK(2), (25, 15))}[name]
    keys = jax.random.split(KEY, count)
    v = jnp.asarray(np.random.default_rng(4).normal(size=(count, 40)).astype(np.float32))
    payloads = jax.vmap(lambda v, key: codec.encode(v, key=key))(v, keys)
    said = jax.vmap(lambda payload: codec.decode(payload, 40))(payloads)
    total = codec.total(payloads, 40)
    assert total.shape == (40,) and total.dtype == np.float32
    expected = np.asarray(said, np.float64).sum(axis=0)
    np.testing.assert_allclose(total, expected, atol=count * 1e-7 * max(1.0, np.abs(said).sum(axis=0).max()))


def test_votes_and_entries_at_one_place_add_up():
    """Whole numbers, so that nothing is rounded."""
    v = jnp.asarray([[9.0, 1.0, 0.0], [9.0, -1.0, 2.0], [-5.0, -3.0, 4.0]])
    for codec, expected in ((TopK(1), [13, 0, 0]), (TopK(2), [13, 1, 6]), (Signs("none"), [1, -1, 3])):
        np.testing.assert_array_equal(codec.total(jax.vmap(codec.encode)(v), 3), expected)


def test_nothing_becomes_nothing():
    for codec in (QSGD(3), QSGD(1, norm="max"), Signs("l1"), Signs("l2"), TopK(2), RandomK(2), Plain()):
        np.testing.assert_array_equal(sent(codec, np.zeros(9, np.float32))[1], np.zeros(9))


def test_precision_and_compilation(x64):
    v = vector(40).astype(np.float64)
    for codec in CODECS.values():
        payload, arrived = sent(codec, v)
        compiled = jax.jit(lambda v, key, codec=codec: codec.decode(codec.encode(v, key=key), 40))(v, KEY)
        np.testing.assert_allclose(compiled, arrived, rtol=1e-12)
        if codec is not CODECS["votes"]:
            assert arrived.dtype == np.float64


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TopK(), "k and density: got None and None"),
        (lambda: TopK(2, density=0.5), "one of the two"),
        (lambda: TopK(0), "k: got 0"),
        (lambda: RandomK(density=0.0), r"density: got 0.0; expected a number above 0, at most 1"),
        (lambda: RandomK(density=1.5), "density: got 1.5"),
        (lambda: Signs("l3"), "scale"),
        (lambda: QSGD(0), "levels: got 0"),
        (lambda: QSGD(128), "levels: got 128; expected at most 127"),
        (lambda: TopK(4).encode(jnp.ones(3)), "k: got 4; expected at most the length of the vector, 3"),
        (lambda: TopK(1).encode(jnp.arange(3)), r"v: got int32\[3\]; expected a real floating vector"),
        (lambda: Plain().encode(jnp.ones((2, 2))), "v: got"),
        (lambda: QSGD(1).encode(jnp.ones(3)), "key: got None"),
        (lambda: RandomK(1).encode(jnp.ones(3)), "key: got None"),
        (lambda: TopK(True), "k: got True; expected a number"),
        (lambda: TopK(2.5), "k: got 2.5; expected a whole number"),
        (lambda: TopK(density="all"), "density: got all"),
        (lambda: Plain().encode(jnp.ones(3, complex)), r"v: got complex64\[3\]; expected a real floating vector"),
        (lambda: Plain().encode(jnp.ones(0)), r"v: got float32\[0\]"),
        (lambda: Split("signs", (3,)), "codec: got str; expected a codec"),
        (lambda: Split(Signs(), ()), r"sizes: got \(\); expected at least one length"),
        (lambda: Split(Signs(), (2, 0)), "sizes: got 0; expected a whole number of at least 1"),
        (lambda: Split(Signs(), (2, 2)).encode(jnp.ones(3)), r"sizes: got \(2, 2\); .* sum is that of the vector, 3"),
        (lambda: Split(TopK(3), (2, 4)).encode(jnp.ones(6)), "k: got 3; expected at most the length of the vector, 2"),
        (lambda: Split(QSGD(1), (2, 1)).encode(jnp.ones(3)), "key: got None"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError, match=words):
        make()
