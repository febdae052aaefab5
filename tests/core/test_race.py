"""`race` against loops and counts by hand: what each method spends, and what it reaches within a cost."""

import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl

A = np.array([1.0, 2.0, 0.5])
START = np.array([0.3, -1.7, 2.0])


def wells(x):
    """¼ Σ (xᵢ² − aᵢ)² + 0.1 (Σ xᵢ)²: non-convex, with coupled coordinates."""
    return 0.25 * jnp.sum((x**2 - A) ** 2) + 0.1 * jnp.sum(x) ** 2


def value(x):
    return 0.25 * ((x**2 - A) ** 2).sum() + 0.1 * x.sum() ** 2


def gradient(x):
    return x * (x**2 - A) + 0.2 * x.sum()


def descent(x, steps, rate):
    values = [value(x)]
    for _ in range(steps):
        x = x - rate * gradient(x)
        values.append(value(x))
    return np.array(values)


def adam(x, steps, rate):
    m, v, values = 0.0, 0.0, [value(x)]
    for t in range(1, steps + 1):
        g = gradient(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        values.append(value(x))
    return np.array(values)


def start(key):
    return START + jax.random.normal(key, (3,))


def sgd(rate=0.05):
    return fl.optimizer(optax.sgd, learning_rate=rate)


PAIR = {"descent": sgd(), "adam": fl.optimizer(optax.adam, learning_rate=0.1)}


def calls_of(run):
    return {name: int(n) for name, n in vars(run.state.calls).items() if int(n)}


# --- values within a cost --------------------------------------------------------------------------


def test_the_value_within_a_cost_is_that_of_a_loop_in_numpy(x64):
    result = fl.race(wells, start, PAIR, cost=40, keys=(3, 4))
    costs = np.array([0.5, 1.0, 2.5, 17.0, 40.0])
    found = result.at(costs)
    for name, loop, rate in (("descent", descent, 0.05), ("adam", adam, 0.1)):
        for j, seed in enumerate((3, 4)):
            values = loop(np.asarray(start(jax.random.key(seed))), 39, rate)
            # The start costs the first gradient, and each step one more.
            expected = [np.nan if c < 1 else values[: int(c)].min() for c in costs]
            np.testing.assert_allclose(found[name][j], expected, rtol=1e-12)
            np.testing.assert_allclose(result.curves[name][j].value, values, rtol=1e-12)
            np.testing.assert_array_equal(result.curves[name][j].cost, 1 + np.arange(40))
    np.testing.assert_array_equal(result.at(17)["adam"], found["adam"][:, 3])


def test_every_solver_starts_where_the_key_says(x64):
    result = fl.race(wells, start, PAIR, cost=5, keys=(0, 7))
    for j, seed in enumerate((0, 7)):
        first = value(np.asarray(start(jax.random.key(seed))))
        for runs in result.solutions.values():
            assert float(runs[j].history["value"][0]) == pytest.approx(first, rel=1e-14)
    point = fl.race(wells, START, PAIR, cost=5)
    for runs in point.solutions.values():
        assert float(runs[0].history["value"][0]) == pytest.approx(value(START), rel=1e-14)


def test_float32_is_raced_in_float32(x32):
    result = fl.race(lambda x: jnp.sum(x**2), np.ones(2, np.float32), {"a": sgd(0.25)}, cost=4)
    assert result.solutions["a"][0].x.dtype == np.float32
    assert result.at(4)["a"].tolist() == [2 * 0.5**6]  # 2 · (½)²ᵗ at t = 3, exact


def test_what_is_not_finite_is_not_reached(x64):
    result = fl.race(wells, 3 * START, {"wild": sgd(10.0), "tame": sgd(0.001)}, cost=30)
    assert result.at(30)["wild"].tolist() == [pytest.approx(value(3 * START), rel=1e-14)]
    assert [(row.name, row.status) for row in result.table()] == [("tame", "budget"), ("wild", "diverged")]


# --- what the methods spend ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("cost", [1, 2, 9.5, 30])
def test_a_gradient_for_the_start_and_one_a_step(name, cost, x64):
    run = fl.race(wells, START, {name: PAIR[name]}, cost=cost).solutions[name][0]
    assert calls_of(run) == {"gradient": int(np.ceil(cost))}
    assert int(run.steps) == np.ceil(cost) - 1
    assert str(run.status) == f"budget by call_budget({cost:g}) at step {int(run.steps)}"


def test_a_line_search_pays_for_its_trials(x64):
    asked = 0

    def tick():
        nonlocal asked
        asked += 1

    def counted(x):
        jax.debug.callback(tick)
        return wells(x)

    result = fl.race(counted, START, {"lbfgs": fl.optimizer(optax.lbfgs)}, cost=12)
    jax.effects_barrier()
    run = result.solutions["lbfgs"][0]
    assert calls_of(run) == {"gradient": asked}
    assert asked >= 12 and asked > int(run.steps) + 1
    counts = result.curves["lbfgs"][0].cost
    assert counts[0] == 1 and counts[-2] < 12 <= counts[-1] == asked
    # A step that ends beyond the cost is not within it.
    assert result.at(12)["lbfgs"] == run.history["value"][: -1 if asked > 12 else None].min()


def test_a_perturbation_costs_a_gradient_more(x64):
    # From the minimum of ½‖x‖², a perturbation buys nothing: the method waits `patience` steps and ends.
    solver = fl.perturbed_gradient_descent(0.1, patience=6)
    run = fl.race(lambda x: 0.5 * jnp.sum(x**2), np.zeros(3), {"pgd": solver}, cost=100).solutions["pgd"][0]
    # init 1; step 1 perturbs and descends: 2; five more steps: 5; the step that returns asks nothing.
    assert run.history["calls.gradient"].tolist() == [1, 3, 4, 5, 6, 7, 8, 8]
    assert run.status.name == "converged" and calls_of(run) == {"gradient": 8}


ROWS = np.random.default_rng(0).normal(size=(40, 3))
TARGETS = ROWS @ np.array([1.0, -2.0, 0.5]) + np.random.default_rng(1).normal(size=40)


def minibatches(batch_size=8):
    return fl.FiniteSum(lambda x, batch: 0.5 * (batch[0] @ x - batch[1]) ** 2, (ROWS, TARGETS), batch_size=batch_size)


def stochastic(seed, steps, rate, batch=8):
    x = np.zeros(3)
    values = [0.5 * np.mean((ROWS @ x - TARGETS) ** 2)]
    for t in range(1, steps + 1):
        rows = np.asarray(jax.random.randint(jax.random.fold_in(jax.random.key(seed), t), (batch,), 0, 40))
        x = x - rate * ROWS[rows].T @ (ROWS[rows] @ x - TARGETS[rows]) / batch
        values.append(0.5 * np.mean((ROWS @ x - TARGETS) ** 2))
    return np.array(values)


def test_minibatches_cost_their_share_and_the_records_are_free(x64):
    result = fl.race(minibatches(), np.zeros(3), {"sgd": sgd()}, cost=3, keys=(0, 5))
    for j, seed in enumerate((0, 5)):
        run = result.solutions["sgd"][j]
        assert calls_of(run) == {"minibatch": 15}  # a fifth of the data each
        assert int(run.calls.gradient) >= 15  # the loop's: a full gradient for each record
        values = stochastic(seed, 15, 0.05)
        np.testing.assert_allclose(result.curves["sgd"][j].value, values, rtol=1e-12)
        np.testing.assert_allclose(result.curves["sgd"][j].cost, np.arange(16) / 5, rtol=1e-15)
        np.testing.assert_allclose(result.at([0, 1, 3])["sgd"][j], [values[0], values[:6].min(), values.min()])


def test_a_long_race_over_minibatches_is_recorded_once_a_pass(x64):
    run = fl.race(minibatches(), np.zeros(3), {"sgd": sgd()}, cost=40, keys=(2,)).solutions["sgd"][0]
    assert run.history["step"].tolist() == list(range(0, 201, 5))
    np.testing.assert_allclose(run.history["value"], stochastic(2, 200, 0.05)[::5], rtol=1e-11)


def test_full_gradients_of_a_finite_sum_cost_one_and_are_recorded_each(x64):
    solver = fl.perturbed_gradient_descent(0.05, gradient_threshold=1e-9)
    result = fl.race(minibatches(), np.zeros(3), {"full": solver, "mini": sgd()}, cost=6)
    run = result.solutions["full"][0]
    assert calls_of(run) == {"gradient": 6} and run.history["step"].tolist() == list(range(6))
    x, values = np.zeros(3), []
    for _ in range(6):
        values.append(0.5 * np.mean((ROWS @ x - TARGETS) ** 2))
        x = x - 0.05 * ROWS.T @ (ROWS @ x - TARGETS) / 40
    np.testing.assert_allclose(result.at([1, 4, 6])["full"][0], np.array(values)[[0, 3, 5]], rtol=1e-12)
    assert calls_of(result.solutions["mini"][0]) == {"minibatch": 30}


def test_the_point_between_two_records_where_a_run_ends_is_on_the_curve(x64):
    curve = fl.race(minibatches(), np.zeros(3), {"sgd": sgd()}, cost=40, steps=13).curves["sgd"][0]
    assert curve.step.tolist() == [0, 5, 10, 13]
    assert curve.cost == pytest.approx([0, 1, 2, 2.6])
    np.testing.assert_allclose(curve.value, stochastic(0, 13, 0.05)[[0, 5, 10, 13]], rtol=1e-12)


# --- weights ---------------------------------------------------------------------------------------


class Eighth(fl.Solver):
    """On ½x² each step asks a gradient and a Hessian product, and goes seven eighths of the way to 0."""

    def init(self, problem, x, *, key):
        return fl.State(x, fl.Calls())

    def step(self, problem, state, *, key):
        way = problem.hvp(state.x, problem.gradient(state.x))
        return fl.State(state.x - 0.875 * way, state.calls + fl.Calls(gradient=1, hvp=1))


def test_the_price_of_a_hessian_product_decides_who_wins(x64):
    half_square = lambda x: 0.5 * x**2  # noqa: E731
    solvers = {"halves": sgd(0.5), "eighths": Eighth()}
    # After 12 gradients: 11 steps of ½, x = 2⁻¹¹. Of ⅛: four steps at 1 + 2, x = 2⁻¹²; two at 1 + 5, 2⁻⁶.
    cheap = fl.race(half_square, 1.0, solvers, cost=12)
    dear = fl.race(half_square, 1.0, solvers, cost=12, weights={"hvp": 5.0})
    assert cheap.at(12) == {"halves": [0.5 * 4.0**-11], "eighths": [0.5 * 4.0**-12]}
    assert dear.at(12) == {"halves": [0.5 * 4.0**-11], "eighths": [0.5 * 4.0**-6]}
    assert [row.name for row in cheap.table()] == ["eighths", "halves"]
    assert [row.name for row in dear.table()] == ["halves", "eighths"]
    again = cheap.with_weights({"hvp": 5.0})
    assert (again.cost, again.weights["hvp"], cheap.weights["hvp"]) == (12, 5, 2)
    assert again.at(12) == dear.at(12)
    # Dearer gradients: 12 of them cost 24 now, four steps of ⅛ 16. Beyond 16 nothing is known of the latter.
    assert cheap.with_weights({"gradient": 2.0}).cost == 16
    with pytest.raises(fl.InputError, match="cost: got 17; expected at most that of the race, 16"):
        cheap.with_weights({"gradient": 2.0}).at(17)


def test_runs_that_ended_by_themselves_do_not_limit_other_weights(x64):
    half_square = lambda x: 0.5 * x**2  # noqa: E731
    solvers = {"halves": sgd(0.5), "eighths": Eighth()}
    result = fl.race(half_square, 1.0, solvers, cost=60, stop=fl.gradient_norm(2.0**-30))
    # 30 steps of ½ and ten of ⅛ are enough; the dearer of the two is the cost then.
    assert [run.status.name for runs in result.solutions.values() for run in runs] == ["converged"] * 2
    assert result.with_weights({"gradient": 3.0}).cost == max(3 * 31, 10 * (3 + 2))


# --- the table -------------------------------------------------------------------------------------


class Walk(fl.Solver):
    """Goes to a random place, whose value is what it reached; asks one value."""

    random = True

    def init(self, problem, x, *, key):
        return fl.State(x, fl.Calls())

    def step(self, problem, state, *, key):
        return fl.State(jax.random.uniform(key, state.x.shape, state.x.dtype), state.calls + fl.Calls(value=1))


def test_median_and_spread_are_over_the_keys(x64):
    result = fl.race(lambda x: x, 2.0, {"walk": Walk(), "still": sgd(1e-3)}, cost=0.5, keys=(1, 2, 3, 4))
    drawn = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(seed), 1))) for seed in (1, 2, 3, 4)]
    walk, still = result.table()
    assert (walk.name, still.name) == ("walk", "still")
    assert (walk.value, walk.lowest, walk.highest) == (np.median(drawn), min(drawn), max(drawn))
    assert (walk.steps, walk.cost, walk.calls.as_dict(), walk.status) == (1, 0.5, {"value": 1}, "budget")
    # Its first gradient is beyond the cost already.
    assert np.isnan(still.value) and (still.steps, still.cost) == (0, 1)
    assert walk.seconds > 0 and walk.compile_seconds > 0


def test_runs_that_can_only_be_the_same_are_made_once(x64):
    result = fl.race(lambda x: x**2, 2.0, {"walk": Walk(), "descent": sgd()}, cost=3, keys=(1, 2))
    first, second = result.solutions["descent"]
    assert first is second
    assert result.solutions["walk"][0] is not result.solutions["walk"][1]
    moved = fl.race(lambda x: x**2, lambda key: jax.random.normal(key), {"descent": sgd()}, cost=3, keys=(1, 2))
    assert float(moved.at(3)["descent"][0]) != float(moved.at(3)["descent"][1])


def test_the_table_in_words(x64):
    words = str(fl.race(wells, START, PAIR, cost=20, keys=(0, 1), weights={"value": 0.25})).splitlines()
    assert words[0] == "lowest value within cost 20 (gradient 1, value 0.25, hvp 2, minibatch 1), 2 keys"
    assert " ".join(words[1].split()) == "solver median lowest highest status steps cost seconds compiling calls"
    best = {"descent": descent(START, 19, 0.05).min(), "adam": adam(START, 19, 0.1).min()}
    order = sorted(best, key=best.__getitem__)
    assert [line.split()[0] for line in words[2:]] == order
    assert [line.split()[1] for line in words[2:]] == [f"{best[name]:.6g}" for name in order]
    assert all(line.endswith("  20 gradient") for line in words[2:])
    shared = str(fl.race(minibatches(), np.zeros(3), {"sgd": sgd()}, cost=1))
    assert "minibatch 1 times its share of the data, 0.2), 1 key\n" in shared


def test_a_rule_may_end_a_run_before(x64):
    run = fl.race(wells, START, {"a": sgd()}, cost=1000, stop=fl.gradient_norm(0.1)).solutions["a"][0]
    norms = []
    x = START
    while not norms or norms[-1] > 0.1:
        norms.append(np.linalg.norm(gradient(x)))
        x = x - 0.05 * gradient(x)
    assert str(run.status) == f"converged by gradient_norm(0.1) at step {len(norms) - 1}"


def test_a_model_that_can_be_called_is_a_point(x64):
    # One weight w from 0, loss (w − 1)²: each step of ¼ halves the distance to 1.
    model = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.weight, model, jnp.zeros((1, 1)))
    result = fl.race(lambda m: jnp.sum((m(jnp.ones(1)) - 1) ** 2), model, {"a": sgd(0.25)}, cost=6, keys=(0, 1))
    assert result.at(6)["a"] == pytest.approx(0.25**5, rel=1e-14)
    assert isinstance(result.solutions["a"][0].x, eqx.nn.Linear)


def test_interrupt_returns_the_runs_that_were_begun(x64):
    asked = 0

    def tick():
        nonlocal asked
        asked += 1
        if asked == 40:
            os.kill(os.getpid(), signal.SIGINT)

    def counted(x):
        jax.debug.callback(tick)
        return jnp.sum(x**2)

    result = fl.race(counted, START, {"first": sgd(1e-9), "second": sgd()}, cost=1e9, steps=2**31 - 1, keys=(0, 1))
    assert result.interrupted and list(result.solutions) == ["first"]
    (run,) = result.solutions["first"]
    assert run.status.name == "interrupted" and calls_of(run)["gradient"] >= 40
    assert not fl.race(wells, START, PAIR, cost=2).interrupted
    assert "interrupted" in str(result)


def test_the_bar_counts_runs(x64, monkeypatch):
    from fallline.core import loop, progress, race

    shown = []

    class Seen(progress.Bar):
        def update(self, step, words):
            shown.append((self._steps, step, words))

    monkeypatch.setattr(race, "Bar", Seen)
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 0.0)
    fl.race(wells, start, PAIR, cost=6, keys=(0, 1))
    assert {total for total, _, _ in shown} == {4}
    begun = {(step, words.split(":")[0]) for _, step, words in shown}
    names = [(n, f"{name}, key {key} of 2") for n, (key, name) in
             enumerate((key, name) for key in (1, 2) for name in PAIR)]  # fmt: skip
    assert begun == set(names)


# --- what is recorded ------------------------------------------------------------------------------


def test_a_run_can_record_what_its_method_asked(x64):
    record = ("calls.gradient", "value", "calls.minibatch")
    run = fl.minimize(wells, START, sgd(), steps=10, stop=None, every=2, record=record)
    assert run.history["calls.gradient"].tolist() == [1, 3, 5, 7, 9, 11]
    assert run.history["calls.minibatch"].tolist() == [0] * 6
    drawn = fl.minimize(minibatches(), np.zeros(3), sgd(), steps=10, stop=None, key=0, record=record)
    assert drawn.history["calls.minibatch"].tolist() == [0, 5, 10]
    assert drawn.history["calls.gradient"].tolist() == [0, 0, 0]  # the loop asked three
    assert int(drawn.calls.gradient) >= 3
    swept = fl.sweep(wells, START, [sgd(), sgd(0.01)], steps=4, stop=None, record=record)
    assert swept.history["calls.gradient"].tolist() == [[1, 2, 3, 4, 5]] * 2


def test_an_oracle_that_there_is_not_is_no_record(x64):
    with pytest.raises(fl.InputError, match=r"record: got 'calls.prox'; expected one of .*calls.gradient"):
        fl.minimize(wells, START, sgd(), record=("calls.prox",))


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solvers": {}}, "solvers: got none; expected at least one solver"),
        ({"solvers": [sgd()]}, "solvers: got list; expected a dictionary of solvers by name"),
        ({"solvers": {"a": optax.sgd(0.1)}}, r"solvers\['a'\]: got \w+; expected a fallline solver; wrap Optax"),
        ({"solvers": {1: sgd()}}, "solvers: got the name 1; expected names as text"),
        ({"cost": 0}, "cost: got 0; expected a finite number above 0"),
        ({"cost": np.inf}, "cost: got inf"),
        ({"cost": "many"}, "cost: got 'many'"),
        ({"weights": {"prox": 1.0}}, "weights: got 'prox'; expected one of gradient, hvp, minibatch, value"),
        ({"weights": {"hvp": -1.0}}, "hvp: got -1.0; expected a finite number of at least 0"),
        ({"keys": ()}, "keys: got none"),
        ({"keys": (1, 2, 1)}, "keys: got 1 twice; expected each key once"),
        ({"keys": 3}, "keys: got 3; expected a sequence of seeds or keys"),
        ({"keys": jax.random.key(0)}, "keys: got .*; expected a sequence"),
        ({"keys": (None,)}, "key: got None"),
        ({"stop": "auto"}, "stop: got 'auto'; expected a stopping rule, or None"),
        ({"steps": -1}, "steps: got -1"),
        ({"x0": np.zeros(2, np.int32)}, "x0: got int32"),
        ({"problem": lambda x: x}, "problem: got"),
    ],
)
def test_bad_input(options, words, x64):
    given = {"problem": wells, "x0": START, "solvers": PAIR, "cost": 5, **options}
    with pytest.raises(fl.InputError, match=words):
        fl.race(**given)


def test_a_solver_that_cannot_run_is_refused_before_any_other_runs(x64):
    class Proximal(Eighth):
        needs = frozenset({"prox"})

    asked = []

    def counted(x):
        jax.debug.callback(lambda: asked.append(1))
        return jnp.sum(x**2)

    with pytest.raises(fl.InputError, match="Proximal needs: prox"):
        fl.race(counted, START, {"a": sgd(), "b": Proximal()}, cost=5)
    jax.effects_barrier()
    assert asked == []


def test_inside_jit_it_is_refused(x64):
    with pytest.raises(fl.InputError, match="race: got a traced value; expected a call outside jit and vmap"):
        jax.jit(lambda x: fl.race(wells, x, PAIR, cost=5).at(5)["adam"])(jnp.asarray(START))


def test_weights_that_make_everything_free_are_no_weights(x64):
    result = fl.race(wells, START, PAIR, cost=5)
    with pytest.raises(fl.InputError, match="cost of the race under these weights: got 0"):
        result.with_weights({"gradient": 0.0})
    with pytest.raises(fl.InputError, match="weights: got 'grad'; .*did you mean 'gradient'"):
        result.with_weights({"grad": 1.0})
