"""The transforms against the recursion over trees in NumPy, extreme points, and attacks."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.inference.adversarial_risk import (
    adversarial_risk,
    from_mlp,
    interval,
    monotone_network,
    projected_gradient_attack,
    supremum_transform,
    transformed_loss,
    tree_transform,
)

FUNCTIONS = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}
INF = math.inf
# One program each: op by op they compile far longer.
transform = jax.jit(tree_transform, static_argnames="p")
attack = jax.jit(projected_gradient_attack, static_argnames=("p", "steps"))


def layers_of(widths, activation="relu", seed=0, last="identity", dtype=np.float64):
    draw = np.random.default_rng(seed)
    sizes = list(itertools.pairwise(widths))
    return [
        (
            draw.normal(size=(b, a)).astype(dtype),
            draw.normal(size=b).astype(dtype),
            last if i == len(sizes) - 1 else activation,
        )
        for i, (a, b) in enumerate(sizes)
    ]


def points(count, width, seed=5):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, width)), draw.choice([-1.0, 1.0], size=count)


def blobs(rows=60):
    draw = np.random.default_rng(2)
    y = np.repeat([-1.0, 1.0], rows // 2)
    return draw.normal(size=(rows, 3)) + 0.7 * y[:, None] * [1, 1, 0], y


def score(layers, x):
    for weight, bias, name in layers:
        x = FUNCTIONS[name](weight @ x + bias)
    return x[0]


def least_product(row, radius, p):
    """min row·w over ‖w‖_p ≤ ε, from the extreme points of the ball."""
    if p == INF:
        return min(row @ (radius * np.array(w)) for w in itertools.product((-1, 1), repeat=len(row)))
    if p == 1:
        return min(s * radius * entry for entry in row for s in (-1, 1))
    return row @ (-radius * row / np.linalg.norm(row))


def by_tree(layers, x, sign, radius, p, unit=0):
    """The smallest (sign 1) or largest (−1) value of a unit, where each path has a perturbation of its own."""
    *before, (weight, bias, name) = layers
    row = weight[unit]
    if not before:
        return FUNCTIONS[name](row @ x + bias[unit] + sign * least_product(row, radius, p))
    below = (a * by_tree(before, x, sign * np.sign(a), radius, p, i) for i, a in enumerate(row))
    return FUNCTIONS[name](sum(below) + bias[unit])


# ---- the transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, INF])
@pytest.mark.parametrize(
    ("widths", "activation", "last"),
    [((4, 3, 1), "tanh", "sigmoid"), ((3, 4, 3, 1), "relu", "identity"), ((3, 2, 3, 2, 1), "sigmoid", "identity")],
)
def test_intervals_are_the_recursion_over_the_tree(widths, activation, last, p, x64):
    for seed in (0, 1):
        layers = layers_of(widths, activation, seed, last)
        x, y = points(5, widths[0])
        found = transform(monotone_network(layers), x, y, 0.3, p)
        expected = [by_tree(layers, row, label, 0.3, p) for row, label in zip(x, y, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2, INF])
def test_of_linear_classifiers_the_worst_score_is_that_of_an_extreme_point(p, x64):
    [(weight, bias, _)] = layers = layers_of((4, 1))
    x, y = points(6, 4)
    worst = x @ weight[0] + bias + y * least_product(weight[0], 0.3, p)
    network = monotone_network(layers)
    np.testing.assert_allclose(supremum_transform(network, x, y, 0.3, p), worst, rtol=0, atol=1e-13)
    np.testing.assert_allclose(transform(network, x, y, 0.3, p), worst, rtol=0, atol=1e-13)


@pytest.mark.parametrize("p", [2, INF])
def test_margins_are_in_order_and_no_attack_is_beyond_the_transform(p, x64):
    layers = layers_of((5, 8, 6, 1), "tanh")
    network, (x, y) = monotone_network(layers), points(20, 5)
    lowest = np.asarray(y * transform(network, x, y, 0.2, p))
    moved = np.asarray(attack(network, x, y, 0.2, p))
    assert (np.linalg.norm(moved - x, p, axis=1) <= 0.2 * (1 + 1e-12)).all()
    attacked = y * np.array([score(layers, row) for row in moved])
    clean = y * np.array([score(layers, row) for row in x])
    assert (lowest <= attacked).all() and (attacked < clean).all()
    draws = np.random.default_rng(1).normal(size=(50, 20, 5))
    draws *= 0.2 / np.linalg.norm(draws, p, axis=2, keepdims=True)
    scores = np.array([[score(layers, row) for row in rows] for rows in x + draws])
    assert (lowest <= (y * scores).min(axis=0)).all()
    # The attack is not idle: it finds what random points of the sphere do not.
    assert (attacked <= (y * scores).min(axis=0) + 1e-9).mean() > 0.9


def test_without_perturbation_nothing_changes(dtype):
    layers = layers_of((3, 4, 1), "sigmoid", dtype=dtype)
    network, (x, y) = monotone_network(layers), blobs()
    x = x.astype(dtype)
    scores = [score(layers, row) for row in x]
    for p in (1, 2, INF):
        low, high = interval(network, x, 0.0, p)
        np.testing.assert_array_equal(low, high)
        np.testing.assert_allclose(low, scores, rtol=50 * np.finfo(dtype).eps)
        assert low.dtype == dtype
    np.testing.assert_allclose(network(x[0]), scores[0], rtol=50 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(attack(network, x, y, 0.0, 2), x)


@pytest.mark.parametrize("p", [2, INF])
def test_the_attack_on_a_linear_classifier_ends_at_the_worst_point(p, x64):
    network, (x, y) = monotone_network(layers_of((6, 1))), points(9, 6)
    moved = attack(network, x, y, 0.1, p)
    np.testing.assert_allclose(network(moved), supremum_transform(network, x, y, 0.1, p), atol=1e-13)


def test_nan_is_not_hidden(x64):
    network, (x, y) = monotone_network(layers_of((3, 4, 1))), blobs()
    x[1, 2] = np.nan
    np.testing.assert_array_equal(np.isnan(tree_transform(network, x, y, 0.1)), np.arange(60) == 1)
    assert np.isnan(adversarial_risk(network, x, y, 0.1, rademacher=0.0).bound)


# ---- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("relu", "relu", "identity")),
        ({"activation": jnp.tanh, "final_activation": jax.nn.sigmoid, "use_bias": False}, ("tanh", "tanh", "sigmoid")),
        ({"depth": 0}, ("identity",)),
    ],
)
def test_equinox_mlps(options, names):
    options = {"depth": 2, "width_size": 5, **options}
    model = eqx.nn.MLP(4, 1, key=jax.random.key(0), **options)
    network = from_mlp(model)
    assert network.activations == names
    x = jnp.asarray(points(3, 4)[0], jnp.float32)
    np.testing.assert_allclose(network(x), jax.vmap(model)(x)[:, 0], rtol=1e-5)


def test_activations_by_name_and_by_function():
    weight, bias = np.ones((1, 2), np.float32), np.zeros(1, np.float32)
    for given, name in (
        (jax.nn.relu, "relu"),
        (jnp.tanh, "tanh"),
        (jax.lax.tanh, "tanh"),
        (jax.nn.sigmoid, "sigmoid"),
        (jax.nn.identity, "identity"),
        ("relu", "relu"),
    ):
        network = monotone_network([(weight, bias, given)])
        assert network.activations == (name,)
        z = jnp.float32(0.7)
        assert float(network(jnp.array([z, 0.0]))) == pytest.approx(float(FUNCTIONS[name](0.7)), rel=1e-6)


# ---- training --------------------------------------------------------------------------------------


def test_the_transformed_loss_is_that_of_the_transform(x64):
    network, (x, y) = monotone_network(layers_of((3, 4, 1))), blobs()
    margins = np.asarray(y * tree_transform(network, x, y, 0.2, 2))
    losses = transformed_loss(0.2, 2)
    np.testing.assert_allclose(losses(network, (x, y)), np.log1p(np.exp(-margins)), rtol=1e-12)
    plain = np.asarray(y * network(x))
    np.testing.assert_allclose(losses(network, (x, y), 0.0), np.log1p(np.exp(-plain)), rtol=1e-12)
    hinge = transformed_loss(0.2, 2, loss=lambda m: jnp.maximum(1 - m, 0))
    np.testing.assert_allclose(hinge(network, (x, y)), np.maximum(1 - margins, 0), rtol=1e-12, atol=1e-14)


def test_minimize_trains_it_to_the_convex_minimum_of_the_linear_case(x64):
    x, y = blobs()
    start = monotone_network([(np.zeros((1, 3)), np.zeros(1), "identity")])
    problem = fl.FiniteSum(transformed_loss(0.3, 2), (x, y))
    found = fl.minimize(problem, start, fl.optimizer(optax.adam, learning_rate=0.05), steps=800, stop=None).x

    def objective(v):
        return np.mean(np.logaddexp(0, -(y * (x @ v[:3] + v[3]) - 0.3 * np.linalg.norm(v[:3]))))

    from scipy.optimize import minimize

    best = minimize(objective, np.full(4, 0.5), tol=1e-12)
    assert objective(np.concatenate([found.weights[0][0], found.biases[0]])) <= best.fun + 1e-6


@pytest.mark.parametrize("p", [1, 2, INF])
def test_gradients_are_those_of_differences_and_finite_at_rows_of_zeros(p, x64):
    layers = layers_of((3, 4, 1), "tanh")
    x, y = blobs()
    losses = transformed_loss(0.2, p)

    @jax.jit
    def mean(network):
        return jnp.mean(losses(network, (x, y)))

    network = monotone_network(layers)
    slope = jax.jit(jax.grad(mean))
    gradient = slope(network)
    direction = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), network)
    ahead, behind = (mean(jax.tree.map(lambda a, d, s=s: a + s * d, network, direction)) for s in (1e-5, -1e-5))
    along = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert float(along) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-6)
    layers[0][0][1] = 0.0
    dead = slope(monotone_network(layers))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(dead))


# ---- the certificate -------------------------------------------------------------------------------


def test_the_certificate_from_examples_held_out(x64):
    layers = layers_of((3, 4, 1))
    network, (x, y) = monotone_network(layers), blobs()
    margins = y * np.array([by_tree(layers, row, label, 0.1, INF) for row, label in zip(x, y, strict=True)])
    found = adversarial_risk(network, x, y, 0.1, held_out=True, failure_probability=0.1)
    assert found.certified_error == np.mean(margins <= 0) == found.certified_loss
    assert found.clean_error == np.mean(y * np.array([score(layers, row) for row in x]) <= 0)
    assert found.bound == pytest.approx(np.mean(margins <= 0) + np.sqrt(np.log(10) / 120))
    assert found.vacuous == (found.bound >= 1)
    moved = attack(network, x, y, 0.1)
    assert np.mean(np.asarray(y * network(moved)) <= 0) <= found.certified_error


def test_the_certificate_of_a_class(x64):
    network, (x, y) = monotone_network(layers_of((3, 4, 1))), blobs()
    margins = np.asarray(y * tree_transform(network, x, y, 0.1, 1))
    found = adversarial_risk(network, x, y, 0.1, 1, rademacher=0.07, margin=0.5, failure_probability=0.1)
    assert found.certified_loss == pytest.approx(np.mean(np.clip(1 - margins / 0.5, 0, 1)))
    assert found.complexity == pytest.approx(2 * 0.07 / 0.5)
    assert found.deviation == pytest.approx(3 * np.sqrt(np.log(20) / 120))
    assert found.bound == pytest.approx(found.certified_loss + found.complexity + found.deviation)
    assert adversarial_risk(network, x, y, 0.1, 1, rademacher=5.0).vacuous


@pytest.mark.parametrize("p", [1, 2, INF])
def test_the_complexity_of_linear_classifiers_bounds_the_exact_one(p, x64):
    """E sup over ‖θ‖₂ ≤ M of (1/n) Σ σᵢ (θᵀxᵢ − yᵢ ε ‖θ‖_q), over all signs; the sup from many θ."""
    (x, y), radius, norm = points(8, 3), 0.8, 2.0
    network = monotone_network([(np.full((1, 3), 0.1), None, "identity")])
    found = adversarial_risk(network, x, y, radius, p, norm_bound=norm).complexity / 2
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    theta = np.concatenate([np.zeros((1, 3)), norm * draws / np.linalg.norm(draws, axis=1, keepdims=True)])
    q = {1: INF, 2: 2, INF: 1}[p]
    values = theta @ x.T - radius * np.linalg.norm(theta, q, axis=1, keepdims=True) * y
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = np.mean(np.max(values @ signs.T, axis=0)) / 8
    assert exact <= found <= 2 * exact
    size = np.sqrt(np.mean(np.sum(x**2, axis=1)))
    stretch = np.sqrt(3) if p == INF else 1.0
    assert found == pytest.approx(norm * size / np.sqrt(8) + radius * norm * stretch / (2 * np.sqrt(8)))


def test_a_bias_is_one_more_coordinate_of_ones(x64):
    (x, y), weight = points(8, 3), np.full((1, 3), 0.1)
    with_bias = adversarial_risk(monotone_network([(weight, np.zeros(1), "identity")]), x, y, 0.0, norm_bound=2.0)
    ones = np.concatenate([x, np.ones((8, 1))], axis=1)
    as_row = monotone_network([(np.concatenate([weight, np.zeros((1, 1))], axis=1), None, "identity")])
    assert with_bias.complexity == pytest.approx(adversarial_risk(as_row, ones, y, 0.0, norm_bound=2.0).complexity)


# ---- bad input -------------------------------------------------------------------------------------

LAYER = (np.ones((1, 3), np.float32), np.zeros(1, np.float32), "relu")
WIDE = (np.ones((2, 3), np.float32), None, "relu")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([], "layers: got none"),
        ([LAYER[:2]], r"layers\[0\]: got tuple"),
        ([(*LAYER[:2], "gelu")], r"layers\[0\]: activation: got 'gelu'"),
        ([(*LAYER[:2], jax.nn.gelu)], r"layers\[0\]: activation: got gelu"),
        ([(*LAYER[:2], jax.nn.silu)], r"layers\[0\]: activation: got silu"),
        ([(*LAYER[:2], lambda z: z)], r"layers\[0\]: activation: got <lambda>"),
        ([(*LAYER[:2], None)], r"layers\[0\]: activation: got None"),
        ([WIDE], "layers: got 2 outputs"),
        ([WIDE, LAYER], r"layers\[1\]: weights: got float32\[1,3\]; expected 2 columns"),
        ([(np.ones(3, np.float32), None, "relu")], r"layers\[0\]: weights: got float32\[3\]"),
        ([(np.ones((1, 3), np.int32), None, "relu")], r"layers\[0\]: weights: got int32\[1,3\]"),
        ([(np.ones((1, 0), np.float32), None, "relu")], r"layers\[0\]: weights: got float32\[1,0\]"),
        ([(np.full((1, 3), np.nan, np.float32), None, "relu")], r"layers\[0\]: weights: got .* 3 NaN"),
        ([(LAYER[0], np.zeros(2, np.float32), "relu")], r"layers\[0\]: bias: got float32\[2\]"),
    ],
)
def test_bad_networks(layers, words):
    with pytest.raises(fl.InputError, match=words):
        monotone_network(layers)


def test_float64_is_not_narrowed_silently(x32):
    with pytest.raises(fl.InputError, match="float32"):
        monotone_network([(np.ones((1, 3)), None, "relu")])
    with pytest.raises(fl.InputError, match="float32"):
        tree_transform(monotone_network([LAYER]), np.ones((2, 3)), np.ones(2), 0.1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (object(), "model: got object without layers"),
        (eqx.nn.MLP(3, 1, 4, 2, activation=jax.nn.gelu, key=jax.random.key(0)), "activation: got gelu"),
        (eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0)), "layers: got 2 outputs"),
        (eqx.nn.MLP(3, 1, 4, 3, scan=True, key=jax.random.key(0)), "model: got an MLP with scan=True"),
    ],
)
def test_bad_models(model, words):
    with pytest.raises(fl.InputError, match=words):
        from_mlp(model)


ROWS, LABELS = np.zeros((4, 3), np.float32), np.array([-1, 1, 1, -1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((ROWS, LABELS, -0.1), "radius: got -0.1"),
        ((ROWS, LABELS, np.nan), "radius: got nan"),
        ((ROWS, LABELS, 0.1, 0.5), "p: got 0.5"),
        ((ROWS, LABELS, 0.1, 3), "p: got 3"),
        ((ROWS, np.array([0, 1, 1, 0]), 0.1), "y: got labels such as 0"),
        ((ROWS, np.array([2, 1, 1, -1]), 0.1), "y: got labels such as 2"),
        ((ROWS, LABELS[:3], 0.1), r"y: got int64\[3\]"),
        ((ROWS[:, :2], LABELS, 0.1), r"x: got float32\[4,2\]"),
    ],
)
def test_bad_questions(arguments, words):
    network = monotone_network([LAYER])
    for ask in (tree_transform, supremum_transform):
        with pytest.raises(fl.InputError, match=words):
            ask(network, *arguments)
    with pytest.raises(fl.InputError, match=words):
        adversarial_risk(network, *arguments, held_out=True)


def test_other_bad_input():
    network, deep = monotone_network([LAYER]), monotone_network([WIDE, (LAYER[0][:, :2], None, "identity")])
    with pytest.raises(fl.InputError, match="network: got 2 layers"):
        supremum_transform(deep, ROWS, LABELS, 0.1)
    with pytest.raises(fl.InputError, match="p: got 1"):
        projected_gradient_attack(network, ROWS, LABELS, 0.1, 1)
    with pytest.raises(fl.InputError, match="steps: got 0"):
        projected_gradient_attack(network, ROWS, LABELS, 0.1, steps=0)
    for radius, p, words in ((-1.0, 2, "radius: got -1.0"), (0.1, 0, "p: got 0")):
        with pytest.raises(fl.InputError, match=words):
            transformed_loss(radius, p)
    for options, words in (
        ({}, "exactly one"),
        ({"held_out": True, "rademacher": 0.1}, "exactly one"),
        ({"rademacher": -0.1}, "rademacher: got -0.1"),
        ({"held_out": True, "margin": 0.0}, "margin: got 0.0"),
        ({"held_out": True, "failure_probability": 0.0}, "failure_probability: got 0.0"),
        ({"held_out": True, "failure_probability": 1.0}, "failure_probability: got 1.0"),
        ({"norm_bound": 0.0}, "norm_bound: got 0.0"),
        ({"norm_bound": 5.0}, "norm_bound: got 5.0; expected a linear classifier"),
    ):
        with pytest.raises(fl.InputError, match=words):
            adversarial_risk(network, ROWS, LABELS, 0.1, **options)
    linear = monotone_network([(*LAYER[:2], "identity")])
    with pytest.raises(fl.InputError, match="norm_bound: got 1.5; expected at least the norm 1.73"):
        adversarial_risk(linear, ROWS, LABELS, 0.1, norm_bound=1.5)
    with pytest.raises(fl.InputError, match="at least 1 row"):
        adversarial_risk(linear, ROWS[0], LABELS[0], 0.1, held_out=True)
