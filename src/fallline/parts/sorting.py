"""Order statistics over a short axis of a large array, by sorting networks without a sort.

Batcher's network for n rows is a fixed list of comparisons (i, j): afterwards row i holds the smaller and row j the
larger one of each pair of entries. Comparisons on which no wanted rank depends are left out, and the rest is one pass
over the data: each column is read once. Floating numbers are compared as integers that are ordered as they are.

Source: K. E. Batcher, *Sorting Networks and their Applications*, AFIPS Spring Joint Computer Conference (1968).

NaN counts as larger than everything, as in `jax.numpy.sort`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.errors import InputError, check_count

__all__ = ["median", "network", "order_statistics", "trimmed_mean"]

Comparison = tuple[int, int]

_INTEGERS = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


@functools.cache
def network(n: int) -> tuple[Comparison, ...]:
    """Batcher's odd–even merge sort for n rows, for any n: the comparisons in order."""
    pairs: list[Comparison] = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return tuple(pairs)


@functools.cache
def _needed(n: int, ranks: frozenset[int], as_set: bool) -> tuple[tuple[int, int, bool, bool], ...]:
    """The comparisons on which the ranks depend, and which of their two results does.

    With `as_set` it does not matter which of the wanted entries has which rank.
    """
    wanted, kept = set(ranks), []
    unordered = set(ranks) if as_set else set()
    for i, j in reversed(network(n)):
        low, high = i in wanted, j in wanted
        if (low or high) and not (i in unordered and j in unordered):
            kept.append((i, j, low, high))
            wanted |= {i, j}
            unordered -= {i, j}
    return tuple(reversed(kept))


def order_statistics(rows: Sequence[Array], ranks: Sequence[int], *, as_set: bool = False) -> list[Array]:
    """The entries of these ranks, 0 for the smallest, among the rows: one array for each rank.

    **Arguments:** `rows` — n floating arrays of one shape; `ranks` — numbers from 0 to n − 1; `as_set` — the entries
    of these ranks, but in any order, which takes fewer comparisons.
    """
    lines = [_ordered(row) for row in rows]
    for i, j, low, high in _needed(len(lines), frozenset(ranks), as_set):
        a, b = lines[i], lines[j]
        if low:
            lines[i] = jnp.minimum(a, b)
        if high:
            lines[j] = jnp.maximum(a, b)
    return [_number(lines[rank], rows[0].dtype) for rank in ranks]


def _ordered(a: Array) -> Array:
    """Integers that are ordered as the numbers are, NaN above all: of these XLA takes minima and maxima far faster."""
    integer = _INTEGERS[a.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(a, integer)
    return jnp.where(jnp.isnan(a), jnp.iinfo(integer).max, _turned(bits))


def _number(bits: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(_turned(bits), dtype)


def _turned(bits: Array) -> Array:
    """Negative numbers the other way round; twice is nothing."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def median(stacked: Float[Array, "n ..."]) -> Float[Array, ...]:
    """The median over the first axis; of an even number the mean of the two in the middle."""
    n = stacked.shape[0]
    low, high = order_statistics([stacked[i] for i in range(n)], ((n - 1) // 2, n // 2))
    return low if n % 2 else (low + high) / 2


def trimmed_mean(stacked: Float[Array, "n ..."], cut: int) -> Float[Array, ...]:
    """The mean over the first axis without the `cut` largest and the `cut` smallest entries of each column.

    **Raises:** `InputError` where nothing is left.
    """
    n = stacked.shape[0]
    check_count("cut", cut, 0)
    if n <= 2 * cut:
        raise InputError("cut", cut, f"less than half of the {n} rows, so that some are left")
    kept = order_statistics([stacked[i] for i in range(n)], range(cut, n - cut), as_set=True)
    return sum(kept[1:], start=kept[0]) / len(kept)
