"""How far apart two partitions of the same points are: variation of information, adjusted Rand index.

With n_ij the points in part i of the first and part j of the second partition, a_i and b_j its sums:

    VI = H(A) + H(B) − 2 I(A; B)   (in nats),   H(A) = −Σ (a_i/n) log(a_i/n)
    ARI = (Σ C(n_ij, 2) − E) / ((Σ C(a_i, 2) + Σ C(b_j, 2))/2 − E),   E = Σ C(a_i, 2) Σ C(b_j, 2) / C(n, 2)

Sources: M. Meilă, *Comparing clusterings: an information based distance*, Journal of Multivariate
Analysis 98 (2007); L. Hubert and P. Arabie, *Comparing partitions*, Journal of Classification 2 (1985).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from ..core.errors import InputError
from ..core.trees import describe

__all__ = ["adjusted_rand_index", "variation_of_information"]


def variation_of_information(first: Any, second: Any) -> float:
    """The metric VI between two labelings of the same points, in nats: 0 for equal partitions, at most log n.

    **Arguments:** `first`, `second` — one label a point; which labels are used does not matter.

    **Raises:** `InputError` for labels that are not vectors of one length of at least 1.
    """
    table = _table(first, second)
    joint = _entropy(table)
    # I = H(A) + H(B) − H(A, B); the two differences are conditional entropies, never below 0.
    return max(0.0, joint - _entropy(table.sum(axis=1))) + max(0.0, joint - _entropy(table.sum(axis=0)))


def adjusted_rand_index(first: Any, second: Any) -> float:
    """The Rand index corrected for chance: 1 for equal partitions, 0 on average for independent ones.

    **Arguments:** as for `variation_of_information`. Two partitions into one part, or into single
    points, are equal: 1.

    **Raises:** `InputError` for labels that are not vectors of one length of at least 1.
    """
    table = _table(first, second)
    together, in_first, in_second = (_pairs(t) for t in (table, table.sum(axis=1), table.sum(axis=0)))
    possible, mean = _pairs(table.sum()), (in_first + in_second) / 2
    expected = in_first / possible * in_second if possible else 0.0
    return 1.0 if mean == expected else (together - expected) / (mean - expected)


def _table(first: Any, second: Any) -> Int[np.ndarray, "i j"]:
    """The contingency table n_ij."""
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise InputError("labels", f"{describe(a)} and {describe(b)}", "two vectors of one length of at least 1")
    (rows, i), (columns, j) = (np.unique(labels, return_inverse=True) for labels in (a, b))
    table = np.zeros((len(rows), len(columns)), np.int64)
    np.add.at(table, (i, j), 1)
    return table


def _entropy(counts: Int[np.ndarray, ...]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def _pairs(counts: Int[np.ndarray, ...]) -> float:
    return float(np.sum(counts * (counts - 1) / 2))
