"""How the suite runs each transformation as a plain Optax object: one case for each factory of one.

`python tests/conformance/optax_cases.py` runs every case with its parameters spread over 8 emulated devices, and prints
how far from one device it ends; `test_optax.py` calls it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fallline import (
    adagrad,
    adagrad_norm,
    adaptive_saddle_escape,
    curvature_learner,
    diffgrad,
    last_iterate,
    m_fac,
    psgd_lie_groups,
)
from fallline.core.extra import declared
from fallline.core.trees import normal_like
from fallline.inference.sgld_generalization import sghmc, sgld
from fallline.parts.lie_groups import LowRank
from fallline.parts.prox import L1


@dataclasses.dataclass(frozen=True)
class OptaxCase:
    """A factory with its numbers, the first of which scales the updates (a learning rate), and its other options.

    `starts` says that the numbers are those that the state begins with, and no others.
    """

    factory: Callable[..., optax.GradientTransformation]
    numbers: dict[str, float]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    starts: bool = False

    def build(self, **numbers: Any) -> optax.GradientTransformationExtraArgs:
        made = self.factory(**{**self.numbers, **numbers}, **self.options)
        return optax.with_extra_args_support(made)


OPTAX_CASES = {
    "adagrad": OptaxCase(adagrad, {"learning_rate": 0.1, "initial_accumulator": 0.5}),
    "adagrad-norm": OptaxCase(adagrad_norm, {"learning_rate": 0.1, "initial_accumulator": 0.5}),
    "adaptive-saddle-escape": OptaxCase(
        # Of few gradients Ĝ is singular: a smaller eps amplifies the rounding of float32.
        adaptive_saddle_escape,
        {"learning_rate": 0.1, "beta": 0.8, "eps": 0.1},
        {"burn_in": 0},
    ),
    "curvature-learner": OptaxCase(curvature_learner, {"learning_rate": 0.1, "momentum": 0.5}, starts=True),
    "diffgrad": OptaxCase(diffgrad, {"learning_rate": 0.1, "b1": 0.8}),
    "last-iterate": OptaxCase(last_iterate, {"eta": 0.1}, {"steps": 20, "prox": L1(0.001)}),
    "m-fac": OptaxCase(m_fac, {"learning_rate": 0.1, "lam": 0.1}, {"m": 5}),
    "psgd-lie-groups": OptaxCase(psgd_lie_groups, {"learning_rate": 0.1, "step": 0.2}, {"curvature": "newton"}),
    "psgd-fisher": OptaxCase(
        psgd_lie_groups,
        {"learning_rate": 0.1, "step": 0.2},
        {"curvature": "fisher", "group": LowRank(2), "whole": True},
    ),
    # With a friction of 1 the velocity is the step, which is 0 where the learning rate is.
    "sghmc": OptaxCase(sghmc, {"learning_rate": 0.1, "clip": 1.0, "friction": 1.0}, {"seed": 0}),
    "sgld": OptaxCase(sgld, {"learning_rate": 0.1, "clip": 1.0}, {"seed": 0}),
}


ROWS = 12


def parameters(dtype: Any = np.float32) -> dict[str, Any]:
    """A matrix of 8 × 6 and a vector of 8."""
    return {
        "w": jnp.asarray(0.5 * np.sin(np.arange(48.0)).reshape(8, 6), dtype),
        "b": jnp.asarray(0.5 * np.cos(np.arange(8.0)), dtype),
    }


def losses(params: dict[str, Any], batch: Any) -> Any:
    """Two layers on 12 rows; missing parameters are zero."""
    inputs, targets = batch
    hidden = inputs @ params["w"].T + params.get("b", 0)
    return jnp.square(jnp.tanh(hidden).sum(axis=1) - targets)


def batch(step: Any, dtype: Any) -> Any:
    """Another batch for each step."""
    inputs = jnp.sin(jnp.arange(ROWS * 6.0).reshape(ROWS, 6) ** 1.3 + step)
    return inputs.astype(dtype), jnp.cos(jnp.arange(1.0 * ROWS) + step).astype(dtype)


def asked(update: optax.GradientTransformation, params: Any, step: Any) -> tuple[Any, dict[str, Any]]:
    """The gradient on the step's batch, and the extra arguments that a transformation declares."""
    return _asked(tuple(sorted(declared(update))))(params, step)


@functools.cache
def _asked(names: tuple[str, ...]) -> Callable[..., Any]:
    """Compiled once for all cases that declare the same."""

    @jax.jit
    def ask(params: Any, step: Any) -> tuple[Any, dict[str, Any]]:
        rows = batch(step, jax.tree.leaves(params)[0].dtype)
        key = jax.random.fold_in(jax.random.key(0), step)
        vector = normal_like(key, params)

        def total(params: Any) -> Any:
            return jnp.mean(losses(params, rows))

        def single(params: Any, row: Any) -> Any:
            return losses(params, jax.tree.map(lambda a: a[None], row))[0]

        value, gradient = jax.value_and_grad(total)(params)
        makes = {
            "value": lambda: value,
            "vector": lambda: vector,
            "hvp": lambda: jax.jvp(jax.grad(total), (params,), (vector,))[1],
            "per_example_gradients": lambda: jax.vmap(jax.grad(single), (None, 0))(params, rows),
            "key": lambda: key,
        }
        return gradient, {name: makes[name]() for name in names}

    return ask


def train(
    update: optax.GradientTransformationExtraArgs, params: Any, steps: int = 4, state: Any = None
) -> tuple[Any, Any, Any]:
    """Steps of a plain training loop, each compiled: the parameters at the end, the state, and all updates."""

    @jax.jit
    def step(t: Any, params: Any, state: Any) -> Any:
        gradient, extra = asked(update, params, t)
        updates, state = update.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state, updates

    state, seen = (jax.jit(update.init)(params) if state is None else state), []
    for t in range(steps):
        params, state, updates = step(jnp.float32(t), params, state)
        seen.append(updates)
    return params, state, seen


def spread() -> dict[str, Any]:
    """For each case: the largest difference between 8 devices and one, and whether the parameters stay spread."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    found = {}
    for name, case in OPTAX_CASES.items():
        alone, _, _ = train(case.build(), parameters(), 3)
        shared, _, _ = train(case.build(), jax.device_put(parameters(), place), 3)
        off = jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))), alone, shared)
        kept = all(a.sharding.is_equivalent_to(place, a.ndim) for a in jax.tree.leaves(shared))
        found[name] = {"off": max(jax.tree.leaves(off)), "kept": kept}
    return found


if __name__ == "__main__":
    assert jax.device_count() == 8
    print(json.dumps(spread()))
