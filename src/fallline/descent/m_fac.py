"""M-FAC: the gradient times the inverse of the Fisher matrix of the last m gradients, in time and memory O(dm).

Minimizes E f(x) from gradients g, of a minibatch each. F is never formed; with the last m gradients as the rows of G

    F = λ I + (1/m) Gᵀ G,      u = F⁻¹ g  where g has already replaced the oldest row,
    b ← μ b + (1 − μ) u,   x ← x − η b            (b = u for μ = 0)

and u = m Gᵀ M⁻¹ e with M = m λ I + G Gᵀ and e the unit vector of the row of g (`fallline.parts.gram`).

| paper      | here                                    |
|------------|-----------------------------------------|
| η          | `learning_rate`                         |
| m, λ       | `m`, `lam`                              |
| momentum μ | `momentum`                              |
| G, G Gᵀ    | `window.rows`, `window.gram`, the state |

Source: E. Frantar, E. Kurtic and D. Alistarh, *M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information*, NeurIPS 2021 (arXiv 2107.03356), the dynamic algorithm and the optimizer; defaults of the official code.

Guarantee: exact algebra, u is the dense F⁻¹ g. A step costs two passes over the window, O(dm), and O(m³).

Departures: the paper's recursion over D and B (no-pivot LU) is replaced by a Cholesky factor of M, at the same cost;
both give the same u, but with λ = 1e-5 the recursion loses 20% and more of it in float32. In floating point λ is
raised where M has no Cholesky factor (`damped_cholesky`). In the sparse mode all d coordinates are stored.

The divisor is m also while rows are still zero: the first u is m g/(mλ + |g|²), of length about m/|g|, and the
learning rate is tuned to that. Tune λ with it: on small networks λ = 1e-3 with η = 1e-2 was better than the defaults.
Use it where a few hundred gradients fit into memory and curvature matters. The Cholesky factor takes 0.1 ms for
m = 128, 0.4 for 256, 2 for 512 and 10 for 1024 on two cores: more than the two passes below some 10⁴ parameters (for
m = 1024, 10⁵). In float32 keep λ above 1e-6 of |g|²: below, nearly parallel gradients are told apart by rounding only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_count, check_fraction, check_nonnegative, check_positive
from ..core.memory import check_allocation
from ..parts.gram import GramWindow, inverse_of_newest, start_window, write

__all__ = ["m_fac", "scale_by_m_fac"]


class MFacState(NamedTuple):
    """The window; the average b of the updates, of shape (d,), or None; which coordinates move, (d,), or None: all."""

    window: GramWindow
    average: PyTree
    alive: PyTree


def scale_by_m_fac(
    m: int = 1024, lam: float = 1e-5, momentum: float = 0.0, *, sparse: bool = False
) -> optax.GradientTransformation:
    """The update of M-FAC without the learning rate and its sign, to be chained.

    **Arguments:**
    - `m`: gradients in the window, fixed, at most the number of parameters; the state holds m (d + m) numbers, in at
      least float32.
    - `lam`: λ, above 0; `momentum`: μ of the average of the updates, in [0, 1).
    - `sparse`: parameters that are zero in `init` stay as they are, and are no part of F.

    **Raises:** `InputError` for numbers out of range; in `init`, for parameters that are not real, fewer than `m`, or
    so many that the window is larger than memory; in `update`, for gradients that the window is not for.
    """
    check_count("m", m, 1)
    check_positive("lam", lam)
    check_fraction("momentum", momentum)
    m = int(m)
    # Without momentum no average is kept.
    averaged = not isinstance(momentum, float | int) or momentum > 0

    def init(params: PyTree) -> MFacState:
        dtype, d = _checked(params, m)
        alive = _flat(params) != 0 if sparse else None
        return MFacState(start_window(m, d, dtype), jnp.zeros(d, dtype) if averaged else None, alive)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, MFacState]:
        del params
        window, average, alive = state
        g = _fitting(updates, window)
        if alive is not None:
            g = jnp.where(alive, g, 0)
        window = write(window, g)
        u = inverse_of_newest(window, lam)
        if averaged:
            decay = jnp.asarray(momentum, u.dtype)
            u = average = decay * average + (1 - decay) * u
        return trees.unflatten(u, updates), MFacState(window, average, alive)

    return optax.GradientTransformation(init, update)


def m_fac(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    m: int = 1024,
    lam: float = 1e-5,
    momentum: float = 0.0,
    *,
    weight_decay: float = 0.0,
    sparse: bool = False,
) -> optax.GradientTransformation:
    """M-FAC (Frantar, Kurtic and Alistarh 2021), with the official code's defaults.

    **Arguments:** as for `scale_by_m_fac`; `learning_rate` η, a number or a schedule; `weight_decay` adds that multiple
    of the parameters to the gradient before it enters the window, as the official code does.

    **Raises:** `InputError` as `scale_by_m_fac`.
    """
    if not callable(learning_rate):
        check_nonnegative("learning_rate", learning_rate)
    check_nonnegative("weight_decay", weight_decay)
    # Without decay the update does not ask for the parameters.
    decayed = not isinstance(weight_decay, float | int) or weight_decay > 0
    return optax.chain(
        optax.add_decayed_weights(weight_decay) if decayed else optax.identity(),
        scale_by_m_fac(m, lam, momentum, sparse=sparse),
        optax.scale_by_learning_rate(learning_rate),
    )


def _checked(params: PyTree, m: int) -> tuple[Any, int]:
    """The window's dtype and d, of parameters that it fits."""
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError("params", trees.describe(leaf), "real floating arrays")
    dtype, d = trees.real_dtype(params), trees.flat_size(params)
    if leaves and m > d:  # behind a mask there may be nothing
        raise InputError("m", m, f"at most the number of parameters, {d}: a larger window costs more than F itself")
    check_allocation("m", m, m * (d + m) * dtype.itemsize, "a smaller m")
    return dtype, d


def _flat(tree: PyTree) -> Float[Array, " d"]:
    return trees.flatten(tree) if jax.tree.leaves(tree) else jnp.zeros(0)


def _fitting(updates: PyTree, window: GramWindow) -> Float[Array, " d"]:
    """The gradient as one vector, in the window's dtype."""
    d = window.rows.shape[1]
    if trees.flat_size(updates) != d:
        raise InputError("state", f"a window of {d} parameters", f"one of the gradient's {trees.flat_size(updates)}")
    return _flat(updates).astype(window.rows.dtype)
