"""A phase diagram in one compiled program against Python loops over its trials.

Truncated amplitude flow for signals of 200 coordinates: 20 × 20 cells (measurements per coordinate from 1.5 to 6,
noise of the amplitudes from 0 to 0.2), 20 seeds each, in single precision; a trial succeeds where the relative error is
at most 0.1. All sides take at most 500 steps of the paper's size from the orthogonality-promoting start, and stop
earlier where they stand still (a gradient of 1e-4 of the signal's norm; solvephase looks at the residual every ten
steps). Our start takes 20 Lanczos steps, twice, the loops' 60 power steps: the success rates are the same.

- NumPy: a plain loop, real signals, on the rows that a cell has.
- solvephase (PyPI, where it is installed): complex arithmetic only, so against ours for complex signals.

The loops are timed on a sample of trials, spread over the grid, before and after ours, and scaled up; ours is the whole
diagram, without and with the time to compile it.
"""

from __future__ import annotations

import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import report

import fallline as fl
from fallline.core.progress import compile_clock
from fallline.recovery import Dense, Recovery, TruncatedAmplitude, phase_diagram, start

N, LIMIT, STILL, SEEDS = 200, 500, 1e-4, 20
LANCZOS, POWER = 20, 60  # steps of the start
RATIOS, NOISES = np.linspace(1.5, 6, 20), np.linspace(0, 0.2, 20)
ROWS = int(RATIOS[-1] * N)
GAMMA, STEP = 0.7, {"real": 0.6, "complex": 1.0}
SAMPLE = [(i, j) for i in range(1, 20, 3) for j in range(1, 20, 3)]  # 49 cells


def trial_of(signal_dtype):
    step_size = STEP["complex" if jnp.issubdtype(signal_dtype, jnp.complexfloating) else "real"]

    def trial(ratio, noise, key):
        rows, signal, noises, begin = jax.random.split(key, 4)
        kept = jnp.arange(ROWS) < ratio * N
        op = Dense(jnp.where(kept[:, None], jax.random.normal(rows, (ROWS, N), signal_dtype), 0))
        x = jax.random.normal(signal, (N,), signal_dtype)
        x = x / jnp.linalg.norm(x)
        amplitudes = jnp.abs(op.mv(x)) + noise * jax.random.normal(noises, (ROWS,))
        problem = Recovery(op, jnp.where(kept, amplitudes, 0) ** 2, loss=TruncatedAmplitude(GAMMA))
        x0 = start("orthogonality_promoting", steps=LANCZOS)(problem, begin)
        solver = fl.optimizer(optax.sgd, learning_rate=step_size)
        run = fl.minimize(problem, x0, solver, steps=LIMIT, stop=fl.gradient_norm(STILL))
        return problem.distance(run.x, x) <= 0.1

    return trial


def ours(signal_dtype):
    """Seconds of the whole diagram, with and without compiling, and the diagram."""
    began, before = time.perf_counter(), compile_clock.seconds
    diagram = phase_diagram(trial_of(signal_dtype), RATIOS, NOISES, seeds=SEEDS)
    whole = time.perf_counter() - began
    return whole, whole - (compile_clock.seconds - before), diagram


def draw(rng, ratio, noise, is_complex):
    def normal(*shape):
        part = rng.standard_normal(shape, dtype=np.float32)
        if not is_complex:
            return part
        return (part + 1j * rng.standard_normal(shape, dtype=np.float32)) * np.float32(0.5**0.5)

    m = int(ratio * N)
    a, x = normal(m, N), normal(N)
    x /= np.linalg.norm(x)
    return a, x, np.abs(np.abs(a @ x) + np.float32(noise) * rng.standard_normal(m, dtype=np.float32))


def numpy_trial(ratio, noise, seed):
    rng = np.random.default_rng(seed)
    a, x, psi = draw(rng, ratio, noise, is_complex=False)
    m = len(psi)
    norms = np.linalg.norm(a, axis=1)
    best = a[np.argsort(psi / norms)[-int(np.ceil(m / 6)) :]]
    best /= np.linalg.norm(best, axis=1)[:, None]
    z = rng.standard_normal(N, dtype=np.float32)
    for _ in range(POWER):
        z = best.T @ (best @ z)
        z /= np.linalg.norm(z)
    z *= np.sqrt(np.mean(psi**2))
    for _ in range(LIMIT):
        u = a @ z
        size = np.abs(u)
        kept = (1 + GAMMA) * size >= psi
        g = a.T @ (kept * (u - psi * np.sign(u))) / m
        if np.linalg.norm(g) <= STILL:
            break
        z = z - STEP["real"] * g
    return min(np.linalg.norm(z - x), np.linalg.norm(z + x)) <= 0.1


def solvephase_trial(ratio, noise, seed):
    from solvephase.algorithms.wirtinger import relative_error, wirtinger
    from solvephase.backend import get_backend
    from solvephase.operators import MatrixOperator

    a, x, psi = draw(np.random.default_rng(seed), ratio, noise, is_complex=True)
    operator = MatrixOperator(a, backend=get_backend("cpu", precision="single"))
    options = {"iterations": LIMIT, "tol": STILL, "step": STEP["complex"], "options": {"gamma": GAMMA}}
    found = wirtinger(operator, psi, method="taf", magnitudes=True, power_iterations=POWER, seed=seed, **options)
    return relative_error(found.x, x) <= 0.1


def loop(trial):
    """Seconds of the whole diagram as a sample of one trial a cell tells, and the share of successes there."""
    trial(RATIOS[0], NOISES[0], 0)
    began = time.perf_counter()
    hits = [trial(RATIOS[i], NOISES[j], seed) for seed, (i, j) in enumerate(SAMPLE)]
    each = (time.perf_counter() - began) / len(SAMPLE)
    return each * len(RATIOS) * len(NOISES) * SEEDS, float(np.mean(hits))


def compare(name, signal_dtype, peer, peer_name):
    before = loop(peer)[0]
    whole, run, diagram = ours(signal_dtype)
    after, hits = loop(peer)
    theirs = (before + after) / 2
    report(
        f"phase diagram of truncated amplitude flow, 8,000 {name} trials",
        {
            f"{peer_name} in a loop, scaled up from {len(SAMPLE)} trials, s": theirs,
            "phase_diagram, compiled, s": run,
            "phase_diagram with its compilation, s": whole,
            "ratio": theirs / whole,
            "share of successes in the sampled cells, loop": hits,
            "share of successes in the sampled cells, ours": float(np.mean([diagram.rates[i, j] for i, j in SAMPLE])),
        },
        "ratio at least 3",
    )


def main() -> None:
    compare("real", jnp.float32, numpy_trial, "NumPy")
    if importlib.util.find_spec("solvephase") is None:
        print("\nsolvephase is not installed: not compared")
    else:
        compare("complex", jnp.complex64, solvephase_trial, "solvephase")


if __name__ == "__main__":
    main()
