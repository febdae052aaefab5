"""Robust PCA by gradient descent and thresholding: a low-rank matrix under gross errors.

Solves Y = M + S for M = UVᵀ of rank r and S with at most an α-fraction of entries in each row and each column,
by gradient descent on

    f(U, V; S) = ½ ‖UVᵀ + S − Y‖² + ⅛ ‖UᵀU − VᵀV‖²

where S is read off the residual at each point: T_α keeps an entry that is among the ⌈α n₂⌉ largest of its row and
among the ⌈α n₁⌉ largest of its column, ties too, and puts 0 elsewhere.

    start:  S₀ = T_α[Y],   LΣRᵀ ≈ Y − S₀ of rank r,   U = LΣ^{1/2},   V = RΣ^{1/2}
    loop:   S = T_{γα}[Y − UVᵀ],   G = UVᵀ + S − Y,   D = UᵀU − VᵀV
            U ← Π_U(U − η (G V + ½ U D)),   V ← Π_V(V − η (Gᵀ U − ½ V D))

Π scales rows down to the norm √(2μr/n) ‖U₀‖. Where only some entries are seen, G is 0 on the others, and with a
fraction p seen, T keeps the γpα-fraction and the first term of f is divided by p.

| paper     | here                              |
|-----------|-----------------------------------|
| Y, Ω      | `y`, `observed`                   |
| (U, V)    | `x`, `Factors`                    |
| S         | the second of `RobustPCA.parts`   |
| α, γ      | `alpha`, `gamma`                  |
| η σ₁      | `step_size`                       |
| μ         | `incoherence`                     |

Source: X. Yi, D. Park, Y. Chen and C. Caramanis, *Fast Algorithms for Robust PCA via Gradient Descent*, NeurIPS 2016
(arXiv 1605.07784), Algorithms 1 and 2; Y. Chi, Y. M. Lu and Y. Chen, *Nonconvex Optimization Meets Low-Rank Matrix
Factorization: An Overview* (2019), Section VI.

Guarantee: for M of condition number κ with μ-incoherent factors and α ≲ 1/(μ κ^{1/2} r^{3/2} + μκr) the error falls
like (1 − c/κ)ᵗ, a step costs O(r n₁ n₂); with some entries seen, p ≳ μ²r² log n/n times a polynomial of κ.

Departures: the projection is off unless an incoherence is given. σ₁ is that of Y − S₀, as it must be: of Y itself
it is the outliers'. Rows and columns are not sorted: their thresholds are found by bisection (`parts.selection`).

Use it where errors are few, anywhere and of any size. α must bound the *largest* fraction of errors of a row or column,
not the average one: a single row with more of them than that, and large ones, spoils the start. Too large an α
throws away true entries (three times the fraction: 7 % error after 300 steps), too small a one leaves errors in.
Where the singular values of M are far apart it is slow, by the condition number.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..core import trees
from ..core.errors import InputError, check_positive, is_traced
from ..core.problem import Problem
from ..core.solver import GRADIENT, Solver, State
from ..core.stopping import StoppingRule
from ..parts.linalg import leading_svd
from ..parts.selection import threshold_of_largest
from .losses import Loss
from .operators import Operator
from .problem import Recovery
from .structures import Factors, TwoFactors

__all__ = ["ObservedMatrix", "RobustPCA", "Trimmed", "robust_pca", "robust_pca_start", "trim"]

_BALANCE = 1.0  # ⅛ ‖UᵀU − VᵀV‖²
_ROUNDING = 1e-6  # so that ⌈0.1 · 300⌉ is 30, whatever the rounding of the product


@jax.jit
def trim(a: Float[Array, "n1 n2"], fraction: Any) -> Bool[Array, "n1 n2"]:
    """Where T keeps an entry of `a`."""
    sizes = jnp.abs(a)
    rows, columns = (jnp.maximum(jnp.ceil(fraction * n * (1 - _ROUNDING)), 1) for n in reversed(a.shape))
    return (sizes >= threshold_of_largest(a, rows, axis=1)) & (sizes >= threshold_of_largest(a, columns, axis=0))


@functools.partial(jax.jit, static_argnames="rank")
def trimmed_svd(y: Float[Array, "n1 n2"], fraction: Any, rank: int, key: Array) -> tuple[Array, Array, Array]:
    """The leading singular vectors and values of Y − T[Y]: L, σ, R."""
    clean = jnp.where(trim(y, fraction), 0, y)
    return leading_svd(lambda right: clean @ right, lambda left: clean.T @ left, y.shape, rank, key, y.dtype)


class Trimmed(Loss):
    """½ Σ (u − y)² over the entries of a matrix that are not among the γα-fraction that T keeps as errors.

    **Arguments:** `alpha`, `gamma` — see `RobustPCA`; `seen` — the fraction of entries that are observed.
    """

    phaseless: ClassVar[bool] = False
    step_size: ClassVar[float | None] = 0.5

    alpha: Any
    gamma: Any
    seen: Any

    def __init__(self, alpha: float, gamma: float = 1.5, seen: Any = 1.0):
        check_positive("alpha", alpha)
        check_positive("gamma", gamma)
        if not is_traced((alpha, gamma)):
            if not alpha < 1:
                raise InputError("alpha", alpha, "a number above 0 and below 1")
            if not gamma > 1:
                raise InputError("gamma", gamma, "a number above 1")
            if not gamma * alpha <= 1:
                raise InputError("gamma", gamma, f"at most 1 / alpha = {1 / alpha:g}")
        self.alpha, self.gamma, self.seen = alpha, gamma, seen

    def errors(self, off: Float[Array, "n1 n2"]) -> Bool[Array, "n1 n2"]:
        """Which entries count as errors, from the residual."""
        return trim(jax.lax.stop_gradient(off), self.gamma * self.alpha * self.seen)

    def value(self, u: Array, y: Array, relative: Array) -> Float[Array, ""]:
        return self.value_and_dual(u, y, relative)[0]

    def dual(self, u: Array, y: Array, relative: Array) -> Array:
        return self.value_and_dual(u, y, relative)[1]

    def value_and_dual(self, u: Array, y: Array, relative: Array) -> tuple[Float[Array, ""], Array]:
        off = u - y
        kept = jnp.where(self.errors(off), 0, off)
        return jnp.sum(kept**2) / 2, kept

    def unit(self, y: Array, count: Any) -> Any:
        """σ₁ of Y − S₀."""
        return trimmed_svd(y, self.alpha * self.seen, 1, jax.random.key(0))[1][0] / self.seen


class ObservedMatrix(Operator):
    """A matrix as it is seen: all of its entries, or those where `observed` is 1, and 0 elsewhere."""

    matrix: tuple[int, int] = eqx.field(static=True)
    observed: Float[Array, "n1 n2"] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.matrix

    @property
    def dtype(self) -> Any:
        return jnp.float32 if self.observed is None else self.observed.dtype

    def mv(self, x: Array) -> Array:
        return x if self.observed is None else self.observed * x

    def adjoint(self, v: Array) -> Array:
        return self.mv(v)

    def squared_row_norms(self) -> Float[Array, ...]:
        return jnp.ones(()) if self.observed is None else self.observed


class RobustPCA(Recovery):
    """A low-rank matrix under gross errors, Y = UVᵀ + S; the point is `Factors(U, V)`.

    The `Recovery` with the loss `Trimmed`, in units of σ₁: any solver that takes gradients runs on it.

    **Arguments:**
    - `y`: the matrix, of shape (n1, n2).
    - `rank`: r, of the low-rank part.
    - `alpha`: α, a bound on the fraction of errors in every row and every column.
    - `gamma`: γ > 1 with γα ≤ 1: in the loop that much more counts as errors.
    - `observed`: booleans of the shape of `y`, which is seen where they are True; by default all of it.

    **Raises:** `InputError` for numbers out of range, and data that are no finite matrix.
    """

    structure: TwoFactors  # type: ignore[override]
    loss: Trimmed  # type: ignore[override]

    def __init__(self, y: Any, rank: int, alpha: float, *, gamma: float = 1.5, observed: Any = None):
        if np.ndim(y) != 2:
            raise InputError("y", trees.describe(y), "a matrix")
        seen, mask = 1.0, None
        if observed is not None:
            if np.shape(observed) != np.shape(y) or getattr(observed, "dtype", None) != np.bool_:
                raise InputError("observed", trees.describe(observed), f"booleans of the shape of y, {np.shape(y)}")
            if not is_traced(observed) and not np.any(observed):
                raise InputError("observed", "no entry", "at least one")
            mask = jnp.asarray(observed).astype(y.dtype)
            seen = jnp.mean(mask)
            y = jnp.where(observed, y, 0)
        op = ObservedMatrix((int(y.shape[0]), int(y.shape[1])), mask)
        super().__init__(op, y, TwoFactors(rank, _BALANCE), Trimmed(alpha, gamma, seen))

    def parts(self, x: Factors) -> tuple[Float[Array, "n1 n2"], Float[Array, "n1 n2"]]:
        """The low-rank part UVᵀ and the sparse part S = T_γα[Y − UVᵀ], on what is observed."""
        low_rank = self.structure.lift(x)
        off = self.y - self.op.mv(low_rank)
        return low_rank, jnp.where(self.loss.errors(off), off, 0)


def robust_pca_start(problem: RobustPCA, key: Array) -> Factors:
    """The truncated SVD of Y − T_α[Y], over p, each factor with the roots of the singular values."""
    loss, rank = problem.loss, problem.structure.rank
    left, values, right = trimmed_svd(jnp.asarray(problem.y), loss.alpha * loss.seen, rank, key)
    roots = jnp.sqrt(values / loss.seen)
    return Factors(left * roots, right * roots)


class RobustPCAState(State):
    """All of it is of `x`; `bounds` are the norms that rows of U and of V may have."""

    value: Float[Array, ""]
    gradient: Factors
    gradient_norm: Float[Array, ""]
    bounds: Factors
    done: Bool[Array, ""]


class RobustPCASolver(Solver):
    """See the module's docstring for the algorithm and the names."""

    step_size: Any
    incoherence: Any
    tolerance: Any

    def stopping(self) -> StoppingRule | None:
        return None  # its own test is relative to the size of the point

    @property
    def name(self) -> str:
        return "robust_pca"

    def init(self, problem: Problem, x: Factors, *, key: Array | None) -> RobustPCAState:
        bounds = Factors(*(row_bound(factor, self.incoherence) for factor in x))
        return RobustPCAState(**self._look(problem, clip_rows(x, bounds)), bounds=bounds, calls=GRADIENT)

    def step(self, problem: Problem, state: RobustPCAState, *, key: Array | None) -> RobustPCAState:
        x = jax.tree.map(lambda a, g: (a - self.step_size * g).astype(a.dtype), state.x, state.gradient)
        here = self._look(problem, clip_rows(x, state.bounds))
        return RobustPCAState(**here, bounds=state.bounds, calls=state.calls + GRADIENT)

    def _look(self, problem: Problem, x: Factors) -> dict[str, Any]:
        value, gradient = problem.value_and_gradient(x)
        norm = trees.norm(gradient)
        tolerance = jnp.maximum(self.tolerance, 4 * jnp.finfo(trees.real_dtype(x)).eps)
        done = norm <= tolerance * trees.norm(x)
        return {"x": x, "value": value, "gradient": gradient, "gradient_norm": norm, "done": done}


def row_bound(factor: Float[Array, "n r"], incoherence: Any) -> Float[Array, ""]:
    """√(2μr/n) ‖U₀‖, with the spectral norm."""
    n, rank = factor.shape
    wide = factor.astype(jnp.promote_types(factor.dtype, jnp.float32))
    largest = jnp.linalg.eigvalsh(jnp.matmul(wide.T, wide, precision="highest"))[-1]
    return jnp.sqrt(2 * incoherence * rank / n * largest)


def clip_rows(x: Factors, bounds: Factors) -> Factors:
    """Π: rows that are longer than their bound are scaled down to it."""

    def clip(a: Array, bound: Array) -> Array:
        norms = jnp.linalg.norm(a, axis=1, keepdims=True)
        return (a * jnp.minimum(1, bound / jnp.where(norms > 0, norms, 1))).astype(a.dtype)

    return jax.tree.map(clip, x, bounds)


def robust_pca(step_size: float = 0.5, *, incoherence: float = math.inf, tolerance: float = 1e-8) -> RobustPCASolver:
    """Gradient descent with thresholding (Yi et al. 2016) for the problem `RobustPCA`, from `robust_pca_start`.

    **Arguments:**
    - `step_size`: η in units of 1/σ₁.
    - `incoherence`: μ of the row norms √(2μr/n) ‖U₀‖ to which rows are clipped; infinite: they are not.
    - `tolerance`: the run ends where ‖∇f‖ is at most this times ‖x‖ (not below the rounding of its dtype).

    A step asks one gradient. `problem.parts(solution.x)` gives the low-rank and the sparse part.

    **Raises:** `InputError` for numbers that are not positive.
    """
    check_positive("step_size", step_size)
    if not (is_traced(incoherence) or incoherence == math.inf):
        check_positive("incoherence", incoherence)
    check_positive("tolerance", tolerance)
    return RobustPCASolver(step_size, incoherence, tolerance)
