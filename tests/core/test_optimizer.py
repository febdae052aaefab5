"""`optimizer`: every Optax method against the loop that its user would have written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import fallline as fl

STEPS = 6


def schedule(count):
    return 0.1 * 0.9**count


def clipped_adam(learning_rate, max_norm=0.05):
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(learning_rate))


def searched_sgd(learning_rate):
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15, store_grad=True)
    return optax.chain(optax.sgd(learning_rate), search)


def halved_lbfgs():
    """The point after this chain is not the one where the search ended."""
    return optax.chain(optax.lbfgs(), optax.scale(0.5))


BACKTRACKING = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
BACKTRACKING_KEPT = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20, store_grad=True)
ONLY_W = {"w": True, "b": False}

# name: factory, numbers (arrays, in the run and in the loop by hand), static options
METHODS = {
    "sgd": (optax.sgd, {"learning_rate": 0.1}, {}),
    "momentum": (optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}, {}),
    "nesterov": (optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}, {"nesterov": True}),
    "schedule": (optax.sgd, {"momentum": 0.5}, {"learning_rate": schedule}),
    "adam": (optax.adam, {"learning_rate": 0.1}, {}),
    "adam-all-numbers": (optax.adam, {"learning_rate": 0.1, "b1": 0.8, "b2": 0.99, "eps": 1e-6, "eps_root": 1e-9}, {}),
    "nadam": (optax.nadam, {"learning_rate": 0.1}, {}),
    "nadamw": (optax.nadamw, {"learning_rate": 0.1, "weight_decay": 0.01}, {}),
    "adamw": (optax.adamw, {"learning_rate": 0.1, "weight_decay": 0.01}, {}),
    "adamw-mask": (optax.adamw, {"learning_rate": 0.1, "weight_decay": 0.1}, {"mask": ONLY_W}),
    "adamax": (optax.adamax, {"learning_rate": 0.1}, {}),
    "adamaxw": (optax.adamaxw, {"learning_rate": 0.1, "weight_decay": 0.01}, {}),
    "amsgrad": (optax.amsgrad, {"learning_rate": 0.1}, {}),
    "adabelief": (optax.adabelief, {"learning_rate": 0.1}, {}),
    "adagrad": (optax.adagrad, {"learning_rate": 0.5}, {}),
    "adadelta": (optax.adadelta, {"learning_rate": 1.0, "rho": 0.9, "eps": 1e-3}, {}),
    "adan": (optax.adan, {"learning_rate": 0.1}, {}),
    "rmsprop": (optax.rmsprop, {"learning_rate": 0.05}, {}),
    "rmsprop-centered": (optax.rmsprop, {"learning_rate": 0.05, "momentum": 0.5}, {"centered": True}),
    "lion": (optax.lion, {"learning_rate": 0.02}, {}),
    "lamb": (optax.lamb, {"learning_rate": 0.05, "weight_decay": 0.01}, {}),
    "lars": (optax.lars, {"learning_rate": 1.0, "weight_decay": 0.01}, {}),
    "radam": (optax.radam, {"learning_rate": 0.1}, {}),
    "yogi": (optax.yogi, {"learning_rate": 0.1}, {}),
    "fromage": (optax.fromage, {"learning_rate": 0.05}, {}),
    "novograd": (optax.novograd, {"learning_rate": 0.05}, {}),
    "sm3": (optax.sm3, {"learning_rate": 0.1}, {}),
    "rprop": (optax.rprop, {"learning_rate": 0.02}, {}),
    "optimistic-gradient-descent": (optax.optimistic_gradient_descent, {"learning_rate": 0.1}, {}),
    "optimistic-adam": (optax.optimistic_adam_v2, {"learning_rate": 0.05}, {}),
    "noisy-sgd": (optax.noisy_sgd, {"learning_rate": 0.1, "eta": 0.1, "gamma": 0.5, "key": 7}, {}),
    "sign-sgd": (optax.sign_sgd, {"learning_rate": 0.02}, {}),
    "signum": (optax.signum, {"learning_rate": 0.02, "beta": 0.8}, {}),
    "adafactor": (optax.adafactor, {"learning_rate": 0.1}, {"min_dim_size_to_factor": 2}),
    "adafactor-own-rate": (optax.adafactor, {}, {"learning_rate": None}),
    "polyak-sgd": (optax.polyak_sgd, {"max_learning_rate": 0.5}, {}),
    "multi-steps": (optax.MultiSteps, {}, {"opt": optax.adam(0.1), "every_k_schedule": 3}),
    "masked": (optax.masked, {}, {"inner": optax.adam(0.1), "mask": ONLY_W}),
    "schedule-free": (contrib.schedule_free, {"learning_rate": 0.1, "b1": 0.8}, {"base_optimizer": optax.sgd(0.1)}),
    "schedule-free-adamw": (contrib.schedule_free_adamw, {"learning_rate": 0.1}, {}),
    "chain": (clipped_adam, {"learning_rate": 0.1}, {}),
    "chain-two-numbers": (clipped_adam, {"learning_rate": 0.1, "max_norm": 0.03}, {}),
    "sgd-backtracking": (searched_sgd, {"learning_rate": 2.0}, {}),
    "lbfgs": (optax.lbfgs, {}, {}),
    "lbfgs-backtracking": (optax.lbfgs, {}, {"memory_size": 4, "linesearch": BACKTRACKING}),
    "lbfgs-backtracking-kept": (optax.lbfgs, {}, {"memory_size": 4, "linesearch": BACKTRACKING_KEPT}),
    "lbfgs-halved": (halved_lbfgs, {}, {}),
    "lbfgs-fixed": (optax.lbfgs, {"learning_rate": 0.3}, {"linesearch": None}),
}
# Every method in one precision, and in each one of every kind: without a state, with moments, factored, with a search,
# with a key, with a counter that branches. Optax's clipping wants the number in the dtype of the point.
EACH = ("sgd", "schedule", "adam", "adamw", "rmsprop", "lars", "rprop", "noisy-sgd", "adafactor", "polyak-sgd")
EACH += ("multi-steps", "masked", "schedule-free", "lbfgs", "lbfgs-backtracking")
RUNS = [(name, "float64") for name in METHODS] + [(name, p) for name in EACH for p in ("float32", "bfloat16")]
SEARCHING = {name for name in METHODS if "lbfgs" in name or "backtracking" in name} - {"lbfgs-fixed"}


def loss(x, data):
    """A small non-convex fit: tanh of an affine map."""
    features, targets = data
    return jnp.mean((jnp.tanh(features @ x["w"] + x["b"]) - targets) ** 2)


def instance(dtype):
    draw = np.random.default_rng(0)
    cast = lambda a: jnp.asarray(a, dtype)  # noqa: E731
    x0 = {"w": cast(draw.normal(size=(4, 3))), "b": cast(draw.normal(size=3))}
    return x0, (cast(draw.normal(size=(12, 4))), cast(draw.uniform(-0.9, 0.9, size=(12, 3))))


def by_hand(factory, numbers, static, x, data, steps, extra=()):
    """The loop of Optax's own documentation. Numbers in at least float32, the state's dtypes kept."""
    wide = jnp.promote_types(jax.tree.leaves(x)[0].dtype, jnp.float32)
    numbers = {k: jnp.asarray(v, jnp.int32 if isinstance(v, int) else wide) for k, v in numbers.items()}
    # A search in float32 tries points that the run's dtype does not have; they are rounded first.
    like = jax.tree.leaves(x)[0].dtype
    fn = lambda x: loss(jax.tree.map(lambda a: a.astype(like), x), data).astype(wide)  # noqa: E731

    @jax.jit
    def step(numbers, x, state):
        update = factory(**numbers, **static)
        value, gradient = jax.value_and_grad(fn)(x)
        known = {"value": value, "grad": gradient, "value_fn": fn}
        updates, new = update.update(gradient, state, x, **{k: known[k] for k in extra})
        new = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), new, state)
        return optax.apply_updates(x, updates), new, value

    state = jax.jit(lambda numbers, x: factory(**numbers, **static).init(x))(numbers, x)
    values = []
    for _ in range(steps):
        x, state, value = step(numbers, x, state)
        values.append(value)
    return x, state, [*values, fn(x)]


def extra_of(name):
    return ("value", "grad", "value_fn") if name in SEARCHING else ("value",) if name == "polyak-sgd" else ()


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_same_floats_as_the_loop_by_hand(name, precision):
    factory, numbers, static = METHODS[name]
    with jax.enable_x64(precision == "float64"):
        x0, data = instance(jnp.dtype(precision))
        solver = fl.optimizer(factory, **numbers, **static)
        assert set(solver.numbers) == set(numbers)
        assert set(solver.options) == set(static)
        solution = fl.minimize(loss, x0, solver, args=(data,), steps=STEPS, stop=None)
        x, _, values = by_hand(factory, numbers, static, x0, data, STEPS, extra_of(name))
    assert solution.status.name == "step limit"
    assert jax.tree.map(lambda a: (a.shape, str(a.dtype)), solution.x) == jax.tree.map(
        lambda a: (a.shape, precision), x0
    )
    eps = float(jnp.finfo(precision).eps)
    # A few roundings a step; a line search and a division by a small root multiply them.
    ulps = {"float32": 2000, "float64": 20000, "bfloat16": 24}[precision]
    wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)  # noqa: E731
    for a, b in zip(jax.tree.leaves(wide(solution.x)), jax.tree.leaves(wide(x)), strict=True):
        np.testing.assert_allclose(a, b, atol=ulps * eps, rtol=ulps * eps)
    np.testing.assert_allclose(wide(solution.history["value"]), wide(jnp.stack(values)), rtol=ulps * eps)
