"""Randomly initialized gradient descent for phase retrieval: a constant step from a random point, and no more.

Solves min f(x) = (1/4m) Σᵢ ((aᵢᵀx)² − yᵢ)² for a real signal x*, yᵢ = (aᵢᵀx*)², aᵢ ~ N(0, I), without a spectral
start, truncation, sample splitting or added noise:

    x₀ ~ N(0, (λ₀²/n) I),   λ₀² = (1/m) Σ yᵢ
    x_{t+1} = x_t − (η/λ₀²) ∇f(x_t)

The theory follows two numbers, the part of x_t along the signal and the part across it:

    α_t = |⟨x_t, x*⟩| / ‖x*‖,   β_t = ‖x_t − (⟨x_t, x*⟩ / ‖x*‖²) x*‖

With infinitely many measurements and ‖x*‖ = 1 they obey the state evolution

    α⁺ = (1 + 3η (1 − (α² + β²))) α,   β⁺ = (1 + η (1 − 3 (α² + β²))) β

In the first stage β falls to 1/√3 and α/β grows by about 1 + 2η a step, from 1/√n to a constant; then the error
falls by a constant factor a step.

| paper         | here                          |
|---------------|-------------------------------|
| η             | `step_size`                   |
| x*            | `signal`                      |
| α_t, β_t      | `signal`, `perpendicular` of the state |
| x^(l)         | `leave_one_out`               |
| x^sgn         | a run on `random_signs`       |

Source: Y. Chen, Y. Chi, J. Fan and C. Ma, *Gradient Descent with Random Initialization: Fast Global Convergence for
Nonconvex Phase Retrieval*, Mathematical Programming 176 (2019), arXiv 1803.07726: the update, the approximate state
evolution, and the leave-one-out and random-sign sequences of the analysis.

Guarantee: for m ≥ C n log¹³ n and a small constant η, with probability 1 − O(1/n), dist(x_t) ≤ γ (1 − ρ)^{t − T}
‖x*‖ with a constant ρ > 0 and T = O(log n): O(log n + log 1/ε) steps.

Departures: the sum is divided by the operator's gain Σᵢ‖aᵢ‖²/n, which is m on average, so that rows of any size do;
the paper's unit norm is λ₀, from the data.

Use it where measurements are many (m ≥ 10n) and the simplest method will do, or to watch a random start leave the
saddle. With fewer it loses to a start from the data: of 50 trials with n = 100 and 1000 steps, 12, 44, 78, 82 and
100% succeed at m/n = 3, 4, 5, 6 and 8, with the start `"optimal"` of `recover` 88% at 3 and all from 4 on; amplitude
losses need fewer measurements still. The answer is x* or −x*. A start of norm √n instead of λ₀ overflows; so may
η ≥ 0.3. A start exactly across the signal never leaves α = 0 with infinitely many measurements.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core import trees
from ..core.errors import InputError, check_count, check_positive, is_traced
from ..core.solver import GRADIENT, Solver, State
from .losses import Intensity, square
from .operators import Dense
from .problem import Recovery
from .structures import Vector

__all__ = ["leave_one_out", "random_init_phase_retrieval", "random_signs", "state_evolution"]

_LARGE_STEP = 0.3


class RandomInitState(State):
    """All of it is of `x`: `signal` is α_t and `perpendicular` β_t, None where the signal is not known."""

    gradient: Float[Array, " n"]
    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    signal: Float[Array, ""] | None
    perpendicular: Float[Array, ""] | None


class RandomInitPhaseRetrieval(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "measurements"})

    step_size: Any
    signal: Any

    def init(self, problem: Any, x: Float[Array, " n"], *, key: Array | None) -> RandomInitState:
        _check(problem, x)
        if self.signal is not None and np.shape(self.signal) != np.shape(x):
            raise InputError("signal", trees.describe(self.signal), f"the shape of x0, {np.shape(x)}")
        if (m := math.prod(problem.op.out_shape)) < problem.op.size:
            warnings.warn(f"{m} measurements of {problem.op.size} coordinates do not tell a signal", stacklevel=2)
        return RandomInitState(**self._look(problem, x), calls=GRADIENT)

    def step(self, problem: Any, state: RandomInitState, *, key: Array | None) -> RandomInitState:
        x = (state.x - self.step_size * state.gradient).astype(state.x.dtype)
        return RandomInitState(**self._look(problem, x), calls=state.calls + GRADIENT)

    def _look(self, problem: Any, x: Float[Array, " n"]) -> dict[str, Any]:
        value, gradient = problem.value_and_gradient(x)
        along, across = (None, None) if self.signal is None else _parts(x, self.signal)
        return {
            "x": x,
            "gradient": gradient,
            "value": value,
            "gradient_norm": trees.norm(gradient),
            "signal": along,
            "perpendicular": across,
        }


def _parts(x: Float[Array, " n"], signal: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """α and β of a point: the sizes of its parts along the signal and across it."""
    direction = signal / trees.norm(signal)
    along = jnp.sum(x * direction)
    return jnp.abs(along), trees.norm(x - along * direction)


def _check(problem: Any, x: Any) -> None:
    if not isinstance(problem, Recovery):
        raise InputError("problem", type(problem).__name__, "a Recovery problem")
    if not isinstance(problem.structure, Vector):
        raise InputError("problem", f"a Recovery of {type(problem.structure).__name__}", "one of a Vector")
    if not isinstance(problem.loss, Intensity):
        raise InputError("problem", f"a Recovery with the loss {type(problem.loss).__name__}", "the loss Intensity")
    if jnp.iscomplexobj(x):
        raise InputError("x0", trees.describe(x), "a real array: the method is for real signals")


def state_evolution(
    alpha: Any, beta: Any, step_size: float, steps: int
) -> tuple[Float[np.ndarray, "t ..."], Float[np.ndarray, "t ..."]]:
    """α_t and β_t for t = 0 … `steps` with infinitely many measurements of a signal of norm 1.

    **Arguments:** `alpha`, `beta` — those of the start, numbers or arrays of one shape; `step_size` — η.

    **Raises:** `InputError` for an η that is not positive, or a negative number of steps.

    **Source:** Chen et al. (2019), the approximate state evolution.
    """
    check_positive("step_size", step_size)
    check_count("steps", steps, 0)
    path = [(np.asarray(alpha, np.float64), np.asarray(beta, np.float64))]
    for _ in range(steps):
        a, b = path[-1]
        size = a**2 + b**2
        path.append(((1 + 3 * step_size * (1 - size)) * a, (1 + step_size * (1 - 3 * size)) * b))
    alphas, betas = zip(*path, strict=True)
    return np.stack(alphas), np.stack(betas)


def leave_one_out(
    problem: Recovery, x0: Float[Array, " n"], solver: RandomInitPhaseRetrieval, rows: Any, steps: int
) -> Float[np.ndarray, "t l"]:
    """‖x_t − x_t^(l)‖ / ‖x_t‖ for t = 0 … `steps` and each l of `rows`.

    The run x^(l) begins at the same point and never sees the measurement l: its term is left out of f, all
    else stays. That the two stay together for every l is what makes x_t nearly independent of each measurement.

    **Arguments:** `problem`, `x0`, `solver` — of the run; `rows` — indices of measurements, counted in C order.

    **Raises:** `InputError` for another problem, or an index out of range.

    **Source:** Chen et al. (2019), the leave-one-out sequences.
    """
    _check(problem, x0)
    check_count("steps", steps, 0)
    rows, count = np.asarray(rows, np.int32).reshape(-1), math.prod(problem.op.out_shape)
    if not rows.size or rows.min() < 0 or rows.max() >= count:
        raise InputError("rows", rows, f"indices from 0 to {count - 1}")
    return np.asarray(_apart(problem, jnp.asarray(x0), solver.step_size, jnp.asarray(rows), steps))


@eqx.filter_jit
def _apart(problem: Recovery, x0: Array, step_size: Any, rows: Int[Array, " l"], steps: int) -> Float[Array, "t l"]:
    op, y, scale = problem.op, jnp.asarray(problem.y), problem.gain * problem.unit

    def step(x: Array, left_out: Int[Array, ""]) -> Array:
        u = op.mv(x)
        residual = ((square(u) - y) * u).reshape(-1).at[left_out].set(0, mode="drop").reshape(y.shape)
        return (x - step_size * problem.structure.pull(op, x, residual) / scale).astype(x.dtype)

    def both(points: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        x, others = points
        apart = jax.vmap(trees.norm)(others - x) / trees.norm(x)
        return (step(x, jnp.int32(y.size)), jax.vmap(step)(others, rows)), apart

    others = jnp.broadcast_to(x0, (len(rows), *x0.shape))
    return jax.lax.scan(both, (x0, others), length=steps + 1)[1]


def random_signs(problem: Recovery, signal: Float[Array, " n"], key: Array) -> Recovery:
    """The same problem with the sign of each ⟨aᵢ, x*⟩ drawn anew: the measurements yᵢ do not change by that.

    A run on it from the same start stays near that of `problem`, although it knows nothing of the signs: α_t is
    nearly independent of them.

    **Arguments:** `problem` — with a real `Dense` operator; `signal` — x*.

    **Raises:** `InputError` for another operator.

    **Source:** Chen et al. (2019), the random-sign sequence.
    """
    op = problem.op
    if not isinstance(op, Dense) or jnp.iscomplexobj(op.matrix):
        raise InputError("problem", f"a Recovery with {type(op).__name__} of {op.dtype}", "a real Dense operator")
    direction = jnp.reshape(signal, -1) / trees.norm(signal)
    along = op.matrix @ direction
    drawn = jax.random.rademacher(key, along.shape, along.dtype) * jnp.abs(along)
    matrix = op.matrix + jnp.outer(drawn - along, direction)
    return Recovery(Dense(matrix, op.signal), problem.y, problem.structure, problem.loss)


def random_init_phase_retrieval(step_size: float = 0.1, signal: Any = None) -> RandomInitPhaseRetrieval:
    """Gradient descent for a `Recovery` of a real vector with the loss `Intensity`, from a random start.

    `recover(A, y, loss=Intensity(), init="random", solver=random_init_phase_retrieval())` is the paper's method.

    **Arguments:**
    - `step_size`: η, in units of the data; theory has it a small constant, the paper's figures 0.1.
    - `signal`: x*, where it is known: then `signal` (α_t) and `perpendicular` (β_t) can be recorded.

    **Raises:** `InputError` for a step size that is not positive, or a signal that is zero or not real. Warns for
    one of 0.3 and more; a run warns where there are fewer measurements than coordinates.
    """
    check_positive("step_size", step_size)
    if not is_traced(step_size) and step_size >= _LARGE_STEP:
        warnings.warn(f"step_size: {step_size:g} may diverge; take at most 0.2", stacklevel=2)
    if signal is not None:
        if not trees.is_floating(signal) or jnp.iscomplexobj(signal):
            raise InputError("signal", trees.describe(signal), "a real floating array")
        trees.check_width("signal", signal)
        if not is_traced(signal):
            check_positive("the norm of signal", float(np.linalg.norm(signal)))
    return RandomInitPhaseRetrieval(step_size, signal)
