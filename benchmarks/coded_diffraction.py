"""A step on coded diffraction patterns against the 2 L Fourier transforms in it.

512 × 512 pixels, 12 masks, complex64. A step is value, gradient and update; the transforms alone are L forward and
L back, of the whole stack at once, as NumPy users would write them. Both run 20 times in one compiled loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from timing import interleaved, report

import fallline as fl
from fallline.recovery import (
    Intensity,
    Loss,
    Recovery,
    ReweightedAmplitude,
    TruncatedAmplitude,
    TruncatedPoisson,
    coded_diffraction,
)
from fallline.recovery.phase_retrieval import wirtinger

SIDE, PATTERNS, STEPS = 512, 12, 20


@jax.jit
def transforms(u: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, STEPS, lambda _, v: jnp.fft.ifft2(jnp.fft.fft2(v)), u)


def main() -> None:
    op = coded_diffraction(jax.random.key(0), (SIDE, SIDE), PATTERNS)
    image = jax.random.uniform(jax.random.key(1), (SIDE, SIDE)).astype(jnp.complex64)
    u = op.mv(image)
    y = jnp.abs(u) ** 2
    x0 = 1.05 * image

    def steps(loss: Loss) -> Callable[[], Any]:
        problem = Recovery(op, y, loss=loss)
        solver = fl.optimizer(wirtinger, learning_rate=0.1)

        def run() -> fl.Solution:
            solution = fl.minimize(problem, x0, solver, steps=STEPS, stop=None)
            assert int(solution.steps) == STEPS
            return solution

        return run

    runs: dict[str, Callable[[], Any]] = {"transforms": lambda: jax.block_until_ready(transforms(u))}
    losses = {
        "Wirtinger flow": Intensity(),
        "truncated Wirtinger flow": TruncatedPoisson(),
        "truncated amplitude flow": TruncatedAmplitude(),
        "reweighted amplitude flow": ReweightedAmplitude(5.0),
    }
    runs |= {name: steps(loss) for name, loss in losses.items()}
    times = interleaved(runs, rounds=7)
    rows: dict[str, Any] = {f"{2 * PATTERNS} transforms, ms": 1e3 * times["transforms"] / STEPS}
    for name in losses:
        # A run evaluates its first point too.
        rows[f"{name}, ms a step"] = 1e3 * times[name] / (STEPS + 1)
        rows[f"ratio, {name}"] = times[name] / (STEPS + 1) / (times["transforms"] / STEPS)
    report(f"coded diffraction, {SIDE} x {SIDE}, {PATTERNS} masks", rows, "Wirtinger flow: ratio at most 1.3")


if __name__ == "__main__":
    main()
