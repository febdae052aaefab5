"""Mirror maps ψ: their gradient and its inverse, the Bregman divergence, and the composite mirror step.

    D(x, y) = ψ(x) − ψ(y) − ⟨∇ψ(y), x − y⟩
    x⁺ = argmin_u h(u) + ⟨g, u⟩ + D(u, x) / η

| class                | ψ(x)                                | convex                   | h with a closed step        |
|----------------------|-------------------------------------|--------------------------|-----------------------------|
| `Euclidean()`        | ½ ‖x‖²                              | 1-strongly in ‖·‖₂       | every `Prox`                |
| `Entropy()`          | Σ x_i log x_i − x_i, on the simplex | 1-strongly in ‖·‖₁       | `Zero`, `Simplex`           |
| `PNorm(p)`           | ‖x‖_p² / (2(p − 1))                 | 1-strongly in ‖·‖_p      | `Zero`, `L1`                |
| `UniformlyConvex(p)` | 2^{q−2} ‖x‖₂^q / q, q = p/(p − 1)   | D(x, y) ≥ ‖x − y‖₂^q / q | also `GroupL2`, `Ball` at 0 |

Both p are in (1, 2].

The step is taken between dual points y = ∇ψ(x):

    y⁺ = prox_{ηh}(y − η g)

This is the definition for `Euclidean`. It holds for the others where ∂h(x) = ∂h(∇ψ(x)), as it does for an h that sees
no more than signs (`L1`) where ∇ψ keeps them, and than directions (`GroupL2`) where it keeps those: then
y − η g − y⁺ ∈ η ∂h(y⁺) is the optimality of x⁺. On the simplex it is x_i⁺ = x_i exp(−η g_i) / Z, and y = log x. Over a
ball at 0 a ψ of the norm alone takes the unconstrained step and projects. Whoever keeps y loses no entry to underflow.

Points are pytrees, seen as one vector. p near 2 is the Euclidean map; p = 1 + 1/log d goes with the simplex or the ℓ1
ball in d dimensions.

Sources: A. Beck and M. Teboulle, *Mirror descent and nonlinear projected subgradient methods for convex optimization*
(2003); C. Gentile, *The robustness of the p-norm algorithms* (2003); S. Shalev-Shwartz and A. Tewari, *Stochastic
Methods for ℓ1-regularized Loss Minimization* (2011) (`PNorm` with `L1`); N. M. Vural, L. Yu, K. Balasubramanian,
S. Volgushev and M. A. Erdogdu, *Mirror Descent Strikes Again: Optimal Stochastic Convex Optimization under Infinite
Noise Variance* (2022) (uniformly convex ψ); Y. Nesterov, *Accelerating the cubic regularization of Newton's method on
convex problems* (2008), Lemma 4 (the constant 2^{2−q} of ‖x‖₂^q / q).
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_nonnegative, is_traced
from .prox import L1, Ball, GroupL2, Prox, Simplex, Zero

__all__ = ["Entropy", "Euclidean", "Mirror", "PNorm", "UniformlyConvex", "check_moment"]


def check_moment(argument: str, value: Any) -> None:
    """Refuse anything but a number above 1 and at most 2 (tracers pass)."""
    check_nonnegative(argument, value)
    if not is_traced(value) and not 1 < float(value) <= 2:
        raise InputError(argument, value, "a number above 1, at most 2")


class Mirror(eqx.Module):
    """`closed` are the h whose composite step has a closed form; `dual` says whether ∇ψ is another point than x."""

    closed: ClassVar[tuple[type[Prox], ...]] = (Prox,)
    dual: ClassVar[bool] = True

    def check(self, prox: Prox) -> None:
        """Refuse an h whose composite step has no closed form."""
        name, known = type(self).__name__, ", ".join(kind.__name__ for kind in self.closed)
        if not isinstance(prox, Prox):
            got = f"the class {prox.__name__}" if isinstance(prox, type) else type(prox).__name__
            raise InputError("prox", got, f"an instance of {known}, from fallline.parts.prox")
        if not isinstance(prox, self.closed):
            raise InputError("prox", type(prox).__name__, f"{known}: the other steps of {name} have no closed form")

    def check_start(self, x: PyTree) -> None:
        """Refuse a point where ψ has no gradient."""
        for leaf in jax.tree.leaves(x):
            if not trees.is_floating(leaf):
                raise InputError("params", trees.describe(leaf), "floating arrays")

    def value(self, x: PyTree) -> Float[Array, ""]:
        """ψ(x)."""
        raise NotImplementedError

    def gradient(self, x: PyTree) -> PyTree:
        """∇ψ(x), in at least 32 bits."""
        raise NotImplementedError

    def inverse(self, y: PyTree) -> PyTree:
        """The x with ∇ψ(x) = y."""
        raise NotImplementedError

    def divergence(self, x: PyTree, y: PyTree) -> Float[Array, ""]:
        """D(x, y)."""
        return self.value(x) - self.value(y) - _dot(self.gradient(y), jax.tree.map(jnp.subtract, x, y))

    def step(self, y: PyTree, gradient: PyTree, step_size: ArrayLike, prox: Prox) -> PyTree:
        """∇ψ(x⁺) of the composite step from y = ∇ψ(x)."""
        return prox(_descend(y, gradient, step_size), step_size)


class Euclidean(Mirror):
    """½ ‖x‖²: the proximal gradient step."""

    dual: ClassVar[bool] = False

    def value(self, x: PyTree) -> Float[Array, ""]:
        return jnp.square(trees.norm(x)) / 2

    def gradient(self, x: PyTree) -> PyTree:
        return _wide(x)

    def inverse(self, y: PyTree) -> PyTree:
        return y

    def divergence(self, x: PyTree, y: PyTree) -> Float[Array, ""]:
        return self.value(jax.tree.map(jnp.subtract, x, y))


class Entropy(Mirror):
    """Negative entropy on the probability simplex over all entries together; y = log x."""

    closed: ClassVar[tuple[type[Prox], ...]] = (Zero, Simplex)

    def check_start(self, x: PyTree) -> None:
        super().check_start(x)
        leaves = jax.tree.leaves(x)
        if any(jnp.iscomplexobj(a) for a in leaves):
            raise InputError("params", "complex entries", "real ones, above 0, that sum to 1")
        if not leaves or is_traced(x) or not all(getattr(a, "is_fully_addressable", True) for a in leaves):
            return
        wide = [np.asarray(a, np.float64) for a in leaves]
        lowest, total = float(np.min([np.min(a) for a in wide])), sum(float(np.sum(a)) for a in wide)
        if not lowest > 0:
            raise InputError("params", f"entries down to {lowest}", "entries above 0: a zero stays zero for ever")
        if not abs(total - 1) <= max(float(jnp.finfo(a.dtype).eps) for a in leaves) ** 0.5:
            raise InputError("params", f"entries that sum to {total:.6g}", "a point of the simplex, of sum 1")

    def value(self, x: PyTree) -> Float[Array, ""]:
        return _total(jax.tree.map(lambda a: jax.scipy.special.xlogy(a, a) - a, _wide(x)))

    def gradient(self, x: PyTree) -> PyTree:
        return jax.tree.map(jnp.log, _wide(x))

    def inverse(self, y: PyTree) -> PyTree:
        return jax.tree.map(jnp.exp, _normalized(y))

    def divergence(self, x: PyTree, y: PyTree) -> Float[Array, ""]:
        return _total(jax.tree.map(lambda a, b: jax.scipy.special.rel_entr(a, b) - a + b, _wide(x), _wide(y)))

    def step(self, y: PyTree, gradient: PyTree, step_size: ArrayLike, prox: Prox) -> PyTree:
        return _normalized(_descend(y, gradient, step_size))


class PNorm(Mirror):
    """‖x‖_p² / (2(p − 1)).

    **Raises:** `InputError` for p outside (1, 2].
    """

    closed: ClassVar[tuple[type[Prox], ...]] = (Zero, L1)
    p: Any

    def __init__(self, p: float):
        check_moment("p", p)
        self.p = p

    def value(self, x: PyTree) -> Float[Array, ""]:
        return jnp.square(_norm(_wide(x), self.p)) / (2 * (self.p - 1))

    def gradient(self, x: PyTree) -> PyTree:
        return jax.tree.map(lambda a: a / (self.p - 1), _duality(_wide(x), self.p))

    def inverse(self, y: PyTree) -> PyTree:
        return jax.tree.map(lambda a: a * (self.p - 1), _duality(y, self.p / (self.p - 1)))


class UniformlyConvex(Mirror):
    """2^{q−2} ‖x‖₂^q / q with q = p/(p − 1): uniformly convex for noise whose p-th moment alone is finite.

    **Raises:** `InputError` for p outside (1, 2].
    """

    closed: ClassVar[tuple[type[Prox], ...]] = (Zero, L1, GroupL2, Ball)
    p: Any

    def __init__(self, p: float):
        check_moment("p", p)
        self.p = p

    def check(self, prox: Prox) -> None:
        super().check(prox)
        if isinstance(prox, Ball) and prox.center is not None:
            raise InputError("prox", "a Ball with a center", "Ball(radius): the step is closed around 0 only")

    def value(self, x: PyTree) -> Float[Array, ""]:
        q = self.p / (self.p - 1)
        return 2 ** (q - 2) * trees.norm(x) ** q / q

    def gradient(self, x: PyTree) -> PyTree:
        q, norm = self.p / (self.p - 1), trees.norm(x)
        return jax.tree.map(lambda a: (2 * norm) ** (q - 2) * a, _wide(x))

    def inverse(self, y: PyTree) -> PyTree:
        q, norm = self.p / (self.p - 1), trees.norm(y)
        scale = (norm / 2 ** (q - 2)) ** (self.p - 1) / jnp.where(norm == 0, 1, norm)
        return jax.tree.map(lambda a: scale * a, y)

    def step(self, y: PyTree, gradient: PyTree, step_size: ArrayLike, prox: Prox) -> PyTree:
        if isinstance(prox, Ball):
            return self.gradient(prox(self.inverse(_descend(y, gradient, step_size)), step_size))
        return super().step(y, gradient, step_size, prox)


def _wide(tree: PyTree) -> PyTree:
    """The leaves as arrays of at least 32 bits."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32)), tree)


def _descend(y: PyTree, gradient: PyTree, step_size: ArrayLike) -> PyTree:
    """y − η g, in the dtypes of y."""
    return jax.tree.map(lambda a, g: (a - step_size * g).astype(a.dtype), y, gradient)


def _total(tree: PyTree) -> Float[Array, ""]:
    return sum((jnp.sum(a) for a in jax.tree.leaves(tree)), start=jnp.zeros((), trees.real_dtype(tree)))


def _dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Re⟨a, b⟩."""
    return _total(jax.tree.map(lambda u, v: jnp.real(jnp.conj(u) * v), a, b))


def _largest(tree: PyTree) -> Float[Array, ""]:
    """The largest entry of real leaves; the leaves must not be empty."""
    return functools.reduce(jnp.maximum, (jnp.max(a) for a in jax.tree.leaves(tree)))


def _normalized(y: PyTree) -> PyTree:
    """y − log Σ exp(y)."""
    if not jax.tree.leaves(y):
        return y
    top = _largest(y)
    log_sum = top + jnp.log(_total(jax.tree.map(lambda a: jnp.exp(a - top), y)))
    return jax.tree.map(lambda a: (a - log_sum).astype(a.dtype), y)


def _norm(x: PyTree, r: Any) -> Float[Array, ""]:
    """‖x‖_r, scaled by the largest entry: powers of a large r would underflow."""
    if not jax.tree.leaves(x):
        return jnp.zeros(())
    top = _largest(jax.tree.map(jnp.abs, x))
    unit = jnp.where(top == 0, 1, top)
    return top * _total(jax.tree.map(lambda a: (jnp.abs(a) / unit) ** r, x)) ** (1 / r)


def _duality(x: PyTree, r: Any) -> PyTree:
    """∇(½ ‖x‖_r²) = ‖x‖_r sign(x) (|x| / ‖x‖_r)^{r−1}."""
    norm = _norm(x, r)
    unit = jnp.where(norm == 0, 1, norm)
    return jax.tree.map(lambda a: (norm * jnp.sign(a) * (jnp.abs(a) / unit) ** (r - 1)).astype(a.dtype), x)
