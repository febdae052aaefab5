"""Simple convex functions h, with their proximal maps; the indicators of simple sets, with their projections.

    h.value(x)        h(x), a scalar
    h(v, step)        argmin_u h(u) + ‖u − v‖² / (2 step)

| class                    | h(x)                               | argmin                                     |
|--------------------------|------------------------------------|--------------------------------------------|
| `Zero()`                 | 0                                  | v                                          |
| `L1(weight)`             | w Σ |x_i|                          | v_i max(0, 1 − step w / |v_i|)             |
| `GroupL2(weight, group)` | w Σ_G ‖x_G‖                        | v_G max(0, 1 − step w / ‖v_G‖)             |
| `Box(low, high)`         | 0 where low ≤ x ≤ high, else ∞     | clip(v, low, high)                         |
| `Ball(radius, center)`   | 0 where ‖x − c‖ ≤ r, else ∞        | c + (v − c) min(1, r / ‖v − c‖)            |
| `Simplex()`              | 0 where x ≥ 0 and Σ x_i = 1, else ∞ | max(0, v − τ), τ such that it sums to 1    |

Points are pytrees: `Ball` and `Simplex` see all their leaves as one vector. Sums are taken in 32 bits at least, and the
result has the dtypes of v. A projection does not depend on `step`. NaN in, NaN out.

Sources: N. Parikh and S. Boyd, *Proximal Algorithms* (2014), Chapter 6; J. Duchi, S. Shalev-Shwartz, Y. Singer and
T. Chandra, *Efficient Projections onto the ℓ1-Ball for Learning in High Dimensions* (2008), Figure 1 (the simplex, as
Optax computes it).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_choice, check_nonnegative, check_positive, is_traced

__all__ = ["L1", "Ball", "Box", "GroupL2", "Prox", "Simplex", "Zero"]


class Prox(eqx.Module):
    """`homogeneous` says that h(s x) = s h(x) for s ≥ 0."""

    homogeneous: ClassVar[bool] = False

    def value(self, x: PyTree) -> Float[Array, ""]:
        """h(x)."""
        raise NotImplementedError

    def __call__(self, v: PyTree, step: ArrayLike) -> PyTree:
        """argmin_u h(u) + ‖u − v‖² / (2 step), in the dtypes of v."""
        raise NotImplementedError


class Zero(Prox):
    """No function at all."""

    homogeneous: ClassVar[bool] = True

    def value(self, x: PyTree) -> Float[Array, ""]:
        return jnp.zeros((), trees.real_dtype(x))

    def __call__(self, v: PyTree, step: ArrayLike) -> PyTree:
        return v


class L1(Prox):
    """w Σ |x_i| over all entries of all leaves; of complex entries the modulus.

    **Raises:** `InputError` for a weight that is not a number of at least 0.
    """

    homogeneous: ClassVar[bool] = True
    weight: Any

    def __init__(self, weight: float):
        check_nonnegative("weight", weight)
        self.weight = weight

    def value(self, x: PyTree) -> Float[Array, ""]:
        return self.weight * _total(x, lambda a: jnp.sum(jnp.abs(a)))

    def __call__(self, v: PyTree, step: ArrayLike) -> PyTree:
        def shrink(a: Array) -> Array:
            return jnp.sign(a) * jnp.maximum(jnp.abs(a) - step * self.weight, 0)

        return _per_leaf(shrink, v)


class GroupL2(Prox):
    """w Σ_G ‖x_G‖ over groups of entries.

    **Arguments:**
    - `weight`: w, at least 0.
    - `group`: `"row"`, where each a[i] along the first axis of a leaf is a group (of a vector each entry, and a scalar
      is one group); or `"leaf"`, where each whole leaf is.

    **Raises:** `InputError` for a weight that is not a number of at least 0, and for another kind of group.
    """

    homogeneous: ClassVar[bool] = True
    weight: Any
    group: Literal["row", "leaf"] = eqx.field(static=True)

    def __init__(self, weight: float, group: Literal["row", "leaf"] = "row"):
        check_nonnegative("weight", weight)
        check_choice("group", group, ("row", "leaf"))
        self.weight, self.group = weight, group

    def _norms(self, a: Array) -> Array:
        """The norm of each group of a leaf, along axes of length 1."""
        axes = tuple(range(1 if self.group == "row" else 0, a.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(a)), axis=axes, keepdims=True))

    def value(self, x: PyTree) -> Float[Array, ""]:
        return self.weight * _total(x, lambda a: jnp.sum(self._norms(a)))

    def __call__(self, v: PyTree, step: ArrayLike) -> PyTree:
        def shrink(a: Array) -> Array:
            norms = self._norms(a)
            return a * jnp.maximum(1 - step * self.weight / jnp.where(norms == 0, 1, norms), 0)

        return _per_leaf(shrink, v)


class _Projection(Prox):
    """The indicator of a set. A point counts as inside up to rounding: within √ε max(1, ‖x‖) of its projection."""

    def project(self, v: PyTree) -> PyTree:
        """The nearest point of the set."""
        raise NotImplementedError

    def value(self, x: PyTree) -> Float[Array, ""]:
        wide = jax.tree.map(_widen, x)
        distance = trees.norm(jax.tree.map(jnp.subtract, wide, self.project(wide)))
        widths = [float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves(x)]
        slack = max(widths, default=0.0) ** 0.5 * jnp.maximum(1, trees.norm(wide))
        # NaN times infinity is NaN: a point with NaN is neither inside nor outside.
        return jnp.where(distance <= slack, 0, distance * jnp.inf)

    def __call__(self, v: PyTree, step: ArrayLike) -> PyTree:
        return jax.tree.map(lambda a, b: a.astype(b.dtype), self.project(jax.tree.map(_widen, v)), v)


class Box(_Projection):
    """low ≤ x ≤ high in each entry, of real points.

    **Arguments:** `low`, `high` — numbers or arrays that broadcast against every leaf, or pytrees of such with the
    structure of the points; infinities are no bound.

    **Raises:** `InputError` where a bound is NaN or `low` is above `high`; with the point, where it is complex or of
    another structure.
    """

    low: PyTree
    high: PyTree

    def __init__(self, low: PyTree = -np.inf, high: PyTree = np.inf):
        trees.check_no_nan("low", low)
        trees.check_no_nan("high", high)
        if not is_traced((low, high)):
            like = high if _is_one(low) else low
            pairs = zip(*(jax.tree.leaves(_spread(n, b, like)) for n, b in (("low", low), ("high", high))), strict=True)
            if any(np.any(np.asarray(a) > np.asarray(b)) for a, b in pairs):
                raise InputError("low", low, f"at most high, {high}, in each entry")
        self.low, self.high = low, high

    def project(self, v: PyTree) -> PyTree:
        if any(jnp.iscomplexobj(a) for a in jax.tree.leaves(v)):
            raise InputError("v", "complex entries", "real ones: a box is an order")
        low, high = _spread("low", self.low, v), _spread("high", self.high, v)
        return jax.tree.map(lambda a, b, c: jnp.clip(a, b, c).astype(a.dtype), v, low, high)


class Ball(_Projection):
    """‖x − c‖ ≤ r in the Euclidean norm of all leaves together.

    **Arguments:** `radius` — r, above 0; `center` — c, with the structure of the points, or None for the origin.

    **Raises:** `InputError` for a radius that is not a positive number, and for NaN in the center; with the point,
    where it has another structure.
    """

    radius: Any
    center: PyTree = None

    def __init__(self, radius: float, center: PyTree = None):
        check_positive("radius", radius)
        trees.check_no_nan("center", center)
        self.radius, self.center = radius, center

    def project(self, v: PyTree) -> PyTree:
        center = None if self.center is None else _spread("center", self.center, v)
        moved = v if center is None else jax.tree.map(jnp.subtract, v, center)
        norm = trees.norm(moved)
        scale = jnp.where(norm > self.radius, self.radius / norm, 1)  # NaN is in the entries themselves
        if center is None:
            return jax.tree.map(lambda a: (a * scale).astype(a.dtype), v)
        # What is inside already stays, to the bit.
        return jax.tree.map(
            lambda a, b, c: jnp.where(norm > self.radius, a * scale + b, c).astype(c.dtype), moved, center, v
        )


class Simplex(_Projection):
    """x ≥ 0 and Σ x_i = 1 over all entries of all leaves together, of real points."""

    def project(self, v: PyTree) -> PyTree:
        if any(jnp.iscomplexobj(a) for a in jax.tree.leaves(v)):
            raise InputError("v", "complex entries", "real ones: the simplex has none")
        return optax.projections.projection_simplex(v) if jax.tree.leaves(v) else v


def _widen(a: Any) -> Array:
    """An array of at least 32 bits."""
    return jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32))


def _per_leaf(fn: Any, v: PyTree) -> PyTree:
    """`fn` of each leaf, computed in at least 32 bits, in the leaf's dtype."""
    return jax.tree.map(lambda a: fn(_widen(a)).astype(jnp.result_type(a)), v)


def _total(x: PyTree, fn: Any) -> Float[Array, ""]:
    """The sum of `fn` over the leaves, in the widest of their real dtypes and at least 32 bits."""
    return sum((fn(_widen(a)) for a in jax.tree.leaves(x)), start=jnp.zeros((), trees.real_dtype(x)))


def _is_one(tree: PyTree) -> bool:
    """Whether a tree is one leaf alone."""
    return jax.tree_util.all_leaves([tree])


def _spread(name: str, value: PyTree, like: PyTree) -> PyTree:
    """One value for each leaf of `like`: a single leaf goes to all."""
    if _is_one(value):
        return jax.tree.map(lambda _: value, like)
    if jax.tree.structure(value) != jax.tree.structure(like):
        got = f"the structure {jax.tree.structure(value)}"
        raise InputError(name, got, f"one array, or {jax.tree.structure(like)} as the point")
    return value
