"""Matrix completion: a gradient against its floor, and time to accuracy against pymanopt.

A 1000 × 1000 projection of rank 10, a tenth of its entries known on both sides of the diagonal, in double precision.

The step: value and gradient of the symmetric problem. The floor is the two products of a sparse matrix with a factor
alone, E X and Eᵀ X by SciPy's CSR: the sampled products X Xᵀ on Ω come on top of it, and NumPy's time for those is
printed.

To 1e-9: whole calls, with checks and spectral start on both sides, until the gradient is so small that the relative
error of the matrix is at most 1e-9 (each method's tolerance is halved until it is, before the clock runs). pymanopt:
conjugate gradients on `FixedRankEmbedded`, as it comes, with cost and gradient from a dense mask, and from a sparse
matrix on Ω. All sides have one BLAS thread: with more they wait for each other on matrices of 10 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
import scipy.sparse.linalg
from threadpoolctl import threadpool_limits
from timing import interleaved, report

import fallline as fl
from fallline.recovery import Factors
from fallline.recovery.matrix_completion import completion_problem, matrix_completion

N, RANK, SHARE, TARGET = 1000, 10, 0.1, 1e-9
CAP = 2000  # steps

Run = Callable[[float], tuple[np.ndarray, np.ndarray, int]]
"""From a tolerance on the gradient to the factors and the steps taken."""


def instance() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((N, RANK)))[0]
    upper = np.triu(rng.random((N, N)) < SHARE)
    return basis @ basis.T, upper | upper.T


def step(truth: np.ndarray, mask: np.ndarray) -> None:
    i, j = np.nonzero(mask)
    problem = completion_problem(i, j, truth[i, j], (N, N), RANK, psd=True)
    x = np.random.default_rng(1).standard_normal((N, RANK))
    point = jnp.asarray(x)
    gradient = jax.jit(lambda problem, x: problem.value_and_gradient(x))
    e = scipy.sparse.csr_matrix((truth[i, j], (i, j)), (N, N))
    transposed = e.T.tocsr()
    times = interleaved(
        {
            "ours": lambda: jax.block_until_ready(gradient(problem, point)),
            "products": lambda: (e @ x, transposed @ x),
            "sampled": lambda: np.einsum("kr,kr->k", x[i], x[j]),
        },
        rounds=41,
    )
    report(
        f"a gradient of matrix completion, n = {N}, r = {RANK}, {len(i)} entries",
        {
            "fallline, value and gradient, ms": 1e3 * times["ours"],
            "floor: two sparse products by SciPy, ms": 1e3 * times["products"],
            "the sampled products by NumPy, ms": 1e3 * times["sampled"],
            "ratio to the floor": times["ours"] / times["products"],
        },
        "ratio at most 3",
    )


def ours(truth: np.ndarray, mask: np.ndarray, method: Any, psd: bool, init: str = "auto") -> Run:
    i, j = np.nonzero(mask)
    values = truth[i, j]

    def run(tolerance: float) -> tuple[np.ndarray, np.ndarray, int]:
        found = matrix_completion(
            i, j, values, (N, N), RANK, method=method, psd=psd, init=init, steps=CAP, stop=fl.gradient_norm(tolerance)
        )
        left, right = found.x if isinstance(found.x, Factors) else (found.x, found.x)
        return np.asarray(left), np.asarray(right), int(found.steps)

    return run


def pymanopt_run(truth: np.ndarray, mask: np.ndarray, sparse: bool) -> Run:
    import pymanopt
    from pymanopt.manifolds import FixedRankEmbedded
    from pymanopt.optimizers import ConjugateGradient

    i, j = np.nonzero(mask)
    values = truth[i, j]
    known = scipy.sparse.csr_matrix((values, (i, j)), (N, N))
    masked = mask * truth
    manifold = FixedRankEmbedded(N, N, RANK)

    if sparse:

        def gaps(u, s, vt):
            return np.einsum("kr,kr->k", (u * s)[i], vt.T[j]) - values

        def residual(u, s, vt):
            return scipy.sparse.csr_matrix((gaps(u, s, vt), known.indices, known.indptr), (N, N))
    else:

        def gaps(u, s, vt):
            return residual(u, s, vt)

        def residual(u, s, vt):
            return mask * ((u * s) @ vt) - masked

    @pymanopt.function.numpy(manifold)
    def cost(u, s, vt):
        return 0.5 * np.sum(gaps(u, s, vt) ** 2)

    @pymanopt.function.numpy(manifold)
    def gradient(u, s, vt):
        e = residual(u, s, vt)
        ev = e @ vt.T
        return ev * s, np.sum(u * ev, axis=0), s[:, None] * (e.T @ u).T

    def run(tolerance: float) -> tuple[np.ndarray, np.ndarray, int]:
        u, s, vt = scipy.sparse.linalg.svds(known / mask.mean(), RANK, random_state=0)
        problem = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient)
        optimizer = ConjugateGradient(
            min_gradient_norm=tolerance, min_step_size=0.0, max_iterations=CAP, max_time=100, verbosity=0
        )
        start = type(manifold.random_point())(u, s, vt)
        found = optimizer.run(problem, initial_point=start)
        u, s, vt = found.point
        return u * s, vt.T, found.iterations

    return run


def calibrated(run: Run, truth: np.ndarray) -> tuple[float, float, int]:
    """A tolerance at which the error is at most the target, the error and the steps."""
    tolerance = 1e-9
    while True:
        left, right, steps = run(tolerance)
        error = float(np.linalg.norm(left @ right.T - truth) / np.linalg.norm(truth))
        if error <= TARGET or steps >= CAP or tolerance < 1e-14:
            return tolerance, error, steps
        tolerance /= 2


def main() -> None:
    truth, mask = instance()
    step(truth, mask)
    runs = {
        "gradient, symmetric": ours(truth, mask, "gradient", True),
        "gradient": ours(truth, mask, "gradient", False),
        "scaled gradient, symmetric": ours(truth, mask, "scaled_gradient", True),
        "scaled gradient": ours(truth, mask, "scaled_gradient", False),
        "L-BFGS, symmetric": ours(truth, mask, fl.optimizer(optax.lbfgs), True),
        "alternating least squares": ours(truth, mask, "alternating_least_squares", False),
        "alternating least squares, spectral start": ours(truth, mask, "alternating_least_squares", False, "spectral"),
    }
    try:
        peers = {
            "pymanopt, dense mask": pymanopt_run(truth, mask, sparse=False),
            "pymanopt, sparse": pymanopt_run(truth, mask, sparse=True),
        }
    except ImportError:
        peers = {}
    found = {name: calibrated(run, truth) for name, run in (runs | peers).items()}
    times = interleaved({name: lambda name=name: (runs | peers)[name](found[name][0]) for name in found}, 5, 1)
    rows: dict[str, Any] = {}
    for name, (_, error, steps) in found.items():
        rows[f"{name}: s, {steps} steps, error {error:.1e}"] = (
            times[name] if error <= TARGET else f"{times[name]:.3g}, did not arrive"
        )
    arrived = [times[name] for name in peers if found[name][1] <= TARGET]
    if arrived:
        for name in runs:
            rows[f"ratio to the faster pymanopt, {name}"] = times[name] / min(arrived)
    report(f"matrix completion to {TARGET:g}, n = {N}, r = {RANK}, p = {SHARE}", rows, "a ratio below 1")


if __name__ == "__main__":
    with jax.enable_x64(True), threadpool_limits(1):
        main()
