"""Matrix sensing against its size: time of a step, and steps to a relative error of 1e-6, as n grows.

n × n matrices of rank 5 and condition number 2 from m = 6 n r structured measurements, of which nothing is stored: a
cosine transform costs O(n² log n), so the time of a step should grow like n² and the number of steps not at all.
Float32. The peer is PyManopt's conjugate gradients on the manifold of matrices of fixed rank, with the same operator
in NumPy and SciPy, in float64; a peer that hit its cap is not counted as beaten.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, report

import fallline as fl
from fallline.recovery import Factors, Recovery, StructuredSensing, TwoFactors, structured_sensing
from fallline.recovery.matrix_sensing import METHODS
from fallline.recovery.starts import spectral

RANK, TARGET, SIZES = 5, 1e-6, (128, 256, 512, 1024)
PEER_SIZE, PEER_SECONDS, PEER_STEPS = 256, 60.0, 1000


def instance(n: int) -> tuple[Recovery, Factors]:
    keys = jax.random.split(jax.random.key(n), 3)
    u, v = (jnp.linalg.qr(jax.random.normal(key, (n, RANK)))[0] for key in keys[:2])
    root = jnp.sqrt(jnp.linspace(1, 0.5, RANK))
    truth = Factors(u * root, v * root)
    op = structured_sensing(keys[2], 6 * n * RANK, (n, n))
    return Recovery(op, op.mv_product(*truth), TwoFactors(RANK, balance=0.0)), truth


class Ours:
    """Runs of one of our methods to the target, from the spectral start."""

    def __init__(self, problem: Recovery, truth: Factors, name: str):
        self.problem, self.truth, self.solver = problem, truth, METHODS[name]()
        self.x0 = spectral(problem, jax.random.key(0))
        # The residual at the target: A keeps the norm of what descent reaches, up to a factor near 1.
        squares = float(jnp.sum(problem.y**2) / problem.gain / problem.unit)
        self.stop = fl.residual(0.5 * squares * TARGET**2)
        self.run(2)

    def run(self, steps: int = 1000) -> fl.Solution:
        self.end = fl.minimize(self.problem, self.x0, self.solver, steps=steps, stop=self.stop)
        return self.end

    @property
    def error(self) -> float:
        return float(self.problem.distance(self.end.x, self.truth))


def exponent(sizes: Sequence[int], numbers: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(numbers), 1)[0])


class Peer:
    """PyManopt's conjugate gradients from the same start."""

    def __init__(self, op: StructuredSensing, y: np.ndarray, truth: np.ndarray):
        import pymanopt
        from scipy.fft import dctn, idctn

        signs, chosen = np.asarray(op.signs, float), np.asarray(op.chosen)
        factor, placed = np.sqrt(op.size / len(chosen)), np.zeros(signs.size)
        manifold = pymanopt.manifolds.FixedRankEmbedded(*signs.shape, RANK)

        def back(v):
            placed[chosen] = v
            return factor * signs * idctn(placed.reshape(signs.shape), norm="ortho")

        def residual(u, s, vt):
            return factor * dctn(signs * ((u * s) @ vt), norm="ortho").ravel()[chosen] - y

        @pymanopt.function.numpy(manifold)
        def cost(u, s, vt):
            return 0.5 * np.sum(residual(u, s, vt) ** 2)

        @pymanopt.function.numpy(manifold)
        def gradient(u, s, vt):
            e = back(residual(u, s, vt))
            ev, eu = e @ vt.T, u.T @ e
            return ev * s, np.sum(u * ev, axis=0), (eu.T * s).T

        u, s, vt = np.linalg.svd(back(y), full_matrices=False)
        self.start = type(manifold.random_point())(u[:, :RANK], s[:RANK], vt[:RANK])
        self.problem, self.truth = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient), truth
        self.optimizer = pymanopt.optimizers.ConjugateGradient(
            max_time=PEER_SECONDS, min_gradient_norm=TARGET, max_iterations=PEER_STEPS, verbosity=0
        )

    def run(self) -> None:
        self.result = self.optimizer.run(self.problem, initial_point=self.start)

    @property
    def error(self) -> float:
        u, s, vt = self.result.point
        return float(np.linalg.norm((u * s) @ vt - self.truth) / np.linalg.norm(self.truth))

    @property
    def capped(self) -> bool:
        return self.result.time >= PEER_SECONDS or self.result.iterations >= PEER_STEPS


def growth(problems: dict[int, tuple[Recovery, Factors]], name: str) -> None:
    rows: dict[str, float] = {}
    per_step, steps = [], []
    for n, (problem, truth) in problems.items():
        method = Ours(problem, truth, name)
        began = time.perf_counter()
        taken = int(method.run().steps)
        seconds = time.perf_counter() - began
        per_step.append(seconds / taken)
        steps.append(float(taken))
        rows |= {f"n = {n}: seconds": seconds, f"n = {n}: steps": float(taken), f"n = {n}: error": method.error}
    rows["exponent of the time of a step"] = exponent(SIZES, per_step)
    rows["exponent of the steps"] = exponent(SIZES, steps)
    report(f"matrix sensing, rank {RANK}, {name}", rows, "exponents about 2 and 0")


def against_the_peer(problem: Recovery, truth: Factors) -> None:
    y, matrix = np.asarray(problem.y, float), np.asarray(truth.left @ truth.right.T, float)
    try:
        peer = Peer(problem.op, y, matrix)
    except ImportError:
        print("\nPyManopt is not installed: no peer")
        return
    methods = {name: Ours(problem, truth, name) for name in ("scaled", "projection", "alternating", "lbfgs")}
    runs = {"PyManopt": peer.run, **{name: method.run for name, method in methods.items()}}
    seconds = interleaved(runs, rounds=5, warm=1)
    rows: dict[str, float | str] = {"PyManopt, seconds": seconds["PyManopt"], "PyManopt, error": peer.error}
    rows |= {"PyManopt, steps": float(peer.result.iterations), "PyManopt hit its cap": str(peer.capped)}
    for name, method in methods.items():
        rows |= {f"{name}, seconds": seconds[name], f"{name}, error": method.error}
        rows |= {
            f"{name}, steps": float(method.end.steps),
            f"PyManopt over {name}": seconds["PyManopt"] / seconds[name],
        }
    report(f"matrix sensing, n = {PEER_SIZE}, against PyManopt", rows)


def main() -> None:
    problems = {n: instance(n) for n in SIZES}
    for name in ("gradient", "scaled", "projection"):
        growth(problems, name)
    against_the_peer(*problems[PEER_SIZE])


if __name__ == "__main__":
    main()
