"""How a run ended."""

from __future__ import annotations

import enum
from typing import Any

import equinox as eqx
import numpy as np

__all__ = ["Ending", "Status"]


class Ending(enum.IntEnum):
    """The ways in which a run ends. `RUNNING` is seen only by callbacks."""

    RUNNING = 0
    CONVERGED = 1
    STEP_LIMIT = 2
    BUDGET = 3
    DIVERGED = 4
    STALLED = 5
    INTERRUPTED = 6


_ADVICE = {
    Ending.STEP_LIMIT: "raise `steps`, or look at the history",
    Ending.BUDGET: "the budget ran out before another rule was met",
    Ending.DIVERGED: "the next point has no finite value or gradient; the solution holds the one before. "
    "Try a smaller step size",
    Ending.STALLED: "value and gradient norm did not change by a single bit for 100 steps: the precision is used up",
    Ending.INTERRUPTED: "stopped by the user; the solution holds the point reached",
}

OWN_TEST = -1


def _words(ending: Ending) -> str:
    return ending.name.lower().replace("_", " ")


class Status(eqx.Module):
    """How a run ended, and at which step.

    **Fields:** `code`, an `Ending` as int32 scalar; `step`, int32 scalar; `test`, the index of the
    stopping rule that was met (−1: the solver's own test). All three batch under `vmap`. `cause`: what
    the solver says of a step that was lost.
    """

    code: Any
    step: Any
    test: Any
    tests: tuple[str, ...] = eqx.field(static=True, default=())
    solver: str = eqx.field(static=True, default="solver")
    cause: str = eqx.field(static=True, default="")

    @property
    def ending(self) -> Ending:
        """The ending as an enumeration (not under `jit` or `vmap`)."""
        return Ending(int(self.code))

    @property
    def name(self) -> str:
        """The ending in words: `"converged"`, `"step limit"`, …"""
        return _words(self.ending)

    @property
    def converged(self) -> Any:
        """Whether a rule that means success was met; a boolean array under `jit` or `vmap`."""
        return self.code == Ending.CONVERGED

    @property
    def met(self) -> str | None:
        """The rule that ended the run, as its author would write it."""
        if self.ending not in (Ending.CONVERGED, Ending.BUDGET):
            return None
        index = int(self.test)
        return f"{self.solver}'s own test" if index == OWN_TEST else self.tests[index]

    @property
    def advice(self) -> str:
        """What to try where the run did not converge; empty where it did."""
        return _ADVICE.get(self.ending, "")

    def __str__(self) -> str:
        if np.ndim(self.code):
            codes, counts = np.unique(np.asarray(self.code), return_counts=True)
            return ", ".join(f"{n} × {_words(Ending(int(c)))}" for c, n in zip(codes, counts, strict=True))
        by = f" by {self.met}" if self.met else ""
        because = f": {self.cause}" if self.cause else ""
        return f"{self.name}{by} at step {int(self.step)}{because}"

    def __repr__(self) -> str:
        return f"<Status: {self}>"
