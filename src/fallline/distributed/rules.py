"""What workers compute before they send, and what a model becomes of what they receive.

A worker's rule makes its message of its own data and the model; a server's rule makes the next model of the aggregate.

| worker          | message                                                                   |
|-----------------|---------------------------------------------------------------------------|
| `Gradient()`    | a stochastic gradient g; with `step_size` η_t g                            |
| `Momentum(β)`   | v ← βv + (1 − β)g, of the worker's own                                     |
| `LocalSteps(K)` | the model after K steps of its own from the common one                     |

| server          | next model                                                                |
|-----------------|---------------------------------------------------------------------------|
| `Step(…)`       | one step of any Optax optimizer, the aggregate taken for the gradient      |
| `Adopt()`       | the aggregate itself                                                       |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.calls import Calls
from ..core.errors import InputError, check_count, check_fraction, check_positive
from ..core.optimizer import Optimizer, optimizer
from ..core.solver import GRADIENT, MINIBATCH
from .sharded import Sharded

__all__ = ["Adopt", "Gradient", "LocalSteps", "Momentum", "ServerRule", "Step", "WorkerRule"]


class WorkerRule(eqx.Module):
    """How a worker makes its message."""

    def init(self, x: PyTree) -> PyTree:
        """What one worker keeps."""
        return None

    def message(
        self, problem: Sharded, x: PyTree, own: PyTree, memory: PyTree, round_: Int[Array, ""], key: Array | None
    ) -> tuple[Float[Array, " d"], PyTree, Float[Array, ""]]:
        """The message as a vector, what the worker keeps, and the value of its sample at the model.

        `own` are its data; `round_` counts from 0; `key` is its own for this round.
        """
        raise NotImplementedError

    def calls(self, problem: Sharded) -> Calls:
        """What all workers ask in a round: one minibatch is a sample of each worker's data."""
        return MINIBATCH if problem.random else GRADIENT


class Gradient(WorkerRule):
    """A stochastic gradient.

    **Arguments:** `step_size` — a number or a schedule `round -> number` (rounds from 0) by which it is multiplied
    before it is sent; with None it is not, and the step size is the server's.
    """

    step_size: Any

    def __init__(self, step_size: float | Callable[[Any], Any] | None = None):
        if step_size is not None and not callable(step_size):
            check_positive("step_size", step_size)
        self.step_size = step_size

    def message(
        self, problem: Sharded, x: PyTree, own: PyTree, memory: PyTree, round_: Array, key: Array | None
    ) -> tuple[Array, PyTree, Array]:
        value, gradient = problem.ask(x, own, key)
        return scaled(self.step_size, round_, trees.flatten(gradient)), memory, value


def scaled(step_size: Any, round_: Array, v: Array) -> Array:
    """A vector times a step size: a number, a schedule or None."""
    if step_size is None:
        return v
    size: Any = step_size(round_) if callable(step_size) else step_size
    return size * v


class Momentum(WorkerRule):
    """v ← βv + (1 − β)g, the message v; β = 0 is `Gradient()`."""

    beta: Any

    def __init__(self, beta: float = 0.9):
        check_fraction("beta", beta)
        self.beta = beta

    def init(self, x: PyTree) -> PyTree:
        return jnp.zeros_like(trees.flatten(x))

    def message(
        self, problem: Sharded, x: PyTree, own: PyTree, memory: PyTree, round_: Array, key: Array | None
    ) -> tuple[Array, PyTree, Array]:
        value, gradient = problem.ask(x, own, key)
        v = self.beta * memory + (1 - self.beta) * trees.flatten(gradient)
        return v, v, value


class LocalSteps(WorkerRule):
    """`steps` steps of gradient descent on the worker's own data; the message is the model that it ends at.

    With `Mean()` and `Adopt()` a round is one of local SGD.
    """

    steps: int = eqx.field(static=True)
    step_size: Any

    def __init__(self, steps: int, step_size: float):
        check_count("steps", steps, 1)
        check_positive("step_size", step_size)
        self.steps, self.step_size = int(steps), step_size

    def message(
        self, problem: Sharded, x: PyTree, own: PyTree, memory: PyTree, round_: Array, key: Array | None
    ) -> tuple[Array, PyTree, Array]:
        def step(x: PyTree, number: Array) -> tuple[PyTree, Array]:
            value, gradient = problem.ask(x, own, None if key is None else jax.random.fold_in(key, number))
            return jax.tree.map(lambda a, g: (a - self.step_size * g).astype(a.dtype), x, gradient), value

        x, values = jax.lax.scan(step, x, jnp.arange(self.steps))
        return trees.flatten(x), memory, values[0]

    def calls(self, problem: Sharded) -> Calls:
        return Calls(minibatch=self.steps) if problem.random else Calls(gradient=self.steps)


class ServerRule(eqx.Module):
    """How the next model comes from the aggregate."""

    def init(self, x: PyTree) -> PyTree:
        """What the server keeps."""
        return None

    def apply(self, aggregate: Float[Array, " d"], x: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        """The next model, and what the server keeps."""
        raise NotImplementedError

    def check(self, x: PyTree) -> None:
        """Refuse, before a run is compiled, a model that the rule cannot move."""


class Step(ServerRule):
    """One step of an Optax optimizer: `Step(optax.adam, learning_rate=1e-3)`.

    **Arguments:** as for `fallline.optimizer`: a factory with its options, whose numbers never recompile, or a
    ready-made transformation.

    **Raises:** `InputError` as `optimizer` does; and when a run begins, for an optimizer that asks for more than the
    gradient: here is no value to look at, and no line to search along.
    """

    optimizer: Optimizer

    def __init__(self, factory: Any, /, **options: Any):
        self.optimizer = factory if isinstance(factory, Optimizer) else optimizer(factory, **options)

    def init(self, x: PyTree) -> PyTree:
        return self.optimizer.transformation().init(x)

    def apply(self, aggregate: Array, x: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        updates, memory = self.optimizer.transformation().update(trees.unflatten(aggregate, x), memory, x)
        return optax.apply_updates(x, updates), memory

    def check(self, x: PyTree) -> None:
        try:
            jax.eval_shape(lambda x: self.apply(trees.flatten(x), x, self.init(x)), x)
        except (TypeError, InputError) as error:  # a keyword that is missing
            reason = f"{self.optimizer.name}, which fails with: {error}"
            raise InputError("server", reason, "an Optax optimizer that needs the gradient only") from error


class Adopt(ServerRule):
    """The aggregate is the next model, bit for bit (adding the difference would round)."""

    def apply(self, aggregate: Array, x: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        return trees.unflatten(aggregate, x), memory
