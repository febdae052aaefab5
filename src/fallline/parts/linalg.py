"""Eigenvalues, singular values and linear systems of matrices that are only known through products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = [
    "Lanczos",
    "conjugate_gradient",
    "dense",
    "extend_lanczos",
    "lanczos_gap",
    "leading_eigenpairs",
    "leading_eigenvector",
    "leading_svd",
    "orthonormal_rows",
    "ritz_vector",
    "start_lanczos",
    "subspace_svd",
    "tridiagonal_eigh",
]

_MOST_BASIS = 2**28  # bytes of Lanczos vectors that are held


class Lanczos(NamedTuple):
    """A Lanczos run so far: the last two basis vectors and the tridiagonal matrix.

    `previous`, `current`: shape `(n,)`. `diagonal`, `offdiagonal`: shape `(capacity,)`, of which the
    first `steps` entries are valid. `alive` is False once an invariant subspace was found.
    """

    previous: Float[Array, " n"]
    current: Float[Array, " n"]
    diagonal: Float[Array, " capacity"]
    offdiagonal: Float[Array, " capacity"]
    steps: Array
    alive: Array


def start_lanczos(start: Float[Array, " n"], capacity: int) -> Lanczos:
    """A run from a unit vector."""
    zeros = jnp.zeros(capacity, start.dtype)
    return Lanczos(jnp.zeros_like(start), start, zeros, zeros, jnp.int32(0), jnp.bool_(True))


def _lanczos_step(product: Callable[[Array], Array], run: Lanczos) -> tuple[Lanczos, Array]:
    """One step of the three-term recurrence; also the basis vector that it used."""
    k = run.steps
    q = run.current
    beta = jnp.where(k > 0, run.offdiagonal[k - 1], 0)
    w = product(q) - beta * run.previous
    alpha = jnp.vdot(q, w)
    w = w - alpha * q
    # A second projection against the two last vectors keeps local orthogonality.
    correction = jnp.vdot(q, w)
    w = w - correction * q - jnp.vdot(run.previous, w) * run.previous
    alpha = alpha + correction
    beta = jnp.linalg.norm(w)
    scale = jnp.maximum(jnp.abs(alpha), jnp.max(jnp.abs(run.diagonal)) + jnp.max(run.offdiagonal))
    alive = beta > 10 * jnp.finfo(w.dtype).eps * scale
    following = jnp.where(alive, w / jnp.where(alive, beta, 1), 0)
    diagonal, offdiagonal = run.diagonal.at[k].set(alpha), run.offdiagonal.at[k].set(jnp.where(alive, beta, 0))
    return Lanczos(q, following, diagonal, offdiagonal, k + 1, alive), q


def extend_lanczos(product: Callable[[Array], Array], run: Lanczos, until: Any) -> Lanczos:
    """Go on until `until` steps, or until the Krylov space is exhausted. `until` is dynamic."""
    return jax.lax.while_loop(lambda r: (r.steps < until) & r.alive, lambda r: _lanczos_step(product, r)[0], run)


def ritz_vector(
    product: Callable[[Array], Array], start: Float[Array, " n"], weights: Float[Array, " capacity"], steps: Any
) -> Array:
    """The combination Σⱼ weights[j] qⱼ of the basis, by running the recurrence a second time.

    Nothing but the last two vectors and the sum is ever held. Shape `(n,)`, normalized.
    """

    def body(carry: tuple[Lanczos, Array]) -> tuple[Lanczos, Array]:
        run, total = carry
        following, q = _lanczos_step(product, run)
        return following, total + weights[run.steps] * q

    carry = (start_lanczos(start, weights.shape[0]), jnp.zeros_like(start))
    _, total = jax.lax.while_loop(lambda c: (c[0].steps < steps) & c[0].alive, body, carry)
    return total / jnp.linalg.norm(total)


def tridiagonal_eigh(run: Lanczos) -> tuple[np.ndarray, np.ndarray, float]:
    """Ritz values in ascending order, their coefficient vectors as columns, and the last β. On the host."""
    import scipy.linalg  # a quarter of a second that not every import of fallline should pay

    k = int(run.steps)
    diagonal = np.asarray(run.diagonal, np.float64)[:k]
    off = np.asarray(run.offdiagonal, np.float64)[:k]
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off[: k - 1])
    return values, vectors, float(off[k - 1])


def leading_eigenvector(
    product: Callable[[Array], Array], start: Float[Array, " n"], steps: int
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """The largest eigenvalue (algebraically) and its vector, as `steps` Lanczos steps from a unit vector tell them.

    Traceable. The basis is held where it is small; a large one is made twice, and nothing but a few vectors is held.
    """
    held = steps * start.size * start.dtype.itemsize <= _MOST_BASIS

    def step(carry: tuple[Lanczos, Array]) -> tuple[Lanczos, Array]:
        run, basis = carry
        following, q = _lanczos_step(product, run)
        return following, basis.at[run.steps].set(q) if held else basis

    carry = (start_lanczos(start, steps), jnp.zeros((steps if held else 0, start.size), start.dtype))
    run, basis = jax.lax.while_loop(lambda c: (c[0].steps < steps) & c[0].alive, step, carry)
    inside = jnp.arange(steps) < run.steps
    off = jnp.where(inside[1:], run.offdiagonal[:-1], 0)
    # Steps that were not taken get a value below all others.
    below = jnp.min(run.diagonal) - 2 * jnp.max(jnp.abs(run.offdiagonal)) - jnp.max(jnp.abs(run.diagonal)) - 1
    matrix = jnp.diag(jnp.where(inside, run.diagonal, below)) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    if not held:
        return values[-1], ritz_vector(product, start, vectors[:, -1], run.steps)
    vector = vectors[:, -1] @ basis
    return values[-1], vector / jnp.linalg.norm(vector)


def leading_eigenpairs(
    product: Callable[[Array], Array], n: int, rank: int, key: Array, dtype: Any, sweeps: int = 20
) -> tuple[Float[Array, " rank"], Float[Array, "n rank"]]:
    """The `rank` largest eigenvalues (algebraically), in descending order, and their vectors as columns.

    `product` takes blocks of shape (n, p). Subspace iteration with 2 `rank` + 10 random vectors, which hold the
    largest eigenvalues of either sign, then Rayleigh–Ritz. Traceable.
    """
    width = min(n, 2 * rank + 10)
    basis = jnp.linalg.qr(jax.random.normal(key, (n, width), dtype))[0]
    basis = jax.lax.fori_loop(0, sweeps, lambda _, q: jnp.linalg.qr(product(q))[0], basis)
    values, vectors = jnp.linalg.eigh(basis.T @ product(basis))
    return values[::-1][:rank], basis @ vectors[:, ::-1][:, :rank]


def leading_svd(
    times: Callable[[Array], Array],
    transposed: Callable[[Array], Array],
    shape: tuple[int, ...],
    rank: int,
    key: Array,
    dtype: Any,
    sweeps: int = 20,
) -> tuple[Float[Array, "n1 rank"], Float[Array, " rank"], Float[Array, "n2 rank"]]:
    """The `rank` largest singular values, in descending order, with their vectors as columns: U, σ, V.

    `times` takes blocks of shape (n2, p), `transposed` of shape (n1, p). Randomized subspace iteration (Halko,
    Martinsson and Tropp 2011, Algorithm 4.4) with 10 more vectors than asked for. Traceable.
    """
    width = min(*shape, rank + 10)
    right = jax.random.normal(key, (shape[1], width), dtype)
    u, values, v = subspace_svd(times, transposed, right, sweeps)
    return u[:, :rank], values[:rank], v[:, :rank]


def subspace_svd(
    times: Callable[[Array], Array], transposed: Callable[[Array], Array], right: Float[Array, "n2 p"], sweeps: int
) -> tuple[Float[Array, "n1 p"], Float[Array, " p"], Float[Array, "n2 p"]]:
    """What subspace iteration from the columns of `right` tells of the p largest singular values: U, σ, V.

    The last columns are rough; p is at most either dimension. Traceable.
    """

    def sweep(_: Any, right: Array) -> Array:
        return jnp.linalg.qr(transposed(jnp.linalg.qr(times(right))[0]))[0]

    right = jax.lax.fori_loop(0, sweeps, sweep, jnp.linalg.qr(right)[0])
    u, values, vt = jnp.linalg.svd(times(right), full_matrices=False)
    return u, values, right @ vt.T


def conjugate_gradient(
    product: Callable[[Array], Array], x: Array, residual: Array, tolerance: Any, most: int
) -> tuple[Array, Int[Array, ""]]:
    """Solve A x = b for a positive definite A from `x`, where the `residual` is b − A x.

    Ends where the residual is at most `tolerance` times the first one, or after `most` products.

    **Returns:** the solution, of the shape of `x`, and the number of products. Traceable.
    """
    dtype = jnp.result_type(x, residual)
    x, residual = x.astype(dtype), residual.astype(dtype)
    first = jnp.vdot(residual, residual)

    def body(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        x, r, direction, squares, steps = carry
        image = product(direction)
        length = squares / jnp.vdot(direction, image)
        x, r = x + length * direction, r - length * image
        after = jnp.vdot(r, r)
        return x, r, r + after / squares * direction, after, steps + 1

    def goes_on(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        return (carry[3] > tolerance**2 * first) & (carry[4] < most)

    x, _, _, _, steps = jax.lax.while_loop(goes_on, body, (x, residual, residual, first, jnp.int32(0)))
    return x, steps


def lanczos_gap(n: int, steps: int, failure_probability: float) -> float:
    """How far, relative to the spectrum's width, the extreme Ritz value may be from the eigenvalue.

    With probability at least 1 − δ over a uniform random start, (θ_min − λ_min)/(λ_max − λ_min) ≤ ε
    with ε = (ln(1.648 √n / δ) / (2k − 1))².

    **Source:** Kuczyński and Woźniakowski (1992), Theorem 4.2, solved for ε; applied to λ_max I − A,
    which spans the same Krylov spaces.
    """
    if steps >= n:
        return 0.0
    return float((np.log(1.648 * np.sqrt(n) / failure_probability) / (2 * steps - 1)) ** 2)


def orthonormal_rows(vectors: Float[Array, "m n"], tolerance: float) -> Float[Array, "r n"]:
    """An orthonormal basis of the row space; directions below `tolerance` × the largest are dropped."""
    _, sizes, basis = jnp.linalg.svd(vectors, full_matrices=False)
    sizes = np.asarray(sizes)
    rank = int(np.sum(sizes > tolerance * np.max(sizes, initial=np.finfo(np.float32).tiny)))
    return basis[:rank]


def dense(product: Callable[[Array], Array], n: int, dtype: Any, batch: int = 64) -> Float[Array, "n n"]:
    """The matrix of a linear map, column by column, `batch` products at a time."""
    columns = jax.lax.map(lambda i: product(jax.nn.one_hot(i, n, dtype=dtype)), jnp.arange(n), batch_size=batch)
    return columns.T
