"""Where to start: leading eigenvectors of weighted covariances of the measurements, or random.

A start is a function `(problem, key) -> x0`. Those for intensities take the leading eigenvector of

    v ↦ A*(w ⊙ A v)

by Lanczos, which holds a few vectors and never a matrix, and give it the norm √(Σy / gain). Masks of unequal size are
divided out: with D = diag(A*A) / gain it is D^{−1/2} times the eigenvector of D^{−1/2} A*(w ⊙ A D^{−1/2} v). They
differ in w
(n coordinates, m measurements, ȳ = y / mean(y), ρᵢ = √(n)/‖aᵢ‖):

| start                     | w                                                       |
|---------------------------|---------------------------------------------------------|
| `spectral`                | y                                                       |
| `truncated`               | y where y ρ² ≤ α² mean(y), α = 3                         |
| `orthogonality_promoting` | 1/‖a‖² on the ⌈m/6⌉ largest √y/‖a‖                       |
| `maximal_correlation`     | y^{1/4} on the ⌊3m/13⌋ largest √y                        |
| `optimal`                 | (ȳ − 1) / (ȳ + √(m/n) − 1), negative where y is small    |

For linear measurements of low-rank matrices `spectral` is the truncated SVD of A*(y) / gain (`PSD`: its leading
eigenpairs, negative ones as 0), and `signs` the same of the signs of y, which no outlier moves.

Sources: Chi, Lu and Chen (2019), Sections V and VIII; Chen and Candès (2015), equation (1.7); Wang, Giannakis and
Eldar (2016), equation (9); Wang, Giannakis, Saad and Chen (2018), equation (10); M. Mondelli and A. Montanari,
*Fundamental Limits of Weak Recovery with Applications to Phase Retrieval* (2018), equation (6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..core import trees
from ..core.errors import InputError, check_choice, check_positive, is_traced
from ..parts.linalg import leading_eigenpairs, leading_eigenvector, leading_svd
from .losses import times
from .problem import Recovery
from .structures import PSD, Factors, TwoFactors

__all__ = ["STARTS", "Start", "random", "signs", "spectral", "start"]

Start = Callable[[Recovery, Array], PyTree]
Weights = Callable[[Array, Array, Any, Any, Any], Array]
_LANCZOS_STEPS = 30  # at 20 starts no longer change


def _plain(y: Array, rho: Array, m: Any, n: Any, alpha: Any) -> Array:
    return y


def _truncated(y: Array, rho: Array, m: Any, n: Any, alpha: Any) -> Array:
    return jnp.where(y * rho**2 <= alpha**2 * jnp.sum(y) / m, y, 0)


def _largest(scores: Array, share: Any) -> Array:
    """Whether each score is among the `share` largest; the number is dynamic."""
    ordered = jnp.sort(scores.reshape(-1))[::-1]
    return scores >= ordered[jnp.asarray(share, jnp.int32) - 1]


def _orthogonality_promoting(y: Array, rho: Array, m: Any, n: Any, alpha: Any) -> Array:
    kept = _largest(jnp.sqrt(y) * rho, jnp.ceil(m / 6))
    return jnp.where(kept, rho**2, 0)


def _maximal_correlation(y: Array, rho: Array, m: Any, n: Any, alpha: Any) -> Array:
    kept = _largest(y, jnp.floor(3 * m / 13))
    return jnp.where(kept, jnp.sqrt(jnp.sqrt(y)), 0)


def _optimal(y: Array, rho: Array, m: Any, n: Any, alpha: Any) -> Array:
    scaled = y * m / jnp.sum(y)
    below = scaled + jnp.sqrt(m / n) - 1
    tiny = jnp.finfo(y.dtype).eps
    weight = (scaled - 1) / jnp.where(jnp.abs(below) > tiny, below, tiny)
    return jnp.where(rho > 0, weight, 0)


STARTS: dict[str, Weights] = {
    "spectral": _plain,
    "truncated": _truncated,
    "orthogonality_promoting": _orthogonality_promoting,
    "maximal_correlation": _maximal_correlation,
    "optimal": _optimal,
}
"""Weights of the starts for intensities, by name."""


def start(name: str, *, alpha: float = 3.0, real: bool | None = None, steps: int = _LANCZOS_STEPS) -> Start:
    """A start for intensities, one of `STARTS`.

    **Arguments:** `alpha` — of the truncated start; `real` — whether the signal is real: by default as the
    operator is; `steps` — Lanczos steps, each one product with A and one with A*.

    **Raises:** `InputError` for a name that there is not.
    """
    check_choice("init", name, STARTS)
    check_positive("alpha", alpha)

    def begin(problem: Recovery, key: Array) -> Array:
        is_real = not _is_complex(problem.op) if real is None else real
        return _leading(problem, key, alpha, STARTS[name], is_real, steps)

    return begin


@eqx.filter_jit
def _leading(problem: Recovery, key: Array, alpha: Any, weigh: Weights, real: bool, steps: int) -> Array:
    """The leading eigenvector of the weighted covariance, with the norm of the signal."""
    op, y = problem.op, jnp.asarray(problem.y)
    rho = jnp.broadcast_to(problem.rho, op.out_shape).astype(y.dtype)
    w = weigh(y, rho, op.count, op.size, alpha)
    w = w / jnp.max(jnp.abs(w))
    first = jax.random.normal(key, op.shape, y.dtype if real else jnp.result_type(y.dtype, jnp.complex64))
    flat, back = _real_view(first)
    columns = op.squared_column_norms()
    whiten = jnp.ones((), y.dtype)
    if columns is not None:  # where they differ in norm the eigenvector may sit on a single coordinate
        whiten = jnp.sqrt(problem.gain / jnp.where(columns > 0, columns, jnp.inf)).astype(y.dtype)

    def covariance(v: Array) -> Array:
        x = times(whiten, back(v))
        return _real_view(times(whiten, problem.structure.pull(op, x, times(w, op.mv(x)))))[0] / problem.gain

    vector = leading_eigenvector(covariance, flat / jnp.linalg.norm(flat), steps)[1]
    return times(problem.radius * whiten, back(vector))


def _is_complex(op: Any) -> bool:
    return jnp.issubdtype(op.dtype, jnp.complexfloating)


def _real_view(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The array as one real vector, and the way back."""
    if not jnp.iscomplexobj(x):
        return x.reshape(-1), lambda v: v.reshape(x.shape)
    parts = jnp.concatenate([jnp.real(x).reshape(-1), jnp.imag(x).reshape(-1)])
    return parts, lambda v: jax.lax.complex(*jnp.split(v, 2)).reshape(x.shape)


def spectral(problem: Recovery, key: Array) -> PyTree:
    """The leading part of A*(y) / gain in the form of the structure; for intensities the eigenvector with w = y."""
    if problem.loss.phaseless:
        return start("spectral")(problem, key)
    return _low_rank(problem, problem.y / problem.gain, key)


def signs(problem: Recovery, key: Array) -> PyTree:
    """The leading part of A*(sign(y)) / gain: for measurements with outliers (Ma and Fattahi 2023, Algorithm 1)."""
    return _low_rank(problem, jnp.sign(problem.y) / problem.gain, key)


@eqx.filter_jit
def _low_rank(problem: Recovery, v: Array, key: Array) -> PyTree:
    op, structure = problem.op, problem.structure
    times, transposed = op.backproject(v)
    if isinstance(structure, PSD):
        values, vectors = leading_eigenpairs(
            lambda block: (times(block) + transposed(block)) / 2, op.shape[0], structure.rank, key, v.dtype
        )
        return vectors * jnp.sqrt(jnp.maximum(values, 0))
    if not isinstance(structure, TwoFactors):
        raise InputError("init", "a spectral start of linear measurements", "a low-rank structure")
    left, values, right = leading_svd(times, transposed, op.shape, structure.rank, key, v.dtype)
    return Factors(left * jnp.sqrt(values), right * jnp.sqrt(values))


def random(scale: float = 1.0, *, ratio: float = 1.0, real: bool | None = None) -> Start:
    """Independent normal entries.

    A vector gets `scale` times the norm that its data tell, on average; factors get standard deviation `scale`, and
    the right one of two `scale` × `ratio`.

    **Raises:** `InputError` for numbers that are not positive.
    """
    for name, number in {"scale": scale, "ratio": ratio}.items():
        if not is_traced(number):
            check_positive(name, number)

    def begin(problem: Recovery, key: Array) -> PyTree:
        op, structure, dtype = problem.op, problem.structure, trees.real_dtype(problem.y)
        if isinstance(structure, PSD):
            return scale * jax.random.normal(key, (op.shape[0], structure.rank), dtype)
        if isinstance(structure, TwoFactors):
            keys = jax.random.split(key)
            shapes = [(n, structure.rank) for n in op.shape]
            left, right = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
            return Factors(scale * left, scale * ratio * right)
        if not (real or (real is None and not _is_complex(op))):
            dtype = jnp.result_type(dtype, jnp.complex64)
        x = jax.random.normal(key, op.shape, dtype)
        return scale * problem.radius / jnp.sqrt(float(op.size)) * x

    return begin
