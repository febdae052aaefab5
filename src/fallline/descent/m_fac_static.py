"""M-FAC for a fixed set of gradients: the inverse Fisher matrix that answers queries, and the pruning that asks them.

With m gradients as rows of G, F = λ I + (1/m) Gᵀ G. The paper's vectors v_i = F_{i−1}⁻¹ g_i and q_i = m + ⟨g_i, v_i⟩
give F⁻¹ = I/λ − Σ v_i v_iᵀ/q_i. They are the rows of V = L⁻¹ G but for a factor, v_i/√q_i = V_i/√λ, where L is the
Cholesky factor of m λ I + G Gᵀ; here V is made from L, in products of matrices:

    F⁻¹ x = (x − Vᵀ V x)/λ,   [F⁻¹]_kl = (δ_kl − ⟨V_:k, V_:l⟩)/λ                    O(dm) and O(m), after O(dm²)

In block mode F keeps only its blocks of consecutive coordinates. Optimal brain surgeon: of the weights w drop those of
least saliency, move the others so that the loss changes least, and do so again with new gradients, along a geometric
path of densities from d₀ to d₁:

    ρ_p = w_p² / (2 [F⁻¹]_pp),   w ← w + F⁻¹ t with t_p = −w_p/[F⁻¹]_pp where p is dropped, 0 elsewhere;  w_p ← 0
    density_j = d₀ (d₁/d₀)^{j/n},  j = 1, …, n

| paper             | here                                 |
|-------------------|--------------------------------------|
| m, λ, blocksize   | rows of `gradients`, `lam`, `block`  |
| v_i/√q_i          | `factors` (times √λ)                 |
| n, `nrecomps`     | `recomputations`                     |

Source: E. Frantar, E. Kurtic and D. Alistarh, *M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information*, NeurIPS 2021 (arXiv 2107.03356), the static algorithm and its pruner; schedule of the official code.

Guarantee: exact algebra. The saliency is exact for one weight and a quadratic loss with Hessian F.

Departures: V from a Cholesky factor instead of one gradient after the other. A block of at most m coordinates is
inverted as it is, which is cheaper. In floating point [F⁻¹]_pp is kept at its lower bound 1/F_pp. All gradients of a
window enter, where the official loop leaves the last row zero.

For x in the span of the gradients, such as their mean, (x − Vᵀ V x)/λ cancels: use `inverse_of_combination` of
`fallline.parts.gram`. One pass at density 0.1 is hardly better than the magnitudes: recompute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_count, check_fraction, check_positive, is_traced
from ..core.memory import check_allocation
from ..parts.gram import damped_cholesky

__all__ = ["InverseFisher", "Pruned", "inverse_fisher", "m_fac_prune", "pruning_densities"]


# ---- the static inverse -------------------------------------------------------------------------------------


class InverseFisher(eqx.Module):
    """F⁻¹ of a matrix of gradients, made by `inverse_fisher`.

    `factors`: V of each block, or F⁻¹ itself of a block of at most m coordinates (`dense`); the last block is filled up
    with coordinates that no gradient has. `least`: 1/F_pp.
    """

    factors: Float[Array, "blocks rows size"]
    least: Float[Array, "blocks size"]
    lam: Float[Array, ""]
    d: int = eqx.field(static=True)
    dense: bool = eqx.field(static=True)

    def times(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """F⁻¹ x, in O(dm)."""
        if jnp.shape(x) != (self.d,):
            raise InputError("x", trees.describe(x), f"a vector of {self.d} entries")
        blocks = jnp.pad(x, (0, self.least.size - self.d)).reshape(self.least.shape)
        images = jax.vmap(lambda a, b: jnp.matmul(a, b, precision=_EXACT))(self.factors, blocks)
        if not self.dense:
            back = jax.vmap(lambda a, b: jnp.matmul(b, a, precision=_EXACT))(self.factors, images)
            images = (blocks - back) / self.lam
        return images.reshape(-1)[: self.d]

    def element(self, k: Any, l: Any) -> Float[Array, ""]:
        """[F⁻¹]_kl, in O(m): zero where k and l are in different blocks."""
        for name, index in (("k", k), ("l", l)):
            check_count(name, index, 0)
            if not is_traced(index) and index >= self.d:
                raise InputError(name, index, f"below the number of coordinates, {self.d}")
        size = self.least.shape[1]
        block, row, column = k // size, k % size, l % size
        if self.dense:
            value = self.factors[block, row, column]
        else:
            inner = jnp.dot(self.factors[block, :, row], self.factors[block, :, column], precision=_EXACT)
            value = ((k == l) - inner) / self.lam
        value = jnp.where(k == l, jnp.maximum(value, self.least[block, row]), value)
        return jnp.where(block == l // size, value, 0)

    def diagonal(self) -> Float[Array, " d"]:
        """[F⁻¹]_pp for all p, in O(dm)."""
        if self.dense:
            found = jnp.diagonal(self.factors, axis1=1, axis2=2)
        else:
            found = (1 - jnp.sum(self.factors**2, axis=1)) / self.lam
        return jnp.maximum(found, self.least).reshape(-1)[: self.d]


_EXACT = jax.lax.Precision.HIGHEST


def inverse_fisher(gradients: Float[Array, "m d"], lam: float = 1e-5, block: int | None = None) -> InverseFisher:
    """F⁻¹ of the damped empirical Fisher matrix of m gradients, in O(dm²) time and O(dm) memory.

    **Arguments:** `gradients` — a real matrix, a gradient a row; `lam`: λ, above 0; `block`: coordinates of a block, at
    least 1; by default one block of all.

    **Raises:** `InputError` for anything else, and where the factors are larger than memory.
    """
    if jnp.ndim(gradients) != 2 or 0 in jnp.shape(gradients) or not _real(gradients):
        raise InputError("gradients", trees.describe(gradients), "a real matrix, a gradient a row")
    check_positive("lam", lam)
    m, d = gradients.shape
    size = _block_size(block, d)
    _check_memory(m, d, size, gradients.dtype)
    return _inverse(gradients, lam, size)


@functools.partial(jax.jit, static_argnames="size")
def _inverse(gradients: Array, lam: Any, size: int) -> InverseFisher:
    m, d = gradients.shape
    gradients = gradients.astype(jnp.promote_types(gradients.dtype, jnp.float32))
    lam = jnp.asarray(lam, gradients.dtype)
    blocks = -(-d // size)
    pieces = jnp.pad(gradients, ((0, 0), (0, blocks * size - d))).reshape(m, blocks, size).swapaxes(0, 1)
    factors = jax.vmap(_block_inverse if size <= m else _block_factor, (0, None))(pieces, lam)
    return InverseFisher(factors, 1 / (lam + jnp.mean(pieces**2, axis=1)), lam, d, dense=size <= m)


def _block_factor(g: Float[Array, "m size"], lam: Array) -> Float[Array, "m size"]:
    """V = L⁻¹ G."""
    lower = damped_cholesky(jnp.matmul(g, g.T, precision=_EXACT), len(g) * lam)
    return jax.scipy.linalg.solve_triangular(lower, g, lower=True)


def _block_inverse(g: Float[Array, "m size"], lam: Array) -> Float[Array, "size size"]:
    """(λ I + Gᵀ G/m)⁻¹."""
    lower = damped_cholesky(jnp.matmul(g.T, g, precision=_EXACT) / len(g), lam)
    return jax.scipy.linalg.cho_solve((lower, True), jnp.eye(g.shape[1], dtype=g.dtype))


# ---- the pruner ---------------------------------------------------------------------------------------------


class Pruned(NamedTuple):
    """The parameters, the mask of those that are left (like them, True where left), and the share that was dropped."""

    params: PyTree
    mask: PyTree
    sparsity: float


def m_fac_prune(
    params: PyTree,
    gradients: Callable[[PyTree, Array], PyTree],
    sparsity: float,
    *,
    recomputations: int = 16,
    lam: float = 1e-5,
    block: int | None = None,
    mask: PyTree | None = None,
    prunable: PyTree | None = None,
) -> Pruned:
    """Prune by M-FAC's optimal brain surgeon (Frantar, Kurtic and Alistarh 2021), without training in between.

    **Arguments:**
    - `params`: a trained model's parameters; `gradients`: traceable, `(params, j) -> ` gradients like them with a
      leading axis of m, of single examples or minibatches, asked once before each of the drops j = 0, 1, ….
    - `sparsity`: the share of the prunable weights that shall be zero, in [0, 1); `recomputations`: n, at least 1.
    - `lam`, `block`: as for `inverse_fisher`; blocks are of weights that are left.
    - `mask`: booleans like `params`, True for weights that are left so far; by default all.
    - `prunable`: a boolean for each leaf; by default True for those with two axes or more: biases are not pruned.

    Compiled as a whole, once for each call; inside `jit` and `vmap` too.

    **Raises:** `InputError` for numbers out of range, for a `sparsity` below that of `mask`, for pytrees and
    gradients that do not fit, and where the gradients and their factors are larger than memory.
    """
    check_fraction("sparsity", sparsity)
    check_count("recomputations", recomputations, 1)
    check_positive("lam", lam)
    for leaf in jax.tree.leaves(params):
        if not _real(leaf):
            raise InputError("params", trees.describe(leaf), "real floating arrays")
    chosen = _chosen(params, prunable)
    weights, rest = eqx.partition(params, chosen)
    alive = _alive(params, chosen, mask)
    kept = _kept(int(alive.sum()), alive.size, float(sparsity), int(recomputations))
    size = _block_size(block, alive.size)
    _check_memory(_gradients_of(gradients, params), alive.size, size, trees.real_dtype(weights))

    def drop(carry: tuple[Array, Array], step: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        w, alive = carry
        j, keep = step
        given = gradients(eqx.combine(trees.unflatten(w, weights), rest), j)
        rows = jax.vmap(trees.flatten)(eqx.filter(given, chosen)).astype(w.dtype)
        return surgeon(w, alive, rows, keep, lam, block), None

    @jax.jit
    def run(w: Array, alive: Array) -> tuple[Array, Array]:
        return jax.lax.scan(drop, (jnp.where(alive, w, 0), alive), (jnp.arange(len(kept)), jnp.asarray(kept)))[0]

    w, left = run(trees.flatten(weights), jnp.asarray(alive))
    flags = jax.tree.map(lambda a: jnp.ones(jnp.shape(a), bool), params)
    flags = eqx.combine(trees.unflatten(left, eqx.filter(flags, chosen)), flags)
    return Pruned(eqx.combine(trees.unflatten(w, weights), rest), flags, 1 - int(kept[-1]) / alive.size)


def surgeon(
    w: Float[Array, " d"], alive: Bool[Array, " d"], rows: Float[Array, "m d"], keep: Any, lam: Any, block: int | None
) -> tuple[Float[Array, " d"], Bool[Array, " d"]]:
    """One drop: the `keep` weights of largest saliency are left, and moved to make up for the others."""
    order = None
    if block is not None:  # blocks are of weights that are left: these go first
        order = jnp.argsort(~alive, stable=True)
        w, alive, rows = w[order], alive[order], rows[:, order]
    inverse = _inverse(jnp.where(alive, rows, 0), lam, _block_size(block, w.size))
    diagonal = inverse.diagonal()
    saliency = w**2 / (2 * diagonal)
    saliency = jnp.where(jnp.isnan(saliency), jnp.inf, saliency)  # what is NaN is never dropped
    ranks = jnp.argsort(jnp.argsort(-jnp.where(alive, saliency, -1), stable=True))
    left = alive & (ranks < keep)
    target = jnp.where(alive & ~left, -w / diagonal, 0)
    w = jnp.where(left, w + inverse.times(target), 0)
    if order is not None:
        w, left = jnp.zeros_like(w).at[order].set(w), jnp.zeros_like(left).at[order].set(left)
    return w, left


def pruning_densities(start: float, end: float, recomputations: int) -> Float[np.ndarray, " n"]:
    """d₀ (d₁/d₀)^{j/n} for j = 1, …, n."""
    return start * (end / start) ** (np.arange(1, recomputations + 1) / recomputations)


def _kept(alive: int, total: int, sparsity: float, recomputations: int) -> np.ndarray:
    """How many weights are left after each drop; the last number is that of the sparsity."""
    last = total - math.floor(total * sparsity + 1e-9 * total)
    if last > alive:
        raise InputError("sparsity", sparsity, f"at least that of the mask, {1 - alive / total:.6g}")
    path = np.round(total * pruning_densities(alive / total, last / total, recomputations)).astype(np.int32)
    path[-1] = last
    return path


# ---- what is refused ----------------------------------------------------------------------------------------


def _real(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _block_size(block: int | None, d: int) -> int:
    if block is None:
        return d
    check_count("block", block, 1)
    return min(int(block), d)


def _check_memory(m: int, d: int, size: int, dtype: Any) -> None:
    """The gradients twice, as they are and by blocks, their factors, and a matrix of products for each block."""
    rank = min(m, size)
    numbers = d * (2 * m + rank) + -(-d // size) * rank**2
    check_allocation("gradients", f"[{m},{d}]", numbers * jnp.dtype(dtype).itemsize, "fewer gradients")


def _chosen(params: PyTree, prunable: PyTree | None) -> PyTree:
    """Whether each leaf is pruned."""
    chosen = jax.tree.map(lambda a: jnp.ndim(a) >= 2, params) if prunable is None else prunable
    if jax.tree.structure(chosen) != jax.tree.structure(params) or not any(map(bool, jax.tree.leaves(chosen))):
        raise InputError("prunable", chosen, "True or False for each leaf of params, and True for one of them")
    return jax.tree.map(bool, chosen)


def _alive(params: PyTree, chosen: PyTree, mask: PyTree | None) -> Bool[np.ndarray, " d"]:
    """The mask of the prunable weights as one vector, on the host."""
    weights = eqx.filter(params, chosen)
    if mask is None:
        return np.ones(trees.flat_size(weights), bool)
    shapes = jax.tree.map(jnp.shape, params)
    if is_traced(mask) or jax.tree.map(jnp.shape, mask) != shapes:
        raise InputError("mask", jax.tree.map(trees.describe, mask), "booleans in the shapes of params, not traced")
    flags = np.concatenate([np.ravel(np.asarray(a, bool)) for a in jax.tree.leaves(eqx.filter(mask, chosen))])
    if not flags.any():
        raise InputError("mask", "no weight that is left", "at least one")
    return flags


def _gradients_of(gradients: Callable[[PyTree, Array], PyTree], params: PyTree) -> int:
    """How many gradients there are, of which the shapes must fit."""
    given = jax.eval_shape(gradients, params, jnp.int32(0))
    shapes = [a.shape for a in jax.tree.leaves(given)]
    m = next((shape[0] for shape in shapes if shape), 0)
    fitting = [(m, *jnp.shape(a)) for a in jax.tree.leaves(params)]
    if jax.tree.structure(given) != jax.tree.structure(params) or m == 0 or shapes != fitting:
        found = [trees.describe(a) for a in jax.tree.leaves(given)]
        raise InputError("gradients", found, "a pytree like params with a leading axis of gradients, at least one")
    return m
