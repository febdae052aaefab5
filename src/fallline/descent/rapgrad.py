"""RaGrad: the inner loop of RapGrad, one component's gradient a step.

Minimizes the proximal model of a finite sum f = (1/m) Σ f_i around a center x̄,

    min_{x ∈ X} (1/m) Σ ψ_i(x) + φ(x),   ψ_i(x) = f_i(x) + μ‖x − x̄‖²,   φ(x) = (μ/2) ‖x − x̄‖²,

whose components are μ-strongly convex and (L + 2μ)-smooth where f_i is L-smooth and μ-weakly convex. From
x⁰ = x⁻¹ = x̄, x_i = x̄, y_i = ∇ψ_i(x̄) and S = (1/m) Σ y_i, for t = 1 … s with i uniform in 1 … m:

    x̃ = x^{t−1} + α (x^{t−1} − x^{t−2})
    x_i ← (τ x_i + x̃) / (1 + τ),   Δ = ∇ψ_i(x_i) − y_i
    x^t = argmin_{x ∈ X} φ(x) + ⟨S + Δ, x⟩ + (η/2) ‖x − x^{t−1}‖²
    S ← S + Δ / m,   y_i ← y_i + Δ

    c = 2 + L/μ,   1 − α = 2 / (m (√(1 + 16c/m) + 1)),   τ = 1/(m (1 − α)) − 1,   η = α μ / (1 − α)

| paper       | here                                  |
|-------------|---------------------------------------|
| μ, L        | `mu`, `smoothness`                    |
| s           | `inner_steps`                         |
| x̄           | `center`                              |
| x_i, y_i    | rows of `points` and `duals`          |
| S           | `mean`                                |
| S + Δ       | `estimate`: mean of the ỹ_i, of which one is y_i + mΔ and the rest are y |
| argmin over X | `prox`                              |

Source: G. Lan and Y. Yang, *Accelerated Stochastic Algorithms for Nonconvex Finite-sum and Multi-block
Optimization*, SIAM Journal on Optimization 2019 (arXiv 1805.05411), RaGrad. The numbers were written from memory
and verified by the convergence that they give. `rapgrad_rapdual` has the outer loop.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.calls import Calls
from ..core.errors import InputError, check_positive, is_traced
from ..parts.prox import Prox

__all__ = ["Look", "RaGrad", "theory_inner_steps"]

_DRAWN = 128  # components that are drawn at a time


class Look(NamedTuple):
    """What is known of a center: value, gradient norm (None where not asked), and what the inner loop begins from."""

    value: Float[Array, ""] | None
    gradient_norm: Float[Array, ""] | None
    memory: Any


class Numbers(NamedTuple):
    """1 − α, τ and η of the paper."""

    one_minus_alpha: Any
    tau: Any
    eta: Any


def numbers(m: int, mu: Any, smoothness: Any) -> Numbers:
    """The paper's parameters of m components, without the cancellation in 1 − α."""
    root = (1 + 16 * (2 + smoothness / mu) / m) ** 0.5
    one_minus_alpha = 2 / (m * (root + 1))
    return Numbers(one_minus_alpha, (root - 1) / 2, mu * (1 - one_minus_alpha) / one_minus_alpha)


def default_inner_steps(m: int, mu: Any, smoothness: Any) -> Any:
    """s = 4 ⌈m + √(mc)⌉: a choice of ours, measured (see `rapgrad_rapdual`)."""
    ceil = jnp.ceil if is_traced((mu, smoothness)) else math.ceil
    return 4 * ceil(m + (m * (2 + smoothness / mu)) ** 0.5)


def theory_inner_steps(m: int, mu: float, smoothness: float) -> int:
    """The number of inner steps that the paper's guarantee asks: ⌈log M / log(1/α)⌉, M = 6 (5 + 2L/μ) max(6/5, L²/μ²).

    In practice 4 ⌈m + √(m (2 + L/μ))⌉, a tenth or less of it, is enough.

    **Raises:** `InputError` for numbers out of range.
    """
    check_moduli(mu, smoothness)
    ratio = smoothness / mu
    big = 6 * (5 + 2 * ratio) * max(6 / 5, ratio**2)
    return math.ceil(math.log(big) / -math.log1p(-numbers(m, mu, smoothness).one_minus_alpha))


def check_moduli(mu: Any, smoothness: Any) -> None:
    """Refuse μ ≤ 0, and L < μ: an L-smooth function is L-weakly convex already."""
    check_positive("mu", mu)
    check_positive("smoothness", smoothness)
    if not is_traced((mu, smoothness)) and smoothness < mu:
        raise InputError("smoothness", smoothness, f"at least mu = {float(mu):g}, which is never above it")


class RaGrad(eqx.Module):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"per_example"})
    name: ClassVar[str] = "RapGrad"

    mu: Any
    smoothness: Any
    inner_steps: Any
    prox: Prox | None
    warm_start: bool = eqx.field(static=True)

    def check(self, problem: Any, x: PyTree) -> None:
        m, steps = problem.size, self.steps(problem)
        if steps < m:
            raise InputError(
                "inner_steps", int(steps), f"at least the {m} components: with fewer the outer loop diverges"
            )
        if steps <= 2 * (limit := default_inner_steps(m, float(self.mu), float(self.smoothness)) // 4):
            warnings.warn(
                f"inner_steps: {int(steps)} may be slow or diverge; take 4 ⌈m + √(m (2 + L/μ))⌉ = {4 * limit}",
                stacklevel=4,
            )
        if self.prox is not None and not np.isfinite(float(self.prox.value(x))):
            raise InputError("x0", "a point outside of the set of `prox`", "a point of the set")

    def steps(self, problem: Any) -> Any:
        """The inner steps s of this problem."""
        default = self.inner_steps is None
        return default_inner_steps(problem.size, self.mu, self.smoothness) if default else self.inner_steps

    def begin(self, problem: Any, x: PyTree) -> tuple[Look, int]:
        """The gradients of all components at the first center; how many were asked."""
        look = self.look(problem, x)
        if self.warm_start:
            look = Look(None, None, (_rows(problem.size, _wide(x)), look.memory))
        return look, problem.size

    def look(self, problem: Any, x: PyTree) -> Look:
        """y_i = ∇ψ_i(x̄) = ∇f_i(x̄) of every component, and with them value and gradient norm of the objective.

        With a `prox` the gradient norm is that of the gradient mapping, L ‖x − prox(x − ∇f(x)/L)‖.
        """
        duals = _wide(problem.per_example_gradients(x, problem.data))
        value, gradient = problem.value(x).astype(trees.real_dtype(x)), _mean(duals)
        if self.prox is None:
            return Look(value, trees.norm(gradient), duals)
        ahead = jax.tree.map(lambda a, g: a - g / self.smoothness, _wide(x), gradient)
        mapped = jax.tree.map(jnp.subtract, _wide(x), self.prox(ahead, 1 / self.smoothness))
        return Look(value + self.prox.value(x), self.smoothness * trees.norm(mapped), duals)

    def solve(self, problem: Any, center: PyTree, memory: Any, *, key: Array) -> tuple[PyTree, Look, Any]:
        """The s inner steps around `center`: the next center, what is known of it, and the gradients asked."""
        m, mu, steps = problem.size, self.mu, self.steps(problem)
        one_minus_alpha, tau, eta = numbers(m, mu, self.smoothness)
        like, center = center, _wide(center)
        points, duals = memory if self.warm_start else (_rows(m, center), memory)

        def step(carry: Any) -> Any:
            t, drawn, row, x, before, points, duals, mean = carry
            i, old_point, old_dual = row
            ahead = jax.tree.map(lambda a, b: a + (1 - one_minus_alpha) * (a - b), x, before)
            point = jax.tree.map(lambda a, b: (tau * a + b) / (1 + tau), old_point, ahead)
            dual = self._gradient(problem, i, point, center, like)
            change = jax.tree.map(jnp.subtract, dual, old_dual)
            new = self._primal(self._estimate(mean, change, m), x, center, eta)
            mean = jax.tree.map(lambda a, b: a + b / m, mean, change)
            points, duals = _put(points, i, point), _put(duals, i, dual)
            t = t + 1
            drawn = jax.lax.cond(t % _DRAWN == 0, lambda: _draw(key, t, m), lambda: drawn)
            row = _row(drawn[t % _DRAWN], points, duals)
            return trees.cast_like((t, drawn, row, new, x, points, duals, mean), carry)

        # The next row is read after the tables are written: a read before would make the loop copy them.
        drawn = _draw(key, jnp.int32(0), m)
        carry = (jnp.int32(0), drawn, _row(drawn[0], points, duals), center, center, points, duals, _mean(duals))
        _, _, _, x, _, points, duals, _ = jax.lax.while_loop(lambda carry: carry[0] < steps, step, carry)
        new = trees.cast_like(x, like)
        if not self.warm_start:
            return new, self.look(problem, new), steps + m
        # ψ_i of the next center differs by a quadratic: its gradients at the points are known.
        duals = jax.tree.map(lambda rows, a, b: rows + 2 * mu * (a - b.astype(a.dtype)), duals, center, new)
        return new, Look(None, None, (points, duals)), steps

    def _gradient(self, problem: Any, i: Int[Array, ""], x: PyTree, center: PyTree, like: PyTree) -> PyTree:
        """∇ψ_i(x) = ∇f_i(x) + 2μ (x − x̄): one component's gradient."""
        row = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), problem.data)
        gradient = problem.per_example_gradients(trees.cast_like(x, like), row)
        return jax.tree.map(lambda g, a, b: g[0].astype(a.dtype) + 2 * self.mu * (a - b), gradient, x, center)

    @staticmethod
    def _estimate(mean: PyTree, change: PyTree, m: int) -> PyTree:
        """The mean of the ỹ_i: y_i + mΔ for the component that was drawn, y for the others."""
        return jax.tree.map(jnp.add, mean, change)

    def _primal(self, estimate: PyTree, x: PyTree, center: PyTree, eta: Any) -> PyTree:
        """argmin_{u ∈ X} (μ/2) ‖u − x̄‖² + ⟨S̃, u⟩ + (η/2) ‖u − x‖²."""
        weight = self.mu + eta
        free = jax.tree.map(lambda s, a, b: (self.mu * b + eta * a - s) / weight, estimate, x, center)
        return free if self.prox is None else self.prox(free, 1 / weight)

    def calls(self, problem: Any, before: Any, after: Any) -> Calls:
        """The account of the component gradients from the number `before` to `after`, in whole samples begun.

        A sample is the problem's: a minibatch, or all of the data where it draws none.
        """
        size = problem.batch_size or problem.size
        samples = -(-after // size) - -(-before // size)
        return Calls(gradient=samples) if problem.batch_size is None else Calls(minibatch=samples)


def _draw(key: Array, t: Int[Array, ""], m: int) -> Int[Array, " drawn"]:
    """The components of the inner step t and of those after it."""
    return jax.random.randint(jax.random.fold_in(key, t), (_DRAWN,), 0, m, jnp.int32)


def _wide(tree: PyTree) -> PyTree:
    """The tree in at least 32 bits."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(a.dtype, jnp.float32)), tree)


def _rows(m: int, x: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (m, *a.shape)), x)


def _mean(rows: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jnp.mean(a, axis=0), rows)


def _put(rows: PyTree, i: Int[Array, ""], row: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b.astype(a.dtype), i, 0), rows, row)


def _row(i: Int[Array, ""], points: PyTree, duals: PyTree) -> tuple[Array, PyTree, PyTree]:
    """A component, its point and its gradient."""

    def get(rows: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False), rows)

    return i, get(points), get(duals)
