"""Real phase retrieval: a signal from the squares of Gaussian measurements.

    f(x) = 1/(4m) Σᵢ ((aᵢᵀx)² − yᵢ)²,   yᵢ = (aᵢᵀs)²,   aᵢ ~ N(0, I)

The minimum is 0, at ±s; with enough measurements nowhere else, and x = 0 is a maximum along s.

Source: J. Sun, Q. Qu and J. Wright, *A Geometric Analysis of Phase Retrieval*, Foundations of
Computational Mathematics 18 (2018).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.errors import check_count
from ..core.problem import Objective
from .instance import Instance, real

__all__ = ["gaussian_phase_retrieval"]


def _intensity_loss(
    x: Float[Array, " n"], rows: Float[Array, "m n"], intensities: Float[Array, " m"]
) -> Float[Array, ""]:
    return jnp.mean(((rows @ x) ** 2 - intensities) ** 2) / 4


def gaussian_phase_retrieval(measurements: int = 500, dimension: int = 50, seed: int = 0) -> Instance:
    """A unit Gaussian signal in `dimension` coordinates, `measurements` exact intensities of it.

    **Arguments:** `seed` draws signal and measurements; the start has a key of its own.

    **Raises:** `InputError` for numbers out of range.
    """
    check_count("measurements", measurements, 1)
    check_count("dimension", dimension, 1)
    check_count("seed", seed, 0)
    generator = np.random.default_rng(seed)
    signal = generator.standard_normal(dimension)
    signal = real(signal / np.linalg.norm(signal))
    rows = real(generator.standard_normal((measurements, dimension)))

    def measure(x: Float[Array, " n"]) -> dict[str, float]:
        distances = [np.linalg.norm(np.asarray(x) - sign * signal) for sign in (1, -1)]
        return {"distance to ± the signal": float(min(distances))}

    return Instance(
        problem=Objective(_intensity_loss, (rows, (rows @ signal) ** 2), lower_bound=0.0),
        start=lambda key: jax.random.normal(key, (dimension,), rows.dtype) / np.sqrt(dimension),
        description=f"Real phase retrieval: {measurements} intensities of a unit signal in {dimension} coordinates.",
        answer="the minimum is 0, at ± the signal",
        measure=measure,
    )
