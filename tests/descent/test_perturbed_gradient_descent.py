"""Perturbed gradient descent against Algorithm 2 of Jin et al. (2017), written again in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline import Ending, Verdict
from fallline.core import trees
from fallline.core.problem import Problem, bind
from fallline.parts.sampling import uniform_ball
from fallline.problems import saddle

DIAGONAL = np.array([-1.0, 1.0, 3.0])
PARAMETERS = {
    "step_size": 0.1,
    "radius": 1e-2,
    "gradient_threshold": 1e-3,
    "decrease_threshold": 1e-4,
    "patience": 90,
}


def quartic(x, d):
    return jnp.sum(d * x**2 / 2 + x**4 / 4)


def algorithm_2(x, parameters, perturbation, steps, d=DIAGONAL):
    """The paper's loop. Returns x̃ where it returns (else None), the iterates, the steps and the gradients asked."""
    eta, g_thres = parameters["step_size"], parameters["gradient_threshold"]
    f_thres, t_thres = parameters["decrease_threshold"], parameters["patience"]

    def f(x):
        return np.sum(d * x**2 / 2 + x**4 / 4)

    def grad(x):
        return d * x + x**3

    x_tilde, t_noise = None, -t_thres - 1
    iterates, asked, noisy = [x], 1, []
    for t in range(steps):
        if np.linalg.norm(grad(x)) <= g_thres and t - t_noise > t_thres:
            x_tilde, t_noise = x, t
            x = x_tilde + perturbation(t)
            asked += 1
            noisy.append(t)
        if t - t_noise == t_thres and f(x) - f(x_tilde) > -f_thres:
            return x_tilde, iterates, t, asked, noisy
        x = x - eta * grad(x)
        asked += 1
        iterates.append(x)
    return None, iterates, steps, asked, noisy


def perturbations(seed, radius, dtype):
    """What the solver draws at the paper's step t, in a run of `minimize` with this seed."""
    key, like = jax.random.key(seed), jnp.zeros(3, dtype)
    return lambda t: np.asarray(uniform_ball(jax.random.fold_in(key, t + 1), like, dtype.type(radius)))


def run(x0, parameters, seed, **kwargs):
    return fl.minimize(
        quartic, x0, fl.perturbed_gradient_descent(**parameters), args=(DIAGONAL.astype(x0.dtype),), key=seed, **kwargs
    )


# --- against the paper's loop ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ([0.0, 0.0, 0.0], {}),  # at the saddle: out of it, then a perturbation that leads nowhere
        ([0.5, -1.0, 0.3], {}),
        ([0.0, 1.5, -1.0], {}),  # along the stable manifold into the saddle
        ([0.0, 0.0, 0.0], {"patience": 20, "radius": 1e-4}),  # too little patience: the saddle is returned
        ([0.2, 0.1, 0.0], {"patience": 1, "decrease_threshold": 1e-9}),
        ([0.9, 0.0, 0.0], {"gradient_threshold": 5.0, "patience": 3, "decrease_threshold": 1e-3}),  # noise all the time
    ],
)
def test_same_iterates_and_same_return_as_algorithm_2(x64, start, changes):
    parameters, x0 = {**PARAMETERS, **changes}, np.array(start)
    draw = perturbations(3, parameters["radius"], x0.dtype)
    expected, iterates, t, asked, noisy = algorithm_2(x0, parameters, draw, 1000)
    assert expected is not None

    solution = run(x0, parameters, 3)
    np.testing.assert_allclose(solution.x, expected, rtol=1e-10, atol=1e-13)
    assert solution.status.ending is Ending.CONVERGED and solution.status.met == "PerturbedGradientDescent's own test"
    assert int(solution.steps) == t + 1  # returning is a step of its own
    assert int(solution.state.perturbations) == len(noisy)
    assert int(solution.calls.gradient) == asked and solution.calls.as_dict() == {"gradient": asked}
    assert float(solution.value) == pytest.approx(float(quartic(expected, DIAGONAL)), rel=1e-12, abs=1e-15)
    gradient_norm = np.linalg.norm(DIAGONAL * expected + expected**3)
    assert float(solution.gradient_norm) == pytest.approx(gradient_norm, rel=1e-6, abs=1e-15)
    # What is returned is the point before the perturbation, not the one that the waiting led to.
    assert np.linalg.norm(iterates[-1] - expected) > 1e-12

    # The iterates between, from runs that are cut short.
    for steps in sorted({1, 2, *(n + 1 for n in noisy), *(n + 2 for n in noisy), t // 2, t}):
        if steps <= t:
            shorter = run(x0, parameters, 3, steps=steps)
            np.testing.assert_allclose(shorter.x, iterates[steps], rtol=1e-10, atol=1e-13)


def test_single_precision_keeps_its_type(x32):
    x0 = np.zeros(3, np.float32)
    expected, _, t, _, _ = algorithm_2(x0, PARAMETERS, perturbations(3, 1e-2, x0.dtype), 1000)
    solution = run(x0, PARAMETERS, 3)
    assert solution.x.dtype == np.float32 and int(solution.steps) == t + 1
    np.testing.assert_allclose(solution.x, expected, rtol=1e-5, atol=1e-6)


def test_the_number_of_calls_is_the_number_of_calls(x64):
    asked = []

    class Counted(Problem):
        diagonal: jax.Array

        def value_and_gradient(self, x):
            jax.debug.callback(lambda: asked.append(1))
            return quartic(x, self.diagonal), self.diagonal * x + x**3

        def value(self, x):
            jax.debug.callback(lambda: asked.append(0))
            return quartic(x, self.diagonal)

    solver = fl.perturbed_gradient_descent(**PARAMETERS)
    solution = fl.minimize(Counted(jnp.asarray(DIAGONAL)), np.zeros(3), solver, key=0)
    jax.effects_barrier()
    assert asked == [1] * int(solution.calls.gradient)
    assert int(solution.state.perturbations) == 2
    # One at the start, one for each step but the last, which returns, and one more for each perturbation.
    assert len(asked) == 1 + int(solution.steps) - 1 + 2


# --- saddles --------------------------------------------------------------------------------------


def test_gradient_descent_stays_at_the_exact_saddle_and_the_perturbation_leaves_it(x64):
    instance = saddle()
    x0 = instance.start(jax.random.key(0))
    stuck = fl.minimize(instance.problem, x0, fl.optimizer(optax.sgd, learning_rate=0.05), steps=300, stop=None)
    assert not np.any(stuck.x) and float(stuck.gradient_norm) == 0
    assert fl.certify(instance.problem, stuck.x).verdict is Verdict.STRICT_SADDLE

    solver = fl.perturbed_gradient_descent(0.05, gradient_threshold=1e-8, decrease_threshold=1e-10, patience=300)
    solution = fl.minimize(instance.problem, x0, solver, key=0, steps=5000, throw=True)
    assert instance.measure(solution.x)["distance to the nearest minimizer"] < 1e-7
    assert float(solution.value) == pytest.approx(-0.25, abs=1e-14)
    certificate = fl.certify(instance.problem, solution.x)
    assert certificate.verdict is Verdict.GLOBAL_MINIMUM and certificate.lower > 0


@pytest.mark.parametrize(("precision", "radius"), [("float64", 1e-100), ("float32", 1e-30)])
def test_a_tiny_radius_is_enough_with_patience_and_only_with_it(precision, radius):
    # The way out grows by 1.1 a step: ln(1/r)/ln(1.1) steps, 2,416 for 1e-100 and 725 for 1e-30.
    with jax.enable_x64(precision == "float64"):
        x0 = np.zeros(3, precision)
        needed = math.log(1 / radius) / math.log(1.1)
        parameters = {**PARAMETERS, "radius": radius}
        patient = run(x0, {**parameters, "patience": int(1.2 * needed)}, 0, steps=20_000)
        hasty = run(x0, {**parameters, "patience": int(0.8 * needed)}, 0, steps=20_000)
    assert abs(abs(float(patient.x[0])) - 1) < 1e-3
    assert not np.any(hasty.x) and hasty.status.ending is Ending.CONVERGED


def test_complex_points_and_trees(x64):
    # Σ (|z|² − 1)² + (r² − 4)²: at zero all directions go down.
    def fn(x):
        z = x["z"]
        return jnp.sum((z.real**2 + z.imag**2 - 1) ** 2) + (x["r"] ** 2 - 4) ** 2 / 16

    x0 = {"z": np.zeros(2, complex), "r": np.zeros(())}
    solver = fl.perturbed_gradient_descent(0.05, gradient_threshold=1e-6, decrease_threshold=1e-9, patience=150)
    solution = fl.minimize(fn, x0, solver, key=1, steps=3000, throw=True)
    np.testing.assert_allclose(np.abs(solution.x["z"]), 1, atol=1e-6)
    assert abs(float(solution.x["r"])) == pytest.approx(2, abs=1e-5)


def test_a_step_limit_is_no_return(x64):
    solution = run(np.zeros(3), PARAMETERS, 0, steps=10)
    assert solution.status.ending is Ending.STEP_LIMIT and not bool(solution.state.done)
    assert not np.any(solution.state.before) and np.any(solution.x)


# --- the paper's parameters -----------------------------------------------------------------------


def test_theory_parameters_by_hand():
    # ln(dℓΔ/(cε²δ)) = ln(600 / 5e-6) = ln 1.2 + 8 ln 10, above 4.
    chi = 3 * (0.1823215567939546 + 8 * 2.302585092994046)
    out = fl.theory_parameters(
        smoothness=2.0, hessian_lipschitz=0.5, epsilon=0.01, dimension=100, gap=3.0, failure_probability=0.1, c=0.5
    )
    assert out == {
        "step_size": 0.25,
        "radius": pytest.approx(0.7071067811865476 * 0.01 / (2 * chi**2), rel=1e-14),
        "gradient_threshold": pytest.approx(0.7071067811865476 * 0.01 / chi**2, rel=1e-14),
        "decrease_threshold": pytest.approx(0.5 / chi**3 * 1.4142135623730951e-3, rel=1e-14),
        "patience": math.ceil(chi * 2 / (0.25 * 0.07071067811865475)),
    }
    # A small logarithm counts as 4: χ = 12.
    small = fl.theory_parameters(smoothness=1.0, hessian_lipschitz=1.0, epsilon=1.0, dimension=1, gap=0.25, c=0.25)
    assert small == {
        "step_size": 0.25,
        "radius": pytest.approx(0.5 / 144, rel=1e-15),
        "gradient_threshold": pytest.approx(0.5 / 144, rel=1e-15),
        "decrease_threshold": pytest.approx(0.25 / 1728, rel=1e-15),
        "patience": 192,
    }
    assert fl.perturbed_gradient_descent(**small).patience == 192


def test_theory_parameters_reach_second_order_stationary_points(x64):
    # cos x + y²/2 has ℓ = ρ = 1; from the saddle at 0, λ_min = −cos x must be at least −√(ρε).
    epsilon = 0.1
    parameters = fl.theory_parameters(smoothness=1.0, hessian_lipschitz=1.0, epsilon=epsilon, dimension=2, gap=2.0)
    solver = fl.perturbed_gradient_descent(**parameters)
    for seed in range(5):
        solution = fl.minimize(
            lambda x: jnp.cos(x[0]) + x[1] ** 2 / 2, np.zeros(2), solver, key=seed, steps=20_000, throw=True
        )
        assert float(solution.gradient_norm) <= epsilon
        assert -math.cos(float(solution.x[0])) >= -math.sqrt(epsilon)


# --- refusals -------------------------------------------------------------------------------------


def test_a_key_is_needed(x32):
    with pytest.raises(fl.InputError, match=r"^key: got None; expected .*PerturbedGradientDescent is random"):
        fl.minimize(lambda x: x @ x, np.ones(2, np.float32), fl.perturbed_gradient_descent(0.1))


@pytest.mark.parametrize("name", ["step_size", "radius", "gradient_threshold", "decrease_threshold"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "0.1", [0.1]])
def test_numbers_must_be_positive(name, value):
    with pytest.raises(fl.InputError, match=f"^{name}: got .*; expected a (finite )?number"):
        fl.perturbed_gradient_descent(**{**PARAMETERS, name: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, math.nan, "3"])
def test_patience_must_be_a_count(value):
    with pytest.raises(fl.InputError, match="^patience: got"):
        fl.perturbed_gradient_descent(0.1, patience=value)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"smoothness": 0.0}, "smoothness"),
        ({"hessian_lipschitz": -1.0}, "hessian_lipschitz"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": 1.1}, "epsilon"),  # above ℓ²/ρ
        ({"gap": math.inf}, "gap"),
        ({"dimension": 0}, "dimension"),
        ({"dimension": 1.5}, "dimension"),
        ({"failure_probability": 0.0}, "failure_probability"),
        ({"failure_probability": 1.0}, "failure_probability"),
        ({"c": 0.0}, "c"),
    ],
)
def test_theory_parameters_refuse(changes, argument):
    good = {"smoothness": 1.0, "hessian_lipschitz": 1.0, "epsilon": 0.1, "dimension": 2, "gap": 1.0}
    with pytest.raises(fl.InputError, match=f"^{argument}: got"):
        fl.theory_parameters(**{**good, **changes})


def test_numbers_are_data(x64):
    # Another number is no other program: the step is compiled once.
    point, rebuild = trees.split(np.zeros(3))
    problem = bind(quartic, point, rebuild, args=(DIAGONAL,))
    key = jax.random.key(0)

    @jax.jit
    def step(solver, state):
        return solver.step(problem, state, key=key)

    def solver(radius):
        return jax.tree.map(jnp.asarray, fl.perturbed_gradient_descent(**{**PARAMETERS, "radius": radius}))

    moved = []
    for radius in (1e-2, 2e-2):
        state = solver(radius).init(problem, jnp.zeros(3), key=key)
        moved.append(np.asarray(step(solver(radius), state).x))
    assert step._cache_size() == 1
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-3)
