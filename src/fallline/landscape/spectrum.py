"""The lower end of a Hessian's spectrum at a point, dense or by products alone.

Both ways work on the complement of given symmetry directions, on the real view of the point, and
return the same evidence: an eigenvector with its residual, and a lower bound on λ_min.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..core import trees
from ..core.calls import Calls
from ..core.problem import Problem
from ..core.program import Static
from ..parts.linalg import dense, extend_lanczos, lanczos_gap, ritz_vector, start_lanczos, tridiagonal_eigh
from ..parts.sampling import unit_vector

__all__ = ["Spectrum", "dense_spectrum", "hessian_scale", "lanczos_spectrum", "with_problem"]

_CAPACITY = 1024  # Lanczos steps that fit the buffers
_LOOKS = (16, 32, 64, 128, 256, 512)  # steps after which Lanczos is judged
_SYMMETRY_PROBES = 8


def with_problem(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `fn(problem, *arrays)`; problems of the same program share the code."""

    @functools.partial(jax.jit, static_argnames="static")
    def compiled(leaves: list[Any], rest: Any, *, static: Static) -> Any:
        return fn(static.join(leaves), *rest)

    def call(problem: Problem, *rest: Any) -> Any:
        leaves, static = Static.split(problem)
        return compiled(leaves, rest, static=static)

    def lower(problem: Problem, *rest: Any) -> Any:
        leaves, static = Static.split(problem)
        return compiled.lower(leaves, rest, static=static)

    call.lower = lower  # type: ignore[attr-defined]
    return call


def _product(problem: Problem, x: PyTree, deflate: Array) -> Callable[[Array], Array]:
    """v ↦ P H P v on the real view, with P the projection off the rows of `deflate`."""
    hessian = problem.hessian(x)

    def product(v: Array) -> Array:
        w = trees.flatten(hessian(trees.unflatten(v, x)))
        return w - deflate.T @ (deflate @ w)

    return product


@with_problem
def _begin(problem: Problem, x: PyTree, deflate: Array, key: Array) -> Any:
    start = unit_vector(key, trees.flat_size(x), trees.real_dtype(x))
    for _ in range(2):  # twice is enough
        start = start - deflate.T @ (deflate @ start)
    return start_lanczos(start / jnp.linalg.norm(start), _CAPACITY)


@with_problem
def _extend(problem: Problem, x: PyTree, deflate: Array, run: Any, until: Array) -> Any:
    return extend_lanczos(_product(problem, x, deflate), run, until)


@with_problem
def _assemble(problem: Problem, x: PyTree, deflate: Array, start: Array, weights: Array, steps: Array) -> Array:
    return ritz_vector(_product(problem, x, deflate), start, weights, steps)


@with_problem
def _dense_hessian(problem: Problem, x: PyTree) -> Array:
    n, dtype = trees.flat_size(x), trees.real_dtype(x)
    return dense(_product(problem, x, jnp.zeros((0, n), dtype)), n, dtype)


@with_problem
def _image(problem: Problem, x: PyTree, deflate: Array, v: Array) -> Array:
    return _product(problem, x, deflate)(v)


@dataclasses.dataclass
class Spectrum:
    """What is known of the Hessian on the complement of the symmetry; see `Certificate` for the fields."""

    direction: Array | None = None
    rayleigh: float = np.nan
    residual: float = np.nan
    lower: float = -np.inf
    largest: float = np.nan
    spread: float = np.nan
    method: str = ""
    steps: int = 0


def hessian_scale(problem: Problem, x: PyTree, key: Array, steps: int) -> tuple[float, Calls]:
    """The largest |Ritz value| after a few Lanczos steps: ‖H‖ to within a small factor."""
    nothing = jnp.zeros((0, trees.flat_size(x)), trees.real_dtype(x))
    run = _extend(problem, x, nothing, _begin(problem, x, nothing, key), np.int32(steps))
    values, _, _ = tridiagonal_eigh(run)
    return float(np.max(np.abs(values))), Calls(hvp=int(run.steps))


def dense_spectrum(
    problem: Problem, x: PyTree, deflate: Array, key: Array, scale: float, curvature: float, failure: float, budget: int
) -> tuple[Spectrum, float, Calls]:
    """The whole spectrum; λ_min is bounded by its computed value less the rounding of the Hessian.

    **Arguments:** `deflate` — orthonormal real rows, shape `(r, n)`, that are left out; `scale` ≈ ‖H‖;
    `curvature` — what counts as zero, relative to ‖H‖; `failure` — probability that the lower bound is
    wrong; `budget` — products that may be spent.

    **Returns:** the spectrum's evidence, the largest ‖Ht‖ seen on unit rows t of `deflate`, the account.
    """
    raw = np.asarray(_dense_hessian(problem, x))
    rounding = np.finfo(raw.dtype).eps
    raw = raw.astype(np.float64)
    n, q = raw.shape[0], np.asarray(deflate, np.float64)
    hessian = (raw + raw.T) / 2
    basis = np.linalg.qr(q.T, mode="complete")[0][:, q.shape[0] :]
    values, vectors = np.linalg.eigh(basis.T @ hessian @ basis)
    v = basis @ vectors[:, 0]
    rayleigh, image = float(values[0]), hessian @ v
    image -= q.T @ (q @ image)
    largest = float(max(abs(values[0]), abs(values[-1])))
    # The Hessian's own asymmetry shows its rounding; √n·u·‖H‖ stands for what symmetric errors hide.
    error = float(np.linalg.norm(raw - raw.T, 2) / 2 + np.sqrt(n) * rounding * largest)
    tangent = float(np.linalg.norm(hessian @ q.T, 2)) if q.size else 0.0
    spectrum = Spectrum(
        direction=jnp.asarray(v, deflate.dtype),
        rayleigh=rayleigh,
        residual=float(np.linalg.norm(image - rayleigh * v)),
        lower=rayleigh - error,
        largest=largest,
        spread=float(values[-1] - values[0]),
        method="dense",
    )
    return spectrum, tangent, Calls(hvp=n)


def lanczos_spectrum(
    problem: Problem, x: PyTree, deflate: Array, key: Array, scale: float, curvature: float, failure: float, budget: int
) -> tuple[Spectrum, float, Calls]:
    """The lower end of the spectrum by two-pass Lanczos: at most five vectors are held.

    Stops as soon as the question is settled: a converged Ritz value below −`curvature`·‖H‖, or a
    lower bound above that. Same arguments and results as `dense_spectrum`.
    """
    n, r = deflate.shape[1], deflate.shape[0]
    rounding = float(np.finfo(deflate.dtype).eps)
    tangent, calls = 0.0, Calls()
    for i in range(min(r, _SYMMETRY_PROBES)):
        t = unit_vector(jax.random.fold_in(key, i + 1), r, deflate.dtype) @ deflate
        tangent = max(tangent, float(jnp.linalg.norm(_image(problem, x, jnp.zeros((0, n), t.dtype), t))))
        calls += Calls(hvp=1)

    # Half of the budget is kept for the second pass. Each look may be wrong: δ is shared among them,
    # and among the two ends of the spectrum.
    most = max(1, min((budget - int(calls.hvp) - 1) // 2, _CAPACITY, n - r))
    looks = [*(k for k in _LOOKS if k < most), most]
    each = failure / (2 * len(looks))
    run = _begin(problem, x, deflate, key)
    start, found, weights = run.current, Spectrum(), np.zeros(0)
    for k in looks:
        run = _extend(problem, x, deflate, run, np.int32(k))
        values, vectors, beta = tridiagonal_eigh(run)
        weights, alive, done = vectors[:, 0], bool(run.alive), int(run.steps)
        largest = max(abs(values[0]), abs(values[-1]), scale)
        gap = lanczos_gap(n - r, done, each) if alive else 0.0
        spread = float(values[-1] - values[0])
        width = spread / (1 - 2 * gap) if gap < 0.5 else np.inf
        found = Spectrum(
            rayleigh=float(values[0]),
            residual=float(beta * abs(weights[-1])),
            lower=float(values[0] - gap * width - 10 * done * rounding * largest),
            largest=float(largest),
            spread=spread,
            method="lanczos",
            steps=done,
        )
        limit = curvature * largest
        converged = found.residual <= 1e-2 * abs(found.rayleigh)
        if (found.rayleigh < -limit and converged) or found.lower >= -limit or not alive:
            break
    calls += Calls(hvp=found.steps)
    if found.rayleigh < -curvature * found.largest:
        padded = np.zeros(_CAPACITY, deflate.dtype)
        padded[: found.steps] = weights
        v = _assemble(problem, x, deflate, start, padded, np.int32(found.steps))
        image, v64 = (np.asarray(a, np.float64) for a in (_image(problem, x, deflate, v), v))
        calls += Calls(hvp=found.steps + 1)
        found.direction, found.rayleigh = v, float(v64 @ image)
        found.residual = float(np.linalg.norm(image - found.rayleigh * v64))
    return found, tangent, calls
