"""PSGD: SGD with a preconditioner P = QᵀQ that is fitted to curvature within a matrix Lie group.

Minimizes E f(x) from gradients g and, in each step, a pair (v, h) of a random vector v ~ N(0, I) and

    Newton:  h = H v, on the batch of g;      Fisher:  h = g + δ v

Q moves along the relative gradient of E[hᵀPh + vᵀP⁻¹v] (`fallline.parts.lie_groups` has the groups), and then

    x ← x − η clip(QᵀQ g)

so that P tends to |H|⁻¹ = (H²)^{−1/2} (Newton; with a noisy Hessian to (H² + E δH²)^{−1/2}), or to (F + δ²I)^{−1/2}
with F the second moment of g (Fisher).

| paper      | here                       |
|------------|----------------------------|
| μ          | `step`                     |
| N          | `normalizer`               |
| q₀         | `scale`: Q starts as q₀ I  |
| δ          | `damping`                  |
| group of Q | `group`                    |

Source: X.-L. Li, *Learning Preconditioners on Lie Groups*, ICLR 2019, published as *Preconditioner on Matrix Lie Group
for SGD* (arXiv 1809.10232); clipping, defaults and normalizers after the author's code.

Guarantee: Q stays in its group for μ < 1, and the fit does not depend on the coordinates: with B in the group,
(Q B^{−T}, B⁻¹v, Bᵀh) is fitted to Q' B^{−T} where (Q, v, h) is fitted to Q'. None on the minimization.

Departures: none in the fits. The low-rank group is of a later paper. By default N is "second", of the author's later
code, with μ = 0.1; the first code's are "max" with 0.01. μ = 1 is refused: it can make a zero on the diagonal.

Newton's steps are in units of Newton's: learning rates 0.02 to 0.1 (up to 1 without noise). Fisher's are like
Adam's: 0.002 to 0.01, and P is F^{−1/2}, not F⁻¹. Matrices of at most a few thousand rows and columns want
`Kronecker()`, which is also the default for them; everything else is `Diagonal()` by default. For the affine groups,
where a bias is the last row of its matrix, keep them as one array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ..core import trees
from ..core.errors import InputError, check_choice, check_fraction, check_nonnegative, check_positive, is_traced
from ..core.extra import require
from ..parts.lie_groups import NORMALIZERS, Diagonal, Fit, Group, Kronecker, Normalizer
from ..parts.sampling import key_of

__all__ = ["psgd_lie_groups", "scale_by_psgd"]

Curvature = Literal["newton", "fisher"]


class PSGDState(NamedTuple):
    """Steps so far, the key of the next one, and the fit of each block, in at least float32."""

    count: Int[Array, ""]  # type: ignore[assignment]  # the name that Optax's tools look for
    key: Array
    fits: tuple[Fit, ...]


def scale_by_psgd(
    curvature: Curvature = "newton",
    group: Group | Callable[[Array], Group] | None = None,
    step: float = 0.1,
    scale: float | None = 1.0,
    *,
    normalizer: Normalizer = "second",
    damping: float = 1e-3,
    clip: float | None = None,
    probability: float = 1.0,
    whole: bool = False,
    seed: int | Array = 0,
) -> optax.GradientTransformation:
    """clip(P g), without the learning rate and its sign, to be chained.

    **Arguments:**
    - `curvature`: "newton", whose `update` asks the extra arguments `vector` and `hvp`; or "fisher", which asks none.
    - `group`: a group of `fallline.parts.lie_groups`, or a function from a leaf to its group; leaves of three axes and
      more are matrices of their last axis. One group goes to each leaf that it acts on, the others are `Diagonal()`.
    - `step`: μ, in (0, 1); `normalizer`: N.
    - `scale`: q₀ > 0, or None: (‖v‖²/‖h‖²)^{1/4} of the first pair.
    - `damping`: δ ≥ 0 of Fisher's pair; `clip`: the largest norm of P g over all leaves, or None.
    - `probability`: with which a step updates the fit, in (0, 1]. The pair is asked for in every step.
    - `whole`: one group on all leaves as one vector.
    - `seed`: an integer or a key: of Fisher's vectors, of coins.

    **Raises:** `InputError` for numbers out of range; in `init`, for parameters that are not real, and where a group
    does not act on a leaf or is larger than memory; in `update`, for a pair that is missing.
    """
    check_choice("curvature", curvature, ("newton", "fisher"))
    check_choice("normalizer", normalizer, NORMALIZERS)
    check_positive("step", step)
    check_fraction("step", step)
    check_nonnegative("damping", damping)
    check_positive("probability", probability)
    if not is_traced(probability) and float(probability) > 1:
        raise InputError("probability", probability, "a number above 0 and at most 1")
    for name, value in (("scale", scale), ("clip", clip)):
        if value is not None:
            check_positive(name, value)
    if group is not None and not isinstance(group, Group) and not callable(group):
        raise InputError("group", type(group).__name__, "a group such as Kronecker(), or a function of a leaf")
    if whole and not isinstance(group, Group):
        raise InputError("group", group, "a group of vectors such as LowRank(10), with whole=True")
    key = key_of(seed, "PSGD")
    sometimes = not isinstance(probability, int | float) or probability < 1

    def blocks(tree: PyTree) -> list[Array]:
        """The arrays that a group acts on, in at least float32."""
        leaves = jax.tree.leaves(tree)
        if whole:
            return [trees.flatten(tree)] if leaves else []
        return [_as_block(a.astype(jnp.promote_types(a.dtype, jnp.float32))) for a in leaves]

    def init(params: PyTree) -> PSGDState:
        for leaf in jax.tree.leaves(params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise InputError("params", trees.describe(leaf), "real floating arrays")
        found = blocks(params)
        keys = jax.random.split(key, len(found) + 1)
        fits: list[Fit] = []
        for k, block, own in zip(keys[1:], found, _groups(group, found, whole), strict=True):
            own.check(block.shape, block.dtype)
            fits.append(own.init(block.shape, 1.0 if scale is None else scale, block.dtype, k))
        return PSGDState(jnp.zeros((), jnp.int32), keys[0], tuple(fits))

    def apply(updates: PyTree, state: Any, vector: PyTree | None, hvp: PyTree | None) -> tuple[PyTree, PSGDState]:
        gradients = blocks(updates)
        following, draw, coin, inside = jax.random.split(state.key, 4)
        if vector is None:
            vectors = trees.normal_like(draw, gradients)
            images = [g + jnp.asarray(damping, g.dtype) * v for g, v in zip(gradients, vectors, strict=True)]
        else:
            vectors, images = blocks(vector), blocks(hvp)
        own = _groups(group, gradients, whole)
        fits = list(state.fits)
        if scale is None:
            fits = [_started(q, g, v, h, state.count) for q, g, v, h in zip(own, fits, vectors, images, strict=True)]

        def fitted(fits: list[Fit]) -> list[Fit]:
            keys = jax.random.split(inside, len(fits))
            rows = zip(own, fits, vectors, images, keys, strict=True)
            made = [q.update(fit, v, h, step, normalizer, k) for q, fit, v, h, k in rows]
            return [trees.cast_like(after, before) for after, before in zip(made, fits, strict=True)]

        if fits and sometimes:
            fits = jax.lax.cond(jax.random.uniform(coin) < probability, fitted, lambda fits: fits, fits)
        elif fits:
            fits = fitted(fits)
        moves = [q.precondition(fit, g) for q, fit, g in zip(own, fits, gradients, strict=True)]
        if clip is not None and moves:
            norm = trees.norm(moves)
            moves = [jnp.where(norm > clip, clip / norm, 1.0).astype(a.dtype) * a for a in moves]
        count = jnp.asarray(optax.safe_increment(state.count))
        return _restored(moves, updates, whole), PSGDState(count, following, tuple(fits))

    def newton(
        updates: PyTree, state: Any, params: Any = None, *, vector: Any = None, hvp: Any = None, **extra_args: Any
    ) -> tuple[PyTree, PSGDState]:
        del params, extra_args
        require(updates, vector=vector, hvp=hvp)
        return apply(updates, state, vector, hvp)

    def fisher(updates: PyTree, state: Any, params: Any = None, **extra_args: Any) -> tuple[PyTree, PSGDState]:
        del params, extra_args
        return apply(updates, state, None, None)

    return optax.GradientTransformationExtraArgs(init, newton if curvature == "newton" else fisher)


def psgd_lie_groups(
    learning_rate: optax.ScalarOrSchedule,
    curvature: Curvature = "newton",
    group: Group | Callable[[Array], Group] | None = None,
    step: float = 0.1,
    scale: float | None = 1.0,
    *,
    normalizer: Normalizer = "second",
    damping: float = 1e-3,
    clip: float | None = None,
    probability: float = 1.0,
    whole: bool = False,
    seed: int | Array = 0,
) -> optax.GradientTransformation:
    """PSGD (Li 2019): a preconditioner in a matrix Lie group, of Newton or Fisher type.

    **Arguments:** as for `scale_by_psgd`; `learning_rate` η, a number or a schedule.

    **Raises:** `InputError` as `scale_by_psgd`.
    """
    if not callable(learning_rate):
        check_nonnegative("learning_rate", learning_rate)
    return optax.chain(
        scale_by_psgd(
            curvature,
            group,
            step,
            scale,
            normalizer=normalizer,
            damping=damping,
            clip=clip,
            probability=probability,
            whole=whole,
            seed=seed,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def _as_block(leaf: Array) -> Array:
    """A scalar as a vector, and more than two axes as a matrix of the last one."""
    return leaf.reshape(1) if leaf.ndim == 0 else leaf.reshape(-1, leaf.shape[-1]) if leaf.ndim > 2 else leaf


def _groups(group: Any, blocks: list[Array], whole: bool) -> list[Any]:
    """The group of each block."""
    if callable(group) and not isinstance(group, Group):
        return [group(block) for block in blocks]
    wanted: Group = Kronecker() if group is None else group
    if whole or isinstance(wanted, Diagonal):
        return [wanted] * len(blocks)
    axes = 2 if isinstance(wanted, Kronecker) else 1
    return [wanted if block.ndim == axes else Diagonal() for block in blocks]


def _started(group: Group, fit: Fit, v: Array, h: Array, count: Array) -> Fit:
    """Q = (‖v‖²/‖h‖²)^{1/4} I in the first step, the fit as it is in all others."""
    sizes = jnp.sum(v**2), jnp.sum(h**2)
    scale = (sizes[0] / jnp.maximum(sizes[1], jnp.finfo(h.dtype).tiny)) ** 0.25
    return group.rescaled(fit, jnp.where((count == 0) & (sizes[1] > 0), scale, 1).astype(h.dtype))


def _restored(blocks: list[Array], like: PyTree, whole: bool) -> PyTree:
    """Inverse of the blocks, in the shapes and dtypes of the gradient."""
    leaves, structure = jax.tree.flatten(like)
    if not leaves:
        return like
    if whole:
        return trees.unflatten(blocks[0], like)
    back = [b.reshape(jnp.shape(a)).astype(a.dtype) for b, a in zip(blocks, leaves, strict=True)]
    return jax.tree.unflatten(structure, back)
