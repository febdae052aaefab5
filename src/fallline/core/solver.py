"""What a method is: a pure `init` and a pure `step` over a problem's oracles."""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from . import trees
from .calls import Calls
from .problem import Problem
from .stopping import StoppingRule, gradient_norm

__all__ = ["MINIBATCH", "Solver", "State"]

GRADIENT = Calls(gradient=1)
MINIBATCH = Calls(minibatch=1)


class State(eqx.Module):
    """What a step hands to the next. A method's own state subclasses this.

    `x` is the point; `calls` the oracle calls so far. A state may also have, each a real scalar,
    `value` and `gradient_norm` *of that `x`* (they are then recorded for nothing), `batch_value`
    (of a minibatch at the point that the step began from: watched for divergence), and `done`: the
    method's own verdict that it is.
    """

    x: PyTree
    calls: Calls


class Solver(eqx.Module):
    """A method. Numbers among its fields are arrays to the compiler: changing one never recompiles.

    `needs` names the oracles that it asks; `random` says whether it draws random numbers.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    random: ClassVar[bool] = False

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> Any:
        """The state at the starting point `x`."""
        raise NotImplementedError

    def step(self, problem: Problem, state: Any, *, key: Array | None) -> Any:
        """One step. `key` is the step's own; None where neither solver nor problem is random."""
        raise NotImplementedError

    def check(self, problem: Problem, x: PyTree) -> None:
        """Refuse, before a run is compiled, a problem or a start with which the method cannot succeed."""

    def cause(self, problem: Problem, state: Any, *, key: Array | None) -> str:
        """Why the step after `state`, whose key this is, was lost, in words; empty where there is nothing to say."""
        return ""

    def stopping(self) -> StoppingRule | None:
        """The rule that `minimize` uses for `stop="auto"`."""
        return gradient_norm(1e-6)

    @property
    def name(self) -> str:
        """How records and messages call this solver."""
        return type(self).__name__


def with_array_numbers(module: Any, dtype: Any) -> Any:
    """A solver (or rule) with its numbers as strong arrays: floats in `dtype`, at least float32."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, bool | int):
            return np.asarray(leaf, np.bool_ if isinstance(leaf, bool) else np.int32)
        if trees.is_floating(leaf):
            wide = jnp.promote_types(dtype, jnp.float32)
            return leaf.astype(wide) if hasattr(leaf, "astype") else np.asarray(leaf, wide)
        return leaf

    return jax.tree.map(cast, module)
