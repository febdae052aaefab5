"""`sweep`: 64 learning rates of Adam on 10-d Rosenbrock, 10,000 steps, in one loop; beside it `vmap` of `minimize`."""

from __future__ import annotations

import jax
import numpy as np
import optax
from timing import interleaved, report

import fallline as fl
from fallline.problems import rosenbrock

STEPS, LANES = 10_000, 64


def main() -> None:
    made = rosenbrock(10)
    x0, rates = made.start(jax.random.key(0)), np.geomspace(1e-4, 1e-1, LANES).astype(np.float32)
    solvers = [fl.optimizer(optax.adam, learning_rate=rate) for rate in rates]

    @jax.jit
    @jax.vmap
    def lanes(rate):
        solver = fl.optimizer(optax.adam, learning_rate=rate)
        return fl.minimize(made.problem, x0, solver, steps=1000, stop=None).x

    runs = {
        "sweep": lambda: fl.sweep(made.problem, x0, solvers, steps=STEPS, stop=None),
        "one": lambda: fl.minimize(made.problem, x0, solvers[0], steps=STEPS, stop=None),
        "vmap": lambda: jax.block_until_ready(lanes(rates)),
    }
    times = interleaved(runs, rounds=9)
    report(
        f"sweep, {LANES} lanes, {STEPS} steps of Adam on Rosenbrock, us a step",
        {
            "sweep of 64 lanes": 1e6 * times["sweep"] / STEPS,
            "minimize, one lane": 1e6 * times["one"] / STEPS,
            "vmap of minimize, 64 lanes (1,000 steps)": 1e6 * times["vmap"] / 1000,
        },
        "sweep at most 10 us a step",
    )


if __name__ == "__main__":
    main()
