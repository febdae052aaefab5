"""Power k-means: k-means by way of power means, annealed from a smooth objective to the minimum.

Solves min f_{−∞}(Θ) = Σᵢ minⱼ ‖xᵢ − θⱼ‖² through f_s(Θ) = Σᵢ M_s(‖xᵢ − θ₁‖², …, ‖xᵢ − θₖ‖²) with the power
mean M_s(y) = ((1/k) Σⱼ yⱼˢ)^{1/s}, which falls to the minimum as s → −∞. M_s is concave for s ≤ 1, so
its tangent majorizes it, and the majorizer's minimum is a weighted mean:

    w_ij ← ∂M_s/∂y_j = (1/k) D_ij^{s−1} ((1/k) Σ_l D_il^s)^{1/s−1},   D_ij = ‖xᵢ − θⱼ‖²
    θ_j ← Σᵢ w_ij xᵢ / Σᵢ w_ij
    s ← η s

| paper      | here                        |
|------------|-----------------------------|
| Θ          | `x`, of shape (k, d)        |
| s, s₀      | `s`, `s0`                   |
| η          | `eta`                       |
| f_s, f_{−∞} | `surrogate`, `value`       |

Source: J. Xu and K. Lange, *Power k-Means Clustering*, ICML 2019 (PMLR 97),
the power k-means algorithm.

Guarantee: at fixed s a step never raises f_s, and f_s falls with s, so f_s(Θ) falls along the whole
run; as s → −∞ f_s converges to f_{−∞} uniformly on compact sets. Centers stay in the convex hull of the
points. A step costs O(nkd), as Lloyd's does.

Departures: none in the updates. Where s ends and when to stop are our choices: s stops at `s_min`, and
the run ends when five steps in a row changed no assignment and s is at most −20 (or has reached an
`s_min` above that); earlier, an unchanged assignment may only mean that the centers have not parted yet.
Weights are computed and normalized as logarithms, because D^{s−1} overflows; a squared distance of 0
counts as the least normal number.

Use it where Lloyd's result depends on the seeds. Its `x` is where annealing ended, next to the means of
its points: finish with `minimize(problem, solution.x, lloyd())`. In high dimension all D_ij are nearly
equal: at s = −1 the centers fall onto the mean of all points and part late, so that `s0` must be lower
(in the claims' simulation −1 is as good as any up to d = 50; at d = 100 it ends twice as far from the true
clusters as −9). Pick it without labels, by the k-means objective. In two dimensions Lloyd's algorithm
with as many passes, spent on restarts, does as well.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..core import trees
from ..core.errors import InputError, check_count, is_traced
from ..core.solver import GRADIENT, Solver, State
from ..core.stopping import StoppingRule
from .k_means import look

__all__ = ["power_k_means"]

_SETTLED = 5  # steps without a changed assignment that end a run,
_DEEP = -20.0  # once s is as low as this


class PowerKMeansState(State):
    """All of it is of `x`: `value` is f_{−∞}, `surrogate` is f_s.

    `log_ratios` is log(D_ij / minₗ D_il), and `log_means` the logarithm of each row's power mean of these ratios.
    """

    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    s: Float[Array, ""]
    surrogate: Float[Array, ""]
    log_ratios: Float[Array, "n k"]
    log_means: Float[Array, " n"]
    labels: Int[Array, " n"]
    unchanged: Int[Array, ""]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


class PowerKMeans(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"squared_distances"})

    s0: Any
    eta: Any
    anneal_every: Any
    s_min: Any

    def stopping(self) -> StoppingRule | None:
        return None  # the gradient of f_{−∞} is zero at every fixed point of Lloyd's algorithm

    def init(self, problem: Any, x: Float[Array, "k d"], *, key: Array | None) -> PowerKMeansState:
        s = jnp.asarray(self.s0, trees.real_dtype(x))
        here = _look(problem, x, s)
        zero = jnp.int32(0)
        return PowerKMeansState(**here, calls=GRADIENT, unchanged=zero, steps=zero, done=jnp.bool_(False))

    def step(self, problem: Any, state: PowerKMeansState, *, key: Array | None) -> PowerKMeansState:
        weights = jax.nn.softmax(log_tangent(state.log_ratios, state.log_means, state.s), axis=0)
        x = jnp.matmul(weights.T, problem.data, precision="highest").astype(state.x.dtype)

        steps = state.steps + 1
        annealed = jnp.maximum(self.eta * state.s, self.s_min)
        s = jnp.where(steps % self.anneal_every == 0, annealed, state.s)

        here = _look(problem, x, s)
        unchanged = jnp.where(jnp.all(here["labels"] == state.labels), state.unchanged + 1, 0)
        done = (unchanged >= _SETTLED) & (s <= jnp.maximum(_DEEP, self.s_min))
        return PowerKMeansState(**here, calls=state.calls + GRADIENT, unchanged=unchanged, steps=steps, done=done)


def _look(problem: Any, x: Float[Array, "k d"], s: Float[Array, ""]) -> dict[str, Any]:
    """The point with all that the step from it needs: one pass over the data.

    M_s is homogeneous, so its derivative depends on the ratios of the distances alone. With the nearest
    center's as 1, rounding does not grow with |s| where a weight is not small.
    """
    here = look(problem, x)
    distances = here.squared_distances
    logs = jnp.log(jnp.maximum(distances, jnp.finfo(distances.dtype).tiny))
    nearest = jnp.min(logs, axis=1)
    log_ratios = logs - nearest[:, None]
    log_means = log_power_mean(log_ratios, s)
    return {
        "x": x,
        "value": here.value,
        "gradient_norm": trees.norm(here.gradient),
        "s": s,
        "surrogate": jnp.sum(jnp.exp(nearest + log_means)),
        "log_ratios": log_ratios,
        "log_means": log_means,
        "labels": here.labels,
    }


def log_power_mean(log_y: Float[Array, "n k"], s: Float[Array, ""]) -> Float[Array, " n"]:
    """log M_s of each row's positive numbers y, from their logarithms."""
    return (jax.nn.logsumexp(s * log_y, axis=1) - jnp.log(log_y.shape[1])) / s


def log_tangent(log_y: Float[Array, "n k"], log_mean: Float[Array, " n"], s: Float[Array, ""]) -> Float[Array, "n k"]:
    """log ∂M_s/∂y: since ((1/k) Σ y^s)^{1/s−1} = M_s^{1−s}, the weight is (1/k) (M_s / y)^{1−s}."""
    return (1 - s) * (log_mean[:, None] - log_y) - jnp.log(log_y.shape[1])


def power_k_means(s0: float = -1.0, *, eta: float = 1.05, anneal_every: int = 1, s_min: float = -120.0) -> PowerKMeans:
    """Power k-means (Xu and Lange 2019) for a `KMeans` problem; the starting point is the seeds, of shape (k, d).

    **Arguments:**
    - `s0`: the first power, below 0: −1 in low dimension, −3 around d = 50, −9 to −18 above.
    - `eta`: η > 1, by which s is multiplied; a faster one is nearer to Lloyd's algorithm.
    - `anneal_every`: steps between two changes of s.
    - `s_min`: where s stops, at most `s0`; equal to it, s is fixed (at −1: k-harmonic means).

    A step is one pass over the data, counted as one gradient: the distances of the new centers give
    their value, gradient and surrogate, and the next update. The run ends by the method's own test.

    **Raises:** `InputError` for numbers out of range.
    """
    for name, power in {"s0": s0, "s_min": s_min}.items():
        _check_between(name, power, -math.inf, 0.0)
    _check_between("eta", eta, 1.0, math.inf)
    check_count("anneal_every", anneal_every, 1)
    if not is_traced((s0, s_min)) and s_min > s0:
        raise InputError("s_min", s_min, f"at most s0 = {s0:g}")
    return PowerKMeans(s0, eta, anneal_every, s_min)


def _check_between(argument: str, value: Any, low: float, high: float) -> None:
    if is_traced(value):
        return
    if isinstance(value, bool | str) or np.ndim(value) != 0 or not low < float(value) < high:
        bound = f"above {low:g}" if math.isfinite(low) else f"below {high:g}"
        raise InputError(argument, repr(value), f"a finite number {bound}")
