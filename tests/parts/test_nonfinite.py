"""The guard against gradients that are not finite: what is left of the state, of the parameters, and what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.parts.nonfinite import on_nonfinite

GOOD = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
PARAMS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array(-1.0)}


def spoiled(value):
    return {"w": jnp.array([1.0, value]), "b": jnp.array(0.5)}


def run(guarded, gradients):
    state, params, seen = guarded.init(PARAMS), PARAMS, []
    step = jax.jit(guarded.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return state, seen


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_skip_is_the_run_without_that_step(value):
    adam = optax.adam(0.1)
    state, seen = run(on_nonfinite(adam, "skip"), [GOOD, spoiled(value), GOOD])
    plain = adam.init(PARAMS)
    params = PARAMS
    for _ in range(2):
        updates, plain = adam.update(GOOD, plain, params)
        params = optax.apply_updates(params, updates)
    assert (int(state.steps), int(state.skipped), bool(state.stopped)) == (3, 1, False)
    assert same(seen[1], seen[0])
    for a, b in zip(jax.tree.leaves((seen[2], state.inner)), jax.tree.leaves((params, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_stop_leaves_everything_where_it_was_and_says_when():
    state, seen = run(on_nonfinite(optax.adam(0.1), "stop"), [GOOD, GOOD, spoiled(np.nan), GOOD, GOOD])
    assert (int(state.steps), bool(state.stopped)) == (2, True)
    assert int(state.inner[0].count) == 2
    assert same(seen[4], seen[1]) and not same(seen[1], seen[0])


def test_raise_raises_inside_compiled_code():
    guarded = on_nonfinite(optax.sgd(0.1), "raise")
    with pytest.raises(Exception, match="not finite"):
        run(guarded, [GOOD, spoiled(np.nan)])


def test_an_update_that_is_not_finite_counts_too():
    root = optax.stateless(lambda g, _: jax.tree.map(jnp.sqrt, g))
    state, seen = run(on_nonfinite(root, "skip"), [GOOD])  # √−2
    assert int(state.skipped) == 1 and same(seen[0], PARAMS)


def test_an_extra_argument_that_is_not_finite_counts_too():
    def update(updates, state, params=None, *, hvp=None, **extra):
        return jax.tree.map(jnp.zeros_like, updates), jax.tree.map(jnp.add, state, hvp)

    inner = optax.GradientTransformationExtraArgs(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    guarded = on_nonfinite(inner, "skip")
    _, state = guarded.update(GOOD, guarded.init(PARAMS), PARAMS, hvp=spoiled(np.nan))
    assert int(state.skipped) == 1 and same(state.inner, jax.tree.map(jnp.zeros_like, PARAMS))


def test_finite_gradients_pass_unchanged():
    guarded, plain = on_nonfinite(optax.sgd(0.1, momentum=0.9), "skip"), optax.sgd(0.1, momentum=0.9)
    state, other = guarded.init(PARAMS), plain.init(PARAMS)
    for _ in range(3):
        (a, state), (b, other) = guarded.update(GOOD, state, PARAMS), plain.update(GOOD, other, PARAMS)
        assert same(a, b)
    assert int(state.skipped) == 0


def test_keys_in_the_state_are_kept_too():
    noisy = optax.add_noise(0.1, 0.5, jax.random.key(0))
    guarded = on_nonfinite(noisy, "skip")
    before = guarded.init(PARAMS)
    _, after = guarded.update(spoiled(np.nan), before, PARAMS)
    assert same(jax.random.key_data(before.inner.rng_key), jax.random.key_data(after.inner.rng_key))


@pytest.mark.parametrize(("inner", "action", "said"), [(optax.sgd(0.1), "ignore", "action"), (3, "skip", "inner")])
def test_bad_input(inner, action, said):
    with pytest.raises(fl.InputError, match=said):
        on_nonfinite(inner, action)
