"""Target-based surrogates against their formulas in NumPy, projections in target space and plain gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance.cases import CountedTargets, logistic, near_the_saddle
from conformance.checks import Case, calls_are_those_made, numbers_never_recompile

import fallline as fl
from fallline.descent.target_surrogate import Surrogate, look

DRAW = np.random.default_rng(0)
A = DRAW.normal(size=(12, 4)) * np.array([1.0, 0.7, 0.5, 1.2])
SIGNS = np.sign(DRAW.normal(size=12))  # no hyperplane separates them
NOISY = A @ np.ones(4) + DRAW.normal(size=12)
X0 = np.array([0.3, -0.2, 0.1, 0.4])


def linear(x, rows):
    return rows @ x


def half_square(targets, labels):
    return (targets - labels) ** 2 / 2


def logistic_problem(batch_size=None):
    return fl.TargetLoss(linear, logistic, (A, SIGNS), batch_size)


def h(x, rows=A, signs=SIGNS):
    return np.mean(np.log1p(np.exp(-signs * (rows @ x))))


def target_slope(z, signs=SIGNS):
    return -signs / (1 + np.exp(signs * z))


def batches(problem, seed, steps):
    """The rows that a run with this seed draws, step by step."""
    keys = [jax.random.fold_in(jax.random.key(seed), t) for t in range(1, steps + 1)]
    return [tuple(map(np.asarray, problem.sample(key))) for key in keys]


# --- the surrogate --------------------------------------------------------------------------------


def tanh_net(x, rows):
    return jnp.tanh(rows @ x["in"]) @ x["out"]


def net(scale, outputs=None, seed=1):
    draw = np.random.default_rng(seed)
    shape = (3,) if outputs is None else (3, outputs)
    return {"in": scale * draw.normal(size=(4, 3)), "out": scale * draw.normal(size=shape)}


def cross_entropy(targets, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(targets), labels[:, None], axis=1)[:, 0]


CLASSES = np.arange(12) % 3

# Loss, labels, L, outputs, and the mean loss at targets z.
LOSSES = {
    "half square": (half_square, NOISY, 1.0, None, lambda z: np.mean((z - NOISY) ** 2) / 2),
    "logistic": (logistic, SIGNS, 0.25, None, lambda z: np.mean(np.log1p(np.exp(-SIGNS * z)))),
    "cross entropy": (
        cross_entropy,
        CLASSES,
        0.5,
        3,
        lambda z: np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(12), CLASSES]),
    ),
}


def numpy_net(x):
    return np.tanh(A @ x["in"]) @ x["out"]


@pytest.mark.parametrize("name", LOSSES)
def test_the_surrogate_majorizes_and_touches(x64, name):
    loss, labels, smoothness, outputs, mean_loss = LOSSES[name]
    problem, x = fl.TargetLoss(tanh_net, loss, (A, labels)), net(1.0, outputs)
    value, seen = look(problem, x, problem.data)
    assert float(value) == pytest.approx(mean_loss(numpy_net(x)), rel=1e-13)

    def gap(eta, points):
        """q_t − h at the points."""
        surrogate = jax.jit(jax.vmap(Surrogate(problem, A, seen, jnp.asarray(eta)).value))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *points)
        return np.asarray(surrogate(stacked)) + mean_loss(numpy_net(x)) - [mean_loss(numpy_net(p)) for p in points]

    points = [net(scale, outputs, seed) for seed in range(2, 30) for scale in (0.1, 1.0, 3.0)]
    near = [jax.tree.map(lambda a, p: a + 1e-3 * p, x, p) for p in points]
    assert np.min(gap(1 / smoothness, points + near)) > -1e-13
    assert np.min(gap(20 / smoothness, points + near)) < -1e-3
    np.testing.assert_allclose(gap(1 / smoothness, [x]), 0, atol=1e-15)
    if name == "half square":  # then the majorizer is the objective itself
        np.testing.assert_allclose(gap(1.0, points), 0, atol=1e-12)

    # The gradient there is the objective's, whatever η: by hand, through both layers.
    z, hidden = numpy_net(x), np.tanh(A @ x["in"])
    if name == "cross entropy":
        slope = np.exp(z) / np.exp(z).sum(1, keepdims=True) - np.eye(3)[CLASSES]
    else:
        slope = z - NOISY if name == "half square" else target_slope(z)
    back = np.outer(slope, x["out"]) if outputs is None else slope @ x["out"].T
    expected = {"in": A.T @ (back * (1 - hidden**2)) / 12, "out": hidden.T @ slope / 12}
    for eta in (0.01, 7.0):
        gradient = Surrogate(problem, A, seen, jnp.asarray(eta)).gradient(x)
        for leaf in ("in", "out"):
            np.testing.assert_allclose(gradient[leaf], expected[leaf], rtol=1e-11, atol=1e-15)
            np.testing.assert_allclose(seen.gradient[leaf], expected[leaf], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("inner_steps", [1, 7])
def test_the_loss_never_rises_where_the_surrogate_majorizes(x64, inner_steps):
    problem = fl.TargetLoss(tanh_net, logistic, (A, SIGNS))
    solver = fl.target_surrogate(4.0, inner_steps=inner_steps)
    values = fl.minimize(problem, net(1.0), solver, steps=60, stop=None).history["value"]
    assert np.max(np.diff(values)) <= 1e-14 and values[-1] < 0.5 * values[0]


# --- gradient descent -----------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.1, 30.0])
def test_one_fixed_inner_step_is_gradient_descent_whatever_eta(x64, eta):
    x = X0
    for _ in range(20):
        x = x - 0.5 * A.T @ target_slope(A @ x) / 12
    solver = fl.target_surrogate(eta, inner_steps=1, inner=fl.optimizer(optax.sgd, learning_rate=0.5))
    run = fl.minimize(logistic_problem(), X0, solver, steps=20, stop=None)
    np.testing.assert_allclose(run.x, x, rtol=1e-12)
    assert float(run.value) == pytest.approx(h(x), rel=1e-13)
    assert float(run.gradient_norm) == pytest.approx(np.linalg.norm(A.T @ target_slope(A @ x) / 12), rel=1e-11)
    assert run.calls.as_dict() == {"gradient": 21}


def test_one_fixed_inner_step_on_minibatches_is_sgd_at_the_cost_of_sgd(x64):
    problem, sgd = logistic_problem(batch_size=3), fl.optimizer(optax.sgd, learning_rate=0.5)
    x = X0
    for rows, signs in batches(problem, 5, 20):
        x = x - 0.5 * rows.T @ target_slope(rows @ x, signs) / 3
    ours = fl.minimize(problem, X0, fl.target_surrogate(4.0, inner_steps=1, inner=sgd), steps=20, stop=None, key=5)
    plain = fl.minimize(problem, X0, sgd, steps=20, stop=None, key=5)
    np.testing.assert_allclose(ours.x, x, rtol=1e-12)
    np.testing.assert_allclose(plain.x, x, rtol=1e-12)
    assert ours.calls.as_dict() == plain.calls.as_dict() and int(ours.calls.minibatch) == 20


def intensities(x, rows):
    return jnp.abs(rows @ x - 5.0) ** 2


def test_complex_points(x64):
    # One fixed inner step once more: 1/(2n) Σ (|aᵢᵀx − 5|² − bᵢ)², whose steepest ascent is 2/n Σ (…) aᵢ (aᵢᵀx − 5).
    x0 = X0 + 0.5j * X0[::-1]
    x, labels = x0, 25 + NOISY
    for _ in range(5):
        residual = A @ x - 5
        x = x - 1e-3 * 2 * A.T @ ((np.abs(residual) ** 2 - labels) * residual) / 12
    solver = fl.target_surrogate(1.0, inner_steps=1, inner=fl.optimizer(optax.sgd, learning_rate=1e-3))
    problem = fl.TargetLoss(intensities, half_square, (A, labels))
    np.testing.assert_allclose(fl.minimize(problem, x0, solver, steps=5, stop=None).x, x, rtol=1e-12)


# --- projections in target space ------------------------------------------------------------------

MANY = {"inner_steps": 3000, "tolerance": 1e-14}


def to_the_end(eta, rows=12):
    """The heavy ball on the surrogate, with a step that its curvature allows."""
    largest = min(np.linalg.norm(A, 2) ** 2, rows * max(np.sum(A**2, axis=1))) / (rows * eta)
    return fl.optimizer(optax.sgd, learning_rate=1 / largest, momentum=0.9)


def test_a_linear_model_and_many_inner_steps_is_projected_gradient_descent(x64):
    eta, project = 4.0, A @ np.linalg.pinv(A)
    z = A @ X0
    for _ in range(6):
        z = project @ (z - eta * target_slope(z))
    solver = fl.target_surrogate(eta, inner=to_the_end(eta), **MANY)
    run = fl.minimize(logistic_problem(), X0, solver, steps=6, stop=None)
    np.testing.assert_allclose(A @ np.asarray(run.x), z, rtol=1e-9)


def test_one_step_at_eta_1_solves_least_squares(x64):
    solver = fl.target_surrogate(1.0, inner=to_the_end(1.0), **MANY)
    run = fl.minimize(fl.TargetLoss(linear, half_square, (A, NOISY)), X0, solver, steps=1, stop=None)
    np.testing.assert_allclose(run.x, np.linalg.lstsq(A, NOISY, rcond=None)[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "horizon", "etas"),
    [
        ("constant", None, [4.0, 4.0, 4.0, 4.0, 4.0]),
        ("inverse_sqrt", None, [4.0, 4 / np.sqrt(2), 4 / np.sqrt(3), 2.0, 4 / np.sqrt(5)]),
        ("exponential", 5, [4 * 5**-0.2, 4 * 5**-0.4, 4 * 5**-0.6, 4 * 5**-0.8, 0.8]),
    ],
)
def test_minibatches_project_the_step_on_the_rows_of_the_batch(x64, schedule, horizon, etas):
    problem, x = logistic_problem(batch_size=3), X0
    for eta, (rows, signs) in zip(etas, batches(problem, 2, 5), strict=True):
        x = x - eta * np.linalg.pinv(rows, rcond=1e-10) @ target_slope(rows @ x, signs)
    solver = fl.target_surrogate(4.0, inner=to_the_end(0.8, rows=3), schedule=schedule, horizon=horizon, **MANY)
    run = fl.minimize(problem, X0, solver, steps=5, stop=None, key=2)
    np.testing.assert_allclose(run.x, x, rtol=1e-7)


# --- Armijo ---------------------------------------------------------------------------------------


class Armijo:
    """The authors' search: the step is kept, and enlarged before each search."""

    def __init__(self, step=10.0, c=0.5, decrease=0.9, expand=1.8):
        self.step, self.c, self.decrease, self.expand, self.trials = step, c, decrease, expand, 0

    def __call__(self, f, x, value, gradient):
        self.step *= self.expand
        for trial in range(100):
            self.trials += 1
            if f(x - self.step * gradient) <= value - self.c * self.step * gradient @ gradient or trial == 99:
                return x - self.step * gradient
            self.step *= self.decrease


CURVATURES = np.array([1.0, 10.0, 0.3])


def bowl(x, curvatures):
    return jnp.sum(curvatures * x**2) / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"c": 0.1, "decrease": 0.5, "expand": 1.01}, {"step": 1e-3, "expand": 3.0}, {"step": 1e8}],
    ids=["authors", "other", "small", "too large for 100 trials"],
)
def test_armijo_is_the_search_of_the_authors(x64, options):
    search, x, steps = Armijo(**options), np.array([1.0, -2.0, 3.0]), 2 if "step" in options else 12
    for _ in range(steps):
        x = search(lambda x: np.sum(CURVATURES * x**2) / 2, x, np.sum(CURVATURES * x**2) / 2, CURVATURES * x)
    names = {"step": "step_size"}
    solver = fl.armijo(**{names.get(k, k): v for k, v in options.items()})
    run = fl.minimize(bowl, np.array([1.0, -2.0, 3.0]), solver, args=(CURVATURES,), steps=steps, stop=None)
    np.testing.assert_allclose(run.x, x, rtol=1e-10)
    assert run.calls.as_dict() == {"gradient": steps + 1, "value": search.trials}


def by_hand(x, steps, m, eta, rows_of, expand):
    """The whole algorithm on the linear logistic model; the point and the line search's trials."""
    trials = 0
    for t in range(steps):
        rows, signs = rows_of(t)
        z, b = rows @ x, len(rows)
        slope, search = target_slope(z, signs), Armijo(expand=expand)

        def q(x, rows=rows, z=z, slope=slope, b=b):
            return (slope @ (rows @ x - z) + np.sum((rows @ x - z) ** 2) / (2 * eta)) / b

        for _ in range(m):
            gradient = rows.T @ (slope + (rows @ x - z) / eta) / b
            x = search(q, x, q(x), gradient)
        trials += search.trials
    return x, trials


def test_the_whole_batch_with_its_line_search_and_accounts(x64):
    x, trials = by_hand(X0, 8, 5, 4.0, lambda t: (A, SIGNS), 1.8)
    solver = fl.target_surrogate(4.0, inner_steps=5)
    record = ("value", "target_gradients")
    run = fl.minimize(logistic_problem(), X0, solver, steps=8, stop=None, record=record)
    np.testing.assert_allclose(run.x, x, rtol=1e-9)
    assert run.calls.as_dict() == {"gradient": 1 + 8 * 5, "value": trials}
    np.testing.assert_array_equal(run.history["target_gradients"], np.arange(1, 10))
    assert float(run.value) == pytest.approx(h(x), rel=1e-12)


def test_minibatches_with_their_line_search_and_accounts(x64):
    problem = logistic_problem(batch_size=3)
    drawn = batches(problem, 7, 8)
    x, trials = by_hand(X0, 8, 5, 4.0, lambda t: drawn[t], 1.8 ** (3 / 12))
    solver = fl.target_surrogate(4.0, inner_steps=5)
    run = fl.minimize(problem, X0, solver, steps=8, stop=None, key=7, every=8, record=("value", "target_gradients"))
    np.testing.assert_allclose(run.x, x, rtol=1e-9)
    # The loop itself asks for the full value at the start, for the record of step 8, and for the solution.
    assert run.calls.as_dict() == {"gradient": 3, "minibatch": 8 * 5 + trials}
    np.testing.assert_array_equal(run.history["target_gradients"], [0, 8])
    assert float(run.value) == pytest.approx(h(np.asarray(run.x)), rel=1e-12)


def test_a_small_gradient_of_the_surrogate_ends_the_inner_steps(x64):
    sgd = fl.optimizer(optax.sgd, learning_rate=0.1)
    run = fl.minimize(
        logistic_problem(), X0, fl.target_surrogate(4.0, inner_steps=50, inner=sgd, tolerance=1e3), steps=6, stop=None
    )
    x = X0
    for _ in range(6):
        x = x - 0.1 * A.T @ target_slope(A @ x) / 12
    np.testing.assert_allclose(run.x, x, rtol=1e-12)  # one inner step each,
    assert run.calls.as_dict() == {"gradient": 1 + 6 * 2}  # and the look that found the gradient small


# --- what holds for every solver, here of the line search and of minibatches -----------------------


def test_the_calls_on_minibatches_are_those_made(x64):
    calls_are_those_made(
        Case(
            lambda: fl.target_surrogate(4.0, inner_steps=3),
            lambda: fl.target_surrogate(2.0, inner_steps=2),
            lambda dtype, tick: CountedTargets(dtype, tick, batch_size=4),
            near_the_saddle,
            steps=5,
        )
    )


@pytest.mark.parametrize(
    ("check", "inner"),
    [
        (calls_are_those_made, lambda: None),
        (numbers_never_recompile, lambda: None),
        (calls_are_those_made, lambda: fl.optimizer(optax.lbfgs)),
    ],
    ids=["armijo, calls", "armijo, numbers", "lbfgs, calls"],
)
def test_line_searches_conform(x64, check, inner):
    check(
        Case(
            lambda: fl.target_surrogate(4.0, inner_steps=4, inner=inner()),
            lambda: fl.target_surrogate(2.0, inner_steps=3, inner=inner()),
            CountedTargets,
            near_the_saddle,
            steps=3,
        )
    )


def test_the_loss_never_rises_in_single_precision(x32):
    problem = fl.TargetLoss(linear, logistic, (A.astype(np.float32), SIGNS.astype(np.float32)))
    run = fl.minimize(problem, X0.astype(np.float32), fl.target_surrogate(4.0, inner_steps=5), steps=100, stop=None)
    values = run.history["value"]
    assert run.x.dtype == np.float32 and values.dtype == np.float32
    # The value is a mean of 12 numbers of order one, each rounded.
    assert np.max(np.diff(values)) <= 4 * np.finfo(np.float32).eps
    assert float(run.gradient_norm) < 1e-3 * np.linalg.norm(A.T @ target_slope(A @ X0) / 12)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.0}, "eta: got 0.0"),
        ({"eta": float("nan")}, "eta: got nan"),
        ({"inner_steps": 0}, "inner_steps: got 0"),
        ({"inner_steps": 1.5}, "inner_steps: got 1.5"),
        ({"tolerance": -1e-6}, "tolerance: got -1e-06"),
        ({"schedule": "exponental"}, "did you mean 'exponential'"),
        ({"schedule": "exponential"}, "horizon: got None; expected the number of steps T"),
        ({"schedule": "exponential", "horizon": 0}, "horizon: got 0"),
        ({"horizon": 10}, "horizon: got 10; expected None"),
        ({"inner": optax.sgd(0.1)}, "inner: got .*; expected optimizer"),
        ({"inner": fl.perturbed_gradient_descent(0.1)}, "inner: got PerturbedGradientDescent"),
    ],
)
def test_bad_numbers(options, words):
    with pytest.raises(fl.InputError, match=words):
        fl.target_surrogate(**{"eta": 1.0, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.0},
        {"c": 0.0},
        {"c": 1.0},
        {"decrease": 0.0},
        {"decrease": 1.0},
        {"expand": 1.0},
        {"expand": -2.0},
    ],
)
def test_bad_numbers_of_the_line_search(options):
    ((name, number),) = options.items()
    with pytest.raises(fl.InputError, match=f"{name}: got {number}"):
        fl.armijo(**options)


@pytest.mark.parametrize(
    ("model", "loss", "data", "words"),
    [
        (3, half_square, (A, NOISY), "model: got int"),
        (linear, None, (A, NOISY), "loss: got NoneType"),
        (linear, half_square, A, "data: got ndarray; expected a pair"),
        (linear, half_square, (A, NOISY[:5]), "data: got float64.12,4., float64.5."),
        (lambda x, rows: rows.T @ rows @ x, half_square, (A, NOISY), "model: got float64.4. from 12 rows"),
        (lambda x, rows: jnp.sum(rows @ x), half_square, (A, NOISY), "model: got float64.. from 12 rows"),
        (lambda x, rows: (rows @ x, rows @ x), half_square, (A, NOISY), "model: got float64.12., float64.12. from 12"),
        (lambda x, rows: jnp.sign(rows @ x).astype(int), half_square, (A, NOISY), "model: got int64.12. from 12 rows"),
        (lambda x, rows: rows @ x + 1j, half_square, (A, NOISY), "model: got complex128.12. from 12 rows"),
        (linear, lambda z, y: jnp.mean((z - y) ** 2), (A, NOISY), "loss: got float64.. from 12 rows"),
        (linear, lambda z, y: (z - y[:, None]) ** 2, (A, NOISY), "loss: got float64.12,12. from 12 rows"),
    ],
)
def test_bad_problems(x64, model, loss, data, words):
    with pytest.raises(fl.InputError, match=words):
        fl.minimize(fl.TargetLoss(model, loss, data), X0, fl.target_surrogate(1.0), steps=1)


def test_a_problem_without_targets_is_refused(x64):
    finite_sum = fl.FiniteSum(lambda x, rows: (rows @ x) ** 2, A)
    for problem in (lambda x: jnp.sum(x**2), finite_sum):
        with pytest.raises(fl.InputError, match="without the oracle 'target_gradient'"):
            fl.minimize(problem, X0, fl.target_surrogate(1.0))
