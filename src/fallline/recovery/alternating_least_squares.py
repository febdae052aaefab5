"""Alternating least squares: each factor in turn the best one for the other.

Solves min ½ ‖A(L Rᵀ) − y‖²; each half of a step is a linear least-squares problem, with L, and then R, orthonormal:

    R ← argmin ‖A(L Rᵀ) − y‖²,   L ← argmin ‖A(L Rᵀ) − y‖²

| paper        | here                                                                     |
|--------------|--------------------------------------------------------------------------|
| Û, V̂         | `Factors(L, R)`, balanced between two steps: L = U √Σ, R = V √Σ           |
| argmin       | conjugate gradients on Lᵀ A*A(L Rᵀ) = Lᵀ A*(y), from the factor before    |

Source: P. Jain, P. Netrapalli and S. Sanghavi, *Low-rank Matrix Completion using Alternating Minimization*, STOC 2013,
Algorithm 1 (matrix sensing).

Guarantee: with restricted isometry constants δ_{2r} ≲ (σ_r/σ_1)² / r, from a spectral start, ‖L Rᵀ − M‖ falls by a
constant factor in each step.

Departures: the least-squares problems are solved inexactly, to `tolerance` of the gradient that each began with, and
one factor is made orthonormal before the other is solved for: L Rᵀ is the same, and A*A is nearly the identity there.

A step costs some ten to twenty products with A and A*, each pair counted as one gradient, and there is no step size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core import trees
from ..core.calls import Calls
from ..core.errors import InputError, check_count, check_fraction, check_positive
from ..core.solver import GRADIENT, Solver, State
from ..parts.linalg import conjugate_gradient
from .losses import Squared
from .problem import Recovery
from .structures import Factors, TwoFactors

__all__ = ["alternating_least_squares"]


class AlternatingLeastSquaresState(State):
    """`value` and `gradient_norm` are those of `x`."""

    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]


class AlternatingLeastSquares(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "measurements"})

    tolerance: Any
    products: Any

    def init(self, problem: Any, x: Factors, *, key: Array | None) -> AlternatingLeastSquaresState:
        if not (isinstance(problem.structure, TwoFactors) and isinstance(problem.loss, Squared)):
            kinds = f"{type(problem.structure).__name__} and {type(problem.loss).__name__}"
            raise InputError("problem", kinds, "a Recovery whose structure is TwoFactors and whose loss is Squared")
        return _look(problem, x, GRADIENT)

    def step(
        self, problem: Any, state: AlternatingLeastSquaresState, *, key: Array | None
    ) -> AlternatingLeastSquaresState:
        left, right = (a.astype(trees.real_dtype(a)) for a in state.x)
        basis, rest = jnp.linalg.qr(left)
        right, asked = self._solve(problem, False, basis, right @ rest.T)
        left, (basis, rest) = basis, jnp.linalg.qr(right)
        left, more = self._solve(problem, True, basis, left @ rest.T)
        u, sizes, vt = jnp.linalg.svd(left, full_matrices=False)
        x = Factors(u * jnp.sqrt(sizes), basis @ vt.T * jnp.sqrt(sizes))
        asked = asked + more + 1  # that of `_look`
        return _look(problem, trees.cast_like(x, state.x), state.calls + Calls(gradient=asked))

    def _solve(self, problem: Recovery, for_left: bool, basis: Array, guess: Array) -> tuple[Array, Array]:
        """The best factor beside the orthonormal `basis`, and how many pairs of products with A and A* it took."""
        op = problem.op

        def measure(factor: Array) -> Array:
            return op.mv_product(factor, basis) if for_left else op.mv_product(basis, factor)

        def back(v: Array) -> Array:
            times, transposed = op.backproject(v / problem.gain)
            return times(basis) if for_left else transposed(basis)

        residual = back(problem.y - measure(guess))
        factor, steps = conjugate_gradient(lambda f: back(measure(f)), guess, residual, self.tolerance, self.products)
        return factor, steps + 1


def _look(problem: Recovery, x: Factors, calls: Calls) -> AlternatingLeastSquaresState:
    value, gradient = problem.value_and_gradient(x)
    return AlternatingLeastSquaresState(x, calls, value, trees.norm(gradient))


def alternating_least_squares(tolerance: float = 1e-2, *, products: int = 50) -> AlternatingLeastSquares:
    """Alternating least squares (Jain, Netrapalli and Sanghavi 2013) for a `Recovery` with the structure `TwoFactors`.

    **Arguments:**
    - `tolerance`: to which each least-squares problem is solved, relative to the gradient it began with, below 1.
    - `products`: the most iterations of conjugate gradients for it.

    **Raises:** `InputError` for numbers out of range.
    """
    check_positive("tolerance", tolerance)
    check_fraction("tolerance", tolerance)
    check_count("products", products, 1)
    return AlternatingLeastSquares(tolerance, products)
