"""Phase retrieval: a signal from the squared magnitudes of its measurements.

Finds x ∈ Rⁿ or Cⁿ with |aᵢᴴx|² = yᵢ, i = 1 … m, up to a global sign or phase: a start that correlates with x, then
descent on a loss. With u = A z, ψ = √y and 1_T, w the weights of `losses.py`:

| method                 | z ←                                                      | step, real and complex |
|------------------------|----------------------------------------------------------|------------------------|
| `wirtinger`            | z − (μₜ/λ₀²)(1/m) A*((|u|² − y) ⊙ u)                     | 0.2, 0.2               |
| `truncated-wirtinger`  | z + (2μ/m) A*(1_T ⊙ (y − |u|²)/ū)                        | 0.2, 0.2               |
| `amplitude`            | z − (μ/m) A*(u − ψ u/|u|)                                | 0.6, 1                 |
| `truncated-amplitude`  | z − (μ/m) A*(1_T ⊙ (u − ψ u/|u|))                        | 0.6, 1                 |
| `reweighted-amplitude` | z − (μ/m) A*(w ⊙ (u − ψ u/|u|))                          | 2, 4                   |
| `alternating`          | argmin ‖A z − ψ u/|u|‖, by conjugate gradients           |                        |
| `lbfgs`                | L-BFGS on ½ Σ (|u| − ψ)², on real and imaginary parts    |                        |

Here μₜ = min(1 − e^{−t/330}, μ) at t = 1, 2, …; `METHODS` has the start of each method too.

| paper      | here                                                     |
|------------|----------------------------------------------------------|
| z, a       | `x`, the operator's rows                                 |
| m          | `op.gain`, which is m for rows with E‖a‖² = n            |
| λ₀²        | `problem.unit`, mean(y), frozen at the start             |
| μ          | `step_size`                                              |

Sources: Y. Chi, Y. M. Lu and Y. Chen, *Nonconvex Optimization Meets Low-Rank Matrix Factorization: An Overview*, IEEE
Transactions on Signal Processing 67 (2019); the papers of the losses and starts are named in `losses.py` and
`starts.py`; for `alternating`: P. Netrapalli, P. Jain and S. Sanghavi, *Phase Retrieval using Alternating Minimization*
(2013).

Guarantee: for Gaussian rows Wirtinger flow from the spectral start recovers x where m ≳ n log n, the truncated methods
where m ≳ n, in O(log 1/ε) steps. The constants are not known; the table `METHODS` has what was measured, and a run with
fewer measurements warns.

Departures: each method may have another's start, and `optimal` (Mondelli and Montanari 2018) needs the fewest
measurements of all. Wirtinger flow that diverges is run again with μ = 0.1, with a warning; inside `jit` it is not.
Starts come from Lanczos in place of power iteration. The paper's step of `reweighted-amplitude` for complex signals,
6 as recalled, finds fewer of them than 4 (at n = 128, m = 4n six of eight in place of all).

Use it for Gaussian measurements and for Fourier transforms behind masks (`CodedDiffraction`). Of one plain Fourier
transform no method here finds the signal: shifts and reflections have the same magnitudes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.calls import Calls
from ..core.errors import InputError, check_choice, check_positive, is_traced
from ..core.optimizer import optimizer
from ..core.setup import check_key
from ..core.solution import Solution
from ..core.solver import GRADIENT, Solver, State
from ..core.status import Ending
from ..core.stopping import StoppingRule
from ..parts.linalg import conjugate_gradient
from . import starts
from .losses import Amplitude, Intensity, Loss, ReweightedAmplitude, TruncatedAmplitude, TruncatedPoisson
from .operators import Operator, as_operator
from .recover import recover

__all__ = ["METHODS", "Method", "phase_retrieval", "wirtinger"]

_CAUTIOUS = 0.1  # where Wirtinger flow diverges


def wirtinger(learning_rate: float = 0.2, ramp: float = 330.0) -> optax.GradientTransformation:
    """Gradient descent with the step sizes of Wirtinger flow: min(1 − e^{−t/ramp}, learning_rate) at t = 1, 2, …

    **Source:** Candès, Li and Soltanolkotabi (2015), Section 4.
    """
    return optax.scale_by_schedule(lambda count: -jnp.minimum(-jnp.expm1(-(count + 1) / ramp), learning_rate))


class AlternatingState(State):
    """`gradient`, `value` and `gradient_norm` are those of `x`; `products` counts the inner iterations."""

    gradient: Array
    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    products: Array


class Alternating(Solver):
    """The phases of A x, then the signal that fits them best, in turn: for a `Recovery` with the loss `Amplitude`.

    Conjugate gradients go on from `x` until the residual has fallen by `tolerance`, or for `most` iterations, each
    counted as a gradient.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"measurements"})

    tolerance: Any = 1e-6
    most: Any = 100

    @property
    def name(self) -> str:
        return "alternating"

    def init(self, problem: Any, x: Array, *, key: Array | None) -> AlternatingState:
        value, gradient = problem.value_and_gradient(x)
        return AlternatingState(x, GRADIENT, gradient, value, trees.norm(gradient), jnp.int32(0))

    def step(self, problem: Any, state: AlternatingState, *, key: Array | None) -> AlternatingState:
        def normal(v: Array) -> Array:
            z = trees.unflatten(v, state.x)
            image = problem.structure.pull(problem.op, z, problem.op.mv(z))
            return trees.flatten(image) / (problem.gain * problem.unit)

        # With the phases of A x the residual of the normal equations at x is minus the gradient of the loss.
        flat, residual = trees.flatten(state.x), -trees.flatten(state.gradient)
        flat, products = conjugate_gradient(normal, flat, residual, self.tolerance, self.most)
        x = trees.unflatten(flat, state.x)
        value, gradient = problem.value_and_gradient(x)
        calls = state.calls + GRADIENT + Calls(gradient=products)
        return AlternatingState(x, calls, gradient, value, trees.norm(gradient), state.products + products)


class Method(NamedTuple):
    """One method: for a real signal, or a complex one.

    `loss` and `solver` make them, the latter from a step size; `step_size`: real and complex, or None; `start`: the
    paper's; `enough` says how many measurements a signal of n coordinates needs, and `condition` says it in words.
    """

    loss: Callable[[bool], Loss]
    solver: Callable[[float], Solver]
    step_size: tuple[float, float] | None
    start: str
    enough: Callable[[int, bool], float]
    condition: str


def _descent(step_size: float) -> Solver:
    return optimizer(optax.sgd, learning_rate=step_size)


def _lbfgs(_: float) -> Solver:
    return optimizer(optax.lbfgs)


def _alternating(_: float) -> Solver:
    return Alternating()


def _wirtinger(step_size: float) -> Solver:
    return optimizer(wirtinger, learning_rate=step_size)


def _times(real: float, complex: float) -> tuple[Callable[[int, bool], float], str]:
    """m ≥ a multiple of n, for real and for complex signals."""
    words = f"m ≥ {real:g} n for real signals and {complex:g} n for complex ones (Gaussian rows, measured)"
    return lambda n, is_real: (real if is_real else complex) * n, words


METHODS: dict[str, Method] = {
    "wirtinger": Method(
        lambda real: Intensity(), _wirtinger, (0.2, 0.2), "spectral",
        lambda n, real: n * math.log(n), "m ≥ n log n (the theorem's, with the constant 1)",
    ),
    "truncated-wirtinger": Method(
        lambda real: TruncatedPoisson(), _descent, (0.2, 0.2), "truncated", *_times(4, 5)
    ),
    "amplitude": Method(lambda real: Amplitude(), _descent, (0.6, 1.0), "truncated", *_times(4, 4)),
    "truncated-amplitude": Method(
        lambda real: TruncatedAmplitude(), _descent, (0.6, 1.0), "orthogonality_promoting", *_times(2.5, 4)
    ),
    "reweighted-amplitude": Method(
        lambda real: ReweightedAmplitude(10.0 if real else 5.0), _descent, (2.0, 4.0), "maximal_correlation",
        *_times(2.5, 4),
    ),
    "alternating": Method(lambda real: Amplitude(), _alternating, None, "spectral", *_times(4, 5)),
    "lbfgs": Method(lambda real: Amplitude(), _lbfgs, None, "truncated", *_times(4, 4)),
}  # fmt: skip
"""The methods by name."""


def phase_retrieval(
    op: Any,
    y: Array,
    method: str = "truncated-amplitude",
    *,
    init: str | Callable[..., PyTree] | PyTree | None = None,
    real: bool | None = None,
    step_size: float | None = None,
    steps: int = 2000,
    stop: StoppingRule | None | str = "auto",
    key: Array | int = 0,
    **options: Any,
) -> Solution:
    """Recover a signal from intensities y = |A x|².

    **Arguments:**
    - `op`: an `Operator`, a matrix of shape (m, n), or a Lineax operator.
    - `y`: intensities, of the operator's `out_shape`.
    - `method`: one of `METHODS`.
    - `init`: a start by name (one of `STARTS`, or `"random"`), a function `(problem, key) -> x0`, or a point; by
      default the method's own.
    - `real`: whether the signal is real: by default as the operator (or a point that is given) is. A real signal
      behind a complex operator stays real.
    - `step_size`: μ, in place of the method's own.
    - `steps`, `stop`, `key`, `options`: as for `recover`.

    **Returns:** the `Solution` of `minimize`.

    **Raises:** `InputError` where an argument cannot be used. Warns where there are fewer measurements than the
    method needs, and where Wirtinger flow diverged and was run again with a step size of 0.1.
    """
    check_choice("method", method, METHODS)
    op, row = as_operator(op), METHODS[method]
    drawn = check_key(key, "the start")
    begin = row.start if init is None else init
    if real is None:
        is_point = not (isinstance(begin, str) or callable(begin))
        real = not (jnp.iscomplexobj(begin) if is_point else jnp.issubdtype(op.dtype, jnp.complexfloating))
    if isinstance(begin, str):
        check_choice("init", begin, [*starts.STARTS, "random"])
        begin = starts.random(real=real) if begin == "random" else starts.start(begin, real=real)
    if step_size is not None:
        if row.step_size is None:
            raise InputError("step_size", step_size, f"none: {method} has no step size")
        check_positive("step_size", step_size)
    _warn_if_few(op, method, real)

    def run(mu: Any, **options: Any) -> Solution:
        solver, loss = row.solver(mu), row.loss(real)
        return recover(op, y, None, loss, init=begin, solver=solver, steps=steps, stop=stop, key=drawn, **options)

    own = 0.0 if row.step_size is None else row.step_size[0 if real else 1]
    if method != "wirtinger" or step_size is not None or options.get("throw"):
        return run(own if step_size is None else step_size, **options)
    solution = run(own, **options)
    if is_traced(solution.status) or np.ndim(solution.status.code) or solution.status.ending != Ending.DIVERGED:
        return solution
    warnings.warn(
        f"wirtinger diverged at step {int(solution.steps)} with step_size {own:g}; run again with {_CAUTIOUS:g}",
        stacklevel=2,
    )
    return run(_CAUTIOUS, **options)


def _warn_if_few(op: Operator, method: str, real: bool) -> None:
    count, row = op.count, METHODS[method]
    if is_traced(count) or int(count) >= row.enough(op.size, real):
        return
    warnings.warn(
        f"y: {int(count)} measurements of {op.size} coordinates, {int(count) / op.size:.2g} of each, may be too few "
        f"for {method}: {row.condition}",
        stacklevel=3,
    )
