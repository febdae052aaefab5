"""SGLD and SGHMC against their formulas in NumPy, and the account of what they learn against exact information."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.inference.sgld_generalization import (
    clipped_mean,
    examples_needed,
    running_bound,
    sghmc,
    sgld,
    sgld_generalization,
)


def clipped_by_hand(gradients, clip):
    """Rows of a matrix, clipped one by one, then averaged, in float64."""
    rows = np.asarray(gradients, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.mean(np.where(norms > clip, rows * clip / np.where(norms > 0, norms, 1), rows), axis=0)


def as_tree(rows):
    """Five columns as a pytree of two leaves."""
    rows = jnp.asarray(rows)
    return {"a": rows[..., :3], "b": rows[..., 3:].reshape(*rows.shape[:-1], 2, 1)}


def as_row(tree):
    return np.concatenate([np.asarray(tree["a"], np.float64), np.asarray(tree["b"], np.float64).reshape(-1)])


def run(transformation, batches):
    """The sum of all steps, after each of them, and the last state."""
    like = as_tree(np.zeros_like(batches[0][0]))
    state, at, points = transformation.init(like), np.zeros(5), []
    for rows in batches:
        steps, state = transformation.update(like, state, like, per_example_gradients=as_tree(rows))
        at = at + as_row(steps)
        points.append(at)
    return np.array(points), state


def batches_of(dtype, steps=6, scale=3.0):
    return (scale * np.random.default_rng(0).normal(size=(steps, 4, 5))).astype(dtype)


# ---- the steps -------------------------------------------------------------------------------------


def test_the_data_enter_sgld_as_clipped_gradients_times_the_learning_rate(dtype):
    batches, rate = batches_of(dtype), lambda t: 0.5 / (t + 1)
    (points, _), (noise, _) = (run(sgld(rate, 1.5, seed=3), b) for b in (batches, 0 * batches))
    expected = -np.cumsum([0.5 / (t + 1) * clipped_by_hand(rows, 1.5) for t, rows in enumerate(batches)], axis=0)
    np.testing.assert_allclose(points - noise, expected, atol=40 * np.finfo(dtype).eps)


def test_the_data_enter_sghmc_through_the_velocity(dtype):
    batches, rate, friction = batches_of(dtype), 0.2, 0.3
    (points, _), (noise, _) = (run(sghmc(rate, 1.5, friction=friction, seed=3), b) for b in (batches, 0 * batches))
    x, v, expected = np.zeros(5), np.zeros(5), []
    for rows in batches:
        v = (1 - friction) * v - rate * clipped_by_hand(rows, 1.5)
        x = x + v
        expected.append(x)
    np.testing.assert_allclose(points - noise, expected, atol=100 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("options", "sigma"),
    [
        ({}, np.sqrt(0.3)),  # the paper's √η
        ({"temperature": 0.05}, np.sqrt(2 * 0.3 * 0.05)),
        ({"noise": 0.7}, 0.7),
        ({"noise": lambda t: 0.7 / (t + 1)}, 0.7),
    ],
)
def test_the_noise_of_sgld_has_the_level_of_the_temperature(options, sigma):
    like = jnp.zeros(20_000)
    update = sgld(0.3, 1.0, seed=1, **options)
    first, state = update.update(like, update.init(like), per_example_gradients=like[None])
    second, _ = update.update(like, state, per_example_gradients=like[None])
    # Six standard errors of a standard deviation, a mean, a correlation of n entries.
    assert np.std(first) == pytest.approx(sigma, rel=6 / np.sqrt(2 * like.size))
    assert abs(np.mean(first)) < 6 * sigma / np.sqrt(like.size)
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / np.sqrt(like.size)


def test_the_noise_of_sghmc_is_on_velocity_and_position_at_the_same_level():
    like = jnp.zeros(20_000)
    update = sghmc(0.3, 1.0, friction=0.2, temperature=0.6, seed=1)
    steps, state = update.update(like, update.init(like), per_example_gradients=like[None])
    sigma = np.sqrt(2 * 0.2 * 0.3 * 0.6)
    position = np.asarray(steps - state.velocity)
    for noise in (state.velocity, position):
        assert np.std(noise) == pytest.approx(sigma, rel=6 / np.sqrt(2 * like.size))
    assert abs(np.corrcoef(state.velocity, position)[0, 1]) < 6 / np.sqrt(like.size)
    default = sghmc(0.3, 1.0, friction=0.2, seed=1)
    velocity = default.update(like, default.init(like), per_example_gradients=like[None])[1].velocity
    assert np.std(velocity) == pytest.approx(np.sqrt(0.2 * 0.3), rel=6 / np.sqrt(2 * like.size))


def test_seeds_and_keys():
    batches = batches_of(np.float32, steps=2)
    first, again, key, other = (run(sgld(0.1, 1.0, seed=s), batches)[0] for s in (7, 7, jax.random.key(7), 8))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, key)
    assert np.abs(first - other).max() > 1e-2


def test_the_norm_that_is_clipped_is_that_of_all_parameters_of_one_example(x64):
    gradients = {"a": jnp.array([[3.0], [-30.0], [0.0]]), "b": jnp.array([4.0, -40.0, 0.0])}  # norms 5, 50, 0
    mean = clipped_mean(gradients, 5.0)
    np.testing.assert_allclose([mean["a"][0], mean["b"]], [0.0, 0.0], atol=1e-15)  # opposites cancel once clipped
    mean = clipped_mean(gradients, 1.0)
    np.testing.assert_allclose([mean["a"][0], mean["b"]], [0.0, 0.0], atol=1e-15)
    mean = clipped_mean({"a": jnp.array([[3.0], [0.3]]), "b": jnp.array([4.0, 0.4])}, 2.0)
    np.testing.assert_allclose([mean["a"][0], mean["b"]], [(1.2 + 0.3) / 2, (1.6 + 0.4) / 2], rtol=1e-14)


def test_bfloat16_is_clipped_in_float32_and_comes_back_in_its_dtype():
    like = jnp.zeros(4, jnp.bfloat16)
    gradients = jnp.full((3, 4), 1.01, jnp.bfloat16)
    mean = clipped_mean(gradients, 1.0)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, 0.5, rtol=1e-6)
    for update in (sgld(0.1, 1.0, seed=0), sghmc(0.1, 1.0, seed=0)):
        steps, state = update.update(like, update.init(like), per_example_gradients=gradients)
        assert steps.dtype == jnp.bfloat16 and state.account.information.dtype == jnp.float32
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, update.init(like))
    assert state.velocity.dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # of the last the square overflows
def test_what_is_not_finite_stays_so(bad):
    gradients = jnp.zeros((3, 5), jnp.float32).at[1, 0].set(bad)
    mean = clipped_mean(as_tree(gradients), 1.0)
    assert np.isnan(mean["a"][0])
    # Nor is it hidden where only the mean gradient has it.
    for update in (sgld(0.1, 1.0, seed=0), sghmc(0.1, 1.0, seed=0)):
        spoiled = jnp.array([0.0, bad])
        steps, _ = update.update(spoiled, update.init(spoiled), per_example_gradients=jnp.zeros((2, 2)))
        assert np.isnan(steps[1]) == (not np.isfinite(bad)) and np.isfinite(steps[0])


# ---- the account -----------------------------------------------------------------------------------


def test_the_account_in_the_state_is_the_sum_over_the_steps(dtype):
    rates, d, clip = 0.5 / np.arange(1, 7), 5, 1.5
    power = (rates * clip) ** 2 / (2 * rates * 0.02)
    for update, scale in (
        (sgld(lambda t: 0.5 / (t + 1), clip, temperature=0.02, seed=0), 1.0),
        (sghmc(lambda t: 0.5 / (t + 1), clip, temperature=0.02, friction=0.25, seed=0), 4.0),
    ):
        _, state = run(update, batches_of(dtype))
        close = {"rtol": 20 * np.finfo(dtype).eps}
        np.testing.assert_allclose(state.account.information, np.sum(d / 2 * np.log(1 + scale * power / d)), **close)
        np.testing.assert_allclose(state.account.linear, np.sum(scale * power / 2), **close)
        bound, vacuous = running_bound((state,), examples=30, sub_gaussian=0.25)
        expected = np.sqrt(2 * 0.25**2 / 30 * np.sum(d / 2 * np.log(1 + scale * power / d)))
        np.testing.assert_allclose(bound, expected, **close)
        assert bool(vacuous) == (expected >= 0.5)


def test_the_planned_bound_is_that_of_the_run():
    update = sgld(lambda t: 0.5 / (t + 1), 1.5, seed=0)
    _, state = run(update, batches_of(np.float32))
    rates = 0.5 / np.arange(1, 7)
    planned = sgld_generalization(rates, np.sqrt(rates), clip=1.5, dimension=5, examples=30)
    np.testing.assert_allclose(running_bound(state, examples=30).bound, planned.bound[-1], rtol=1e-6)


def test_long_sums_lose_nothing_in_float32(x32):
    steps = 200_000
    update = sgld(lambda t: 1 / (t + 1.0), 1.0, seed=0)
    like = jnp.zeros(1)

    @jax.jit
    def account(state):
        def step(state, _):
            return update.update(like, state, per_example_gradients=like[None])[1], None

        return jax.lax.scan(step, state, None, length=steps)[0].account

    found = account(update.init(like))
    rates = 1 / np.arange(1, steps + 1)
    np.testing.assert_allclose(found.linear, np.sum(rates / 2), rtol=3e-7)
    np.testing.assert_allclose(found.information, np.sum(np.log1p(rates) / 2), rtol=3e-7)


def test_a_step_of_length_zero_tells_nothing():
    update = sgld(lambda t: jnp.where(t < 1, 0.5, 0.0), 1.0, seed=0)
    _, once = run(update, batches_of(np.float32, steps=1))
    points, twice = run(update, batches_of(np.float32, steps=3))
    assert once.account.linear == twice.account.linear
    assert float(once.account.linear) == pytest.approx(0.25, rel=1e-6)
    np.testing.assert_array_equal(points[0], points[2])


def test_what_one_step_tells_is_at_most_its_term():
    """−ηF + σξ with F = ±L, one coordinate: the exact information by quadrature, and the two bounds."""
    grid = np.linspace(-30, 30, 200_001)
    for ratio in (0.1, 0.5, 1.0, 3.0):
        density = sum(np.exp(-((grid - m) ** 2) / 2) for m in (-ratio, ratio)) / np.sqrt(8 * np.pi)
        entropy = -np.sum(density * np.log(np.maximum(density, 1e-300))) * (grid[1] - grid[0])
        exact = entropy - 0.5 * np.log(2 * np.pi * np.e)
        told = sgld_generalization(ratio, 1.0, clip=1.0, dimension=1, examples=1, steps=1)
        assert exact <= told.information[0] + 1e-9 and told.information[0] <= told.linear[0]
    # Weak steps tell nearly as much: the bound is sharp.
    told = sgld_generalization(0.1, 1.0, clip=1.0, dimension=1, examples=1, steps=1)
    assert told.information[0] == pytest.approx(0.5 * np.log(1.01), rel=1e-12)


def test_a_step_of_sghmc_tells_what_one_of_sgld_does():
    """(V, W) for a Gaussian gradient of variance L²: both get −ηF, W has the velocity's noise and its own."""
    eta, sigma, clip = 0.3, 0.4, 2.0
    noise = sigma**2 * np.array([[1.0, 1.0], [1.0, 2.0]])
    exact = 0.5 * (np.linalg.slogdet(noise + (eta * clip) ** 2)[1] - np.linalg.slogdet(noise)[1])
    told = sgld_generalization(eta, sigma, clip=clip, dimension=1, examples=1, steps=1)
    assert told.information[0] == pytest.approx(exact, rel=1e-12)
    state = run(sghmc(eta, clip, noise=sigma, seed=0), batches_of(np.float32, steps=1))[1]
    assert float(state.account.linear) == pytest.approx((eta * clip / sigma) ** 2 / 2, rel=1e-6)


def test_the_closed_form_for_learning_rates_c_over_t():
    c, steps, n, clip = 0.7, 500, 80, 1.3
    rates = c / np.arange(1, steps + 1)
    found = sgld_generalization(rates, np.sqrt(rates), clip=clip, dimension=10, examples=n)
    np.testing.assert_allclose(found.linear_bound, 0.5 * clip * np.sqrt(np.cumsum(rates) / n), rtol=1e-12)
    limit = 0.5 * clip / np.sqrt(n) * np.sqrt(c * np.log(np.arange(1, steps + 1)) + c)
    assert (found.bound <= found.linear_bound).all() and (found.linear_bound <= limit * (1 + 1e-12)).all()
    assert found.vacuous_from is None and not found.vacuous.any()


def test_vacuous_bounds_are_flagged():
    found = sgld_generalization(1.0, 0.1, clip=1.0, dimension=1000, examples=100, steps=20)
    linear = 50.0 * np.arange(1, 21)
    np.testing.assert_allclose(found.linear, linear)
    information = 500 * np.log1p(0.1) * np.arange(1, 21)
    np.testing.assert_allclose(found.bound, np.sqrt(0.5 / 100 * information), rtol=1e-12)
    first = int(np.argmax(np.sqrt(0.5 / 100 * information) >= 1)) + 1
    assert found.vacuous_from == first == 5
    np.testing.assert_array_equal(found.vacuous, np.arange(1, 21) >= first)
    # A loss of a range of 4, R = 2, has the same steps without a statement.
    wide = sgld_generalization(1.0, 0.1, clip=1.0, dimension=1000, examples=100, steps=20, sub_gaussian=2.0)
    assert wide.vacuous_from == first
    update = sgld(1.0, 1.0, noise=0.1, seed=0)
    _, state = run(update, batches_of(np.float32, steps=2))
    assert bool(running_bound(state, examples=1).vacuous) and not bool(running_bound(state, examples=10**4).vacuous)


def test_the_bound_with_probability():
    found = sgld_generalization([0.3, 0.2], 0.5, clip=1.0, dimension=4, examples=500)
    information = 2 * np.log(1 + np.cumsum([0.0]) + 0.36 / 4) + np.array([0, 2 * np.log(1 + 0.16 / 4)])
    np.testing.assert_allclose(found.information, information, rtol=1e-12)
    gaps = found.with_probability(0.1)
    np.testing.assert_allclose(gaps, np.sqrt(8 * 0.25 / 500 * (information / 0.1 + np.log(20))), rtol=1e-12)
    # As many examples as that gap needs are those that there are, to rounding up.
    assert abs(examples_needed(information[-1], gap=gaps[-1], failure_probability=0.1) - 500) <= 1


# ---- in company ------------------------------------------------------------------------------------


def test_it_composes_with_optax():
    x = as_tree(np.zeros(5, np.float32))
    g = as_tree(batches_of(np.float32)[0])
    plain = sgld(0.1, 1.0, seed=0)
    steps, _ = plain.update(x, plain.init(x), x, per_example_gradients=g)

    chained = optax.chain(sgld(0.1, 1.0, seed=0), optax.scale(2.0))
    twice, state = chained.update(x, chained.init(x), x, per_example_gradients=g)
    np.testing.assert_allclose(as_row(twice), 2 * as_row(steps), rtol=1e-6)
    assert float(running_bound(state, examples=10).bound) == pytest.approx(np.sqrt(0.05 * 5 / 2 * np.log1p(0.02)))

    injected = optax.inject_hyperparams(sgld)(learning_rate=0.1, clip=1.0, seed=0)
    same, _ = injected.update(x, injected.init(x), x, per_example_gradients=g)
    np.testing.assert_allclose(as_row(same), as_row(steps), rtol=1e-6)

    masked = optax.masked(plain, {"a": True, "b": False}, mask_compatible_extra_args=True)
    part, state = masked.update(x, masked.init(x), x, per_example_gradients=g)
    np.testing.assert_array_equal(part["b"], 0.0)  # untouched
    assert state.inner_state.account.dimension == 3
    nothing = optax.masked(plain, {"a": False, "b": False}, mask_compatible_extra_args=True)
    _, state = nothing.update(x, nothing.init(x), x, per_example_gradients=g)
    assert float(running_bound(state, examples=10).bound) == 0.0

    split = optax.multi_transform(
        {"cold": sgld(0.1, 1.0, noise=0.2, seed=0), "hot": sghmc(0.1, 1.0, noise=0.4, seed=1)},
        {"a": "cold", "b": "hot"},
        mask_compatible_extra_args=True,
    )
    _, state = split.update(x, split.init(x), x, per_example_gradients=g)
    both = 3 / 2 * np.log1p(0.25 / 3) + 2 / 2 * np.log1p(0.0625 / 2)
    assert float(running_bound(state, examples=1).bound) == pytest.approx(np.sqrt(both / 2), rel=1e-6)

    several = optax.MultiSteps(plain, 2)
    move = jax.jit(lambda s: several.update(x, s, x, per_example_gradients=g))
    first, state = move(several.init(x))
    second, state = move(state)
    np.testing.assert_array_equal(as_row(first), 0.0)
    np.testing.assert_allclose(as_row(second), as_row(steps), rtol=1e-6)
    assert int(state.inner_opt_state.count) == 1


def test_chains_of_a_sampler_by_vmap():
    like, g = jnp.zeros(5), jnp.asarray(batches_of(np.float32)[0])

    def one(key):
        update = sgld(0.1, 1.0, seed=key)
        return update.update(like, update.init(like), per_example_gradients=g)[0]

    keys = jax.random.split(jax.random.key(0), 3)
    chains = jax.jit(jax.vmap(one))(keys)
    for key, chain in zip(keys, chains, strict=True):
        np.testing.assert_allclose(chain, one(key), rtol=1e-5)


# ---- bad input -------------------------------------------------------------------------------------

BAD = [
    ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
    ({"learning_rate": -1.0}, "learning_rate: got -1.0"),
    ({"clip": 0.0}, "clip: got 0.0"),
    ({"clip": float("nan")}, "clip: got nan"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"noise": 0.0}, "noise: got 0.0"),
    ({"noise": -0.1}, "noise: got -0.1"),
    ({"noise": 0.1, "temperature": 0.5}, "noise: got 0.1; expected either"),
    ({"seed": None}, "key: got None"),
    ({"seed": "a"}, "key: got str"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_numbers(options, words):
    for factory in (sgld, sghmc):
        with pytest.raises(fl.InputError, match=words):
            factory(**{"learning_rate": 0.1, "clip": 1.0, "seed": 0, **options})


@pytest.mark.parametrize("friction", [0.0, -0.1, 1.5])
def test_bad_friction(friction):
    with pytest.raises(fl.InputError, match=f"friction: got {friction}"):
        sghmc(0.1, 1.0, friction=friction, seed=0)
    assert sghmc(0.1, 1.0, friction=1.0, seed=0)


@pytest.mark.parametrize("factory", [sgld, sghmc])
def test_gradients_of_examples_that_are_missing_or_of_another_structure(factory):
    x = jnp.zeros(3)
    update = factory(0.1, 1.0, seed=0)
    with pytest.raises(fl.InputError, match="per_example_gradients: got None"):
        update.update(x, update.init(x), x)
    with pytest.raises(fl.InputError, match="per_example_gradients"):
        jax.jit(lambda g: update.update(x, update.init(x), x, per_example_gradients=g))(x)
    with pytest.raises(fl.InputError, match="per_example_gradients"):
        update.update(x, update.init(x), x, per_example_gradients={"a": x[None]})


@pytest.mark.parametrize("params", [jnp.ones(2, jnp.int32), jnp.ones(2, jnp.complex64)])
def test_parameters_that_are_not_real(params):
    with pytest.raises(fl.InputError, match="params: got"):
        sgld(0.1, 1.0, seed=0).init(params)


PLAN = {"learning_rate": 0.1, "noise": 0.1, "clip": 1.0, "dimension": 3, "examples": 10, "steps": 4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": 0.0}, "noise: got 0.0"),
        ({"noise": [0.1, 0.0]}, "noise: got"),
        ({"noise": []}, "noise: got"),
        ({"learning_rate": [0.1, -0.1]}, "learning_rate: got"),
        ({"learning_rate": [0.1, np.nan]}, "learning_rate: got"),
        ({"learning_rate": [[0.1]]}, "learning_rate: got"),
        ({"learning_rate": lambda t: 0.1}, "learning_rate: got a schedule"),
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"dimension": 0}, "dimension: got 0"),
        ({"examples": 0}, "examples: got 0"),
        ({"examples": 1.5}, "examples: got 1.5"),
        ({"sub_gaussian": 0.0}, "sub_gaussian: got 0.0"),
        ({"steps": None}, "learning_rate and noise: got"),
        ({"steps": 0}, "steps: got 0"),
        ({"noise": [0.1, 0.1]}, "learning_rate and noise: got"),
        ({"noise": [0.1, 0.1], "learning_rate": [0.1] * 3, "steps": None}, "learning_rate and noise: got"),
    ],
)
def test_bad_plans(options, words):
    with pytest.raises(fl.InputError, match=words):
        sgld_generalization(**{**PLAN, **options})


def test_other_bad_input():
    with pytest.raises(fl.InputError, match="state: got"):
        running_bound(optax.adam(0.1).init(jnp.zeros(2)), examples=10)
    state = sgld(0.1, 1.0, seed=0).init(jnp.zeros(2))
    with pytest.raises(fl.InputError, match="examples: got 0"):
        running_bound(state, examples=0)
    with pytest.raises(fl.InputError, match="sub_gaussian: got -1"):
        running_bound(state, examples=1, sub_gaussian=-1.0)
    for options, words in (
        ({"gap": 0.0}, "gap: got 0.0"),
        ({"gap": 0.1, "failure_probability": 0.0}, "failure_probability: got 0.0"),
        ({"gap": 0.1, "failure_probability": 1.0}, "failure_probability: got 1.0"),
        ({"gap": 0.1, "sub_gaussian": 0.0}, "sub_gaussian: got 0.0"),
    ):
        with pytest.raises(fl.InputError, match=words):
            examples_needed(1.0, **options)
    for information in (-1.0, np.nan):
        with pytest.raises(fl.InputError, match="information: got"):
            examples_needed(information, gap=0.1)
