"""Scaled gradient descent: gradient descent on factors at a rate that knows nothing of the condition number.

Solves min ½ ‖A(L Rᵀ) − y‖², or ¼ ‖A(X Xᵀ) − y‖², with each factor's gradient divided by the Gram matrix of the
other. With E = A*(A(L Rᵀ) − y) / gain and its symmetric part S, both factors at once:

    L ← L − η E R (RᵀR)⁻¹,   R ← R − η Eᵀ L (LᵀL)⁻¹;       X ← X − η S X (XᵀX)⁻¹

| paper          | here                                                   |
|----------------|--------------------------------------------------------|
| L, R           | `Factors`, the point of `TwoFactors`; X is that of `PSD` |
| η              | `step_size`, 0.5 by default                            |
| (RᵀR)⁻¹, (LᵀL)⁻¹ | `scale_by_factor_grams`                              |

Source: T. Tong, C. Ma and Y. Chi, *Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient
Descent*, JMLR 22 (2021), Algorithm 1.

Guarantee: from a spectral start, with enough Gaussian measurements and η ≤ 2/3, dist(F_t, F*) falls by the factor
1 − 0.6 η in each step, whatever the condition number; gradient descent needs O(κ) steps. (The constants are recalled,
not checked against the paper's text.)

Departures: none. The paper has no balancing penalty; where the structure has one (`TwoFactors` does by default), its
gradient is scaled alike.

The iterates L Rᵀ depend on the product alone, not on how it is divided among the factors. Use it where the singular
values spread. A rank above that of the data makes the Gram matrices singular: the run diverges.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_positive
from ..core.problem import Problem
from ..core.solver import GRADIENT, Solver, State
from .problem import Recovery
from .structures import PSD, Factors, TwoFactors

__all__ = ["scale_by_factor_grams", "scaled_gradient"]


def scale_by_factor_grams() -> optax.GradientTransformation:
    """Multiply the gradient of each factor by the inverse Gram matrix of the other one: G_L (RᵀR)⁻¹, G_R (LᵀL)⁻¹.

    The parameters are `Factors`, or one matrix X, which is its own other one: G (XᵀX)⁻¹. To be chained, for losses
    of one's own; `scaled_gradient` is the method on a `Recovery`.

    **Raises:** `InputError` in `init`, for parameters of another form.
    """

    def init(params: PyTree) -> optax.EmptyState:
        if not isinstance(params, Factors) and not (hasattr(params, "ndim") and params.ndim == 2):
            shown = trees.describe(params)
            raise InputError("params", shown, "Factors(L, R), or one matrix of shape (n, r)")
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise InputError("params", None, "the parameters: update(updates, state, params)")
        if isinstance(params, Factors):
            return Factors(_over_gram(updates.left, params.right), _over_gram(updates.right, params.left)), state
        return _over_gram(updates, params), state

    return optax.GradientTransformation(init, update)


def _over_gram(gradient: Float[Array, "n r"], factor: Float[Array, "k r"]) -> Float[Array, "n r"]:
    """G (FᵀF)⁻¹, by a Cholesky decomposition: NaN where F has not full rank."""
    wide = factor.astype(trees.real_dtype(factor))
    gram = jax.scipy.linalg.cho_factor(wide.T @ wide)
    # A library's solver with n right-hand sides would start threads for each of these small products.
    inverse = jax.scipy.linalg.cho_solve(gram, jnp.eye(wide.shape[1], dtype=wide.dtype))
    return (gradient.astype(wide.dtype) @ inverse).astype(gradient.dtype)


class ScaledGradientState(State):
    """`value`, `gradient` and `gradient_norm` are those of `x`."""

    value: Float[Array, ""]
    gradient: PyTree
    gradient_norm: Float[Array, ""]


class ScaledGradient(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "measurements"})

    step_size: Any

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> ScaledGradientState:
        _check(problem)
        value, gradient = problem.value_and_gradient(x)
        return ScaledGradientState(x, GRADIENT, value, gradient, trees.norm(gradient))

    def step(self, problem: Any, state: ScaledGradientState, *, key: Array | None) -> ScaledGradientState:
        scaled = scale_by_factor_grams().update(state.gradient, optax.EmptyState(), state.x)[0]
        # The gradient of `Recovery` is E R / unit, or 2 S X / unit.
        rate = self.step_size * problem.unit / (2 if isinstance(problem.structure, PSD) else 1)
        x = jax.tree.map(lambda a, d: (a - rate * d).astype(a.dtype), state.x, scaled)
        value, gradient = problem.value_and_gradient(x)
        return ScaledGradientState(x, state.calls + GRADIENT, value, gradient, trees.norm(gradient))


def _check(problem: Any) -> None:
    if not (isinstance(problem, Recovery) and isinstance(problem.structure, PSD | TwoFactors)):
        kind = type(problem.structure).__name__ if isinstance(problem, Recovery) else problem.label
        raise InputError("problem", kind, "a Recovery whose structure is PSD or TwoFactors")


def scaled_gradient(step_size: float = 0.5) -> ScaledGradient:
    """Scaled gradient descent (Tong, Ma and Chi 2021) for a `Recovery` with the structure `TwoFactors` or `PSD`.

    **Arguments:** `step_size` — η, without a unit. A step is one gradient.

    **Raises:** `InputError` for a step size that is not positive.
    """
    check_positive("step_size", step_size)
    return ScaledGradient(step_size)
