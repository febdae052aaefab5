"""Low-rank matrix completion: a matrix from some of its entries, by its factors.

Solves, with p̂ = |Ω| / (n1 n2) the share of the entries that are known,

    min (1/2p̂) ‖P_Ω(L Rᵀ − M)‖² + (λ/8) ‖LᵀL − RᵀR‖²,      symmetric: min (1/4p̂) ‖P_Ω(X Xᵀ − M)‖²

from a spectral start, the truncated SVD of the sparse matrix P_Ω(M)/p̂. With E = P_Ω(L Rᵀ − M)/p̂ and
B = LᵀL − RᵀR, gradient descent is

    L ← L − (η/σ₁) (E R + (λ/2) L B),   R ← R − (η/σ₁) (Eᵀ L − (λ/2) R B);      X ← X − (η/σ₁) E X

| `method`                      | step                                                                         |
|-------------------------------|------------------------------------------------------------------------------|
| `gradient`                    | the one above: no projection is needed, rows stay small by themselves        |
| `projected_gradient`          | then row ← row · min(1, c / ‖row‖), c = √(2 μ r σ₁ / n)                      |
| `scaled_gradient`             | each gradient over the other factor's Gram matrix: `scaled_gradient`         |
| `alternating_least_squares`   | ridge regressions, row by row: `completion_least_squares`                    |
| `singular_value_projection`   | on the matrix itself, truncated to the rank: `singular_value_projection`     |

| paper   | here                                                 |
|---------|------------------------------------------------------|
| Ω, M    | `rows`, `columns`, `values`                          |
| η, λ, μ | `step_size` (0.2 with `psd`, else 0.5), `balance`, `incoherence` |

Source: Y. Chi, Y. Lu and Y. Chen, *Nonconvex Optimization Meets Low-Rank Matrix Factorization: An Overview*,
IEEE Transactions on Signal Processing 67 (2019), Section V-C.

Guarantee: for a μ-incoherent matrix with n²p ≳ μ³ r³ n log³ n and constant condition number κ, gradient descent
contracts by 1 − c/κ in the Frobenius, the spectral and the entrywise norm (Ma, Wang, Chi and Chen 2018).

Departures: rows and columns with more than twice the average number of entries are left out of the spectral start, as
Keshavan, Montanari and Oh (2010) do, because they alone would be its singular vectors. Where one singular value of
the data dwarfs the others, the noise of the sampling drowns those in the spectral start: alternating least squares,
which needs no start nearby, begins at random (on a hyperspectral scene it leaves an error of .044, and .81 from the
spectral start).

Alternating least squares takes the fewest steps, and a ridge makes it bear noise and thin rows; scaled gradient
descent is for singular values that spread. In units of the r (n1 + n2 − r) degrees of freedom, of random 400 × 400
matrices of rank 5: at 4 gradient descent completes them, at 3 it diverges with η = 0.5 and nearly arrives with 0.2;
singular value projection diverges at 6 and completes them at 10.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.errors import InputError, check_choice, check_nonnegative, check_positive
from ..core.loop import minimize
from ..core.optimizer import optimizer
from ..core.setup import check_key
from ..core.solution import Solution
from ..core.solver import Solver
from ..core.stopping import StoppingRule
from .completion_least_squares import completion_least_squares
from .operators import Entries
from .problem import Recovery
from .recover import begin, default_stop
from .scaled_gradient import scaled_gradient
from .singular_value_projection import singular_value_projection
from .starts import random, spectral
from .structures import PSD, Factors, TwoFactors

__all__ = ["METHODS", "completion_problem", "matrix_completion", "observed", "trimmed_spectral"]

METHODS = (
    "gradient",
    "projected_gradient",
    "scaled_gradient",
    "alternating_least_squares",
    "singular_value_projection",
)
"""The methods of `matrix_completion`, by name."""

_TWO_FACTORS = ("alternating_least_squares", "singular_value_projection")
_ENOUGH, _ENOUGH_TO_PROJECT = 4.0, 10.0  # times the degrees of freedom: measured, see above
_HEAVY = 2.0  # times the average number of entries


def observed(
    matrix: Any,
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Float[np.ndarray, " m"], tuple[int, int]]:
    """Rows, columns and values of the known entries, and the shape: `matrix_completion(*observed(matrix), rank)`.

    **Arguments:** `matrix` — an array of shape (n1, n2) with NaN for what is missing, or one of `scipy.sparse`: what
    it stores is known, zeros too.

    **Raises:** `InputError` for anything else.
    """
    if hasattr(matrix, "tocoo"):
        found = matrix.tocoo()
        rows, columns = found.row, found.col
        values, shape = found.data, found.shape
    else:
        if np.ndim(matrix) != 2 or not trees.is_floating(matrix) or np.iscomplexobj(matrix):
            raise InputError(
                "matrix", trees.describe(matrix), "a real floating array of shape (n1, n2), or a sparse one"
            )
        dense = np.asarray(matrix)
        rows, columns = np.nonzero(~np.isnan(dense))
        values, shape = dense[rows, columns], dense.shape
    return rows.astype(np.int32), columns.astype(np.int32), values, (int(shape[0]), int(shape[1]))


def completion_problem(
    rows: Any, columns: Any, values: Any, shape: tuple[int, int], rank: int, *, psd: bool = False, balance: float = 0.5
) -> Recovery:
    """The problem that `matrix_completion` solves, its entries sorted by rows; see there for the arguments."""
    shape = (int(shape[0]), int(shape[1]))
    if not trees.is_floating(values) or np.iscomplexobj(values) or np.ndim(values) != 1:
        raise InputError("values", trees.describe(values), "a real floating array of shape (m,)")
    trees.check_width("values", values)
    structure = PSD(rank) if psd else TwoFactors(rank, balance)
    i, j, v = (np.asarray(a) for a in (rows, columns, values))
    if not i.shape == j.shape == v.shape:
        raise InputError("values", trees.describe(values), f"as many as rows and columns: {len(i)} and {len(j)}")
    bad = np.flatnonzero(~np.isfinite(v))
    if len(bad):
        got = f"{v[bad[0]]} at the entry ({i[bad[0]]}, {j[bad[0]]})"
        raise InputError("values", got, "finite numbers; leave out what was not observed")
    if psd:
        structure.check(Entries(i, j, shape))  # before anything is mirrored
        i, j, v = _mirrored(i, j, v, shape[0])
    order = np.lexsort((j, i))
    op = Entries(i[order], j[order], shape)
    structure.check(op)
    _warn(i, j, shape, rank, psd)
    return Recovery(op, jnp.asarray(v[order]), structure)


def matrix_completion(
    rows: Int[Array | np.ndarray, " m"],
    columns: Int[Array | np.ndarray, " m"],
    values: Float[Array | np.ndarray, " m"],
    shape: tuple[int, int],
    rank: int,
    *,
    method: str | Solver = "gradient",
    psd: bool = False,
    step_size: float | None = None,
    balance: float = 0.5,
    ridge: float = 0.0,
    incoherence: float | None = None,
    init: Any = "auto",
    steps: int = 1000,
    stop: StoppingRule | None | str = "auto",
    key: Array | int = 0,
    **options: Any,
) -> Solution:
    """Complete a matrix of low rank from some of its entries.

    **Arguments:**
    - `rows`, `columns`, `values`: the known entries, each once, of a matrix of this `shape`; see `observed`.
    - `rank`: of the matrix that is looked for.
    - `method`: one of `METHODS`, or any solver for the problem.
    - `psd`: the matrix is X Xᵀ. Entries of either triangle or of both are mirrored and counted once.
    - `step_size`: η, without a unit; by default the method's own.
    - `balance`: λ of the penalty on LᵀL − RᵀR, for the two gradient methods on `Factors`.
    - `ridge`: of alternating least squares, in the units of the data; needed where a row has fewer entries than `rank`.
    - `incoherence`: μ ≥ 1 of projected gradient descent; by default that of the start.
    - `init`: `"spectral"`, `"random"` (at the data's scale), a function `(problem, key) -> x0`, or a point. `"auto"` is
      random for alternating least squares, else spectral.
    - `steps`, `stop`, `options`: of `minimize`; `"auto"` is a gradient of 1e-8 times the size of the factors.
    - `key`: for the start.

    **Returns:** the `Solution` of `minimize`; `x` is `Factors(L, R)`, with `psd` X.

    **Warns:** where a row or column has no entry, and where there are fewer than four times as many entries as degrees
    of freedom (ten times for singular value projection).

    **Raises:** `InputError` for entries that cannot be used, a rank above the smaller dimension, and a method that does
    not fit.
    """
    known = isinstance(method, str)
    if known:
        check_choice("method", method, METHODS)
    check_nonnegative("ridge", ridge)
    if psd and method in _TWO_FACTORS:
        raise InputError("psd", True, f"False with {method}, whose point is two factors")
    exact = known and method in (*_TWO_FACTORS, "scaled_gradient")
    problem = completion_problem(rows, columns, values, shape, rank, psd=psd, balance=0.0 if exact else balance)
    drawn = check_key(key, "the start")
    if isinstance(init, str) and init == "auto":
        init = "random" if method == "alternating_least_squares" else "spectral"
    if isinstance(init, str) and init == "random":  # factors of the size that the data tell
        init = random(float(jnp.sqrt(problem.unit / math.sqrt(problem.op.size))))
    x0 = begin(problem, trimmed_spectral if isinstance(init, str) and init == "spectral" else init, drawn)
    solver = _solver(method, problem, x0, step_size, ridge, incoherence) if isinstance(method, str) else method
    rule = default_stop(problem) if isinstance(stop, str) and stop == "auto" else stop
    return minimize(problem, x0, solver, steps=steps, stop=rule, key=drawn, **options)


def _solver(
    method: str, problem: Recovery, x0: PyTree, step_size: float | None, ridge: float, incoherence: float | None
) -> Solver:
    if method == "scaled_gradient":
        return scaled_gradient() if step_size is None else scaled_gradient(step_size)
    if method == "singular_value_projection":
        assert isinstance(problem.structure, TwoFactors)
        freedom = _freedom(problem.op.shape, problem.structure.rank, False)
        _warn_of_few(len(problem.y), freedom, _ENOUGH_TO_PROJECT, 4)
        return singular_value_projection() if step_size is None else singular_value_projection(step_size)
    if method == "alternating_least_squares":
        assert isinstance(problem.op, Entries) and isinstance(problem.structure, TwoFactors)
        thin = min(int(d.min()) for d in _degrees(problem.op))
        if ridge == 0 and thin < problem.structure.rank:
            got = f"0 with {thin} entries in a row or column"
            raise InputError("ridge", got, f"above 0, or at least {problem.structure.rank} entries in each")
        return completion_least_squares(ridge)
    rate = step_size if step_size is not None else (0.2 if isinstance(problem.structure, PSD) else 0.5)
    check_positive("step_size", rate)
    if method == "gradient":
        return optimizer(optax.sgd, learning_rate=rate)
    most = jax.tree.map(lambda factor: _most(factor, incoherence), x0)
    left, right = most if isinstance(most, Factors) else (most, None)
    return optimizer(_projected_sgd, learning_rate=rate, left=left, right=left if right is None else right)


def _most(factor: Float[Array, "n r"], incoherence: float | None) -> Float[Array, ""]:
    """c = √(2 μ r / n) ‖F‖; by default μ = n max ‖Uᵢ‖² / r, U an orthonormal basis of F's columns."""
    n, r = factor.shape
    if incoherence is None:
        basis = jnp.linalg.qr(factor)[0]
        mu: Any = n / r * jnp.max(jnp.sum(basis**2, axis=1))
    else:
        check_positive("incoherence", incoherence)
        mu = incoherence
    return jnp.sqrt(2 * mu * r / n) * jnp.linalg.norm(factor, ord=2)


def _projected_sgd(learning_rate: Any, left: Any, right: Any) -> optax.GradientTransformation:
    """Gradient steps after each of which no row of a factor is longer than `left`, or `right`."""

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        def step(gradient: Array, factor: Array, most: Any) -> Array:
            moved = factor - learning_rate * gradient
            lengths = jnp.linalg.norm(moved, axis=1, keepdims=True)
            clipped = moved * jnp.where(lengths > most, most / jnp.where(lengths > 0, lengths, 1), 1)
            return (clipped - factor).astype(factor.dtype)

        most = Factors(left, right) if isinstance(params, Factors) else left
        return jax.tree.map(step, updates, params, most), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def trimmed_spectral(problem: Recovery, key: Array) -> PyTree:
    """The spectral start without rows and columns of more than twice the average number of entries."""
    assert isinstance(problem.op, Entries)
    kept = True
    for degrees, indices in zip(_degrees(problem.op), (problem.op.rows, problem.op.columns), strict=True):
        kept = kept & (degrees <= _HEAVY * degrees.mean())[np.asarray(indices)]
    if np.all(kept):
        return spectral(problem, key)
    return spectral(eqx.tree_at(lambda p: p.y, problem, jnp.where(kept, problem.y, 0)), key)


def _degrees(op: Entries) -> tuple[Int[np.ndarray, " n1"], Int[np.ndarray, " n2"]]:
    """The number of entries in each row, and in each column."""
    n1, n2 = op.shape
    return np.bincount(np.asarray(op.rows), minlength=n1), np.bincount(np.asarray(op.columns), minlength=n2)


def _mirrored(i: np.ndarray, j: np.ndarray, v: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both (i, j) and (j, i) of each entry, once."""
    low, high = np.minimum(i, j).astype(np.int64), np.maximum(i, j)
    flat, first, which = np.unique(low * n + high, return_index=True, return_inverse=True)
    apart = np.flatnonzero(v != v[first][which])
    if len(apart):
        a, b = int(i[apart[0]]), int(j[apart[0]])
        raise InputError("values", f"different ones at ({a}, {b}) and ({b}, {a})", "equal ones: psd=True is symmetric")
    low, high, v = flat // n, flat % n, v[first]
    off = low != high
    return np.concatenate([low, high[off]]), np.concatenate([high, low[off]]), np.concatenate([v, v[off]])


def _warn(i: np.ndarray, j: np.ndarray, shape: tuple[int, int], rank: int, psd: bool) -> None:
    n1, n2 = shape
    for name, indices, n in (("rows", i, n1), ("columns", j, n2)):
        empty = np.flatnonzero(np.bincount(indices, minlength=n) == 0)
        if len(empty):
            what = f"{len(empty)} {name} without an entry (the first is {empty[0]}): nothing tells what they are"
            warnings.warn(what, stacklevel=4)
    _warn_of_few(int(np.sum(i <= j)) if psd else len(i), _freedom(shape, rank, psd), _ENOUGH, 5)


def _freedom(shape: tuple[int, ...], rank: int, psd: bool) -> int:
    """Degrees of freedom of a matrix of this rank."""
    return shape[0] * rank - rank * (rank - 1) // 2 if psd else rank * (sum(shape) - rank)


def _warn_of_few(m: int, freedom: int, enough: float, stacklevel: int) -> None:
    if m < enough * freedom:
        times = f"{m} entries are {m / freedom:.2g} times the {freedom} degrees of freedom"
        message = f"{times}; the method wants at least {enough:g} times (in theory n²p ≳ μ³ r³ n log³ n)"
        warnings.warn(message, stacklevel=stacklevel)
