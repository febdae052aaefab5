"""Random points."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..core import trees
from ..core.setup import check_key

__all__ = ["key_of", "uniform_ball", "unit_vector"]


def key_of(seed: Any, who: str) -> Array:
    """The key of a seed, which may be an integer array (as Optax's `inject_hyperparams` makes it).

    **Raises:** `InputError` where it is neither a seed nor a key.
    """
    if hasattr(seed, "dtype") and jnp.issubdtype(seed.dtype, jnp.integer) and seed.ndim == 0:
        return jax.random.key(seed)
    return check_key(seed, who)


def unit_vector(key: Array, n: int, dtype: Any) -> Array:
    """A uniform point on the unit sphere of `n` real coordinates, shape `(n,)`."""
    g = jax.random.normal(key, (n,), dtype)
    return g / jnp.linalg.norm(g)


def uniform_ball(key: Array, like: PyTree, radius: Any) -> PyTree:
    """A uniform point in the Euclidean ball: a Gaussian direction times `radius` · U^(1/n).

    **Arguments:** `like` — a pytree whose real coordinates (a complex entry counts twice) span the
    ball; the result has its shapes and dtypes.
    """
    direction, length = jax.random.split(key)
    n, dtype = trees.flat_size(like), trees.real_dtype(like)
    scale = radius * jax.random.uniform(length, (), dtype) ** (1 / n)
    return trees.unflatten(scale * unit_vector(direction, n, dtype), like)
