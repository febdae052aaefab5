"""Composite mirror descent and its step sizes against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.descent.last_iterate import last_iterate, last_iterate_schedule, prox_mirror
from fallline.parts.mirror import Entropy, Euclidean, PNorm, UniformlyConvex
from fallline.parts.prox import L1, Ball, Box, Simplex


def by_hand(kind, t, eta=None, T=None, L=0.0, mu=None, s=0, p=2.0):
    """η_t of the paper, t from 1."""
    cap = 1 / (2 * L) if L else np.inf
    if kind == "decreasing":
        return min(cap, eta / t ** (1 / p))
    if kind == "constant":
        return min(cap, eta / T ** (1 / p))
    if kind == "linear":
        return min(cap, eta * max(T - t + 1, 1) / T ** ((p + 1) / p))
    kappa = L / mu
    if kind == "strong":
        return 1 / (mu * (t + s + 2 * kappa))
    if kind == "strong_twice":
        return 2 / (mu * (t + 1 + s + 4 * kappa))
    tau, c = -(-T // 2), 1 + s + 2 * kappa
    return 1 / (mu * c) if t <= tau else 2 / (mu * (2 * c + t - tau))


CONVEX = [
    (kind, {"eta": 0.7, "steps": 9, "smoothness": L, "moment": p})
    for kind in ("decreasing", "constant", "linear")
    for L in (0.0, 1.2)
    for p in (2.0, 1.4)
]
STRONG = [
    (kind, {"steps": 9, "smoothness": L, "strong_convexity": 0.3, "strong_part": part})
    for kind in ("strong", "strong_twice", "strong_two_phase")
    for L, part in ((0.0, "f"), (1.2, "f"), (1.2, "h"))
]
NAMES = {"steps": "T", "smoothness": "L", "strong_convexity": "mu", "moment": "p"}


@pytest.mark.parametrize(("kind", "options"), CONVEX + STRONG)
def test_schedules(kind, options, x64):
    named = {NAMES.get(k, k): v for k, v in options.items() if k != "strong_part"}
    named["s"] = int(options.get("strong_part") == "h")
    expected = [by_hand(kind, t, **named) for t in range(1, 13)]
    schedule = last_iterate_schedule(kind, **options)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(12)), expected, rtol=1e-12)
    assert max(expected) <= (1 / (2 * options["smoothness"]) if options["smoothness"] else np.inf)


def test_the_ends_of_the_linear_schedule(x64):
    T = 64
    schedule = last_iterate_schedule("linear", 1.0, T)
    np.testing.assert_allclose(schedule(0), 1 / np.sqrt(T), rtol=1e-14)
    for count in (T - 1, T, 10 * T):  # never 0, nor below
        np.testing.assert_allclose(schedule(count), T**-1.5, rtol=1e-14)
    # Σ η_t, by which the last point forgets the first.
    np.testing.assert_allclose(sum(schedule(t) for t in range(T)), (T + 1) / 2 / np.sqrt(T), rtol=1e-14)
    np.testing.assert_allclose(last_iterate_schedule("linear", 1.0, 1)(0), 1.0)


def run(transformation, gradients, x):
    state, points = transformation.init(x), []
    for g in gradients:
        updates, state = transformation.update(g, state, x)
        x = optax.apply_updates(x, updates)
        points.append(x)
    return np.asarray(jnp.stack(points), np.float64), state


def soft(v, t):
    return np.sign(v) * np.maximum(np.abs(v) - t, 0)


def p_norm_map(x, r):
    norm = (np.abs(x) ** r).sum() ** (1 / r)
    return norm ** (2 - r) * np.sign(x) * np.abs(x) ** (r - 1)


def mirrored(name, x, g, eta):
    """One step of each instance by hand."""
    if name == "proximal":
        return soft(x - eta * g, eta * 0.2)
    if name == "projected":
        return np.clip(x - eta * g, 0.1, 1.0)
    if name == "simplex":
        w = x * np.exp(-eta * g)
        return w / w.sum()
    if name == "p-norm":
        return p_norm_map(0.5 * soft(p_norm_map(x, 1.5) / 0.5 - eta * g, eta * 0.2), 3.0)
    c = 2.0  # q = 3
    y = c * np.linalg.norm(x) * x - eta * g
    new = np.sqrt(np.linalg.norm(y) / c) * y / np.linalg.norm(y)
    return new * min(1, 0.8 / np.linalg.norm(new))


INSTANCES = {
    "proximal": (Euclidean(), L1(0.2)),
    "projected": (None, Box(0.1, 1.0)),
    "simplex": (Entropy(), Simplex()),
    "p-norm": (PNorm(1.5), L1(0.2)),
    "heavy": (UniformlyConvex(1.5), Ball(0.8)),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_the_points_are_those_of_the_algorithm(name, dtype):
    mirror, prox = INSTANCES[name]
    draw = np.random.default_rng(0)
    gradients, x = draw.normal(size=(10, 4)).astype(dtype), np.array([0.1, 0.2, 0.3, 0.4], dtype)
    ours = last_iterate("linear", 2.0, 10, smoothness=1.0, moment=1.5, mirror=mirror, prox=prox)
    points, state = run(ours, gradients, jnp.asarray(x))
    expected = []
    x = x.astype(np.float64)
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        x = mirrored(name, x, g, by_hand("linear", t, 2.0, 10, L=1.0, p=1.5))
        expected.append(x)
    np.testing.assert_allclose(points, expected, rtol=0, atol=100 * np.finfo(dtype).eps)
    assert int(state.count) == 10


def test_zeros_of_the_proximal_step_are_exact():
    x, g = jnp.array([0.3, -0.7, 1e-3]), jnp.array([0.1, 0.2, -5.0])
    update = prox_mirror(1.0, prox=L1(2.0))
    moved = optax.apply_updates(x, update.update(g, update.init(x), x)[0])
    np.testing.assert_array_equal(moved[:2], [0.0, 0.0])
    assert moved[2] > 2


def test_on_the_simplex_no_entry_is_lost():
    """In float32 an entry falls to 0 and returns, as its logarithm is kept."""
    update, x = prox_mirror(1.0, Entropy()), jnp.array([0.5, 0.5], jnp.float32)
    points, _ = run(update, [jnp.array([300.0, 0.0])] + 3 * [jnp.array([-100.0, 0.0])], x)
    assert points[0][0] == 0.0
    assert np.all(points >= 0)
    np.testing.assert_allclose(points[-1], [0.5, 0.5], rtol=1e-4)


def test_the_last_point_of_a_quadratic_with_noise(x64):
    """x_{T+1} in closed form: with f = x²/2 it is Π (1 − η_t) x_1 − Σ_t η_t Π_{s>t} (1 − η_s) ξ_t."""
    T, draw = 50, np.random.default_rng(1)
    noise = draw.normal(size=T)
    steps = np.array([by_hand("linear", t, 3.0, T, L=1.0) for t in range(1, T + 1)])
    left = np.append(np.cumprod((1 - steps)[::-1])[::-1], 1.0)
    expected = left[0] * 2.0 - (steps * left[1:] * noise).sum()
    update = last_iterate("linear", 3.0, T, smoothness=1.0)

    def step(carry, xi):
        x, state = carry
        moves, state = update.update(x + xi, state, x)
        return (optax.apply_updates(x, moves), state), None

    x = jnp.asarray(2.0)
    (x, _), _ = jax.lax.scan(step, (x, update.init(x)), noise)
    np.testing.assert_allclose(x, expected, rtol=1e-12)


def test_it_composes_with_optax():
    x = {"a": jnp.array([0.4, 0.6]), "b": jnp.ones((), jnp.bfloat16)}
    g = {"a": jnp.array([1.0, -1.0]), "b": jnp.ones((), jnp.bfloat16)}
    update = last_iterate("linear", 0.5, 10, prox=L1(0.1))
    moves, _ = update.update(g, update.init(x), x)
    assert moves["b"].dtype == jnp.bfloat16
    direct = moves["a"]
    for other in (Entropy(), PNorm(1.5), UniformlyConvex(1.5)):
        masked = optax.masked(last_iterate("linear", 0.5, 10, mirror=other), {"a": True, "b": False})
        moves, state = masked.update(g, masked.init(x), x)
        assert moves["b"] == 1.0  # untouched
        assert jax.tree.structure(masked.update(g, state, x)[1]) == jax.tree.structure(state)
    chained = optax.chain(optax.clip(0.5), update)
    clipped, _ = chained.update(g, chained.init(x), x)
    np.testing.assert_allclose(clipped["a"], direct + jnp.array([0.5, -0.5]) * 0.5 / np.sqrt(10), rtol=1e-5)
    injected = optax.inject_hyperparams(last_iterate, static_args=("prox", "mirror"))(
        "linear", eta=0.5, steps=10, smoothness=0.0, prox=L1(0.1)
    )
    np.testing.assert_allclose(injected.update(g, injected.init(x), x)[0]["a"], direct, rtol=1e-5)
    several = optax.MultiSteps(update, 2)
    state = several.init(x)
    first, state = jax.jit(several.update)(g, state, x)
    second, _ = jax.jit(several.update)(g, state, x)
    np.testing.assert_array_equal(first["a"], 0.0)
    np.testing.assert_allclose(second["a"], direct, rtol=1e-5)


def test_as_a_solver():
    def objective(x):
        return 0.5 * jnp.sum(x**2)

    solver = fl.optimizer(last_iterate, kind="linear", eta=3.0, steps=200, smoothness=1.0)
    found = fl.minimize(objective, jnp.ones(3), solver, steps=200, stop=None)
    T, left = 200, 1.0
    for t in range(1, T + 1):
        left *= 1 - by_hand("linear", t, 3.0, T, L=1.0)
    np.testing.assert_allclose(found.x, left, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "lineer"}, "kind: got 'lineer'; .* 'linear'"),
        ({"eta": 0.0}, "eta: got 0.0"),
        ({"eta": -1.0}, "eta: got -1.0"),
        ({"eta": None}, "eta: got None"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 2.5}, "steps: got 2.5"),
        ({"steps": None}, "steps: got None"),
        ({"kind": "constant", "steps": None}, "steps: got None"),
        ({"smoothness": -1.0}, "smoothness: got -1.0"),
        ({"moment": 1.0}, "moment: got 1.0"),
        ({"moment": 2.1}, "moment: got 2.1"),
        ({"strong_convexity": 1.0}, "strong_convexity: got 1.0; expected None for 'linear'"),
        ({"kind": "strong", "eta": None}, "strong_convexity: got None"),
        ({"kind": "strong", "eta": None, "strong_convexity": 0.0}, "strong_convexity: got 0.0"),
        ({"kind": "strong", "strong_convexity": 1.0}, "eta: got 1.0; expected None"),
        ({"kind": "strong_two_phase", "eta": None, "strong_convexity": 1.0, "steps": None}, "steps: got None"),
        ({"strong_part": "g"}, "strong_part: got 'g'"),
        ({"mirror": Entropy}, "mirror: got the class Entropy"),
        ({"mirror": "entropy"}, "mirror: got str"),
        ({"prox": 0.1}, "prox: got float"),
        ({"mirror": Entropy(), "prox": Box(0.0, 1.0)}, "prox: got Box"),
        ({"mirror": PNorm(1.5), "prox": Simplex()}, "prox: got Simplex"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(fl.InputError, match=words):
        last_iterate(**{"eta": 1.0, "steps": 10, **options})


def test_bad_points():
    update = last_iterate("linear", 1.0, 10)
    with pytest.raises(fl.InputError, match=r"params: got None; expected the parameters"):
        update.update(jnp.ones(2), update.init(jnp.ones(2)))
    with pytest.raises(fl.InputError, match=r"params: got int32\[2\]"):
        update.init(jnp.ones(2, jnp.int32))
    with pytest.raises(fl.InputError, match="params: got entries down to 0"):
        last_iterate("linear", 1.0, 10, mirror=Entropy()).init(jnp.array([0.0, 1.0]))
    with pytest.raises(fl.InputError, match="schedule: got -0.1"):
        prox_mirror(-0.1)


def test_nan_stays():
    for mirror in (None, Entropy(), PNorm(1.5), UniformlyConvex(1.5)):
        update, x = last_iterate("linear", 1.0, 10, mirror=mirror), jnp.array([0.25, 0.75])
        points, _ = run(update, [jnp.array([jnp.nan, 0.0]), jnp.zeros(2)], x)
        assert np.isnan(points[:, 0]).all()
