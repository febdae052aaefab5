"""The sub-gradient method with a small start: low-rank matrices from measurements with outliers, rank unknown.

Solves min f(U) = (1/m) ‖y − A(UUᵀ)‖₁ over U of shape (n, r'), where y = A(X*) + s for X* ⪰ 0 of a rank r ≤ r' that
nobody need know, and s is anything on a fraction p of the measurements, or dense noise. From a start of size α ≪ 1
the signal grows out of 0 long before what is not signal does, and a schedule that ends in time leaves only the signal.

    start:  C = (1/m) Σ sign(yᵢ) (Aᵢ + Aᵢᵀ)/2 ≈ VΛVᵀ with the r' largest eigenvalues,   U₀ = α V (Λ₊)^{1/2}
    loop:   Q_t = (1/m) Σ sign(⟨Aᵢ, U_tU_tᵀ⟩ − yᵢ) (Aᵢ + Aᵢᵀ)/2,   U_{t+1} = U_t − η_t Q_t U_t

    η_t = η₀ ρᵗ / ‖Q_t‖_F     geometric, for unknown noise
    η_t = η₀ f(U_t)           in proportion to the loss, where it falls to 0: no noise
    η_t = η₀                  constant: ends in a neighbourhood

| paper     | here                                            |
|-----------|-------------------------------------------------|
| U_t       | `x`, of shape (n, r')                           |
| r'        | the rank of the problem's `PSD`                 |
| α         | `alpha` of `small_signs`                        |
| η₀, ρ     | `step_size`, `decay`                            |
| ‖UUᵀ‖     | `growth`, relative to the size that y tells     |

Source: J. Ma and S. Fattahi, *Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small
Initialization, Noisy Measurements, and Over-parameterization*, JMLR 24 (2023), arXiv 2202.08788: Algorithm 1 with its
three step sizes.

Guarantee: for Gaussian Aᵢ and m ≳ n r² / (1 − p)² up to logarithms, whatever r' and however large the outliers, the
error falls linearly to a power of α; with Gaussian noise σ it ends near √(σ² n r² / m), though the global minima
of f fit the noise. The exact constants and exponents are recalled, not checked against the paper's text.

Departures: the factor 2 of the sub-gradient 2QU is taken into the step size. `growth`, `check_schedule` and the
test that ends a run are ours: it ends when a geometric step is below `tolerance`, if the signal has grown by then.

Use it where outliers or the rank are unknown. The schedule must be long enough for the signal to grow from α² to 1:
`minimize` refuses one with which none can (`check_schedule`, which can be asked for a known rank); inside `jit` such a
run ends at the step limit with `state.growth` far below 1 (its error is 1.0: U is still 0 to the eye). A smaller α
gives a smaller error and needs a longer schedule. A large start with r' > r fits the noise.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..core.errors import InputError, check_choice, check_count, check_positive, is_traced
from ..core.solver import GRADIENT, Solver, State
from ..core.stopping import StoppingRule
from .operators import Operator
from .problem import Recovery
from .starts import Start, signs

__all__ = ["check_schedule", "sign_rip", "small_signs", "subgm_robust_recovery"]

_SCHEDULES = ("geometric", "loss", "constant")
_GROWN = 0.1  # of the size that the data tell, which outliers enlarge by a few times at most


class SubGMState(State):
    """All of it is of `x`; `growth` is ‖UUᵀ‖_F over the size of the signal as the data tell it.

    `signal_gradient` is Q, `length` the numerator of the next step.
    """

    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    signal_gradient: Float[Array, "n n"]
    length: Float[Array, ""]
    size: Float[Array, ""]
    growth: Float[Array, ""]
    done: Bool[Array, ""]


class SubGM(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"measurements", "signal_gradient"})

    step_size: Any
    decay: Any
    tolerance: Any
    schedule: str = eqx.field(static=True)

    @property
    def name(self) -> str:
        return "subgm_robust_recovery"

    def stopping(self) -> StoppingRule | None:
        return None  # the sub-gradient does not vanish at the solution

    def check(self, problem: Any, x: Float[Array, "n r"]) -> None:
        check_schedule(problem, x, self)

    def init(self, problem: Any, x: Float[Array, "n r"], *, key: Array | None) -> SubGMState:
        length = jnp.asarray(self.step_size, jnp.promote_types(x.dtype, jnp.float32))
        size = signal_size(problem).astype(length.dtype)
        return SubGMState(**self._look(problem, x, length, size), size=size, calls=GRADIENT)

    def step(self, problem: Any, state: SubGMState, *, key: Array | None) -> SubGMState:
        q = state.signal_gradient
        eta = {
            "geometric": lambda: state.length / jnp.linalg.norm(q),
            "loss": lambda: state.length * state.value,
            "constant": lambda: state.length,
        }[self.schedule]()
        x = (state.x - eta * (q @ state.x)).astype(state.x.dtype)
        length = state.length * self.decay if self.schedule == "geometric" else state.length
        here = self._look(problem, x, length, state.size)
        return SubGMState(**here, size=state.size, calls=state.calls + GRADIENT)

    def _look(self, problem: Any, x: Float[Array, "n r"], length: Array, size: Array) -> dict[str, Any]:
        value, e = problem.signal_gradient(x)
        q = _symmetric(e).astype(length.dtype)
        growth = (jnp.linalg.norm(x.T @ x) / size).astype(length.dtype)
        ended = (length < self.tolerance) if self.schedule == "geometric" else jnp.bool_(False)
        return {
            "x": x,
            "value": value,
            "gradient_norm": 2 * jnp.linalg.norm(q @ x).astype(value.dtype),
            "signal_gradient": q,
            "length": length,
            "growth": growth,
            "done": ended & (growth >= _GROWN),
        }


def signal_size(problem: Recovery) -> Float[Array, ""]:
    """‖X*‖_F as the data tell it: their lower quartile, over that of a normal variable.

    Measurements of X* by independent normal entries of variance gain/m are normal with standard deviation
    ‖X*‖_F √(gain/m); outliers on less than three quarters of them move the quartile by a bounded factor.
    """
    typical = jnp.quantile(jnp.abs(problem.y).reshape(-1), 0.25) / 0.31864  # P(|z| ≤ 0.31864) = ¼
    return typical / jnp.sqrt(problem.gain / problem.op.count)


def small_signs(alpha: float = 1e-4) -> Start:
    """The start: `signs`, the leading eigenvectors of the signs' back-projection, times `alpha`.

    **Raises:** `InputError` for an `alpha` that is not positive.
    """
    check_positive("alpha", alpha)
    return lambda problem, key: alpha * signs(problem, key)


def check_schedule(problem: Recovery, x0: Float[Array, "n r"], solver: SubGM, *, rank: int = 1) -> None:
    """Refuse a geometric schedule that ends before the signal can have grown from `x0`.

    While U is small Q stays what it is at 0, and the i-th direction of the signal grows by

        Π_t (1 + η₀ ρᵗ λᵢ / ‖Q‖_F) ≤ exp(η₀ / (1 − ρ) · λᵢ / ‖Q‖_F),    λᵢ the i-th eigenvalue of −Q at 0

    which must reach √(size / ‖U₀U₀ᵀ‖_F).

    **Arguments:** `problem`, `x0`, `solver` — of the run; `rank` — which eigenvalue must be able to grow: the
    signal's rank, where it is known.

    **Raises:** `InputError` with the decay that would do.
    """
    check_count("rank", rank, 1)
    if solver.schedule != "geometric":
        return
    q = _symmetric(problem.op.adjoint(jnp.sign(problem.y)))  # −Q at 0, up to a factor
    rate = float(jnp.linalg.eigvalsh(q)[-rank] / jnp.linalg.norm(q))
    needed = 0.5 * math.log(float(signal_size(problem) / jnp.linalg.norm(x0.T @ x0)))
    if rate <= 0:
        raise InputError("rank", rank, "at most the number of positive eigenvalues that the signs of y tell")
    total = float(solver.step_size) / (1 - float(solver.decay))
    if total * rate < needed:
        longer = 1 - float(solver.step_size) * rate / (1.5 * needed)
        raise InputError(
            "decay",
            f"{float(solver.decay):g}, which makes step_size / (1 − decay) = {total:.3g}",
            f"{needed / rate:.3g} or more of it: the signal has not grown when the steps end; try decay={longer:.4f}",
        )


def sign_rip(
    op: Operator, rank: int, *, key: Array, noise: Float[Array, " m"] | None = None, samples: int = 50
) -> Float[np.ndarray, " samples"]:
    """How far the signs of measurements are from telling a matrix, at random matrices X of this rank and norm 1.

        sup over Y of rank ≤ `rank`, ‖Y‖_F = 1:   ⟨Q(X) − φ(X) X, Y⟩ / φ(X),     Q(X) = (1/m) Σ sign(⟨Aᵢ, X⟩ + sᵢ) Aᵢ

    with Aᵢ in units in which their entries have variance 1 on average, and φ = √(2/π) · mean exp(−s²/2). The
    largest over all X is the constant of Sign-RIP, which the theory wants small; random ones bound it from below.

    **Arguments:** `op` — on square matrices; `noise` — s, in units of ‖X‖; by default none.

    **Returns:** one deviation a sample.
    """
    check_count("rank", rank, 1)
    check_count("samples", samples, 1)
    s = jnp.zeros(op.out_shape) if noise is None else jnp.asarray(noise)
    spread = jnp.sqrt(op.gain / op.count)
    phi = math.sqrt(2 / math.pi) * jnp.mean(jnp.exp(-(s**2) / 2))

    def deviation(key: Array) -> Array:
        u = jax.random.normal(key, (op.shape[0], rank), s.dtype)
        x = u @ u.T
        x = x / jnp.linalg.norm(x)
        q = _symmetric(op.adjoint(jnp.sign(op.mv(x) / spread + s))) / (op.count * spread)
        values = jnp.linalg.svd(q / phi - x, compute_uv=False)
        return jnp.linalg.norm(values[:rank])

    return np.asarray(jax.lax.map(deviation, jax.random.split(key, samples)))


def _symmetric(e: Float[Array, "n n"]) -> Float[Array, "n n"]:
    return (e + e.T) / 2


def subgm_robust_recovery(
    step_size: float = 0.3, decay: float = 0.99, *, schedule: str = "geometric", tolerance: float = 1e-7
) -> SubGM:
    """The sub-gradient method with a small start (Ma and Fattahi 2023), from `small_signs`.

    For `Recovery(op, y, PSD(rank), Absolute())`, with any rank that is at least the signal's.

    **Arguments:**
    - `step_size`: η₀: in the geometric schedule the norm of the first step, relative to U.
    - `decay`: ρ < 1 of the geometric schedule.
    - `schedule`: `"geometric"`; `"loss"`, in proportion to the loss, for data without noise; or `"constant"`.
    - `tolerance`: the run ends when a geometric step is smaller than that.

    A step asks the signal's gradient once, counted as a gradient; it holds one n × n matrix.

    **Raises:** `InputError` for numbers out of range.
    """
    check_positive("step_size", step_size)
    check_positive("decay", decay)
    if not is_traced(decay) and not decay < 1:
        raise InputError("decay", decay, "a number above 0 and below 1")
    check_positive("tolerance", tolerance)
    check_choice("schedule", schedule, _SCHEDULES)
    return SubGM(step_size, decay, tolerance, schedule)
