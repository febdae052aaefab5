"""diffGrad against its formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.descent.diffgrad import diffgrad, scale_by_diffgrad


def by_hand(gradients, lr=0.1, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, x=None):
    """Algorithm 1 in float64; the points after each step."""
    x = np.zeros_like(gradients[0], np.float64) if x is None else np.asarray(x, np.float64)
    m, v, before, points = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), []
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        g = g + decay * x
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        xi = 1 / (1 + np.exp(-np.abs(before - g)))
        x = x - lr * xi * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        before = g
        points.append(x)
    return np.array(points)


def run(transformation, gradients, x):
    state, points = transformation.init(x), []
    for g in gradients:
        updates, state = transformation.update(g, state, x)
        x = optax.apply_updates(x, updates)
        points.append(x)
    return np.asarray(jnp.stack(points), np.float64), state


@pytest.mark.parametrize(
    "options", [{}, {"b1": 0.5, "b2": 0.9, "eps": 1e-2}, {"weight_decay": 0.3}, {"b1": 0.0, "b2": 0.0, "eps": 1.0}]
)
def test_the_points_are_those_of_the_algorithm(options, dtype):
    draw = np.random.default_rng(0)
    gradients, x = draw.normal(size=(12, 5)).astype(dtype), draw.normal(size=5).astype(dtype)
    points, _ = run(diffgrad(0.1, **options), gradients, jnp.asarray(x))
    names = {"weight_decay": "decay"}
    expected = by_hand(gradients, x=x, **{names.get(k, k): v for k, v in options.items()})
    np.testing.assert_allclose(points, expected, rtol=40 * np.finfo(dtype).eps, atol=40 * np.finfo(dtype).eps)


def test_a_constant_gradient_gives_half_of_adam_from_the_second_step_on(x64):
    gradients = [jnp.array([3.0, -0.2])] * 4
    ours, _ = run(diffgrad(0.1), gradients, jnp.zeros(2))
    adam, _ = run(optax.adam(0.1), gradients, jnp.zeros(2))
    steps, adams = np.diff(ours, axis=0), np.diff(adam, axis=0)
    np.testing.assert_allclose(steps, adams / 2, rtol=1e-12)
    # At the first step the previous gradient is zero.
    np.testing.assert_allclose(ours[0], adam[0] / (1 + np.exp(-np.abs([3.0, -0.2]))), rtol=1e-12)


def test_the_previous_gradient_is_kept_and_not_a_view_of_the_present_one(x64):
    update = scale_by_diffgrad()
    first, second = jnp.array([1.0, 2.0]), jnp.array([-1.0, 5.0])
    state = update.init(first)
    for g in (first, second):
        _, state = update.update(g, state)
    np.testing.assert_array_equal(state.previous, second)
    assert int(state.count) == 2


def test_friction_can_be_chosen(x64):
    gradients = np.random.default_rng(1).normal(size=(6, 3))
    ours, _ = run(diffgrad(0.1, friction=lambda previous, g: jnp.ones_like(g)), gradients, jnp.zeros(3))
    adam, _ = run(optax.adam(0.1), gradients, jnp.zeros(3))
    np.testing.assert_allclose(ours, adam, rtol=1e-12)


def test_it_composes_with_optax():
    x, g = {"a": jnp.ones(2), "b": jnp.ones(())}, {"a": jnp.ones(2), "b": jnp.ones(())}
    masked = optax.masked(diffgrad(0.1), {"a": True, "b": False})
    updates, _ = masked.update(g, masked.init(x), x)
    np.testing.assert_array_equal(updates["b"], 1.0)  # untouched
    chained = optax.chain(optax.clip(0.5), diffgrad(optax.cosine_decay_schedule(0.1, 10)))
    assert jax.tree.structure(chained.update(g, chained.init(x), x)[0]) == jax.tree.structure(x)
    injected = optax.inject_hyperparams(diffgrad)(learning_rate=0.1)
    ours, direct = (t.update(g, t.init(x), x)[0]["a"] for t in (injected, diffgrad(0.1)))
    np.testing.assert_allclose(ours, direct, rtol=6e-8 / 1e-3)  # injected, 1 − b2 is rounded to float32


def test_without_decay_no_parameters_are_needed():
    update = diffgrad(0.1)
    update.update(jnp.ones(2), update.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": -1.0}, "learning_rate: got -1.0"),
        ({"b1": 1.0}, "b1: got 1.0"),
        ({"b2": -0.1}, "b2: got -0.1"),
        ({"eps": -1e-8}, "eps: got -1e-08"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"b1": float("nan")}, "b1: got nan"),
    ],
)
def test_bad_numbers(options, words):
    with pytest.raises(fl.InputError, match=words):
        diffgrad(**options)
    with pytest.raises(fl.InputError, match=words):
        fl.optimizer(diffgrad, **options)


@pytest.mark.parametrize("params", [jnp.ones(2, jnp.int32), jnp.ones(2, jnp.complex64)])
def test_parameters_that_are_not_real(params):
    with pytest.raises(fl.InputError, match="params: got"):
        diffgrad(0.1).init(params)
