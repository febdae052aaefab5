"""Rules of workers and servers, on least squares, against NumPy and against Optax on the whole gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fallline import minimize
from fallline.core import trees
from fallline.core.errors import InputError
from fallline.distributed import Adopt, Gradient, LocalSteps, Mean, Momentum, Round, Sharded, Step, shard
from fallline.parts.codecs import Plain

WORKERS, EACH, D = 4, 6, 5
DRAWN = np.random.default_rng(7)
A = DRAWN.normal(size=(WORKERS, EACH, D))
B = DRAWN.normal(size=(WORKERS, EACH))
START = DRAWN.normal(size=D)


def squares(x, batch):
    rows, sides = batch
    return (rows @ x - sides) ** 2 / 2


def gradient_of(worker, x, rows=slice(None)):
    a, b = A[worker][rows], B[worker][rows]
    return a.T @ (a @ x - b) / len(b)


def value_of(worker, x):
    return np.mean((A[worker] @ x - B[worker]) ** 2) / 2


def mean_gradient(x):
    return np.mean([gradient_of(i, x) for i in range(WORKERS)], axis=0)


def shards(batch_size=None, dtype=np.float64):
    return Sharded(squares, (A.astype(dtype), B.astype(dtype)), batch_size)


def said(rule, memory, t, x=START, worker=2, problem=None, key=None):
    """A worker's message, what it keeps and its value."""
    own = jnp.asarray(A[worker], x.dtype), jnp.asarray(B[worker], x.dtype)
    return rule.message(problem or shards(), jnp.asarray(x), own, memory, jnp.int32(t), key)


def plain_round(worker, server):
    return Round(worker, Plain(), Mean(), None, server)


def test_a_gradient(x64):
    message, memory, value = said(Gradient(), None, 0)
    np.testing.assert_allclose(message, gradient_of(2, START), rtol=1e-13)
    np.testing.assert_allclose(value, value_of(2, START), rtol=1e-13)
    assert memory is None


def test_a_gradient_with_a_step_size(x64):
    g = gradient_of(2, START)
    np.testing.assert_allclose(said(Gradient(0.25), None, 0)[0], 0.25 * g, rtol=1e-13)
    rule = Gradient(lambda t: 1 / (2.0 + t))
    for t in (0, 3):
        np.testing.assert_allclose(said(rule, None, t)[0], g / (2 + t), rtol=1e-13)


def test_a_sample_is_drawn_from_the_worker_with_replacement(x64):
    """The rows that the key draws, and no others: with one example a message is one of six."""
    seen = set()
    for seed in range(40):
        message, _, _ = said(Gradient(), None, 0, problem=shards(1), key=jax.random.key(seed))
        match = [j for j in range(EACH) if np.allclose(message, gradient_of(2, START, [j]), rtol=1e-12)]
        seen.add(*match)
    assert seen == set(range(EACH))


def test_momentum(x64):
    beta, rule = 0.7, Momentum(0.7)
    memory, v = rule.init(jnp.asarray(START)), np.zeros(D)
    for t in range(4):
        x = START + t
        message, memory, value = said(rule, memory, t, x)
        v = beta * v + (1 - beta) * gradient_of(2, x)
        np.testing.assert_allclose(message, v, rtol=1e-12)
        np.testing.assert_array_equal(memory, message)
        np.testing.assert_allclose(value, value_of(2, x), rtol=1e-12)
    np.testing.assert_array_equal(said(Momentum(0.0), rule.init(START), 0)[0], said(Gradient(), None, 0)[0])


def test_momentum_of_a_constant_gradient(x64):
    """After t rounds (1 − βᵗ) g."""
    rule, memory = Momentum(0.5), jnp.zeros(D)
    for t in range(6):
        message, memory, _ = said(rule, memory, t)
    np.testing.assert_allclose(message, (1 - 0.5**6) * gradient_of(2, START), rtol=1e-12)


def test_local_steps(x64):
    """The model after K steps, and the value where they began."""
    x = START.copy()
    for _ in range(5):
        x = x - 0.1 * gradient_of(2, x)
    message, _, value = said(LocalSteps(5, 0.1), None, 0)
    np.testing.assert_allclose(message, x, rtol=1e-12)
    np.testing.assert_allclose(value, value_of(2, START), rtol=1e-12)


def test_local_steps_draw_anew(x64):
    """Two steps on the rows that `fold_in` of the step's number draws."""
    key, x = jax.random.key(3), START.copy()
    for k in range(2):
        rows = np.asarray(jax.random.randint(jax.random.fold_in(key, k), (2,), 0, EACH))
        x = x - 0.1 * gradient_of(2, x, rows)
    message, _, _ = said(LocalSteps(2, 0.1), None, 0, problem=shards(2), key=key)
    np.testing.assert_allclose(message, x, rtol=1e-12)


def test_one_local_step_is_a_gradient_step(x64):
    """x − η g at every worker, whose mean is a step on the mean gradient."""
    local = minimize(shards(), START, plain_round(LocalSteps(1, 0.1), Adopt()), steps=3)
    central = minimize(shards(), START, plain_round(Gradient(), Step(optax.sgd, learning_rate=0.1)), steps=3)
    x = START.copy()
    for _ in range(3):
        x = x - 0.1 * mean_gradient(x)
    np.testing.assert_allclose(local.x, x, rtol=1e-12)
    np.testing.assert_allclose(central.x, x, rtol=1e-12)


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (optax.adam, {"learning_rate": 0.1}),
        (optax.adamw, {"learning_rate": 0.1, "weight_decay": 0.3}),
        (optax.sgd, {"learning_rate": lambda t: 0.1 / (1.0 + t), "momentum": 0.9}),
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_a_step_is_that_of_optax_on_the_whole_gradient(factory, options, x64):
    """Optax itself, outside of any loop, on NumPy's gradient of the mean over all rows."""
    update, x = factory(**options), START.copy()
    memory = update.init(x)
    for _ in range(8):
        a, b = A.reshape(-1, D), B.reshape(-1)
        moves, memory = update.update(a.T @ (a @ x - b) / len(b), memory, x)
        x = np.asarray(optax.apply_updates(x, moves))
    solution = minimize(shards(), START, plain_round(Gradient(), Step(factory, **options)), steps=8)
    np.testing.assert_allclose(solution.x, x, rtol=1e-10)
    kept = jax.tree.leaves(solution.state.server)
    for ours, theirs in zip(kept, jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_a_ready_made_transformation(x64):
    """Clipped to the norm 0.01, then negated: a step of that length."""
    chain = optax.chain(optax.clip_by_global_norm(0.01), optax.scale(-1.0))
    rule = Step(chain)
    x, _ = rule.apply(jnp.asarray(mean_gradient(START)), jnp.asarray(START), rule.init(jnp.asarray(START)))
    g = mean_gradient(START)
    np.testing.assert_allclose(x, START - 0.01 * g / np.linalg.norm(g), rtol=1e-12)


def test_a_step_of_complex_points(x64):
    """f = ½ mean |x − c_i|²: the direction of steepest ascent is x − mean c, and the step goes there."""
    drawn = np.random.default_rng(1)
    c = drawn.normal(size=(4, 3, 2)) + 1j * drawn.normal(size=(4, 3, 2))
    problem = Sharded(lambda x, batch: jnp.sum(jnp.abs(x - batch) ** 2, axis=1) / 2, c)
    x0 = np.array([1 + 2j, -1j])
    solution = minimize(problem, x0, plain_round(Gradient(), Step(optax.sgd, learning_rate=0.25)), steps=2)
    np.testing.assert_allclose(solution.x, c.mean((0, 1)) + 0.75**2 * (x0 - c.mean((0, 1))), rtol=1e-12)


def test_adopt_takes_every_bit():
    """1 and 10⁻⁸ apart: what `x + (a − x)` would lose."""
    x, a = {"w": jnp.float32([1e8, 3.0]), "b": jnp.float32(-1e8)}, jnp.float32([1e-8, 0.1, 0.3])
    moved, memory = Adopt().apply(a, x, Adopt().init(x))
    np.testing.assert_array_equal(trees.flatten(moved), a)
    assert memory is None and jax.tree.structure(moved) == jax.tree.structure(x)


@pytest.mark.parametrize("rule", [Gradient(0.1), Momentum(), LocalSteps(2, 0.1)], ids=lambda r: type(r).__name__)
def test_messages_are_wide_and_steps_keep_the_dtype(rule):
    """In bfloat16 a message has 32 bits, and every worker's model its own dtype."""
    problem = Sharded(squares, (jnp.asarray(A, jnp.bfloat16), jnp.asarray(B, jnp.bfloat16)))
    x = jnp.asarray(START, jnp.bfloat16)
    message, memory, _ = said(rule, rule.init(x), 0, x, problem=problem)
    assert message.dtype == jnp.float32
    assert jax.tree.map(lambda a: a.dtype, memory) in (None, jnp.float32)
    moved, _ = Adopt().apply(message, x, None)
    assert moved.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("rule", "batch_size", "expected"),
    [
        (Gradient(), None, {"gradient": 1}),
        (Momentum(), 2, {"minibatch": 1}),
        (LocalSteps(4, 0.1), None, {"gradient": 4}),
        (LocalSteps(4, 0.1), 2, {"minibatch": 4}),
    ],
)
def test_calls(rule, batch_size, expected):
    """Of one round; every worker's samples together are one call."""
    assert rule.calls(shards(batch_size)).as_dict() == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gradient(0.0), "step_size: got 0.0; expected a finite number above 0"),
        (lambda: Gradient("large"), "step_size: got 'large'; expected a number"),
        (lambda: Momentum(1.0), "beta: got 1.0; expected a number of at least 0 and below 1"),
        (lambda: Momentum(-0.1), "beta: got -0.1"),
        (lambda: Momentum(None), "beta: got None"),
        (lambda: LocalSteps(0, 0.1), "steps: got 0; expected a whole number of at least 1"),
        (lambda: LocalSteps(2, -0.1), "step_size: got -0.1"),
        (lambda: Step("adam"), "factory: got str; expected an Optax factory"),
        (lambda: Step(optax.adam), "options of adam: got none; expected also learning_rate"),
        (lambda: Step(optax.adam, learning_rate=-1.0), "learning_rate: got -1.0"),
        (lambda: Step(optax.adam, learning_rate=0.1, b3=0.1), "option of adam: got 'b3'"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("server", "name"),
    [
        (lambda: Step(optax.lbfgs), "lbfgs"),
        (lambda: Step(optax.polyak_sgd), "polyak_sgd"),
        (lambda: Step(optax.chain(optax.sgd(0.1), optax.scale_by_zoom_linesearch(5))), "optimizer"),
        (lambda: Step(optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())), "optimizer"),
    ],
    ids=["lbfgs", "polyak", "zoom", "plateau"],
)
def test_an_optimizer_that_asks_for_values_is_refused(server, name, x32):
    """Here is no value: a step without one would be a wrong step (Polyak's would be none at all)."""
    problem = shards(dtype=np.float32)
    with pytest.raises(
        InputError, match=f"server: got {name}, which fails with: .*value.*; expected an Optax optimizer"
    ):
        minimize(problem, START.astype(np.float32), plain_round(Gradient(), server()), steps=2)


def test_betas_of_any_kind():
    for beta in (np.float32(0.5), jnp.float32(0.5), 0):
        assert float(Momentum(beta).beta) in (0.5, 0)


def test_shards_of_these_data_are_the_rows():
    """The problem of this file is that of all rows."""
    rows = shard((A.transpose(1, 0, 2).reshape(-1, D), B.T.reshape(-1)), WORKERS)
    np.testing.assert_array_equal(rows[0], A)
    np.testing.assert_array_equal(rows[1], B)
