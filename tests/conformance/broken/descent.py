"""Gradient descent, right in every respect; the broken methods differ from it in one."""

from typing import Any

import jax.numpy as jnp

from fallline import Calls, Solver, State


class Descended(State):
    value: Any
    gradient: Any
    gradient_norm: Any


class Descent(Solver):
    step_size: Any

    def look(self, problem: Any, x: Any, calls: Calls) -> Descended:
        value, gradient = problem.value_and_gradient(x)
        return Descended(x, calls + Calls(gradient=1), value, gradient, jnp.linalg.norm(gradient))

    def init(self, problem: Any, x: Any, *, key: Any) -> Any:
        return self.look(problem, x, Calls())

    def step(self, problem: Any, state: Any, *, key: Any) -> Any:
        x = (state.x - self.step_size * state.gradient).astype(state.x.dtype)
        return self.look(problem, x, state.calls)


def settings(cls: type[Descent]) -> Any:
    """Two settings of a broken method, as a case wants them."""
    return lambda: cls(0.1), lambda: cls(0.05)
