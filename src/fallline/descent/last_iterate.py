"""Last-iterate stochastic mirror descent: step sizes whose last point is as good as an average.

Solves min_{x ∈ X} f(x) + h(x), f and h convex, h (with the set X in it) simple, from stochastic subgradients g_t of f.
For t = 1, …, T, with D the Bregman divergence of a mirror map ψ,

    x_{t+1} = argmin_u h(u) + ⟨g_t, u − x_t⟩ + D(u, x_t) / η_t;   the answer is x_{T+1}

| `kind`               | η_t                                                | T       | f + h                  |
|----------------------|----------------------------------------------------|---------|------------------------|
| `"decreasing"`       | min(1/(2L), η / t^{1/p})                           | unknown | convex                 |
| `"constant"`         | min(1/(2L), η / T^{1/p})                           | known   | convex                 |
| `"linear"`           | min(1/(2L), η (T − t + 1) / T^{1 + 1/p})           | known   | convex                 |
| `"strong"`           | 1 / (μ (t + s + 2κ))                               | unknown | strongly convex        |
| `"strong_twice"`     | 2 / (μ (t + 1 + s + 4κ))                           | unknown | strongly convex        |
| `"strong_two_phase"` | 1 / (μc) for t ≤ ⌈T/2⌉, then 2 / (μ(2c + t − ⌈T/2⌉)) | known | strongly convex        |

where c = 1 + s + 2κ.

| paper          | here                                                                        |
|----------------|-----------------------------------------------------------------------------|
| η, T, L        | `eta`, `steps`, `smoothness`; κ = L/μ                                       |
| μ_f or μ_h     | `strong_convexity`, with `strong_part` "f" (s = 0) or "h" (s = 1)           |
| p              | `moment`: the noise has a finite p-th moment; 2 where its variance is finite |
| ψ, h           | `mirror` and `prox`, from `fallline.parts`                                  |

Source: Z. Liu and Z. Zhou, *Revisiting the Last-Iterate Convergence of Stochastic Gradient Methods*, ICLR 2024
(arXiv 2312.08531), the algorithm CSMD and the step sizes of its theorems.

Guarantee, with D₁ = D(x*, x₁), M of the nonsmooth part and σ² of the noise, in expectation and with high probability:
linear O(L D₁/T + (D₁/η + η (M² + σ²)) / √T), the others of p = 2 with a log T more; strongly convex
O(LD₁ / T or exp(−T/2κ) + (M² + σ²) log T / (μT)); heavy tails Õ(T^{−(p−1)/p}), for L = 0 and `UniformlyConvex(p)`.

Departures: the rates and the convex step sizes are the paper's; those of the strongly convex case and of heavy tails
are recalled, not checked against its text, so families rather than exact constants. A count beyond T keeps the last
positive step. ψ of the p-norm is scaled to be 1-strongly convex, as the theorems ask.

With `smoothness` 0, as for f that is only Lipschitz or of unknown L, no step is too large to be known as such: on a
smooth f a large η may then diverge. Of the schedules tune η anew: linear likes about three times as much. Use it
for convex objectives where the last point is what is kept. It promises no sparsity: the last point of a proximal
stochastic method need not have the zeros of the minimizer. Nothing is claimed for objectives that are not convex.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ..core.errors import InputError, check_choice, check_count, check_nonnegative, check_positive
from ..parts.mirror import Euclidean, Mirror, check_moment
from ..parts.prox import Prox, Zero

__all__ = ["last_iterate", "last_iterate_schedule", "prox_mirror"]

Kind = Literal["decreasing", "constant", "linear", "strong", "strong_twice", "strong_two_phase"]


class ProxMirrorState(NamedTuple):
    """Steps so far; ∇ψ(x) like the parameters in at least 32 bits, or None where that is x itself."""

    count: Int[Array, ""]  # type: ignore[assignment]  # the name that Optax's tools look for
    dual: Any


def decreasing(t: Array, eta: Any, p: Any) -> Array:
    """η / t^{1/p}."""
    return eta / t ** (1 / p)


def linear(t: Array, eta: Any, steps: Any, p: Any) -> Array:
    """η (T − t + 1) / T^{1 + 1/p}; 1 in place of T − t + 1 where t is beyond T."""
    return decreasing(jnp.asarray(steps, t.dtype), eta, p) * jnp.maximum(steps - t + 1, 1) / steps


def two_phase(t: Array, steps: Any, mu: Any, shift: Any) -> Array:
    """1/(μ c) up to τ = ⌈T/2⌉, then 2/(μ (2c + t − τ)), where c = 1 + s + 2κ."""
    return 2 / (mu * (2 * (1 + shift) + jnp.maximum(t - jnp.ceil(steps / 2), 0)))


def last_iterate_schedule(
    kind: Kind = "linear",
    eta: float | None = None,
    steps: int | None = None,
    *,
    smoothness: float = 0.0,
    strong_convexity: float | None = None,
    strong_part: Literal["f", "h"] = "f",
    moment: float = 2.0,
) -> optax.Schedule:
    """The step sizes η_t of the table above as an Optax schedule, whose count is t − 1.

    **Arguments:**
    - `kind`: a row of the table.
    - `eta`: η > 0, about √(D₁ / (M² + σ²)), for the first three; the others have none.
    - `steps`: T ≥ 1, for those that know T.
    - `smoothness`: L ≥ 0; 0 for none, or for none that is known: then nothing limits the steps.
    - `strong_convexity`: μ > 0 relative to ψ, for the last three; `strong_part`: of which part, "f" or "h".
    - `moment`: p in (1, 2], for the first three.

    **Raises:** `InputError` for what is missing, not used by that kind, or out of range.
    """
    check_choice("kind", kind, get_args(Kind))
    check_choice("strong_part", strong_part, ("f", "h"))
    check_nonnegative("smoothness", smoothness)
    check_moment("moment", moment)
    strong = kind.startswith("strong")
    if strong and eta is not None:
        raise InputError("eta", eta, f"None: the steps of '{kind}' follow from strong_convexity and smoothness")
    if not strong and strong_convexity is not None:
        raise InputError("strong_convexity", strong_convexity, f"None for '{kind}', or kind='strong'")
    check_positive(*(("strong_convexity", strong_convexity) if strong else ("eta", eta)))
    if steps is not None or kind in ("constant", "linear", "strong_two_phase"):
        check_count("steps", steps, 1)

    def schedule(count: ArrayLike) -> Float[Array, ""]:
        t = jnp.asarray(count, float) + 1
        if kind == "decreasing":
            step = decreasing(t, eta, moment)
        elif kind == "constant":
            step = decreasing(jnp.asarray(steps, float), eta, moment)
        elif kind == "linear":
            step = linear(t, eta, steps, moment)
        else:
            mu: Any = strong_convexity
            s, twice_kappa = int(strong_part == "h"), 2 * smoothness / mu
            if kind == "strong":
                return 1 / (mu * (t + s + twice_kappa))
            if kind == "strong_twice":
                return 2 / (mu * (t + 1 + s + 2 * twice_kappa))
            return two_phase(t, steps, mu, s + twice_kappa)
        return jnp.minimum(0.5 / jnp.asarray(smoothness, float), step)  # ∞ for L = 0

    return schedule


def prox_mirror(
    schedule: optax.ScalarOrSchedule, mirror: Mirror | None = None, prox: Prox | None = None
) -> optax.GradientTransformation:
    """The composite mirror step x_{t+1} − x_t with steps from `schedule`; it needs the parameters.

    It is the whole step, sign and all, so that nothing is chained after it. `mirror` is `Euclidean()` by default and
    `prox` is `Zero()`. Maps other than the Euclidean keep ∇ψ(x) from step to step: parameters that somebody else
    changes in between are brought back.

    **Raises:** `InputError` where `mirror` has no closed step with `prox`, or a constant step size is negative; in
    `init`, for parameters that are not floating or where ψ has no gradient; in `update`, without parameters.
    """
    if not callable(schedule):
        check_nonnegative("schedule", schedule)
    if not isinstance(mirror, Mirror | None):
        got = f"the class {mirror.__name__}" if isinstance(mirror, type) else type(mirror).__name__
        raise InputError("mirror", got, "a mirror map such as Euclidean(), from fallline.parts.mirror")
    psi, h = Euclidean() if mirror is None else mirror, Zero() if prox is None else prox
    psi.check(h)

    def init(params: PyTree) -> ProxMirrorState:
        psi.check_start(params)
        return ProxMirrorState(jnp.zeros((), jnp.int32), psi.gradient(params) if psi.dual else None)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ProxMirrorState]:
        if params is None:
            raise InputError("params", None, "the parameters: update(updates, state, params)")
        step_size = schedule(state.count) if callable(schedule) else schedule
        dual = psi.step(state.dual if psi.dual else psi.gradient(params), updates, step_size, h)
        moves = jax.tree.map(lambda new, x, g: (new - x).astype(g.dtype), psi.inverse(dual), params, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return moves, ProxMirrorState(count, dual if psi.dual else None)

    return optax.GradientTransformation(init, update)


def last_iterate(
    kind: Kind = "linear",
    eta: float | None = None,
    steps: int | None = None,
    *,
    smoothness: float = 0.0,
    strong_convexity: float | None = None,
    strong_part: Literal["f", "h"] = "f",
    moment: float = 2.0,
    mirror: Mirror | None = None,
    prox: Prox | None = None,
) -> optax.GradientTransformation:
    """Composite stochastic mirror descent (Liu and Zhou 2024, CSMD) with step sizes for its last point.

    **Arguments:** as for `last_iterate_schedule` and `prox_mirror`: `last_iterate("linear", eta=0.3, steps=1000)` is
    stochastic gradient descent whose steps fall linearly; with `prox=L1(0.02)` it is proximal. For `moment` below 2
    the theorem wants `mirror=UniformlyConvex(moment)`. h is not part of the value that a run of `minimize` records.
    `optax.inject_hyperparams` needs `static_args=("prox",)`: it takes what can be called for a schedule.

    **Raises:** `InputError` as they do.
    """
    schedule = last_iterate_schedule(
        kind,
        eta,
        steps,
        smoothness=smoothness,
        strong_convexity=strong_convexity,
        strong_part=strong_part,
        moment=moment,
    )
    return prox_mirror(schedule, mirror, prox)
