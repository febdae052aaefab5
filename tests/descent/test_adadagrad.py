"""AdAdaGrad against its algorithm in NumPy, on the rows that it drew."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance.checks import compilations

import fallline as fl
import fallline.descent.adadagrad
from fallline.core.solver import with_array_numbers
from fallline.descent.adadagrad import (
    Batch,
    _few,
    adadagrad,
    adagrad,
    adagrad_norm,
    scale_by_adagrad,
    scale_by_adagrad_norm,
)
from fallline.parts.batch_size import CoordinateTest, InnerProductTest, NormTest, adapt_batch_size, by_samples

N, D = 60, 4


def robust(x, batch):
    """φ(r) = r² / (2 (1 + r²)) of residuals."""
    rows, targets = batch
    r = rows @ x["w"] + x["c"] - targets
    return r**2 / (2 * (1 + r**2))


def data():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(N, D)) * np.linspace(0.5, 1.5, D)
    return rows, rows @ np.arange(1.0, D + 1) + draw.normal(size=N)


def problem(micro=7, dtype=np.float64):
    return fl.FiniteSum(robust, tuple(a.astype(dtype) for a in data()), batch_size=micro)


def start(dtype=np.float64):
    return {"w": jnp.ones(D, dtype), "c": jnp.zeros((), dtype)}


def per_example(x, index):
    """Losses and gradients of rows by hand, with the coordinates in the order of the leaves: c, then w."""
    rows, targets = (a[index] for a in data())
    r = rows @ x[1:] + x[0] - targets
    slope = r / (1 + r**2) ** 2
    return r**2 / (2 * (1 + r**2)), np.column_stack([slope, slope[:, None] * rows])


def candidate(name, g):
    b, mean = len(g), g.mean(0)
    square, products = mean @ mean, g @ mean
    across = g - np.outer(products, mean) / square
    return {
        "norm": ((g - mean) ** 2).sum() / (b - 1) / (0.7**2 * square),
        "inner": products.var(ddof=1) / (0.5**2 * square**2),
        "augmented": max(
            products.var(ddof=1) / (0.5**2 * square**2),
            ((across - across.mean(0)) ** 2).sum() / (b - 1) / (1.2**2 * square),
        ),
        "coordinates": (g.var(0, ddof=1) / (0.9**2 * mean**2))[mean**2 > 1e-4].max(initial=0),
    }[name]


TESTS = {
    "norm": NormTest(0.7),
    "inner": InnerProductTest(0.5),
    "augmented": InnerProductTest(0.5, 1.2),
    "coordinates": CoordinateTest(0.9, 1e-4),
}


class Norm:
    """One accumulator for the whole vector."""

    def __init__(self):
        self.s = 0.04

    def step(self, g):
        self.s = self.s + g @ g
        return 0.8 * g / np.sqrt(self.s)


class Each:
    """One accumulator for each coordinate."""

    def __init__(self):
        self.s = 0.0

    def step(self, g):
        self.s = self.s + g**2
        return 0.3 * g / (np.sqrt(self.s) + 1e-3)


UPDATES = {
    "norm": (Norm, lambda: {"learning_rate": 0.8, "initial_accumulator": 0.04}),
    "each": (Each, lambda: {"update": fl.optimizer(adagrad, learning_rate=0.3, eps=1e-3)}),
}


@eqx.filter_jit
def begun(solver, sum_of, x, key):
    return solver.init(sum_of, x, key=key)


@eqx.filter_jit
def stepped(solver, sum_of, state, key):
    return solver.step(sum_of, state, key=key)


def stepper(solver, sum_of):
    """`init` and `step` as `minimize` compiles them: one program for all numbers."""
    solver = with_array_numbers(solver, np.float64)
    return functools.partial(begun, solver, sum_of), functools.partial(stepped, solver, sum_of)


def taken(solver, sum_of, x, steps):
    """The state after some steps."""
    init, step = stepper(solver, sum_of)
    state = init(x, jax.random.key(0))
    for t in range(steps):
        state = step(state, jax.random.key(t + 1))
    return state


@pytest.mark.parametrize(
    ("test", "update", "replace", "most"),
    [
        ("norm", "norm", False, 45),
        ("inner", "norm", True, None),
        ("augmented", "each", False, None),
        ("coordinates", "each", True, 45),
    ],
)
def test_every_step_is_that_of_the_algorithm(test, update, replace, most, x64):
    """Points, batch sizes, candidates and counts, on the rows of each batch; sizes are no multiples of 7."""
    by_hand, options = UPDATES[update]
    solver = adadagrad(
        test=TESTS[test], batch_size=4, max_batch_size=most, test_interval=2, replace=replace, **options()
    )
    sum_of, most = problem(), most or N
    init, step = stepper(solver, sum_of)
    state, x, b, samples, asked, last = init(start(), jax.random.key(1)), np.r_[0.0, np.ones(D)], 4, 0, 0, 0.0
    rule, sizes = by_hand(), []
    for t in range(1, 25):
        key = jax.random.key(100 + t)
        before, state = state, step(state, key)
        if replace:
            batch = Batch(sum_of, before.batch_size, key, None, None)
            index = np.concatenate([np.asarray(_rows(batch, j)) for j in range(-(-b // 7))])
        else:
            index = np.asarray(state.order)[int(state.cursor) - b : int(state.cursor)]
            assert len(set(index)) == b
        losses, g = per_example(x, index)
        assert len(g) == b
        x = x - rule.step(g.mean(0))
        asked, samples = asked - (-b // 7), samples + b
        if t % 2 == 0 and b < most:
            last = candidate(test, g)
            asked += -(-b // 7) if test in ("inner", "augmented") else 0
            b = min(most, max(b, int(np.ceil(last))))
        np.testing.assert_allclose(np.r_[state.x["c"], state.x["w"]], x, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.batch_value, losses.mean(), rtol=1e-9)
        np.testing.assert_allclose(state.candidate, last, rtol=1e-8)
        assert (int(state.batch_size), int(state.samples), int(state.steps)) == (b, samples, t)
        assert int(state.calls.minibatch) == asked
        sizes.append(b)
    assert len(set(sizes)) > 2 and sizes[-1] > 20, sizes


def _rows(batch, j):
    """The numbers of the rows of a micro-batch, by a problem whose data are the numbers."""
    numbers = fl.FiniteSum(lambda x, i: x * i, np.arange(N), batch_size=7)
    rows, inside = batch._replace(problem=numbers).micro_batch(jnp.int32(j))
    return np.asarray(rows)[np.asarray(inside)]


# ---- what is computed ---------------------------------------------------------------------------


def picks(x, index):
    """The gradient counts how often each number was drawn."""
    return x[index]


def drawn(replace, size, micro=5, steps=1):
    """How often each of 12 numbers was drawn in each step."""
    numbers = fl.FiniteSum(picks, np.arange(12), batch_size=micro)
    solver = adadagrad(
        update=fl.optimizer(optax.sgd, learning_rate=1.0), batch_size=size, max_batch_size=size, replace=replace
    )
    init, step = stepper(solver, numbers)
    state, seen = init(jnp.zeros(12), jax.random.key(0)), []
    for t in range(steps):
        after = step(state, jax.random.key(t + 1))
        seen.append(np.asarray(state.x - after.x) * size)
        state = after
    np.testing.assert_allclose(seen, np.round(seen), atol=1e-12)
    return np.round(seen).astype(int)


def test_without_replacement_no_example_is_drawn_twice_before_the_permutation_is_used_up(x64):
    counts = drawn(replace=False, size=4, steps=30)
    assert counts.max() == 1 and (counts.sum(1) == 4).all()
    np.testing.assert_array_equal(counts.reshape(10, 3, 12).sum(1), 1)
    assert len({tuple(row) for row in counts}) > 20  # a new one each time
    # Of 12 numbers 7 leave 5 behind: the next batch comes from a new permutation.
    odd = drawn(replace=False, size=7, steps=10)
    assert odd.max() == 1 and (odd.sum(1) == 7).all()


def test_where_nothing_is_checked_a_batch_is_of_all_examples_at_most(x64):
    """A sweep does not check its solvers against the problem."""
    solver = adadagrad(test=TESTS["augmented"], batch_size=N + 9, replace=False, **UPDATES["each"][1]())
    state = taken(solver, problem(), start(), 1)
    assert int(state.batch_size) == int(state.samples) == N


def test_with_replacement_the_draws_are_uniform_and_independent(x64):
    counts = drawn(replace=True, size=9, steps=400)
    assert (counts.sum(1) == 9).all() and counts.max() > 1
    np.testing.assert_allclose(counts.mean(0), 9 / 12, atol=5 * np.sqrt(9 / 12 / 400))
    np.testing.assert_allclose(counts.var(0), 9 / 12 * 11 / 12, rtol=0.35)


def test_all_examples_without_replacement_are_the_deterministic_gradient(x64):
    options = {"test": TESTS["norm"], "batch_size": N, "max_batch_size": N, "initial_accumulator": 0.04}
    state = taken(adadagrad(0.8, replace=False, **options), problem(), start(), 15)
    x, rule = np.r_[0.0, np.ones(D)], Norm()
    for _ in range(15):
        x = x - rule.step(per_example(x, np.arange(N))[1].mean(0))
    np.testing.assert_allclose(np.r_[state.x["c"], state.x["w"]], x, rtol=1e-10)
    assert int(state.calls.minibatch) == 15 * 9  # of 7 examples, the last of 4
    assert float(state.candidate) == 0 and int(state.batch_size) == N  # nothing is tested at the largest batch
    first = taken(adadagrad(0.8, replace=False, **options), problem(), start(), 1)
    np.testing.assert_array_equal(state.order, first.order)  # nor is anything permuted again


class Counting(fl.FiniteSum):
    """Counts the micro-batches that are worked on when the compiled program runs."""

    def losses(self, x, batch):
        if len(batch[1]) == 7:
            jax.debug.callback(lambda: asked.append(1))
        return super().losses(x, batch)

    def per_example_gradients(self, x, batch):  # beside losses of the same rows
        return super().per_example_gradients(x, batch)


asked: list[int] = []


def test_the_work_grows_with_the_batch_and_nothing_is_compiled_for_it(x64):
    solver = adadagrad(0.8, test=TESTS["augmented"], batch_size=4, max_batch_size=60)
    init, step = stepper(solver, Counting(robust, data(), batch_size=7))
    state = init(start(), jax.random.key(0))
    jax.block_until_ready(step(state, jax.random.key(0)))
    work, sizes = [], []
    keys = [jax.random.key(t) for t in range(40)]
    with compilations() as found:
        for key in keys:
            asked.clear()
            sizes.append(int(state.batch_size))
            state = step(state, key)
            jax.effects_barrier()
            work.append(len(asked))
    assert not found
    np.testing.assert_array_equal(work, [-(-b // 7) * (1 if b == 60 else 2) for b in sizes])
    assert sizes[0] == 4 and sizes[-1] == 60 and np.all(np.diff(sizes) >= 0)
    assert int(state.calls.minibatch) == sum(work)


def test_other_numbers_and_growing_batches_share_one_program_of_minimize(x64):
    def run(eta, size, rate):
        solver = adadagrad(rate, test=NormTest(eta), batch_size=size, max_batch_size=50)
        return fl.minimize(problem(), start(), solver, steps=30, stop=None, key=0, every=1, record=("batch_size",))

    first = run(0.7, 4, 0.8)
    with compilations() as found:
        second = run(0.9, 9, 0.5)
    assert not found
    assert first.history["batch_size"][-1] > 20 and second.history["batch_size"][0] == 9


def test_the_test_decides_on_the_batch_of_the_step_not_on_a_new_one(x64):
    """A batch without noise keeps its size, whatever the other examples are."""
    rows, targets = data()
    rows[:] = rows[0]
    targets[:] = targets[0]
    calm = fl.FiniteSum(robust, (rows, targets), batch_size=7)
    for test, replace, most in (("augmented", False, None), ("coordinates", True, 45)):
        options = {"test": TESTS[test], "replace": replace, "max_batch_size": most, **UPDATES["each"][1]()}
        assert int(taken(adadagrad(batch_size=10, **options), calm, start(), 1).batch_size) == 10


def test_a_learning_rate_measured_in_samples(x64):
    """Of b = 4 and gradient norm g: steps α(0), α(4), α(8) times g/√s."""
    flat = fl.FiniteSum(lambda x, rows: rows * x, np.full(12, 3.0), batch_size=5)
    init, step = stepper(adadagrad(lambda samples: 1 / (1 + samples), batch_size=4, initial_accumulator=7.0), flat)
    state, x, s = init(jnp.zeros(()), jax.random.key(0)), 0.0, 7.0
    for t in range(3):
        state = step(state, jax.random.key(t))
        s += 9.0
        x -= 1 / (1 + 4 * t) * 3 / np.sqrt(s)
        np.testing.assert_allclose(state.x, x, rtol=1e-7)  # Optax's schedules count in 32 bits


def test_any_optimizer_can_be_plugged_in(x64):
    adam = optax.chain(optax.scale_by_adam(), by_samples(lambda samples: 0.1 / (1 + samples / N)))
    state = taken(adadagrad(update=adam, batch_size=N, replace=False), problem(), start(), 5)
    x, m, v = np.r_[0.0, np.ones(D)], 0.0, 0.0
    for t in range(1, 6):
        g = per_example(x, np.arange(N))[1].mean(0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - 0.1 / t * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(np.r_[state.x["c"], state.x["w"]], x, rtol=1e-6)


def beyond_five(x, rows):
    return jnp.where(rows > 5, jnp.nan, 1.0) * x


def test_nan_is_not_hidden_and_leaves_the_batch_size(x64):
    broken = fl.FiniteSum(beyond_five, np.arange(12.0), batch_size=5)
    state = taken(adadagrad(batch_size=11, replace=False), broken, jnp.ones(()), 1)
    assert np.isnan(state.x) and np.isnan(state.candidate) and int(state.batch_size) == 11
    state = taken(adadagrad(batch_size=12, replace=False), broken, jnp.ones(()), 1)  # where nothing is tested
    assert np.isnan(state.x) and np.isnan(state.batch_value)


def test_what_fills_up_a_micro_batch_is_of_no_account(x64):
    """Rows behind a batch of 6 whose losses are NaN."""
    broken = fl.FiniteSum(beyond_five, np.arange(12.0), batch_size=5)
    batch = Batch(broken, jnp.int32(6), None, jnp.arange(12, dtype=jnp.int32), jnp.int32(0))

    @jax.jit
    def look(x):
        value, slope = batch.add_mean(jnp.int32(1), x, *batch.add_mean(jnp.int32(0), x, jnp.zeros(()), jnp.zeros(())))
        each = batch.add_examples(jnp.int32(1), x, jnp.zeros(()), batch.nothing(x, False), by_coordinate=False)[1]
        return value, slope, each.count, each.mean, batch.slopes(jnp.int32(1), x, x).count

    np.testing.assert_allclose(look(jnp.asarray(2.0)), [2.0, 1.0, 1.0, 1.0, 1.0])


def distance(x, a):
    return jnp.abs(x - a) ** 2


def test_complex_points(x64):
    """|z − a|² over complex a: as in the plane, where the gradients are 2 (z − a)."""
    points = np.random.default_rng(3).normal(size=(12, 2))
    line = fl.FiniteSum(distance, points @ np.array([1, 1j]), batch_size=5)
    solver = adadagrad(test=TESTS["augmented"], batch_size=4, test_interval=2, replace=False, initial_accumulator=0.5)
    state = taken(solver, line, jnp.asarray(1 + 0.3j), 2)
    z, s = np.array([1.0, 0.3]), 0.5
    for index in np.asarray(state.order)[:8].reshape(2, 4):  # without a test, and with one
        g = 2 * (z - points[index])
        s += g.mean(0) @ g.mean(0)
        z = z - g.mean(0) / np.sqrt(s)
    np.testing.assert_allclose([state.x.real, state.x.imag], z, rtol=1e-12)
    np.testing.assert_allclose(state.candidate, candidate("augmented", g), rtol=1e-10)


@pytest.mark.parametrize(("most", "size"), [(5, 1), (15, 3), (1000, 6)])
def test_examples_by_a_few_at_a_time_have_the_same_moments(most, size, x64, monkeypatch):
    monkeypatch.setattr(fallline.descent.adadagrad, "_CACHE", most)
    assert _few(6, D + 1) == size
    order = jnp.arange(N, dtype=jnp.int32)
    batch = Batch(problem(6), jnp.int32(8), None, order, jnp.int32(3))  # its second micro-batch is not full
    x = start()

    @jax.jit
    def look(x):
        carry = jnp.zeros(()), batch.nothing(x, True)
        for j in (0, 1):
            carry = batch.add_examples(jnp.int32(j), x, *carry, by_coordinate=True)
        return carry

    (value, found), (losses, g) = look(x), per_example(np.r_[0.0, np.ones(D)], np.arange(3, 11))
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-12)
    assert float(found.count) == 8
    for leaves, expected in ((found.mean, g.mean(0)), (found.variance(), g.var(0, ddof=1))):
        np.testing.assert_allclose(np.r_[leaves["c"], leaves["w"]], expected, rtol=1e-12)


# ---- the updates --------------------------------------------------------------------------------


def test_adagrad_norm_has_one_accumulator_for_all_parameters(dtype):
    draw = np.random.default_rng(0)
    steps = [{"a": draw.normal(size=(2, 3)).astype(dtype), "b": draw.normal(size=()).astype(dtype)} for _ in range(5)]
    update = scale_by_adagrad_norm(0.5)
    state, s = update.init(steps[0]), 0.5
    for g in steps:
        scaled, state = jax.jit(update.update)(g, state)
        s += float(np.sum(np.float64(g["a"]) ** 2) + np.float64(g["b"]) ** 2)  # this gradient's first
        np.testing.assert_allclose(scaled["a"], g["a"] / np.sqrt(s), rtol=10 * np.finfo(dtype).eps)
        np.testing.assert_allclose(scaled["b"], g["b"] / np.sqrt(s), rtol=10 * np.finfo(dtype).eps)
    assert state.sum_of_squares.shape == ()


def test_adagrad_is_the_formula_and_optax_s_where_eps_is_zero(x64):
    gradients = np.random.default_rng(1).normal(size=(6, 4))
    gradients[:, 2] = 0
    ours, theirs = adagrad(0.1, 0.2, eps=0.3), optax.adagrad(0.1, 0.0, eps=0.0)
    bare = adagrad(0.1, eps=0.0)
    state, other, empty, s = ours.init(gradients[0]), theirs.init(gradients[0]), bare.init(gradients[0]), 0.2
    for g in gradients:
        updates, state = jax.jit(ours.update)(g, state)
        s = s + g**2
        np.testing.assert_allclose(updates, -0.1 * g / (np.sqrt(s) + 0.3), rtol=1e-12)
        (a, empty), (b, other) = jax.jit(bare.update)(g, empty), jax.jit(theirs.update)(g, other)
        np.testing.assert_allclose(a, b, rtol=1e-12)
        assert a[2] == 0


def test_accumulators_have_32_bits(x32):
    for update in (scale_by_adagrad_norm(1.0), scale_by_adagrad(1.0)):
        g = jnp.full(3, 1e-2, jnp.bfloat16)
        state = update.init(g)
        for _ in range(50):  # 1 + 1e-4 is 1 in bfloat16
            scaled, state = jax.jit(update.update)(g, state)
        assert scaled.dtype == jnp.bfloat16 and state.sum_of_squares.dtype == jnp.float32
        assert float(jnp.max(state.sum_of_squares)) > 1.004


def test_in_a_training_loop_of_ones_own(x64):
    """A controller and an update chained reproduce the solver's steps on all examples."""
    update = optax.chain(adapt_batch_size(NormTest(0.7), 4, N - 1), adagrad_norm(0.8))
    sum_of = problem()
    x, state = start(), update.init(start())
    for _ in range(3):
        each = jax.jit(lambda x: sum_of.per_example_gradients(x, sum_of.data))(x)
        mean = jax.tree.map(lambda g: g.mean(0), each)
        updates, state = jax.jit(update.update)(mean, state, x, per_example_gradients=each)
        x = optax.apply_updates(x, updates)
    run = taken(adadagrad(0.8, test=TESTS["norm"], batch_size=N, max_batch_size=N, replace=False), sum_of, start(), 3)
    np.testing.assert_allclose(x["w"], run.x["w"], rtol=1e-10)
    assert int(state[0].batch_size) > 4


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: adadagrad(-1.0), "learning_rate: got -1.0"),
        (lambda: adadagrad(batch_size=1), "batch_size: got 1; expected a whole number of at least 2"),
        (lambda: adadagrad(batch_size=2.5), "batch_size: got 2.5"),
        (lambda: adadagrad(batch_size=16, max_batch_size=8), "max_batch_size: got 8; expected at least batch_size, 16"),
        (lambda: adadagrad(test_interval=0), "test_interval: got 0"),
        (lambda: adadagrad(initial_accumulator=0.0), "initial_accumulator: got 0.0"),
        (lambda: adadagrad(test="norm"), "test: got 'norm'; expected NormTest"),
        (lambda: adadagrad(test=NormTest), "test: got .*; expected NormTest"),
        (lambda: adadagrad(0.1, update=optax.adam(0.1)), "learning_rate: got 0.1; expected None beside an update"),
        (lambda: adadagrad(update="adam"), "update: got str"),
        (lambda: adadagrad(update=adapt_batch_size()), "update: got .* asks per_example_gradients"),
        (lambda: scale_by_adagrad_norm(0.0), "initial_accumulator: got 0.0"),
        (lambda: scale_by_adagrad_norm(-1.0), "initial_accumulator: got -1.0"),
        (lambda: scale_by_adagrad(-1.0), "initial_accumulator: got -1.0"),
        (lambda: scale_by_adagrad(eps=-1.0), "eps: got -1.0"),
        (lambda: adagrad(-0.1), "learning_rate: got -0.1"),
        (lambda: adagrad_norm(float("inf")), "learning_rate: got inf"),
    ],
)
def test_bad_numbers(make, words):
    with pytest.raises(fl.InputError, match=words):
        make()


@jax.custom_vjp
def backward_only(x):
    return x**2


backward_only.defvjp(lambda x: (x**2, x), lambda x, t: (2 * x * t,))


@pytest.mark.parametrize(
    ("sum_of", "solver", "words"),
    [
        (lambda: fl.FiniteSum(robust, data()), adadagrad, "problem: got .* without a batch size; .*batch_size=m"),
        (problem, lambda: adadagrad(batch_size=N + 1), "batch_size: got 61; expected at most the number of examples"),
        (problem, lambda: adadagrad(max_batch_size=1000), "max_batch_size: got 1000; expected at most .* 60"),
        (lambda: fl.Objective(lambda x: x["c"] ** 2), adadagrad, "problem: got .* without the oracle"),
        (problem, lambda: adadagrad(update=optax.lbfgs()), "update: got optimizer, which fails with"),
        (
            lambda: fl.FiniteSum(lambda x, rows: backward_only(x["c"]) * rows, np.ones(60), batch_size=7),
            lambda: adadagrad(test=InnerProductTest()),
            "problem: got .* fails with .* expected losses with forward derivatives",
        ),
    ],
)
def test_problems_and_updates_that_do_not_fit(sum_of, solver, words, x64):
    with compilations() as found, pytest.raises(fl.InputError, match=words):
        fl.minimize(sum_of(), start(), solver(), steps=2, key=0)
    assert not found


def test_a_key_is_needed(x64):
    with pytest.raises(fl.InputError, match="key: got None"):
        fl.minimize(problem(), start(), adadagrad(), steps=2)
