"""A linear autoencoder on the digits: principal components by optimization.

    f(E, D) = ‖X − X E D‖²_F / n,   E of shape (64, k), D of shape (k, 64), X centered

Every critical point that is no global minimum is a strict saddle (Baldi and Hornik 1989), and by
Eckart and Young the minimum is the sum of the squared singular values of X/√n beyond the k-th. For
invertible A the points (E A, A⁻¹ D) have the same value: the orbit's tangents are (E B, −B D).

X enters by its Gram matrix alone, so the objective uses the triangular factor R of X/√n = QR in its
place: the same function from 64 rows instead of 1,797.

Source: P. Baldi and K. Hornik, *Neural Networks and Principal Component Analysis: Learning from
Examples Without Local Minima*, Neural Networks 2 (1989).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.errors import InputError, check_count, check_positive
from ..core.problem import Objective
from .digits import SIDE, as_image, digits, leading_pattern
from .instance import Images, Instance, real

__all__ = ["linear_autoencoder", "principal_components", "reconstruction_error", "widen_autoencoder"]

Weights = dict[str, Array]


def reconstruction_error(x: Weights, data: Float[Array, "rows 64"]) -> Float[Array, ""]:
    """‖data − data E D‖²_F for x = {"encode": E, "decode": D}."""
    residual = data - data @ x["encode"] @ x["decode"]
    return jnp.sum(residual**2)


def _tangents(x: Weights) -> Weights:
    k = x["decode"].shape[0]
    basis = jnp.eye(k * k, dtype=x["decode"].dtype).reshape(k * k, k, k)
    return {"encode": x["encode"] @ basis, "decode": -basis @ x["decode"]}


def _rows() -> Float[np.ndarray, "1797 64"]:
    pixels = digits()[0]
    return (pixels - pixels.mean(axis=0)) / np.sqrt(len(pixels))


def principal_components() -> tuple[Float[np.ndarray, " 64"], Float[np.ndarray, "64 64"]]:
    """Singular values of X/√n in decreasing order, and the principal components as rows."""
    _, values, components = np.linalg.svd(_rows(), full_matrices=False)
    return values, components


def widen_autoencoder(x: Weights, rank: int) -> Weights:
    """The same map with hidden units added, all of their weights zero.

    **Raises:** `InputError` where `rank` is below the present one.
    """
    old = x["decode"].shape[0]
    if rank < old:
        raise InputError("rank", rank, f"at least the present one, {old}")
    more = rank - old
    return {"encode": jnp.pad(x["encode"], ((0, 0), (0, more))), "decode": jnp.pad(x["decode"], ((0, more), (0, 0)))}


def linear_autoencoder(rank: int = 10, scale: float = 0.1) -> Instance:
    """The digits, centered, through a bottleneck of `rank` linear units.

    **Arguments:** `rank` k, 1 to 64; `scale`, the standard deviation of the random start.

    **Raises:** `InputError` for numbers out of range.
    """
    check_count("rank", rank, 1)
    if rank > SIDE**2:
        raise InputError("rank", rank, f"at most {SIDE**2}, the number of pixels")
    check_positive("scale", scale)
    values, components = principal_components()
    optimum = float(np.sum(values[rank:] ** 2))

    def start(key: Array) -> Weights:
        first, second = jax.random.split(key)
        encode = jax.random.normal(first, (SIDE**2, rank), real(0).dtype)
        return {"encode": scale * encode, "decode": scale * jax.random.normal(second, (rank, SIDE**2), encode.dtype)}

    def measure(x: Weights) -> dict[str, float]:
        error = float(reconstruction_error(x, jnp.asarray(triangle)))
        if optimum == 0:
            return {"distance to the optimum": error}
        return {"relative distance to the optimum": error / optimum - 1}

    def draw(direction: Weights) -> Images:
        pattern = leading_pattern(np.asarray(direction["encode"]))
        overlaps = np.abs(components @ pattern)
        nearest = int(np.argmax(overlaps))
        title = f"principal component {nearest + 1} (|cosine| {overlaps[nearest]:.6f})"
        return {"direction": as_image(pattern), title: as_image(components[nearest])}

    triangle = real(np.linalg.qr(_rows(), mode="r"))
    return Instance(
        problem=Objective(reconstruction_error, (triangle,), lower_bound=optimum, symmetry=_tangents),
        start=start,
        description=f"Linear autoencoder of rank {rank} on the centered digits: f(E, D) = ‖X − X E D‖²_F / n.",
        answer=f"the minimum is {optimum:.10g}, by Eckart and Young; it is unique up to E → E A, D → A⁻¹ D",
        measure=measure,
        draw=draw,
    )
