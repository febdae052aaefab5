"""Weighted averages of iterates: a solver whose point is the average of another solver's points.

    x̄_T = Σ_{t<T} w_t x_t / Σ_{t<T} w_t,   w_t = (t + a)^p

p = 0 is the plain average, and the larger p is, the sooner the first points are forgotten. No sum of weights is kept:

    x̄ ← x̄ + (x_t − x̄) / u_t,   u_t = Σ_{s≤t} w_s / w_t,   u_0 = 1,   u_{t+1} = 1 + u_t ((t + a) / (t + 1 + a))^p

Sources: S. Stich, J.-B. Cordonnier and M. Jaggi, *Sparsified SGD with Memory* (2018), Theorem 2.4 (p = 2);
S. Lacoste-Julien, M. Schmidt and F. Bach, *A simpler approach to obtaining an O(1/t) convergence rate for the projected
stochastic subgradient method* (2012) (p = 1).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.calls import strong
from ..core.errors import InputError, check_nonnegative, check_positive
from ..core.problem import Problem
from ..core.solver import Solver, State
from ..core.stopping import StoppingRule

__all__ = ["Averaged", "AveragedState"]


class AveragedState(State):
    """`x` is the average of the points before the last step; `inner` is the state of the solver, with its own `x`."""

    inner: Any
    steps: Int[Array, ""]
    weight: Float[Array, ""]  # u of the point that is averaged next
    batch_value: Float[Array, ""] | None
    done: Any


class Averaged(Solver):
    """Runs a solver from its own points, and shows their average.

    **Arguments:** `solver` — any solver; `power` — p, at least 0; `shift` — a, above 0.

    After T steps the average is that of x_0 … x_{T−1}, as in the source. Value and gradient norm of a run are those of
    the average, which cost calls where they are recorded. Steps toward the average become small: a point in 16 bits
    does not feel them after some hundred.

    **Raises:** `InputError` for another kind of solver, and for numbers out of range.
    """

    solver: Solver
    power: Any
    shift: Any

    def __init__(self, solver: Solver, power: float = 2.0, shift: float = 1.0):
        if not isinstance(solver, Solver):
            raise InputError("solver", type(solver).__name__, "a fallline solver; wrap Optax ones in optimizer(...)")
        check_nonnegative("power", power)
        check_positive("shift", shift)
        self.solver, self.power, self.shift = solver, power, shift

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.solver.needs

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.solver.random

    @property
    def name(self) -> str:
        return f"{self.solver.name}, averaged"

    def check(self, problem: Problem, x: PyTree) -> None:
        self.solver.check(problem, x)

    def stopping(self) -> StoppingRule | None:
        return self.solver.stopping()

    def cause(self, problem: Problem, state: AveragedState, *, key: Array | None) -> str:
        return self.solver.cause(problem, state.inner, key=key)

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> AveragedState:
        inner = self.solver.init(problem, x, key=key)
        inner = eqx.tree_at(lambda state: state.calls, inner, strong(inner.calls))
        return self._state(x, inner, jnp.int32(0), jnp.ones((), trees.real_dtype(x)))

    def step(self, problem: Problem, state: AveragedState, *, key: Array | None) -> AveragedState:
        def toward(mean: Array, a: Array) -> Array:
            return (mean + (a - mean) / state.weight).astype(mean.dtype)

        x = jax.tree.map(toward, state.x, state.inner.x)
        inner = self.solver.step(problem, state.inner, key=key)
        before = state.steps + self.shift
        return self._state(x, inner, state.steps + 1, 1 + state.weight * (before / (before + 1)) ** self.power)

    def _state(self, x: PyTree, inner: Any, steps: Array, weight: Array) -> AveragedState:
        seen = getattr(inner, "batch_value", None), getattr(inner, "done", None)
        return AveragedState(x, inner.calls, inner, steps, weight, *seen)
