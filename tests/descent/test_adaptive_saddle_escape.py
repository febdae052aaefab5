"""Adaptive saddle escape against its formulas in NumPy, dense algebra and Optax's RMSProp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.descent.adaptive_saddle_escape import (
    adaptive_saddle_escape,
    balanced_beta,
    balanced_burn_in,
    big_small_steps,
    inverse_square_root,
    noise_isotropy,
    scale_by_full_matrix_rms,
    scale_by_preconditioner,
)


def root(G, eps):
    """(G + ε I)^(−½), negative eigenvalues clipped."""
    values, vectors = np.linalg.eigh(G)
    return vectors @ np.diag(1 / np.sqrt(np.maximum(values, 0) + eps)) @ vectors.T


def by_hand(gradients, lr, beta, eps, burn_in=0, big=None, t_thresh=1, correct=True, diagonal=False):
    """The points of full-matrix RMSProp from 0, in float64; the card's algorithms 2 to 4."""
    d = gradients.shape[1]
    x, G, points = np.zeros(d), np.zeros((d, d)), []
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        G = beta * G + (1 - beta) * np.outer(g, g)
        seen = G / (1 - beta**t) if correct else G
        if t > burn_in:
            step = big if big is not None and (t - burn_in - 1) % t_thresh == 0 else lr
            x = x - step * root(np.diag(np.diag(seen)) if diagonal else seen, eps) @ g
        points.append(x)
    return np.array(points)


@functools.partial(jax.jit, static_argnums=0)
def run(transformation, gradients, x):
    """The points after each update, in one compiled loop."""

    def step(carry, g):
        x, state = carry
        updates, state = transformation.update(g, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    (_, state), points = jax.lax.scan(step, (x, transformation.init(x)), gradients)
    return points, state


def once(transformation, g, x):
    """The first update, compiled."""
    return jax.jit(lambda g, x: transformation.update(g, transformation.init(x), x))(g, x)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@functools.partial(jax.jit, static_argnames=("blocks", "bias_correction"))
def compiled(gradients, numbers, **options):
    update = adaptive_saddle_escape(**numbers, **options)
    return run(update, gradients, jnp.zeros(gradients.shape[1], gradients.dtype))


@pytest.mark.parametrize(("blocks", "corrected"), [("full", True), ("full", False), ("diag", True)])
def test_the_points_are_those_of_the_algorithm(blocks, corrected, dtype):
    gradients = normal(14, 4).astype(dtype)
    for numbers in (
        {"beta": 0.9, "eps": 1e-2, "burn_in": 0, "big_learning_rate": 0.2, "t_thresh": 100},
        {"beta": 0.5, "eps": 0.3, "burn_in": 4, "big_learning_rate": 0.7, "t_thresh": 3},
        {"beta": 0.0, "eps": 1.0, "burn_in": 1, "big_learning_rate": 0.3, "t_thresh": 1},
    ):
        asked = {"learning_rate": 0.1, **numbers}
        points, state = compiled(gradients, asked, blocks=blocks, bias_correction=corrected)
        big = numbers.pop("big_learning_rate")
        expected = by_hand(gradients, 0.1, big=big, correct=corrected, diagonal=blocks == "diag", **numbers)
        assert points.dtype == dtype
        np.testing.assert_allclose(points, expected, atol=300 * np.finfo(dtype).eps)
        assert state[0].second_moment.shape == ((4,) if blocks == "diag" else (4, 4))


def test_full_sees_the_parameters_as_one_vector_and_leaf_each_on_its_own(x64):
    gradients = normal(9, 5)
    split = {"a": gradients[:, :2], "b": gradients[:, 2:].reshape(9, 1, 3)}
    x = {"a": jnp.zeros(2), "b": jnp.zeros((1, 3))}
    options = {"beta": 0.8, "eps": 1e-2, "burn_in": 2}
    points, state = run(adaptive_saddle_escape(0.1, blocks="full", **options), split, x)
    expected = by_hand(gradients, 0.1, **options)
    np.testing.assert_allclose(points["a"], expected[:, :2], atol=1e-12)
    np.testing.assert_allclose(points["b"][:, 0], expected[:, 2:], atol=1e-12)
    assert state[0].second_moment.shape == (5, 5)

    points, state = run(adaptive_saddle_escape(0.1, blocks="leaf", **options), split, x)
    np.testing.assert_allclose(points["a"], by_hand(gradients[:, :2], 0.1, **options), atol=1e-12)
    np.testing.assert_allclose(points["b"][:, 0], by_hand(gradients[:, 2:], 0.1, **options), atol=1e-12)
    assert {k: v.shape for k, v in state[0].second_moment.items()} == {"a": (2, 2), "b": (3, 3)}


def test_the_diagonal_is_rmsprop_with_eps_in_the_root(x64):
    gradients = normal(8, 3)
    ours, _ = run(scale_by_full_matrix_rms(0.9, 1e-3, blocks="diag"), gradients, jnp.zeros(3))
    theirs, _ = run(optax.scale_by_rms(0.9, 1e-3, eps_in_sqrt=True, bias_correction=True), gradients, jnp.zeros(3))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_the_first_step_has_length_one_and_without_correction_is_too_long(x64):
    g, x = jnp.array([3.0, -4.0]), jnp.zeros(2)

    def first(**options):
        update = scale_by_full_matrix_rms(0.99, 1e-12, **options)
        return once(update, g, x)[0]

    np.testing.assert_allclose(first(), [0.6, -0.8], rtol=1e-9)
    np.testing.assert_allclose(first(blocks="diag"), [1.0, -1.0], rtol=1e-9)
    np.testing.assert_allclose(first(bias_correction=False), [6.0, -8.0], rtol=1e-7)


def test_a_turned_problem_gives_turned_steps_of_the_full_matrix_only(x64):
    gradients, c = normal(10, 2) * [1.0, 0.1], np.sqrt(0.5)
    turn = np.array([[c, -c], [c, c]])
    gaps = {}
    for blocks in ("full", "diag"):
        update = adaptive_saddle_escape(0.1, beta=0.9, burn_in=0, blocks=blocks)
        straight, _ = run(update, gradients, jnp.zeros(2))
        turned, _ = run(update, gradients @ turn.T, jnp.zeros(2))
        gaps[blocks] = np.abs(turned - straight @ turn.T).max()
    assert gaps["full"] < 1e-9
    assert gaps["diag"] > 0.1


def test_burn_in_only_looks(x64):
    gradients, x = normal(6, 3), jnp.zeros(3)

    @jax.jit
    def at(burn_in):
        return run(scale_by_full_matrix_rms(0.9, burn_in=burn_in), gradients, x)

    (waiting, seen), (going, same) = at(5), at(0)
    np.testing.assert_array_equal(waiting[:5], 0.0)
    np.testing.assert_allclose(waiting[5], going[5] - going[4], rtol=1e-9)
    np.testing.assert_array_equal(seen.second_moment, same.second_moment)
    assert int(seen.count) == 6


@pytest.mark.parametrize("blocks", ["full", "leaf", "diag"])
@pytest.mark.parametrize("burn_in", [0, 9])
def test_nan_remains_also_in_the_burn_in(blocks, burn_in):
    update = scale_by_full_matrix_rms(0.9, burn_in=burn_in, blocks=blocks)
    spoiled, state = once(update, jnp.array([1.0, jnp.nan]), jnp.zeros(2))
    assert np.isnan(spoiled[1])
    after, _ = jax.jit(update.update)(jnp.ones(2), state._replace(count=jnp.int32(20)))
    assert np.isnan(after[1])


def test_rounding_in_a_singular_matrix_is_clipped(x32):
    # In float32 the eigenvalues of a matrix of rank one and size 1e9 are off by about 10, some below zero.
    gradients = np.broadcast_to(1e4 * normal(6, seed=3), (8, 6)).astype(np.float32)
    points, state = run(scale_by_full_matrix_rms(0.9), gradients, jnp.zeros(6))
    assert jnp.linalg.eigvalsh(state.second_moment)[0] < -1e-2
    assert np.isfinite(points).all()


# ---- a preconditioner that is known -----------------------------------------------------------------------


def test_a_known_preconditioner_in_its_three_forms(x64):
    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}
    g = {"a": np.array([0.3, -0.7]), "b": np.array([[1.1]])}
    flat, matrix = np.array([0.3, -0.7, 1.1]), normal(3, 3)

    def scaled(preconditioner):
        update = scale_by_preconditioner(preconditioner)
        out, _ = once(update, g, x)
        assert out["b"].shape == (1, 1)
        return np.concatenate([out["a"], out["b"][0]])

    np.testing.assert_allclose(scaled(lambda x: matrix * x["b"][0, 0]), 3 * matrix @ flat, rtol=1e-12)
    np.testing.assert_allclose(scaled(lambda x: x), np.array([1, 2, 3]) * flat, rtol=1e-12)
    blocks = scaled(lambda x: {"a": matrix[:2, :2], "b": 2 * x["b"]})
    np.testing.assert_allclose(blocks, [*matrix[:2, :2] @ flat[:2], 6 * 1.1], rtol=1e-12)


def test_preconditioned_sgd_is_newton_where_the_matrix_is_the_inverse_hessian(x64):
    hessian = np.diag([5.0, 0.2]) + 0.1
    update = optax.chain(scale_by_preconditioner(lambda x: jnp.linalg.inv(hessian)), optax.scale_by_learning_rate(1.0))
    x = jnp.array([3.0, -1.0])
    step, _ = update.update(hessian @ x, update.init(x), x)
    np.testing.assert_allclose(x + step, 0.0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_the_inverse_root_is_one(eps, x64):
    factor = normal(4, 4)
    G = factor @ factor.T
    A = np.asarray(inverse_square_root(jnp.asarray(G), eps))
    np.testing.assert_allclose(A @ (G + eps * np.eye(4)) @ A, np.eye(4), atol=1e-10)
    np.testing.assert_allclose(A, A.T, atol=1e-12)
    clipped = inverse_square_root(jnp.diag(jnp.array([-0.5, 4.0])), 0.25)
    np.testing.assert_allclose(clipped, np.diag([2, 1 / np.sqrt(4.25)]), atol=1e-12)


def test_bfloat16_is_kept():
    x = jnp.ones((2, 2), jnp.bfloat16)
    for blocks in ("full", "leaf", "diag"):
        update = scale_by_full_matrix_rms(0.999, blocks=blocks)
        out, state = jax.eval_shape(lambda x, u=update: u.update(x, u.init(x)), x)
        assert out.dtype == jnp.bfloat16
        assert state.second_moment.dtype == jnp.float32
    known = scale_by_preconditioner(lambda x: jnp.full((2, 2), 2.0))
    out = once(known, x, x)[0]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(float), 2.0)


# ---- the noise --------------------------------------------------------------------------------------------


def test_the_idealized_preconditioner_makes_the_noise_isotropic(x64):
    draws = normal(40, 3) @ np.array([[1.0, 0.5, 0.0], [0.0, 0.1, 0.0], [0.0, 0.2, 0.01]])
    second = draws.T @ draws / 40
    gradients = {"a": jnp.asarray(draws[:, :1]), "b": jnp.asarray(draws[:, 1:])}
    v = {"a": jnp.array([0.0]), "b": jnp.array([0.0, -2.0])}
    plain = noise_isotropy(gradients, direction=v)
    np.testing.assert_allclose(plain.nu, np.linalg.eigvalsh(second)[0], rtol=1e-8)
    np.testing.assert_allclose(plain.gamma, np.trace(second), rtol=1e-12)
    np.testing.assert_allclose(plain.along, second[2, 2], rtol=1e-12)

    whitened = noise_isotropy(gradients, inverse_square_root(jnp.asarray(second)), v)
    np.testing.assert_allclose([whitened.nu, whitened.gamma, whitened.along], [1, 3, 1], rtol=1e-8)
    np.testing.assert_allclose(whitened.share, 1 / 3, rtol=1e-8)
    assert plain.share < 0.01

    diagonal = jax.tree.map(lambda g: 1 / jnp.sqrt(jnp.mean(g**2, axis=0)), gradients)
    scaled = noise_isotropy(gradients, diagonal)
    D = np.diag(1 / np.sqrt(np.diag(second)))
    np.testing.assert_allclose(scaled.nu, np.linalg.eigvalsh(D @ second @ D)[0], rtol=1e-8)
    np.testing.assert_allclose(scaled.gamma, 3, rtol=1e-12)
    assert scaled.along is None
    assert scaled.share is None


def test_the_noise_of_few_samples_has_no_smallest_eigenvalue():
    assert noise_isotropy(jnp.asarray(normal(3, 8), jnp.float32)).nu < 1e-6
    assert np.isnan(noise_isotropy(jnp.array([[1.0, jnp.nan]])).nu)


def test_the_noise_of_a_finite_sum(x64):
    rows = jnp.asarray(normal(20, 2))
    problem = fl.FiniteSum(lambda x, batch: batch @ x, rows)
    gradients = problem.per_example_gradients(jnp.zeros(2), problem.data)
    np.testing.assert_allclose(noise_isotropy(gradients).gamma, jnp.mean(jnp.sum(rows**2, 1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((jnp.ones((3, 2), jnp.int32),), "gradients: got int32"),
        (({},), "gradients: got"),
        ((jnp.ones(()),), "leading axis"),
        (({"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))},), "leading axis"),
        ((jnp.ones((0, 2)),), "at least one sample"),
        ((jnp.ones((3, 2)), jnp.ones((2, 3))), "preconditioner: got float"),
        ((jnp.ones((3, 2)), None, jnp.ones(3)), "direction: got"),
        ((jnp.ones((3, 2)), None, jnp.zeros(2)), "direction: got norm 0"),
        ((np.broadcast_to(np.float32(0), (2, 30_000)),), r"gradients: got 30,000 .* 3\.35 GiB"),
    ],
)
def test_noise_that_cannot_be_measured(arguments, words):
    with pytest.raises(fl.InputError, match=words):
        noise_isotropy(*arguments)


# ---- steps, defaults, composition -------------------------------------------------------------------------


def test_big_steps_come_at_multiples_and_small_ones_between():
    steps = big_small_steps(0.1, lambda count: 1.0 + count, 3)
    np.testing.assert_allclose([steps(t) for t in range(7)], [1, 0.1, 0.1, 4, 0.1, 0.1, 7], rtol=1e-6)


def test_schedules_begin_after_the_burn_in(x64):
    g, x = jnp.ones((6, 1)), jnp.zeros(1)
    points, _ = run(adaptive_saddle_escape(lambda t: 1.0 + t, beta=0.5, eps=1e-12, burn_in=2), g, x)
    np.testing.assert_allclose(points[:, 0], [0, 0, -1, -3, -6, -10], rtol=1e-9)


def test_the_defaults_balance_the_estimate(x64):
    assert balanced_beta(1e-3) == pytest.approx(0.99)
    assert balanced_beta(1.0) == 0.0
    assert balanced_burn_in(0.99) == 461  # ln 100 / 0.01 = 460.5
    assert balanced_burn_in(1 - 1e-9) == 10_000
    gradients = normal(30, 2)
    eta = 0.125  # β = 3/4 and W = ⌈18.4⌉
    default, _ = run(adaptive_saddle_escape(eta), gradients, jnp.zeros(2))
    np.testing.assert_allclose(default, by_hand(gradients, eta, 0.75, 1e-8, burn_in=19), rtol=1e-9)
    traced = jax.jit(lambda eta: balanced_burn_in(balanced_beta(eta)))(eta)
    assert int(traced) == 19


def test_it_composes_with_optax(x64):
    x, g = {"a": jnp.ones(2), "b": jnp.ones(())}, {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(())}
    update = adaptive_saddle_escape(0.1, 0.2, 5, burn_in=0)
    for masked in (
        optax.masked(update, {"a": True, "b": False}),
        optax.multi_transform({"ours": update, "same": optax.identity()}, {"a": "ours", "b": "same"}),
    ):
        out, _ = once(masked, g, x)
        np.testing.assert_allclose(out["a"], [-0.12, -0.16], rtol=1e-6)
        np.testing.assert_array_equal(out["b"], 1.0)
    injected = optax.inject_hyperparams(adaptive_saddle_escape)(0.1, 0.2, 5, burn_in=0)
    np.testing.assert_allclose(once(injected, g, x)[0]["a"] * np.sqrt(26), [-0.6, -0.8], rtol=1e-6)

    twice = optax.MultiSteps(update, 2)
    state, step = twice.init(x), jax.jit(twice.update)
    first, state = step(g, state, x)
    second, _ = step(g, state, x)
    np.testing.assert_array_equal(first["a"], 0.0)
    np.testing.assert_allclose(second["a"] * np.sqrt(26), [-0.6, -0.8], rtol=1e-6)
    nothing, _ = scale_by_full_matrix_rms().update({}, scale_by_full_matrix_rms().init({}))
    assert nothing == {}


def test_it_leaves_a_saddle_as_a_solver(x64):
    rows = jnp.asarray(normal(200, 2) * [0.3, 0.03])
    problem = fl.FiniteSum(lambda x, z: x[0] ** 2 - 0.1 * x[1] ** 2 + jnp.sum(x**10) + z @ x, rows, batch_size=1)
    solver = fl.optimizer(adaptive_saddle_escape, learning_rate=0.01)
    end = fl.minimize(problem, jnp.zeros(2), solver, steps=800, stop=None, key=0)
    assert abs(float(end.x[1])) > 0.4


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"learning_rate": -1.0}, "learning_rate: got -1.0"),
        ({"learning_rate": 2.0}, r"beta: got None.*learning rate 2\.0"),
        ({"big_learning_rate": 0.0}, "big_learning_rate: got 0.0"),
        ({"big_learning_rate": 0.5, "t_thresh": 0}, "t_thresh: got 0"),
        ({"big_learning_rate": 0.5, "t_thresh": 2.5}, "t_thresh: got 2.5"),
        ({"beta": 1.0}, "beta: got 1.0"),
        ({"beta": -0.1}, "beta: got -0.1"),
        ({"beta": float("nan")}, "beta: got nan"),
        ({"eps": 0.0}, "eps: got 0.0"),
        ({"burn_in": -1}, "burn_in: got -1"),
        ({"blocks": "diagonal"}, r"blocks: got 'diagonal'.*did you mean 'diag'"),
    ],
)
def test_bad_numbers(options, words):
    with pytest.raises(fl.InputError, match=words):
        adaptive_saddle_escape(**options)
    with pytest.raises(fl.InputError, match=words):
        fl.optimizer(adaptive_saddle_escape, **options)


def test_a_schedule_needs_beta():
    with pytest.raises(fl.InputError, match="beta: got None"):
        adaptive_saddle_escape(optax.constant_schedule(0.1))


@pytest.mark.parametrize(("eta", "r", "t_thresh", "words"), [(0, 1, 1, "eta"), (1, -1, 1, "r"), (1, 2, 0, "t_thresh")])
def test_steps_that_are_none(eta, r, t_thresh, words):
    with pytest.raises(fl.InputError, match=f"{words}: got"):
        big_small_steps(eta, r, t_thresh)


def test_big_steps_that_are_small_warn():
    with pytest.warns(UserWarning, match=r"big_learning_rate: got 0\.1, not above learning_rate = 0\.1"):
        adaptive_saddle_escape(0.1, 0.1)
    with pytest.warns(UserWarning, match=r"r: got 0\.01, not above eta = 0\.1"):
        big_small_steps(0.1, 0.01, 2)


@pytest.mark.parametrize("params", [jnp.ones(2, jnp.int32), jnp.ones(2, jnp.complex64)])
def test_parameters_that_are_not_real(params):
    for update in (scale_by_full_matrix_rms(), scale_by_preconditioner(lambda x: x)):
        with pytest.raises(fl.InputError, match="params: got"):
            update.init(params)


def test_a_matrix_that_does_not_fit_into_memory_is_refused(x32):
    x = {"a": jnp.zeros(30_000), "b": jnp.zeros(10)}
    with pytest.raises(fl.InputError, match=r'30,010 .*blocks="full", 3\.35 GiB .*at most 2 GiB.*"diag"'):
        scale_by_full_matrix_rms().init(x)
    with pytest.raises(fl.InputError, match=r'30,000 .*blocks="leaf", 3\.35 GiB'):
        scale_by_full_matrix_rms(blocks="leaf").init(x)
    assert scale_by_full_matrix_rms(blocks="diag").init(x).second_moment["a"].shape == (30_000,)
    pieces = {str(i): jnp.zeros(500) for i in range(60)}
    held = jax.eval_shape(scale_by_full_matrix_rms(blocks="leaf").init, pieces)
    assert held.second_moment["0"].shape == (500, 500)


@pytest.mark.parametrize(
    ("preconditioner", "words"),
    [
        (lambda x: jnp.ones((3, 2)), r"preconditioner: got float32\[3,2\]; expected a matrix \[3,3\]"),
        (lambda x: jnp.ones(3), r"got float32\[3\]; expected a matrix"),
        (lambda x: {"a": jnp.ones((2, 3)), "b": x["b"]}, r"got float32\[2,3\]; expected for a leaf float32\[2\]"),
        (lambda x: {"a": x["a"]}, r"got float32\[2\]; expected a matrix \[3,3\]"),
    ],
)
def test_a_preconditioner_of_another_shape(preconditioner, words, x32):
    with pytest.raises(fl.InputError, match=words):
        scale_by_preconditioner(preconditioner).init({"a": jnp.ones(2), "b": jnp.ones(1)})


def test_a_preconditioner_is_a_function_of_parameters():
    with pytest.raises(fl.InputError, match="preconditioner: got list"):
        scale_by_preconditioner([[1.0]])  # type: ignore[arg-type]
    update = scale_by_preconditioner(lambda x: x)
    with pytest.raises(fl.InputError, match="params: got None"):
        update.update(jnp.ones(2), update.init(jnp.ones(2)))
