"""Matrix Lie groups for preconditioners P = QᵀQ, and the fit of Q to pairs (v, h) of a random vector and its image.

Q minimizes c(P) = E[hᵀPh + vᵀP⁻¹v] = E[‖Qh‖² + ‖Q^{-T}v‖²] within its group, by steps along the relative gradient,

    a = Qh,   b = Q^{-T}v,   Q ← Q − (μ/N) proj(aaᵀ − bbᵀ) Q

where proj is the projection on the group's Lie algebra, so that Q stays in the group. With h = Hv, P becomes |H|⁻¹.

| class                        | Q                                                      | numbers of n (M × N) |
|------------------------------|--------------------------------------------------------|----------------------|
| `Dense()`                    | upper triangular                                       | n²                   |
| `Diagonal(sign)`             | diagonal                                               | n                    |
| `LowRank(rank)`              | (I + UVᵀ) diag(d)                                      | (2r + 1) n           |
| `SparseLU(rank)`             | LU, both dense in r columns and rows, diagonal beyond  | (2r + 2) n           |
| `Kronecker(left, right)`     | Q_r ⊗ Q_l on matrices: P G = Q_lᵀQ_l G Q_rᵀQ_r         | M² + N² for "dense"  |
| `scan()`, `scaw()`           | `Kronecker("normalize", "diagonal")`, `("dense", "diagonal")` | 2M + N, M² + N |

A side of `Kronecker` is "dense" (upper triangular), "diagonal", or "normalize": diag(α) with a last column, which acts
on inputs whose last row belongs to a constant 1, as a bias has it.

`normalizer` is N: "max", the largest entry of the projected gradient (the first official code); "first", a lower bound
of its spectral norm; "second", ‖a‖² + ‖b‖² and its kin, which do not vanish at the fit. With the first two the steps
never become short, and the fit ends at a distance of the order μ. `SparseLU` wants μ of at most 0.1.

Source: X.-L. Li, *Preconditioner on Matrix Lie Group for SGD*, ICLR 2019 (arXiv 1809.10232), the groups but for the
low-rank one, which is X.-L. Li (2022), *Black Box Lie Group Preconditioners for SGD*; the normalizers are those of the
author's code.
"""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.errors import InputError, check_choice, check_count
from ..core.memory import check_allocation
from .triangular import (
    times_upper,
    times_upper_transposed,
    upper_gram,
    upper_product,
    upper_times,
    upper_transposed_times,
)

__all__ = ["Dense", "Diagonal", "Fit", "Group", "Kronecker", "LowRank", "Normalizer", "SparseLU", "scan", "scaw"]

Normalizer = Literal["max", "first", "second"]
NORMALIZERS = ("max", "first", "second")


Fit = tuple[Array, ...]
"""The factors of Q."""


class Group(eqx.Module):
    """A group that acts on arrays of one shape: vectors, or matrices for `Kronecker`. Everything is traceable."""

    def check(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Refuse a shape that the group does not act on, or one whose Q is larger than memory."""
        if len(shape) != 1:
            raise InputError("group", type(self).__name__, f"one for arrays of shape {shape}: it acts on vectors")

    def init(self, shape: tuple[int, ...], scale: Any, dtype: Any, key: Array) -> Fit:
        """Q = `scale` · I."""
        raise NotImplementedError

    def update(self, fit: Fit, v: Array, h: Array, step: Any, normalizer: Normalizer, key: Array) -> Fit:
        """One step of the fit; `step` is μ in (0, 1), `key` is for groups that choose at random."""
        raise NotImplementedError

    def times(self, fit: Fit, x: Array) -> Array:
        """Q x."""
        raise NotImplementedError

    def precondition(self, fit: Fit, g: Array) -> Array:
        """P g = QᵀQ g."""
        raise NotImplementedError

    def rescaled(self, fit: Fit, scale: Any) -> Fit:
        """The fit of `scale` · Q."""
        raise NotImplementedError


class _Rate:
    """μ/N, from the three sizes that N may be."""

    def __init__(self, step: Any, normalizer: Normalizer):
        self.step, self.which = step, NORMALIZERS.index(normalizer)

    def __call__(self, largest: Array, spectral: Array, bound: Array) -> Array:
        size = (largest, spectral, bound)[self.which]
        return self.step / jnp.maximum(size, jnp.finfo(size.dtype).tiny)


def _spectral(matrix: Float[Array, "m n"]) -> Array:
    """A lower bound of the spectral norm, at least the largest row norm and the largest entry: one power step."""
    rows = jnp.linalg.norm(matrix, axis=1)
    best = jnp.argmax(rows)
    unit = matrix[best] / jnp.maximum(rows[best], jnp.finfo(matrix.dtype).tiny)
    return jnp.maximum(rows[best], jnp.linalg.norm(matrix @ unit))


def _symmetric_spectral(upper: Float[Array, "n n"]) -> Array:
    """`_spectral` of the symmetric matrix of which `upper` is the upper triangle."""
    squares, diagonal = jnp.square(upper), jnp.diagonal(upper)
    rows = jnp.sqrt(jnp.sum(squares, axis=0) + jnp.sum(squares, axis=1) - jnp.square(diagonal))
    best = jnp.argmax(rows)
    row = (upper[best] + upper[:, best]).at[best].set(diagonal[best])
    unit = row / jnp.maximum(rows[best], jnp.finfo(upper.dtype).tiny)
    return jnp.maximum(rows[best], jnp.linalg.norm(upper @ unit + unit @ upper - diagonal * unit))


def _lower(factor: Array, right: Array) -> Array:
    """Q^{-T} x of an upper triangular Q: forward substitution."""
    return jax.scipy.linalg.solve_triangular(factor, right, trans=1)


# ---- vectors ---------------------------------------------------------------------------------------------------


class Dense(Group):
    """Upper triangular Q: any positive definite P."""

    def check(self, shape: tuple[int, ...], dtype: Any) -> None:
        super().check(shape, dtype)
        check_allocation(
            "group", f"Dense() on {shape[0]} numbers", shape[0] ** 2 * jnp.dtype(dtype).itemsize, "LowRank"
        )

    def init(self, shape: tuple[int, ...], scale: Any, dtype: Any, key: Array) -> Fit:
        return (scale * jnp.eye(shape[0], dtype=dtype),)

    def update(self, fit: Fit, v: Array, h: Array, step: Any, normalizer: Normalizer, key: Array) -> Fit:
        (q,), rate_of = fit, _Rate(step, normalizer)
        a, b = q @ h, _lower(q, v)
        gradient = jnp.triu(jnp.outer(a, a) - jnp.outer(b, b))
        rate = rate_of(jnp.max(jnp.abs(gradient)), _spectral(gradient), a @ a + b @ b)
        return (q - rate * gradient @ q,)

    def times(self, fit: Fit, x: Array) -> Array:
        return fit[0] @ x

    def precondition(self, fit: Fit, g: Array) -> Array:
        return fit[0].T @ (fit[0] @ g)

    def rescaled(self, fit: Fit, scale: Any) -> Fit:
        return (scale * fit[0],)


class Diagonal(Group):
    """Diagonal Q, of arrays of any shape; with `sign` its steps are q ← q (1 − μ sign(|qh| − |v/q|))."""

    sign: bool = eqx.field(static=True, default=False)

    def check(self, shape: tuple[int, ...], dtype: Any) -> None:
        pass

    def init(self, shape: tuple[int, ...], scale: Any, dtype: Any, key: Array) -> Fit:
        return (jnp.full(shape, scale, dtype),)

    def update(self, fit: Fit, v: Array, h: Array, step: Any, normalizer: Normalizer, key: Array) -> Fit:
        (q,), rate_of = fit, _Rate(step, normalizer)
        a, b = jnp.square(q * h), jnp.square(v / q)
        if self.sign:
            return (q - step * jnp.sign(a - b) * q,)
        size = jnp.max(jnp.abs(a - b), initial=0)
        rate = rate_of(size, size, jnp.max(a + b, initial=0))
        return (q - rate * (a - b) * q,)

    def times(self, fit: Fit, x: Array) -> Array:
        return fit[0] * x

    def precondition(self, fit: Fit, g: Array) -> Array:
        return jnp.square(fit[0]) * g

    def rescaled(self, fit: Fit, scale: Any) -> Fit:
        return (scale * fit[0],)


class _Ranked(Group):
    rank: int = eqx.field(static=True)

    def __init__(self, rank: int):
        check_count("rank", rank, 1)
        self.rank = int(rank)

    def check(self, shape: tuple[int, ...], dtype: Any) -> None:
        super().check(shape, dtype)
        if self.rank > shape[0]:
            raise InputError("rank", self.rank, f"at most the {shape[0]} numbers that the group acts on")


class LowRank(_Ranked):
    """Q = (I + UVᵀ) diag(d), U and V of `rank` columns; each step moves d and, by a coin, U or V.

    **Raises:** `InputError` for a rank below 1.
    """

    def init(self, shape: tuple[int, ...], scale: Any, dtype: Any, key: Array) -> Fit:
        size = (shape[0] * (self.rank + 10)) ** -0.5
        u, v = size * jax.random.normal(key, (2, shape[0], self.rank), dtype)
        return (u, v, jnp.full(shape, scale, dtype))

    def _inverse(self, u: Array, v: Array, x: Array) -> Array:
        """(I + UVᵀ)⁻¹ x."""
        return x - u @ jnp.linalg.solve(jnp.eye(self.rank, dtype=x.dtype) + v.T @ u, v.T @ x)

    def update(self, fit: Fit, v: Array, h: Array, step: Any, normalizer: Normalizer, key: Array) -> Fit:
        (left, right, d), rate_of = fit, _Rate(step, normalizer)
        a = self.times(fit, h)
        b = self._inverse(right, left, v / d)
        # d, by the right relative gradient: diag(Ph hᵀ − v (P⁻¹v)ᵀ).
        along = d * (a + right @ (left.T @ a)) * h, v * self._inverse(left, right, b) / d
        change = along[0] - along[1]
        size = jnp.max(jnp.abs(change))
        d = d - rate_of(size, size, jnp.max(jnp.abs(along[0]) + jnp.abs(along[1]))) * change * d
        eye = jnp.eye(self.rank, dtype=d.dtype)

        def columns(other: Array) -> tuple[Array, Array]:
            """(aaᵀ − bbᵀ) W for W the other factor, and the norm of that times Wᵀ."""
            a_other, b_other = other.T @ a, other.T @ b
            norm = jnp.linalg.norm
            size = norm(a) * norm(other @ a_other) + norm(b) * norm(other @ b_other)
            return jnp.outer(a, a_other) - jnp.outer(b, b_other), size

        first, bound = columns(right)
        new_left = left - rate_of(bound, bound, bound) * first @ (eye + right.T @ left)
        second, bound = columns(left)
        new_right = right - rate_of(bound, bound, bound) * (second + right @ (left.T @ second))
        first_turn = jax.random.bernoulli(key)
        left, right = jnp.where(first_turn, new_left, left), jnp.where(first_turn, right, new_right)
        return (left, right, d)

    def times(self, fit: Fit, x: Array) -> Array:
        left, right, d = fit
        return d * x + left @ (right.T @ (d * x))

    def precondition(self, fit: Fit, g: Array) -> Array:
        left, right, d = fit
        a = self.times(fit, g)
        return d * (a + right @ (left.T @ a))

    def rescaled(self, fit: Fit, scale: Any) -> Fit:
        left, right, d = fit
        return (left, right, scale * d)


class SparseLU(_Ranked):
    """Q = LU with L = [L₁ 0; L₂ diag(l)] and U = [U₁ U₂; 0 diag(u)], L₁ and U₁ triangular of `rank` rows.

    **Raises:** `InputError` for a rank below 1.
    """

    def init(self, shape: tuple[int, ...], scale: Any, dtype: Any, key: Array) -> Fit:
        r, rest = self.rank, shape[0] - self.rank
        zeros, eye = jnp.zeros((rest, r), dtype), jnp.eye(r, dtype=dtype)
        lower = (eye, zeros, jnp.ones(rest, dtype))
        return (*lower, scale * eye, zeros.T, jnp.full(rest, scale, dtype))

    def _split(self, x: Array) -> tuple[Array, Array]:
        return x[: self.rank], x[self.rank :]

    def update(self, fit: Fit, v: Array, h: Array, step: Any, normalizer: Normalizer, key: Array) -> Fit:
        (l1, l2, l3, u1, u2, u3), rate_of = fit, _Rate(step, normalizer)
        solve = jax.scipy.linalg.solve_triangular
        a, (v1, v2) = self.times(fit, h), self._split(v)
        # b = L^{-T} U^{-T} v, then P⁻¹v = U⁻¹ L⁻¹ b.
        w1 = solve(u1, v1, trans=1)
        w2 = (v2 - u2.T @ w1) / u3
        b2 = w2 / l3
        b1 = solve(l1, w1 - l2.T @ b2, trans=1, lower=True)
        w1 = solve(l1, b1, lower=True)
        inverse2 = (b2 - l2 @ w1) / l3 / u3
        inverse1 = solve(u1, w1 - u2 @ inverse2)
        p1, p2 = self._split(self.precondition(fit, h))
        (a1, a2), (h1, h2) = self._split(a), self._split(h)

        # L, by the left relative gradient aaᵀ − bbᵀ.
        e11, e21 = jnp.tril(jnp.outer(a1, a1) - jnp.outer(b1, b1)), jnp.outer(a2, a1) - jnp.outer(b2, b1)
        e3 = a2**2 - b2**2
        b = jnp.concatenate([b1, b2])
        rate = rate_of(*_sizes(e11, e21, e3), a @ a + b @ b)
        lower = (l1 - rate * e11 @ l1, l2 - rate * (e21 @ l1 + e3[:, None] * l2), l3 - rate * e3 * l3)

        # U, by the right relative gradient Ph hᵀ − v (P⁻¹v)ᵀ.
        g11 = jnp.triu(jnp.outer(p1, h1) - jnp.outer(v1, inverse1))
        g12, g3 = jnp.outer(p1, h2) - jnp.outer(v1, inverse2), p2 * h2 - v2 * inverse2
        norm, inverse = jnp.linalg.norm, jnp.concatenate([inverse1, inverse2])
        bound = norm(jnp.concatenate([p1, p2])) * norm(h) + norm(v) * norm(inverse)
        rate = rate_of(*_sizes(g11, g12.T, g3), bound)
        upper = (u1 - rate * u1 @ g11, u2 - rate * (u1 @ g12 + u2 * g3), u3 - rate * u3 * g3)
        return (*lower, *upper)

    def times(self, fit: Fit, x: Array) -> Array:
        l1, l2, l3, u1, u2, u3 = fit
        x1, x2 = self._split(x)
        y1, y2 = u1 @ x1 + u2 @ x2, u3 * x2
        return jnp.concatenate([l1 @ y1, l2 @ y1 + l3 * y2])

    def precondition(self, fit: Fit, g: Array) -> Array:
        l1, l2, l3, u1, u2, u3 = fit
        x1, x2 = self._split(self.times(fit, g))
        y1, y2 = l1.T @ x1 + l2.T @ x2, l3 * x2
        return jnp.concatenate([u1.T @ y1, u2.T @ y1 + u3 * y2])

    def rescaled(self, fit: Fit, scale: Any) -> Fit:
        *lower, u1, u2, u3 = fit
        return (*lower, scale * u1, scale * u2, scale * u3)


def _sizes(corner: Array, column: Array, diagonal: Array) -> tuple[Array, Array]:
    """Largest entry, and a lower bound of the spectral norm, of [corner, 0; column, diag]."""
    largest = jnp.max(jnp.abs(corner))
    if column.size:
        largest = jnp.maximum(largest, jnp.maximum(jnp.max(jnp.abs(column)), jnp.max(jnp.abs(diagonal))))
    block = jnp.concatenate([corner, column])
    ends = jnp.concatenate([jnp.zeros(len(corner), block.dtype), diagonal])
    return largest, jnp.maximum(_spectral(block), jnp.max(jnp.sqrt(jnp.sum(block**2, axis=1) + ends**2)))


# ---- matrices --------------------------------------------------------------------------------------------------

Side = Literal["dense", "diagonal", "normalize"]
SIDES = ("dense", "diagonal", "normalize")


class Kronecker(Group):
    """Q = Q_r ⊗ Q_l on M × N matrices; `left` acts on the rows' index, `right` on the columns'.

    **Arguments:** each of "dense", "diagonal" and "normalize".

    **Raises:** `InputError` for another kind of side.
    """

    left: Side = eqx.field(static=True)
    right: Side = eqx.field(static=True)

    def __init__(self, left: Side = "dense", right: Side = "dense"):
        check_choice("left", left, SIDES)
        check_choice("right", right, SIDES)
        self.left, self.right = left, right

    def check(self, shape: tuple[int, ...], dtype: Any) -> None:
        if len(shape) != 2:
            raise InputError("group", "Kronecker", f"one for arrays of shape {shape}: it acts on matrices")
        for side, length in zip((self.left, self.right), shape, strict=True):
            if side == "normalize" and length < 2:
                raise InputError("group", f"a normalizing side of length {length}", "at least 2, with the ones last")
            if side == "dense":
                nbytes = length**2 * jnp.dtype(dtype).itemsize
                check_allocation("group", f"a dense side of length {length}", nbytes, 'a "diagonal" side')

    def init(self, shape: tuple[int, ...], scale: Any, dtype: Any, key: Array) -> Fit:
        root = jnp.sqrt(jnp.asarray(scale, dtype))
        sides = zip((self.left, self.right), shape, strict=True)
        return tuple(_identity(side, length, root, dtype) for side, length in sides)

    def update(self, fit: Fit, v: Array, h: Array, step: Any, normalizer: Normalizer, key: Array) -> Fit:
        (q_left, q_right), rate_of = fit, _Rate(step, normalizer)
        a = self.times(fit, h)
        b = _inverse_transposed(self.left, q_left, _right_inverse(self.right, q_right, v))
        q_left = _stepped(self.left, q_left, a, b, rate_of)
        q_right = _stepped(self.right, q_right, a.T, b.T, rate_of)
        # One side may grow as the other shrinks.
        ratio = jnp.sqrt(_largest(self.left, q_left) / _largest(self.right, q_right))
        return (q_left / ratio, q_right * ratio)

    def times(self, fit: Fit, x: Array) -> Array:
        left, right = fit
        return _right_transposed(self.right, right, _applied(self.left, left, x))

    def precondition(self, fit: Fit, g: Array) -> Array:
        left, right = fit
        return _right_applied(self.right, right, _transposed(self.left, left, self.times(fit, g)))

    def rescaled(self, fit: Fit, scale: Any) -> Fit:
        left, right = fit
        return (jnp.sqrt(scale) * left, jnp.sqrt(scale) * right)


def scan() -> Kronecker:
    """Scaling and normalization: for the matrix of an affine map with the bias as its last row."""
    return Kronecker("normalize", "diagonal")


def scaw() -> Kronecker:
    """Scaling and whitening."""
    return Kronecker("dense", "diagonal")


# A side acts on the first axis. "normalize" keeps its diagonal and its last column as rows of shape (2, length),
# whose last entry of the second row is 0.


def _identity(side: Side, length: int, scale: Any, dtype: Any) -> Array:
    if side == "dense":
        return scale * jnp.eye(length, dtype=dtype)
    diagonal = jnp.full(length, scale, dtype)
    return diagonal if side == "diagonal" else jnp.stack([diagonal, jnp.zeros_like(diagonal)])


def _applied(side: Side, q: Array, x: Array) -> Array:
    """Q x."""
    if side == "dense":
        return upper_times(q, x)
    if side == "diagonal":
        return q[:, None] * x
    return q[0][:, None] * x + q[1][:, None] * x[-1]


def _transposed(side: Side, q: Array, x: Array) -> Array:
    """Qᵀ x."""
    if side == "normalize":
        return (q[0][:, None] * x).at[-1].add(q[1] @ x)
    return upper_transposed_times(q, x) if side == "dense" else q[:, None] * x


def _inverse_transposed(side: Side, q: Array, x: Array) -> Array:
    """Q^{-T} x."""
    if side == "dense":
        return _lower(q, x)
    if side == "diagonal":
        return x / q[:, None]
    y = x / q[0][:, None]
    return y.at[-1].add(-(q[1] @ y) / q[0, -1])


def _right_transposed(side: Side, q: Array, x: Array) -> Array:
    """X Qᵀ."""
    return times_upper_transposed(x, q) if side == "dense" else _applied(side, q, x.T).T


def _right_applied(side: Side, q: Array, x: Array) -> Array:
    """X Q."""
    return times_upper(x, q) if side == "dense" else _transposed(side, q, x.T).T


def _right_inverse(side: Side, q: Array, x: Array) -> Array:
    """X Q⁻¹."""
    if side == "dense":
        return jax.lax.linalg.triangular_solve(q, x, left_side=False, lower=False)
    return _inverse_transposed(side, q, x.T).T


def _stepped(side: Side, q: Array, a: Array, b: Array, rate_of: _Rate) -> Array:
    """Q − (μ/N) proj(AAᵀ − BBᵀ) Q."""
    if side == "dense":
        aa, bb = upper_gram(a), upper_gram(b)
        gradient = aa - bb
        rate = rate_of(jnp.max(jnp.abs(gradient)), _spectral(gradient), _symmetric_spectral(aa + bb))
        return q - rate * upper_product(gradient, q)
    aa, bb = jnp.sum(a**2, axis=1), jnp.sum(b**2, axis=1)
    diagonal = aa - bb
    if side == "diagonal":
        size = jnp.max(jnp.abs(diagonal))
        return q - rate_of(size, size, jnp.max(aa + bb)) * diagonal * q
    last = (a @ a[-1] - b @ b[-1]).at[-1].set(0)
    largest = jnp.maximum(jnp.max(jnp.abs(diagonal)), jnp.max(jnp.abs(last)))
    spectral = jnp.maximum(jnp.sqrt(jnp.max(diagonal**2 + last**2)), jnp.linalg.norm(last.at[-1].set(diagonal[-1])))
    bound = jnp.max(aa + bb) + jnp.linalg.norm(a @ a[-1]) + jnp.linalg.norm(b @ b[-1])
    rate = rate_of(largest, spectral, bound)
    return jnp.stack([q[0] - rate * diagonal * q[0], q[1] - rate * (diagonal * q[1] + q[0, -1] * last)])


def _largest(side: Side, q: Array) -> Array:
    """The largest diagonal entry."""
    if side == "dense":
        return jnp.max(jnp.diagonal(q))
    return jnp.max(q) if side == "diagonal" else jnp.max(q[0])
