"""Stopping rules against the same tests on a history by NumPy, alone and combined."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core.stopping import Seen, StoppingRule

# ½ x² with step size ½: x = 2⁻ᵗ, value = ½ 4⁻ᵗ, gradient norm = 2⁻ᵗ, 1 + t gradients: all exact.
HALVING = fl.optimizer(optax.sgd, learning_rate=0.5)


def half_square(x):
    return 0.5 * x**2


def halve(stop, problem=half_square, steps=60, **options):
    return fl.minimize(problem, np.float32(1), HALVING, stop=stop, steps=steps, **options)


BOUNDED = fl.Objective(lambda x: 3 + half_square(x), lower_bound=3.0)


@pytest.mark.parametrize(
    ("stop", "ending", "step", "met"),
    [
        (fl.gradient_norm(2.0**-10), "converged", 10, "gradient_norm(0.000976562)"),
        (fl.gradient_norm(2.0**-10 * 0.999), "converged", 11, "gradient_norm(0.000975586)"),
        ("auto", "converged", 20, "gradient_norm(1e-06)"),
        (None, "step limit", 60, None),
        (fl.call_budget(9), "budget", 8, "call_budget(9)"),
        (fl.call_budget(9.5), "budget", 9, "call_budget(9.5)"),
        (fl.call_budget(9, gradient=2.0), "budget", 4, "call_budget(9)"),
        (fl.call_budget(1), "budget", 0, "call_budget(1)"),
        (fl.time_limit(1e-9), "budget", 1, "time_limit(1e-09)"),
    ],
)
def test_each_rule(stop, ending, step, met):
    solution = halve(stop)
    assert (solution.status.name, int(solution.steps), solution.status.met) == (ending, step, met)
    assert solution.x == 2.0**-step
    assert bool(solution.status.converged) == (ending == "converged")
    assert str(solution.status) == (f"{ending} by {met} at step {step}" if met else f"{ending} at step {step}")
    assert (solution.status.advice == "") == (ending == "converged")


def test_residual():
    """½ 4⁻ᵗ ≤ 2⁻⁹ at t = 4, above the declared bound."""
    solution = halve(fl.residual(2.0**-9), BOUNDED)
    assert str(solution.status) == "converged by residual(0.00195312) at step 4"


def slow(x):
    """Value 1 + ½ x² along x = 2⁻ᵗ: the relative decrease shrinks by 4 in each step."""
    return 1 + 0.5 * x**2


@pytest.mark.parametrize("tolerance", [0.2, 1e-2, 1e-4])
@pytest.mark.parametrize("window", [1, 3])
def test_decrease(tolerance, window):
    values = 1 + 0.5 * 0.25 ** np.arange(60)
    best, age, end = np.inf, 0, None
    for t, value in enumerate(values):
        if t == 0 or value <= best - tolerance * abs(best):
            best, age = value, 0
        else:
            age += 1
        if age >= window:
            end = t
            break
    solution = halve(fl.decrease(tolerance, window=window), slow)
    assert str(solution.status) == f"converged by decrease({tolerance:g}, window={window}) at step {end}"


def test_decrease_below_zero():
    """A negative value falls by the tolerance of its size: −1, −1.6, −1.9, −2.05, … towards −2.2."""
    values = -2.2 + 1.2 * 0.5 ** np.arange(60)
    reference = values[0]
    for step, value in enumerate(values):
        if step and value > reference - 0.05 * abs(reference):
            break
        reference = value
    rule = fl.decrease(0.05, window=1)
    rate = (1 - np.sqrt(0.5)) / 2.4  # the gradient is 2.4 x: the square of x halves in each step
    solver = fl.optimizer(optax.sgd, learning_rate=rate)
    solution = fl.minimize(lambda x: -2.2 + 1.2 * x**2, np.float32(1), solver, stop=rule)
    assert int(solution.steps) == step > 2


@pytest.mark.parametrize(
    ("stop", "ending", "step", "met"),
    [
        # Either: whichever comes first ends the run; of two at once, the one that the user wrote first.
        (fl.gradient_norm(2.0**-3) | fl.call_budget(20), "converged", 3, "gradient_norm(0.125)"),
        (fl.gradient_norm(2.0**-9) | fl.call_budget(6), "budget", 5, "call_budget(6)"),
        (fl.gradient_norm(2.0**-5) | fl.call_budget(6), "converged", 5, "gradient_norm(0.03125)"),
        (fl.call_budget(6) | fl.gradient_norm(2.0**-5), "budget", 5, "call_budget(6)"),
        (fl.call_budget(6) | (fl.gradient_norm(0.0) | fl.gradient_norm(1.0)), "converged", 0, "gradient_norm(1)"),
        # Both: at the same point.
        (
            fl.gradient_norm(2.0**-3) & fl.residual(2.0**-15),
            "converged",
            7,
            "(gradient_norm(0.125) & residual(3.05176e-05))",
        ),
        (
            fl.gradient_norm(2.0**-9) & fl.residual(2.0**-3),
            "converged",
            9,
            "(gradient_norm(0.00195312) & residual(0.125))",
        ),
        # A budget within makes the pair no success.
        (fl.gradient_norm(2.0**-3) & fl.call_budget(7), "budget", 6, "(gradient_norm(0.125) & call_budget(7))"),
        (
            (fl.gradient_norm(2.0**-3) & fl.residual(2.0**-15)) | fl.call_budget(5),
            "budget",
            4,
            "call_budget(5)",
        ),
        (
            (fl.gradient_norm(2.0**-6) | fl.call_budget(3)) & fl.residual(2.0**-9),
            "budget",
            4,
            "(call_budget(3) & residual(0.00195312))",
        ),
        (
            fl.residual(2.0**-3) & (fl.call_budget(20) | fl.gradient_norm(2.0**-6)),
            "converged",
            6,
            "(residual(0.125) & gradient_norm(0.015625))",
        ),
    ],
)
def test_combinations(stop, ending, step, met):
    problem = fl.Objective(half_square, lower_bound=0.0)
    solution = halve(stop, problem)
    assert (solution.status.name, int(solution.steps), solution.status.met) == (ending, step, met)


def test_the_window_belongs_to_its_rule():
    """Two memories in one pair, and a rule beside it."""
    pair = fl.decrease(1e-2, window=1) & fl.decrease(1e-2, window=3)
    alone = int(halve(fl.decrease(1e-2, window=3), slow).steps)
    assert int(halve(pair, slow).steps) == alone
    assert int(halve(fl.decrease(1e-30, window=50) | pair, slow).steps) == alone


def test_divergence_comes_before_every_rule():
    fn = lambda x: -x + 0.0 * jnp.sqrt(4.5 - x)  # noqa: E731
    solver = fl.optimizer(optax.sgd, learning_rate=1.0)
    solution = fl.minimize(fn, np.float32(0), solver, stop=fl.call_budget(6))
    assert str(solution.status) == "diverged at step 5"


def test_rules_look_at_records_where_values_cost():
    """Minibatches: the pass ends at steps 3, 6, …; the norm is small enough at 10, seen at 12."""
    problem = fl.FiniteSum(lambda x, rows: 0.5 * x**2 + 0 * rows, np.zeros(6, np.float32), batch_size=2)
    solution = halve(fl.gradient_norm(2.0**-10), problem, key=0)
    assert str(solution.status) == "converged by gradient_norm(0.000976562) at step 12"
    # 12 minibatches, and a gradient for each of 5 records: seen at 12 again.
    solution = halve(fl.call_budget(15.5, minibatch=1.0), problem, key=0)
    assert (solution.status.name, int(solution.steps)) == ("budget", 12)


class Below(StoppingRule):
    """A rule of one's own, with a number and a memory: the value was below `level` `times` times."""

    level: Any
    times: Any

    def init(self):
        return np.int32(0)

    def __call__(self, seen, memory):
        memory = memory + (seen.value < self.level)
        return memory >= self.times, memory


def test_a_rule_of_ones_own():
    """½ 4⁻ᵗ < 0.01 from t = 3 on: for the fourth time at 6."""
    for stop in (Below(0.01, 4), fl.gradient_norm(0) | Below(0.01, 4)):
        assert str(halve(stop).status) == "converged by below(0.01, 4) at step 6"


def test_rules_inside_jit_name_a_number_that_nobody_knows_yet():
    @jax.jit
    def run(tolerance):
        return halve(fl.gradient_norm(tolerance) | fl.call_budget(100))

    assert str(run(2.0**-4).status) == "converged by gradient_norm(…) at step 4"


def test_what_a_rule_sees():
    """Called by hand: a rule is a pure function of what is seen and its memory."""
    calls = fl.Calls(gradient=3, value=2, hvp=1, minibatch=4)
    seen = Seen(jnp.float32(1), jnp.float32(0.5), jnp.float32(0.25), calls, calls, jnp.float32(2))
    met = lambda rule: bool(rule(seen, rule.init())[0])  # noqa: E731
    assert met(fl.gradient_norm(0.5)) and not met(fl.gradient_norm(0.4))
    assert met(fl.residual(0.75)) and not met(fl.residual(0.7))
    assert met(fl.time_limit(2)) and not met(fl.time_limit(3))
    assert met(fl.call_budget(10)) and not met(fl.call_budget(10.5))  # 3 + 2·½ + 1·2 + 4
    assert met(fl.gradient_norm(0.1) | fl.time_limit(2)) and not met(fl.gradient_norm(0.1) & fl.time_limit(2))
    assert met(fl.call_budget(9, hvp=1.0)) and not met(fl.call_budget(9.5, hvp=1.0))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: fl.gradient_norm(-1.0), "tolerance"),
        (lambda: fl.gradient_norm(np.nan), "tolerance"),
        (lambda: fl.gradient_norm(np.ones((3, 3))), "tolerance"),
        (lambda: fl.gradient_norm("small"), "tolerance"),
        (lambda: fl.gradient_norm(None), "tolerance"),
        (lambda: fl.decrease(0.0), "tolerance"),
        (lambda: fl.decrease(1e-3, window=0), "window"),
        (lambda: fl.decrease(1e-3, window=2.5), "window"),
        (lambda: fl.decrease(1e-3, window=np.inf), "window"),
        (lambda: fl.residual(-1e-3), "tolerance"),
        (lambda: fl.call_budget(0), "cost"),
        (lambda: fl.call_budget(10, gradients=1.0), "weights"),
        (lambda: fl.call_budget(10, gradient=-1.0), "gradient"),
        (lambda: fl.time_limit(0), "seconds"),
        (lambda: fl.time_limit(np.inf), "seconds"),
    ],
)
def test_bad_numbers(make, argument):
    with pytest.raises(fl.InputError) as error:
        make()
    assert error.value.argument == argument
    assert "\n" not in str(error.value)


def test_a_rule_combines_with_rules_only():
    for wrong in (lambda: fl.gradient_norm(1e-3) | 5, lambda: fl.gradient_norm(1e-3) & "budget"):
        with pytest.raises(fl.InputError, match="a stopping rule"):
            wrong()
