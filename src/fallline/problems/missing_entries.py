"""A low-rank matrix from some of its entries.

    f(L, R) = ½ Σ over the known entries (L Rᵀ − M)²,   up to a factor, with a balance between L and R

Source: Y. Chi, Y. M. Lu and Y. Chen, *Nonconvex Optimization Meets Low-Rank Matrix Factorization: An Overview*, IEEE
Transactions on Signal Processing 67 (2019), Section V.C.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from ..core.errors import InputError, check_count, is_traced
from ..core.stopping import gradient_norm
from ..data.files import Observed, read_matrix
from ..data.packaged import indian_pines
from ..recovery.alternating_least_squares import alternating_least_squares
from ..recovery.operators import Entries
from ..recovery.problem import Recovery
from ..recovery.starts import spectral
from ..recovery.structures import Factors, TwoFactors
from .instance import Images, Instance, real

__all__ = ["missing_entries"]

_SIDE = 60  # pixels of the scene that the default takes
_BAND = 30  # that is shown
_TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-8}
_MOST_SHOWN = 4_000_000


def missing_entries(
    data: str | None = None, rank: int = 3, known: float = 0.2, held_out: float = 0.1, seed: int = 0
) -> Instance:
    """A matrix of low rank from its known entries.

    **Arguments:**
    - `data`: a `.npz`, `.npy`, `.csv` or `.mtx` file with the known entries (`fallline.data.files.read_matrix`). By
      default 60 × 60 pixels of the hyperspectral scene Indian Pines in 200 bands, of which `known` are known.
    - `rank`: of the matrix.
    - `held_out`: of the entries of `data`, this share is kept back, to measure the answer by; `seed` draws it.

    **Raises:** `InputError` for a file that cannot be used, or numbers out of range.
    """
    check_count("rank", rank, 1)
    check_count("seed", seed, 0)
    for name, share in {"known": known, "held_out": held_out}.items():
        if not is_traced(share) and not (isinstance(share, int | float) and 0 <= share < 1):
            raise InputError(name, share, "a number from 0, below 1")
    draw = np.random.default_rng(seed)
    if data is None:
        scene = indian_pines()[:_SIDE, :_SIDE].reshape(-1, 200)
        rows, columns = (index.reshape(-1) for index in np.indices(scene.shape))
        found, kept = Observed(rows, columns, scene.reshape(-1), (_SIDE**2, 200)), draw.random(scene.size) < known
        source = f"{known:.0%} of {_SIDE} × {_SIDE} pixels of Indian Pines in 200 bands"
    else:
        found = read_matrix(data)
        kept, source = draw.random(len(found.values)) >= held_out, Path(data).name
    if not kept.any():
        raise InputError("held_out" if data else "known", held_out if data else known, "a share that leaves entries")
    rows, columns, values = found.rows[kept], found.columns[kept], real(found.values[kept])
    problem = Recovery(Entries(rows, columns, found.shape), values, TwoFactors(rank))
    hidden = Observed(found.rows[~kept], found.columns[~kept], found.values[~kept], found.shape)

    def misfit(x: Factors, part: Observed) -> float:
        guess = np.sum(np.asarray(x.left)[part.rows] * np.asarray(x.right)[part.columns], axis=1)
        return float(np.linalg.norm(guess - part.values) / np.linalg.norm(part.values))

    def measure(x: Factors) -> dict[str, float]:
        errors = {"relative error of the known entries": misfit(x, Observed(rows, columns, values, found.shape))}
        if len(hidden.values):
            errors["relative error of entries held back"] = misfit(x, hidden)
        return errors

    def view(first: Factors, x: Factors) -> Images:
        seen = np.full(found.shape, np.nan)
        seen[rows, columns] = values
        whole = np.asarray(x.left) @ np.asarray(x.right).T
        if data is None:
            return {f"band {_BAND}: what is known": _scene(seen), "completed": _scene(whole)}
        return {"what is known": seen, "completed": whole}

    return Instance(
        problem=problem,
        start=lambda key: spectral(problem, key),
        description=f"A matrix of rank {rank} from {len(values)} entries: {source}.",
        answer="near the matrix itself, where it has this rank and enough entries are known in each row and column",
        measure=measure,
        view=view if np.prod(found.shape) <= _MOST_SHOWN else None,
        solver=alternating_least_squares(),
        stop=gradient_norm(_TOLERANCE[real(0).dtype] * float(problem.scale)),
    )


def _scene(matrix: Float[np.ndarray, "pixels bands"]) -> Float[np.ndarray, "height width"]:
    return matrix[:, _BAND].reshape(_SIDE, _SIDE)
