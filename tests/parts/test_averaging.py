"""Averages of iterates against sums in NumPy over points that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core.calls import Calls
from fallline.core.solver import Solver, State
from fallline.distributed.aggregators import Mean
from fallline.distributed.round import Round
from fallline.distributed.rules import Gradient, Step
from fallline.distributed.sharded import Sharded
from fallline.parts.averaging import Averaged
from fallline.parts.codecs import Plain

START = np.array([1.0, -2.0, 0.5])
CURVATURES = np.array([1.0, 3.0, 0.25])
RATE = 0.3


def bowl(x):
    return jnp.sum(jnp.asarray(CURVATURES, x.dtype) * x**2) / 2


def descent():
    return fl.optimizer(optax.sgd, learning_rate=RATE)


def points(steps):
    """x_0 … x_{T−1} of gradient descent on the bowl."""
    return (1 - RATE * CURVATURES) ** np.arange(steps)[:, None] * START


def run(solver, steps, x0=START, problem=bowl):
    return fl.minimize(problem, x0, solver, steps=steps, stop=None, key=0)


@pytest.mark.parametrize(("power", "shift"), [(0, 1.0), (1, 2.5), (2, 7.0), (2, 1.0), (0.5, 0.1)])
def test_the_average_is_the_weighted_sum(x64, power, shift):
    for steps in (1, 2, 17):
        weights = (np.arange(steps) + shift) ** power
        expected = weights @ points(steps) / weights.sum()
        np.testing.assert_allclose(run(Averaged(descent(), power, shift), steps).x, expected, rtol=1e-13)


def test_the_solver_goes_on_from_its_own_points(x64):
    averaged, alone = run(Averaged(descent(), 2, 3.0), 9), run(descent(), 9)
    assert np.array_equal(averaged.state.inner.x, alone.x)
    assert not np.allclose(averaged.x, alone.x)


def test_no_step_is_the_start_and_one_step_too(x64):
    assert np.array_equal(run(Averaged(descent()), 0).x, START)
    assert np.array_equal(run(Averaged(descent()), 1).x, START)


@pytest.mark.parametrize("shift", [1.0, 31.0])
def test_the_rate_is_that_of_the_closed_form(x32, shift):
    """ρ_t = 6 (t + a)² / ((1 + t)(6a² + t + 6at + 2t²)) for p = 2, after 20,000 recursions in float32."""
    t = 20_000
    solution = run(Averaged(descent(), 2, shift), t, np.ones(3, np.float32), lambda x: jnp.sum(x**2))
    rate = 6 * (t + shift) ** 2 / ((1 + t) * (6 * shift**2 + t + 6 * shift * t + 2 * t**2))
    np.testing.assert_allclose(1 / float(solution.state.weight), rate, rtol=1e-4)


def test_value_and_gradient_norm_are_those_of_the_average(x64):
    solution = run(Averaged(descent(), 2, 3.0), 9)
    np.testing.assert_allclose(solution.value, CURVATURES @ solution.x**2 / 2, rtol=1e-14)
    np.testing.assert_allclose(solution.gradient_norm, np.linalg.norm(CURVATURES * solution.x), rtol=1e-14)
    assert solution.state.calls.as_dict() == {"gradient": 10}  # the solver's own: one a step, and at the start


def test_pytrees_and_complex_leaves(x64):
    def loss(x):
        return jnp.sum(jnp.abs(x["z"]) ** 2) / 2 + bowl(x["v"])

    x0 = {"z": np.array([1 + 2j, -1j]), "v": START}
    solution = run(Averaged(descent(), 1, 1.0), 6, x0, loss)
    weights = np.arange(1.0, 7.0) / 21
    np.testing.assert_allclose(solution.x["v"], weights @ points(6), rtol=1e-13)
    np.testing.assert_allclose(solution.x["z"], weights @ (1 - RATE) ** np.arange(6) * x0["z"], rtol=1e-13)


def test_a_round_keeps_its_parts(x64):
    problem = Sharded(lambda x, batch: jnp.sum((x - batch) ** 2, axis=1) / 2, np.array([[[1.0, 0.0]], [[3.0, 4.0]]]))
    round_ = Round(Gradient(), Plain(), Mean(), Plain(), Step(optax.sgd, learning_rate=0.5), label="Mine")
    solver = Averaged(round_, 0, 1.0)
    solution = run(solver, 3, np.zeros(2), problem)
    center = np.array([2.0, 2.0])
    np.testing.assert_allclose(solution.x, center * np.mean([0.0, 0.5, 0.75]), rtol=1e-14)
    assert solver.needs == round_.needs and solver.name == "Mine, averaged" and not solver.random
    assert solver.stopping() is None and float(solution.state.inner.bytes_up) == 3 * 2 * 16
    with pytest.raises(fl.InputError, match="without the oracle 'workers'"):
        run(solver, 3, np.zeros(2), lambda x: jnp.sum(x**2))


class Halves(Solver):
    """x ← x/2 until it is below 1."""

    def init(self, problem, x, *, key):
        return Halved(x, Calls(), jnp.bool_(False))

    def step(self, problem, state, *, key):
        x = state.x / 2
        return Halved(x, state.calls, jnp.max(jnp.abs(x)) < 1)


class Halved(State):
    done: jax.Array


def test_the_end_of_the_solver_is_the_end(x64):
    solution = fl.minimize(bowl, np.full(3, 16.0), Averaged(Halves(), 0, 1.0))
    assert solution.status.converged and solution.steps == 5
    np.testing.assert_allclose(solution.x, np.full(3, (16 + 8 + 4 + 2 + 1) / 5), rtol=1e-14)


def test_a_lost_step_is_told_of(x64):
    lost = np.zeros((3, 1, 2))
    lost[1] = np.inf
    problem = Sharded(lambda x, batch: jnp.sum(x * batch, axis=1) ** 2, lost)
    solver = Averaged(Round(Gradient(), Plain(), Mean(), Plain(), Step(optax.sgd, learning_rate=0.5)))
    solution = run(solver, 3, np.ones(2), problem)
    assert solution.status.ending is fl.Ending.DIVERGED
    assert "worker 1 sent a message that is not finite" in str(solution.status)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (lambda: (optax.sgd(0.1),), "solver"),
        (lambda: (descent(), -1.0), "power"),
        (lambda: (descent(), 2.0, 0.0), "shift"),
        (lambda: (descent(), 2.0, np.inf), "shift"),
    ],
)
def test_bad_input(arguments, named):
    with pytest.raises(fl.InputError, match=rf"^{named}:"):
        Averaged(*arguments())
