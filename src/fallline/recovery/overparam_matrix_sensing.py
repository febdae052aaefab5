"""Over-parameterized matrix sensing: gradient descent on two factors, made fast by one change of them on the way.

Solves min ½ ‖A(F Gᵀ) − y‖² for y = A(M), M of rank r, by factors with k ≥ r columns: nobody knows r. With
E = A*(A(F Gᵀ) − y) / gain, both factors at once,

    F ← F − η E G,   G ← G − η Eᵀ F

and once, at the first step where ‖A(F Gᵀ) − y‖ ≤ threshold · ‖y‖, with the decomposition F = U Σ' Bᵀ,

    F ← β U,   G ← G B Σ' / β

which leaves F Gᵀ as it is and makes FᵀF = β² I.

| paper               | here                                                          |
|---------------------|---------------------------------------------------------------|
| F, G of k columns   | the point `Factors(left, right)` of `TwoFactors(k, balance=0)` |
| η                   | `step_size`, in units of 1/σ₁                                 |
| β                   | `beta`, in units of √σ₁                                       |
| T₁                  | `switched_at` of the state, −1 before                         |
| α, α/3              | `random(α/√n, ratio=1/3)`, the start                          |

Source: N. Xiong, L. Ding and S. S. Du, *How Over-Parameterization Slows Down Gradient Descent in Matrix Sensing: The
Curses of Symmetry and Initialization*, ICLR 2024 (arXiv 2310.01769), the one-step modification of asymmetric descent.

Guarantee: with restricted isometry, k > r and a small start of size α, one factor twice (`PSD`) leaves
‖X Xᵀ − M‖_F of order 1/t; two factors of unlike size, as here, exp(−Ω(η α² t)); and after the change
exp(−Ω(η β² t)), whatever α.

Departures: the paper multiplies F by B D and G by B D⁻¹ with D = diag(β/σ'ᵢ), the same where F has full rank; ours
divides by no σ'ᵢ. The paper's condition for the change is on the unknown error, ours on the measured residual. A
balancing penalty of the structure is left out: the method lives from factors that are not balanced.

The measurement matrices must not be symmetric: A would not see the antisymmetric part of F Gᵀ. Start with
`random(alpha / √n, ratio=1/3)` and α at most 1. A large β is fast; above √σ_r the theory ends, and far above it descent
diverges. A small one may first raise the residual. Isometry is needed on rank 2k: with few measurements and large k
all runs are slow alike.
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core import trees
from ..core.calls import Calls, strong
from ..core.errors import InputError, check_fraction, check_positive
from ..core.solver import GRADIENT, Solver, State
from ..parts.control import in_place
from .losses import Squared
from .problem import Recovery
from .structures import Factors, TwoFactors

__all__ = ["overparam_matrix_sensing"]


class OverparamMatrixSensingState(State):
    """`value`, `gradient` and `gradient_norm` are those of `x`, without a balancing penalty.

    `residual`: ‖A(F Gᵀ) − y‖ / ‖y‖; `switched_at`: the step whose point got the change, −1 before.
    """

    value: Float[Array, ""]
    gradient: Factors
    gradient_norm: Float[Array, ""]
    residual: Float[Array, ""]
    switched_at: Int[Array, ""]
    steps: Int[Array, ""]


class OverparamMatrixSensing(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "measurements"})

    step_size: Any
    beta: Any
    threshold: Any

    def init(self, problem: Any, x: Factors, *, key: Array | None) -> OverparamMatrixSensingState:
        if not (isinstance(problem.structure, TwoFactors) and isinstance(problem.loss, Squared)):
            kinds = f"{type(problem.structure).__name__} and {type(problem.loss).__name__}"
            raise InputError("problem", kinds, "a Recovery whose structure is TwoFactors and whose loss is Squared")
        return self._look(problem, x, GRADIENT, jnp.int32(-1), jnp.int32(0))

    def step(
        self, problem: Any, state: OverparamMatrixSensingState, *, key: Array | None
    ) -> OverparamMatrixSensingState:
        x = jax.tree.map(lambda a, g: (a - self.step_size * g).astype(a.dtype), state.x, state.gradient)
        return self._look(problem, x, state.calls + GRADIENT, state.switched_at, state.steps + 1)

    def _look(
        self, problem: Recovery, x: Factors, calls: Calls, switched_at: Array, steps: Array
    ) -> OverparamMatrixSensingState:
        """What is known of the point, which is changed where it is the first to fit the data so well."""
        plain = _without_balance(problem)
        value, gradient = plain.value_and_gradient(x)
        residual = jnp.sqrt(2 * value * problem.gain * problem.unit) / jnp.linalg.norm(problem.y)
        due = (switched_at < 0) & (residual <= self.threshold)
        beta = self.beta * jnp.sqrt(problem.unit)

        def change(now: tuple[Factors, Factors, Calls]) -> tuple[Factors, Factors, Calls]:
            changed = trees.cast_like(orthogonalized(now[0], beta), now[0])
            return changed, plain.value_and_gradient(changed)[1], now[2] + GRADIENT

        x, gradient, calls = in_place(due, change, (x, gradient, strong(calls)))
        switched_at = jnp.where(due, steps, switched_at)
        return OverparamMatrixSensingState(
            x, calls, value, gradient, trees.norm(gradient), residual, switched_at, steps
        )


def _without_balance(problem: Recovery) -> Recovery:
    return eqx.tree_at(lambda p: p.structure.balance, problem, 0.0)


def orthogonalized(x: Factors, beta: Any) -> Factors:
    """β U and G B Σ'/β with F = U Σ' Bᵀ: the same product, and FᵀF = β² I."""
    left, right = (a.astype(trees.real_dtype(a)) for a in x)
    u, sizes, bt = jnp.linalg.svd(left, full_matrices=False)
    return Factors(beta * u, right @ bt.T * (sizes / beta))


def overparam_matrix_sensing(
    step_size: float = 0.1, *, beta: float = 0.6, threshold: float = 0.1
) -> OverparamMatrixSensing:
    """Asymmetric gradient descent with the one-step modification (Xiong, Ding and Du 2024), for a `Recovery`.

    The problem's structure is `TwoFactors(k, balance=0)` with k at least the rank of the matrix; its start is
    `random(alpha / √n, ratio=1/3)` with α at most 1 for data of size 1.

    **Arguments:**
    - `step_size`: η, in units of 1/σ₁.
    - `beta`: β, in units of √σ₁: at most √(σ_r/σ₁) by the theory.
    - `threshold`: the relative residual, below 1, at which the factors are changed.

    A step is one gradient; the change costs one more.

    **Raises:** `InputError` for numbers out of range.
    """
    check_positive("step_size", step_size)
    check_positive("beta", beta)
    check_positive("threshold", threshold)
    check_fraction("threshold", threshold)
    return OverparamMatrixSensing(step_size, beta, threshold)
