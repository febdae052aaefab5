"""Dynamical stability: at which minima can gradient descent stay with this step size, and at which can SGD?

Squared loss L(θ) = (1/2n) Σᵢ (f(zᵢ; θ) − yᵢ)² at an interpolating minimum, gᵢ = ∇f(zᵢ; θ), H = (1/n) Σᵢ gᵢ gᵢᵀ,
which is the Hessian there. Linearized SGD on batches of B moves a deviation d ↦ d − (η/B) Σ_{i in batch} gᵢ (gᵢᵀd).
Its second moment S = E d dᵀ moves by the self-adjoint map

    T(S) = S − η (HS + SH) + η² N(S),   N(S) = (1 − c) HSH + (c/n) Σᵢ (gᵢᵀS gᵢ) gᵢ gᵢᵀ

with c = 1/B with replacement, (n − B) / (B(n − 1)) without. The minimum is linearly stable where ρ(T) ≤ 1. Then

    λ_max(H) ≤ 2/η,    η [(1 − c) ‖H‖²_F + (c/n) Σᵢ ‖gᵢ‖⁴] ≤ 2 tr H   (S = I),    hence  tr H ≤ 2/(cη)

T keeps the cone of positive semidefinite matrices, so that ρ(T) ≤ 1 exactly where ηN ⪯ M, M(S) = HS + SH: the largest
stable step is 1/λ_max(M^{-1/2} N M^{-1/2}), an eigenvalue problem of matrices as large as the rank of H.

| paper        | here                            |
|--------------|---------------------------------|
| η, B         | `step_size`, `batch_size`       |
| Tr H, ‖H‖_F  | `trace`, `frobenius`            |
| λ_max(H)     | `largest`                       |
| μ            | `alignment`                     |

Source: L. Wu and W. J. Su, *The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent*, ICML
2023 (arXiv 2305.17490), the necessary conditions of linear stability. The proofs of the conditions above are our own
(⟨S, T(S)⟩ at S = I, and Jensen). The form with the noise's alignment, ‖H‖_F ≤ √(B/μ)/η, is from memory, and so is
the alignment's definition.

Guarantee: a minimum that SGD can stay at meets all conditions: a larger step or a smaller batch keeps only flatter
ones. Gradient descent is held by λ_max alone. They are necessary; only that of the largest stable step suffices.

Departures: the largest stable step is found as an eigenvalue, where one would bisect on ρ(T).

Use it at the end of training, or along it, on a network with one output and the squared loss that reaches (nearly) zero
residuals. Cross-entropy has no interpolating minimum: the conditions say nothing there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_count, check_positive, is_traced
from ..parts.curvature import Estimate, hutchinson, lanczos_quadrature, per_example_squared_norms

__all__ = ["Condition", "Stability", "dynamical_stability", "largest_stable_step", "moment_map"]

_DENSE = 2**24  # entries of the matrix of per-example gradients up to which everything is exact
_RANK = 256  # of H, up to which the largest stable step is computed
_ROWS = 64  # examples whose gradients are held at once where they are not all held
_INTERPOLATES = 1e-3  # of the targets' mean square, what the residuals' may be


class Condition(NamedTuple):
    """One necessary condition: `value` ≤ `limit`, as scalars.

    `error` is the standard error of value − limit: 0 where it is exact, an estimate's own otherwise.
    """

    value: Float[Array, ""]
    limit: Float[Array, ""]
    error: Float[Array, ""]

    @property
    def violated(self) -> bool | None:
        """True or False where the difference is more than two standard errors; else, or where it is unknown, None."""
        excess, error = float(self.value - self.limit), 2 * float(self.error)
        return None if np.isnan(excess) or abs(excess) <= error else excess > 0


class Stability(eqx.Module):
    """What is known of H at a point, and the conditions for a step size and a batch size.

    **Fields**, each a real scalar, or an `Estimate` (value and standard error, which is 0 where it is exact):
    - `trace`, `squared_frobenius`: tr H, ‖H‖²_F; `fourth`: (1/n) Σ ‖gᵢ‖⁴, exact.
    - `largest`: λ_max(H); where it is not exact the largest Ritz value, which is never above it, and `largest_residual`
      within which of it an eigenvalue lies.
    - `residual`: the mean squared residual; `relative_residual`: of the targets' mean square.
    - `largest_step`: the largest step size at which (S)GD with this batch is linearly stable; NaN where not computed.
    - `alignment`: tr(ΣH)/(2L‖H‖²_F) of the gradient noise's covariance Σ (of one example); NaN where not computed.
    - `conditions`: by name.
    """

    trace: Estimate
    squared_frobenius: Estimate
    fourth: Float[Array, ""]
    largest: Float[Array, ""]
    largest_residual: Float[Array, ""]
    residual: Float[Array, ""]
    relative_residual: Float[Array, ""]
    largest_step: Float[Array, ""]
    alignment: Float[Array, ""]
    conditions: dict[str, Condition]

    @property
    def frobenius(self) -> Float[Array, ""]:
        """‖H‖_F."""
        return jnp.sqrt(self.squared_frobenius.value)

    @property
    def violated(self) -> tuple[str, ...]:
        """The conditions that are violated by more than two standard errors."""
        return tuple(name for name, condition in self.conditions.items() if condition.violated)

    def __str__(self) -> str:
        words = {True: "violated", False: "met", None: "undecided"}
        lines = [f"trace {_shown(self.trace)}, squared Frobenius norm {_shown(self.squared_frobenius)}"]
        lines.append(f"largest eigenvalue {float(self.largest):.4g} (residual {float(self.largest_residual):.1e})")
        if not np.isnan(float(self.largest_step)):
            lines.append(f"largest stable step {float(self.largest_step):.4g}")
        for name, c in self.conditions.items():
            if np.isnan(float(c.limit)):
                continue
            lines.append(f"  {name}: {float(c.value):.4g} <= {float(c.limit):.4g}, {words[c.violated]}")
        return "\n".join(lines)


def _shown(estimate: Estimate) -> str:
    return f"{float(estimate.value):.4g}" + (f" ± {float(estimate.error):.2g}" if float(estimate.error) else "")


def dynamical_stability(
    predict: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    inputs: PyTree,
    targets: Float[Array, " n"],
    *,
    step_size: Any,
    batch_size: int | None = None,
    replacement: bool = True,
    key: Array | int = 0,
    probes: int = 32,
    lanczos_steps: int = 20,
    exact: bool | None = None,
) -> Stability:
    """The probes and the conditions at `params` (Wu and Su 2023); traceable, so also along a compiled run.

    **Arguments:**
    - `predict`: `predict(params, inputs) -> outputs` of shape `(n,)`, one real number an example; `params`: any pytree
      of real arrays (of a model: its array part); `inputs`: with a leading axis of n examples; `targets`: shape `(n,)`.
    - `step_size` η; `batch_size` B, None for gradient descent; `replacement`: how the batch is drawn.
    - `key`, `probes`, `lanczos_steps`: of Hutchinson's estimates and of Lanczos, where those are used.
    - `exact`: hold the n × p per-example gradients and compute everything; by default where they have at most 2²⁴
      entries. Otherwise `trace` and `squared_frobenius` are estimates with standard errors, `largest` is Lanczos', and
      `largest_step` and `alignment` are NaN. ‖gᵢ‖ is computed for each example, 64 at a time, in both cases.

    The conditions hold at interpolation; a warning says where the residuals are above 1e-3 of the targets' mean square.

    **Raises:** `InputError` for a step size that is not positive, a batch size outside 1 … n, data without examples or
    of two lengths, or outputs of another shape.
    """
    check_positive("step_size", step_size)
    n = _checked(predict, params, inputs, targets)
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
        if batch_size > n and not replacement:
            raise InputError("batch_size", batch_size, f"at most the number of examples, {n}")
    check_count("probes", probes, 2)
    if isinstance(key, int):
        key = jax.random.key(key)
    size = trees.flat_size(params)
    exact = n * size <= _DENSE if exact is None else exact
    # As arrays: other numbers never compile again.
    share, step_size = jnp.asarray(_noise_share(n, batch_size, replacement)), jnp.asarray(step_size)
    found = _measure(
        predict, params, inputs, targets, step_size, share, key, batch_size, probes, min(lanczos_steps, size), exact
    )
    if not is_traced(found.relative_residual) and float(found.relative_residual) > _INTERPOLATES:
        warnings.warn(
            f"the mean squared residual is {float(found.relative_residual):.2g} of the targets' mean square: the "
            "conditions of dynamical stability hold at interpolating minima",
            stacklevel=2,
        )
    return found


@eqx.filter_jit
def _measure(
    predict: Callable[..., Array],
    params: PyTree,
    inputs: PyTree,
    targets: Array,
    step_size: Array,
    share: Array,
    key: Array,
    batch_size: int | None,
    probes: int,
    lanczos_steps: int,
    exact: bool,
) -> Stability:
    residuals = predict(params, inputs) - targets
    share = share.astype(residuals.dtype)
    residual = jnp.mean(residuals**2)
    measured = (
        _exactly(predict, params, inputs, residuals, share)
        if exact
        else _estimated(predict, params, inputs, key, probes, lanczos_steps)
    )
    fourth = jnp.mean(_squared_norms(predict, params, inputs) ** 2)
    return Stability(
        fourth=fourth,
        residual=residual,
        relative_residual=residual / jnp.mean(targets**2),
        conditions=_conditions(measured, fourth, step_size, batch_size, share),
        **measured,
    )


def _checked(predict: Callable[..., Array], params: PyTree, inputs: PyTree, targets: Any) -> int:
    """The number of examples."""
    lengths = {jnp.shape(a)[0] if jnp.ndim(a) else None for a in (*jax.tree.leaves(inputs), targets)}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        shapes = ", ".join(trees.describe(a) for a in (*jax.tree.leaves(inputs), targets))
        raise InputError("inputs and targets", shapes, "arrays that share one leading axis of at least one example")
    n: int = next(iter(lengths))  # type: ignore[assignment]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not trees.is_floating(leaf) or jnp.iscomplexobj(leaf):
            raise InputError("params" + jax.tree_util.keystr(path), trees.describe(leaf), "a real floating array")
    out = jax.eval_shape(predict, params, inputs)
    if not hasattr(out, "shape") or out.shape != (n,) or jnp.shape(targets) != (n,):
        shapes = f"{jax.tree.map(trees.describe, out)} for targets {trees.describe(targets)}"
        raise InputError("predict", shapes, f"one real number for each of the {n} examples: shape ({n},)")
    return n


def _noise_share(n: int, batch_size: int | None, replacement: bool) -> float:
    """c: which part of E (gᵢ gᵢᵀ) S (gᵢ gᵢᵀ) the batch leaves beside HSH."""
    if batch_size is None:
        return 0.0
    return 1 / batch_size if replacement else (n - batch_size) / (batch_size * max(n - 1, 1))


def _gradients(predict: Callable[..., Array], params: PyTree, rows: PyTree) -> PyTree:
    def single(params: PyTree, row: PyTree) -> Array:
        return predict(params, jax.tree.map(lambda a: a[None], row))[0]

    return jax.vmap(jax.grad(single), (None, 0))(params, rows)


def _squared_norms(predict: Callable[..., Array], params: PyTree, inputs: PyTree) -> Float[Array, " n"]:
    """‖gᵢ‖² of all examples, `_ROWS` gradients at a time."""

    def one(row: PyTree) -> Array:
        return per_example_squared_norms(_gradients(predict, params, jax.tree.map(lambda a: a[None], row)))[0]

    return jax.lax.map(one, inputs, batch_size=_ROWS)


def _exactly(
    predict: Callable[..., Array], params: PyTree, inputs: PyTree, residuals: Array, share: Array
) -> dict[str, Any]:
    """Everything from the matrix of the n per-example gradients."""
    stacked = _gradients(predict, params, inputs)
    rows = jax.vmap(trees.flatten)(stacked)
    n = rows.shape[0]
    gram = rows @ rows.T / n  # has the eigenvalues of H
    squared = jnp.sum(gram**2)
    noise = jnp.mean(residuals**2 * jnp.sum(gram**2, axis=1)) * n  # (1/n) Σ rᵢ² gᵢᵀHgᵢ
    mean = gram @ residuals
    alignment = (noise - mean @ mean / n) / (jnp.mean(residuals**2) * squared)
    values, vectors = jnp.linalg.eigh(gram)
    none, zero = jnp.full((), jnp.nan, gram.dtype), jnp.zeros((), gram.dtype)
    rank = min(n, rows.shape[1])
    # The coordinates of the gᵢ in the eigenvectors of H, and their eigenvalues.
    coordinates = jnp.sqrt(n) * vectors[:, -rank:] * jnp.sqrt(jnp.maximum(values[-rank:], 0))
    step = largest_stable_step(coordinates, values[-rank:], share) if rank <= _RANK else none
    return {
        "trace": Estimate(jnp.trace(gram), zero),
        "squared_frobenius": Estimate(squared, zero),
        "largest": values[-1],
        "largest_residual": zero,
        "largest_step": step,
        "alignment": alignment,
    }


def _estimated(
    predict: Callable[..., Array], params: PyTree, inputs: PyTree, key: Array, probes: int, steps: int
) -> dict[str, Any]:
    """By products Hv = (1/n) JᵀJv alone."""

    def outputs(params: PyTree) -> Array:
        return predict(params, inputs)

    _, forward = jax.linearize(outputs, params)
    transposed = jax.linear_transpose(forward, params)

    def product(v: PyTree) -> PyTree:
        image = forward(v)
        return transposed(image / image.shape[0])[0]

    random, start = jax.random.split(key)
    moments = hutchinson(product, params, random, probes)
    largest, residual = lanczos_quadrature(product, params, start, steps).largest
    none = jnp.full((), jnp.nan, largest.dtype)
    return {
        "trace": moments.trace,
        "squared_frobenius": moments.squared_frobenius,
        "largest": largest,
        "largest_residual": residual,
        "largest_step": none,
        "alignment": none,
    }


def _conditions(
    measured: dict[str, Any], fourth: Array, step_size: Array, batch_size: int | None, share: Array
) -> dict[str, Condition]:
    trace, squared, zero = measured["trace"], measured["squared_frobenius"], jnp.zeros_like(fourth)
    found = {"largest eigenvalue": Condition(measured["largest"], 2 / step_size, zero)}
    if batch_size is not None:
        found["trace"] = Condition(trace.value, 2 / (share * step_size), trace.error)
    probed = step_size * ((1 - share) * squared.value + share * fourth)
    error = jnp.hypot(step_size * (1 - share) * squared.error, 2 * trace.error)
    found["identity"] = Condition(probed, 2 * trace.value, error)
    if batch_size is not None:
        limit = jnp.sqrt(batch_size / measured["alignment"]) / step_size
        found["aligned noise"] = Condition(jnp.sqrt(squared.value), limit, zero)
    found["largest stable step"] = Condition(step_size, measured["largest_step"], zero)
    return found


def moment_map(
    rows: Float[Array, "n p"], moment: Float[Array, "p p"], step_size: Any, share: Any
) -> Float[Array, "p p"]:
    """T(S): the second moment of the deviation after one step, from `moment` before it. `rows` are the gᵢ."""
    n = rows.shape[0]
    hessian = rows.T @ rows / n
    product = hessian @ moment
    along = jnp.sum((rows @ moment) * rows, axis=1)
    noise = (1 - share) * product @ hessian + share / n * (rows * along[:, None]).T @ rows
    return moment - step_size * (product + moment @ hessian) + step_size**2 * noise


def largest_stable_step(
    coordinates: Float[Array, "n r"], eigenvalues: Float[Array, " r"], share: Any, steps: int = 64
) -> Float[Array, ""]:
    """1/λ_max(M^{-1/2} N M^{-1/2}): the step at which ρ(T) reaches 1. Traceable.

    **Arguments:**
    - `coordinates`: the gᵢ in the eigenvectors of H; `eigenvalues`: of H; those below rounding are left out.
    - `share`: c of the batch, 0 for gradient descent.
    - `steps`: of Lanczos, on r × r matrices.
    """
    n, r = coordinates.shape
    known = eigenvalues > r * jnp.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
    sums = jnp.where(known[:, None] & known, eigenvalues[:, None] + eigenvalues, 1)
    scale = jnp.where(known[:, None] & known, jax.lax.rsqrt(sums), 0)

    def product(moment: Array) -> Array:
        moment = scale * moment
        along = jnp.sum((coordinates @ moment) * coordinates, axis=1)
        drift = eigenvalues[:, None] * moment * eigenvalues
        return scale * ((1 - share) * drift + share / n * (coordinates * along[:, None]).T @ coordinates)

    like = jnp.zeros((r, r), coordinates.dtype)
    return 1 / lanczos_quadrature(product, like, jax.random.key(0), min(steps, r * r)).largest[0]
