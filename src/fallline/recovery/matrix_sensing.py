"""Low-rank matrix sensing: a matrix of low rank from few linear measurements of it, by descent on its factors.

Solves, for y = A(M) with M of rank r and E A*A = Id (the operator's `gain` sees to that),

    min ½ ‖A(L Rᵀ) − y‖² + (λ/8) ‖LᵀL − RᵀR‖²       or, for M positive semidefinite,   min ¼ ‖A(X Xᵀ) − y‖²

The start is spectral, from the singular value decomposition U Σ Vᵀ of A*(y) cut to the rank: L = U √Σ, R = V √Σ, and
X = U √Λ₊ from the eigenvalues of the symmetric part. Then, with E = A*(A(L Rᵀ) − y) and B = LᵀL − RᵀR, both at once,

    L ← L − η (E R + (λ/2) L B),   R ← R − η (Eᵀ L − (λ/2) R B);       X ← X − η ½ (E + Eᵀ) X

or one of the other methods of `METHODS`, from the same start.

| paper             | here                                                                |
|-------------------|---------------------------------------------------------------------|
| A, A*             | `op`, an `Operator`                                                 |
| L, R; X           | `Solution.x`: `Factors(L, R)`, or X with `psd`                      |
| η = c/σ₁(A* y)    | `step_size` is c: the problem is in units of the data               |
| λ                 | `balance`                                                           |

| method                 | what                             | update                                            |
|------------------------|----------------------------------|---------------------------------------------------|
| `gradient`             | gradient descent, c = 0.5        | above; O(κ log 1/ε) steps                         |
| `scaled`               | `scaled_gradient`, η = 0.5       | each gradient over the other factor's Gram matrix |
| `projection`           | `singular_value_projection`, 0.75 | X ← H_r(X − μ E); more measurements               |
| `alternating`          | `alternating_least_squares`      | each factor the best for the other one            |
| `lbfgs`                | `optax.lbfgs`, with a line search | quasi-Newton                                      |

Source: Y. Chi, Y. M. Lu and Y. Chen, *Nonconvex Optimization Meets Low-Rank Matrix Factorization: An Overview*, IEEE
TSP 67 (2019), Sections III, V, VIII; the other methods name their own.

Guarantee: where A has the restricted isometry property on matrices of rank a few times r, and from a spectral start,
dist² falls by 1 − c/κ in each step of gradient descent; Gaussian measurements need m of order n r. For a small isometry
constant all local minima are global and all saddles strict, so that small random starts arrive too. The statements are
recalled, not checked against the paper's text; the claims measure them.

Departures: none in the updates. Where λ is not given it is 0.5 from a spectral start with `gradient` and `lbfgs`, and
0 otherwise, where the method keeps the balance itself.

Float32 ends at relative errors around 1e-6. If all measurement matrices are symmetric, L Rᵀ is seen through its
symmetric part alone; a warning says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..core.errors import InputError, check_choice, check_nonnegative, check_positive, is_traced
from ..core.optimizer import optimizer
from ..core.solution import Solution
from ..core.solver import Solver
from ..core.stopping import StoppingRule
from .alternating_least_squares import alternating_least_squares
from .operators import Operator, as_operator
from .problem import Recovery
from .recover import recover
from .scaled_gradient import scaled_gradient
from .singular_value_projection import singular_value_projection
from .starts import random
from .structures import PSD, TwoFactors

__all__ = ["METHODS", "matrix_sensing"]

_ENOUGH = 2.0  # times the degrees of freedom: at 2.05 times nine of ten Gaussian instances are recovered
_SMALL = 1e-2  # standard deviation of a small random start, in units of √σ₁


def _descent(step_size: float = 0.5) -> Solver:
    return optimizer(optax.sgd, learning_rate=step_size)


def _lbfgs() -> Solver:
    return optimizer(optax.lbfgs)


METHODS: dict[str, Callable[..., Solver]] = {
    "gradient": _descent,
    "scaled": scaled_gradient,
    "projection": singular_value_projection,
    "alternating": alternating_least_squares,
    "lbfgs": _lbfgs,
}
"""Solvers by name; the first three have a `step_size`."""

_STEPPING = ("gradient", "scaled", "projection")
_PSD_TOO = ("gradient", "scaled", "lbfgs")
_BALANCED = ("gradient", "lbfgs")


def matrix_sensing(
    op: Any,
    y: Array,
    rank: int,
    *,
    psd: bool = False,
    method: str = "gradient",
    init: str | Callable[[Recovery, Array], PyTree] | PyTree = "spectral",
    step_size: float | None = None,
    balance: float | None = None,
    steps: int = 1000,
    stop: StoppingRule | None | str = "auto",
    key: Array | int = 0,
    **options: Any,
) -> Solution:
    """Recover a matrix of low rank from linear measurements of it (Chi, Lu and Chen 2019).

    **Arguments:**
    - `op`: an `Operator` on matrices; `gaussian_measurements` and `structured_sensing` make some.
    - `y`: the measurements; `rank`: that of the matrix.
    - `psd`: whether it is positive semidefinite.
    - `method`: one of `"gradient"`, `"scaled"`, `"projection"`, `"alternating"`, `"lbfgs"`; the two before the
      last are not for `psd`.
    - `init`: `"spectral"`; `"random"`, small normal entries; a function `(problem, key) -> x0`; or a point.
    - `step_size`: without a unit, of the methods that have one; theirs by default.
    - `balance`: λ; see the module's docstring for the default.
    - `steps`, `stop`, `key`, `options`: as for `recover`.

    **Returns:** the `Solution`; its `x` is `Factors(L, R)`, or the array X.

    **Raises:** `InputError` where an argument cannot be used. Warns where there are fewer than two measurements for
    each degree of freedom, and where all measurement matrices are symmetric.
    """
    check_choice("method", method, METHODS)
    if psd and method not in _PSD_TOO:
        raise InputError("method", repr(method), f"one of {', '.join(_PSD_TOO)} with psd=True")
    if step_size is not None and method not in _STEPPING:
        raise InputError("step_size", step_size, f"None: {method} has no step size")
    if balance is not None and psd:
        raise InputError("balance", balance, "None with psd=True: there is one factor")
    if step_size is not None:
        check_positive("step_size", step_size)
    op = as_operator(op)
    small = isinstance(init, str) and init == "random"
    if balance is None:
        balance = 0.5 if method in _BALANCED and not small else 0.0
    check_nonnegative("balance", balance)
    structure = PSD(rank) if psd else TwoFactors(rank, balance)
    structure.check(op)
    _warn_of_few(op, rank, psd)
    if not psd and _sees_symmetric_part_only(op):
        message = "op: all its measurement matrices are symmetric, so L Rᵀ is found up to its antisymmetric part; "
        warnings.warn(message + "psd=True recovers a positive semidefinite matrix", stacklevel=2)
    solver = METHODS[method]() if step_size is None else METHODS[method](step_size)
    start = small_random if small else init
    return recover(op, y, structure, init=start, solver=solver, steps=steps, stop=stop, key=key, **options)


def _warn_of_few(op: Operator, rank: int, psd: bool) -> None:
    m, (n1, n2) = math.prod(op.out_shape), op.shape
    freedom = n1 * rank - rank * (rank - 1) // 2 if psd else rank * (n1 + n2 - rank)
    if m < _ENOUGH * freedom:
        times = f"y: {m} measurements are {m / freedom:.2g} times the {freedom} degrees of freedom; "
        wanted = f"recovery wants {_ENOUGH:g} times and more (m of order n r in theory, whose constants are not known)"
        warnings.warn(times + wanted, stacklevel=3)


def small_random(problem: Recovery, key: Array) -> PyTree:
    """Independent normal entries of standard deviation 0.01 √σ₁."""
    return random(_SMALL * problem.scale)(problem, key)


def _sees_symmetric_part_only(op: Operator) -> bool:
    """Whether A vanishes on an antisymmetric matrix, drawn at random."""
    if op.shape[0] != op.shape[1] or op.shape[0] == 1 or is_traced(op):
        return False
    draw = jax.random.normal(jax.random.key(0), op.shape, jnp.result_type(op.dtype, float))
    odd, even = (jnp.linalg.norm(op.mv((draw + sign * draw.T) / 2)) for sign in (-1, 1))
    return float(odd) <= 1e-5 * float(even)
