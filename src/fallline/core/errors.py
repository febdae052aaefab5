"""Errors that fallline raises, and the few checks that every boundary shares.

Every message is one line: the argument's name, what it was, what was expected.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import numpy as np

__all__ = [
    "FalllineError",
    "InputError",
    "RunError",
    "check_choice",
    "check_count",
    "check_fraction",
    "check_nonnegative",
    "check_positive",
    "is_inside_jit",
    "is_traced",
]


class FalllineError(Exception):
    """Base of all errors raised on purpose by fallline."""


class InputError(FalllineError, ValueError):
    """An argument cannot be used. The message names it, its value and what was expected."""

    def __init__(self, argument: str, got: object, expected: str):
        # An array's repr has lines of its own.
        super().__init__(" ".join(f"{argument}: got {got}; expected {expected}".split()))
        self.argument = argument


class RunError(FalllineError, RuntimeError):
    """A run ended without converging and the caller asked for an exception."""


def is_traced(tree: Any) -> bool:
    """Whether any leaf of ``tree`` is a JAX tracer, so that its value is not known on the host."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_inside_jit() -> bool:
    """Whether what runs now is being traced by `jit`, where every operation gives a tracer."""
    return is_traced(jax.device_put(np.float32(0)))


def _number(argument: str, value: Any) -> float | None:
    """The host value of a real scalar, or None where it is only known at run time."""
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, (bool, str)) or np.ndim(value) != 0:
        raise InputError(argument, repr(value), "a number")
    try:
        return float(value)
    except TypeError:
        raise InputError(argument, repr(value), "a number") from None


def check_positive(argument: str, value: Any) -> None:
    """Refuse anything but a finite number above zero (tracers pass: their value is not known)."""
    number = _number(argument, value)
    if number is not None and not (number > 0 and math.isfinite(number)):
        raise InputError(argument, value, "a finite number above 0")


def check_nonnegative(argument: str, value: Any) -> None:
    """Refuse anything but a finite number of at least zero."""
    number = _number(argument, value)
    if number is not None and not (number >= 0 and math.isfinite(number)):
        raise InputError(argument, value, "a finite number of at least 0")


def check_fraction(argument: str, value: Any) -> None:
    """Refuse anything but a number of at least zero and below one."""
    number = _number(argument, value)
    if number is not None and not 0 <= number < 1:
        raise InputError(argument, value, "a number of at least 0 and below 1")


def check_count(argument: str, value: Any, minimum: int) -> None:
    """Refuse anything but a whole number of at least ``minimum``."""
    number = _number(argument, value)
    if number is not None and (not number.is_integer() or number < minimum):
        raise InputError(argument, value, f"a whole number of at least {minimum}")


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not among ``choices``, naming the nearest one."""
    known = sorted(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1) or [name for name in known if name.startswith(str(value))]
    hint = f" (did you mean '{near[0]}'?)" if near and value else ""
    shown = known if len(known) <= 16 else [*known[:16], "…"]
    raise InputError(argument, repr(value), f"one of {', '.join(shown)}{hint}")
