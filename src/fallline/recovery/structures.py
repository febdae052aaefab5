"""What a signal is known to be: how a point stands for it, is measured, and may differ without being another.

| structure    | point `x`                    | signal   | the same signal                 |
|--------------|------------------------------|----------|---------------------------------|
| `Vector`     | x, of the operator's shape   | x        | e^{iφ} x, where the loss is phaseless |
| `PSD`        | X (n × r)                    | X Xᵀ     | X Q, Q orthogonal               |
| `TwoFactors` | L (n1 × r), R (n2 × r)       | L Rᵀ     | L G, R G⁻ᵀ                      |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_count, check_nonnegative
from ..parts.linalg import leading_svd
from .operators import Operator

__all__ = ["Factors", "PSD", "Structure", "TwoFactors", "Vector", "product_distance"]


class Factors(NamedTuple):
    """A matrix L Rᵀ by its factors, of shapes (n1, r) and (n2, r)."""

    left: Float[Array, "n1 r"]
    right: Float[Array, "n2 r"]


class Structure(eqx.Module):
    """How a point stands for a signal."""

    def check(self, op: Operator) -> None:
        """Refuse an operator on signals of another kind."""

    def lift(self, x: PyTree) -> Array:
        """The signal."""
        raise NotImplementedError

    def measure(self, op: Operator, x: PyTree) -> Array:
        """A of the signal."""
        return op.mv(self.lift(x))

    def pull(self, op: Operator, x: PyTree, v: Array) -> PyTree:
        """The gradient at `x` of Re⟨v, A(signal)⟩: A* v through the derivative of the lift."""
        raise NotImplementedError

    def penalty(self, x: PyTree) -> tuple[Any, PyTree | None]:
        """A term of the objective that fixes what the signal leaves open, and its gradient."""
        return 0.0, None

    def unit(self, op: Operator, y: Array) -> Any:
        """The scale of the squared loss's curvature, by which step sizes become numbers without a unit."""
        return 1.0

    def tangents(self, x: PyTree, phaseless: bool) -> PyTree | None:
        """Directions along which the signal stays the same, on a leading axis."""
        return None

    def distance(self, x: PyTree, truth: PyTree, phaseless: bool) -> Float[Array, ""]:
        """‖signal(x) − signal(truth)‖ / ‖signal(truth)‖, over the best of the ambiguities."""
        raise NotImplementedError


class Vector(Structure):
    """Any signal of the operator's shape: the point is the signal itself.

    A real point under a complex operator stays real: its gradient is the real part.
    """

    def lift(self, x: Array) -> Array:
        return x

    def pull(self, op: Operator, x: Array, v: Array) -> Array:
        back = op.adjoint(v)
        return (back if jnp.iscomplexobj(x) else jnp.real(back)).astype(x.dtype)

    def tangents(self, x: Array, phaseless: bool) -> Array | None:
        return (1j * x)[None] if phaseless and jnp.iscomplexobj(x) else None

    def distance(self, x: Array, truth: Array, phaseless: bool) -> Float[Array, ""]:
        if phaseless:
            turn = jnp.vdot(x, truth)
            size = jnp.abs(turn)
            x = x * jnp.where(size > 0, turn / jnp.where(size > 0, size, 1), 1)
        return jnp.linalg.norm((x - truth).reshape(-1)) / jnp.linalg.norm(jnp.reshape(truth, -1))


class _LowRank(Structure):
    """What the two low-rank structures share."""

    rank: int = eqx.field(static=True)

    def check(self, op: Operator) -> None:
        if len(op.shape) != 2:
            raise InputError("op", f"an operator on signals of shape {op.shape}", "one on matrices")
        if jnp.issubdtype(op.dtype, jnp.complexfloating):
            raise InputError("op", f"a complex operator, {type(op).__name__}", "a real one: low-rank matrices are real")
        if self.rank > (most := min(op.shape)):
            raise InputError("rank", self.rank, f"at most the smaller dimension, {most}")

    def _largest(self, op: Operator, y: Array) -> Float[Array, ""]:
        """σ₁ of A* y / gain."""
        return _largest_singular_value(op, y)


@eqx.filter_jit
def _largest_singular_value(op: Operator, y: Array) -> Float[Array, ""]:
    times, transposed = op.backproject(y / op.gain)
    return leading_svd(times, transposed, op.shape, 1, jax.random.key(0), trees.real_dtype(y))[1][0]


class PSD(_LowRank):
    """A positive semidefinite matrix X Xᵀ of at most this rank; the point is X, of shape (n, rank)."""

    def __init__(self, rank: int):
        check_count("rank", rank, 1)
        self.rank = int(rank)

    def check(self, op: Operator) -> None:
        super().check(op)
        if op.shape[0] != op.shape[1]:
            raise InputError("op", f"an operator on matrices of shape {op.shape}", "square ones")

    def lift(self, x: Float[Array, "n r"]) -> Float[Array, "n n"]:
        return x @ x.T

    def measure(self, op: Operator, x: Float[Array, "n r"]) -> Array:
        return op.mv_product(x, x)

    def pull(self, op: Operator, x: Float[Array, "n r"], v: Array) -> Float[Array, "n r"]:
        times, transposed = op.backproject(v)
        return times(x) + transposed(x)

    def unit(self, op: Operator, y: Array) -> Any:
        return 2 * self._largest(op, y)

    def tangents(self, x: Float[Array, "n r"], phaseless: bool) -> Array | None:
        skew = _skew(x.shape[1], x.dtype)
        return None if skew is None else jnp.einsum("nr,krs->kns", x, skew)

    def distance(self, x: Float[Array, "n r"], truth: Float[Array, "n r"], phaseless: bool) -> Float[Array, ""]:
        return product_distance(Factors(x, x), Factors(truth, truth))


class TwoFactors(_LowRank):
    """A matrix L Rᵀ of at most this rank; the point is `Factors(L, R)`.

    **Arguments:** `balance` — λ ≥ 0 of the penalty (λ/8) ‖LᵀL − RᵀR‖², which keeps the factors of one size;
    with 0 nothing but the start does.
    """

    balance: Any

    def __init__(self, rank: int, balance: float = 0.5):
        check_count("rank", rank, 1)
        check_nonnegative("balance", balance)
        self.rank, self.balance = int(rank), balance

    def lift(self, x: Factors) -> Float[Array, "n1 n2"]:
        return x.left @ x.right.T

    def measure(self, op: Operator, x: Factors) -> Array:
        return op.mv_product(x.left, x.right)

    def pull(self, op: Operator, x: Factors, v: Array) -> Factors:
        times, transposed = op.backproject(v)
        return Factors(times(x.right), transposed(x.left))

    def penalty(self, x: Factors) -> tuple[Any, Factors]:
        apart = x.left.T @ x.left - x.right.T @ x.right
        gradient = Factors(self.balance / 2 * x.left @ apart, -self.balance / 2 * x.right @ apart)
        return self.balance / 8 * jnp.sum(apart**2), gradient

    def unit(self, op: Operator, y: Array) -> Any:
        return self._largest(op, y)

    def tangents(self, x: Factors, phaseless: bool) -> Factors | None:
        """The rotations; without a balance the rest of GL(r) too, but λ is data: those are left to the certificate."""
        skew = _skew(x.left.shape[1], x.left.dtype)
        if skew is None:
            return None
        return Factors(jnp.einsum("nr,krs->kns", x.left, skew), jnp.einsum("nr,krs->kns", x.right, skew))

    def distance(self, x: Factors, truth: Factors, phaseless: bool) -> Float[Array, ""]:
        return product_distance(x, truth)


def product_distance(x: Factors, truth: Factors) -> Float[Array, ""]:
    """‖L Rᵀ − L* R*ᵀ‖ / ‖L* R*ᵀ‖ in the Frobenius norm, from the factors, exact to rounding.

    The difference is [L, −L*] [R, R*]ᵀ: the norm is that of the product of the two triangular factors.
    """
    left = jnp.concatenate([x.left, -truth.left], axis=1)
    right = jnp.concatenate([x.right, truth.right], axis=1)
    apart = jnp.linalg.qr(left, mode="r") @ jnp.linalg.qr(right, mode="r").T
    whole = jnp.linalg.qr(truth.left, mode="r") @ jnp.linalg.qr(truth.right, mode="r").T
    return jnp.linalg.norm(apart) / jnp.linalg.norm(whole)


def _skew(rank: int, dtype: Any) -> Float[np.ndarray, "k r r"] | None:
    """A basis of the skew-symmetric matrices."""
    pairs = [(i, j) for i in range(rank) for j in range(i)]
    if not pairs:
        return None
    basis = np.zeros((len(pairs), rank, rank), dtype)
    for k, (i, j) in enumerate(pairs):
        basis[k, i, j], basis[k, j, i] = 1, -1
    return basis
