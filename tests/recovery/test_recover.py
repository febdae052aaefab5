"""`recover`: which start, solver and stop its arguments mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.recovery.losses import Absolute, Amplitude, Intensity
from fallline.recovery.operators import Dense
from fallline.recovery.problem import Recovery
from fallline.recovery.recover import default_stop, recover
from fallline.recovery.starts import STARTS, random, signs, spectral, start
from fallline.recovery.structures import Factors, TwoFactors

pytestmark = pytest.mark.usefixtures("x64")

N, M = 12, 120
RNG = np.random.default_rng(0)
ROWS, SIGNAL = RNG.standard_normal((M, N)), RNG.standard_normal(N)
INTENSITIES = (ROWS @ SIGNAL) ** 2
LEFT, RIGHT = RNG.standard_normal((4, 1)), RNG.standard_normal((3, 1))
LINEAR = ROWS @ (LEFT @ RIGHT.T).ravel()
KEY = jax.random.key(3)
START_KEY = jax.random.fold_in(KEY, 2**31)  # whoever drew the rows by KEY does not start at one of them


def intensities(**options):
    return recover(jnp.asarray(ROWS), jnp.asarray(INTENSITIES), loss=Amplitude(), **{"key": KEY, **options})


def low_rank(**options):
    op = Dense(jnp.asarray(ROWS), (4, 3))
    return recover(op, jnp.asarray(LINEAR), TwoFactors(1), key=KEY, **options)


def begun(run, **options):
    """The starting point."""
    return run(steps=0, **options).x


@pytest.mark.parametrize("name", STARTS)
def test_names_of_starts_for_intensities(name):
    problem = Recovery(jnp.asarray(ROWS), jnp.asarray(INTENSITIES), loss=Amplitude())
    np.testing.assert_array_equal(begun(intensities, init=name), start(name)(problem, START_KEY))


def test_names_of_starts_for_low_rank():
    problem = Recovery(Dense(jnp.asarray(ROWS), (4, 3)), jnp.asarray(LINEAR), TwoFactors(1))
    for name, begin in {"spectral": spectral, "signs": signs, "random": random(), "auto": spectral}.items():
        for got, want in zip(begun(low_rank, init=name), begin(problem, START_KEY), strict=True):
            np.testing.assert_array_equal(got, want)


def test_the_default_start_of_intensities_is_the_optimal_one():
    np.testing.assert_array_equal(begun(intensities), begun(intensities, init="optimal"))
    problem = Recovery(jnp.asarray(ROWS), jnp.asarray(INTENSITIES), loss=Amplitude())
    np.testing.assert_array_equal(begun(intensities, init="random"), random()(problem, START_KEY))


def test_a_point_or_a_function_as_start():
    x0 = jnp.asarray(RNG.standard_normal(N))
    np.testing.assert_array_equal(begun(intensities, init=x0), x0)
    seen = []

    def begin(problem, key):
        seen.append((problem, key))
        return x0

    np.testing.assert_array_equal(begun(intensities, init=begin), x0)
    ((problem, key),) = seen
    assert isinstance(problem, Recovery) and key == START_KEY
    factors = Factors(jnp.asarray(LEFT), jnp.asarray(RIGHT))
    for got, want in zip(begun(low_rank, init=factors), factors, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_seed_is_a_key():
    by_seed, by_key = (intensities(init="random", steps=0, key=key) for key in (5, jax.random.key(5)))
    np.testing.assert_array_equal(by_seed.x, by_key.x)


def test_the_default_solver_is_gradient_descent_with_the_losses_step():
    x0 = jnp.asarray(SIGNAL + 0.1 * RNG.standard_normal(N))
    problem = Recovery(jnp.asarray(ROWS), jnp.asarray(INTENSITIES), loss=Amplitude())
    by_hand = x0 - 0.6 * problem.gradient(x0)
    np.testing.assert_allclose(intensities(init=x0, steps=1).x, by_hand, rtol=1e-12)
    other = intensities(init=x0, steps=1, solver=fl.optimizer(optax.sgd, learning_rate=0.2)).x
    np.testing.assert_allclose(other, x0 - 0.2 * problem.gradient(x0), rtol=1e-12)


def test_the_default_stop_is_relative_to_the_size_of_the_signal():
    end = intensities(steps=500)
    assert end.status.converged
    radius = np.sqrt(INTENSITIES.sum() / ((ROWS**2).sum() / N))
    assert end.gradient_norm <= 1e-8 * radius
    assert end.history["gradient_norm"][-2] > 1e-8 * radius
    problem = Recovery(jnp.asarray(ROWS), jnp.asarray(1e6 * INTENSITIES), loss=Amplitude())
    assert default_stop(problem).describe() == f"gradient_norm({1e-8 * 1e3 * radius:g})"


def test_other_rules_and_options_go_to_minimize():
    end = intensities(stop=fl.gradient_norm(1e-2), steps=500, record=("value",))
    assert end.gradient_norm <= 1e-2 and set(end.history) == {"value", "step"}
    assert intensities(stop=None, steps=7).steps == 7


@pytest.mark.parametrize("run", [intensities, low_rank])
def test_the_signal_is_recovered(run):
    end = run(steps=500)
    assert end.status.converged
    problem, truth = (
        (Recovery(jnp.asarray(ROWS), jnp.asarray(INTENSITIES), loss=Amplitude()), jnp.asarray(SIGNAL))
        if run is intensities
        else (
            Recovery(Dense(jnp.asarray(ROWS), (4, 3)), jnp.asarray(LINEAR), TwoFactors(1)),
            Factors(jnp.asarray(LEFT), jnp.asarray(RIGHT)),
        )
    )
    assert problem.distance(end.x, truth) < 1e-6


@pytest.mark.parametrize(
    ("run", "options", "said"),
    [
        (intensities, {"init": "spectrum"}, "init: got 'spectrum'; expected one of auto, spectral, truncated"),
        (low_rank, {"init": "optimal"}, "init: got 'optimal'; expected one of auto, spectral, signs, random"),
        (intensities, {"solver": "sgd"}, "solver: got str"),
        (intensities, {"stop": "never"}, "stop: got 'never'"),
        (intensities, {"key": "seed"}, "key: got str"),
        (intensities, {"init": np.zeros(N + 1, np.float32)}, "problem: got Recovery"),
    ],
)
def test_refused(run, options, said):
    with pytest.raises(fl.InputError, match=said):
        run(**options)


def test_a_loss_without_a_step_size_needs_a_solver():
    op, y = Dense(jnp.asarray(ROWS), (4, 3)), jnp.asarray(LINEAR)
    with pytest.raises(fl.InputError, match="solver: got None; expected a solver: Absolute"):
        recover(op, y, TwoFactors(1), Absolute())


def test_negative_intensities_are_refused():
    with pytest.raises(fl.InputError, match=r"y: got -1 at \[4\]"):
        recover(jnp.asarray(ROWS), jnp.asarray(INTENSITIES).at[4].set(-1.0), loss=Intensity())


def test_a_plain_linear_signal_starts_at_random_and_ends_at_least_squares(x64):
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(60, 8))
    y = rows @ draw.normal(size=8) + 0.1 * draw.normal(size=60)
    found = recover(rows, y)
    np.testing.assert_allclose(found.x, np.linalg.lstsq(rows, y, rcond=None)[0], atol=1e-6)
    with pytest.raises(fl.InputError, match="init: got 'spectral'; expected one of auto, random"):
        recover(rows, y, init="spectral")
