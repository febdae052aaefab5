"""Curvature of a loss by products alone: Hessian–vector products, random probes, Hutchinson, Lanczos quadrature.

Everything here is traceable and takes pytrees. A `product` is a symmetric linear map `v -> H v` on pytrees like the
parameters, such as `problem.hessian(x)` or `hessian(fn, x, batch)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_choice, check_count, check_positive
from ..core.memory import check_allocation

__all__ = [
    "Estimate",
    "Moments",
    "Quadrature",
    "gradient_and_hvp",
    "hessian",
    "hutchinson",
    "lanczos_quadrature",
    "per_example_hvp",
    "per_example_squared_norms",
    "probe",
]

Product = Callable[[PyTree], PyTree]

LAWS = ("rademacher", "normal", "sphere")


class Estimate(NamedTuple):
    """The mean over independent probes, and its standard error (NaN for one probe). Real scalars."""

    value: Float[Array, ""]
    error: Float[Array, ""]


def _estimate(samples: Float[Array, " probes"]) -> Estimate:
    return Estimate(jnp.mean(samples), jnp.std(samples, ddof=1) / jnp.sqrt(samples.size))


def gradient_and_hvp(fn: Callable[..., Any], x: PyTree, vector: PyTree, *args: Any) -> tuple[Array, PyTree, PyTree]:
    """Value, gradient and Hessian times `vector` of `fn(x, *args) -> scalar` at a real `x`, in one pass.

    What a training loop passes to a transformation that declares `hvp` and `vector`; the batch among `args` is the
    same for all three, as it must be.
    """

    def gradient_of(x: PyTree) -> tuple[PyTree, Array]:
        value, gradient = jax.value_and_grad(fn)(x, *args)
        return gradient, value

    gradient, product, value = jax.jvp(gradient_of, (x,), (vector,), has_aux=True)
    return value, gradient, product


def hessian(fn: Callable[..., Any], x: PyTree, *args: Any) -> Product:
    """`v -> H v` of `fn(x, *args) -> scalar`, for many products at one real `x`: the gradient is linearized once."""
    return jax.linearize(lambda x: jax.grad(fn)(x, *args), x)[1]


def per_example_hvp(loss: Callable[..., Any], x: PyTree, batch: PyTree, vector: PyTree) -> PyTree:
    """Each example's own Hessian times `vector`, on a leading axis; `loss(x, batch) -> per-example losses`."""

    def single(x: PyTree, row: PyTree) -> Array:
        return loss(x, jax.tree.map(lambda a: a[None], row))[0]

    return jax.vmap(lambda row: gradient_and_hvp(single, x, vector, row)[2])(batch)


def per_example_squared_norms(stacked: PyTree) -> Float[Array, " rows"]:
    """The squared Euclidean norm over all leaves of each entry of the leading axis, in at least float32."""
    dtype = trees.real_dtype(stacked)
    parts = [jnp.square(jnp.abs(a.astype(jnp.promote_types(a.dtype, dtype)))) for a in jax.tree.leaves(stacked)]
    return functools.reduce(jnp.add, [jnp.sum(a.reshape(a.shape[0], -1), axis=1) for a in parts])


def probe(key: Array, like: PyTree, law: str = "rademacher") -> PyTree:
    """A random vector in the shapes and dtypes of the real pytree `like`, with E v vᵀ = I.

    **Arguments:** `law` — `"rademacher"` (entries ±1), `"normal"`, or `"sphere"` (uniform, of norm √n).
    """
    check_choice("law", law, LAWS)
    if law != "rademacher":
        drawn = trees.normal_like(key, like)
        if law == "normal":
            return drawn
        scale = jnp.sqrt(trees.flat_size(like)) / trees.norm(drawn)
        return jax.tree.map(lambda a: (scale * a).astype(a.dtype), drawn)
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.rademacher(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    )


class Moments(NamedTuple):
    """Of a symmetric map: its trace tr H and the square ‖H‖²_F of its Frobenius norm."""

    trace: Estimate
    squared_frobenius: Estimate


def hutchinson(product: Product, like: PyTree, key: Array, probes: int, law: str = "rademacher") -> Moments:
    """Trace and squared Frobenius norm from the same `probes` products: E vᵀHv and E ‖Hv‖².

    One probe is held at a time. Each probe's own number is unbiased; the errors are standard errors of the mean.

    **Raises:** `InputError` for less than one probe, or another law.

    **Source:** M. F. Hutchinson (1990), *A stochastic estimator of the trace of the influence matrix*.
    """
    check_count("probes", probes, 1)
    probes = int(probes)

    def one(key: Array) -> tuple[Array, Array]:
        v = probe(key, like, law)
        image = trees.flatten(product(v))
        return jnp.vdot(trees.flatten(v), image), jnp.vdot(image, image)

    first, second = jax.lax.map(one, jax.random.split(key, probes))
    return Moments(_estimate(first), _estimate(second))


class Quadrature(NamedTuple):
    """Gauss quadratures of a spectrum, one for each random probe.

    `nodes`: Ritz values, ascending; `weights`: of each, nonnegative, of sum 1; `residuals`: ‖Hy − θy‖ for the Ritz
    vector y of norm 1, so that some eigenvalue is as near to θ. Each of shape `(probes, steps)`; steps that were not
    taken, because the Krylov space was exhausted, are nodes inside the spectrum of weight and residual 0.
    `dimension`: n, a Python number.
    """

    nodes: Float[Array, "probes steps"]
    weights: Float[Array, "probes steps"]
    residuals: Float[Array, "probes steps"]
    dimension: int

    def integral(self, fn: Callable[[Array], Array]) -> Estimate:
        """tr fn(H): n times the mean over the probes of Σᵢ wᵢ fn(θᵢ), with its standard error over the probes."""
        return _estimate(self.dimension * jnp.sum(self.weights * fn(self.nodes), axis=1))

    def density(
        self, grid: Float[Array, " points"], width: Any
    ) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
        """The spectral density, of integral 1, smoothed by a Gaussian of standard deviation `width`: mean and error."""
        check_positive("width", width)
        shape = jnp.exp(-0.5 * ((grid - self.nodes[..., None]) / width) ** 2) / (width * jnp.sqrt(2 * jnp.pi))
        each = jnp.sum(self.weights[..., None] * shape, axis=1)
        return jnp.mean(each, axis=0), jnp.std(each, axis=0, ddof=1) / jnp.sqrt(each.shape[0])

    @property
    def largest(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The largest Ritz value, never above λ_max but for rounding, and its residual."""
        last = self.nodes[:, -1]
        best = jnp.argmax(last)
        return last[best], self.residuals[best, -1]

    @property
    def smallest(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The smallest Ritz value, never below λ_min but for rounding, and its residual."""
        first = self.nodes[:, 0]
        best = jnp.argmin(first)
        return first[best], self.residuals[best, 0]


def lanczos_quadrature(
    product: Product, like: PyTree, key: Array, steps: int, probes: int = 1, law: str = "rademacher"
) -> Quadrature:
    """Stochastic Lanczos quadrature of the spectrum of H.

    Lanczos from `probes` random vectors, one after the other, reorthogonalized where orthogonality was lost, so that no
    Ritz value appears twice. A probe holds `steps` vectors.

    **Arguments:**
    - `product`: symmetric `v -> H v`; `like`: a real pytree of n coordinates in all.
    - `steps`: k, at most n; polynomials of degree 2k − 1 are integrated exactly for each probe's own measure.

    **Raises:** `InputError` where `steps` or `probes` is below 1, `steps` is above n, or the basis larger than memory.

    **Source:** G. H. Golub and G. Meurant (1994), *Matrices, moments and quadrature*; S. Ubaru, J. Chen and Y. Saad
    (2017), *Fast estimation of tr(f(A)) via stochastic Lanczos quadrature*; why overlaps
    below √ε may stay: H. D. Simon (1984), *The Lanczos algorithm with partial reorthogonalization*.
    """
    n = trees.flat_size(like)
    check_count("steps", steps, 1)
    check_count("probes", probes, 1)
    steps, probes = int(steps), int(probes)
    if steps > n:
        raise InputError("steps", steps, f"at most the number of parameters, {n}")
    check_allocation("steps", steps, steps * n * trees.real_dtype(like).itemsize, "fewer steps")

    dtype, (leaves, structure) = trees.real_dtype(like), jax.tree.flatten(like)

    def of_leaves(v: Leaves) -> Leaves:
        back = [a.reshape(leaf.shape).astype(leaf.dtype) for a, leaf in zip(v, leaves, strict=True)]
        return [a.ravel().astype(dtype) for a in jax.tree.leaves(product(jax.tree.unflatten(structure, back)))]

    def one(key: Array) -> tuple[Array, Array, Array]:
        start = probe(key, [jnp.zeros(leaf.size, dtype) for leaf in leaves], law)
        return _ritz(*_lanczos(of_leaves, _scaled(start, 1 / _norm(start)), steps))

    nodes, weights, residuals = jax.lax.map(one, jax.random.split(key, probes))
    return Quadrature(nodes, weights, residuals, n)


Leaves = list[Array]
"""A vector in pieces: joining them would cost as much as a step of Lanczos."""


def _lanczos(
    product: Callable[[Leaves], Leaves], start: Leaves, steps: int
) -> tuple[Float[Array, " k"], Float[Array, " k"], Bool[Array, " k"]]:
    """Diagonal and offdiagonal of the tridiagonal matrix, and which of its rows are valid."""

    def step(j: Any, carry: Any) -> Any:
        basis, diagonal, offdiagonal, valid, q, before, beta, alive = carry
        basis, valid = [rows.at[j].set(a) for rows, a in zip(basis, q, strict=True)], valid.at[j].set(alive)
        w = product(q)
        alpha = _dot(q, w)
        w = [a - alpha * b - beta * c for a, b, c in zip(w, q, before, strict=True)]
        w, removed, beta = _semiorthogonal(basis, w)
        alpha = alpha + removed[j]
        eps = jnp.finfo(beta.dtype).eps
        scale = jnp.max(jnp.abs(diagonal)) + jnp.max(offdiagonal) + jnp.abs(alpha)
        alive = alive & (beta > 10 * eps * scale)
        beta = jnp.where(alive, beta, 0)
        following = _scaled(w, jnp.where(alive, 1 / jnp.where(alive, beta, 1), 0))
        return basis, diagonal.at[j].set(alpha), offdiagonal.at[j].set(beta), valid, following, q, beta, alive

    dtype = start[0].dtype
    zeros, zero = jnp.zeros(steps, dtype), jnp.zeros((), dtype)
    basis = [jnp.zeros((steps, a.size), dtype) for a in start]
    before = [jnp.zeros_like(a) for a in start]
    carry = (basis, zeros, zeros, jnp.zeros(steps, bool), start, before, zero, jnp.bool_(True))
    _, diagonal, offdiagonal, valid, *_ = jax.lax.fori_loop(0, steps, step, carry)
    return diagonal, offdiagonal, valid


def _dot(a: Leaves, b: Leaves) -> Float[Array, ""]:
    return functools.reduce(jnp.add, [jnp.vdot(x, y, precision="highest") for x, y in zip(a, b, strict=True)])


def _norm(w: Leaves) -> Float[Array, ""]:
    return jnp.sqrt(_dot(w, w))


def _scaled(w: Leaves, factor: Array) -> Leaves:
    return [factor * a for a in w]


def _semiorthogonal(basis: Leaves, w: Leaves) -> tuple[Leaves, Float[Array, " k"], Float[Array, ""]]:
    """`w` without its part in the span of the rows, the coefficients of what was removed, and its norm.

    The overlaps are measured each time. Where all are below √ε of the norm, they stay, since the tridiagonal matrix
    is then exact to rounding; else they are removed, twice where rounding still shows.
    """

    def overlaps(w: Leaves) -> Array:
        parts = [jnp.matmul(rows, a, precision="highest") for rows, a in zip(basis, w, strict=True)]
        return functools.reduce(jnp.add, parts)

    def lost(carry: Any) -> Array:
        times, _, found, _, norm = carry
        return (times < 2) & (jnp.max(jnp.abs(found)) > jnp.sqrt(jnp.finfo(norm.dtype).eps) * norm)

    def remove(carry: Any) -> Any:
        times, w, found, removed, _ = carry
        w = [a - jnp.matmul(found, rows, precision="highest") for a, rows in zip(w, basis, strict=True)]
        return times + 1, w, overlaps(w), removed + found, _norm(w)

    found = overlaps(w)
    carry = jax.lax.while_loop(lost, remove, (0, w, found, jnp.zeros_like(found), _norm(w)))
    _, w, _, removed, norm = carry
    return w, removed, norm


def _ritz(diagonal: Array, offdiagonal: Array, valid: Array) -> tuple[Array, Array, Array]:
    """Ritz values, the squares of their vectors' first entries, and their residuals."""
    inside = jnp.where(valid, diagonal, diagonal[0])  # a Rayleigh quotient lies in the spectrum
    off = jnp.where(valid[1:], offdiagonal[:-1], 0)
    matrix = jnp.diag(inside) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors[0] ** 2, jnp.where(valid[-1], offdiagonal[-1], 0) * jnp.abs(vectors[-1])
