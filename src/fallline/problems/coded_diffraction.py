"""Coded diffraction: an image from the intensities of its Fourier transforms behind random masks.

    yₗ = |fft(conj(Dₗ) ⊙ x)|²,   l = 1 … L

The phases are lost, as in every camera. With enough masks the image is the only one, up to its sign, that fits.

Source: E. Candès, X. Li and M. Soltanolkotabi, *Phase Retrieval via Wirtinger Flow: Theory and Algorithms*, IEEE
Transactions on Information Theory 61 (2015), Section 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ..core.errors import InputError, check_choice, check_count
from ..core.optimizer import optimizer
from ..core.stopping import gradient_norm
from ..data.files import IMAGES, read_image, read_patterns
from ..data.packaged import PHOTOGRAPHS, photograph
from ..recovery.losses import Amplitude, Intensity, Loss, ReweightedAmplitude, TruncatedAmplitude, TruncatedPoisson
from ..recovery.operators import CodedDiffraction
from ..recovery.operators import coded_diffraction as random_masks
from ..recovery.problem import Recovery
from ..recovery.starts import start
from .instance import Images, Instance, real

__all__ = ["coded_diffraction"]

_LOSSES: dict[str, type[Loss]] = {
    "intensity": Intensity,
    "truncated-poisson": TruncatedPoisson,
    "amplitude": Amplitude,
    "truncated-amplitude": TruncatedAmplitude,
    "reweighted-amplitude": ReweightedAmplitude,
}
_TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-9}


def coded_diffraction(
    data: str | None = None, loss: str = "truncated-amplitude", patterns: int = 12, seed: int = 0
) -> Instance:
    """A photograph from the magnitudes of its coded diffraction patterns.

    **Arguments:**
    - `data`: an image file, or the name of a photograph that a package carries (china, flower, camera, moon, cell),
      whose patterns are computed; or a `.npz` file with `masks` and `magnitudes` (or `intensities`) that were
      measured. By default china.
    - `loss`: intensity, truncated-poisson, amplitude, truncated-amplitude or reweighted-amplitude.
    - `patterns`: the number of masks L, with values in {±1, ±i}; `seed` draws them. Not for measured data.

    The image is real; a measured one is taken to be complex where its masks are.

    **Raises:** `InputError` for a file that cannot be used, or numbers out of range.
    """
    loss = loss.replace("_", "-")
    check_choice("loss", loss, _LOSSES)
    check_count("patterns", patterns, 1)
    check_count("seed", seed, 0)
    chosen = _LOSSES[loss]()
    image: Float[np.ndarray, "height width"] | None = None
    named = "china" if data is None else data
    if named in PHOTOGRAPHS or Path(named).suffix.lower() in IMAGES:
        image = photograph(named) if named in PHOTOGRAPHS else read_image(named)
        op = random_masks(jax.random.key(seed), image.shape, patterns)
        intensities = np.asarray(jnp.abs(op.mv(jnp.asarray(real(image)))) ** 2)
    elif Path(named).suffix.lower() == ".npz":
        masks, intensities = read_patterns(named)
        op = CodedDiffraction(masks.astype(np.result_type(real(0).dtype, np.complex64)))
    else:
        kinds = f"an image ({', '.join(IMAGES)}), a .npz file with masks and magnitudes, or {', '.join(PHOTOGRAPHS)}"
        raise InputError("--data", named, kinds)
    problem = Recovery(op, real(intensities), loss=chosen)
    begin = start("truncated", real=image is not None)

    def measure(x: Array) -> dict[str, float]:
        misfit = jnp.linalg.norm((jnp.abs(op.mv(x)) - jnp.sqrt(problem.y)).reshape(-1))
        found = {"misfit of the magnitudes": float(misfit / jnp.sqrt(jnp.sum(problem.y)))}
        if image is not None:
            found["relative error of the image"] = float(problem.distance(x, jnp.asarray(real(image))))
        return found

    def view(first: Array, x: Array) -> Images:
        shots = {"one of the patterns (log)": np.log1p(np.sqrt(_middle(problem.y[0])))}
        shots["where it starts"] = _upright(first, image)
        shots["recovered"] = _upright(x, image)
        if image is not None:
            shots["the photograph"] = image
        return shots

    step_size = {"intensity": 0.1, "truncated-poisson": 0.2, "reweighted-amplitude": 4.0}.get(loss, 1.0)
    size = f"{' × '.join(map(str, op.shape))} pixels, {op.masks.shape[0]} patterns"
    return Instance(
        problem=problem,
        start=lambda key: begin(problem, key),
        description=f"Coded diffraction: {Path(named).name}, {size}, by the loss {loss}.",
        answer="the image itself, up to its sign, where there are enough patterns",
        measure=measure,
        view=view if len(op.shape) == 2 else None,
        solver=optimizer(optax.sgd, learning_rate=step_size),
        stop=gradient_norm(_TOLERANCE[real(0).dtype] * float(problem.scale)),
    )


def _middle(pattern: Any) -> Any:
    return np.fft.fftshift(np.asarray(pattern))


def _upright(x: Array, image: Any) -> Float[np.ndarray, "height width"]:
    """A recovered image with the sign of the truth, or of its own mean; the modulus of a complex one."""
    picture = np.asarray(x)
    if np.iscomplexobj(picture):
        return np.abs(picture)
    return picture * (np.sign(np.vdot(picture, np.ones_like(picture) if image is None else image)) or 1.0)
