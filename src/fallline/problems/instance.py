"""What a built-in problem is: an objective, where to start, and what is known of the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..core.problem import Problem
from ..core.solver import Solver
from ..core.stopping import StoppingRule

__all__ = ["Images", "Instance", "real"]

Images = Mapping[str, Float[np.ndarray, "height width"]]


def _nothing(x: PyTree) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Instance:
    """One problem with its data.

    **Fields:**
    - `problem`: the objective; it declares what a certificate can use.
    - `start`: `key -> x0`, a starting point in JAX's default precision.
    - `description`: the objective and the data in a sentence or two.
    - `answer`: what is known of the solution, in words.
    - `measure`: `x -> {name: number}`, how far a point is from that answer, or what it is good for.
    - `draw`: `direction -> {title: image}`, for directions that can be looked at; empty otherwise.
    - `view`: `(start, x) -> {title: image}`, for points that can be looked at.
    - `solver`, `stop`: the problem's own method and stopping rule, for whoever names none.
    """

    problem: Problem
    start: Callable[[Array], PyTree]
    description: str
    answer: str
    measure: Callable[[PyTree], Mapping[str, float]] = _nothing
    draw: Callable[[PyTree], Images] = _nothing
    view: Callable[[PyTree, PyTree], Images] | None = None
    solver: Solver | None = None
    stop: StoppingRule | None = None


def real(array: Any) -> Float[np.ndarray, ...]:
    """The array in JAX's default precision: float64 where 64-bit mode is on, else float32."""
    return np.asarray(array, jax.dtypes.canonicalize_dtype(float))
