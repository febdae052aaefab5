"""Last-iterate mirror descent: the deterministic worst case, a composite problem, and noise of infinite variance.

The thresholds were fixed after a prototype in NumPy and before the first run of this code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ...descent.last_iterate import last_iterate
from ...parts.mirror import Mirror, UniformlyConvex
from ...parts.prox import L1, Ball
from ..claim import Check, Claim, Scale, Track

__all__ = ["CLAIMS"]


# ---- the deterministic worst case ---------------------------------------------------------------


def _coefficients(n: int) -> Float[np.ndarray, " n"]:
    return 1 / (8.0 * np.arange(n, 0, -1))


def _pieces(x: Float[Array, " n"], a: Float[Array, " n"]) -> Float[Array, " n+1"]:
    """h_i·x for i = 1, …, n + 1: h_i has a_j for j < i and −1/2 at j = i, h_{n+1} = a."""
    before = jnp.concatenate([jnp.zeros(1, x.dtype), jnp.cumsum(a * x)])
    return before - jnp.append(x, 0) / 2


def _resisting(x: Float[Array, " n"], a: Float[Array, " n"]) -> Float[Array, " n"]:
    """The h_i of the smallest i that attains the maximum, ties up to 1e-12."""
    values, j = _pieces(x, a), jnp.arange(x.size)
    i = jnp.argmax(values >= jnp.max(values) - 1e-12)
    return jnp.where(j < i, a, jnp.where(j == i, -0.5, 0))


def _worst_case(scale: Scale) -> tuple[list[int], list[Check]]:
    largest = {Scale.SMOKE: 256, Scale.SMALL: 4096, Scale.FULL: 32_768}[scale]
    lengths = [4**k for k in range(3, 10) if 4**k <= largest]
    checks = []
    for n in lengths:
        # 0 is a convex combination of the h_i, so that 0 is a minimizer: λ_j = 2 a_j Σ_{i>j} λ_i.
        a, combination = _coefficients(n), np.zeros(n + 1)
        rest = combination[n] = 1.0
        for j in range(n - 1, -1, -1):
            combination[j] = 2 * a[j] * rest
            rest += combination[j]
        combination /= rest
        tail = np.cumsum(combination[::-1])[::-1]
        checks.append(
            Check(
                f"T = {n}: |Σ λ_i h_i| with λ ≥ 0",
                float(np.abs(a * tail[1:] - combination[:-1] / 2).max()),
                "<=",
                1e-14,
            )
        )
        checks.append(Check(f"T = {n}: the largest ‖h_i‖", float(np.sqrt(0.25 + (a**2).sum())), "<=", 1.0))
    return lengths, checks


@functools.partial(jax.jit, static_argnames="kind")
def _against_the_oracle(a: Float[Array, " n"], kind: Any) -> tuple[Array, Array]:
    """f at the last point and at the average of T = n steps from 0 in the unit ball, with η = 1."""
    update = last_iterate(kind, 1.0, a.size, prox=Ball(1.0))

    def step(carry: Any, t: Array) -> tuple[Any, None]:
        x, mean, state = carry
        moves, state = update.update(_resisting(x, a), state, x)
        x = optax.apply_updates(x, moves)
        return (x, mean + (x - mean) / (t + 1), state), None

    x = jnp.zeros_like(a)
    (x, mean, _), _ = jax.lax.scan(step, (x, x, update.init(x)), jnp.arange(a.size))
    return jnp.max(_pieces(x, a)), jnp.max(_pieces(mean, a))


def _ends(schedules: Mapping[str, str]) -> Callable[[Sequence[int], Track], dict[str, Any]]:
    def measure(lengths: Sequence[int], track: Track) -> dict[str, Any]:
        found: dict[str, Any] = {name: {"last": [], "average": []} for name in schedules}
        for n in track(lengths, "T"):
            for name, kind in schedules.items():
                last, average = _against_the_oracle(jnp.asarray(_coefficients(n)), kind)
                found[name]["last"].append(float(last) * n**0.5)
                found[name]["average"].append(float(average) * n**0.5)
        return {"T": list(lengths), **found}

    return measure


def _one_is_flat_the_other_grows(measured: Mapping[str, Any]) -> list[Check]:
    linear, constant = measured["linear"]["last"], measured["constant"]["last"]
    return [
        Check("linear: largest over smallest gap √T", max(linear) / min(linear), "<=", 1.1),
        Check("constant: least growth of gap √T for 4 times as many steps", float(min(np.diff(constant))), ">=", 0.05),
    ]


def _draw_ends(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    (axis,) = axes
    for name, color in (("linear", "#1f5fa8"), ("constant", "#c0504d")):
        axis.plot(measured["T"], measured[name]["last"], "o-", color=color, label=f"{name}, last point")
        axis.plot(measured["T"], measured[name]["average"], "--", color=color, label=f"{name}, average")
    axis.set(xscale="log", xlabel="T", ylabel="gap · √T", ylim=(0, None))
    axis.legend()


WORST_CASE = Claim(
    name="worst-case",
    statement="Steps that fall linearly make the last point of subgradient descent as good as O(1/√T), while with the "
    "constant step η/√T it is worse by a log T that a resisting oracle attains.",
    refuted_by="gap √T of the linear schedule that varies by more than 10% over T, or of the constant one that does "
    "not grow by 0.05 where T is multiplied by 4.",
    kind="rate",
    source="the convex step sizes with T known; the instance after N. Harvey, C. Liaw, Y. Plan and S. Randhawa, "
    "*Tight Analyses for Non-Smooth Stochastic Gradient Descent*, COLT 2019",
    tolerance="ratio ≤ 1.1 and growth ≥ 0.05: the prototype measured 0.055 at each T of the linear schedule, and "
    "0.248, 0.313, 0.378, 0.443 for T = 64, 256, 1024, 4096 of the constant one. Nothing is random.",
    seeds=dict.fromkeys(Scale, 1),
    build=_worst_case,
    measure=_ends({"linear": "linear", "constant": "constant"}),
    judge=_one_is_flat_the_other_grows,
    control="the constant step in place of the linear one",
    measure_control=_ends({"linear": "constant", "constant": "constant"}),
    draw=_draw_ends,
)


# ---- a composite problem ------------------------------------------------------------------------

LAMBDA, ETAS = 0.02, (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Composite:
    """ℓ1-regularized logistic loss of rows labels · features, its minimum, L, and how it is run."""

    rows: Float[np.ndarray, "569 30"]
    minimum: float
    smoothness: float
    lengths: tuple[int, ...]
    seeds: int


def _objective(x: Float[Array, " n"], rows: Float[Array, "m n"]) -> Float[Array, ""]:
    return jnp.mean(jnp.logaddexp(0.0, -rows @ x)) + LAMBDA * jnp.sum(jnp.abs(x))


def _reference(rows: Float[np.ndarray, "m n"], smoothness: float) -> tuple[float, float, int]:
    """Minimum by FISTA with restarts, the norm of the gradient mapping there, and the number of its non-zeros."""

    def move(z: np.ndarray) -> np.ndarray:
        v = z + rows.T @ (1 / (1 + np.exp(rows @ z))) / len(rows) / smoothness
        return np.sign(v) * np.maximum(np.abs(v) - LAMBDA / smoothness, 0)

    x = z = np.zeros(rows.shape[1])
    t = 1.0
    for _ in range(3000):
        new = move(z)
        if (z - new) @ (new - x) > 0:
            t = 1.0
        after = (1 + (1 + 4 * t * t) ** 0.5) / 2
        z = new + (t - 1) / after * (new - x)
        x, t = new, after
    residual = smoothness * float(np.linalg.norm(move(x) - x))
    value = float(np.logaddexp(0.0, -rows @ x).mean() + LAMBDA * np.abs(x).sum())
    return value, residual, int((x != 0).sum())


def _composite(scale: Scale, lengths: tuple[int, ...], seeds: int) -> tuple[Composite, list[Check]]:
    from sklearn.datasets import load_breast_cancer

    data: Any = load_breast_cancer()
    features = (data.data - data.data.mean(0)) / data.data.std(0)
    rows = (2.0 * data.target - 1)[:, None] * features
    smoothness = float(np.linalg.norm(rows, 2) ** 2 / (4 * len(rows)))
    value, residual, support = _reference(rows, smoothness)
    return Composite(rows, value, smoothness, lengths, seeds), [
        Check("norm of the gradient mapping at the reference minimizer", residual, "<=", 1e-8),
        Check("distance of the minimum to the prototype's 0.228792", abs(value - 0.228792), "<=", 1e-6),
        Check("non-zeros of the minimizer", support, "<=", 9),
    ]


@functools.partial(jax.jit, static_argnames=("kind", "moment", "smooth"))
def _gaps(
    instance: tuple[Array, Array, Array],
    draws: tuple[Array, Array | None],
    mirror: Mirror | None,
    *,
    kind: Any,
    moment: float = 2.0,
    smooth: bool = True,
) -> tuple[Float[Array, "etas seeds"], Float[Array, "etas seeds"]]:
    """F − F* at the last point and at the average: each seed's draws are a row for each step, and noise or None."""
    rows, minimum, smoothness = instance

    def one(eta: Any, drawn: Any) -> tuple[Array, Array]:
        limit: Any = smoothness if smooth else 0.0
        steps = drawn[0].size
        update = last_iterate(kind, eta, steps, smoothness=limit, moment=moment, mirror=mirror, prox=L1(LAMBDA))

        def step(carry: Any, now: Any) -> tuple[Any, None]:
            (x, mean, state), (t, i, noise) = carry, now
            gradient = -rows[i] * jax.nn.sigmoid(-rows[i] @ x)
            moves, state = update.update(gradient if noise is None else gradient + noise, state, x)
            x = optax.apply_updates(x, moves)
            return (x, mean + (x - mean) / (t + 1), state), None

        x = jnp.zeros(rows.shape[1], rows.dtype)
        (x, mean, _), _ = jax.lax.scan(step, (x, x, update.init(x)), (jnp.arange(steps), *drawn))
        return _objective(x, rows) - minimum, _objective(mean, rows) - minimum

    over_seeds = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_seeds, in_axes=(0, None))(jnp.asarray(ETAS), draws)


def _draws(
    instance: Composite, steps: int, freedom: float | None = None
) -> tuple[np.ndarray, Float[np.ndarray, "seeds T n"] | None]:
    """What chance does, the same for every schedule: rows, and Student's noise of so many degrees of freedom."""
    streams = [np.random.default_rng(seed) for seed in range(instance.seeds)]
    m, n = instance.rows.shape
    rows = np.stack([stream.integers(0, m, steps, dtype=np.int32) for stream in streams])
    return rows, None if freedom is None else np.stack([s.standard_t(freedom, (steps, n)) for s in streams])


def _tuned(instance: Composite, draws: Any, mirror: Mirror | None = None, **options: Any) -> dict[str, float]:
    """Mean gaps over the seeds at the η whose last point is best, with the best average of any η."""
    arrays = (jnp.asarray(instance.rows), jnp.asarray(instance.minimum), jnp.asarray(instance.smoothness))
    last, average = (np.asarray(a) for a in _gaps(arrays, draws, mirror, **options))
    best, root = int(np.argmin(last.mean(1))), instance.seeds**0.5
    return {
        "eta": ETAS[best],
        "last": float(last[best].mean()),
        "last, standard error": float(last[best].std(ddof=1) / root),
        "last, 95% quantile": float(np.quantile(last[best], 0.95)),
        "average": float(average[best].mean()),
        "average, standard error": float(average[best].std(ddof=1) / root),
        "average at its own eta": float(average.mean(1).min()),
    }


def _schedules(kinds: Mapping[str, str]) -> Callable[[Composite, Track], dict[str, Any]]:
    def measure(instance: Composite, track: Track) -> dict[str, Any]:
        found = {}
        for steps in track(instance.lengths, "T"):
            draws = _draws(instance, steps)
            found[str(steps)] = {name: _tuned(instance, draws, kind=kind) for name, kind in kinds.items()}
        return found

    return measure


def _ratio(name: str, above: tuple[float, float], below: tuple[float, float], threshold: float) -> Check:
    """A quotient of two means, each with its standard error, with its 95% interval as if they were independent."""
    ratio = above[0] / below[0]
    width = 1.96 * ratio * float(np.hypot(above[1] / above[0], below[1] / below[0]))
    return Check(name, ratio, "<=", threshold, (ratio - width, ratio + width))


def _last_is_best(measured: Mapping[str, Any]) -> list[Check]:
    checks: list[Check] = []
    for steps, found in measured.items():
        best = min((found[name] for name in ("decreasing", "constant")), key=lambda ends: ends["last"])
        last, other = ((ends["last"], ends["last, standard error"]) for ends in (found["linear"], best))
        average = found["linear"]["average"], found["linear"]["average, standard error"]
        checks += [
            _ratio(f"T = {steps}: linear over the best other last point", last, other, 0.75),
            _ratio(f"T = {steps}: linear's last point over its average", last, average, 1.0),
        ]
    return checks


def _draw_schedules(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    (axis,) = axes
    lengths = [int(steps) for steps in measured]
    for name, color in (("linear", "#1f5fa8"), ("decreasing", "#4f9d69"), ("constant", "#c0504d")):
        for what, line in (("last", "o-"), ("average", "s--")):
            values = [found[name][what] for found in measured.values()]
            axis.plot(lengths, values, line, color=color, label=f"{name}, {what}")
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="F − F*")
    axis.legend()


_KINDS = {"linear": "linear", "decreasing": "decreasing", "constant": "constant"}
_SEEDS = {Scale.SMOKE: 20, Scale.SMALL: 1000, Scale.FULL: 1000}
_LENGTHS = {Scale.SMOKE: (1000,), Scale.SMALL: (1000, 8000), Scale.FULL: (1000, 8000, 64_000)}

COMPOSITE = Claim(
    name="composite",
    statement="On a composite problem the last point of proximal stochastic gradient descent with linearly falling "
    "steps is better than the last points of η/√t and η/√T, and no worse than the average of its own run.",
    refuted_by="at any T a mean gap above 0.75 of the best other schedule's, each with its best η, or above that of "
    "the average.",
    kind="comparison",
    source="the convex step sizes, T known and unknown; ℓ1-logistic regression on scikit-learn's breast cancer data",
    tolerance="0.75 and 1 for the quotients of the means, with 95% intervals: the prototype of five seeds measured "
    "0.0106 against 0.0204 and 0.0182, average 0.0166 or more, at T = 1000; 0.0025 against 0.0048 and 0.0056 at 8000. "
    "The same five η for each schedule; steps capped at 1/(2L), as the theorem asks, which helps η/√t.",
    seeds=_SEEDS,
    build=lambda scale: _composite(scale, _LENGTHS[scale], _SEEDS[scale]),
    measure=_schedules(_KINDS),
    judge=_last_is_best,
    finding="The last point of the linear schedule is the best at each T and well below the average of its run, but "
    "the factor is not below 0.75 at T = 1000: over 1000 seeds 0.80 [0.78, 0.81] there, 0.73 [0.72, 0.75] at T = 8000. "
    "Over the average it is 0.73 and 0.44. Five seeds, as the threshold had, gave from 0.63 to 0.76 and 0.55 to 0.78.",
    control="the constant step in place of the linear one",
    measure_control=_schedules({**_KINDS, "linear": "constant"}),
    draw=_draw_schedules,
)


# ---- noise of infinite variance -----------------------------------------------------------------

MOMENT = 1.4


def _heavy(freedom: float) -> Callable[[Composite, Track], dict[str, Any]]:
    def measure(instance: Composite, track: Track) -> dict[str, Any]:
        variants: dict[str, Any] = {
            "mirror": {"mirror": UniformlyConvex(MOMENT), "kind": "linear", "moment": MOMENT, "smooth": False},
            "Euclidean": {"kind": "decreasing"},
        }
        found = {}
        for steps in track(instance.lengths, "T"):
            draws = _draws(instance, steps, freedom)
            found[str(steps)] = {name: _tuned(instance, draws, **options) for name, options in variants.items()}
        return found

    return measure


def _still_falls(measured: Mapping[str, Any]) -> list[Check]:
    first, last = min(measured, key=int), max(measured, key=int)
    fall = measured[last]["mirror"]["last"] / measured[first]["mirror"]["last"]
    return [Check("exponent of T in the gap", float(np.log(fall) / np.log(int(last) / int(first))), "<=", -0.14)]


def _draw_heavy(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    (axis,) = axes
    lengths = [int(steps) for steps in measured]
    for name, color in (("mirror", "#1f5fa8"), ("Euclidean", "#c0504d")):
        axis.plot(lengths, [found[name]["last"] for found in measured.values()], "o-", color=color, label=name)
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="F − F* at the last point")
    axis.legend()


_HEAVY_SEEDS = {Scale.SMOKE: 16, Scale.SMALL: 32, Scale.FULL: 100}
_HEAVY_LENGTHS = {Scale.SMOKE: (250, 2000), Scale.SMALL: (1000, 8000), Scale.FULL: (1000, 8000, 64_000)}

HEAVY_TAILS = Claim(
    name="heavy-tails",
    statement="With gradient noise of infinite variance the gap of the last point still falls as T grows, with a "
    "uniformly convex mirror map and the steps that go with it.",
    refuted_by="a mean gap that falls by less than T^{−0.14}, each T with its best η.",
    kind="rate",
    source="the theorem on noise with a finite p-th moment; noise is Student's t with 1.5 degrees of freedom in each "
    "coordinate, so that p < 1.5, and p = 1.4 is used",
    tolerance="half the exponent (p − 1)/p = 0.286 of the guarantee, which is an upper bound with logarithms, of a "
    "mean of heavy tails. The Euclidean map with η/√t, which the theorem does not cover, is measured beside it and not "
    "judged: the prototype had an exponent of −0.28 there, with noise of a scale that is not known.",
    seeds=_HEAVY_SEEDS,
    build=lambda scale: _composite(scale, _HEAVY_LENGTHS[scale], _HEAVY_SEEDS[scale]),
    measure=_heavy(1.5),
    judge=_still_falls,
    control="noise without a mean: Student's t with 0.75 degrees of freedom",
    measure_control=_heavy(0.75),
    draw=_draw_heavy,
)

CLAIMS = (WORST_CASE, COMPOSITE, HEAVY_TAILS)
