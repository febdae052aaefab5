"""M-FAC against dense algebra in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core import memory
from fallline.descent.m_fac import m_fac, scale_by_m_fac


def by_hand(gradients, x, lr, m, lam, momentum=0.0, decay=0.0):
    """The optimizer with F inverted as it is, in float64; the points after each step."""
    gradients, x = np.asarray(gradients, np.float64), np.asarray(x, np.float64)
    rows, b, points = np.zeros((m, x.size)), np.zeros(x.size), []
    for t, g in enumerate(gradients):
        g = g + decay * x
        rows[t % m] = g
        u = np.linalg.solve(lam * np.eye(x.size) + rows.T @ rows / m, g)
        b = momentum * b + (1 - momentum) * u
        x = x - (lr(t) if callable(lr) else lr) * b
        points.append(x)
    return np.array(points)


def run(update, gradients, x):
    @jax.jit
    def step(x, state, g):
        updates, state = update.update(g, state, x)
        return optax.apply_updates(x, updates), state

    state, points = update.init(x), []
    for g in gradients:
        x, state = step(x, state, g)
        points.append(x)
    return points, state


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.7, "weight_decay": 0.2}, {"m": 1, "learning_rate": lambda count: 0.1 / (1 + count)}]
)
def test_the_points_are_those_of_the_algorithm(options, dtype):
    """Over two turns of the ring, from a window of zeros on."""
    draw = np.random.default_rng(0)
    gradients, x = draw.normal(size=(11, 8)).astype(dtype), draw.normal(size=8).astype(dtype)
    options = {"learning_rate": 0.1, "m": 4, "lam": 1e-2, **options}
    points, state = run(m_fac(**options), gradients, jnp.asarray(x))
    names = {"weight_decay": "decay", "learning_rate": "lr"}
    expected = by_hand(gradients, x, **{names.get(k, k): v for k, v in options.items()})
    tolerance = 1e3 * np.finfo(dtype).eps
    np.testing.assert_allclose(np.asarray(jnp.stack(points)), expected, rtol=tolerance, atol=tolerance)
    window = optax.tree.get(state, "window")
    assert {a.dtype for a in (window.rows, window.gram)} == {dtype}


def test_the_first_update_is_long(x64):
    """u = m g/(m λ + |g|²) while all other rows are zero: the divisor is m."""
    g, m, lam = jnp.array([3.0, -0.4, 0.1]), 3, 1e-3
    update = scale_by_m_fac(m, lam)
    u, _ = update.update(g, update.init(g))
    np.testing.assert_allclose(u, m * g / (m * lam + 9.17), rtol=1e-13)


def test_leaves_are_one_vector_and_keep_their_dtype(x32):
    draw = np.random.default_rng(1)
    flat = draw.normal(size=(5, 10)).astype(np.float32)

    def tree(v):
        return {"a": jnp.asarray(v[:6]).reshape(2, 3), "b": jnp.asarray(v[6:])}

    whole, _ = run(m_fac(0.1, 3, 0.1), flat, jnp.zeros(10))
    parts, _ = run(m_fac(0.1, 3, 0.1), [tree(v) for v in flat], tree(np.zeros(10, np.float32)))
    np.testing.assert_array_equal(np.concatenate([np.ravel(a) for a in jax.tree.leaves(parts[-1])]), whole[-1])
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree(flat[0]))
    update = scale_by_m_fac(3, 0.1, 0.5)
    u, state = update.update(half, update.init(half))
    assert {a.dtype for a in jax.tree.leaves(u)} == {jnp.dtype(jnp.bfloat16)}
    assert state.window.rows.dtype == state.average.dtype == jnp.float32


def test_in_the_sparse_mode_zeros_stay_and_the_rest_moves_as_if_alone(x64):
    draw = np.random.default_rng(2)
    gradients, x = draw.normal(size=(6, 9)), np.array([0, 1, 2, 0, 3, 0, 4, 5, 0.0])
    left = x != 0
    points, _ = run(m_fac(0.1, 4, 1e-2, sparse=True, weight_decay=0.1), gradients, jnp.asarray(x))
    expected = by_hand(gradients[:, left], x[left], 0.1, 4, 1e-2, decay=0.1)
    np.testing.assert_allclose(np.asarray(points)[:, left], expected, rtol=1e-11)
    np.testing.assert_array_equal(np.asarray(points)[:, ~left], 0)


def test_curvature_is_used(x64):
    """Logistic regression on columns of very different scale: below gradient descent after as many steps."""
    draw = np.random.default_rng(3)
    rows = draw.normal(size=(200, 12)) * np.logspace(0, -2, 12)
    labels = np.sign(rows @ (draw.normal(size=12) / np.logspace(0, -2, 12)) + draw.normal(size=200))

    def losses(x, batch):
        a, b = batch
        return jnp.logaddexp(0, -b * (a @ x))

    problem = fl.FiniteSum(losses, (rows, labels), batch_size=20)
    ends = {
        name: float(fl.minimize(problem, jnp.zeros(12), solver, steps=200, stop=None, key=0).value)
        for name, solver in {
            "m-fac": fl.optimizer(m_fac, learning_rate=0.03, m=12, lam=1e-4, momentum=0.9),
            "gradient": fl.optimizer(optax.sgd, learning_rate=3.0),
        }.items()
    }
    assert ends["m-fac"] < 0.8 * ends["gradient"]


def test_nan_is_handed_on(x32):
    update, x = scale_by_m_fac(2, 0.1), jnp.ones(4)
    u, state = update.update(x.at[1].set(jnp.nan), update.init(x))
    assert np.isnan(u).all()
    # It stays for as long as the row does.
    for expected in (True, False):
        u, state = update.update(x, state)
        assert np.isnan(u).any() == expected


def test_without_decay_no_parameters_are_needed_and_behind_a_mask_there_may_be_none():
    update = m_fac(0.1, 2, 0.1)
    update.update(jnp.ones(2), update.init(jnp.ones(2)))
    masked = optax.masked(m_fac(0.1, 2, 0.1), {"a": False})
    u, _ = masked.update({"a": jnp.ones(2)}, masked.init({"a": jnp.ones(2)}))
    np.testing.assert_array_equal(u["a"], 1)


def test_a_loop_never_copies_the_window(x32):
    update = m_fac(1e-2, 8, 1e-3, 0.9)

    def loop(x, state):
        def step(carry, _):
            x, state = carry
            u, state = update.update(0.5 * x, state, x)
            return (optax.apply_updates(x, u), state), None

        return jax.lax.scan(step, (x, state), length=5)[0]

    x = jnp.ones(1000)
    text = jax.jit(loop, donate_argnums=(0, 1)).lower(x, update.init(x)).compile().as_text()
    assert not [line for line in text.splitlines() if "f32[8,1000]" in line and " copy(" in line]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": -1.0}, "learning_rate: got -1.0"),
        ({"m": 0}, "m: got 0"),
        ({"m": 2.5}, "m: got 2.5"),
        ({"lam": 0.0}, "lam: got 0.0"),
        ({"lam": -1e-5}, "lam: got -1e-05"),
        ({"momentum": 1.0}, "momentum: got 1.0"),
        ({"momentum": -0.1}, "momentum: got -0.1"),
        ({"momentum": float("nan")}, "momentum: got nan"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
    ],
)
def test_bad_numbers(options, words):
    with pytest.raises(fl.InputError, match=words):
        m_fac(**options)
    with pytest.raises(fl.InputError, match=words):
        fl.optimizer(m_fac, **options)


def test_a_window_that_does_not_fit(monkeypatch):
    with pytest.raises(fl.InputError, match=r"m: got 5; expected at most the number of parameters, 4"):
        m_fac(0.1, 5).init(jnp.ones(4))
    with pytest.raises(fl.InputError, match="m: got 5"):
        fl.minimize(lambda x: jnp.sum(x**2), jnp.ones(4), fl.optimizer(m_fac, m=5))
    update = scale_by_m_fac(2)
    with pytest.raises(fl.InputError, match="state: got a window of 3 parameters"):
        update.update(jnp.ones(4), update.init(jnp.ones(3)))
    monkeypatch.setattr(memory, "memory_size", lambda: 1e6)
    with pytest.raises(fl.InputError, match="m: got 300, which takes 1.56 MB"):
        jax.eval_shape(m_fac(0.1, 300).init, jax.ShapeDtypeStruct((1000,), jnp.float32))


@pytest.mark.parametrize("params", [jnp.ones(2, jnp.int32), jnp.ones(2, jnp.complex64)])
def test_parameters_that_are_not_real(params):
    with pytest.raises(fl.InputError, match="params: got"):
        m_fac(0.1, 1).init(params)
