"""Matrix sensing against its size: time of a step, and steps to a relative error of 1e-6, as n grows.

n × n matrices of rank 5 and condition number 2 from m = 6 n r structured measurements, of which nothing is stored: a
cosine transform costs O(n² log n), so the time of a step should grow like n² and the number of steps not at all.
Float32. The peer is PyManopt's conjugate gradients on the manifold of matrices of fixed rank, with the same operator
in NumPy and SciPy, in float64; a peer that hit its cap is not counted as beaten.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import report

import fallline as fl
from fallline.recovery import Factors, Recovery, StructuredSensing, TwoFactors, structured_sensing
from fallline.recovery.matrix_sensing import METHODS
from fallline.recovery.starts import spectral

RANK, TARGET, SIZES = 5, 1e-6, (128, 256, 512, 1024)
PEER_SIZE, PEER_SECONDS = 128, 60.0


def instance(n: int) -> tuple[Recovery, Factors]:
    keys = jax.random.split(jax.random.key(n), 3)
    u, v = (jnp.linalg.qr(jax.random.normal(key, (n, RANK)))[0] for key in keys[:2])
    root = jnp.sqrt(jnp.linspace(1, 0.5, RANK))
    truth = Factors(u * root, v * root)
    op = structured_sensing(keys[2], 6 * n * RANK, (n, n))
    return Recovery(op, op.mv_product(*truth), TwoFactors(RANK, balance=0.0)), truth


def ours(problem: Recovery, truth: Factors, name: str) -> tuple[float, int, float]:
    """Seconds of a run to the target, compilation apart; its steps; and the relative error there."""
    x0, solver = spectral(problem, jax.random.key(0)), METHODS[name]()
    # The residual at the target: A keeps the norm of what descent reaches, up to a factor near 1.
    value = 0.5 * float(jnp.sum(problem.y**2) / problem.gain / problem.unit) * TARGET**2
    fl.minimize(problem, x0, solver, steps=2, stop=fl.residual(value))
    began = time.perf_counter()
    run = fl.minimize(problem, x0, solver, steps=1000, stop=fl.residual(value))
    seconds = time.perf_counter() - began
    return seconds, int(run.steps), float(problem.distance(run.x, truth))


def exponent(sizes: list[int], numbers: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(numbers), 1)[0])


def peer(op: StructuredSensing, y: np.ndarray, truth: np.ndarray) -> tuple[float, int, float, bool]:
    """Seconds and steps of PyManopt, its relative error, and whether it hit its cap."""
    import pymanopt
    from scipy.fft import dctn, idctn

    signs, chosen = np.asarray(op.signs, float), np.asarray(op.chosen)
    factor = np.sqrt(op.size / len(chosen))
    shape = signs.shape
    manifold = pymanopt.manifolds.FixedRankEmbedded(*shape, RANK)

    def residual(u, s, vt):
        return factor * dctn(signs * ((u * s) @ vt), norm="ortho").ravel()[chosen] - y

    @pymanopt.function.numpy(manifold)
    def cost(u, s, vt):
        return 0.5 * np.sum(residual(u, s, vt) ** 2)

    @pymanopt.function.numpy(manifold)
    def gradient(u, s, vt):
        placed = np.zeros(signs.size)
        placed[chosen] = residual(u, s, vt)
        e = factor * signs * idctn(placed.reshape(shape), norm="ortho")
        ev, eu = e @ vt.T, u.T @ e
        return ev * s, np.sum(u * ev, axis=0), (s * eu.T).T

    placed = np.zeros(signs.size)
    placed[chosen] = y
    u, s, vt = np.linalg.svd(factor * signs * idctn(placed.reshape(shape), norm="ortho"), full_matrices=False)
    start = manifold.random_point()
    start = type(start)(u[:, :RANK], s[:RANK], vt[:RANK]) if not isinstance(start, tuple) else type(start)(
        u[:, :RANK], s[:RANK], vt[:RANK]
    )
    optimizer = pymanopt.optimizers.ConjugateGradient(
        max_time=PEER_SECONDS, min_gradient_norm=TARGET, max_iterations=1000, verbosity=0
    )
    began = time.perf_counter()
    result = optimizer.run(
        pymanopt.Problem(manifold, cost, euclidean_gradient=gradient), initial_point=start
    )
    seconds = time.perf_counter() - began
    u, s, vt = result.point
    error = np.linalg.norm((u * s) @ vt - truth) / np.linalg.norm(truth)
    return seconds, result.iterations, error, seconds >= PEER_SECONDS or result.iterations >= 1000


def main() -> None:
    sizes = list(SIZES)
    problems = {n: instance(n) for n in sizes}
    for name in ("gradient", "scaled", "projection"):
        rows: dict[str, float] = {}
        per_step, steps = [], []
        for n in sizes:
            seconds, taken, error = ours(*problems[n], name)
            per_step.append(seconds / taken)
            steps.append(taken)
            rows |= {f"n = {n}: seconds": seconds, f"n = {n}: steps": float(taken), f"n = {n}: error": error}
        rows["exponent of the time of a step"] = exponent(sizes, per_step)
        rows["exponent of the steps"] = exponent(sizes, [float(k) for k in steps])
        report(f"matrix sensing, rank {RANK}, {name}", rows, "exponents about 2 and 0")
    try:
        import pymanopt  # noqa: F401
    except ImportError:
        print("\nPyManopt is not installed: no peer")
        return
    problem, truth = problems[PEER_SIZE]
    seconds, taken, error = ours(problem, truth, "scaled")
    y, matrix = np.asarray(problem.y, float), np.asarray(truth.left @ truth.right.T, float)
    peers, peer_steps, peer_error, capped = peer(problem.op, y, matrix)
    report(
        f"matrix sensing, n = {PEER_SIZE}, scaled gradients against PyManopt",
        {
            "scaled, seconds": seconds,
            "scaled, steps": float(taken),
            "scaled, error": error,
            "PyManopt, seconds": peers,
            "PyManopt, steps": float(peer_steps),
            "PyManopt, error": peer_error,
            "PyManopt hit its cap": str(capped),
            "PyManopt over scaled": peers / seconds,
        },
    )


if __name__ == "__main__":
    main()
