"""RaDual: the inner loop of RapDual, one block's subproblem a step; and the problems that it is for.

    min Σ_i f_i(x_i) + f_m(x_m)   subject to   Σ_i A_i x_i + x_m = b,   i = 1 … K

with μ-weakly convex f_i whose proximal subproblem is cheap, and f_m L-smooth and μ-weakly convex. Around a center
x̄ it minimizes the same with ψ_i = f_i + μ‖· − x̄_i‖² and ψ_m = f_m + μ‖· − x̄_m‖², which are μ-strongly convex.
From x = x̄, x_m = x̄_m, y = y' = −∇ψ_m(x_m), for t = 1 … s with i uniform in 1 … K:

    ỹ = y + α (y − y')
    u = argmin_u ψ_i(u) + ⟨A_iᵀ ỹ, u⟩ + (τ/2) ‖u − x_i‖²
    r = Σ_j A_j x_j + K A_i (u − x_i),   x_i ← u
    x_m ← (η x_m + b − r) / (1 + η)
    y' ← y,   y ← −∇ψ_m(x_m)

    Ā = max_i ‖A_i‖₂,   c = (2μ + L) Ā²/μ,   1 − α = 2 / (K (√(1 + 8c) + 1)),
    τ = μ (√(1 + 8c) − 1)/2,   η = α / (1 − α)

With all blocks merged into one (K = 1, Ā = ‖A‖₂) it is the deterministic method.

| paper       | here                                       |
|-------------|--------------------------------------------|
| x_i, x_m    | `Blocks(blocks, last)`                     |
| μ, L        | `mu`, `smoothness`                         |
| s           | `inner_steps`                              |
| x̄           | `center`                                   |
| y           | `dual`, the multiplier of the constraint   |
| A_i, b, f_m | `MultiBlock(block, last, A, b)`            |

Source: G. Lan and Y. Yang, *Accelerated Stochastic Algorithms for Nonconvex Finite-sum and Multi-block
Optimization*, SIAM Journal on Optimization 2019 (arXiv 1805.05411), RaDual. The numbers were written from memory,
derived again, and verified by the convergence that they give. `rapgrad_rapdual` has the outer loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core import trees
from ..core.calls import Calls
from ..core.errors import InputError, is_traced
from ..core.problem import Objective, Problem
from ..parts.prox import Prox
from .rapgrad import Look, Numbers

__all__ = ["Blocks", "MultiBlock", "RaDual"]


class Blocks(NamedTuple):
    """A point of a `MultiBlock`: K blocks of p coordinates, and the last one."""

    blocks: Float[Array, "K p"]
    last: Float[Array, " n"]


class MultiBlock(Problem):
    """Σ_i f_i(x_i) + f_m(x_m) over the blocks of a point, coupled by Σ_i A_i x_i + x_m = b.

    **Arguments:**
    - `block`: a `Prox`: the function of each block. A subclass that overrides `block_value` and `block_prox` may
      have another one for each.
    - `last`: f_m, a callable `fn(x_m) -> scalar` or an `Objective`.
    - `A`: the matrices A_i, of shape (K, n, p); `b`: of shape (n,).
    - `A_last`: the matrix of x_m, where that is not the identity: the constraint is divided by it.
    - `lower_bound`: as for `Objective`.

    Its value is that of the objective, whether or not the point meets the constraint.

    **Raises:** `InputError` for shapes that do not agree, numbers that are not finite, and a singular `A_last`.
    """

    oracles: ClassVar[frozenset[str]] = Problem.oracles | {"block_prox", "last_gradient", "coupling"}

    block: Prox
    last: Problem
    matrices: Float[Array, "K n p"]
    b: Float[Array, " n"]
    block_norm: Any  # max_i ‖A_i‖₂
    norm: Any  # ‖(A_1 … A_K)‖₂
    declared_bound: Any = None

    def __init__(
        self,
        block: Prox,
        last: Problem | Callable[..., Any],
        A: Any,
        b: Any,
        *,
        A_last: Any = None,
        lower_bound: float | None = None,
    ):
        if not isinstance(block, Prox):
            raise InputError("block", type(block).__name__, "a Prox, such as SCAD(0.1)")
        if not isinstance(last, Problem) and not callable(last):
            raise InputError("last", type(last).__name__, "a callable fn(x_m) -> scalar, or an Objective")
        if np.ndim(A) != 3 or np.shape(b) != np.shape(A)[1:2] or 0 in np.shape(A):
            shapes = f"{np.shape(A)} and {np.shape(b)}"
            raise InputError("A and b", f"shapes {shapes}", "K matrices of shape (n, p), stacked, and n numbers")
        _check_finite("A", A)
        _check_finite("b", b)
        matrices, b = (A, b) if A_last is None else _divided(A, b, A_last)
        self.block, self.last = block, last if isinstance(last, Problem) else Objective(last)
        self.matrices, self.b = matrices, b
        xp: Any = jnp if isinstance(matrices, jax.Array) else np
        self.block_norm = xp.max(xp.linalg.norm(matrices, 2, axis=(1, 2)))
        self.norm = xp.linalg.norm(xp.moveaxis(matrices, 1, 0).reshape(len(b), -1), 2)
        self.declared_bound = Objective(_zero, lower_bound=lower_bound).declared_bound

    @property
    def size(self) -> int:
        """Number of blocks K."""
        return np.shape(self.matrices)[0]

    def start(self, blocks: Any = None) -> Blocks:
        """A point that meets the constraint: the given blocks, or zeros, and x_m = b − Σ A_i x_i."""
        K, _, p = np.shape(self.matrices)
        blocks = jnp.zeros((K, p), jnp.asarray(self.b).dtype) if blocks is None else blocks
        return Blocks(blocks, self.b - self.coupling(blocks))

    def block_value(self, i: Int[Array, ""] | int, u: Float[Array, " p"]) -> Float[Array, ""]:
        """f_i(u)."""
        return self.block.value(u)

    def block_prox(self, i: Int[Array, ""] | int, v: Float[Array, " p"], step: Any) -> Float[Array, " p"]:
        """argmin_u f_i(u) + ‖u − v‖² / (2 step), for a step below 1/μ."""
        return self.block(v, step)

    def last_gradient(self, last: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, " n"]]:
        """Value and gradient of f_m."""
        return self.last.value_and_gradient(last)

    def coupling(self, blocks: Float[Array, "K p"]) -> Float[Array, " n"]:
        """Σ_i A_i x_i."""
        return jnp.einsum("knp,kp->n", self.matrices, blocks, precision="highest")

    def blocks_value(self, blocks: Float[Array, "K p"]) -> Float[Array, ""]:
        """Σ_i f_i(x_i)."""
        return jnp.sum(jax.vmap(self.block_value)(jnp.arange(self.size), blocks))

    def value(self, x: Blocks) -> Float[Array, ""]:
        shapes = tuple(np.shape(a) for a in jax.tree.leaves(x))
        K, n, p = np.shape(self.matrices)
        if not isinstance(x, Blocks) or shapes != ((K, p), (n,)):
            got = ", ".join(trees.describe(a) for a in jax.tree.leaves(x))
            raise InputError("x0", got, f"Blocks of shapes ({K}, {p}) and ({n},), as problem.start() gives them")
        return self.blocks_value(x.blocks) + self.last.value(x.last)

    def infeasibility(self, x: Blocks) -> Float[Array, ""]:
        """‖Σ_i A_i x_i + x_m − b‖."""
        return trees.norm(self.coupling(x.blocks) + x.last - self.b)

    @property
    def lower_bound(self) -> Any:
        return self.declared_bound

    @property
    def label(self) -> str:
        return f"MultiBlock({type(self.block).__name__}, {self.last.label})"


def _zero(x: Any) -> Any:
    return jnp.zeros(())


def _check_finite(name: str, a: Any) -> None:
    if not is_traced(a) and not np.all(np.isfinite(np.asarray(a))):
        raise InputError(name, f"{trees.describe(a)} with entries that are not finite", "finite numbers")


def _divided(A: Any, b: Any, A_last: Any) -> tuple[Any, Any]:
    """The constraint multiplied by the inverse of the last matrix."""
    n = np.shape(b)[0]
    if np.shape(A_last) != (n, n):
        raise InputError("A_last", f"shape {np.shape(A_last)}", f"an invertible matrix of shape ({n}, {n})")
    _check_finite("A_last", A_last)
    matrix = np.asarray(A_last)
    if np.linalg.cond(matrix) * np.finfo(matrix.dtype).eps > 1e-3:
        raise InputError("A_last", "a singular matrix", "an invertible one: the last block must be free to meet b")
    inverse = np.linalg.inv(matrix)
    return np.einsum("mn,knp->kmp", inverse, np.asarray(A)), inverse @ np.asarray(b)


def numbers(K: int, mu: Any, smoothness: Any, norm: Any) -> Numbers:
    """The paper's parameters of K blocks, without the cancellation in 1 − α."""
    root = (1 + 8 * (2 * mu + smoothness) * norm**2 / mu) ** 0.5
    one_minus_alpha = 2 / (K * (root + 1))
    return Numbers(one_minus_alpha, mu * (root - 1) / 2, (1 - one_minus_alpha) / one_minus_alpha)


class RaDual(eqx.Module):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"block_prox", "last_gradient", "coupling"})
    name: ClassVar[str] = "RapDual"

    mu: Any
    smoothness: Any
    inner_steps: Any
    merged: bool = eqx.field(static=True)

    def check(self, problem: Any, x: Blocks) -> None:
        weak = getattr(problem.block, "weak_convexity", 0.0)
        if float(weak) > float(self.mu) * (1 + 1e-6):
            raise InputError("mu", float(self.mu), f"at least {float(weak):g}, the weak convexity of the blocks")
        count, steps, default = self.count(problem), self.steps(problem), self.default_inner_steps(problem)
        if steps < count:
            raise InputError("inner_steps", int(steps), f"at least the {count} blocks: fewer leave some untouched")
        if steps < default // 4:
            warnings.warn(
                f"inner_steps: {int(steps)} may stall or diverge; 4 / (1 − α) = {default} leave e⁻⁴ of the error",
                stacklevel=4,
            )

    def count(self, problem: Any) -> int:
        """The K of the method: 1 where the blocks are merged."""
        return 1 if self.merged else problem.size

    def numbers(self, problem: Any) -> Numbers:
        norm = problem.norm if self.merged else problem.block_norm
        return numbers(self.count(problem), self.mu, self.smoothness, norm)

    def default_inner_steps(self, problem: Any) -> Any:
        """s = ⌈4 / (1 − α)⌉: a choice of ours."""
        needed = 4 / self.numbers(problem).one_minus_alpha
        return jnp.ceil(needed) if is_traced(needed) else math.ceil(needed)

    def steps(self, problem: Any) -> Any:
        """The inner steps s of this problem."""
        return self.default_inner_steps(problem) if self.inner_steps is None else self.inner_steps

    def begin(self, problem: Any, x: Blocks) -> tuple[Look, int]:
        """What is known of the first center; no block was updated."""
        return self.look(problem, x), 0

    def look(self, problem: Any, x: Blocks) -> Look:
        """Value, and how far from stationary: the norm of the blocks' prox-gradient and of the constraint's error.

        Of the Lagrangian with y = −∇f_m(x_m), and a prox of the step 1/(2μ + L).
        """
        value, gradient = problem.last_gradient(x.last)
        dual = -gradient.astype(trees.real_dtype(x))
        step = 1 / (2 * self.mu + self.smoothness)
        slopes = jnp.einsum("knp,n->kp", problem.matrices, dual, precision="highest")
        moved = x.blocks - _all_blocks(problem, x.blocks - step * slopes, step)
        missing = problem.coupling(x.blocks) + x.last - problem.b
        value = (value + problem.blocks_value(x.blocks)).astype(dual.dtype)
        return Look(value, trees.norm((moved / step, missing)), dual)

    def solve(self, problem: Any, center: Blocks, memory: Any, *, key: Array) -> tuple[Blocks, Look, Any]:
        """The s inner steps around `center`: the next center, what is known of it, and the blocks updated."""
        K, mu, steps = self.count(problem), self.mu, self.steps(problem)
        one_minus_alpha, tau, eta = self.numbers(problem)
        like, wide = center, trees.real_dtype(center)
        center = Blocks(center.blocks.astype(wide), center.last.astype(wide))

        def step(carry: Any) -> Any:
            t, blocks, last, dual, before, coupled = carry
            ahead = dual + (1 - one_minus_alpha) * (dual - before)
            i = None if self.merged else jax.random.randint(jax.random.fold_in(key, t), (), 0, K, jnp.int32)
            new, moved = self._update(problem, i, ahead, blocks, center.blocks, tau)
            last = (eta * last + problem.b - self._extrapolate(coupled, moved, K)) / (1 + eta)
            following = -(problem.last_gradient(last.astype(like.last.dtype))[1] + 2 * mu * (last - center.last))
            new_carry = (t + 1, new, last, following, dual, coupled + moved)
            return trees.cast_like(new_carry, carry)

        carry = (jnp.int32(0), *center, memory, memory, problem.coupling(center.blocks).astype(wide))
        _, blocks, last, *_ = jax.lax.while_loop(lambda carry: carry[0] < steps, step, carry)
        new = trees.cast_like(Blocks(blocks, last), like)
        return new, self.look(problem, new), steps * (problem.size if self.merged else 1)

    @staticmethod
    def _extrapolate(coupled: Float[Array, " n"], moved: Float[Array, " n"], K: int) -> Float[Array, " n"]:
        """r: Σ A_j x_j with the change of the block that was drawn counted K times."""
        return coupled + K * moved

    def _update(
        self, problem: Any, i: Any, dual: Array, blocks: Array, center: Array, tau: Any
    ) -> tuple[Float[Array, "K p"], Float[Array, " n"]]:
        """The blocks, x_i (all where i is None) now the minimizer of its subproblem; and the change of Σ A_j x_j.

        ψ_i(u) + ⟨A_iᵀ ỹ, u⟩ + (τ/2) ‖u − x_i‖² is f_i(u) + ((2μ + τ)/2) ‖u − v‖² and a constant.
        """
        weight = 2 * self.mu + tau
        if i is None:
            slopes = jnp.einsum("knp,n->kp", problem.matrices, dual, precision="highest")
            new = _all_blocks(problem, (2 * self.mu * center + tau * blocks - slopes) / weight, 1 / weight)
            return new, problem.coupling(new - blocks)
        A, x = problem.matrices[i], blocks[i]
        slope = jnp.matmul(A.T, dual, precision="highest")
        u = problem.block_prox(i, (2 * self.mu * center[i] + tau * x - slope) / weight, 1 / weight)
        return blocks.at[i].set(u), jnp.matmul(A, u - x, precision="highest")

    def calls(self, problem: Any, before: Any, after: Any) -> Calls:
        """A `gradient` is one of f_m: one an inner step, and one at the new center."""
        return Calls(gradient=(after - before) // (problem.size if self.merged else 1) + 1)


def _all_blocks(problem: Any, v: Float[Array, "K p"], step: Any) -> Float[Array, "K p"]:
    """The prox of every block."""
    return jax.vmap(problem.block_prox, in_axes=(0, 0, None))(jnp.arange(problem.size), v, step)
