"""The built-in problems against what is known of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import fallline as fl
from fallline import Verdict
from fallline.problems import (
    PROBLEMS,
    gaussian_phase_retrieval,
    instance,
    linear_autoencoder,
    options,
    principal_components,
    rosenbrock,
    saddle,
    tanh_classifier,
    widen_autoencoder,
    widen_classifier,
)
from fallline.problems.digits import as_image, digits, leading_pattern

KEY = jax.random.key(0)


@functools.cache
def oracle(fn):
    return jax.jit(lambda args, x: fl.Objective(fn, args).value_and_gradient(x))


def at(problem, x):
    """Value and gradient, compiled once for each objective and its shapes."""
    return oracle(problem.fn)(problem.args, x)


# --- all that are functions (the others: test_measured.py) ------------------------------------------

FUNCTIONS = [name for name in PROBLEMS if name not in ("coded-diffraction", "missing-entries", "digits-on-workers")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_start_has_a_finite_value_and_gradient(name, dtype):
    built = instance(name)
    x = built.start(KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {dtype}
    value, gradient = at(built.problem, x)
    assert value.dtype == dtype and np.isfinite(value)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    if built.problem.lower_bound is not None:
        assert float(value) > float(built.problem.lower_bound)
    assert all(np.isfinite(number) for number in built.measure(x).values())
    assert built.problem.kinks(x) == []
    assert built.description and built.answer
    # The same key, the same start; another key, another one where it is random at all.
    jax.tree.map(np.testing.assert_array_equal, x, built.start(KEY))
    other = built.start(jax.random.key(1))
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(other), strict=True))
    assert same == (name in ("rosenbrock", "saddle"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_data_have_the_default_precision(name, dtype):
    data = [leaf for leaf in jax.tree.leaves(instance(name).problem.args) if leaf.dtype.kind == "f"]
    assert {leaf.dtype for leaf in data} <= {dtype}
    assert data or name == "rosenbrock"


def directional(problem, x, v):
    """The derivative of the value along v, and what it is measured against: ‖∇f‖ ‖v‖."""
    gradient = at(problem, x)[1]
    leaves = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(v), strict=True))
    slope = sum(float(np.sum(np.asarray(g) * np.asarray(d))) for g, d in leaves)
    sizes = [np.sqrt(sum(float(np.sum(np.asarray(a) ** 2)) for a in column)) for column in zip(*leaves, strict=True)]
    return slope, sizes[0] * sizes[1]


# --- the digits -----------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    pixels, labels = digits()
    assert pixels.shape == (1797, 64) and pixels.min() == 0 and pixels.max() == 1
    np.testing.assert_array_equal(pixels * 16, load_digits().data)
    np.testing.assert_array_equal(labels, load_digits().target)


def test_images_of_directions():
    pattern = np.zeros(64)
    pattern[[3, 9]] = [-2, 1]
    image = as_image(pattern)
    assert image.shape == (8, 8) and image[0, 3] == 2 and image[1, 1] == -1  # the largest entry is positive
    u = np.arange(64.0) / np.linalg.norm(np.arange(64.0))
    assert abs(leading_pattern(np.outer(u, [3.0, -4.0])) @ u) == pytest.approx(1, abs=1e-12)


# --- linear autoencoder ---------------------------------------------------------------------------


def centered():
    pixels = load_digits().data / 16
    return (pixels - pixels.mean(axis=0)) / np.sqrt(len(pixels))


def optimal_weights(rank, mix=None):
    """The principal components by NumPy's SVD, encoder and decoder mixed by A and A⁻¹."""
    components = np.linalg.svd(centered(), full_matrices=False)[2][:rank]
    mix = np.eye(rank) if mix is None else mix
    return {"encode": components.T @ mix, "decode": np.linalg.inv(mix) @ components}


@pytest.mark.parametrize("rank", [2, 20])
def test_the_autoencoder_meets_its_bound_at_the_principal_components(x64, rank):
    # Eckart and Young: the least error is the sum of the squared singular values beyond the rank.
    built = linear_autoencoder(rank)
    values = np.linalg.svd(centered(), compute_uv=False)
    bound = float(built.problem.lower_bound)
    assert bound == pytest.approx(np.sum(values[rank:] ** 2), rel=1e-12)
    mix = np.eye(rank) + 0.3 * np.random.default_rng(rank).normal(size=(rank, rank))
    for x in (optimal_weights(rank), optimal_weights(rank, mix)):
        value, gradient = at(built.problem, x)
        assert float(value) == pytest.approx(bound, rel=1e-12)
        assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) < 1e-12
        assert abs(built.measure(x)["relative distance to the optimum"]) < 1e-12


def test_the_autoencoder_is_the_reconstruction_error_of_all_digits(x64):
    # The objective uses a triangular factor of 64 rows in place of the 1,797.
    built = linear_autoencoder(3)
    x = jax.tree.map(np.asarray, built.start(KEY))
    rows = centered()
    expected = np.sum((rows - rows @ x["encode"] @ x["decode"]) ** 2)
    assert float(at(built.problem, x)[0]) == pytest.approx(expected, rel=1e-13)


def test_an_autoencoder_of_full_rank_has_no_error(x64):
    built = linear_autoencoder(64)
    x = {"encode": np.eye(64), "decode": np.eye(64)}
    assert float(built.problem.lower_bound) == 0 == float(at(built.problem, x)[0])
    assert built.measure(x) == {"distance to the optimum": 0.0}


def test_the_tangents_of_the_autoencoder_leave_the_value_alone(x64):
    built = linear_autoencoder(3)
    x = jax.tree.map(lambda a: 3 * a, built.start(KEY))
    tangents = built.problem.symmetry(x)
    assert tangents["encode"].shape == (9, 64, 3) and tangents["decode"].shape == (9, 3, 64)
    for i in range(9):
        slope, scale = directional(built.problem, x, jax.tree.map(lambda t, i=i: t[i], tangents))
        assert abs(slope) < 1e-13 * scale
    # They are the derivative of (E A, A⁻¹ D) at A = I, and independent.
    b = np.random.default_rng(0).normal(size=(3, 3))
    h = 1e-6
    ends = [
        (np.asarray(x["encode"]) @ a, np.linalg.inv(a) @ x["decode"]) for a in (np.eye(3) + h * b, np.eye(3) - h * b)
    ]
    for name, ahead, behind in zip(("encode", "decode"), *ends, strict=True):
        np.testing.assert_allclose(jnp.tensordot(b.ravel(), tangents[name], 1), (ahead - behind) / (2 * h), atol=1e-8)
    flat = np.concatenate([np.asarray(t).reshape(9, -1) for t in tangents.values()], axis=1)
    assert np.linalg.matrix_rank(flat) == 9


def test_a_widened_autoencoder_computes_the_same_function(x64):
    narrow, wide = linear_autoencoder(3), linear_autoencoder(5)
    x = narrow.start(KEY)
    y = widen_autoencoder(x, 5)
    assert y["encode"].shape == (64, 5) and y["decode"].shape == (5, 64)
    np.testing.assert_array_equal(y["encode"] @ y["decode"], x["encode"] @ x["decode"])
    assert float(at(wide.problem, y)[0]) == float(at(narrow.problem, x)[0])
    jax.tree.map(np.testing.assert_array_equal, widen_autoencoder(x, 3), x)


def test_a_widened_optimum_is_a_saddle_towards_the_next_component(x64):
    # Curvature there: the Hessian's block [[0, −2σ²], [−2σ², 0]] for the first component left out.
    y = widen_autoencoder(optimal_weights(1), 2)
    built = linear_autoencoder(2)
    certificate = fl.certify(built.problem, y)
    values, components = principal_components()
    assert certificate.verdict is Verdict.STRICT_SADDLE
    assert certificate.rayleigh == pytest.approx(-2 * values[1] ** 2, rel=1e-9)
    assert np.abs(components[1] @ leading_pattern(certificate.direction["encode"])) == pytest.approx(1, abs=1e-9)
    titles = [title for title in built.draw(certificate.direction) if "component 2" in title]
    assert len(titles) == 1 and "1.000000" in titles[0]


# --- the others -----------------------------------------------------------------------------------


def test_the_saddle(x64):
    built = saddle(dimension=6, curvature=2.25)
    x0 = built.start(KEY)
    value, gradient = at(built.problem, x0)
    assert float(value) == 0 and not np.any(gradient)
    hessian = jax.jit(jax.hessian(lambda x: built.problem.value(x)))(x0)
    np.testing.assert_array_equal(hessian, np.diag([-2.25, 1, 3.25, 5.5, 7.75, 10]))
    for sign in (1, -1):
        x = sign * 1.5 * np.eye(6)[0]
        value, gradient = at(built.problem, x)
        assert float(value) == float(built.problem.lower_bound) == -(2.25**2) / 4
        assert np.max(np.abs(gradient)) < 1e-15
        assert built.measure(x) == {"distance to the nearest minimizer": 0.0}
    assert built.measure(np.zeros(6))["distance to the nearest minimizer"] == 1.5


def test_rosenbrock(x64):
    built = rosenbrock(5)
    x0 = np.asarray(built.start(KEY))
    np.testing.assert_array_equal(x0, [-1.2, 1, -1.2, 1, -1.2])
    # By hand: 100 (1 − 1.44)² + 2.2² for each step from −1.2 to 1, 100 (−1.2 − 1)² from 1 to −1.2.
    assert float(at(built.problem, x0)[0]) == pytest.approx(2 * (19.36 + 4.84) + 2 * 484, rel=1e-14)
    value, gradient = at(built.problem, np.ones(5))
    assert float(value) == 0 == float(built.problem.lower_bound) and not np.any(gradient)
    assert built.measure(np.ones(5)) == {"distance to the minimizer": 0.0}
    assert float(at(rosenbrock(2).problem, np.array([-1.2, 1]))[0]) == pytest.approx(24.2, rel=1e-14)


def test_phase_retrieval(x64):
    built = gaussian_phase_retrieval(40, 7, seed=3)
    generator = np.random.default_rng(3)
    signal = generator.standard_normal(7)
    signal /= np.linalg.norm(signal)
    rows = generator.standard_normal((40, 7))
    for sign in (1, -1):
        value, gradient = at(built.problem, sign * signal)
        assert float(value) < 1e-30 and float(built.problem.lower_bound) == 0
        assert np.max(np.abs(gradient)) < 1e-14
        assert built.measure(sign * signal)["distance to ± the signal"] < 1e-15
    x = np.asarray(built.start(KEY))
    assert float(at(built.problem, x)[0]) == pytest.approx(np.sum(((rows @ x) ** 2 - (rows @ signal) ** 2) ** 2) / 160)
    assert not np.array_equal(gaussian_phase_retrieval(40, 7, seed=4).problem.args[0], rows)
    np.testing.assert_array_equal(built.problem.args[0], rows)


def classifier_loss(x, weight_decay):
    """Cross-entropy with weight decay, in NumPy, on the first 1,200 digits."""
    data = load_digits()
    x = jax.tree.map(np.asarray, x)
    logits = np.tanh(data.data[:1200] / 16 @ x["hidden"] + x["hidden_bias"]) @ x["output"] + x["output_bias"]
    top = logits.max(axis=1, keepdims=True)
    log_odds = logits - top - np.log(np.sum(np.exp(logits - top), axis=1, keepdims=True))
    decay = weight_decay / 2 * sum(np.sum(leaf**2) for leaf in x.values())
    return -np.mean(log_odds[np.arange(1200), data.target[:1200]]) + decay


def test_the_classifier_is_cross_entropy_with_decay(x64):
    built = tanh_classifier(4, weight_decay=0.02)
    x = jax.tree.map(lambda a: a + 0.1, built.start(KEY))
    assert float(at(built.problem, x)[0]) == pytest.approx(classifier_loss(x, 0.02), rel=1e-12)
    assert tanh_classifier(4).problem.lower_bound is None


def test_the_classifier_measures_how_many_digits_are_right(x64):
    # All weights zero but one bias: everything is called a 3.
    x = jax.tree.map(jnp.zeros_like, tanh_classifier(2).start(KEY))
    x["output_bias"] = jnp.eye(10)[3]
    labels = load_digits().target
    measured = tanh_classifier(2).measure(x)
    assert measured["training accuracy"] == pytest.approx(np.mean(labels[:1200] == 3), rel=1e-12)
    assert measured["test accuracy"] == pytest.approx(np.mean(labels[1200:] == 3), rel=1e-12)


def test_a_widened_classifier_computes_the_same_function_and_cannot_grow_by_itself(x64):
    narrow, wide = tanh_classifier(3), tanh_classifier(5)
    x = narrow.start(KEY)
    y = widen_classifier(x, 5)
    assert {name: leaf.shape for name, leaf in y.items()} == {
        "hidden": (64, 5),
        "hidden_bias": (5,),
        "output": (5, 10),
        "output_bias": (10,),
    }
    value, gradient = at(wide.problem, y)
    assert float(value) == pytest.approx(float(at(narrow.problem, x)[0]), rel=1e-15)
    assert wide.measure(y) == narrow.measure(x)
    # No first-order method moves the new units.
    assert not np.any(gradient["hidden"][:, 3:]) and not np.any(gradient["hidden_bias"][3:])
    assert not np.any(gradient["output"][3:])
    jax.tree.map(np.testing.assert_array_equal, widen_classifier(x, 3), x)


# --- options --------------------------------------------------------------------------------------


def test_options_are_found_by_name(x32):
    assert options("linear-autoencoder") == {"rank": 10, "scale": 0.1}
    assert options("gaussian-phase-retrieval") == {"measurements": 500, "dimension": 50, "seed": 0}
    assert instance("gaussian_phase_retrieval", dimension=3).start(KEY).shape == (3,)
    assert instance("linear-autoencoder", rank=2, scale=1).start(KEY)["encode"].shape == (64, 2)
    deviations = [np.std(instance("linear-autoencoder", scale=s).start(KEY)["encode"]) for s in (0.1, 0.2)]
    assert deviations == pytest.approx([0.1, 0.2], rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: instance("saddel"), "^problem: got 'saddel'; .*did you mean 'saddle'"),
        (lambda: instance("saddle", dimensions=3), "^option of saddle: got 'dimensions'; .*did you mean 'dimension'"),
        (lambda: instance("saddle", dimension=3.0), "^dimension: got 3.0; expected a whole number"),
        (lambda: instance("saddle", dimension="3"), "^dimension: got '3'; expected a whole number"),
        (lambda: instance("saddle", dimension=True), "^dimension: got True"),
        (lambda: instance("saddle", curvature="1"), "^curvature: got '1'; expected a number"),
        (lambda: saddle(1), "^dimension: got 1; expected a whole number of at least 2"),
        (lambda: saddle(curvature=0.0), "^curvature: got 0.0; expected a finite number above 0"),
        (lambda: rosenbrock(1), "^dimension: got 1; expected a whole number of at least 2"),
        (lambda: gaussian_phase_retrieval(0), "^measurements: got 0"),
        (lambda: gaussian_phase_retrieval(dimension=0), "^dimension: got 0"),
        (lambda: gaussian_phase_retrieval(seed=-1), "^seed: got -1; expected a whole number of at least 0"),
        (lambda: linear_autoencoder(0), "^rank: got 0"),
        (lambda: linear_autoencoder(65), "^rank: got 65; expected at most 64"),
        (lambda: linear_autoencoder(scale=-0.1), "^scale: got -0.1"),
        (lambda: tanh_classifier(0), "^hidden: got 0"),
        (lambda: tanh_classifier(weight_decay=0.0), "^weight_decay: got 0.0"),
        (lambda: widen_autoencoder(linear_autoencoder(3).start(KEY), 2), "^rank: got 2; expected at least .* 3"),
        (lambda: widen_classifier(tanh_classifier(3).start(KEY), 2), "^hidden: got 2; expected at least .* 3"),
    ],
)
def test_options_out_of_range_are_refused(x32, make, message):
    with pytest.raises(fl.InputError, match=message):
        make()
