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

    Lanczos from `probes` random vectors, one after the other, with full reorthogonalization, so that no Ritz value
    appears twice. A probe holds `steps` vectors.

    **Arguments:**
    - `product`: symmetric `v -> H v`; `like`: a real pytree of n coordinates in all.
    - `steps`: k, at most n; polynomials of degree 2k − 1 are integrated exactly for each probe's own measure.

    **Raises:** `InputError` where `steps` or `probes` is below 1, `steps` is above n, or the basis larger than memory.

    **Source:** G. H. Golub and G. Meurant (1994), *Matrices, moments and quadrature*; S. Ubaru, J. Chen and Y. Saad
    (2017), *Fast estimation of tr(f(A)) via stochastic Lanczos quadrature*; reorthogonalization where the norm fell
    below 1/√2: J. W. Daniel, W. B. Gragg, L. Kaufman and G. W. Stewart (1976).
    """
    n = trees.flat_size(like)
    check_count("steps", steps, 1)
    check_count("probes", probes, 1)
    steps, probes = int(steps), int(probes)
    if steps > n:
        raise InputError("steps", steps, f"at most the number of parameters, {n}")
    check_allocation("steps", steps, steps * n * trees.real_dtype(like).itemsize, "fewer steps")

    def flat_product(v: Array) -> Array:
        return trees.flatten(product(trees.unflatten(v, like))).astype(v.dtype)

    def one(key: Array) -> tuple[Array, Array, Array]:
        start = trees.flatten(probe(key, like, law))
        return _ritz(*_lanczos(flat_product, start / _norm(start), steps))

    nodes, weights, residuals = jax.lax.map(one, jax.random.split(key, probes))
    return Quadrature(nodes, weights, residuals, n)


def _lanczos(
    product: Callable[[Array], Array], start: Float[Array, " n"], steps: int
) -> tuple[Float[Array, " k"], Float[Array, " k"], Bool[Array, " k"]]:
    """Diagonal and offdiagonal of the tridiagonal matrix, and which of its rows are valid."""

    def step(j: Any, carry: Any) -> Any:
        basis, diagonal, offdiagonal, valid, q, before, beta, alive = carry
        basis, valid = basis.at[j].set(q), valid.at[j].set(alive)
        w = product(q)
        alpha = jnp.vdot(q, w, precision="highest")
        w, again = _orthogonalized(basis, w - alpha * q - beta * before)
        alpha = alpha + again[j]
        beta = _norm(w)
        scale = jnp.max(jnp.abs(diagonal)) + jnp.max(offdiagonal) + jnp.abs(alpha)
        alive = alive & (beta > 10 * jnp.finfo(w.dtype).eps * scale)
        beta = jnp.where(alive, beta, 0)
        following = jnp.where(alive, w / jnp.where(alive, beta, 1), 0)
        return basis, diagonal.at[j].set(alpha), offdiagonal.at[j].set(beta), valid, following, q, beta, alive

    zeros, zero = jnp.zeros(steps, start.dtype), jnp.zeros((), start.dtype)
    basis = jnp.zeros((steps, start.size), start.dtype)
    carry = (basis, zeros, zeros, jnp.zeros(steps, bool), start, jnp.zeros_like(start), zero, jnp.bool_(True))
    _, diagonal, offdiagonal, valid, *_ = jax.lax.fori_loop(0, steps, step, carry)
    return diagonal, offdiagonal, valid


def _norm(w: Float[Array, " n"]) -> Float[Array, ""]:
    """‖w‖, by a dot product."""
    return jnp.sqrt(jnp.vdot(w, w, precision="highest"))


def _orthogonalized(basis: Float[Array, "k n"], w: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " k"]]:
    """`w` less its part in the span of the rows, and the coefficients of that part; twice where rounding may show."""

    def project(w: Array, before: Array) -> tuple[Array, Array]:
        coefficients = jnp.matmul(basis, w, precision="highest")
        return w - jnp.matmul(coefficients, basis, precision="highest"), before + coefficients

    first, coefficients = project(w, jnp.zeros(basis.shape[0], w.dtype))
    fell = _norm(first) < jnp.sqrt(0.5) * _norm(w)
    return jax.lax.cond(fell, project, lambda w, before: (w, before), first, coefficients)


def _ritz(diagonal: Array, offdiagonal: Array, valid: Array) -> tuple[Array, Array, Array]:
    """Ritz values, the squares of their vectors' first entries, and their residuals."""
    inside = jnp.where(valid, diagonal, diagonal[0])  # a Rayleigh quotient lies in the spectrum
    off = jnp.where(valid[1:], offdiagonal[:-1], 0)
    matrix = jnp.diag(inside) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors[0] ** 2, jnp.where(valid[-1], offdiagonal[-1], 0) * jnp.abs(vectors[-1])
