"""Every transformation as a plain Optax object: in chains, behind masks, injected, accumulated, spread over devices."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from conformance import optax_cases
from conformance.optax_cases import OPTAX_CASES, asked, parameters, train
from fallline.core.extra import declared
from fallline.core.registry import catalog

CASES = pytest.mark.parametrize("name", OPTAX_CASES)


@functools.cache
def ready(name):
    """A transformation, and its two functions compiled, once for all tests that have this process."""
    update = OPTAX_CASES[name].build()
    return update, jax.jit(update.init), jax.jit(update.update)


@pytest.fixture(autouse=True)
def _single():
    with jax.enable_x64(False):
        yield


def close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=1e-6)


def moved(params):
    return max(
        float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (params, parameters())), strict=True)
    )


def test_every_transformation_of_the_catalog_has_a_case():
    assert {name for name, row in catalog().items() if row.kind == "transformation"} <= OPTAX_CASES.keys()


@CASES
def test_in_a_chain(name):
    update, begin, move = ready(name)
    gradient, extra = asked(update, parameters(), jnp.float32(0))
    plain, _ = move(gradient, begin(parameters()), parameters(), **extra)
    params, _, (chained,) = train(optax.chain(update, optax.scale(0.5)), parameters(), 1)
    close(chained, jax.tree.map(lambda a: a * 0.5, plain))
    assert moved(params) > 0


@CASES
def test_the_state_keeps_its_form(name):
    """Structure, shapes and dtypes, from `init` on; the updates have those of the gradient."""
    update = OPTAX_CASES[name].build()

    def step(params, state):
        gradient, extra = asked(update, params, jnp.float32(0))
        return gradient, *update.update(gradient, state, params, **extra)

    state = jax.eval_shape(update.init, parameters())
    gradient, updates, after = jax.eval_shape(step, parameters(), state)
    for before, behind in ((state, after), (gradient, updates)):
        assert jax.tree.structure(before) == jax.tree.structure(behind)
        described = [[(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (before, behind)]
        assert described[0] == described[1]


@CASES
def test_the_state_can_be_donated(name):
    """No array of it is there twice, or belongs to the transformation, which can begin again."""
    update = ready(name)[0]
    for _ in range(2):
        jax.jit(lambda state: state, donate_argnums=0)(update.init(parameters()))


@CASES
def test_behind_a_mask(name):
    """What is masked passes as it is; the rest moves as if there were nothing else."""
    update = OPTAX_CASES[name].build()
    masked = optax.masked(update, {"w": True, "b": False}, mask_compatible_extra_args=True)
    params = {"w": parameters()["w"], "b": jnp.zeros(8)}
    gradient, extra = asked(update, params, jnp.float32(0))
    updates, _ = jax.jit(masked.update)(gradient, masked.init(params), params, **extra)
    close(updates["b"], gradient["b"])

    def only(tree):
        return {"w": tree["w"]}

    extra = {key: only(value) if isinstance(value, dict) else value for key, value in extra.items()}
    alone, _ = jax.jit(update.update)(only(gradient), update.init(only(params)), only(params), **extra)
    close(updates["w"], alone["w"])


@CASES
def test_beside_another_transformation(name):
    update = OPTAX_CASES[name].build()
    labels = {"w": "ours", "b": "sgd"}
    both = optax.multi_transform({"ours": update, "sgd": optax.sgd(0.25)}, labels, mask_compatible_extra_args=True)
    gradient, extra = asked(update, parameters(), jnp.float32(0))
    updates, _ = jax.jit(both.update)(gradient, both.init(parameters()), parameters(), **extra)
    close(updates["b"], -0.25 * gradient["b"])
    masked = optax.masked(update, {"w": True, "b": False}, mask_compatible_extra_args=True)
    alone = jax.jit(masked.update)(gradient, masked.init(parameters()), parameters(), **extra)[0]
    close(updates["w"], alone["w"])


@CASES
def test_with_injected_numbers(name):
    """The same updates as with fixed numbers, and others where a number in the state is changed."""
    case = OPTAX_CASES[name]
    static = tuple(key for key, value in case.options.items())
    injected = optax.inject_hyperparams(case.factory, static_args=static)(**case.numbers, **case.options)
    injected = optax.GradientTransformationExtraArgs(injected.init, injected.update)
    plain, begin, move = ready(name)
    gradient, extra = asked(plain, parameters(), jnp.float32(0))
    inject = jax.jit(injected.update)
    updates, after = inject(gradient, injected.init(parameters()), parameters(), **extra)
    close(updates, move(gradient, begin(parameters()), parameters(), **extra)[0])
    first = next(iter(case.numbers))
    after.hyperparams[first] = after.hyperparams[first] * 0
    updates, _ = inject(gradient, after, parameters(), **extra)
    zero = all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))
    assert zero is not case.starts, f"{first} = 0 must give no update"


@CASES
def test_with_accumulated_gradients(name):
    """Two equal batches accumulated are one step."""
    update, begin, move = ready(name)
    twice = optax.MultiSteps(update, 2)
    gradient, extra = asked(update, parameters(), jnp.float32(0))
    accumulate = jax.jit(twice.update)
    first, state = accumulate(gradient, twice.init(parameters()), parameters(), **extra)
    second, state = accumulate(gradient, state, parameters(), **extra)
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(first))
    close(second, move(gradient, begin(parameters()), parameters(), **extra)[0])


@CASES
def test_parameters_in_16_bits_have_a_state_in_32(name):
    update = OPTAX_CASES[name].build()
    params, state, seen = train(update, parameters(jnp.bfloat16), 3)
    for leaf in jax.tree.leaves((params, seen)):
        assert leaf.dtype == jnp.bfloat16 and np.isfinite(np.asarray(leaf, np.float32)).all()
    for leaf in jax.tree.leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float32
    assert max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(seen[-1])) > 0


@CASES
def test_under_a_guard_a_gradient_of_nan_leaves_the_state(name):
    guarded = fl.on_nonfinite(OPTAX_CASES[name].build(), "skip")
    gradient, extra = asked(guarded, parameters(), jnp.float32(0))
    move = jax.jit(guarded.update)
    _, state = move(gradient, guarded.init(parameters()), parameters(), **extra)
    spoiled = jax.tree.map(lambda g: g.at[0].set(jnp.nan), gradient)
    updates, after = move(spoiled, state, parameters(), **extra)
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates)) and int(after.skipped) == 1

    def raw(tree):
        return [np.asarray(jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a)
                for a in jax.tree.leaves(tree)]  # fmt: skip

    for a, b in zip(raw(state.inner), raw(after.inner), strict=True):
        np.testing.assert_array_equal(a, b)


@CASES
def test_a_gradient_of_nan_is_never_hidden(name):
    update, begin, move = ready(name)
    gradient, extra = asked(update, parameters(), jnp.float32(0))
    _, state = move(gradient, begin(parameters()), parameters(), **extra)
    spoiled = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), gradient)
    updates, _ = move(spoiled, state, parameters(), **extra)
    assert any(np.isnan(np.asarray(u)).any() for u in jax.tree.leaves(updates))


@CASES
def test_a_missing_extra_argument_is_named(name):
    update = OPTAX_CASES[name].build()
    gradient, extra = asked(update, parameters(), jnp.float32(0))
    state = update.init(parameters())
    for missing in declared(update):
        rest = {key: value for key, value in extra.items() if key != missing}
        with pytest.raises(fl.InputError, match=f"^{missing}: got None"):
            jax.jit(update.update).lower(gradient, state, parameters(), **rest)


def test_spread_over_eight_devices():
    """All cases in one process, where XLA is told to have 8 devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "0",
    }
    script = Path(optax_cases.__file__)
    done = subprocess.run([sys.executable, "-W", "error", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == OPTAX_CASES.keys()
    assert {name: ends["off"] for name, ends in found.items() if ends["off"] >= 1e-5} == {}
    assert [name for name, ends in found.items() if not ends["kept"]] == [], "the parameters must stay where they were"
