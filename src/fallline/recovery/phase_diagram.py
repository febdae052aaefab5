"""Phase diagrams: how often an experiment succeeds, over two numbers that it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core import trees
from ..core.errors import InputError, check_count
from ..core.progress import Bar
from ..core.setup import check_key

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
    key: Array | int = 0,
    labels: tuple[str, str] = ("first", "second"),
    progress: bool | str = "auto",
) -> PhaseDiagram:
    """Run `trial(a, b, key) -> success` in each cell of a grid, for each of the seeds.

    The trial is compiled once: `a` and `b` reach it as numbers of dynamic value, so that arrays in it have one
    shape for all cells (give `Dense` rows of zeros for the measurements that a cell does not have). All cells share
    their keys, and those with one `a` run together under `vmap`: let the arrays depend on `a` and the key alone, and
    they are drawn once for all `b`, and their products with many vectors are products of matrices.

    **Arguments:**
    - `trial`: traceable; returns whether it succeeded.
    - `first`, `second`: the numbers along the axes, ascending. `seeds`: trials in each cell.
    - `key`: a key of `jax.random`, or a seed.
    - `labels`: names of the axes.
    - `progress`: a bar on stderr; `"auto"` shows it in a terminal after a second.

    **Raises:** `InputError` for axes that are empty or not ascending, fewer seeds than 1, or a trial that returns
    anything but True or False.
    """
    check_count("seeds", seeds, 1)
    axes = [_axis(name, numbers) for name, numbers in {"first": first, "second": second}.items()]
    keys = jax.random.split(check_key(key, "the trials"), seeds)

    @jax.jit
    def row(a: Array, others: Array, keys: Array) -> Array:
        def once(b: Array, key: Array) -> Array:
            success = jnp.asarray(trial(a, b, key))
            if success.shape or success.dtype != jnp.bool_:
                raise InputError("trial", trees.describe(success), "a function that returns one True or False")
            return success

        return jnp.sum(jax.lax.map(lambda key: jax.vmap(once, (0, None))(others, key), keys), axis=0)

    others, successes = jnp.asarray(axes[1], float), []
    with closing(Bar("phase diagram", len(axes[0]), progress)) as bar:
        for a in axes[0]:
            successes.append(np.asarray(row(jnp.asarray(a, float), others, keys)))
            bar.update(len(successes), f"{labels[0]} {a:g}")
    return PhaseDiagram(axes[0], axes[1], np.stack(successes) / seeds, seeds, labels)


def _axis(name: str, numbers: Sequence[float]) -> Float[np.ndarray, " k"]:
    axis = np.asarray(numbers, np.float64)
    if axis.ndim != 1 or not axis.size or not np.all(np.isfinite(axis)) or np.any(np.diff(axis) <= 0):
        raise InputError(name, numbers, "one or more finite numbers, ascending")
    return axis
