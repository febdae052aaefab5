"""The handwritten digits of scikit-learn, dealt out to workers, and the small network that learns them."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.dtypes import canonicalize_dtype
from jaxtyping import Array, Float

from ...distributed.sharded import Sharded, shard

__all__ = ["digits", "network"]


def _losses(x: dict[str, Array], batch: tuple[Array, Array]) -> Float[Array, " rows"]:
    pixels, labels = batch
    hidden = jnp.tanh(pixels @ x["w"] + x["b"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ x["v"] + x["c"], labels)


def digits(workers: int, batch_size: int | None, *, by_label: bool = False, dtype: Any = float) -> Sharded:
    """1,797 images of 8 × 8 pixels: dealt out evenly, or sorted by label, so that each worker has few of the digits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = (pixels / 16).astype(canonicalize_dtype(dtype)), labels.astype(np.int32)
    return Sharded(_losses, shard(data, workers, by=labels if by_label else None), batch_size)


def network(seed: int, dtype: Any = float) -> dict[str, Float[np.ndarray, ...]]:
    """A random start of a network 64–32–10, of 2,410 weights."""
    rng = np.random.default_rng(seed)
    x = {
        "w": rng.standard_normal((64, 32)) / math.sqrt(64),
        "b": np.zeros(32),
        "v": rng.standard_normal((32, 10)) / math.sqrt(32),
        "c": np.zeros(10),
    }
    return {name: a.astype(canonicalize_dtype(dtype)) for name, a in x.items()}
