"""Error feedback: what was sent and what is kept are what came in, and NumPy's loop with top-k, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.parts.codecs import QSGD, Plain, RandomK, Signs, Split, TopK
from fallline.parts.feedback import ErrorFeedback

N, ROUNDS = 45, 12
CODECS = {
    "plain": Plain(),
    "top-k": TopK(4),
    "random-k": RandomK(4),
    "l1": Signs("l1"),
    "l2": Signs("l2"),
    "ternary": QSGD(1, norm="max"),
    "pieces": Split(TopK(1), (5, 40)),
}


def messages(dtype=np.float32, whole=False):
    drawn = np.random.default_rng(2)
    v = drawn.integers(-50, 50, (ROUNDS, N)) if whole else drawn.normal(size=(ROUNDS, N))
    return v.astype(dtype)


def sent(codec, v):
    """What arrives of each message, and the memory after each."""
    feedback = ErrorFeedback(codec)

    def one(memory, item):
        v, key = item
        payload, memory = feedback.encode(v, memory, key=key)
        return memory, (feedback.decode(payload, N), memory)

    keys = jax.random.split(jax.random.key(5), len(v))
    arrived, memories = jax.lax.scan(one, feedback.init(N, v.dtype), (jnp.asarray(v), keys))[1]
    return np.asarray(arrived), np.asarray(memories)


@pytest.mark.parametrize("name", CODECS)
def test_what_is_sent_and_what_is_kept_are_what_came_in(name, dtype):
    """Σ sent + memory = Σ v after every round; a round adds, subtracts and sums once, each with an error of ε/2."""
    v = messages(dtype)
    arrived, memories = sent(CODECS[name], v)
    assert arrived.dtype == memories.dtype == dtype
    exact = np.longdouble
    difference = np.cumsum(arrived.astype(exact), 0) + memories.astype(exact) - np.cumsum(v.astype(exact), 0)
    largest = max(np.abs(arrived).max(), np.abs(memories).max(), np.abs(v).max())
    assert np.abs(difference).max() <= 2 * ROUNDS * np.finfo(dtype).eps * largest


@pytest.mark.parametrize("name", ["top-k", "random-k", "pieces"])
def test_whole_numbers_are_conserved_exactly(name):
    v = messages(whole=True)
    arrived, memories = sent(CODECS[name], v)
    np.testing.assert_array_equal(np.cumsum(arrived, 0) + memories, np.cumsum(v, 0))
    assert np.abs(memories[-1]).max() > 0  # something was kept


def test_top_k_is_the_loop_of_numpy_to_the_bit():
    v = messages()
    arrived, memories = sent(TopK(4), v)
    memory = np.zeros(N, np.float32)
    for t in range(ROUNDS):
        total = v[t] + memory
        kept = np.argsort(-np.abs(total), kind="stable")[:4]
        said = np.zeros(N, np.float32)
        said[kept] = total[kept]
        memory = total - said
        np.testing.assert_array_equal(arrived[t], said)
        np.testing.assert_array_equal(memories[t], memory)


def test_nothing_is_kept_where_everything_is_sent():
    v = messages()
    arrived, memories = sent(Plain(), v)
    np.testing.assert_array_equal(arrived, v)
    np.testing.assert_array_equal(memories, np.zeros_like(v))


@pytest.mark.parametrize(("name", "contraction"), [("top-k", 4 / N), ("l1", None)])
def test_the_memory_stays_bounded(name, contraction):
    """‖e_t‖² ≤ 4 (1 − δ)/δ² G² for a δ-contraction and ‖v‖ ≤ G (Karimireddy et al. 2019, Lemma 3).

    Signs with the ℓ1 scale contract by ‖v‖₁²/(n ‖v‖²) ≥ 1/n.
    """
    v = np.tile(messages(), (30, 1))
    delta = contraction or 1 / N
    _, memories = sent(CODECS[name], v)
    bound = 4 * (1 - delta) / delta**2 * np.max(np.sum(v**2, axis=1))
    assert np.all(np.sum(memories**2, axis=1) <= bound)


@pytest.mark.parametrize("name", ["top-k", "l1", "l2"])
def test_a_constant_step_size_stands_before_or_behind(name):
    """A power of two changes no bit but the exponent."""
    v = messages()
    arrived, memories = sent(CODECS[name], v)
    scaled, kept = sent(CODECS[name], v * np.float32(0.25))
    np.testing.assert_array_equal(scaled, arrived * np.float32(0.25))
    np.testing.assert_array_equal(kept, memories * np.float32(0.25))


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
def test_the_memory_is_never_narrow(narrow):
    """Messages of 16 bits: what is kept of them is not rounded to 16 bits."""
    memory = ErrorFeedback(TopK(1)).init(3, narrow)
    assert memory.dtype == jnp.float32 and not memory.any()
    v = jnp.asarray([1.0, 2.0**-9, 2.0**-9], narrow)
    for _ in range(2):
        payload, memory = ErrorFeedback(TopK(1)).encode(v, memory)
    np.testing.assert_array_equal(memory, [0, 2.0**-8, 2.0**-8])
    memory = memory.at[1].add(1)
    _, memory = ErrorFeedback(TopK(1)).encode(v, memory.at[0].set(4))  # 1 + 2⁻⁸ + 2⁻⁹ needs 9 bits behind the point
    assert float(memory[1]) == 1 + 2.0**-8 + 2.0**-9
    assert payload[1].dtype == jnp.float32


def test_the_memory_is_as_wide_as_the_messages(x64):
    assert ErrorFeedback(TopK(1)).init(3, jnp.float64).dtype == jnp.float64


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (TopK, "codec: got the class TopK; expected a codec such as"),
        ("top-k", "codec: got str"),
        (None, "codec: got NoneType"),
        (ErrorFeedback(Signs()), "codec: got ErrorFeedback; expected a codec"),
    ],
)
def test_bad_input(codec, words):
    with pytest.raises(InputError, match=words):
        ErrorFeedback(codec)
    assert issubclass(InputError, ValueError)


def test_what_the_codec_cannot_encode():
    feedback = ErrorFeedback(TopK(4))
    with pytest.raises(InputError, match="k: got 4; expected at most the length of the vector, 3"):
        feedback.encode(jnp.ones(3), feedback.init(3))
    with pytest.raises(InputError, match=r"v: got int32\[4\]; expected a real floating vector"):
        feedback.encode(jnp.arange(4), jnp.zeros(4, jnp.int32))
    with pytest.raises(InputError, match="key: got None"):
        ErrorFeedback(RandomK(1)).encode(jnp.ones(3), jnp.zeros(3))
