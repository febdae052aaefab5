"""Robust PCA: exact recovery on the paper's generator, and a hyperspectral scene under salt.

The thresholds were fixed after a prototype in NumPy and before the first run of this code. The prototype drew errors
independently, so that some rows had more of them than α; here every row and column has exactly its share, as the
theorem asks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from ...core.loop import minimize
from ...recovery.problem import Recovery
from ...recovery.robust_pca import ObservedMatrix, RobustPCA, robust_pca, robust_pca_start
from ...recovery.starts import spectral
from ...recovery.structures import TwoFactors
from ..claim import Check, Claim, Scale, Track

__all__ = ["CLAIMS"]


def _regular(rng: np.random.Generator, n1: int, n2: int, share: float) -> Bool[np.ndarray, "n1 n2"]:
    """A random pattern with the same number of entries in each row, and, where n2 divides n1, in each column."""
    offsets = rng.permutation(n2)[: round(share * n2)]
    pattern = np.isin((np.arange(n1)[:, None] - np.arange(n2)) % n2, offsets)
    return pattern[rng.permutation(n1)][:, rng.permutation(n2)]


def _largest_share(errors: Bool[np.ndarray, "n1 n2"]) -> float:
    return float(max(errors.mean(axis=0).max(), errors.mean(axis=1).max()))


def _error(found: Any, truth: Float[np.ndarray, "n1 n2"]) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def _trimmed(y: Any, rank: int, alpha: float) -> tuple[RobustPCA, Any]:
    problem = RobustPCA(y, rank, alpha)
    return problem, robust_pca_start(problem, jax.random.key(0))


def _untrimmed(y: Any, rank: int, alpha: float) -> tuple[Recovery, Any]:
    problem = Recovery(ObservedMatrix(y.shape, None), y, TwoFactors(rank, 1.0))
    return problem, spectral(problem, jax.random.key(0))


# ---- the paper's generator ------------------------------------------------------------------------

SIZES = {Scale.SMOKE: 200, Scale.SMALL: 500, Scale.FULL: 1000}
SHARES = (0.1, 0.2)
RANK, STEPS = 5, 300


@dataclasses.dataclass(frozen=True)
class Instance:
    """A low-rank matrix, its errors, and a bound on their share of a row or column."""

    low_rank: Float[np.ndarray, "d d"]
    y: Float[np.ndarray, "d d"]
    alpha: float


def _generated(scale: Scale) -> tuple[list[Instance], list[Check]]:
    d, instances, shares = SIZES[scale], [], []
    for seed in range(EXACT.seeds[scale]):
        for alpha in SHARES:
            rng = np.random.default_rng(seed)
            u, v = rng.standard_normal((2, d, RANK)) / math.sqrt(d)
            errors = _regular(rng, d, d, alpha)
            values = rng.uniform(-5 * RANK / d, 5 * RANK / d, (d, d))
            instances.append(Instance(u @ v.T, u @ v.T + errors * values, alpha))
            shares.append(_largest_share(errors) - alpha)
    return instances, [Check("largest share of errors in a row or column, above α", max(shares), "<=", 1e-12)]


def _recoveries(begin: Callable[..., Any]) -> Callable[[Sequence[Instance], Track], dict[str, Any]]:
    def measure(instances: Sequence[Instance], track: Track) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        for instance in track(instances, "matrices"):
            problem, x0 = begin(instance.y, RANK, instance.alpha)
            solution = minimize(problem, x0, robust_pca(tolerance=1e-10), steps=STEPS)
            row = measured.setdefault(f"{instance.alpha:g}", {"error": [], "steps": [], "gradient": []})
            row["error"].append(_error(problem.structure.lift(solution.x), instance.low_rank))
            row["steps"].append(solution.steps)
            row["gradient"].append([float(g) for g in solution.history["gradient_norm"]])
        return measured

    return measure


def _exact(measured: Mapping[str, Any]) -> list[Check]:
    return [
        Check(f"largest relative error, {float(share):.0%} errors", max(row["error"]), "<=", 1e-8)
        for share, row in measured.items()
    ]


def _draw_gradients(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    colors = dict(zip(measured, ("#1f5fa8", "#c1502e"), strict=True))
    for share, row in measured.items():
        for i, gradient in enumerate(row["gradient"]):
            label = f"{float(share):.0%} errors" if i == 0 else None
            axes[0].semilogy(gradient, color=colors[share], linewidth=1, label=label)
    axes[0].set(xlabel="step", ylabel="gradient norm, in units of σ₁")
    axes[0].legend(frameon=False)


EXACT = Claim(
    name="exact-recovery",
    statement="With 10 % and 20 % of the entries of each row and column grossly wrong, gradient descent with "
    "thresholding recovers a matrix of rank 5 exactly, at a linear rate.",
    refuted_by="a relative error above 1e-8 after 300 steps, for any seed.",
    kind="exact recovery",
    source="Theorem 1 and the simulations: factors N(0, 1/d), errors uniform on ±5r/d",
    tolerance="1e-8 within 300 steps: the prototype reached 1e-10 in 74 steps at 10 % and in 149 at 20 %, d = 500.",
    seeds={Scale.SMOKE: 2, Scale.SMALL: 5, Scale.FULL: 5},
    build=_generated,
    measure=_recoveries(_trimmed),
    judge=_exact,
    control="no entry is taken for an error: S = 0, from the SVD of Y",
    measure_control=_recoveries(_untrimmed),
    draw=_draw_gradients,
)


# ---- a hyperspectral scene ------------------------------------------------------------------------

CROPS = {Scale.SMOKE: 40, Scale.SMALL: 60, Scale.FULL: 100}
BANDS_RANK, SALT, SALT_SHARE, LONG = 3, 2.0, 0.05, 400


@dataclasses.dataclass(frozen=True)
class Scene:
    """Pixels by bands, clean and with salt."""

    clean: Float[np.ndarray, "pixels bands"]
    salted: Float[np.ndarray, "pixels bands"]


def _salted(scale: Scale) -> tuple[Scene, list[Check]]:
    from ...data.packaged import indian_pines

    side, rng = CROPS[scale], np.random.default_rng(0)
    clean = indian_pines()[40 : 40 + side, 40 : 40 + side].reshape(side * side, -1)
    errors = _regular(rng, *clean.shape, SALT_SHARE)
    salted = clean + errors * rng.choice([-SALT, SALT], clean.shape)
    return Scene(clean, salted), [
        Check("largest share of errors in a row or column, above α", _largest_share(errors) - SALT_SHARE, "<=", 1e-12),
        Check("the best error at rank 3", _error(_pca(clean), clean), "<=", 0.05),
    ]


def _pca(y: Float[np.ndarray, "pixels bands"]) -> Float[np.ndarray, "pixels bands"]:
    left, values, right = np.linalg.svd(y, full_matrices=False)
    return (left[:, :BANDS_RANK] * values[:BANDS_RANK]) @ right[:BANDS_RANK]


def _denoised(scene: Scene, track: Track) -> dict[str, Any]:
    problem, x0 = _trimmed(scene.salted, BANDS_RANK, SALT_SHARE)
    solution = minimize(problem, x0, robust_pca(), steps=LONG)
    return _scene_numbers(scene, np.asarray(problem.structure.lift(solution.x)))


def _scene_numbers(scene: Scene, low_rank: Float[np.ndarray, "pixels bands"]) -> dict[str, Any]:
    pixels = np.flatnonzero(scene.salted[:, 100] != scene.clean[:, 100])[:1]
    one = {"clean": scene.clean, "salted": scene.salted, "found": low_rank}
    return {
        "error": _error(low_rank, scene.clean),
        "best at rank 3": _error(_pca(scene.clean), scene.clean),
        "a pixel": {name: [float(v) for v in rows[pixels[0]]] for name, rows in one.items()},
    }


def _draw_pixel(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    spectra = measured["a pixel"]
    axes[0].plot(spectra["salted"], ".", color="#bbb", label="with salt")
    axes[0].plot(spectra["clean"], color="#333", label="clean")
    axes[0].plot(spectra["found"], color="#1f5fa8", linewidth=1, label="found")
    axes[0].set(xlabel="band", ylabel="one pixel's spectrum")
    axes[0].legend(frameon=False)


SCENE = Claim(
    name="hyperspectral",
    statement="On real data that are only nearly of low rank, a scene of 200 bands with 5 % of its entries off by ±2, "
    "the method comes near the best matrix of rank 3, where the SVD does not.",
    refuted_by="a relative error above 0.06.",
    kind="comparison",
    source="beyond the paper, whose videos are not at hand; Indian Pines, 60 × 60 pixels",
    tolerance="0.06: the best matrix of rank 3 has 0.031; the prototype, with errors drawn independently, had 0.050.",
    seeds=dict.fromkeys(Scale, 1),
    build=_salted,
    measure=_denoised,
    judge=lambda measured: [Check("relative error of the low-rank part", measured["error"], "<=", 0.06)],
    control="the truncated SVD of the salted scene",
    measure_control=lambda scene, track: _scene_numbers(scene, _pca(scene.salted)),
    draw=_draw_pixel,
)

CLAIMS = (EXACT, SCENE)
