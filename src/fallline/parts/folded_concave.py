"""Folded concave penalties: SCAD and MCP, with derivatives and proximal maps.

Functions of |t| that rise like λ|t| from 0 and become flat, so that small entries are shrunk and large ones are not:

| class                 | p(t)                                                                       | weakly convex |
|-----------------------|----------------------------------------------------------------------------|---------------|
| `SCAD(lam, gamma, w)` | w λ|t|; from λ on w (2γλ|t| − t² − λ²)/(2(γ − 1)); from γλ on w λ² (γ + 1)/2 | w/(γ − 1)     |
| `MCP(lam, gamma, w)`  | w (λ|t| − t²/(2γ)); from γλ on w γλ²/2                                      | w/γ           |

p(t) + (t − v)²/(2 step) is strongly convex where step times the weak convexity is below 1. Its minimum is then, with
σ = step · w and S(v, κ) = sign(v) max(0, |v| − κ),

    SCAD:  S(v, σλ) for |v| ≤ λ(1 + σ);  ((γ − 1) v − sign(v) σγλ)/(γ − 1 − σ) up to γλ;  then v
    MCP:   S(v, σλ)/(1 − σ/γ) up to γλ;  then v

Sources: J. Fan and R. Li, *Variable Selection via Nonconcave Penalized Likelihood and its Oracle Properties* (2001);
C.-H. Zhang, *Nearly Unbiased Variable Selection under Minimax Concave Penalty* (2010).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_positive, is_traced
from .prox import Prox

__all__ = ["MCP", "SCAD"]


class _Folded(Prox):
    """A penalty of each entry on its own; real points only."""

    least_gamma: ClassVar[float]

    lam: Any
    gamma: Any
    weight: Any

    def __init__(self, lam: float, gamma: float, weight: float = 1.0):
        check_positive("lam", lam)
        check_positive("gamma", gamma)
        check_positive("weight", weight)
        if not is_traced(gamma) and gamma <= self.least_gamma:
            raise InputError("gamma", gamma, f"a number above {self.least_gamma:g}")
        self.lam, self.gamma, self.weight = lam, gamma, weight

    @property
    def weak_convexity(self) -> Any:
        """The least μ with which p + (μ/2) t² is convex."""
        raise NotImplementedError

    def penalty(self, t: Array) -> Array:
        """p of each entry."""
        raise NotImplementedError

    def slope(self, t: Array) -> Array:
        """p′ of each entry; 0 at 0, where every slope from −wλ to wλ is one."""
        raise NotImplementedError

    def minimizer(self, v: Array, sigma: Any) -> Array:
        """The proximal map of each entry at σ = step · w."""
        raise NotImplementedError

    def value(self, x: PyTree) -> Float[Array, ""]:
        _check_real(x)
        return sum(
            (jnp.sum(self.penalty(_wide(a))) for a in jax.tree.leaves(x)), start=jnp.zeros((), trees.real_dtype(x))
        )

    def gradient(self, x: PyTree) -> PyTree:
        """p′ of all entries, in the dtypes of x; see `slope`."""
        _check_real(x)
        return jax.tree.map(lambda a: self.slope(_wide(a)).astype(jnp.result_type(a)), x)

    def __call__(self, v: PyTree, step: ArrayLike) -> PyTree:
        """The proximal map.

        **Raises:** `InputError` for a step at which it has no single answer; of a traced one comes NaN.
        """
        _check_real(v)
        product = step * self.weak_convexity
        if not is_traced(product):
            check_positive("step", step)
            if np.any(product >= 1):
                most = float(np.min(1 / np.asarray(self.weak_convexity)))
                raise InputError("step", step, f"below {most:g}: from there on the subproblem is not strongly convex")
        sound = (product < 1) & (step > 0)  # type: ignore[operator]

        def shrink(a: Any) -> Array:
            return jnp.where(sound, self.minimizer(_wide(a), step * self.weight), jnp.nan).astype(jnp.result_type(a))

        return jax.tree.map(shrink, v)


class SCAD(_Folded):
    """Smoothly clipped absolute deviations, summed over all entries of all leaves.

    **Arguments:** `lam` — λ above 0; `gamma` — γ above 2; `weight` — w above 0.

    **Raises:** `InputError` for numbers out of range; with a point, where it is complex.
    """

    least_gamma: ClassVar[float] = 2.0

    def __init__(self, lam: float, gamma: float = 3.7, weight: float = 1.0):
        super().__init__(lam, gamma, weight)

    @property
    def weak_convexity(self) -> Any:
        return self.weight / (self.gamma - 1)

    def penalty(self, t: Array) -> Array:
        size, lam, gamma = jnp.abs(t), self.lam, self.gamma
        bent = (2 * gamma * lam * size - t**2 - lam**2) / (2 * (gamma - 1))
        flat = lam**2 * (gamma + 1) / 2
        return self.weight * jnp.where(size > gamma * lam, flat, jnp.where(size > lam, bent, lam * size))

    def slope(self, t: Array) -> Array:
        falling = jnp.maximum(self.gamma * self.lam - jnp.abs(t), 0) / (self.gamma - 1)
        return self.weight * jnp.sign(t) * jnp.minimum(self.lam, falling)

    def minimizer(self, v: Array, sigma: Any) -> Array:
        size, lam, gamma = jnp.abs(v), self.lam, self.gamma
        bent = ((gamma - 1) * v - jnp.sign(v) * sigma * gamma * lam) / (gamma - 1 - sigma)
        return jnp.where(size <= lam * (1 + sigma), _soft(v, sigma * lam), jnp.where(size <= gamma * lam, bent, v))


class MCP(_Folded):
    """The minimax concave penalty, summed over all entries of all leaves.

    **Arguments:** `lam` — λ above 0; `gamma` — γ above 1; `weight` — w above 0.

    **Raises:** `InputError` for numbers out of range; with a point, where it is complex.
    """

    least_gamma: ClassVar[float] = 1.0

    def __init__(self, lam: float, gamma: float = 3.0, weight: float = 1.0):
        super().__init__(lam, gamma, weight)

    @property
    def weak_convexity(self) -> Any:
        return self.weight / self.gamma

    def penalty(self, t: Array) -> Array:
        size, lam, gamma = jnp.abs(t), self.lam, self.gamma
        return self.weight * jnp.where(size > gamma * lam, gamma * lam**2 / 2, lam * size - t**2 / (2 * gamma))

    def slope(self, t: Array) -> Array:
        return self.weight * jnp.sign(t) * jnp.maximum(self.lam - jnp.abs(t) / self.gamma, 0)

    def minimizer(self, v: Array, sigma: Any) -> Array:
        shrunk = _soft(v, sigma * self.lam) / (1 - sigma / self.gamma)
        return jnp.where(jnp.abs(v) <= self.gamma * self.lam, shrunk, v)


def _soft(v: Array, threshold: Any) -> Array:
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


def _wide(a: Any) -> Array:
    return jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32))


def _check_real(x: PyTree) -> None:
    if any(jnp.iscomplexobj(a) for a in jax.tree.leaves(x)):
        raise InputError("x", "complex entries", "real ones")
