"""The account of a run: how often each oracle was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int

from .errors import check_choice, check_nonnegative

__all__ = ["COST", "Calls", "cost_vector"]

COST: Mapping[str, float] = {"gradient": 1.0, "value": 0.5, "hvp": 2.0, "minibatch": 1.0}
"""What one call of each oracle costs, in gradients; a minibatch is scaled by its share of the data."""


class Calls(eqx.Module):
    """Oracle calls of a run. Each field is an int32 scalar; `+` adds.

    A gradient brings its value along, so asking for both at a point is one `gradient`. A
    `minibatch` is one value and gradient over a sample of a finite sum.
    """

    gradient: Int[Array, ""] | int = 0
    value: Int[Array, ""] | int = 0
    hvp: Int[Array, ""] | int = 0
    minibatch: Int[Array, ""] | int = 0

    def __add__(self, other: Calls) -> Calls:
        return Calls(
            self.gradient + other.gradient,
            self.value + other.value,
            self.hvp + other.hvp,
            self.minibatch + other.minibatch,
        )

    def as_dict(self) -> dict[str, Any]:
        """The counts by oracle name, without the oracles that were never asked."""
        counts = {name: getattr(self, name) for name in COST}
        return {name: int(n) for name, n in counts.items() if int(n)}

    def cost(self, weights: Mapping[str, float] = COST, minibatch_share: float = 1.0) -> float:
        """The account in gradients of the full objective, by a visible cost vector."""
        share = {"minibatch": minibatch_share}
        return float(sum(weights[k] * share.get(k, 1.0) * int(getattr(self, k)) for k in weights))

    def __str__(self) -> str:
        return ", ".join(f"{n} {name}" for name, n in self.as_dict().items()) or "none"


def cost_vector(weights: Mapping[str, float]) -> dict[str, float]:
    """The price of one call of each oracle, `COST` where `weights` says nothing.

    **Raises:** `InputError` for a name that is no oracle, or a price that is not a number of at least 0.
    """
    for name, price in weights.items():
        check_choice("weights", name, COST)
        check_nonnegative(name, price)
    return {**COST, **weights}


def strong(calls: Calls) -> Calls:
    """The same account with int32 arrays, as the compiled loop carries it."""
    return Calls(*(jnp.asarray(getattr(calls, name), jnp.int32) for name in ("gradient", "value", "hvp", "minibatch")))
