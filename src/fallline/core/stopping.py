"""When a run ends: rules are values, and `|` and `&` combine them."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .calls import Calls, cost_vector
from .errors import InputError, check_count, check_nonnegative, check_positive, is_traced

__all__ = [
    "StoppingRule",
    "call_budget",
    "decrease",
    "gradient_norm",
    "residual",
    "time_limit",
]


class Seen(NamedTuple):
    """What a rule may look at: scalars of the current point (None where unknown), and the account.

    `calls` counts everything that was asked, `own` what the method asked itself.
    """

    value: Any
    gradient_norm: Any
    lower_bound: Any
    calls: Calls
    own: Calls
    seconds: Array


class StoppingRule(eqx.Module):
    """A test on the run so far. Its numbers are leaves: changing a tolerance never recompiles."""

    needs: ClassVar[frozenset[str]] = frozenset()
    # Whether meeting the rule means success; a budget that runs out does not.
    converges: ClassVar[bool] = True

    def init(self) -> Any:
        """The rule's memory before the first point."""
        return ()

    def __call__(self, seen: Seen, memory: Any) -> tuple[Bool[Array, ""], Any]:
        """Whether the rule is met, and its new memory."""
        raise NotImplementedError

    def leaves(self) -> tuple[StoppingRule, ...]:
        """The tests of which any one ends the run, in the order of the user's."""
        return (self,)

    def describe(self) -> str:
        """The rule as a user would write it."""
        numbers = ", ".join(_shown(leaf) for leaf in jax.tree.leaves(self) if np.ndim(leaf) == 0)
        return f"{type(self).__name__.lower()}({numbers})"

    def __or__(self, other: StoppingRule) -> StoppingRule:
        return _Either((self, _checked(other)))

    def __and__(self, other: StoppingRule) -> StoppingRule:
        return _Both((self, _checked(other)))


def _checked(other: Any) -> StoppingRule:
    if not isinstance(other, StoppingRule):
        raise InputError("stop", repr(other), "a stopping rule on both sides of | and &")
    return other


def _shown(number: Any) -> str:
    return "…" if is_traced(number) else f"{float(number):g}"


class _GradientNorm(StoppingRule):
    needs: ClassVar[frozenset[str]] = frozenset({"gradient_norm"})
    tolerance: Any

    def __call__(self, seen: Seen, memory: Any) -> tuple[Array, Any]:
        return seen.gradient_norm <= self.tolerance, memory

    def describe(self) -> str:
        return f"gradient_norm({_shown(self.tolerance)})"


def gradient_norm(tolerance: float) -> StoppingRule:
    """Stop when ‖∇f(x)‖ ≤ `tolerance` (Euclidean norm over all leaves)."""
    check_nonnegative("tolerance", tolerance)
    return _GradientNorm(tolerance)


class _Decrease(StoppingRule):
    needs: ClassVar[frozenset[str]] = frozenset({"value"})
    tolerance: Any
    window: Any

    def init(self) -> Any:
        return {"best": np.float32(np.inf), "age": np.int32(0)}

    def __call__(self, seen: Seen, memory: Any) -> tuple[Array, Any]:
        # A new reference whenever the value fell by the tolerance; met when none came for a window.
        fell = ~(seen.value > memory["best"] - self.tolerance * jnp.abs(memory["best"]))
        fell = fell | ~jnp.isfinite(memory["best"])
        best = jnp.where(fell, seen.value, memory["best"])
        age = jnp.where(fell, 0, memory["age"] + 1)
        return age >= self.window, {"best": best, "age": age}

    def describe(self) -> str:
        return f"decrease({_shown(self.tolerance)}, window={_shown(self.window)})"


def decrease(tolerance: float, window: int = 100) -> StoppingRule:
    """Stop when the value has not fallen by the relative `tolerance` within `window` looks.

    A look is a step, or a record where the value is only computed for the records.
    """
    check_positive("tolerance", tolerance)
    check_count("window", window, 1)
    return _Decrease(tolerance, window)


class _Residual(StoppingRule):
    needs: ClassVar[frozenset[str]] = frozenset({"value", "lower_bound"})
    tolerance: Any

    def __call__(self, seen: Seen, memory: Any) -> tuple[Array, Any]:
        return seen.value - seen.lower_bound <= self.tolerance, memory

    def describe(self) -> str:
        return f"residual({_shown(self.tolerance)})"


def residual(tolerance: float) -> StoppingRule:
    """Stop when f(x) is within `tolerance` of the problem's declared lower bound."""
    check_nonnegative("tolerance", tolerance)
    return _Residual(tolerance)


class _CallBudget(StoppingRule):
    converges: ClassVar[bool] = False
    cost: Any
    weights: dict[str, Any]

    def __call__(self, seen: Seen, memory: Any) -> tuple[Array, Any]:
        return self._spent(seen.calls) >= self.cost, memory

    def _spent(self, calls: Calls) -> Any:
        return sum(w * getattr(calls, name) for name, w in self.weights.items())

    def describe(self) -> str:
        return f"call_budget({_shown(self.cost)})"


def call_budget(cost: float, **weights: float) -> StoppingRule:
    """Stop when the oracle calls cost at least `cost`, counted in gradients.

    **Arguments:** `weights` — the price of one call by oracle name; by default a gradient costs 1,
    a value 0.5, an HVP 2 and a minibatch 1.
    """
    check_positive("cost", cost)
    return _CallBudget(cost, cost_vector(weights))


class OwnBudget(_CallBudget):
    """A call budget for what the method asks itself: the loop's measurements are free."""

    def __call__(self, seen: Seen, memory: Any) -> tuple[Array, Any]:
        return self._spent(seen.own) >= self.cost, memory


class _TimeLimit(StoppingRule):
    needs: ClassVar[frozenset[str]] = frozenset({"seconds"})
    converges: ClassVar[bool] = False
    seconds: Any

    def __call__(self, seen: Seen, memory: Any) -> tuple[Array, Any]:
        return seen.seconds >= self.seconds, memory

    def describe(self) -> str:
        return f"time_limit({_shown(self.seconds)})"


def time_limit(seconds: float) -> StoppingRule:
    """Stop after this much run time, looked at about twice a second; not usable inside `jit`."""
    check_positive("seconds", seconds)
    return _TimeLimit(seconds)


class _Combination(StoppingRule):
    rules: tuple[StoppingRule, ...]

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(rule.needs for rule in self.rules))

    def init(self) -> Any:
        return tuple(rule.init() for rule in self.rules)

    def _ask(self, seen: Seen, memory: Any) -> tuple[list[Array], Any]:
        answers = [rule(seen, m) for rule, m in zip(self.rules, memory, strict=True)]
        return [a for a, _ in answers], tuple(m for _, m in answers)


class _Either(_Combination):
    def __call__(self, seen: Seen, memory: Any) -> tuple[Array, Any]:
        met, memory = self._ask(seen, memory)
        return met[0] | met[1], memory

    def leaves(self) -> tuple[StoppingRule, ...]:
        return tuple(leaf for rule in self.rules for leaf in rule.leaves())

    def describe(self) -> str:
        return " | ".join(rule.describe() for rule in self.rules)


class _Both(_Combination):
    @property
    def converges(self) -> bool:  # type: ignore[override]
        return all(rule.converges for rule in self.rules)

    def __call__(self, seen: Seen, memory: Any) -> tuple[Array, Any]:
        met, memory = self._ask(seen, memory)
        return met[0] & met[1], memory

    def leaves(self) -> tuple[StoppingRule, ...]:
        # (a | b) & c as (a & c) | (b & c): which of them was met says whether it was a success.
        return tuple(_Both(pair) for pair in itertools.product(*(rule.leaves() for rule in self.rules)))

    def describe(self) -> str:
        return "(" + " & ".join(rule.describe() for rule in self.rules) + ")"
