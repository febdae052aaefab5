"""Products with upper triangular matrices, in panels of rows, which leave out most of the zeros.

With three panels a product with a dense matrix takes 2/3 of the flops of the plain one, that of two triangular matrices
14/27; more panels cost more in slices than they save. Matrices below 256 rows are one panel: the plain product.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "times_upper",
    "times_upper_transposed",
    "upper_gram",
    "upper_product",
    "upper_times",
    "upper_transposed_times",
]

_LEAST = 128  # rows of a panel, below which a product is not faster for being smaller


def _panels(n: int) -> list[tuple[int, int]]:
    """First and last row of at most three panels."""
    width = n if n < 2 * _LEAST else max(_LEAST, -(-n // 3))
    return [(i, min(i + width, n)) for i in range(0, n, width)]


def upper_times(q: Float[Array, "n n"], x: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Q X of an upper triangular Q."""
    return jnp.concatenate([q[i:j, i:] @ x[i:] for i, j in _panels(len(q))])


def upper_transposed_times(q: Float[Array, "n n"], x: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Qᵀ X of an upper triangular Q."""
    return jnp.concatenate([q[:j, i:j].T @ x[:j] for i, j in _panels(len(q))])


def times_upper(x: Float[Array, "m n"], q: Float[Array, "n n"]) -> Float[Array, "m n"]:
    """X Q of an upper triangular Q."""
    return jnp.concatenate([x[:, :j] @ q[:j, i:j] for i, j in _panels(len(q))], axis=1)


def times_upper_transposed(x: Float[Array, "m n"], q: Float[Array, "n n"]) -> Float[Array, "m n"]:
    """X Qᵀ of an upper triangular Q."""
    return jnp.concatenate([x[:, i:] @ q[i:j, i:].T for i, j in _panels(len(q))], axis=1)


def upper_product(g: Float[Array, "n n"], q: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """G Q of two upper triangular matrices, which is one too."""
    return jnp.concatenate([jnp.pad(g[i:j, i:] @ q[i:, i:], ((0, 0), (i, 0))) for i, j in _panels(len(q))])


def upper_gram(a: Float[Array, "n m"]) -> Float[Array, "n n"]:
    """A Aᵀ on and above the diagonal, zeros below."""
    return jnp.triu(jnp.concatenate([jnp.pad(a[i:j] @ a[i:].T, ((0, 0), (i, 0))) for i, j in _panels(len(a))]))
