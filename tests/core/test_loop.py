"""`minimize` against loops written by hand in NumPy: iterates, endings, records, keys, calls, `jit` and `vmap`."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl

A = np.array([1.0, 2.0, 0.5], np.float32)
START = np.array([0.3, -1.7, 2.0], np.float32)
ETA = 0.05


def wells(x, a):
    """¼ Σ (xᵢ² − aᵢ)² + 0.1 (Σ xᵢ)²: non-convex, with coupled coordinates."""
    return 0.25 * jnp.sum((x**2 - a) ** 2) + 0.1 * jnp.sum(x) ** 2


def descend(x, a, steps, eta=ETA):
    """Points, values and gradient norms of gradient descent on `wells`, by NumPy."""
    xs, values, norms = [], [], []
    for _ in range(steps + 1):
        gradient = x * (x**2 - a) + x.dtype.type(0.2) * x.sum()
        xs.append(x)
        values.append(0.25 * ((x**2 - a) ** 2).sum() + 0.1 * x.sum() ** 2)
        norms.append(np.sqrt((gradient**2).sum()))
        x = x - x.dtype.type(eta) * gradient
    return np.array(xs), np.array(values), np.array(norms)


def cliff(x, edge):
    """Each step of size 1 adds 1 to every coordinate, exactly, until one passes `edge`: from there NaN."""
    return jnp.sum(-x + 0.0 * jnp.sqrt(edge - x))


def cliffs(x, batch):
    return -x[0] + 0.0 * jnp.sqrt(batch - x[0])


def sgd(rate=ETA):
    return fl.optimizer(optax.sgd, learning_rate=rate)


class Bare(fl.Solver):
    """Gradient descent whose state says nothing but its point."""

    step_size: Any

    def init(self, problem, x, *, key):
        return fl.State(x, fl.Calls())

    def step(self, problem, state, *, key):
        x = jax.tree.map(lambda a, g: a - self.step_size * g, state.x, problem.gradient(state.x))
        return fl.State(x, state.calls + fl.Calls(gradient=1))


class Measured(fl.State):
    value: Any
    gradient_norm: Any
    gradient: Any
    distance: Any
    done: Any


class Measuring(fl.Solver):
    """Gradient descent that knows value and gradient norm of its point, and ends by itself near `goal`."""

    step_size: Any
    goal: Any

    def _look(self, problem, x, calls):
        value, gradient = problem.value_and_gradient(x)
        distance = jnp.max(jnp.abs(x))
        calls = calls + fl.Calls(gradient=1)
        return Measured(x, calls, value, jnp.linalg.norm(gradient), gradient, distance, distance <= self.goal)

    def init(self, problem, x, *, key):
        return self._look(problem, x, fl.Calls())

    def step(self, problem, state, *, key):
        return self._look(problem, state.x - self.step_size * state.gradient, state.calls)


class Walk(fl.Solver):
    """Adds noise of unit variance; `first` keeps the draw that `init` made."""

    random: ClassVar[bool] = True

    def init(self, problem, x, *, key):
        return Walked(x, fl.Calls(), jax.random.uniform(key))

    def step(self, problem, state, *, key):
        return Walked(state.x + jax.random.normal(key, state.x.shape, state.x.dtype), state.calls, state.first)


class Walked(fl.State):
    first: Any


# --- the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [sgd(), Bare(ETA), Measuring(ETA, 0.0)], ids=["optimizer", "bare", "measuring"])
def test_gradient_descent_is_the_numpy_loop(solver, dtype):
    a, x0 = A.astype(dtype), START.astype(dtype)
    solution = fl.minimize(wells, x0, solver, args=(a,), steps=40, stop=None)
    xs, values, norms = descend(x0, a, 40)
    tight = {"rtol": 100 * np.finfo(dtype).eps, "atol": 100 * np.finfo(dtype).eps}
    np.testing.assert_allclose(solution.x, xs[-1], **tight)
    np.testing.assert_allclose(solution.history["value"], values, **tight)
    np.testing.assert_allclose(solution.history["gradient_norm"], norms, **tight)
    np.testing.assert_allclose([solution.value, solution.gradient_norm], [values[-1], norms[-1]], **tight)
    assert solution.history["step"].tolist() == list(range(41))
    assert str(solution.status) == "step limit at step 40"
    assert (solution.steps, solution.status.step) == (40, 40)
    assert solution.x.dtype == solution.value.dtype == solution.history["value"].dtype == dtype


def test_the_start_is_left_alone():
    """What is donated is a copy: neither the caller's point nor the problem's data."""
    x0, a = jnp.asarray(START), jnp.asarray(A)
    given = Given(a)
    for problem, args in ((wells, (a,)), (given, ())):
        fl.minimize(problem, x0, sgd(), args=args, steps=3, stop=None)
    np.testing.assert_array_equal(x0, START)
    np.testing.assert_array_equal(a, A)


class Given(fl.Problem):
    g: Any

    def value(self, x):
        return jnp.sum(self.g * x)

    def value_and_gradient(self, x):
        return self.value(x), self.g


@pytest.mark.parametrize("solver", [sgd(), Bare(ETA)], ids=["optimizer", "bare"])
def test_zero_steps(solver):
    solution = fl.minimize(wells, START, solver, args=(A,), steps=0)
    _, values, norms = descend(START, A, 0)
    assert str(solution.status) == "step limit at step 0"
    np.testing.assert_array_equal(solution.x, START)
    np.testing.assert_allclose([solution.value, solution.gradient_norm], [values[0], norms[0]], rtol=1e-6)
    assert len(solution.history["value"]) == 1


def test_converged_at_the_start():
    solution = fl.minimize(wells, np.zeros(3, np.float32), sgd(), args=(A,))
    assert str(solution.status) == "converged by gradient_norm(1e-06) at step 0"
    assert solution.calls.as_dict() == {"gradient": 1}
    assert solution.gradient_norm == 0


@pytest.mark.parametrize("solver", [sgd(1.0), Bare(1.0)], ids=["optimizer", "bare"])
@pytest.mark.parametrize("edge", [-0.5, np.inf], ids=["NaN value", "NaN gradient"])
def test_nothing_finite_at_the_start(solver, edge):
    """The square root of ∞ − x is ∞, and 0 · ∞ is NaN."""
    solution = fl.minimize(cliff, np.zeros(2, np.float32), solver, args=(np.float32(edge),))
    assert str(solution.status) == "diverged at step 0"
    np.testing.assert_array_equal(solution.x, np.zeros(2))
    assert np.isnan(solution.value)
    assert np.isnan(solution.history["value"]).tolist() == [True]


# --- divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("solver", [sgd(1.0), Bare(1.0)], ids=["optimizer", "bare"])
@pytest.mark.parametrize("lost", [1, 20, 1500])
def test_divergence_gives_back_the_point_before(solver, every, lost):
    """1500: beyond the 1024 records of one chunk."""
    solution = fl.minimize(
        cliff, np.zeros(2, np.float32), solver, args=(np.float32(lost - 0.5),), every=every, steps=2000
    )
    assert str(solution.status) == f"diverged at step {lost}"
    assert "smaller step size" in solution.status.advice
    assert solution.steps == lost
    np.testing.assert_array_equal(solution.x, [lost - 1, lost - 1])
    assert solution.value == -2 * (lost - 1)
    np.testing.assert_allclose(solution.gradient_norm, np.sqrt(2), rtol=1e-6)
    assert solution.state.x is solution.x


def test_divergence_of_a_quadratic_by_numpy():
    """x ← −2x is exact; the squared norm overflows float32 before the value does."""
    x, points = np.array([1.0, 0.5], np.float32), []
    with np.errstate(over="ignore"):
        while np.isfinite((x * x).sum()):
            points.append(x)
            x = x - np.float32(3) * x
    solution = fl.minimize(lambda x: 0.5 * jnp.sum(x * x), points[0], sgd(3.0))
    assert str(solution.status) == f"diverged at step {len(points)}"
    np.testing.assert_array_equal(solution.x, points[-1])
    np.testing.assert_array_equal(solution.value, 0.5 * (points[-1] ** 2).sum())


def test_a_point_lost_between_two_looks_is_no_answer():
    """The limit comes before the next record: what nobody has looked at is looked at in the end."""
    run = lambda x0: fl.minimize(  # noqa: E731
        cliff, x0, Bare(1.0), args=(np.float32(119.5),), steps=150, every=100, stop=None
    )
    solution = run(np.zeros(2, np.float32))
    assert str(solution.status) == "diverged at step 120"
    np.testing.assert_array_equal(solution.x, [119, 119])
    # Inside jit nothing can be taken again: the last point that was looked at.
    inside = jax.jit(run)(np.zeros(2, np.float32))
    assert inside.status.name == "diverged"
    np.testing.assert_array_equal(inside.x, [100, 100])
    assert inside.value == -200


@pytest.mark.parametrize("every", [None, 1, 1000], ids=["pass", "each", "never"])
def test_divergence_of_minibatches(every):
    problem = fl.FiniteSum(cliffs, np.full(12, 40.5, np.float32), batch_size=2)
    run = lambda x0: fl.minimize(problem, x0, sgd(1.0), key=0, every=every, steps=60)  # noqa: E731
    for solution in (run(np.zeros(1, np.float32)), jax.jit(run)(np.zeros(1, np.float32))):
        assert str(solution.status) == "diverged at step 41"
        assert (solution.x, solution.value, solution.gradient_norm) == (40, -40, 1)
        assert np.nanmin(solution.history["value"]) == (-40 if every == 1 else -36 if every is None else 0)


NOISY = fl.optimizer(optax.noisy_sgd, learning_rate=1.0, eta=1e-8, key=1)  # it has a key in its state


@pytest.mark.parametrize("solver", [sgd(1.0), NOISY], ids=["sgd", "noisy sgd"])
def test_minibatches_that_miss_the_example_that_is_lost(solver):
    """Few minibatches see it; the full objective, looked at every 25 steps, is lost at 11."""
    edges = np.full(64, 1e6, np.float32)
    edges[5] = 10.5
    problem = fl.FiniteSum(cliffs, edges, batch_size=1)
    solution = fl.minimize(problem, np.zeros(1, np.float32), solver, key=0, every=25, steps=60)
    assert str(solution.status) == "diverged at step 11"
    np.testing.assert_allclose([solution.x[0], solution.value], [10, -10], atol=0 if solver is not NOISY else 1e-2)


@pytest.mark.parametrize("every", [1, 7])
def test_divergence_inside_jit(every):
    @jax.jit
    def run(x0, edge):
        return fl.minimize(cliff, x0, sgd(1.0), args=(edge,), every=every, steps=100)

    solution = run(np.zeros(2, np.float32), np.float32(29.5))
    assert str(solution.status) == "diverged at step 30"
    np.testing.assert_array_equal(solution.x, [29, 29])
    np.testing.assert_array_equal(solution.state.x, [29, 29])
    assert solution.value == -58
    np.testing.assert_allclose(solution.gradient_norm, np.sqrt(2), rtol=1e-6)
    # 31 calls, and one to know the point that is given back.
    assert solution.calls.as_dict() == {"gradient": 32}


def test_stalled():
    """Half a unit in the last place of 1 is lost in the sum: the point cannot move."""
    rate = 2.0**-26
    solution = fl.minimize(lambda x: jnp.sum(x), np.ones(1, np.float32), sgd(rate), steps=500)
    assert str(solution.status) == "stalled at step 100"
    assert "precision" in solution.status.advice
    bare = fl.minimize(lambda x: jnp.sum(x), np.ones(1, np.float32), Bare(rate), steps=500, every=2)
    assert str(bare.status) == "stalled at step 200"


# --- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [sgd(), Bare(ETA)], ids=["optimizer", "bare"])
@pytest.mark.parametrize("every", [1, 3])
def test_records_beyond_one_chunk(solver, every):
    steps = 3500
    solution = fl.minimize(wells, START, solver, args=(A,), steps=steps, every=every, stop=fl.gradient_norm(0.0))
    _, values, norms = descend(START, A, int(solution.steps))
    assert solution.status.name in ("stalled", "converged")  # at the minimum, long after the iterates settled
    looked = np.arange(0, int(solution.steps) + 1, every)
    assert solution.history["step"].tolist() == looked.tolist()
    np.testing.assert_allclose(solution.history["value"], values[looked], rtol=1e-4)
    np.testing.assert_allclose(solution.history["gradient_norm"], norms[looked], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_more_records_than_a_chunk_holds(every):
    """Every record is known exactly: f(x) = −x at x = t."""
    solution = fl.minimize(lambda x: -x, np.float32(0), sgd(1.0), steps=5000, every=every, stop=None)
    looked = np.arange(0, 5001, every)
    np.testing.assert_array_equal(solution.history["step"], looked)
    np.testing.assert_array_equal(solution.history["value"], -looked)


def test_every_longer_than_the_run():
    solution = fl.minimize(wells, START, Bare(ETA), args=(A,), steps=5, every=100, stop=None)
    assert solution.history["step"].tolist() == [0]
    np.testing.assert_allclose(solution.x, descend(START, A, 5)[0][-1], rtol=1e-5)


def test_scalars_of_the_state():
    record = ("distance", "value")
    solution = fl.minimize(wells, START, Measuring(ETA, 1.6), args=(A,), record=record, steps=50)
    xs, values, _ = descend(START, A, 50)
    distance = np.abs(xs).max(axis=1)
    end = int(np.argmax(distance <= 1.6))
    assert str(solution.status) == f"converged by Measuring's own test at step {end}"
    np.testing.assert_allclose(solution.history["distance"], distance[: end + 1], rtol=1e-5)
    np.testing.assert_allclose(solution.history["value"], values[: end + 1], rtol=1e-4)
    assert set(solution.history) == {*record, "step"}


def test_nothing_recorded():
    solution = fl.minimize(wells, START, sgd(), args=(A,), record=(), steps=4)
    assert list(solution.history) == ["step"]
    assert solution.history["step"].tolist() == [0, 1, 2, 3, 4]


def test_records_inside_jit_end_in_nan():
    run = lambda x0: fl.minimize(wells, x0, sgd(), args=(A,), steps=400, every=3)  # noqa: E731
    inside, outside = jax.jit(run)(START), run(START)
    used = len(outside.history["value"])
    assert 10 < used < 134
    assert inside.history["value"].shape == inside.history["step"].shape == (134,)
    np.testing.assert_array_equal(inside.history["value"][:used], outside.history["value"])
    assert np.isnan(inside.history["value"][used:]).all()
    assert np.isnan(inside.history["gradient_norm"][used:]).all()


# --- keys ----------------------------------------------------------------------------------------------------------


def test_step_t_uses_the_key_folded_with_t():
    key = jax.random.key(3)
    solution = fl.minimize(lambda x: jnp.sum(x**2), np.zeros(4, np.float32), Walk(), key=key, steps=9, stop=None)
    draws = [jax.random.normal(jax.random.fold_in(key, t), (4,), jnp.float32) for t in range(1, 10)]
    np.testing.assert_allclose(solution.x, np.sum(draws, axis=0), rtol=1e-5, atol=1e-6)
    assert solution.state.first == jax.random.uniform(jax.random.fold_in(key, 0))


@pytest.mark.parametrize("key", [7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7)], ids=type)
def test_forms_of_a_key(key):
    run = lambda key: fl.minimize(lambda x: x**2, np.float32(0), Walk(), key=key, steps=3, stop=None).x  # noqa: E731
    assert run(key) == run(jax.random.key(7)) != run(8)


def test_minibatches_are_drawn_by_the_key_of_the_step():
    data = np.arange(20, dtype=np.float32)
    problem = fl.FiniteSum(lambda x, rows: 0.5 * (x - rows) ** 2, data, batch_size=5)
    solution = fl.minimize(problem, np.float32(3), sgd(0.5), key=1, steps=8, stop=None)
    x = np.float32(3)
    for t in range(1, 9):
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), t), (5,), 0, 20)
        x = x - np.float32(0.5) * (x - data[rows].mean())
    np.testing.assert_allclose(solution.x, x, rtol=1e-6)
    assert solution.history["step"].tolist() == [0, 4, 8]  # a pass over the data: 4 minibatches


def test_a_key_that_nobody_needs_is_ignored():
    run = lambda key: fl.minimize(wells, START, sgd(), args=(A,), steps=5, key=key).x  # noqa: E731
    np.testing.assert_array_equal(run(None), run(jax.random.key(1)))


# --- the account ---------------------------------------------------------------------------------------------------


class Counted(fl.Problem):
    """½ x², and how often each oracle was really asked."""

    real: ClassVar[dict[str, int]] = {}
    oracles: ClassVar[frozenset[str]] = fl.Problem.oracles | {"minibatch"}
    scale: Any
    noisy: bool = eqx.field(static=True, default=False)

    def _count(self, name):
        def add():
            self.real[name] = self.real.get(name, 0) + 1

        jax.debug.callback(add)

    @property
    def random(self):
        return self.noisy

    def value(self, x):
        self._count("value")
        return 0.5 * self.scale * x**2

    def value_and_gradient(self, x):
        self._count("gradient")
        return 0.5 * self.scale * x**2, self.scale * x

    def minibatch(self, x, key):
        self._count("minibatch")
        return 0.5 * self.scale * x**2, self.scale * x + 0.01 * jax.random.normal(key)


BACKTRACKING = optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
PERTURBED = fl.perturbed_gradient_descent(0.1, patience=3, gradient_threshold=0.5)
RUNS = {
    "deterministic": (sgd(), {"steps": 10}),
    "deterministic, every": (sgd(), {"steps": 10, "every": 4}),
    "converged": (sgd(0.5), {"stop": fl.gradient_norm(0.1)}),
    "bare": (Bare(0.1), {"steps": 10}),
    "bare, every": (Bare(0.1), {"steps": 10, "every": 4}),
    "search": (fl.optimizer(optax.lbfgs, linesearch=BACKTRACKING), {"steps": 5}),
    "perturbed": (PERTURBED, {"steps": 30, "key": 0}),
    "zero steps": (sgd(), {"steps": 0}),
}


def _counts(problem, solver, options):
    problem.real.clear()
    solution = fl.minimize(problem, np.float32(1), solver, **options)
    jax.block_until_ready(solution.x)
    jax.effects_barrier()
    return solution.calls.as_dict(), dict(problem.real)


@pytest.mark.parametrize("name", RUNS)
def test_calls_are_counted_as_they_are_made(name):
    solver, options = RUNS[name]
    said, real = _counts(Counted(np.float32(1)), solver, options)
    assert said == real
    assert said["gradient"] >= 1


@pytest.mark.parametrize(
    ("every", "expected"), [(1, {"gradient": 12, "minibatch": 10}), (4, {"gradient": 4, "minibatch": 10})]
)
def test_calls_of_minibatches(every, expected):
    """The start, one full gradient for each record, and the final point."""
    said, real = _counts(Counted(np.float32(1), noisy=True), sgd(), {"steps": 10, "key": 0, "every": every})
    assert said == real == expected


def test_calls_with_aux():
    real = []

    def fn(x):
        jax.debug.callback(lambda: real.append(1))
        return 0.5 * x**2, x + 1

    solution = fl.minimize(fn, np.float32(1), sgd(0.5), has_aux=True, steps=3)
    jax.effects_barrier()
    assert solution.calls.as_dict() == {"gradient": 4, "value": 1}
    assert len(real) == 5
    assert solution.aux == 0.125 + 1


# --- jit and vmap --------------------------------------------------------------------------------------------------

SOLVERS = {
    "optimizer": (sgd(), None),
    "adam": (fl.optimizer(optax.adam, learning_rate=0.05), None),
    "bare": (Bare(ETA), None),
    "perturbed": (fl.perturbed_gradient_descent(ETA, patience=5, gradient_threshold=0.3), 4),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_inside_jit_is_outside(name):
    solver, key = SOLVERS[name]
    run = lambda x0, a: fl.minimize(  # noqa: E731
        wells, x0, solver, args=(a,), key=key, steps=60, every=2, stop=fl.gradient_norm(0.02)
    )
    inside, outside = jax.jit(run)(START, A), run(START, A)
    assert str(inside.status) == str(outside.status)
    assert inside.calls.as_dict() == outside.calls.as_dict()
    # Fused otherwise: an ulp for each step.
    for a, b in zip(jax.tree.leaves(inside.x), jax.tree.leaves(outside.x), strict=True):
        np.testing.assert_allclose(a, b, rtol=60 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(inside.value, outside.value, rtol=1e-5)
    assert inside.seconds is None and inside.compile_seconds is None


def test_minibatches_inside_jit():
    problem = fl.FiniteSum(lambda x, rows: 0.5 * (x - rows) ** 2, np.arange(20, dtype=np.float32), batch_size=5)
    run = lambda x0: fl.minimize(problem, x0, sgd(0.5), key=1, steps=10)  # noqa: E731
    inside, outside = jax.jit(run)(np.float32(3)), run(np.float32(3))
    np.testing.assert_allclose(inside.x, outside.x, rtol=1e-6)
    np.testing.assert_allclose(inside.history["value"], outside.history["value"], rtol=1e-6)
    assert inside.calls.as_dict() == outside.calls.as_dict()


def test_inside_jit_without_a_traced_argument():
    solution = jax.jit(lambda: fl.minimize(wells, START, sgd(), args=(A,), steps=20, stop=None))()
    np.testing.assert_allclose(solution.x, descend(START, A, 20)[0][-1], rtol=1e-5)


def test_each_lane_stops_by_its_own_rule():
    """f = ½ x²: x halves in each step. The lanes: converged at 4 and at 20, own test, step limit, diverged."""
    tolerances = jnp.array([2.0**-4, 2.0**-20, 0.0, 0.0], jnp.float32)
    rates = jnp.array([0.5, 0.5, 2.0**-20, 4.0], jnp.float32)

    def run(tolerance, rate):
        stop = fl.gradient_norm(tolerance)
        return fl.minimize(lambda x: 0.5 * x**2, np.float32(1), sgd(rate), stop=stop, steps=100)

    batch = jax.jit(jax.vmap(run))(tolerances, rates)
    assert [fl.Ending(c).name for c in np.asarray(batch.status.code)] == [
        "CONVERGED",
        "CONVERGED",
        "STEP_LIMIT",
        "DIVERGED",
    ]
    # x ← −3x: the squared norm passes 2^128 at 3^(2t) ≥ 2^128, t = 41.
    assert batch.steps.tolist() == [4, 20, 100, 41]
    np.testing.assert_array_equal(batch.x[:2], [2.0**-4, 2.0**-20])
    assert batch.x[3] == 3.0**40 or abs(batch.x[3] / 3.0**40 - 1) < 1e-5
    assert batch.status.converged.tolist() == [True, True, False, False]
    assert str(batch.status) == "2 × converged, 1 × step limit, 1 × diverged"
    for lane in range(4):
        alone = fl.minimize(
            lambda x: 0.5 * x**2,
            np.float32(1),
            sgd(rates[lane]),
            stop=fl.gradient_norm(float(tolerances[lane])),
            steps=100,
        )
        assert (alone.status.code, alone.steps) == (batch.status.code[lane], batch.steps[lane])
        np.testing.assert_allclose(alone.x, batch.x[lane], rtol=1e-6)
        used = len(alone.history["value"])
        np.testing.assert_allclose(alone.history["value"], batch.history["value"][lane, :used], rtol=1e-5)
        assert np.isnan(batch.history["value"][lane, used:]).all()
    with pytest.raises(fl.RunError, match="1 × diverged"):
        batch.raise_for_status()


def test_lanes_with_keys():
    run = lambda key: fl.minimize(lambda x: x**2, np.float32(0), Walk(), key=key, steps=5, stop=None).x  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(keys), [run(key) for key in keys], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"callback": lambda seen: False}, "callback"),
        ({"throw": True}, "throw"),
        ({"stop": fl.time_limit(1.0)}, "stop"),
        ({"stop": fl.time_limit(1.0) | fl.gradient_norm(1e-3)}, "stop"),
        ({"stop": fl.time_limit(1.0) & fl.gradient_norm(1e-3)}, "stop"),
    ],
)
def test_what_needs_the_host_is_refused_inside_jit(options, argument):
    with pytest.raises(fl.InputError, match="inside jit or vmap") as error:
        jax.jit(lambda x0: fl.minimize(wells, x0, sgd(), args=(A,), **options))(START)
    assert error.value.argument == argument


@pytest.mark.parametrize("name", ["steps", "every"])
def test_a_traced_length_is_refused(name):
    with pytest.raises(fl.InputError, match="steps and every: got a traced value"):
        jax.jit(lambda n: fl.minimize(wells, START, sgd(), args=(A,), **{name: n}))(3)


# --- points, dtypes, forms -----------------------------------------------------------------------------------------


def test_a_pytree():
    """½ |u − 1|² + ½ |v + 2|²: both distances shrink by 0.9 in each step."""
    x0 = {"u": np.zeros((2, 3), np.float32), "v": (np.ones(1, np.float32), 0.5)}
    fn = lambda x: 0.5 * sum(jnp.sum((a - c) ** 2) for a, c in ((x["u"], 1), (x["v"][0], -2), (x["v"][1], -2)))  # noqa: E731
    solution = fl.minimize(fn, x0, sgd(0.1), steps=12, stop=None)
    shrink = 0.9**12
    assert jax.tree.structure(solution.x) == jax.tree.structure(x0)
    np.testing.assert_allclose(solution.x["u"], np.full((2, 3), 1 - shrink), rtol=1e-5)
    np.testing.assert_allclose(solution.x["v"][0], [-2 + 3 * shrink], rtol=1e-5)
    np.testing.assert_allclose(solution.x["v"][1], -2 + 2.5 * shrink, rtol=1e-5)


def test_complex_variables():
    """Σ |z − c|² has the steepest ascent 2(z − c): the distance shrinks by 1 − 2η in each step."""
    c = np.array([1 + 2j, -3j, 0.5], np.complex64)
    solution = fl.minimize(
        lambda z: jnp.sum(jnp.abs(z - c) ** 2), np.zeros(3, np.complex64), sgd(0.1), steps=10, stop=None
    )
    np.testing.assert_allclose(solution.x, c * (1 - 0.8**10), rtol=1e-5)
    assert solution.x.dtype == np.complex64
    assert solution.value.dtype == solution.history["gradient_norm"].dtype == np.float32
    norms = 2 * np.linalg.norm(c) * 0.8 ** np.arange(11)
    np.testing.assert_allclose(solution.history["gradient_norm"], norms, rtol=1e-5)


def test_an_equinox_model():
    """One linear layer on orthonormal inputs: each step takes the residual to 1 − 2η/n of itself."""

    class Model(eqx.Module):
        layer: eqx.nn.Linear
        activation: Any
        calls: Any  # an integer buffer

        def __call__(self, x):
            return self.activation(self.layer(x))

    layer = eqx.nn.Linear(4, 1, use_bias=False, key=jax.random.key(0))
    model = Model(layer, lambda y: y[0], jnp.int32(5))
    targets = np.array([1.0, -1.0, 2.0, 0.0], np.float32)

    def loss(model, targets):
        return jnp.mean((jax.vmap(model)(jnp.eye(4)) - targets) ** 2)

    solution = fl.minimize(loss, model, sgd(0.4), args=(targets,), steps=20, stop=None)
    expected = targets + (np.asarray(layer.weight)[0] - targets) * 0.8**20
    np.testing.assert_allclose(jax.vmap(solution.x)(jnp.eye(4)), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(solution.x, Model)
    assert solution.x.activation is model.activation
    assert solution.x.calls.dtype == jnp.int32 and solution.x.calls == 5


def test_a_flax_model():
    from flax import nnx

    model = nnx.Linear(4, 1, use_bias=False, rngs=nnx.Rngs(0))
    before = np.array(model.kernel[...])
    targets = np.array([[1.0], [-1.0], [2.0], [0.0]], np.float32)

    def loss(model, targets):
        return jnp.mean((model(jnp.eye(4)) - targets) ** 2)

    solution = fl.minimize(loss, model, sgd(0.4), args=(targets,), steps=20, stop=None, callback=lambda seen: False)
    expected = targets + (before - targets) * 0.8**20
    assert isinstance(solution.x, nnx.Linear)
    np.testing.assert_allclose(solution.x(jnp.eye(4)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.kernel[...], before)


def test_bfloat16():
    """½ x² with powers of two: halving is exact in 8 bits, and the step size is not narrowed."""
    x0 = jnp.array([1.0, -3.0], jnp.bfloat16)
    run = lambda x0: fl.minimize(lambda x: 0.5 * jnp.sum(x**2), x0, sgd(0.5), steps=10, stop=None)  # noqa: E731
    for solution in (run(x0), jax.jit(run)(x0)):
        assert solution.x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(solution.x.astype(np.float32), np.array([1, -3]) * 2.0**-10)
        assert solution.value.dtype == solution.gradient_norm.dtype == solution.history["value"].dtype == np.float32
        np.testing.assert_array_equal(solution.history["value"], 5 * 4.0 ** -np.arange(11))


@pytest.mark.parametrize("solver", [Bare(ETA), fl.optimizer(optax.adam, learning_rate=0.1)], ids=["bare", "adam"])
def test_float32_stays_in_64_bit_mode(solver, x64):
    solution = fl.minimize(wells, START, solver, args=(A,), steps=3)
    assert solution.x.dtype == solution.value.dtype == solution.history["value"].dtype == np.float32
    assert all(leaf.dtype != np.float64 for leaf in jax.tree.leaves(solution.state))


@pytest.mark.parametrize("solver", [sgd(0.5), Bare(0.5)], ids=["optimizer", "bare"])
def test_aux_is_of_the_final_point(solver):
    fn = lambda x, c: (0.5 * jnp.sum((x - c) ** 2), {"twice": 2 * x})  # noqa: E731
    run = lambda x0: fl.minimize(fn, x0, solver, args=(np.float32(1),), has_aux=True, steps=4, stop=None)  # noqa: E731
    for solution in (run(np.zeros(2, np.float32)), jax.jit(run)(np.zeros(2, np.float32))):
        np.testing.assert_array_equal(solution.aux["twice"], [1.875, 1.875])


def test_raise_for_status():
    converged = fl.minimize(wells, START, sgd(), args=(A,), stop=fl.gradient_norm(1e-4), throw=True)
    assert converged.raise_for_status() is converged
    with pytest.raises(fl.RunError, match=r"step limit at step 3 \(raise `steps`"):
        fl.minimize(wells, START, sgd(), args=(A,), steps=3, throw=True)
    with pytest.raises(fl.RunError, match="diverged at step 5"):
        fl.minimize(cliff, np.zeros(2, np.float32), sgd(1.0), args=(np.float32(4.5),)).raise_for_status()


def test_what_a_solution_says():
    solution = fl.minimize(lambda x: 0.5 * x**2, np.float32(1), sgd(0.5), steps=2)
    first, point, calls, time = str(solution).splitlines()
    assert (first, calls) == ("step limit at step 2", "calls: 3 gradient")
    assert point == "value 0.03125, gradient norm 0.25"
    assert time.endswith("s compiling")
    assert solution.seconds >= solution.compile_seconds >= 0


# --- bad input -----------------------------------------------------------------------------------------------------


class NeedsProx(Bare):
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "prox"})


def bad(x):
    raise RuntimeError("no such shape")


BAD = {
    "steps below 0": ({"steps": -1}, "steps", "-1"),
    "steps no number": ({"steps": "many"}, "steps", "'many'"),
    "steps without end": ({"steps": np.inf}, "steps", "inf"),
    "steps NaN": ({"steps": np.nan}, "steps", "nan"),
    "steps beyond the counter": ({"steps": 2**31}, "steps", "2147483648"),
    "every 0": ({"every": 0}, "every", "0"),
    "every half": ({"every": 0.5}, "every", "0.5"),
    "solver a class": ({"solver": Bare}, "solver", "expected a fallline solver"),
    "solver from Optax": ({"solver": optax.sgd(0.1)}, "solver", "GradientTransformation.*optimizer"),
    "stop unknown": ({"stop": "gradient"}, "stop", "'gradient'.*\"auto\""),
    "stop a number": ({"stop": 1e-6}, "stop", "1e-06.*a stopping rule"),
    "stop an array": ({"stop": np.eye(3)}, "stop", "a stopping rule"),
    "no lower bound": ({"stop": fl.residual(1e-3)}, "stop", r"residual\(0.001\).*wells declares none"),
    "no lower bound within": ({"stop": fl.gradient_norm(1) | fl.residual(0)}, "stop", "wells declares none"),
    "record unknown": ({"record": ("value", "loss")}, "record", "'loss'.*gradient_norm, value"),
    "record no scalar": ({"record": ("x",)}, "record", "'x'.*gradient_norm, value"),
    "record a string": ({"record": "value"}, "record", "'value'.*a tuple"),
    "callback no function": ({"callback": 3}, "callback", "3"),
    "x0 integer": ({"x0": np.arange(3)}, "x0", r"int64\[3\].*floating"),
    "x0 Python integer": ({"x0": {"a": START, "b": 1}}, "x0", r"\['b'\].*int"),
    "x0 without leaves": ({"x0": {}}, "x0", "without leaves"),
    "x0 without entries": ({"x0": np.zeros((0, 2), np.float32)}, "x0", r"float32\[0,2\].*at least one entry"),
    "x0 NaN": ({"x0": np.array([1, np.nan, 1], np.float32)}, "x0", "1 NaN"),
    "x0 float64": ({"x0": np.zeros(3)}, "x0", r"float64\[3\].*jax_enable_x64"),
    "data NaN": ({"args": (np.full(3, np.nan, np.float32),)}, "args", r"\[0\].*3 NaN"),
    "data float64": ({"args": (np.ones(3),)}, "args", r"float64\[3\].*jax_enable_x64"),
    "args no tuple": ({"args": A}, "args", "ndarray.*a tuple"),
    "args of the wrong shape": (
        {"args": (np.ones(2, np.float32),)},
        "problem",
        "wells, which fails at x0 with TypeError",
    ),
    "problem no function": ({"problem": 3.0}, "problem", "float.*a callable"),
    "problem that fails": ({"problem": bad, "args": ()}, "problem", "bad, which fails.*no such shape"),
    "problem with a vector": ({"problem": lambda x, a: x}, "problem", r"float32\[3\].*one real scalar"),
    "problem with an integer": ({"problem": lambda x, a: 1}, "problem", "int.*one real scalar"),
    "problem complex": ({"problem": lambda x, a: jnp.sum(x) * 1j}, "problem", r"complex64\[\].*one real scalar"),
    "problem with two values": ({"problem": lambda x, a: (x[0], x)}, "problem", "one real scalar"),
    "aux promised": ({"has_aux": True}, "problem", r"\(scalar, aux\)"),
    "oracle missing": ({"solver": NeedsProx(0.1)}, "problem", "Objective without the oracle 'prox'.*NeedsProx"),
    "key missing": ({"solver": Walk()}, "key", "None.*Walk is random"),
    "key of floats": ({"solver": Walk(), "key": jnp.ones(2, np.float32)}, "key", r"float32\[2\]"),
    "key of the wrong length": ({"solver": Walk(), "key": jnp.ones(3, jnp.uint32)}, "key", r"uint32\[3\]"),
    "keys": ({"solver": Walk(), "key": jax.random.split(jax.random.key(0))}, "key", r"\[2\].*one key"),
    "key a string": ({"solver": Walk(), "key": "seed"}, "key", "str"),
    "key a boolean": ({"solver": Walk(), "key": True}, "key", "bool"),
}

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: _compiled.append(event))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_anything_compiles(name, x32):
    options, argument, message = BAD[name]
    call = {"problem": wells, "x0": START, "solver": sgd(), "args": (A,), **options}
    if not isinstance(call["problem"], type(wells)) and "args" not in options:
        call["args"] = ()
    jnp.zeros(())
    before = len(_compiled)
    with pytest.raises(fl.InputError, match=message) as error:
        fl.minimize(call.pop("problem"), call.pop("x0"), call.pop("solver"), **call)
    assert [event for event in _compiled[before:] if "backend_compile" in event] == []
    assert error.value.argument.startswith(argument)
    assert str(error.value).startswith(error.value.argument + ": got ")
    assert "; expected " in str(error.value) and "\n" not in str(error.value)


def test_a_random_problem_asks_for_a_key():
    problem = fl.FiniteSum(cliffs, np.ones(4, np.float32), batch_size=2)
    with pytest.raises(fl.InputError, match=r"key: got None; .*FiniteSum\(cliffs\) is random"):
        fl.minimize(problem, np.zeros(1, np.float32), sgd())


def test_data_of_a_finite_sum_with_nan():
    with pytest.raises(fl.InputError, match="problem.*2 NaN"):
        fl.minimize(fl.FiniteSum(cliffs, np.full(2, np.nan, np.float32)), np.zeros(1, np.float32), sgd())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.gradient_norm(-1e-6), "tolerance: got -1e-06; expected a finite number of at least 0"),
        (lambda: fl.perturbed_gradient_descent(-0.1), "step_size: got -0.1; expected a finite number above 0"),
        (
            lambda: fl.optimizer(optax.sgd, learning_rate=-0.1),
            "learning_rate: got -0.1; expected a finite number above 0",
        ),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(fl.InputError) as error:
        make()
    assert str(error.value) == message
