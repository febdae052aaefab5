"""Statistics, tests and controllers of batch sizes against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.parts.batch_size import (
    BatchSizeTest,
    CoordinateTest,
    InnerProductTest,
    Moments,
    NormTest,
    Statistics,
    adapt_batch_size,
    by_samples,
    merge,
    moments,
    next_batch_size,
    statistics,
)

# Compiled whole: operation by operation there would be a program for each.
seen_of = jax.jit(statistics, static_argnames="rows")
moments_of = jax.jit(moments, static_argnames="by_coordinate")
merged_of = jax.jit(merge)


def gradients(rows=7, seed=0, dtype=np.float64):
    """Three leaves, of which one is of scalars, with unlike means."""
    draw = np.random.default_rng(seed)
    made = {
        "w": 0.3 + draw.normal(size=(rows, 2, 3)),
        "b": -0.2 + 0.1 * draw.normal(size=(rows, 4)),
        "c": 2 + draw.normal(size=rows),
    }
    return {name: a.astype(dtype) for name, a in made.items()}


def flat(stacked):
    return np.concatenate([np.asarray(a, np.float64).reshape(len(a), -1) for _, a in sorted(stacked.items())], axis=1)


def by_hand(stacked, eta=0.4, theta=0.3, nu=0.9):
    """The candidates as they are displayed, from the definitions, over the flattened vector."""
    g = flat(stacked)
    b, mean = len(g), g.mean(0)
    square = mean @ mean
    spread = ((g - mean) ** 2).sum() / (b - 1)
    products = g @ mean
    along = ((products - products.mean()) ** 2).sum() / (b - 1)
    residuals = g - np.outer(products, mean) / square
    across = ((residuals - residuals.mean(0)) ** 2).sum() / (b - 1)
    return {
        "spread": spread,
        "along": along,
        "across": across,
        "square": square,
        "norm": spread / (eta**2 * square),
        "inner": along / (theta**2 * square**2),
        "augmented": max(along / (theta**2 * square**2), across / (nu**2 * square)),
        "coordinates": (g.var(0, ddof=1) / (eta**2 * mean**2)).max(),
    }


TESTS = {
    "norm": NormTest(0.4),
    "inner": InnerProductTest(0.3),
    "augmented": InnerProductTest(0.3, 0.9),
    "coordinates": CoordinateTest(0.4),
}


@pytest.mark.parametrize("name", TESTS)
def test_candidates_are_those_of_the_definitions(name, dtype):
    for seed in range(3):
        stacked = gradients(seed=seed, dtype=dtype)
        candidate = TESTS[name].candidate(seen_of(stacked))
        np.testing.assert_allclose(candidate, by_hand(stacked)[name], rtol=1e3 * np.finfo(dtype).eps)
        assert candidate.dtype == dtype


def test_each_part_of_the_augmented_test_decides_somewhere(x64):
    stacked = gradients()
    expected, seen = by_hand(stacked, theta=0.3, nu=0.1), seen_of(stacked)
    np.testing.assert_allclose(InnerProductTest(0.3, 0.1).candidate(seen), expected["augmented"], rtol=1e-12)
    assert expected["augmented"] > 2 * expected["inner"]
    loose = by_hand(stacked, theta=0.05, nu=5.0)
    np.testing.assert_allclose(InnerProductTest(0.05, 5.0).candidate(seen), loose["inner"], rtol=1e-12)


def test_variances_along_and_across_add_up(x64):
    expected, seen = by_hand(gradients()), seen_of(gradients())
    np.testing.assert_allclose(seen.along, expected["along"] / expected["square"], rtol=1e-12)
    np.testing.assert_allclose(seen.total - seen.along, expected["across"], rtol=1e-12)


def test_the_inner_product_is_of_the_whole_vector_and_not_summed_over_tensors(x64):
    """Var(Σ_l ⟨g_i^l, g^l⟩) has the covariances between the tensors, which a sum of variances has not."""
    stacked = gradients()
    separate = sum(by_hand({name: a})["along"] for name, a in stacked.items())
    whole = by_hand(stacked)["along"]
    assert abs(separate / whole - 1) > 0.1
    found = float(InnerProductTest(1.0).candidate(seen_of(stacked))) * by_hand(stacked)["square"] ** 2
    np.testing.assert_allclose(found, whole, rtol=1e-12)


def test_orthogonality_subtracts_the_whole_projection_before_it_squares(x64):
    """Noise along the gradient alone has nothing across it; noise across alone has nothing along it."""
    mean, side = np.array([3.0, 4.0]), np.array([-4.0, 3.0])
    steps = np.array([-1.0, 0.5, 0.5])[:, None]
    along, across = seen_of(mean + steps * mean), seen_of(mean + steps * side)
    np.testing.assert_allclose([along.total - along.along, across.along], 0, atol=1e-12)
    np.testing.assert_allclose([along.along, across.total], 0.75 * 25, rtol=1e-12)


@pytest.mark.parametrize(("by_coordinate", "dtype"), [(False, np.float32), (True, np.float64)])
def test_micro_batches_of_any_lengths_merge_to_the_whole(by_coordinate, dtype, x64):
    stacked = gradients(23, dtype=dtype)
    whole = moments_of(stacked, by_coordinate=by_coordinate)
    cuts = [0, 9, 10, 23]
    pieces = [jax.tree.map(lambda a, i=i, j=j: a[i:j], stacked) for i, j in zip(cuts, cuts[1:], strict=False)]
    merged = moments_of(pieces[0], by_coordinate=by_coordinate)
    for piece in pieces[1:]:
        merged = merged_of(merged, moments_of(piece, by_coordinate=by_coordinate))
    for ours, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=200 * np.finfo(dtype).eps)
    total = sum(np.sum(a) for a in jax.tree.leaves(merged.variance()))
    np.testing.assert_allclose(total, by_hand(stacked)["spread"], rtol=200 * np.finfo(dtype).eps)


def test_equal_micro_batches_follow_total_variance(x64):
    """Var = mean(var) + mean(mean²) − mean², with the normalization 1/b."""
    pieces = np.random.default_rng(1).normal(size=(4, 5, 3)) + np.arange(4)[:, None, None]
    merged = moments_of(pieces[0])
    for piece in pieces[1:]:
        merged = merged_of(merged, moments_of(piece))
    means = pieces.mean(1)
    total = pieces.var(1).mean(0) + (means**2).mean(0) - means.mean(0) ** 2
    np.testing.assert_allclose(merged.squares / merged.count, total.sum(), rtol=1e-12)


def test_weights_leave_out_what_fills_up_a_batch_and_nothing_is_neutral(x64):
    stacked = gradients(6)
    weights = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    kept = jax.tree.map(lambda a: a[weights > 0], stacked)
    none = Moments(jnp.zeros(()), jax.tree.map(lambda a: jnp.zeros(a.shape[1:]), stacked), jnp.zeros(()))
    ours = merged_of(none, moments_of(stacked, weights))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(moments_of(kept)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    for empty in (merged_of(ours, moments_of(stacked, np.zeros(6))), merged_of(none, none)):
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(empty))
    np.testing.assert_allclose(merged_of(ours, moments_of(stacked, np.zeros(6))).squares, ours.squares, rtol=1e-12)


def test_small_noise_around_a_large_mean_is_not_lost_in_32_bits(x32):
    noise = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    stacked = (1e3 + 1e-1 * noise).astype(np.float32)
    halves = merged_of(moments_of(jnp.asarray(stacked[:20])), moments_of(jnp.asarray(stacked[20:])))
    expected = np.asarray(stacked, np.float64).var(0, ddof=1).sum()
    np.testing.assert_allclose(halves.variance(), expected, rtol=1e-3)
    np.testing.assert_allclose(seen_of(jnp.asarray(stacked)).total, expected, rtol=1e-3)


def test_the_inner_product_test_does_not_underflow(x32):
    """|g|⁴ of a gradient of 1e-12 is no number of 32 bits."""
    stacked = gradients(dtype=np.float32)
    small = jax.tree.map(lambda a: jnp.asarray(1e-12 * a), stacked)
    np.testing.assert_allclose(TESTS["inner"].candidate(seen_of(small)), by_hand(stacked)["inner"], rtol=1e-4)


def test_entries_may_be_means_of_micro_batches(x64):
    """The variance of an example is `rows` times that between means; both estimate the same."""
    means = gradients(9)
    each, of_means = by_hand(means), seen_of(means, rows=4)
    np.testing.assert_allclose([of_means.total, of_means.along * of_means.squared_norm],
                               [4 * each["spread"], 4 * each["along"]], rtol=1e-12)  # fmt: skip
    many = 1 + np.random.default_rng(0).normal(size=(4000, 8, 5))
    np.testing.assert_allclose(seen_of(many.mean(1), rows=8).total, 5, rtol=0.05)


def test_complex_gradients_are_their_real_view(x64):
    pair = gradients(5)
    real = {"z": np.concatenate([pair["b"], -2 * pair["b"] + 1], axis=1)}
    both = {"z": jnp.asarray(real["z"][:, :4] + 1j * real["z"][:, 4:])}
    for test in (NormTest(0.4), InnerProductTest(0.3, 0.9)):
        np.testing.assert_allclose(test.candidate(seen_of(both)), test.candidate(seen_of(real)), rtol=1e-12)
    np.testing.assert_allclose(moments_of(both).squares, moments_of(real).squares, rtol=1e-12)


def test_sixteen_bits_are_added_up_in_32(x32):
    stacked = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), gradients(200))
    seen = seen_of(stacked)
    assert {a.dtype for a in jax.tree.leaves(seen)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(seen.total, by_hand(stacked)["spread"], rtol=1e-4)


class Wants(BatchSizeTest):
    size: float

    def candidate(self, seen):
        return jnp.asarray(self.size, jnp.float32)


NOTHING = Statistics(jnp.zeros(2), jnp.zeros(()))


@pytest.mark.parametrize(
    ("wanted", "size", "maximum", "expected"),
    [
        (17.0, 8, 100, 17),
        (17.2, 8, 100, 18),  # rounded up
        (5.0, 8, 100, 8),  # never smaller
        (0.0, 8, 100, 8),
        (99.5, 8, 100, 100),
        (100.5, 8, 100, 100),
        (1e30, 8, 2**31 - 1, 2**31 - 1),
        (np.inf, 8, 100, 100),
        (np.nan, 8, 100, 8),
    ],
)
def test_the_next_batch_size(wanted, size, maximum, expected, x32):
    following = jax.jit(lambda wanted: next_batch_size(Wants(wanted), NOTHING, size, maximum))(np.float32(wanted))
    assert following.dtype == jnp.int32 and int(following) == expected
    assert int(next_batch_size(Wants(wanted), NOTHING, size, maximum)) == expected


def test_without_noise_the_batch_stays_and_around_nothing_it_is_the_largest(x64):
    still = {"w": np.ones((4, 3))}
    noise = {"w": np.array([[1.0, 0.0], [-1.0, 0.0]])}
    for test in (NormTest(0.1), InnerProductTest(0.1, 0.1), CoordinateTest(0.1)):
        assert int(next_batch_size(test, seen_of(still), 4, 100)) == 4
        assert int(next_batch_size(test, seen_of(jax.tree.map(np.zeros_like, still)), 4, 100)) == 4
    assert int(next_batch_size(NormTest(0.1), seen_of(noise), 2, 100)) == 100


def test_coordinates_near_zero_can_be_left_out(x64):
    stacked = np.array([[1.0, 0.01, 5.0], [3.0, -0.0098, 5.0]])
    assert float(CoordinateTest(0.5).candidate(seen_of(stacked))) > 1e3
    np.testing.assert_allclose(CoordinateTest(0.5, 1e-6).candidate(seen_of(stacked)), 2 / (0.25 * 4))
    assert float(CoordinateTest(0.5, 1e3).candidate(seen_of(stacked))) == 0


def test_nan_is_not_hidden(x64):
    stacked = np.array([[1.0, 2.0], [np.nan, 3.0]])
    for test in (NormTest(), InnerProductTest(0.5, 1.0), CoordinateTest(), CoordinateTest(0.5, 10.0)):
        assert np.isnan(test.candidate(seen_of(stacked)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NormTest(0.0), "eta: got 0.0"),
        (lambda: NormTest(-0.5), "eta: got -0.5"),
        (lambda: CoordinateTest(0.0), "eta: got 0.0"),
        (lambda: CoordinateTest(0.5, -1.0), "tolerance: got -1.0"),
        (lambda: InnerProductTest(0.0), "theta: got 0.0"),
        (lambda: InnerProductTest(0.5, 0.0), "nu: got 0.0"),
        (lambda: InnerProductTest(0.5, float("nan")), "nu: got nan"),
        (lambda: statistics(jnp.zeros(())), r"per_example_gradients: got float32\[\]; .* leading axis"),
        (lambda: statistics({"a": jnp.zeros((3, 2)), "b": jnp.zeros((2, 2))}), "share one leading axis"),
        (lambda: statistics(jnp.zeros((1, 2))), "got 1 examples; expected at least two"),
        (lambda: statistics({}), "per_example_gradients: got no arrays"),
        (lambda: statistics(jnp.zeros((3, 2)), rows=0), "rows: got 0"),
        (lambda: moments(jnp.zeros((0, 2))), "stacked: got 0 examples"),
        (lambda: adapt_batch_size(batch_size=1), "batch_size: got 1; .* at least 2"),
        (lambda: adapt_batch_size(batch_size=8, max_batch_size=7), "max_batch_size: got 7; .* at least batch_size, 8"),
        (lambda: adapt_batch_size(test_interval=0), "test_interval: got 0"),
        (lambda: adapt_batch_size(0.5), "test: got 0.5; expected NormTest"),
        (lambda: by_samples(0.1), "schedule: got 0.1"),
    ],
)
def test_bad_input(make, words, x32):
    with pytest.raises(fl.InputError, match=words):
        make()


# ---- in a training loop of one's own ------------------------------------------------------------


def test_a_transformation_carries_the_batch_size(x64):
    update = optax.chain(adapt_batch_size(NormTest(0.4), 3, 40), optax.sgd(0.1))
    params = jax.tree.map(lambda a: jnp.zeros(a.shape[1:]), gradients())
    state, sizes = update.init(params), [3]
    for seed in range(6):
        stacked = gradients(sizes[-1], seed)
        mean = jax.tree.map(lambda a: a.mean(0), stacked)
        updates, state = jax.jit(update.update)(mean, state, params, per_example_gradients=stacked)
        sizes.append(int(state[0].batch_size))
        expected = by_hand(stacked)["norm"]
        np.testing.assert_allclose(state[0].candidate, expected, rtol=1e-12)
        assert sizes[-1] == min(40, max(sizes[-2], int(np.ceil(expected))))
        np.testing.assert_allclose(updates["w"], -0.1 * mean["w"])  # which pass as they are
        if sizes[-1] == 40:
            break
    assert sizes[-1] > 3 and int(state[0].steps) == len(sizes) - 1


def test_it_tests_at_intervals_and_no_more_at_the_largest(x32):
    stacked = jnp.asarray([[1.0], [-1.0], [1.5]])
    update = adapt_batch_size(NormTest(1.0), 2, 30, test_interval=3)

    def step(state, scale):
        state = update.update(scale * stacked[0], state, per_example_gradients=1 + scale * stacked)[1]
        return state, (state.batch_size, state.candidate)

    scales = jnp.asarray([9.0, 9.0, 1.0, 9.0, 9.0, 50.0, 9.0, 9.0, 9.0])
    sizes, candidates = jax.lax.scan(step, update.init(stacked[0]), scales)[1]
    at = [float(NormTest(1.0).candidate(seen_of(1 + scales[i] * stacked))) for i in (2, 5, 8)]
    assert at[0] < 2 and at[1] > 2 and at[2] > 2 and at[1] != at[2]
    np.testing.assert_allclose(candidates, np.repeat([0.0, *at], [2, 3, 3, 1]), rtol=1e-6)
    larger = int(np.ceil(at[1]))
    np.testing.assert_array_equal(sizes, [2] * 5 + [larger] * 3 + [max(larger, int(np.ceil(at[2])))])
    full = adapt_batch_size(NormTest(1.0), 30, 30)
    state = full.update(stacked[0], full.init(stacked[0]), per_example_gradients=stacked)[1]
    assert float(state.candidate) == 0 and int(state.batch_size) == 30


def test_behind_a_mask_the_test_is_of_what_is_left(x64):
    stacked = gradients()
    mean = jax.tree.map(lambda a: a.mean(0), stacked)
    params = jax.tree.map(jnp.zeros_like, mean)

    def candidate(mask):
        masked = optax.masked(adapt_batch_size(NormTest(0.4), 4), mask, mask_compatible_extra_args=True)
        state = masked.init(params)
        return float(masked.update(mean, state, params, per_example_gradients=stacked)[1].inner_state.candidate)

    expected = by_hand({name: a for name, a in stacked.items() if name != "c"})["norm"]
    np.testing.assert_allclose(candidate({"w": True, "b": True, "c": False}), expected, rtol=1e-12)
    assert candidate({"w": False, "b": False, "c": False}) == 0


def test_the_per_example_gradients_are_asked_for():
    update, params = adapt_batch_size(), jnp.zeros(2)
    state = update.init(params)
    with pytest.raises(fl.InputError, match="per_example_gradients: got None"):
        update.update(params, state)
    with pytest.raises(fl.InputError, match="per_example_gradients: got"):
        update.update(params, state, per_example_gradients=params)  # no axis of examples
    with pytest.raises(fl.InputError, match="at least two"):
        update.update(params, state, per_example_gradients=params[None])


def test_a_schedule_measured_in_samples(x64):
    update = by_samples(lambda samples: 1 / (1 + samples))
    g = jnp.asarray([2.0, -1.0])
    state, seen = update.init(g), []
    for size in (4, 4, 10):
        updates, state = jax.jit(update.update)(g, state, batch_size=size)
        seen.append(float(updates[0]))
    np.testing.assert_allclose(seen, [-2.0, -2 / 5, -2 / 9])
    assert int(state.samples) == 18
    _, state = update.update(g, type(state)(jnp.int32(2**31 - 10)), batch_size=100)
    assert int(state.samples) == 2**31 - 1  # which does not turn over
    with pytest.raises(fl.InputError, match="batch_size: got None"):
        update.update(g, state)
