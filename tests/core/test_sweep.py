"""`sweep`: lanes against single runs."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.problems import rosenbrock

RATES = (1e-3, 1e-2, 0.1, 10.0)


def adams(rates=RATES):
    return [fl.optimizer(optax.adam, learning_rate=rate) for rate in rates]


def valley(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def lane(tree, *at):
    return jax.tree.map(lambda a: np.asarray(a)[at], tree)


def test_lanes_are_single_runs(x64):
    x0 = np.array([-1.2, 1.0, 0.5])
    swept = fl.sweep(valley, x0, adams(), steps=300, stop=fl.gradient_norm(1e-2))
    for i, solver in enumerate(adams()):
        alone = fl.minimize(valley, x0, solver, steps=300, stop=fl.gradient_norm(1e-2))
        n = len(alone.history["step"])
        np.testing.assert_allclose(swept.x[i], alone.x, rtol=1e-6)
        np.testing.assert_allclose(swept.history["value"][i, :n], alone.history["value"], rtol=1e-6)
        assert np.isnan(swept.history["value"][i, n:]).all()
        assert (int(swept.steps[i]), int(swept.status.code[i])) == (int(alone.steps), int(alone.status.code))
        assert {k: int(v[i]) for k, v in vars(swept.calls).items()} == {k: int(v) for k, v in vars(alone.calls).items()}
        np.testing.assert_allclose(swept.value[i], alone.value, rtol=1e-6)


def test_a_lane_does_not_depend_on_the_others(dtype):
    x0 = rosenbrock(10).start(jax.random.key(0))
    together = fl.sweep(valley, x0, adams(np.geomspace(1e-4, 1e-2, 24)), steps=200, stop=None)
    for i in (0, 7, 23):
        alone = fl.sweep(valley, x0, adams(np.geomspace(1e-4, 1e-2, 24))[i : i + 1], steps=200, stop=None)
        np.testing.assert_array_equal(together.x[i], alone.x[0])
        np.testing.assert_array_equal(together.history["value"][i], alone.history["value"][0])
        np.testing.assert_array_equal(together.history["gradient_norm"][i], alone.history["gradient_norm"][0])


SCRIPT = """
import jax, numpy as np, optax, fallline as fl
from fallline.problems import rosenbrock
jax.config.update("jax_enable_x64", True)
made = rosenbrock(10)
x0 = made.start(jax.random.key(0))
solvers = [fl.optimizer(optax.adam, learning_rate=rate) for rate in np.geomspace(1e-4, 1e-2, 16)]
swept = fl.sweep(made.problem, x0, solvers, steps=500, stop=None)
for i in (0, 5, 15):
    alone = fl.minimize(made.problem, x0, solvers[i], steps=500, stop=None)
    assert np.array_equal(swept.x[i], alone.x)
    assert np.array_equal(swept.history["value"][i], alone.history["value"])
    assert np.array_equal(swept.history["gradient_norm"][i], alone.history["gradient_norm"])
print("equal")
"""


def test_without_fused_multiply_add_the_bits_are_those_of_minimize(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr


def test_solvers_keys_and_starts_make_a_grid(x64):
    saddle = lambda x: 0.5 * (x[0] ** 2 - x[1] ** 2) + 0.25 * x[1] ** 4  # noqa: E731
    solvers = [fl.perturbed_gradient_descent(step, gradient_threshold=1e-3, patience=50) for step in (0.05, 0.1)]
    start = lambda key: 0.01 * jax.random.normal(key, (2,))  # noqa: E731
    swept = fl.sweep(saddle, start, solvers, keys=[3, 4, 5], steps=2000)
    assert swept.x.shape == (2, 3, 2) and swept.history["value"].shape[:2] == (2, 3)
    assert swept.status.converged.shape == (2, 3) and swept.status.converged.all()
    for i, solver in enumerate(solvers):
        for j, seed in enumerate((3, 4, 5)):
            alone = fl.minimize(saddle, start(jax.random.key(seed)), solver, key=seed, steps=2000)
            np.testing.assert_allclose(swept.x[i, j], alone.x, rtol=1e-6, atol=1e-9)
            assert int(swept.steps[i, j]) == int(alone.steps)
    assert fl.sweep(saddle, start, solvers[0], keys=[3], steps=5).x.shape == (1, 2)
    assert fl.sweep(saddle, np.ones(2), solvers[0], keys=[3, 4], steps=5).x.shape == (2, 2)


def test_a_callable_model_is_a_point(x64):
    model = eqx.nn.MLP(2, "scalar", 3, 1, key=jax.random.key(0))
    swept = fl.sweep(lambda m: jnp.sum(m(jnp.ones(2)) ** 2), model, adams((1e-3, 1e-2)), steps=3, stop=None)
    assert swept.x.layers[0].weight.shape == (2, 3, 2)


def test_a_diverging_lane_stops_alone_at_its_last_finite_point(x64):
    x0 = np.array([-1.2, 1.0])
    solvers = [fl.optimizer(optax.sgd, learning_rate=rate) for rate in (1e-4, 1.0)]
    swept = fl.sweep(valley, x0, solvers, steps=100, stop=None)
    assert [str(fl.Ending(int(code)).name) for code in swept.status.code] == ["STEP_LIMIT", "DIVERGED"]
    x, steps = x0, 0
    while True:
        a, b = x
        new = x - np.array([-400 * a * (b - a**2) - 2 * (1 - a), 200 * (b - a**2)])
        steps += 1
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.isfinite(100 * (new[1] - new[0] ** 2) ** 2 + (1 - new[0]) ** 2):
                break
        x = new
    np.testing.assert_allclose(swept.x[1], x, rtol=1e-9)
    assert int(swept.steps[1]) == steps and int(swept.steps[0]) == 100
    assert np.isfinite(swept.value).all()


def test_minibatches_and_records_between_passes(x64):
    rng = np.random.default_rng(0)
    rows, targets = rng.normal(size=(40, 3)), rng.normal(size=40)
    problem = fl.FiniteSum(lambda x, batch: (batch[0] @ x - batch[1]) ** 2, (rows, targets), batch_size=8)
    solvers = [fl.optimizer(optax.sgd, learning_rate=rate) for rate in (0.01, 0.05)]
    swept = fl.sweep(problem, np.zeros(3), solvers, keys=[0, 1], steps=23, stop=None)
    assert list(swept.history["step"]) == [0, 5, 10, 15, 20]
    for i in range(2):
        for j in range(2):
            alone = fl.minimize(problem, np.zeros(3), solvers[i], key=j, steps=23, stop=None)
            np.testing.assert_allclose(swept.x[i, j], alone.x, rtol=1e-12)
            np.testing.assert_allclose(swept.history["value"][i, j], alone.history["value"], rtol=1e-12)


def test_long_sweeps_keep_every_record(x64, monkeypatch):
    from fallline.core import sweep as module

    x0 = np.array([-1.2, 1.0])
    whole = fl.sweep(valley, x0, adams((1e-3, 1e-2)), steps=100, stop=None)
    monkeypatch.setattr(module, "_TABLE_ENTRIES", 1)
    parts = fl.sweep(valley, x0, adams((1e-3, 1e-2)), steps=100, stop=None)
    np.testing.assert_array_equal(whole.history["value"], parts.history["value"])
    np.testing.assert_array_equal(whole.x, parts.x)
    thinned = fl.sweep(valley, x0, adams((1e-3, 1e-2)), steps=100, stop=None, every=7)
    np.testing.assert_array_equal(thinned.history["value"], whole.history["value"][:, ::7])


def test_numbers_do_not_recompile(x64):
    x0 = np.array([-1.2, 1.0])
    fl.sweep(valley, x0, adams((1e-3, 1e-2)), steps=10)
    again = fl.sweep(valley, x0, adams((2e-3, 3e-2)), steps=20)
    assert again.compile_seconds < 0.25 * again.seconds + 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solvers": []}, "solvers: got none"),
        (
            {"solvers": [fl.optimizer(optax.adam, learning_rate=0.1), fl.optimizer(optax.sgd, learning_rate=0.1)]},
            "solvers:",
        ),
        ({"keys": []}, "keys: got none"),
        ({"x0": lambda key: jnp.zeros(2)}, "keys: got None"),
        ({"x0": np.zeros(2, np.int32)}, "x0: got int32"),
        ({"steps": -1}, "steps: got -1"),
    ],
)
def test_bad_input(options, words, x64):
    given = {"x0": np.zeros(2), "solvers": adams(), "keys": None, "steps": 10, **options}
    with pytest.raises(fl.InputError, match=words):
        fl.sweep(valley, given["x0"], given["solvers"], given["keys"], steps=given["steps"])


class Picky(type(fl.optimizer(optax.sgd, learning_rate=0.1))):
    """Refuses rates above 1 for this problem."""

    def check(self, problem, x):
        if self.numbers["learning_rate"] > 1:
            raise fl.InputError("learning_rate", float(self.numbers["learning_rate"]), "at most 1 here")


def test_every_solver_checks_the_problem(x64):
    def picky(rate):
        plain = fl.optimizer(optax.sgd, learning_rate=rate)
        return Picky(plain.numbers, plain.options, plain.factory, plain.label, plain.extra)

    fl.sweep(valley, np.zeros(2), [picky(1e-3), picky(1e-4)], steps=2)
    with pytest.raises(fl.InputError, match=r"learning_rate: got 2.0; expected at most 1 here"):
        fl.sweep(valley, np.zeros(2), [picky(1e-3), picky(2.0)], steps=2)
