"""The curvature learner: heavy ball in NumPy, and spectra whose quadrature is known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fallline.core.errors import InputError
from fallline.descent.curvature_learner import CurvatureLearnerState, curvature_learner, polyak_pair, refresh
from fallline.parts.curvature import hessian

KEY = jax.random.key(0)


def polyak(largest, bulk, safety):
    top, low = np.sqrt(largest), np.sqrt(bulk)
    return safety * (2 / (top + low)) ** 2, ((top - low) / (top + low)) ** 2


def diagonal(values):
    """A product with a diagonal matrix: from signs, the weight of a value is how often it occurs, over n."""
    return lambda v: v * jnp.asarray(values, v.dtype)


@functools.partial(jax.jit, static_argnames="rule")
def compiled(values, safety, kappa_max, rule):
    state = curvature_learner(0.3, 0.7).init(jnp.zeros(len(values)))
    return refresh(state, diagonal(values), KEY, safety=safety, kappa_max=kappa_max, rule=rule)


def learned(values, safety=0.25, kappa_max=100.0, rule="polyak"):
    return compiled(jnp.asarray(values, float), safety, kappa_max, rule)


def test_the_pair_is_polyaks(dtype):
    found = polyak_pair(*np.array([9.0, 4.0], dtype), safety=1.0)
    np.testing.assert_allclose(found, [4 / 25, 1 / 25], rtol=10 * np.finfo(dtype).eps)
    np.testing.assert_allclose(polyak_pair(9.0, 4.0), [1 / 25, 1 / 25], rtol=1e-6)
    np.testing.assert_allclose(polyak_pair(5.0, 5.0, 1.0), [1 / 5, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "options", "largest", "bulk"),
    [
        ([9, 1, 1, 1, 4, 4], {}, 9, 1),
        ([9, 1, 4, 4, 4, 1], {}, 9, 4),
        ([9, 9, 9, 1, 4, 4], {}, 9, 9),
        # the heaviest of all is negative
        ([9, -30, -30, -30, 4, 4], {}, 9, 4),
        ([9, 0.01, 0.01, 0.01, 4, 4], {}, 9, 0.09),
        ([9, 0.01, 0.01, 0.01, 4, 4], {"kappa_max": 3.0, "safety": 0.5}, 9, 3),
        ([9, 1, 1, 1, 4, 4], {"kappa_max": 1.0, "safety": 1.0}, 9, 9),
    ],
)
def test_a_refresh_takes_the_largest_and_the_heaviest_positive_value(values, options, largest, bulk, x64):
    state = learned(values, **options)
    np.testing.assert_allclose([state.largest, state.bulk], [largest, bulk], rtol=1e-10)
    expected = polyak(largest, bulk, options.get("safety", 0.25))
    np.testing.assert_allclose([state.learning_rate, state.momentum], expected, rtol=1e-9, atol=1e-12)


def test_of_few_steps_the_values_are_those_of_lanczos(x64):
    draw = np.random.default_rng(0)
    a = draw.normal(size=(30, 30))
    a = a @ a.T / 30
    before = curvature_learner().init(jnp.zeros(30))._replace(trace=jnp.arange(30.0))
    state = jax.jit(lambda state: refresh(state, lambda v: jnp.asarray(a) @ v, KEY, steps=4))(before)
    assert np.array_equal(state.trace, np.arange(30.0))
    start = np.asarray(jax.random.rademacher(jax.random.split(jax.random.split(KEY, 1)[0], 1)[0], (30,), float))
    krylov = [start]
    for _ in range(3):
        krylov.append(a @ krylov[-1])
    basis = np.linalg.qr(np.array(krylov).T)[0]
    theta, vectors = np.linalg.eigh(basis.T @ a @ basis)
    weights = (vectors.T @ (basis.T @ start)) ** 2 / 30
    np.testing.assert_allclose(state.largest, theta[-1], rtol=1e-8)
    np.testing.assert_allclose(state.bulk, max(theta[np.argmax(weights)], theta[-1] / 100), rtol=1e-8)
    assert float(state.largest) < np.linalg.eigvalsh(a)[-1]


@pytest.mark.parametrize(
    "values", [[-1, -2, -3, -1, -1, -1], [0] * 6, [np.nan, 1, 2, 2, 2, 2], [np.inf, 1, 2, 2, 2, 2]]
)
@pytest.mark.parametrize("rule", ["polyak", "inverse"])
def test_without_a_positive_largest_value_the_pair_stays(values, rule):
    state = learned(values, rule=rule)
    np.testing.assert_allclose([state.learning_rate, state.momentum], [0.3, 0.7], rtol=1e-6)
    assert not float(state.largest) > 0


def test_the_inverse_rule_keeps_the_momentum(x64):
    state = learned([8, 1, 1, 1, 1, 1], rule="inverse")
    np.testing.assert_allclose([state.learning_rate, state.momentum], [1 / 8, 0.7], rtol=1e-10)


def test_the_points_are_those_of_heavy_ball(dtype):
    draw = np.random.default_rng(1)
    gradients, x = draw.normal(size=(8, 5)).astype(dtype), draw.normal(size=5).astype(dtype)
    update = curvature_learner(0.1, 0.6)
    at, state = jnp.asarray(x), update.init(jnp.asarray(x))
    expected, buffer, pair = x.astype(float), np.zeros(5), (0.1, 0.6)
    for t, g in enumerate(gradients):
        if t == 3:  # as `refresh` does
            pair = (0.05, 0.3)
            state = state._replace(**{n: jnp.asarray(v, dtype) for n, v in zip(state._fields, pair, strict=False)})
        step, state = update.update(jnp.asarray(g), state)
        at = optax.apply_updates(at, step)
        buffer = pair[1] * buffer + g
        expected = expected - pair[0] * buffer
        np.testing.assert_allclose(at, expected, rtol=100 * np.finfo(dtype).eps, atol=100 * np.finfo(dtype).eps)
    assert at.dtype == dtype


def test_on_a_quadratic_the_whole_pair_has_polyaks_rate(x64):
    values = jnp.array([100.0, 30.0, 1.0, 1.0, 1.0])
    update = curvature_learner()
    x = jnp.ones(5)
    state = jax.jit(lambda state: refresh(state, diagonal(values), KEY, safety=1.0))(update.init(x))

    def step(carry, _):
        x, state = carry
        updates, state = update.update(values * x, state)
        x = x + updates
        return (x, state), jnp.linalg.norm(x)

    norms = np.asarray(jax.lax.scan(step, (x, state), length=100)[1])
    rate = (norms[99] / norms[49]) ** (1 / 50)
    assert abs(rate - 9 / 11) < 0.03  # √ρ = (10 − 1)/(10 + 1), times t^(1/t)


def test_a_chain_a_mask_and_a_compiled_refresh(x64):
    params = {"w": jnp.ones(4), "frozen": jnp.ones(2)}
    scale = jnp.array([9.0, 1.0, 1.0, 1.0])

    def loss(x):
        return 0.5 * jnp.sum(scale * x["w"] ** 2)

    update = optax.chain(optax.clip(10.0), optax.masked(curvature_learner(), {"w": True, "frozen": False}))
    state = update.init(params)

    @jax.jit
    def renew(state, params, key):
        part = {"w": params["w"]}
        return refresh(state, hessian(loss, part), key, part)

    renewed = renew(state, params, KEY)
    assert jax.tree.structure(renewed) == jax.tree.structure(state)
    assert jax.tree.map(lambda a: a.dtype, renewed) == jax.tree.map(lambda a: a.dtype, state)
    updates, _ = update.update({"w": jnp.ones(4), "frozen": jnp.ones(2)}, renewed)
    np.testing.assert_allclose(updates["w"], -polyak(9, 1, 0.25)[0], rtol=1e-9)
    np.testing.assert_allclose(updates["frozen"], 1.0)


def test_bfloat16_parameters_have_a_float32_buffer_and_products_in_their_own_dtype():
    params = jnp.ones(4, jnp.bfloat16)
    update = curvature_learner(0.5, 0.5)
    state = update.init(params)
    scale = jnp.array([4, 1, 1, 1], jnp.bfloat16)

    @jax.jit
    def renew(state, params):
        return refresh(state, hessian(lambda x: jnp.sum(scale * x**2) / 2, params), KEY, params)

    state = renew(state, params)
    assert state.trace.dtype == jnp.float32 and state.learning_rate.dtype == jnp.float32
    np.testing.assert_allclose([state.largest, state.bulk], [4, 1], rtol=0.02)
    steps, after = update.update(jnp.ones(4, jnp.bfloat16), state)
    assert steps.dtype == jnp.bfloat16 and after.trace.dtype == jnp.float32


def test_a_sweep_over_rates_is_one_program(x64):
    def end(rate):
        update = curvature_learner(rate, 0.5)
        state = update.init(jnp.ones(3))
        return update.update(jnp.ones(3), state)[0]

    np.testing.assert_allclose(jax.vmap(end)(jnp.array([0.1, 0.2])), [[-0.1] * 3, [-0.2] * 3], rtol=1e-12)


def test_nan_in_a_gradient_shows():
    update = curvature_learner()
    steps, state = update.update(jnp.array([jnp.nan, 1.0]), update.init(jnp.zeros(2)))
    assert np.isnan(steps).tolist() == [True, False] and np.isnan(state.trace).tolist() == [True, False]


STATE = CurvatureLearnerState(*(jnp.zeros(()) for _ in range(4)), trace=jnp.zeros(3))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: curvature_learner(-0.1), "learning_rate"),
        (lambda: curvature_learner(0.1, 1.0), "momentum"),
        (lambda: curvature_learner(0.1, -0.1), "momentum"),
        (lambda: curvature_learner().init(jnp.zeros(2, int)), "params"),
        (lambda: curvature_learner().init(jnp.zeros(2, complex)), "params"),
        (lambda: polyak_pair(0.0, 1.0), "largest"),
        (lambda: polyak_pair(2.0, -1.0), "bulk"),
        (lambda: polyak_pair(2.0, 3.0), "bulk"),
        (lambda: polyak_pair(2.0, 1.0, 0.0), "safety"),
        (lambda: polyak_pair(2.0, 1.0, 1.5), "safety"),
        (lambda: refresh(STATE, diagonal([1, 1, 1]), KEY, steps=0), "steps"),
        (lambda: refresh(STATE, diagonal([1, 1, 1]), KEY, kappa_max=0.5), "kappa_max"),
        (lambda: refresh(STATE, diagonal([1, 1, 1]), KEY, safety=1.01), "safety"),
        (lambda: refresh(STATE, diagonal([1, 1, 1]), KEY, safety=0.0), "safety"),
        (lambda: refresh(STATE, diagonal([1, 1, 1]), KEY, rule="newton"), "rule"),
        (lambda: refresh(optax.EmptyState(), diagonal([1, 1, 1]), KEY), "state"),
        (lambda: refresh((STATE, STATE), diagonal([1, 1, 1]), KEY), "state"),
    ],
)
def test_what_cannot_be_used_is_refused(call, name):
    with pytest.raises(InputError, match=f"^{name}: got"):
        call()
