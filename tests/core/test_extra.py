"""Extra arguments: what an update declares through whatever holds it, what is refused, what `optimizer` supplies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core.extra import declared, require

X = np.array([1.0, -2.0, 0.5])
A = np.array([[2.0, 0.3, 0.0], [0.3, -1.0, 0.4], [0.0, 0.4, 0.5]])
ROWS = np.sin(np.arange(21.0)).reshape(7, 3)


class Seen(NamedTuple):
    vector: Any
    hvp: Any


class Looking(NamedTuple):
    inner: Any


def curvature(learning_rate=0.1):
    """Gradient descent that keeps what it was given."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Seen(zeros, zeros)

    def update(updates, state, params=None, *, vector=None, hvp=None, **extra):
        require(updates, vector=vector, hvp=hvp)
        return jax.tree.map(lambda g: -learning_rate * g, updates), Seen(vector, hvp)

    return optax.GradientTransformationExtraArgs(init, update)


def rows_kept():
    def init(params):
        return jnp.zeros((7, 3), params.dtype)

    def update(updates, state, params=None, *, per_example_gradients=None, **extra):
        require(updates, per_example_gradients=per_example_gradients)
        return jax.tree.map(lambda g: -0.1 * g, updates), per_example_gradients

    return optax.GradientTransformationExtraArgs(init, update)


def keys_kept():
    def init(params):
        return jax.random.key(0)

    def update(updates, state, params=None, *, key=None, **extra):
        require(updates, key=key)
        return jax.tree.map(lambda g: -0.1 * g, updates), key

    return optax.GradientTransformationExtraArgs(init, update)


def quadratic(x):
    return 0.5 * x @ jnp.asarray(A, x.dtype) @ x


def quartic(x, batch):
    return 0.25 * (batch @ x) ** 4


# ---- what is declared ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (curvature(), {"vector", "hvp"}),
        (optax.chain(optax.clip(1.0), curvature(), optax.scale(2.0)), {"vector", "hvp"}),
        (optax.chain(optax.chain(rows_kept()), keys_kept()), {"per_example_gradients", "key"}),
        (optax.masked(curvature(), True), {"vector", "hvp"}),
        (optax.multi_transform({"a": curvature(), "b": optax.sgd(0.1)}, "a"), {"vector", "hvp"}),
        (optax.named_chain(("c", curvature())), {"vector", "hvp"}),
        (optax.MultiSteps(curvature(), 2), {"vector", "hvp"}),
        (optax.apply_if_finite(curvature(), 3), {"vector", "hvp"}),
        (optax.adam(0.1), set()),
        (optax.lbfgs(), {"value"}),
        (optax.inject_hyperparams(optax.adam)(0.1), set()),
        (optax.contrib.reduce_on_plateau(), {"value"}),
    ],
)
def test_what_a_transformation_declares_is_found_in_whatever_holds_it(held, names):
    assert declared(held) == names


# ---- what is refused ----------------------------------------------------------------------------

GRADIENT = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
STACKED = {"w": jnp.zeros((5, 2, 3)), "b": jnp.zeros((5, 4))}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hvp": None}, r"hvp: got None; expected H v .*update\(gradient, state, params, hvp=\.\.\.\)"),
        ({"vector": {"w": jnp.zeros((2, 3))}}, "vector: got a pytree of another structure.*mask_compatible_extra_args"),
        ({"vector": {"w": jnp.zeros((3, 2)), "b": jnp.zeros(4)}}, r"vector: got float32\[3,2\] where the gradient is"),
        ({"per_example_gradients": GRADIENT}, "per_example_gradients: got"),
        ({"per_example_gradients": {**STACKED, "b": jnp.zeros((6, 4))}}, r"\[5, 6\] examples"),
        ({"per_example_gradients": jax.tree.map(lambda a: a[:0], STACKED)}, r"\[0\] examples"),
        ({"per_example_gradients": {"w": jnp.zeros(()), "b": jnp.zeros(())}}, "per_example_gradients: got"),
        ({"value": jnp.zeros(3)}, r"value: got float32\[3\]"),
        ({"key": jnp.zeros(3)}, r"key: got float32\[3\]"),
    ],
)
def test_an_extra_argument_that_does_not_fit_is_refused_by_name(given, said):
    with pytest.raises(fl.InputError, match=said):
        require(GRADIENT, **given)


def test_what_fits_passes():
    vector = jax.tree.map(jnp.ones_like, GRADIENT)
    require(GRADIENT, vector=vector, hvp=vector, per_example_gradients=STACKED, value=jnp.float32(1))
    require(GRADIENT, key=jax.random.key(0))
    require(GRADIENT, key=jax.random.PRNGKey(0))


def test_a_missing_argument_is_refused_while_a_user_s_step_is_traced():
    update = curvature()
    with pytest.raises(fl.InputError, match="vector: got None"):
        jax.jit(update.update)(jnp.zeros(3), update.init(jnp.zeros(3)))


# ---- what `optimizer` supplies ------------------------------------------------------------------


def test_products_are_at_the_point_with_the_vector_that_comes_along_and_are_counted(x64):
    seen = fl.minimize(quadratic, X, fl.optimizer(curvature, learning_rate=0.01), steps=5, stop=None, key=0)
    np.testing.assert_allclose(seen.state.inner.hvp, A @ seen.state.inner.vector, rtol=1e-12)
    assert np.any(seen.state.inner.vector != 0)
    assert seen.calls.as_dict() == {"gradient": 6, "hvp": 5}


def test_products_of_a_minibatch_are_on_its_rows(x64):
    """With one row a the Hessian is 3 (a·x)² a aᵀ: the product is along the gradient's own row."""
    problem = fl.FiniteSum(quartic, ROWS, batch_size=1)
    seen = fl.minimize(problem, X, fl.optimizer(curvature), steps=1, stop=None, key=3)
    vector, product = np.asarray(seen.state.inner.vector), np.asarray(seen.state.inner.hvp)
    hessians = [3 * (a @ X) ** 2 * np.outer(a, a) for a in ROWS]
    assert min(np.abs(h @ vector - product).max() for h in hessians) < 1e-12
    assert int(seen.calls.minibatch) == 3  # its gradient, and a product that costs two


def test_the_gradient_of_a_minibatch_and_its_product_have_the_same_rows(x64):
    def difference():
        def init(params):
            return jnp.zeros(())

        def update(updates, state, params=None, *, vector=None, hvp=None, **extra):
            # With one row both are multiples of it.
            cosine = updates @ hvp / jnp.sqrt((updates @ updates) * (hvp @ hvp))
            return jnp.zeros_like(updates), jnp.abs(cosine)

        return optax.GradientTransformationExtraArgs(init, update)

    problem = fl.FiniteSum(quartic, ROWS, batch_size=1)
    for seed in range(4):
        seen = fl.minimize(problem, X, fl.optimizer(difference), steps=1, stop=None, key=seed)
        np.testing.assert_allclose(seen.state.inner, 1, rtol=1e-9)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_per_example_gradients_are_those_of_the_rows(x64, batch_size):
    problem = fl.FiniteSum(quartic, ROWS, batch_size=batch_size)
    seen = fl.minimize(problem, X, fl.optimizer(rows_kept), steps=1, stop=None, key=0)
    known = (ROWS @ X)[:, None] ** 3 * ROWS
    given = np.asarray(seen.state.inner)
    if batch_size is None:
        np.testing.assert_allclose(given, known, rtol=1e-12)
        assert seen.calls.as_dict() == {"gradient": 3}  # two of the run itself, one for the rows
    else:
        assert all(np.abs(known - row).max(axis=1).min() < 1e-12 for row in given)
        np.testing.assert_allclose(seen.x, X - 0.1 * given.mean(axis=0), rtol=1e-12)
        assert int(seen.calls.minibatch) == 2


def test_keys_differ_from_step_to_step(x64):
    ends = [fl.minimize(quadratic, X, fl.optimizer(keys_kept), steps=n, stop=None, key=0) for n in (1, 2, 2)]
    data = [np.asarray(jax.random.key_data(end.state.inner)) for end in ends]
    assert np.any(data[0] != data[1]) and np.all(data[1] == data[2])


def test_a_chain_that_the_user_made_is_supplied_too(x64):
    ready = fl.optimizer(optax.chain(curvature(0.01), optax.scale(0.5)))
    seen = fl.minimize(quadratic, X, ready, steps=2, stop=None, key=0)
    np.testing.assert_allclose(seen.state.inner[0].hvp, A @ seen.state.inner[0].vector, rtol=1e-12)


def test_without_a_key_it_is_asked_for(x64):
    with pytest.raises(fl.InputError, match="^key:"):
        fl.minimize(quadratic, X, fl.optimizer(curvature), steps=1)


def test_a_problem_without_examples_is_refused(x64):
    with pytest.raises(fl.InputError, match="per_example"):
        fl.minimize(quadratic, X, fl.optimizer(rows_kept), steps=1)


def test_numbers_still_never_recompile(x64):
    from conformance.checks import compilations

    fl.minimize(quadratic, X, fl.optimizer(curvature, learning_rate=0.01), steps=3, stop=None, key=0)
    with compilations() as found:
        fl.minimize(quadratic, X, fl.optimizer(curvature, learning_rate=0.02), steps=3, stop=None, key=0)
    assert not found
