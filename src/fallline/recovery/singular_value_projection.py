"""Singular value projection: gradient steps on the matrix itself, each truncated to the rank.

Solves min ½ ‖A(X) − y‖² over matrices of rank at most r; H_r keeps the r largest singular values:

    X ← H_r(X − μ A*(A(X) − y) / gain)

| paper     | here                                                              |
|-----------|-------------------------------------------------------------------|
| X         | L Rᵀ of the point `Factors(L, R)`, with L = U √Σ and R = V √Σ      |
| μ         | `step_size`                                                       |
| H_r       | `subspace_svd`, from the singular vectors of the step before      |

Source: P. Jain, R. Meka and I. Dhillon, *Guaranteed Rank Minimization via Singular Value Projection*, NIPS 2010,
Algorithm 1.

Guarantee: where A has restricted isometry constants δ_{2r} < 1/3, with μ = 1/(1 + δ_{2r}), the loss falls by a
constant factor in each step: O(log 1/ε) steps, whatever the condition number.

Departures: the matrix is held by factors, and its singular vectors come from a few sweeps of subspace iteration with
10 more vectors than the rank, which start where the last step's ended: A* y is never formed where the operator has
products with it (`backproject`). The paper starts at X = 0, from where the first step is the spectral start times μ;
we start at any factors but 0, whose gradient vanishes.

With too few measurements it does not converge slowly, it explodes. A run whose residual exceeds 10 times that of
X = 0 ends as diverged: use gradient descent there, which needs fewer, or a smaller step size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core import trees
from ..core.errors import InputError, check_count, check_positive
from ..core.solver import GRADIENT, Solver, State
from ..parts.linalg import subspace_svd
from .losses import Squared
from .problem import Recovery
from .structures import Factors, TwoFactors

__all__ = ["singular_value_projection"]

_EXTRA = 10  # singular vectors beyond the rank
_EXPLODED = 10.0  # times the residual of X = 0


class SingularValueProjectionState(State):
    """`value` and `gradient_norm` are those of `x`; `following` is the point after it.

    `block`: the right singular vectors of the last step and a few more, of shape (n2, p).
    """

    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    following: Factors
    block: Float[Array, "n2 p"]


class SingularValueProjection(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"measurements"})

    step_size: Any
    sweeps: int = eqx.field(static=True)

    def init(self, problem: Any, x: Factors, *, key: Array | None) -> SingularValueProjectionState:
        if not (isinstance(problem.structure, TwoFactors) and isinstance(problem.loss, Squared)):
            kinds = f"{type(problem.structure).__name__} and {type(problem.loss).__name__}"
            raise InputError("problem", kinds, "a Recovery whose structure is TwoFactors and whose loss is Squared")
        n1, n2 = problem.op.shape
        width = min(n1, n2, problem.structure.rank + _EXTRA)
        block = jax.random.normal(jax.random.key(0), (n2, width), trees.real_dtype(x))
        block = block.at[:, : problem.structure.rank].set(x.right)
        return self._look(problem, x, block, GRADIENT)

    def step(
        self, problem: Any, state: SingularValueProjectionState, *, key: Array | None
    ) -> SingularValueProjectionState:
        return self._look(problem, state.following, state.block, state.calls + GRADIENT)

    def _look(self, problem: Recovery, x: Factors, block: Array, calls: Any) -> SingularValueProjectionState:
        """The point with what is known of it, and the one after it: one product with A and one with A*."""
        op, structure, rank = problem.op, problem.structure, x.left.shape[1]
        residual = structure.measure(op, x) - problem.y
        times, transposed = op.backproject(residual / problem.gain)
        extra, slope = structure.penalty(x)
        assert slope is not None
        gradient = Factors(times(x.right) + slope.left, transposed(x.left) + slope.right)
        squares = jnp.sum(residual**2)
        value = (squares / (2 * problem.gain) + extra) / problem.unit
        exploded = squares > _EXPLODED**2 * jnp.sum(problem.y**2)

        u, sizes, block = subspace_svd(
            lambda v: x.left @ (x.right.T @ v) - self.step_size * times(v),
            lambda u: x.right @ (x.left.T @ u) - self.step_size * transposed(u),
            block,
            self.sweeps,
        )
        root = jnp.sqrt(sizes[:rank])
        following = Factors(u[:, :rank] * root, block[:, :rank] * root)
        return SingularValueProjectionState(
            x,
            calls,
            jnp.where(exploded, jnp.inf, value),
            trees.norm(gradient) / problem.unit,
            trees.cast_like(following, x),
            block,
        )


def singular_value_projection(step_size: float = 0.75, *, sweeps: int = 4) -> SingularValueProjection:
    """Singular value projection (Jain, Meka and Dhillon 2010) for a `Recovery` with the structure `TwoFactors`.

    **Arguments:**
    - `step_size`: μ, without a unit.
    - `sweeps`: of subspace iteration in each truncation.

    A step is one product with A and one with A*, counted as one gradient. Start at the spectral start.

    **Raises:** `InputError` for numbers out of range.
    """
    check_positive("step_size", step_size)
    check_count("sweeps", sweeps, 1)
    return SingularValueProjection(step_size, int(sweeps))
