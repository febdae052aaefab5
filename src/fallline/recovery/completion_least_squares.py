"""Alternating ridge regressions for matrix completion: each row of one factor is the best for the other factor.

Solves min ½ Σ_Ω ((L Rᵀ)ᵢⱼ − yᵢⱼ)² + (λ/2) (‖L‖² + ‖R‖²). With one factor fixed the rows of the other are independent
problems of size r, solved exactly, all at once:

    Lᵢ ← (λ I + Σ_{j: (i,j) ∈ Ω} Rⱼ Rⱼᵀ)⁻¹ Σ_{j: (i,j) ∈ Ω} yᵢⱼ Rⱼ,   then Rⱼ likewise from the new L

| paper | here                                          |
|-------|-----------------------------------------------|
| L, R  | `Factors`, the point of `TwoFactors`          |
| Ω, y  | `Entries` and the data of the `Recovery`      |
| λ     | `ridge`                                       |

Source: Y. Chi, Y. Lu and Y. Chen, *Nonconvex Optimization Meets Low-Rank Matrix Factorization: An Overview* (2019),
Section V-C (alternating minimization); P. Jain, P. Netrapalli and S. Sanghavi (2013), Algorithm 2.

Guarantee: the objective never rises. With enough entries of an incoherent matrix, from a spectral start, the error
falls by a constant factor in each sweep.

Departures: all of Ω in every half step, where the analysis takes fresh samples. The penalty of the structure that
balances the factors is no part of the objective: give `TwoFactors(rank, balance=0)`.

The sums of Rⱼ Rⱼᵀ are one product of the pattern of Ω with the r (r + 1)/2 different products of each row. A sweep
costs about r/2 gradients and needs a dozen or two where gradient descent needs hundreds of steps. A row with fewer than
r entries has no unique solution without a ridge: the run ends as diverged.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core import trees
from ..core.errors import InputError, check_nonnegative
from ..core.solver import GRADIENT, Solver, State
from .losses import Squared
from .operators import Entries
from .problem import Recovery
from .structures import Factors, TwoFactors

__all__ = ["completion_least_squares"]


class CompletionLeastSquaresState(State):
    """`value` and `gradient_norm` are those of `x`, with the ridge."""

    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]


class CompletionLeastSquares(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "measurements"})

    ridge: Any

    def init(self, problem: Any, x: Factors, *, key: Array | None) -> CompletionLeastSquaresState:
        kinds = [(problem.op, Entries), (problem.structure, TwoFactors), (problem.loss, Squared)]
        for part, kind in kinds:
            if not isinstance(part, kind):
                raise InputError("problem", type(part).__name__, f"a Recovery with {kind.__name__}")
        return self._look(problem, x, GRADIENT)

    def step(self, problem: Any, state: CompletionLeastSquaresState, *, key: Array | None) -> Any:
        op, y, dtype = problem.op, problem.y, trees.real_dtype(state.x)
        ones, data = op.backproject(jnp.ones(op.out_shape, dtype)), op.backproject(y.astype(dtype))
        ridge = jnp.asarray(self.ridge, dtype)
        left = _solve_rows(ones[0], data[0], state.x.right, ridge)
        right = _solve_rows(ones[1], data[1], left, ridge)
        return self._look(problem, Factors(left, right), state.calls + GRADIENT)

    def _look(self, problem: Recovery, x: Factors, calls: Any) -> CompletionLeastSquaresState:
        value, gradient = problem.value_and_gradient(x)
        weight = self.ridge / (problem.gain * problem.unit)
        gradient = jax.tree.map(lambda g, a: g + weight * a, gradient, x)
        value = value + weight / 2 * trees.norm(x) ** 2
        return CompletionLeastSquaresState(x, calls, value.astype(trees.real_dtype(x)), trees.norm(gradient))


def _solve_rows(pattern: Any, data: Any, other: Float[Array, "n2 r"], ridge: Array) -> Float[Array, "n1 r"]:
    """The ridge regression of each row on the rows of the other factor where it has entries."""
    r = other.shape[1]
    i, j = np.tril_indices(r)
    place = np.zeros((r, r), int)
    place[i, j] = place[j, i] = np.arange(len(i))
    products = pattern(other[:, i] * other[:, j])
    grams = products[:, place.reshape(-1)].reshape(-1, r, r) + ridge * jnp.eye(r, dtype=other.dtype)
    return _solve_all(grams, data(other))


def _solve_all(grams: Float[Array, "n r r"], targets: Float[Array, "n r"]) -> Float[Array, "n r"]:
    """G⁻¹ t for many small positive definite G: one Cholesky elimination, over all at once."""
    r = targets.shape[1]
    whole = jnp.concatenate([grams, targets[:, :, None]], axis=2)

    def eliminate(k: Any, whole: Array) -> Array:
        """Divide the row k by the root of its pivot, and take its multiples from all rows below."""
        row = whole[:, k] / jnp.sqrt(whole[:, k, k])[:, None]
        factors = jnp.where(jnp.arange(r) > k, row[:, :r], 0)
        return (whole - factors[:, :, None] * row[:, None, :]).at[:, k].set(row)

    whole = jax.lax.fori_loop(0, r, eliminate, whole)

    def substitute(k: Any, x: Array) -> Array:
        k = r - 1 - k
        rest = whole[:, k, r] - jnp.sum(jnp.where(jnp.arange(r) > k, whole[:, k, :r], 0) * x, axis=1)
        return x.at[:, k].set(rest / whole[:, k, k])

    return jax.lax.fori_loop(0, r, substitute, jnp.zeros_like(targets))


def completion_least_squares(ridge: float = 0.0) -> CompletionLeastSquares:
    """Alternating ridge regressions for a `Recovery` with `Entries`, `TwoFactors` and `Squared`.

    **Arguments:** `ridge` — λ ≥ 0, in the units of the data.

    A step solves for L, then for R, and is counted as one gradient: that at its end.

    **Raises:** `InputError` for a ridge below 0.
    """
    check_nonnegative("ridge", ridge)
    return CompletionLeastSquares(ridge)
