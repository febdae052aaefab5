"""The first call, compilation included: 10-d Rosenbrock, 50 steps of Adam, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

from timing import report

COMMON = """
import time, jax, jax.numpy as jnp, numpy as np, optax, fallline as fl
x0 = jnp.asarray(np.zeros(10, np.float32))
def rosenbrock(x):
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
"""
OURS = """
began = time.perf_counter()
fl.minimize(rosenbrock, x0, fl.optimizer(optax.adam, learning_rate=1e-2), steps=50)
print(time.perf_counter() - began)
"""
SCAN = """
began = time.perf_counter()
update = optax.adam(1e-2)
@jax.jit
def run(x):
    def body(carry, _):
        x, state = carry
        value, gradient = jax.value_and_grad(rosenbrock)(x)
        updates, state = update.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), value
    return jax.lax.scan(body, (x, update.init(x)), None, length=50)
jax.block_until_ready(run(x0))
print(time.perf_counter() - began)
"""


def first(script: str) -> float:
    out = subprocess.run([sys.executable, "-c", COMMON + script], capture_output=True, text=True, check=True)
    return float(out.stdout.strip().splitlines()[-1])


def main() -> None:
    ours, scan = [], []
    for _ in range(9):
        ours.append(first(OURS))
        scan.append(first(SCAN))
    a, b = statistics.median(ours), statistics.median(scan)
    report(
        "first call, Rosenbrock 10-d, 50 steps of Adam",
        {"optax.adam in lax.scan, ms": 1e3 * b, "minimize, ms": 1e3 * a, "ratio": a / b},
        "ratio at most 1",
    )


if __name__ == "__main__":
    main()
