"""Rosenbrock's curved valley in n dimensions.

    f(x) = Σᵢ 100 (x_{i+1} − xᵢ²)² + (1 − xᵢ)²

The minimum is 0 at (1, …, 1). From n = 4 on there is one further local minimum, near (−1, 1, …, 1).

Source: H. H. Rosenbrock, *An automatic method for finding the greatest or least value of a function*,
The Computer Journal 3 (1960).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.errors import check_count
from ..core.problem import Objective
from .instance import Instance, real

__all__ = ["rosenbrock"]


def _valley(x: Float[Array, " n"]) -> Float[Array, ""]:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def rosenbrock(dimension: int = 10) -> Instance:
    """Rosenbrock's function from its usual start (−1.2, 1, −1.2, 1, …).

    **Raises:** `InputError` for fewer than 2 dimensions.
    """
    check_count("dimension", dimension, 2)
    usual = np.where(np.arange(dimension) % 2 == 0, -1.2, 1.0)
    return Instance(
        problem=Objective(_valley, lower_bound=0.0),
        start=lambda key: jnp.asarray(real(usual)),
        description=f"Rosenbrock's function in {dimension} dimensions, from (−1.2, 1, −1.2, 1, …).",
        answer="the minimum is 0, at (1, …, 1)",
        measure=lambda x: {"distance to the minimizer": float(np.linalg.norm(np.asarray(x) - 1))},
    )
