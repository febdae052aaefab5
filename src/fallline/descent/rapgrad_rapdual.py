"""RapGrad and RapDual: a proximal point method whose subproblems are solved by an accelerated randomized loop.

RapGrad minimizes a finite sum f(x) = (1/m) Σ f_i(x) over a set X by single components' gradients; RapDual minimizes
Σ f_i(x_i) + f_m(x_m) over blocks with Σ A_i x_i + x_m = b by single blocks' subproblems. In both every part is
μ-weakly convex, so that a quadratic around the center makes it strongly convex. For l = 1, 2, …

    x̄^l ≈ argmin f(x) + (3μ/2) ‖x − x̄^{l−1}‖²,   by s steps of RaGrad             (RapGrad)
    x̄^l ≈ argmin f(x) + μ ‖x − x̄^{l−1}‖² under the constraint, by s steps of RaDual (RapDual)

| paper       | here                                              |
|-------------|---------------------------------------------------|
| x̄^l         | `x` of the state after l steps                    |
| x̄^l̂         | `sampled` of the state: uniform among x̄¹ … x̄^l     |
| μ, L        | `mu`, `smoothness`                                |
| s           | `inner_steps`                                     |
| RaGrad, RaDual | `rapgrad.py`, `rapdual.py`                     |

Source: G. Lan and Y. Yang, *Accelerated Stochastic Algorithms for Nonconvex Finite-sum and Multi-block
Optimization*, SIAM Journal on Optimization 2019 (arXiv 1805.05411), RapGrad and RapDual.

Guarantee: with the paper's s the expected squared stationarity of x̄^l̂ is at most 36 μ (f(x̄⁰) − f*)/k after k steps
(the constant from memory); O(μ (m + √(mL/μ) log(L/μ)) Δ_f/ε) component gradients, up to √m fewer than accelerated
methods on all components; RapDual up to √m fewer block updates than with all blocks at once.

Departures: the result `x` is the last center, where the paper returns a random one, which is `sampled`. The inner
steps are 4 ⌈m + √(m (2 + L/μ))⌉ by default (RapDual: 4/(1 − α)), our choice: the theory's, `theory_inner_steps`, are
ten times as many and cost more than they bring. RapGrad asks all m gradients at each new center; with `warm_start` it
asks none after the first, because the old ones, shifted by 2μ (x̄^{l−1} − x̄^l), are gradients of the new components
at the points where they were taken. What the paper does there is not verified, nor are its constants.

Accounts: `component_calls` in the state counts component gradients (RapGrad; m at each center, s between) or block
updates (RapDual). `calls` has the first as samples of the problem, rounded up: minibatches of its `batch_size`, or
`gradient`s of m. For RapDual a `gradient` is one of f_m. At each center RapDual asks one more prox of each block,
uncounted, to know how far from stationary it is.

Use it where L/μ is at least m: mildly non-convex, badly conditioned sums. μ is the largest negative curvature of any
part. RapGrad keeps two tables of m × d numbers. On three least squares problems (m = 100, smoothed SCAD) a quarter of
the default inner steps converged at L/μ = 10³ and diverged at 10⁴; half of them took 0.3 to 0.85 times the component
gradients of the default at 10³, and 0.9 to 3.2 times at 10⁴. The default is the safe one; shorter ones are warned of.
SVRG with a step size that is tuned took fewer gradients than the default at 10³, and as many at 10⁴.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.calls import strong
from ..core.errors import InputError, check_count
from ..core.problem import FiniteSum, Problem
from ..core.solver import Solver, State
from ..core.stopping import StoppingRule, gradient_norm
from ..parts.prox import Prox
from .rapdual import MultiBlock, RaDual
from .rapgrad import RaGrad, check_moduli

__all__ = ["ProximalPoint", "rapgrad_rapdual"]


class ProximalState(State):
    """`x` is the center; `value` and `gradient_norm` are of it, None with a warm start.

    `memory` is what the next inner loop begins from; `sampled` is uniform among the centers so far, the first excepted.
    """

    value: Float[Array, ""] | None
    gradient_norm: Float[Array, ""] | None
    memory: Any
    sampled: PyTree
    component_calls: Int[Array, ""]
    steps: Int[Array, ""]


class ProximalPoint(Solver):
    """The outer loop; see the module's docstring for the names."""

    random: ClassVar[bool] = True

    inner: RaGrad | RaDual

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    @property
    def name(self) -> str:
        return self.inner.name

    def stopping(self) -> StoppingRule | None:
        # The loop's own gradient norm knows of no set.
        blind = isinstance(self.inner, RaGrad) and self.inner.warm_start and self.inner.prox is not None
        return None if blind else gradient_norm(1e-6)

    def check(self, problem: Problem, x: PyTree) -> None:
        self.inner.check(problem, x)

    def init(self, problem: Any, x: PyTree, *, key: Array | None) -> ProximalState:
        look, asked = self.inner.begin(problem, x)
        calls = strong(self.inner.calls(problem, 0, asked))
        return ProximalState(x, calls, *look, trees.copy_tree(x), jnp.int32(asked), jnp.int32(0))

    def step(self, problem: Any, state: ProximalState, *, key: Array | None) -> ProximalState:
        inner, outer = jax.random.split(key)  # type: ignore[arg-type]
        x, look, more = self.inner.solve(problem, state.x, state.memory, key=inner)
        steps = state.steps + 1
        taken = jax.random.randint(outer, (), 0, steps) == 0
        sampled = jax.tree.map(lambda new, old: jnp.where(taken, new, old), x, state.sampled)
        asked = (state.component_calls + more).astype(jnp.int32)
        calls = state.calls + self.inner.calls(problem, state.component_calls, asked)
        return ProximalState(x, calls, *look, sampled, asked, steps)


def rapgrad_rapdual(
    problem: Problem,
    *,
    mu: float,
    smoothness: float,
    inner_steps: int | None = None,
    prox: Prox | None = None,
    warm_start: bool = False,
    merged: bool = False,
) -> ProximalPoint:
    """RapGrad for a `FiniteSum`, RapDual for a `MultiBlock` (Lan and Yang 2019); needs a random key.

    **Arguments:**
    - `problem`: the problem that it will run on, or another one of its kind.
    - `mu`: μ, of which every part is weakly convex: the largest negative curvature of one.
    - `smoothness`: L ≥ μ, the Lipschitz constant of each component's gradient, or of that of f_m.
    - `inner_steps`: s, at least the number of components or blocks; see above for the default.
    - `prox`: RapGrad's set X as a `Prox`, or a convex function that is added; the start must be in it.
    - `warm_start`: RapGrad asks no gradients at a new center, and so does not know its value.
    - `merged`: RapDual updates all blocks in each inner step: the deterministic twin.

    One step is one outer step. The run ends where the gradient norm is at most 1e-6: with a `prox` that of the gradient
    mapping, with blocks that of the prox-gradient and of the constraint's error together.

    **Raises:** `InputError` for numbers out of range, another kind of problem, and an option of the other method.
    """
    check_moduli(mu, smoothness)
    if inner_steps is not None:
        check_count("inner_steps", inner_steps, 1)
    if isinstance(problem, FiniteSum):
        if merged:
            raise InputError("merged", merged, "False for a FiniteSum: it has no blocks")
        if prox is not None and not isinstance(prox, Prox):
            raise InputError("prox", type(prox).__name__, "a Prox, such as a projection")
        return ProximalPoint(RaGrad(mu, smoothness, inner_steps, prox, bool(warm_start)))
    if isinstance(problem, MultiBlock):
        if prox is not None or warm_start:
            raise InputError(
                "prox and warm_start", "one of them", "neither for a MultiBlock: its blocks have their own"
            )
        return ProximalPoint(RaDual(mu, smoothness, inner_steps, bool(merged)))
    label = problem.label if isinstance(problem, Problem) else type(problem).__name__
    raise InputError("problem", label, "a FiniteSum, or a MultiBlock")
