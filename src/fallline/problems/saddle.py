"""A strict saddle with one way out, and the start on it.

    f(x) = ½ xᵀ H x + ¼ ‖x‖₄⁴,   H = diag(−c, 1, …, 10)

The gradient at 0 is exactly zero and no first-order method moves. f is a sum over coordinates, so the
minima are known: ±√c e₁, with the value −c²/4.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.errors import check_count, check_positive
from ..core.problem import Objective
from .instance import Instance, real

__all__ = ["saddle"]


def _quartic(x: Float[Array, " n"], diagonal: Float[Array, " n"]) -> Float[Array, ""]:
    return jnp.sum(0.5 * diagonal * x**2 + 0.25 * x**4)


def saddle(dimension: int = 20, curvature: float = 1.0) -> Instance:
    """A quartic with the eigenvalue −`curvature` at its start, the saddle x = 0.

    **Raises:** `InputError` for fewer than 2 dimensions or a curvature that is not positive.
    """
    check_count("dimension", dimension, 2)
    check_positive("curvature", curvature)
    diagonal = real(np.concatenate([[-curvature], np.linspace(1, 10, dimension - 1)]))
    minimizer = np.sqrt(curvature) * np.eye(dimension)[0]

    def measure(x: Float[Array, " n"]) -> dict[str, float]:
        distances = [np.linalg.norm(np.asarray(x) - sign * minimizer) for sign in (1, -1)]
        return {"distance to the nearest minimizer": float(min(distances))}

    return Instance(
        problem=Objective(_quartic, (diagonal,), lower_bound=-(curvature**2) / 4),
        start=lambda key: jnp.zeros(dimension, diagonal.dtype),
        description=f"f(x) = ½ xᵀHx + ¼‖x‖₄⁴ in {dimension} dimensions, from its strict saddle at 0.",
        answer=f"the minimum is {-(curvature**2) / 4:g}, at ±{np.sqrt(curvature):g} e₁",
        measure=measure,
    )
