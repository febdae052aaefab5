"""Phase retrieval against two reads of the matrix, and against solvephase by the same methods.

Complex Gaussian rows, n = 1000, m = 6 n, complex128. An iteration needs A z and A* v, each of which reads the matrix
once; a read is a sum of its numbers. Times to accuracy are whole calls, start included, that end below a relative
error of 1e-5; ours without compilation, which is reported by itself. On one thread:

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" OMP_NUM_THREADS=1 \\
        taskset -c 0 python benchmarks/phase_retrieval.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, report

import fallline as fl
from fallline.recovery import Dense, Recovery
from fallline.recovery.phase_retrieval import METHODS, phase_retrieval

N, RATIO, STEPS, ACCURACY = 1000, 6, 20, 1e-5
THEIRS = {
    "wirtinger": "wf",
    "truncated-wirtinger": "twf",
    "truncated-amplitude": "taf",
    "reweighted-amplitude": "raf",
    "lbfgs": "lbfgs",
}


def error(x: Any, signal: np.ndarray) -> float:
    x = np.asarray(x)
    turn = np.vdot(x, signal)
    return float(np.linalg.norm(x * turn / abs(turn) - signal) / np.linalg.norm(signal))


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    from solvephase import MatrixOperator, wirtinger

    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((RATIO * N, N)) + 1j * rng.standard_normal((RATIO * N, N))) / np.sqrt(2)
    signal = rng.standard_normal(N) + 1j * rng.standard_normal(N)
    op, theirs = Dense(jnp.asarray(matrix)), MatrixOperator(matrix)
    y = np.abs(matrix @ signal) ** 2
    close = signal + 0.01 * rng.standard_normal(N)
    read = jax.jit(jnp.sum)

    def steps(method: str) -> Callable[[], Any]:
        row = METHODS[method]
        problem = Recovery(op, y, loss=row.loss(False))
        solver = row.solver(row.step_size[1] if row.step_size else 0.0)

        def run() -> fl.Solution:
            solution = fl.minimize(problem, close, solver, steps=STEPS, stop=None)
            assert int(solution.steps) == STEPS
            return solution

        return run

    descents = [method for method in THEIRS if METHODS[method].step_size]
    runs: dict[str, Callable[[], Any]] = {"read": lambda: jax.block_until_ready(read(op.rows))}
    runs |= {method: steps(method) for method in descents}
    times = interleaved(runs, rounds=9)
    rows: dict[str, Any] = {"two reads of the matrix, ms": 2e3 * times["read"]}
    for method in descents:
        rows[f"{method}, ms an iteration"] = 1e3 * times[method] / (STEPS + 1)
        rows[f"ratio, {method}"] = times[method] / (STEPS + 1) / (2 * times["read"])
    report(f"phase retrieval, an iteration, complex {RATIO * N} x {N}", rows, "ratio at most 1.2")

    size = np.linalg.norm(signal)
    for method, name in THEIRS.items():

        def ours(method: str = method) -> fl.Solution:
            return phase_retrieval(op, y, method, stop=fl.gradient_norm(1e-7 * size))

        def peer(name: str = name) -> Any:
            return wirtinger(theirs, y, method=name, tol=1e-6, seed=0)

        first, found, other = ours(), ours(), peer()
        times = interleaved({"ours": ours, "peer": peer}, rounds=3, warm=0)
        reached = error(other.x, signal) <= ACCURACY
        report(
            f"phase retrieval to {ACCURACY:g}, {method}",
            {
                "fallline, s": times["ours"],
                "fallline, compilation, s": first.compile_seconds,
                f"fallline, error after {int(found.steps)} steps": error(found.x, signal),
                "solvephase, s": times["peer"],
                f"solvephase, error after {other.n_iter} iterations": error(other.x, signal),
                "ratio": times["ours"] / times["peer"] if reached else "its cap was hit: not counted",
            },
        )


if __name__ == "__main__":
    main()
