"""Adam through `optimizer` on 10M float32 parameters against the memory's floor.

The floor is the donated update of three arrays from a fourth (x, m, v from g). The gradient oracle is
no part of Adam, so one row gives it for nothing (a problem that hands out a stored array); the other
row pays for a real one, ½‖x − c‖², whose value, gradient and norm move six more arrays.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from timing import interleaved, report

import fallline as fl

N, STEPS = 10_000_000, 40


class Given(fl.Problem):
    """The gradient is data."""

    g: Array

    def value(self, x):
        return jnp.sum(self.g * x)

    def value_and_gradient(self, x):
        return jnp.float32(1), self.g


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def axpy(x, m, v, g):
    return x + 1e-3 * g, m + 1e-3 * g, v + 1e-3 * g


def main() -> None:
    c = jnp.asarray(np.random.default_rng(0).standard_normal(N, dtype=np.float32))
    x0 = jnp.zeros(N, jnp.float32)
    adam = fl.optimizer(optax.adam, learning_rate=1e-3)
    arrays = [jnp.zeros(N, jnp.float32) for _ in range(3)]

    def floor() -> None:
        nonlocal arrays
        for _ in range(STEPS):
            arrays = list(axpy(*arrays, c))
        jax.block_until_ready(arrays)

    def step_seconds(problem, args=()):
        """Seconds of a step inside `minimize`: the difference of two run lengths."""
        return lambda steps: fl.minimize(problem, x0, adam, args=args, steps=steps, stop=None)

    given = step_seconds(Given(c))
    real = step_seconds(lambda x, c: 0.5 * jnp.sum((x - c) ** 2), (c,))
    update = optax.adam(1e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def by_hand(x, state):
        def body(_, carry):
            x, state = carry
            gradient = jax.grad(lambda x: 0.5 * jnp.sum((x - c) ** 2))(x)
            updates, state = update.update(gradient, state, x)
            return optax.apply_updates(x, updates), state

        return jax.lax.fori_loop(0, STEPS, body, (x, state))

    runs = {
        "floor": floor,
        "given short": lambda: given(2),
        "given long": lambda: given(2 + STEPS),
        "real short": lambda: real(2),
        "real long": lambda: real(2 + STEPS),
        "hand": lambda: jax.block_until_ready(by_hand(x0 + 0, update.init(x0))),
    }
    times = interleaved(runs, rounds=7, warm=1)
    per_step = {
        "floor": times["floor"] / STEPS,
        "given": (times["given long"] - times["given short"]) / STEPS,
        "real": (times["real long"] - times["real short"]) / STEPS,
        "hand": times["hand"] / STEPS,
    }
    report(
        "Adam on 10M parameters, ms a step",
        {
            "floor (three-array axpy)": 1e3 * per_step["floor"],
            "minimize, gradient given": 1e3 * per_step["given"],
            "ratio": per_step["given"] / per_step["floor"],
            "minimize, gradient of 0.5|x - c|^2": 1e3 * per_step["real"],
            "ratio with the gradient": per_step["real"] / per_step["floor"],
            "optax in a donated fori_loop, same gradient": 1e3 * per_step["hand"],
        },
        "ratio at most 1.3",
    )


if __name__ == "__main__":
    main()
