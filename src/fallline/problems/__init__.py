"""Built-in problems, on real data or generated, with what is known of their answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..core.errors import InputError, check_choice
from .coded_diffraction import coded_diffraction
from .digits import as_image, leading_pattern
from .digits_on_workers import digits_on_workers
from .gaussian_phase_retrieval import gaussian_phase_retrieval
from .instance import Images, Instance
from .linear_autoencoder import linear_autoencoder, principal_components, widen_autoencoder
from .missing_entries import missing_entries
from .rosenbrock import rosenbrock
from .saddle import saddle
from .tanh_classifier import tanh_classifier, widen_classifier

__all__ = [
    "PROBLEMS",
    "Images",
    "Instance",
    "as_image",
    "coded_diffraction",
    "digits_on_workers",
    "instance",
    "leading_pattern",
    "missing_entries",
    "linear_autoencoder",
    "options",
    "gaussian_phase_retrieval",
    "principal_components",
    "rosenbrock",
    "saddle",
    "tanh_classifier",
    "widen_autoencoder",
    "widen_classifier",
]

PROBLEMS: dict[str, Callable[..., Instance]] = {
    "coded-diffraction": coded_diffraction,
    "digits-on-workers": digits_on_workers,
    "linear-autoencoder": linear_autoencoder,
    "gaussian-phase-retrieval": gaussian_phase_retrieval,
    "missing-entries": missing_entries,
    "rosenbrock": rosenbrock,
    "saddle": saddle,
    "tanh-classifier": tanh_classifier,
}
"""Builders of the built-in problems by kebab name."""


def options(name: str) -> dict[str, Any]:
    """The options of a built-in problem with their defaults."""
    parameters = inspect.signature(PROBLEMS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def instance(name: str, **chosen: Any) -> Instance:
    """A built-in problem by its kebab or snake name.

    **Raises:** `InputError` for a name or an option that there is not, or a value out of range.
    """
    name = name.replace("_", "-")
    check_choice("problem", name, PROBLEMS)
    known = options(name)
    for option, value in chosen.items():
        check_choice(f"option of {name}", option, known)
        if isinstance(known[option], int) and not isinstance(value, int):
            raise InputError(option, repr(value), "a whole number")
    return PROBLEMS[name](**chosen)
