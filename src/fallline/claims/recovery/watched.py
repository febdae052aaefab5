"""A solver that also knows how far it is from the truth."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ...core.solver import Solver, State
from ...recovery.problem import Recovery

__all__ = ["Watched"]


class WatchedState(State):
    """`value`, `gradient_norm` and `error` are those of `x`; `inner` is the state of the solver that is watched."""

    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    error: Float[Array, ""]
    inner: Any
    done: Bool[Array, ""]


class Watched(Solver):
    """The steps of `inner` on a `Recovery`, and the matrix's relative `error`; done where it is at most `target`."""

    inner: Any
    truth: PyTree
    target: Any = 0.0

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    def init(self, problem: Any, x: PyTree, *, key: Array | None) -> WatchedState:
        return self._look(problem, self.inner.init(problem, x, key=key))

    def step(self, problem: Any, state: WatchedState, *, key: Array | None) -> WatchedState:
        return self._look(problem, self.inner.step(problem, state.inner, key=key))

    def _look(self, problem: Recovery, inner: Any) -> WatchedState:
        truth = problem.structure.lift(self.truth)
        error = jnp.linalg.norm(problem.structure.lift(inner.x) - truth) / jnp.linalg.norm(truth)
        return WatchedState(inner.x, inner.calls, inner.value, inner.gradient_norm, error, inner, error <= self.target)
