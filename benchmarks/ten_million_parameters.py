"""First-order methods on 10M float32 parameters against the memory's floor.

The floor of a method is the donated update of as many arrays as it keeps (Adam x, m, v; diffGrad also the previous
gradient) from one more, the gradient. The gradient oracle is no part of the method, but it must be asked:
½‖x − c‖² has the cheapest one that changes, and what it costs alone (value, gradient and its norm, as
`minimize` looks at them) is measured beside and taken off.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleaved, report

import fallline as fl

N, STEPS = 10_000_000, 40
METHODS = {"adam": (optax.adam, 3, 1.3), "diffgrad": (fl.diffgrad, 4, 1.5)}


@functools.partial(jax.jit, donate_argnums=0)
def floor(arrays, g):
    return jax.lax.fori_loop(0, STEPS, lambda _, kept: [a + 1e-3 * g for a in kept], arrays)


def bowl(x, c):
    return 0.5 * jnp.sum((x - c) ** 2)


@jax.jit
def oracle_alone(x, c):
    """The oracle and the norm, `STEPS` times, at a point that moves."""

    def body(_, carry):
        x, total = carry
        value, gradient = jax.value_and_grad(bowl)(x, c)
        return gradient, total + value + jnp.sum(gradient**2)

    return jax.lax.fori_loop(0, STEPS, body, (x, jnp.float32(0)))


def by_hand(factory):
    """The method in a donated `fori_loop`, with the same oracle."""
    update = factory(1e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(x, state, c):
        def body(_, carry):
            x, state = carry
            updates, state = update.update(jax.grad(bowl)(x, c), state, x)
            return optax.apply_updates(x, updates), state

        return jax.lax.fori_loop(0, STEPS, body, (x, state))

    return lambda x, c: jax.block_until_ready(run(x + 0, update.init(x), c))


def main() -> None:
    c = jnp.asarray(np.random.default_rng(0).standard_normal(N, dtype=np.float32))
    x0 = jnp.zeros(N, jnp.float32)
    for name, (factory, arrays, goal) in METHODS.items():
        solver, hand = fl.optimizer(factory, learning_rate=1e-3), by_hand(factory)

        def run(steps, solver=solver):
            return fl.minimize(bowl, x0, solver, args=(c,), steps=steps, stop=None)

        runs = {
            "floor": lambda arrays=arrays: jax.block_until_ready(floor([x0 + 0 for _ in range(arrays)], c)),
            "oracle": lambda: jax.block_until_ready(oracle_alone(x0, c)),
            # The difference of two lengths leaves out what a run costs once.
            "short": lambda run=run: run(2),
            "long": lambda run=run: run(2 + STEPS),
            "hand": lambda hand=hand: hand(x0, c),
        }
        times = {key: seconds / STEPS for key, seconds in interleaved(runs, rounds=7, warm=1).items()}
        step = times["long"] - times["short"]
        update = step - times["oracle"]
        report(
            f"{name} on 10M parameters, ms a step",
            {
                f"floor ({arrays} arrays updated from one)": 1e3 * times["floor"],
                "the gradient oracle alone": 1e3 * times["oracle"],
                "minimize, the step": 1e3 * step,
                "minimize, the step less the oracle": 1e3 * update,
                "ratio to the floor": update / times["floor"],
                "ratio of the step to floor + oracle": step / (times["floor"] + times["oracle"]),
                "optax in a donated fori_loop, same oracle": 1e3 * times["hand"],
            },
            f"ratio at most {goal}",
        )


if __name__ == "__main__":
    main()
