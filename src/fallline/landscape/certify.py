"""`certify`: what kind of point an optimizer stopped at; `escape`: the way out of a saddle.

A Ritz value with a small residual proves that *some* eigenvalue is near it, not that none lies
below. So the two directions of the verdict rest on different evidence:

- negative curvature is proved by one vector: its Rayleigh quotient and a decrease that was measured
  along it;
- a lower bound on λ_min holds with a stated probability over Lanczos' random start (Kuczyński and
  Woźniakowski 1992, Theorem 4.2), or, up to 2,000 real coordinates, for the whole spectrum of the
  dense Hessian with its rounding.

Directions of declared symmetries are deflated first, so that a minimum whose orbit is flat is not
mistaken for a degenerate one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..core import trees
from ..core.calls import Calls
from ..core.certificate import Certificate, Verdict
from ..core.errors import InputError, check_count, check_positive, is_traced
from ..core.problem import Problem, bind
from ..core.setup import check_key
from ..parts.linalg import orthonormal_rows
from ..parts.sampling import unit_vector
from .spectrum import dense_spectrum, hessian_scale, lanczos_spectrum, with_problem

__all__ = ["certify", "escape"]

DENSE_LIMIT = 2000  # real coordinates up to which the whole Hessian is formed
_SCALE_STEPS = 16  # enough to know the Hessian's scale
_STEP_SIZES = 2.0 ** np.arange(4, -28, -1)  # trial steps along ±v, in units of max(‖x‖, 1)


@with_problem
def _first_order(problem: Problem, x: PyTree) -> tuple[Array, Array, Array]:
    value, gradient = problem.value_and_gradient(x)
    return value, trees.flatten(gradient), trees.norm(x)


@with_problem
def _values_along(problem: Problem, x: PyTree, v: Array, steps: Array) -> Array:
    flat = trees.flatten(x)
    return jax.lax.map(lambda t: problem.value(trees.unflatten(flat + t * v, x)).astype(flat.dtype), steps)


@with_problem
def _difference_check(problem: Problem, x: PyTree, v: Array, h: Array) -> Array:
    """‖(∇f(x + hv) − ∇f(x − hv)) / 2h − Hv‖: whether the Hessian is the gradient's derivative at all."""
    flat = trees.flatten(x)
    ahead, behind = (trees.flatten(problem.gradient(trees.unflatten(flat + t * v, x))) for t in (h, -h))
    return jnp.linalg.norm((ahead - behind) / (2 * h) - trees.flatten(problem.hessian(x)(trees.unflatten(v, x))))


def certify(
    problem: Problem | Callable[..., Any],
    x: PyTree,
    *,
    args: tuple = (),
    has_aux: bool = False,
    key: Array | int | None = None,
    tolerance: float | None = None,
    curvature_tolerance: float = 1e-4,
    failure_probability: float = 1e-3,
    max_hvp: int = 2000,
) -> Certificate:
    """Say what kind of point `x` is, and on what evidence.

    **Arguments:**
    - `problem`, `x`, `args`, `has_aux`: as for `minimize`.
    - `key`: a key of `jax.random`, or a seed, for Lanczos' random start: needed above 2,000 real
      coordinates (or above `max_hvp`), where the dense Hessian is not formed.
    - `tolerance`: the gradient counts as zero up to `tolerance` · ‖H‖ · max(‖x‖, 1). By default 1e-6,
      or 1e3 units of rounding where that is more (1e-4 in float32).
    - `curvature_tolerance`: curvature counts as zero up to this times ‖H‖.
    - `failure_probability`: of a probabilistic lower bound on λ_min being wrong.
    - `max_hvp`: Hessian–vector products that may be spent.

    **Returns:** a `Certificate`. Its verdict is one of: not stationary; strict saddle (with its
    direction and a measured decrease); second-order stationary to tolerance; local minimum; minimum
    modulo symmetry; global minimum (the declared lower bound is met); inconclusive.

    **Raises:** `InputError` for arguments that cannot be used, for a declared symmetry that is none,
    and for a value below the declared lower bound.

    **Source:** Kuczyński and Woźniakowski, *Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start*, SIAM J. Matrix Anal. Appl. 13 (1992), Theorem 4.2.
    """
    clock = time.perf_counter()
    point, rebuild = trees.split(x)
    if is_traced((point, args)):
        raise InputError("x", "a traced value", "concrete arrays: certify decides on the host, outside jit")
    declared = problem
    problem = bind(problem, point, rebuild, args=args, has_aux=has_aux)
    dtype = np.dtype(trees.real_dtype(point))
    rounding = float(np.finfo(dtype).eps)
    tolerance = max(1e-6, 1e3 * rounding) if tolerance is None else tolerance
    check_positive("tolerance", tolerance)
    check_positive("curvature_tolerance", curvature_tolerance)
    check_positive("failure_probability", failure_probability)
    if not failure_probability < 1:
        raise InputError("failure_probability", failure_probability, "a number below 1")
    check_count("max_hvp", max_hvp, 4)
    n = trees.flat_size(point)
    is_dense = n <= min(DENSE_LIMIT, max_hvp)
    if key is None and not is_dense:
        raise InputError("key", None, f"a key or a seed: with {n} real coordinates Lanczos starts at random")
    drawn = check_key(0 if key is None else key, "the certificate")

    value, gradient, x_norm = _first_order(problem, point)
    value, gradient_norm = float(value), float(np.linalg.norm(np.asarray(gradient, np.float64)))
    calls = Calls(gradient=1)
    radius = max(float(x_norm), 1.0)
    kinks = [] if getattr(declared, "smooth", False) else problem.kinks(point)

    def conclude(verdict: Verdict, reason: str, **evidence: Any) -> Certificate:
        fields: dict[str, Any] = {
            "x": x,
            "value": value,
            "gradient_norm": gradient_norm,
            "gradient_scale": float("nan"),
            "tolerance": tolerance,
            "dimension": n,
            "lower_bound": bound,
            "calls": calls,
            "seconds": time.perf_counter() - clock,
        }
        return Certificate(verdict, reason, **{**fields, **evidence})

    bound = None if problem.lower_bound is None else float(problem.lower_bound)
    if not (np.isfinite(value) and np.isfinite(gradient_norm)):
        return conclude(Verdict.NOT_STATIONARY, "value or gradient is not finite here")

    # The Hessian's scale, without which no gradient is small.
    scale, used = hessian_scale(problem, point, drawn, min(_SCALE_STEPS, n, max_hvp // 2))
    calls += used
    facts: dict[str, Any] = {"gradient_scale": scale * radius}
    if not np.isfinite(scale):
        return conclude(Verdict.INCONCLUSIVE, "the Hessian is not finite here", **facts)
    if gradient_norm > tolerance * scale * radius:
        reason = f"the gradient norm is {gradient_norm:.2e}: go on minimizing"
        if kinks:  # at a kink a gradient may be large at a minimum: ask for a decrease
            back = -_STEP_SIZES.astype(dtype) * dtype.type(radius)
            along = _values_along(problem, point, gradient / gradient_norm, back)
            calls += Calls(value=len(_STEP_SIZES))
            if not np.nanmin(np.asarray(along)) < value - 100 * rounding * abs(value):
                kinked = f"the objective may have kinks ({', '.join(kinks)}), and no step along −∇f lowers it"
                return conclude(Verdict.INCONCLUSIVE, kinked, calls=calls, **facts)
        return conclude(Verdict.NOT_STATIONARY, reason, calls=calls, **facts)
    if bound is not None:
        # Relative to the bound; for a bound of zero, what a gradient that counts as zero may leave.
        facts["value_tolerance"] = max(tolerance * abs(bound), 0.5 * scale * (tolerance * radius) ** 2)
        if value < bound - facts["value_tolerance"]:
            raise InputError("lower_bound", bound, f"a number that the objective never goes below; here it is {value}")
    if kinks:
        return conclude(
            Verdict.INCONCLUSIVE,
            f"the objective may have kinks ({', '.join(kinks)}), where a Hessian proves nothing; "
            "Objective(..., smooth=True) says that they are never felt",
            calls=calls,
            **facts,
        )

    probe = unit_vector(jax.random.fold_in(drawn, 0), n, dtype)
    h = dtype.type(rounding ** (1 / 3) * radius)
    mismatch = float(_difference_check(problem, point, probe, h))
    calls += Calls(gradient=2, hvp=1)
    agrees = mismatch <= 30 * rounding ** (1 / 3) * max(scale, rounding)
    if not agrees:
        # Differences of a smooth gradient err like h², and may be all there is where the Hessian is zero.
        agrees = float(_difference_check(problem, point, probe, h / 2)) <= 0.5 * mismatch
        calls += Calls(gradient=2, hvp=1)
    if not agrees:
        reason = (
            f"Hessian and differences of the gradient disagree by {mismatch:.1e}: a kink at this point, or a formula "
            "such as abs(z)**2 at z = 0 that JAX differentiates wrongly (write z.real**2 + z.imag**2)"
        )
        return conclude(Verdict.INCONCLUSIVE, reason, calls=calls, **facts)

    deflate = _tangent_basis(declared, x, point, dtype)
    r = deflate.shape[0]
    facts.update(dimension=n - r, symmetry_dimension=r, failure_probability=failure_probability)
    if r == n:
        facts.update(symmetry_residual=0.0)
        return conclude(Verdict.MINIMUM_MODULO_SYMMETRY, "every direction is a symmetry", calls=calls, **facts)

    search = dense_spectrum if is_dense else lanczos_spectrum
    spectrum, tangent_size, used = search(
        problem, point, deflate, drawn, scale, curvature_tolerance, failure_probability, max_hvp - int(calls.hvp)
    )
    calls += used
    scale = max(scale, abs(spectrum.largest), abs(spectrum.rayleigh))
    limit = curvature_tolerance * scale
    if r and tangent_size > limit + tolerance * scale:
        raise InputError(
            "symmetry",
            f"tangents with ‖Ht‖/‖H‖ = {tangent_size / scale:.1e}",
            "directions along which the objective is constant",
        )
    facts.update(
        gradient_scale=scale * radius,
        curvature_tolerance=limit,
        rayleigh=spectrum.rayleigh,
        residual=spectrum.residual,
        lower=spectrum.lower,
        largest=spectrum.largest,
        spread=spectrum.spread,
        method=spectrum.method,
        lanczos_steps=spectrum.steps or None,
        symmetry_residual=tangent_size / scale if r else None,
    )

    if bound is not None and value <= bound + facts["value_tolerance"]:
        return conclude(Verdict.GLOBAL_MINIMUM, "the value meets the declared lower bound", calls=calls, **facts)
    if spectrum.rayleigh < -limit and spectrum.direction is not None:
        v = spectrum.direction
        sizes = np.concatenate([_STEP_SIZES, -_STEP_SIZES]).astype(dtype) * dtype.type(radius)
        along = np.asarray(_values_along(problem, point, v, sizes), np.float64)
        calls += Calls(value=len(sizes))
        along = np.where(np.isfinite(along), along, np.inf)
        best = int(np.argmin(along))
        decrease = value - float(along[best])
        facts.update(direction=trees.unflatten(v, point), step=float(sizes[best]), decrease=decrease)
        if decrease > 100 * rounding * abs(value):
            reason = f"curvature {spectrum.rayleigh:.3e} along v, and a step along it lowers the value"
            return conclude(Verdict.STRICT_SADDLE, reason, calls=calls, **facts)
        facts.update(direction=None, step=None, decrease=None)
        reason = "negative curvature, but no step along it lowers the value by more than rounding"
        return conclude(Verdict.INCONCLUSIVE, reason, calls=calls, **facts)
    sure = "" if is_dense else f" with probability at least {1 - failure_probability:g}"
    if spectrum.lower > 0 and r:
        reason = f"all curvature off the symmetry is positive{sure}"
        return conclude(Verdict.MINIMUM_MODULO_SYMMETRY, reason, calls=calls, **facts)
    if spectrum.lower > 0:
        return conclude(Verdict.LOCAL_MINIMUM, f"all curvature is positive{sure}", calls=calls, **facts)
    if spectrum.lower >= -limit:
        reason = f"no curvature lies below −{limit:.1e}{sure}; flat directions decide the rest"
        return conclude(Verdict.SECOND_ORDER_STATIONARY, reason, calls=calls, **facts)
    reason = f"no negative curvature was found, but λ_min may be as low as {spectrum.lower:.2e}; raise max_hvp"
    return conclude(Verdict.INCONCLUSIVE, reason, calls=calls, **facts)


def _tangent_basis(problem: Any, x: PyTree, point: PyTree, dtype: Any) -> Array:
    """Orthonormal real rows spanning the declared tangents; shape (0, n) without any."""
    n = trees.flat_size(point)
    tangents = problem.symmetry(x) if isinstance(problem, Problem) else None
    if tangents is None:
        return jnp.zeros((0, n), dtype)
    tangents = eqx.filter(tangents, trees.is_floating)
    shapes = [np.shape(t)[1:] for t in jax.tree.leaves(tangents)]
    if shapes != [np.shape(a) for a in jax.tree.leaves(point)]:
        raise InputError("symmetry", f"tangents of shapes {shapes}", "a pytree like x with one leading axis")
    rows = jax.vmap(trees.flatten)(tangents).astype(dtype)
    trees.check_no_nan("symmetry", rows)
    return orthonormal_rows(rows, float(np.sqrt(np.finfo(dtype).eps)))


def escape(certificate: Certificate) -> PyTree:
    """A point with a lower value: from a strict saddle along its certified direction.

    **Returns:** `x + step · direction`, in the form of the certified point; its value is
    `certificate.decrease` below.

    **Raises:** `InputError` where the verdict is no strict saddle.
    """
    if certificate.verdict is not Verdict.STRICT_SADDLE or certificate.step is None:
        stationary = certificate.verdict is not Verdict.NOT_STATIONARY
        hint = "there is no certified way out" if stationary else "minimize goes on from there"
        raise InputError("certificate", f"'{certificate.verdict}'", f"'{Verdict.STRICT_SADDLE}'; {hint}")
    point, rebuild = trees.split(certificate.x)
    flat, v = trees.flatten(point), trees.flatten(certificate.direction)
    return rebuild(trees.unflatten(flat + certificate.step * v, point))
