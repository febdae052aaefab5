"""Phase diagrams: how often an experiment succeeds, over two numbers that it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.errors import InputError, check_count

__all__ = ["PhaseDiagram", "phase_diagram"]

Trial = Callable[[Any, Any, Array], Any]


@dataclasses.dataclass(frozen=True)
class PhaseDiagram:
    """Success rates over a grid.

    **Fields:** `first`, `second` — the numbers along the two axes; `rates` — shape (first, second), from 0 to 1;
    `seeds` — trials in each cell; `labels` — names of the axes.
    """

    first: Float[np.ndarray, " a"]
    second: Float[np.ndarray, " b"]
    rates: Float[np.ndarray, "a b"]
    seeds: int
    labels: tuple[str, str]

    def threshold(self, rate: float = 0.5) -> Float[np.ndarray, " b"]:
        """For each number of the second axis the smallest of the first from which on the rate is reached; else NaN."""
        reached = np.flip(np.logical_and.accumulate(np.flip(self.rates >= rate, 0), 0), 0)
        return np.where(reached.any(axis=0), self.first[np.argmax(reached, axis=0)], np.nan)


def phase_diagram(
    trial: Trial,
    first: Sequence[float],
    second: Sequence[float],
    *,
    seeds: int = 20,
    key: Array | None = None,
    labels: tuple[str, str] = ("first", "second"),
    batch: int = 20,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, what: items,
) -> PhaseDiagram:
    """Run `trial(a, b, key) -> success` in each cell of a grid, for each of the seeds.

    The trial is compiled once: `a` and `b` reach it as numbers of dynamic value, so that arrays in it have one
    shape for all cells (give `Dense` rows of zeros for the measurements that a cell does not have).

    **Arguments:**
    - `trial`: traceable; returns True or 1 for a success.
    - `first`, `second`: the numbers along the axes. `seeds`: trials in each cell; all cells share their keys.
    - `batch`: trials that run at once under `vmap`.
    - `track`: goes through an iterable and shows how far it is.

    **Raises:** `InputError` for empty axes or counts below 1.
    """
    check_count("seeds", seeds, 1)
    check_count("batch", batch, 1)
    for name, axis in {"first": first, "second": second}.items():
        if not len(axis):
            raise InputError(name, "an empty axis", "at least one number")
    keys = jax.random.split(jax.random.key(0) if key is None else key, seeds)

    @jax.jit
    def row(a: Array, others: Array, keys: Array) -> Array:
        def cell(b: Array) -> Array:
            return jax.lax.map(lambda key: jnp.asarray(trial(a, b, key), float), keys, batch_size=min(batch, seeds))

        return jnp.mean(jax.lax.map(cell, others), axis=1)

    others = jnp.asarray(second, float)
    rates = [np.asarray(row(a, others, keys)) for a in track(list(jnp.asarray(first, float)), labels[0])]
    return PhaseDiagram(np.asarray(first, float), np.asarray(second, float), np.stack(rates), seeds, labels)
