"""A sliding window of m vectors with its Gram matrix, and products with the inverse of the Fisher matrix that it spans.

The rows of G are the last m vectors g₁, …, g_m of d entries each, and K = G Gᵀ. The damped empirical Fisher matrix

    F = λ I + (1/m) Gᵀ G,      with M = m λ I + K, positive definite, of m × m:
    F⁻¹ x = (x − Gᵀ M⁻¹ G x) / λ      for any x (Woodbury),
    F⁻¹ Gᵀ c = m Gᵀ M⁻¹ c             for a combination of the rows (push-through).

The first form subtracts two nearly equal vectors where x is close to the span of the rows; the second does not, so in
float32 it is the one for vectors of the window. The divisor is m also while rows are still zero.

In floating point K is known to ε K only: with nearly parallel rows the products lose accuracy where λ is below about
10 ε |g|², 1e-6 |g|² in float32. Where no Cholesky factor of M exists, M is damped more, by a multiple of ε tr K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = [
    "GramWindow",
    "damped_cholesky",
    "inverse_of_combination",
    "inverse_of_newest",
    "inverse_of_vector",
    "start_window",
    "write",
]

_EXACT = jax.lax.Precision.HIGHEST  # accelerators would round the factors of a product to fewer bits


class GramWindow(NamedTuple):
    """The last m vectors as rows, K of them, and the row that the next vector replaces, the oldest."""

    rows: Float[Array, "m d"]
    gram: Float[Array, "m m"]
    slot: Int[Array, ""]


def start_window(m: int, d: int, dtype: Any) -> GramWindow:
    """A window of zeros."""
    return GramWindow(jnp.zeros((m, d), dtype), jnp.zeros((m, m), dtype), jnp.zeros((), jnp.int32))


def write(window: GramWindow, vector: Float[Array, " d"]) -> GramWindow:
    """Replace the oldest vector: O(dm), one pass over the rows, in place where the window is donated."""
    rows = window.rows.at[window.slot].set(vector)
    products = jnp.matmul(rows, vector, precision=_EXACT)
    gram = window.gram.at[window.slot].set(products).at[:, window.slot].set(products)
    return GramWindow(rows, gram, (window.slot + 1) % len(rows))


def damped_cholesky(gram: Float[Array, "m m"], damping: Any) -> Float[Array, "m m"]:
    """The lower Cholesky factor of K + `damping` I; of more damping, 16 ε tr K · 4ᵏ, where rounding leaves none."""
    identity, trace = jnp.eye(len(gram), dtype=gram.dtype), jnp.trace(gram)

    def factor(extra: Any) -> Array:
        return jnp.linalg.cholesky(gram + (damping + extra) * identity, symmetrize_input=False)

    def failed(carry: tuple[Array, Array]) -> Array:
        extra, lower = carry
        # A NaN or an infinity in K is in its trace, and stays.
        return ~jnp.all(jnp.isfinite(jnp.diagonal(lower))) & jnp.isfinite(trace) & (extra <= trace)

    def again(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        extra = 4 * carry[0]
        return extra, factor(extra)

    start = 4 * jnp.finfo(gram.dtype).eps * trace
    return jax.lax.while_loop(failed, again, (start, factor(0)))[1]


def inverse_of_combination(window: GramWindow, lam: Any, c: Float[Array, " m"]) -> Float[Array, " d"]:
    """F⁻¹ Gᵀ c = m Gᵀ M⁻¹ c: one pass over the rows."""
    return jnp.matmul(len(c) * _solve(window, lam, c), window.rows, precision=_EXACT)


def inverse_of_newest(window: GramWindow, lam: Any) -> Float[Array, " d"]:
    """F⁻¹ g of the vector that was written last: one pass over the rows."""
    m = len(window.rows)
    newest = jax.nn.one_hot((window.slot - 1) % m, m, dtype=window.rows.dtype)
    return inverse_of_combination(window, lam, newest)


def inverse_of_vector(window: GramWindow, lam: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
    """F⁻¹ x = (x − Gᵀ M⁻¹ G x) / λ: two passes over the rows."""
    weights = _solve(window, lam, jnp.matmul(window.rows, x, precision=_EXACT))
    return (x - jnp.matmul(weights, window.rows, precision=_EXACT)) / jnp.asarray(lam, x.dtype)


def _solve(window: GramWindow, lam: Any, c: Float[Array, " m"]) -> Float[Array, " m"]:
    """M⁻¹ c."""
    damping = len(c) * jnp.asarray(lam, window.gram.dtype)
    return jax.scipy.linalg.cho_solve((damped_cholesky(window.gram, damping), True), c)
