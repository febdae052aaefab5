"""Aggregators against their definitions in NumPy, from messages and from what crossed the wire."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.distributed.aggregators import IterativeFiltering, Majority, Mean, Median, Total, TrimmedMean
from fallline.parts.codecs import QSGD, Plain, RandomK, Signs, Split, TopK


def drawn(n, m, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((n, m)).astype(dtype)


def trimmed(messages, cut):
    """Definition 2 of Yin et al. (2018)."""
    return np.sort(messages, axis=0)[cut : len(messages) - cut].mean(axis=0)


# --- mean and sum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 70])  # 70: one after another in a loop
def test_mean_and_total(n, dtype):
    messages = drawn(n, 12, dtype)
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(Mean()(messages), messages.mean(axis=0), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(Total()(messages), messages.sum(axis=0), rtol=tolerance, atol=10 * tolerance)


CODECS = [Plain(), TopK(5), RandomK(5), Signs("l1"), Signs("l2"), Signs("none"), QSGD(3), Split(TopK(3), (20, 17))]


@pytest.mark.parametrize(
    ("codec", "n"), [*((codec, 6) for codec in CODECS), (Signs("l1"), 70), (TopK(5), 70)], ids=repr
)
def test_of_payloads_is_the_aggregate_of_what_they_say(codec, n):
    robust = (Median(), Majority(), Majority("zero")) if n == 6 else (Majority("zero"),)

    @jax.jit
    def aggregates(messages, keys):
        payloads = jax.vmap(lambda v, key: codec.encode(v, key=key))(messages, keys)
        said = jax.vmap(lambda payload: codec.decode(payload, 37))(payloads)
        of_payloads = [rule.of_payloads(payloads, codec, 37) for rule in (Mean(), Total(), *robust)]
        return said, of_payloads, [rule(said) for rule in robust]

    keys = jax.random.split(jax.random.key(1), n)
    said, (mean, total, *out), expected = jax.tree.map(np.asarray, aggregates(jnp.asarray(drawn(n, 37)), keys))
    np.testing.assert_allclose(mean, said.astype(float).mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, said.astype(float).sum(axis=0), rtol=1e-5, atol=1e-4)
    for one, other in zip(out, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-7)


# --- order statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 10])
def test_the_median_is_that_of_each_coordinate(n, dtype):
    messages = drawn(n, 25, dtype)
    np.testing.assert_allclose(jax.jit(Median())(messages), np.median(messages, axis=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "cut"), [(1, 0), (5, 0), (5, 2), (6, 2), (10, 3)])
def test_the_trimmed_mean_leaves_out_the_ends(n, cut, dtype):
    messages = drawn(n, 25, dtype)
    np.testing.assert_allclose(jax.jit(TrimmedMean(cut))(messages), trimmed(messages, cut), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("honest", [5, 6])
def test_a_lie_stays_within_what_honest_workers_say(honest):
    """Fewer than half of the rows hold anything: each coordinate lies between honest ones, and nothing is lost."""
    rules = jax.jit(Median()), jax.jit(TrimmedMean(honest - 1))
    for lie in (np.nan, np.inf, -np.inf, 3e38):
        messages = np.concatenate([drawn(honest, 8), np.full((honest - 1, 8), lie, np.float32)])
        low, high = messages[:honest].min(axis=0), messages[:honest].max(axis=0)
        for rule in rules:
            out = np.asarray(rule(messages))
            assert np.all((low <= out) & (out <= high))


def test_a_message_with_nan_is_one_vote_at_the_upper_end():
    messages = drawn(7, 20)
    messages[2] = np.nan
    upper = np.where(np.isnan(messages), np.float32(3e38), messages)
    np.testing.assert_array_equal(Median()(messages), np.median(upper, axis=0))
    np.testing.assert_allclose(TrimmedMean(2)(messages), trimmed(upper, 2), rtol=2e-6, atol=1e-7)
    assert np.isnan(Mean()(messages)).all()


# --- the majority ---------------------------------------------------------------------------------


def test_the_majority_counts_signs_and_ties():
    messages = np.float32(
        [[1, 2, -3, 0, 0, np.nan], [5, -1, -1, 0, 2, 1], [-1, 1, -9, 0, -1, 1], [3, -4, -1, 0, 0, -1]]
    )
    # Sums of signs: 2, 0, −4, 0, 0, and with NaN for a vote against 0.
    np.testing.assert_array_equal(Majority("zero")(messages), [1, 0, -1, 0, 0, 0])
    np.testing.assert_array_equal(Majority()(messages), [1, 1, -1, 1, 1, 1])
    assert Majority()(jnp.asarray(messages, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("m", [31, 64])
def test_packed_votes_are_counted_as_unpacked_ones(n, m):
    messages = np.round(drawn(n, m, seed=m))  # with zeros, which the codec sends as +1
    payloads = jax.vmap(Signs("none").encode)(messages)
    votes = np.where(messages >= 0, 1, -1).sum(axis=0)
    plus, zero = (
        jax.jit(lambda p, rule=rule: rule.of_payloads(p, Signs("none"), m))(payloads)
        for rule in (Majority(), Majority("zero"))
    )
    np.testing.assert_array_equal(plus, np.where(votes >= 0, 1, -1))
    np.testing.assert_array_equal(zero, np.sign(votes))


# --- filtering ------------------------------------------------------------------------------------


def filtered(messages, threshold):
    """The spectral filter with the covariance matrix itself, in float64: the mean, and the weights."""
    g = messages.astype(float)
    sound = np.isfinite(g).all(axis=1)
    g, c = g[sound], np.ones(sound.sum())
    while True:
        mu = c @ g / c.sum()
        sigma = (g - mu).T @ ((g - mu) * c[:, None]) / c.sum()
        values, vectors = np.linalg.eigh(sigma)
        tau = ((g - mu) @ vectors[:, -1]) ** 2
        most = tau[c > 0].max()
        fewer = np.where(tau >= most * (1 - 1e-12), 0, c * (1 - tau / most))
        if values[-1] <= threshold or not np.any(fewer > 0):
            return mu, c
        c = np.where(c > 0, fewer, 0)


@jax.jit
def filtering(messages, threshold):
    return IterativeFiltering(threshold)(messages)


def attacked(n, b, m, far, seed=0, dtype=np.float32):
    messages = drawn(n, m, dtype, seed)
    messages[n - b :] = far
    return messages


@pytest.mark.parametrize(
    ("messages", "threshold"),
    [
        (drawn(20, 5), 100.0),  # nobody stands out: the mean
        (attacked(20, 6, 5, 10.0), 3.0),
        (attacked(20, 6, 50, np.linspace(-3, 3, 50)), 9.0),  # more coordinates than workers
        (attacked(20, 3, 5, np.nan), 3.0),
        (drawn(12, 5), 0.3),  # a bound too small: honest ones are filtered too, one by one
        (100 + 1e-2 * attacked(20, 6, 5, 10.0), 3e-4),  # a large common part
    ],
    ids=["clean", "far", "wide", "nan", "strict", "shifted"],
)
def test_filtering_is_the_published_loop(messages, threshold):
    expected, _ = filtered(messages, threshold)
    scale = np.abs(messages[np.isfinite(messages)]).max()
    np.testing.assert_allclose(filtering(messages, threshold), expected, rtol=1e-5, atol=2e-6 * scale)


def test_filtering_in_double_precision(x64):
    messages = attacked(20, 6, 5, 10.0, dtype=np.float64)
    np.testing.assert_allclose(filtering(messages, 3.0), filtered(messages, 3.0)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("far", [1e4, 1e12, 1e18, 3e19, 3e38, np.inf, -np.inf, np.nan])
def test_huge_outliers_leave_no_trace(far, first):
    """Whatever their size, and whoever comes first: what is left is the mean of the honest messages."""
    honest = 50 + 1e-2 * drawn(14, 30, seed=3)
    lies = np.full((6, 30), far, np.float32)
    messages = np.concatenate([lies, honest] if first else [honest, lies])
    spread = honest - honest.mean(axis=0, dtype=float)
    largest = np.linalg.eigvalsh(spread.T @ spread / 14)[-1]
    out = np.asarray(filtering(messages, 1.1 * largest), float)
    np.testing.assert_allclose(out, honest.mean(axis=0, dtype=float), rtol=2e-7, atol=0)


def test_filtering_never_loses_everybody():
    square = np.float32([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    pair = np.float32([[0, 4], [2, 0]])
    np.testing.assert_allclose(filtering(pair, 1e-3), [1, 2], atol=1e-6)
    assert np.isfinite(filtering(square, 1e-3)).all()
    np.testing.assert_array_equal(filtering(np.ones((4, 2), np.float32), 1e-3), np.ones(2))


def test_filtering_of_narrow_messages_is_done_in_single_precision():
    messages = jnp.asarray(attacked(20, 6, 5, 10.0), jnp.bfloat16)
    out = filtering(messages, 3.0)
    assert out.dtype == jnp.bfloat16
    expected, _ = filtered(np.asarray(messages, np.float32), 3.0)
    np.testing.assert_allclose(np.asarray(out, float), expected, rtol=4e-3, atol=1e-6)


def test_filtering_turns_with_the_coordinates():
    messages, (q, _) = attacked(20, 6, 5, 5.0), np.linalg.qr(drawn(5, 5, seed=1))
    np.testing.assert_allclose(filtering(messages @ q, 3.0), filtering(messages, 3.0) @ q, rtol=1e-4, atol=1e-5)


# --- what they tolerate, and refusals -------------------------------------------------------------


def test_tolerances():
    for rule in (Median(), Majority(), IterativeFiltering(1.0)):
        assert [rule.tolerates(n)[0] for n in (1, 2, 3, 10, 11)] == [0, 0, 1, 4, 5]
    assert TrimmedMean(3).tolerates(10)[0] == 3
    assert Mean().tolerates(10) is None and Total().tolerates(10) is None
    assert [rule.robust for rule in (Mean(), Total(), Median(), TrimmedMean(1))] == [False, False, True, True]


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: TrimmedMean(-1), "cut"),
        (lambda: TrimmedMean(1.5), "cut"),
        (lambda: TrimmedMean(2).check(4), "cut"),
        (lambda: TrimmedMean(2)(np.ones((4, 3), np.float32)), "cut"),
        (lambda: Majority("minus"), "tie"),
        (lambda: IterativeFiltering(0.0), "threshold"),
        (lambda: IterativeFiltering(np.nan), "threshold"),
    ],
)
def test_bad_input(make, argument):
    with pytest.raises(InputError, match=f"^{argument}: got"):
        make()
