"""The recovery problem: a loss between the measurements of a structured signal and the data.

    f(x) = ( loss(A(signal(x)), y) / gain + penalty(x) ) / unit

`gain`, the mean eigenvalue of A*A, and `unit`, the size of the data, make the curvature at the solution of order 1:
a step size of the papers, which scale theirs by λ₀² = mean(y) or σ₁, is a plain number here, and any Optax
transformation has a data-scaled step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.errors import InputError, is_traced
from ..core.problem import Problem
from .losses import Loss, Squared, modulus, times
from .operators import Operator, as_operator
from .structures import PSD, Structure, Vector

__all__ = ["Recovery"]


class Recovery(Problem):
    """A signal from its measurements; the point is what the structure says.

    **Arguments:**
    - `op`: an `Operator`, a matrix of shape (m, n), or a Lineax operator.
    - `y`: real data of the operator's `out_shape`: intensities for phaseless losses.
    - `structure`: what the signal is; any vector by default.
    - `loss`: `Squared()` by default.

    Offers the oracle `measurements`: methods that ask for it find `op`, `y`, `structure` and `loss`.

    **Raises:** `InputError` for data of another shape, not finite, negative where they are intensities, or all zero.
    """

    oracles: ClassVar[frozenset[str]] = Problem.oracles | {"measurements", "signal_gradient"}

    op: Operator
    y: Array
    structure: Structure
    loss: Loss
    gain: Any
    unit: Any
    rho: Any

    def __init__(self, op: Any, y: Any, structure: Structure | None = None, loss: Loss | None = None):
        self.op, self.structure, self.loss = as_operator(op), structure or Vector(), loss or Squared()
        self.structure.check(self.op)
        _check_data(y, self.op, self.loss)
        self.y = y
        self.gain = self.op.gain.astype(trees.real_dtype(y))
        own = self.loss.unit(jnp.asarray(y), self.op.count)
        squared = isinstance(self.loss, Squared)
        self.unit = jnp.asarray(self.structure.unit(self.op, y) if squared else own, trees.real_dtype(y))
        norms = jnp.sqrt(self.op.squared_row_norms()).astype(trees.real_dtype(y))
        self.rho = jnp.where(norms > 0, jnp.sqrt(float(self.op.size)) / jnp.where(norms > 0, norms, 1), 0)

    def _relative(self, x: PyTree, u: Array, rho: Array) -> Array:
        """√n |uᵢ| / (‖aᵢ‖ ‖x‖)."""
        size = trees.norm(x)
        return modulus(u) * (rho / jnp.where(size > 0, size, 1))

    def _sums(self, x: PyTree, op: Operator, y: Array, rho: Array) -> tuple[Float[Array, ""], PyTree]:
        """The loss over measurements `y` by `op`, and its gradient."""
        u = self.structure.measure(op, x)
        relative = self._relative(x, u, rho)
        value, dual = self.loss.value_and_dual(u, y, relative)
        return value, self.structure.pull(op, x, dual)

    def value(self, x: PyTree) -> Float[Array, ""]:
        u = self.structure.measure(self.op, x)
        loss = self.loss.value(u, self.y, self._relative(x, u, self.rho)) / self.gain
        return ((loss + self.structure.penalty(x)[0]) / self.unit).astype(trees.real_dtype(x))

    def value_and_gradient(self, x: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """Value and gradient: one product with A and one with A*. The weights of the loss are held fixed."""
        scale = (self.gain * self.unit).astype(trees.real_dtype(x))
        parts = self.op.parts if self.loss.separable and jax.default_backend() == "cpu" else None
        if parts is None:
            value, gradient = self._sums(x, self.op, self.y, self.rho)
        else:
            # One part after the other: what belongs to it stays in the cache.
            stacked, split = parts
            y, rho = (split(jnp.asarray(a)) for a in (self.y, self.rho))

            def add(sums: PyTree, part: Any) -> tuple[PyTree, None]:
                return jax.tree.map(jnp.add, sums, self._sums(x, *part)), None

            shapes = jax.eval_shape(self._sums, x, *jax.tree.map(lambda a: a[0], (stacked, y, rho)))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (value, gradient), _ = jax.lax.scan(add, zeros, (stacked, y, rho))
        value, gradient = value / self.gain, jax.tree.map(lambda g: times(1 / scale, g), gradient)
        extra, slope = self.structure.penalty(x)
        if slope is not None:
            gradient = jax.tree.map(lambda g, s: g + s / self.unit, gradient, slope)
        gradient = jax.tree.map(lambda g, a: g.astype(a.dtype), gradient, x)
        return ((value + extra) / self.unit).astype(trees.real_dtype(x)), gradient

    def signal_gradient(self, x: PyTree) -> tuple[Float[Array, ""], Array]:
        """The loss over gain and unit, and its gradient in the signal: A* of the weighted residual, a dense array."""
        u = self.structure.measure(self.op, x)
        value, dual = self.loss.value_and_dual(u, self.y, self._relative(x, u, self.rho))
        scale = self.gain * self.unit
        return (value / scale).astype(trees.real_dtype(x)), times(1 / scale, self.op.adjoint(dual))

    @property
    def lower_bound(self) -> float | None:
        return 0.0 if self.loss.bounded else None

    def symmetry(self, x: PyTree) -> PyTree | None:
        return self.structure.tangents(x, self.loss.phaseless)

    def distance(self, x: PyTree, truth: PyTree) -> Float[Array, ""]:
        """How far the signal of `x` is from that of `truth`, relative to it and modulo the ambiguity."""
        return self.structure.distance(x, truth, self.loss.phaseless)

    @property
    def scale(self) -> Any:
        """The size of a point that solves it: `radius` for a vector, √σ₁ for factors."""
        if isinstance(self.structure, Vector):
            return self.radius
        return jnp.sqrt(self.unit / 2 if isinstance(self.structure, PSD) else self.unit)

    @property
    def radius(self) -> Float[Array, ""]:
        """The norm of the signal as its intensities tell it: √(Σ y / gain)."""
        return jnp.sqrt(jnp.sum(jnp.abs(self.y)) / self.gain)


def _check_data(y: Any, op: Operator, loss: Loss) -> None:
    if not hasattr(y, "dtype") or not jnp.issubdtype(y.dtype, jnp.floating):
        raise InputError("y", trees.describe(y), "a real floating array")
    if tuple(np.shape(y)) != tuple(op.out_shape):
        raise InputError("y", trees.describe(y), f"the shape of the operator's measurements, {op.out_shape}")
    trees.check_width("y", y)
    if is_traced(y):
        return
    data = np.asarray(y)
    if not np.all(np.isfinite(data)):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(data))[0])
        raise InputError("y", f"{data[where]} at {list(where)}", "finite numbers; leave out what was not measured")
    if loss.phaseless and np.any(data < 0):
        where = tuple(int(i) for i in np.argwhere(data < 0)[0])
        raise InputError("y", f"{data[where]:g} at {list(where)}", "intensities, which are never negative")
    if not np.any(data):
        raise InputError("y", "all zeros", "data of a signal other than 0")
