"""Randomly initialized phase retrieval: how long a random start takes, and what its first steps follow.

The thresholds were fixed before the first run of this code; those on lengths and deviations come from a prototype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ...core.loop import minimize
from ...recovery.losses import Intensity
from ...recovery.operators import gaussian_measurements
from ...recovery.problem import Recovery
from ...recovery.random_init_phase_retrieval import random_init_phase_retrieval, state_evolution
from ...recovery.starts import random
from ..claim import Check, Claim, Scale, Track
from ..statistics import fit_line

__all__ = ["CLAIMS"]

STEP_SIZE, RATIO, FEW = 0.1, 10.0, 1.5  # η, m/n, and the control's m/n
STEPS, NEAR, EXACT = 400, 0.1, 1e-6  # the limit, and the distances that end the stages


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Signal sizes, and the number of seeds for each."""

    seeds: Mapping[int, int]


def _trial(n: int, ratio: float, seed: int) -> tuple[Recovery, Array, Array]:
    """Gaussian measurements of a signal of norm 1, the signal, and a random start."""
    rows, drawn, begin = jax.random.split(jax.random.fold_in(jax.random.key(seed), n), 3)
    signal = jax.random.normal(drawn, (n,))
    signal = signal / jnp.linalg.norm(signal)
    op = gaussian_measurements(rows, int(ratio * n), n)
    problem = Recovery(op, op.mv(signal) ** 2, loss=Intensity())
    return problem, signal, random()(problem, begin)


def _path(problem: Recovery, signal: Array, x0: Array, steps: int) -> tuple[Any, Any]:
    """α_t and β_t."""
    solver = random_init_phase_retrieval(STEP_SIZE, signal)
    run = minimize(problem, x0, solver, steps=steps, stop=None, record=("signal", "perpendicular"))
    return run.history["signal"], run.history["perpendicular"]


# ---- the length of the two stages ---------------------------------------------------------------


def _sizes(scale: Scale) -> tuple[Sizes, list[Check]]:
    seeds = {
        Scale.SMOKE: {50: 8, 100: 8, 200: 8},
        Scale.SMALL: {100: 8, 200: 8, 500: 8, 1000: 3},
        Scale.FULL: {100: 100, 200: 100, 500: 100, 1000: 50},
    }[scale]
    return Sizes(seeds), [
        Check("measurements for each coordinate", RATIO, ">=", 10.0),
        Check("runs", float(sum(seeds.values())), ">=", 20.0),
    ]


def _lengths(ratio: float) -> Callable[[Sizes, Track], dict[str, Any]]:
    """Steps until the distance is below 0.1, and from there to 1e-6; None where that is never."""

    def measure(instance: Sizes, track: Track) -> dict[str, Any]:
        first: dict[str, list[int | None]] = {str(n): [] for n in instance.seeds}
        second: dict[str, list[int | None]] = {str(n): [] for n in instance.seeds}
        paths: dict[str, list[float]] = {}
        for n, seed in track([(n, seed) for n, seeds in instance.seeds.items() for seed in range(seeds)], "runs"):
            alpha, beta = _path(*_trial(n, ratio, seed), STEPS)
            distance = np.hypot(alpha - 1, beta)
            near, exact = (np.flatnonzero(distance < bound) for bound in (NEAR, EXACT))
            first[str(n)].append(int(near[0]) if len(near) else None)
            second[str(n)].append(int(exact[0] - near[0]) if len(exact) else None)
            paths.setdefault(str(n), [float(d) for d in distance])
        return {"stage one": first, "stage two": second, "distance": paths}

    return measure


def _logarithmic(measured: Mapping[str, Any]) -> list[Check]:
    first, second = measured["stage one"], measured["stage two"]
    runs = sum(len(lengths) for lengths in second.values())
    lengths = {n: [(a, b) for a, b in zip(first[n], second[n], strict=True) if b is not None] for n in second}
    spread = gap = float("nan")
    if all(len(arrived) > 1 for arrived in lengths.values()):
        medians = [float(np.median(arrived, axis=0)[1]) for arrived in lengths.values()]
        spread = max(medians) / min(medians) - 1
        gap = _likelihood_gap({n: [a for a, _ in arrived] for n, arrived in lengths.items()})
    return [
        Check("runs that arrive within 400 steps", sum(map(len, lengths.values())) / runs, ">=", 1.0),
        Check("spread of the second stage over n", spread, "<=", 0.1),
        Check("log-likelihood of √n over log n", gap, "<=", 2.0),
    ]


def _likelihood_gap(first: Mapping[str, Sequence[int]]) -> float:
    """How much better a line in √n explains the lengths of the first stage than one in log n; Gaussian errors."""
    n = np.concatenate([np.full(len(lengths), float(size)) for size, lengths in first.items()])
    steps = np.concatenate([np.asarray(lengths, float) for lengths in first.values()])
    unexplained = [1 - fit_line(x, steps).r_squared for x in (np.log(n), np.sqrt(n))]
    return float(len(n) / 2 * np.log(unexplained[0] / unexplained[1]))


def _draw_stages(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    colors = ("#1f5fa8", "#c2571a", "#2f7d4f", "#7a4fa3")
    for (n, distance), color in zip(measured["distance"].items(), colors, strict=False):
        axes[0].semilogy(distance, color=color, label=f"n = {n}")
        for name, marker in {"stage one": "o", "stage two": "s"}.items():
            lengths = [length for length in measured[name][n] if length is not None]
            axes[1].semilogx([float(n)] * len(lengths), lengths, marker, color=color, alpha=0.5)
    axes[0].set(xlabel="step", ylabel="distance from ±x*, first seed")
    axes[0].legend(frameon=False)
    axes[1].set(xlabel="n", ylabel="steps to 0.1 (●), and on to 1e-6 (■)", ylim=(0, None))


STAGES = Claim(
    name="stages",
    statement="From a random start gradient descent with a constant step arrives at ±x*: after a first stage of "
    "O(log n) steps the error falls geometrically, at a rate that does not depend on n.",
    refuted_by="a random start that does not arrive within 400 steps; a second stage whose length depends on n; "
    "a first stage that is explained better by √n than by log n.",
    kind="rate",
    source="the main theorem, and the figure of the numerical experiments with m = 10n and η = 0.1",
    tolerance="Every one of at least 24 runs must arrive (a prototype took at most 288 steps). Median second stages "
    "within 10% of each other (prototype: 167 to 170 for n = 100 … 1000). Lines in log n and in √n have as many "
    "parameters; a log-likelihood ratio of 2 is where the worse of two models is commonly taken to be refuted.",
    seeds={Scale.SMOKE: 8, Scale.SMALL: 8, Scale.FULL: 100},
    build=_sizes,
    measure=_lengths(RATIO),
    judge=_logarithmic,
    control="m = 1.5n measurements, fewer than the 2n − 1 that determine a signal",
    measure_control=_lengths(FEW),
    draw=_draw_stages,
    panels=2,
    finding="At m = 10n a few random starts in a hundred linger for hundreds of steps near an almost stationary point "
    "across the signal, of norm 0.9: at this scale one of 27 (n = 500, seed 5) arrives after 1272 steps only. In runs "
    "of 3000 steps, all of 260 starts arrive; within 400 steps 98 of 100 at n = 100, 98 of 100 at n = 200 and 56 of 60 "
    "at n = 500. At m = 20n all of 160 arrive, within 204 steps. The second stage is as stated.",
)


# ---- the state evolution ------------------------------------------------------------------------

TRACKED, LOOKS = 500, (5, 10)


def _tracked(scale: Scale) -> tuple[Sizes, list[Check]]:
    seeds = TRACKED_SEEDS[scale]
    norms = [float(jnp.linalg.norm(_trial(TRACKED, RATIO, seed)[2])) for seed in range(min(seeds, 8))]
    off = max(abs(norm - 1) for norm in norms)  # in units of 1/√(2n), its standard deviation, at most 5
    return Sizes({TRACKED: seeds}), [
        Check("measurements for each coordinate", RATIO, ">=", 10.0),
        Check("norm of a start, from 1", off, "<=", 5 / float(np.sqrt(2 * TRACKED))),
    ]


def _evolutions(ratio: float) -> Callable[[Sizes, Track], dict[str, Any]]:
    """β_t of each run, and of the state evolution from the same α₀ and β₀."""

    def measure(instance: Sizes, track: Track) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"alpha": [], "beta": [], "alpha predicted": [], "beta predicted": []}
        for seed in track(range(instance.seeds[TRACKED]), "seeds"):
            alpha, beta = _path(*_trial(TRACKED, ratio, seed), 2 * max(LOOKS))
            found["alpha"].append([float(a) for a in alpha])
            found["beta"].append([float(b) for b in beta])
            predicted = state_evolution(float(alpha[0]), float(beta[0]), STEP_SIZE, 2 * max(LOOKS))
            for name, path in zip(("alpha predicted", "beta predicted"), predicted, strict=True):
                found[name].append([float(p) for p in path])
        return found

    return measure


def _follows(measured: Mapping[str, Any]) -> list[Check]:
    beta, predicted = np.asarray(measured["beta"]), np.asarray(measured["beta predicted"])
    off = np.median(np.abs(beta / predicted - 1), axis=0)
    return [
        Check(f"median deviation of β at t = {t}", float(off[t]), "<=", most)
        for t, most in zip(LOOKS, (0.15, 0.3), strict=True)
    ]


def _draw_evolution(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    for name, color, label in (("beta", "#1f5fa8", "β"), ("alpha", "#c2571a", "α")):
        middle = np.median(measured[name], axis=0)
        axes[0].fill_between(
            range(len(middle)), np.min(measured[name], axis=0), np.max(measured[name], axis=0), color=color, alpha=0.15
        )
        axes[0].semilogy(middle, color=color, label=f"{label}, median")
        axes[0].semilogy(np.median(measured[f"{name} predicted"], axis=0), "--", color=color, label="state evolution")
    axes[0].set(xlabel="step", ylabel="size of the part")
    axes[0].legend(frameon=False)


TRACKED_SEEDS = {Scale.SMOKE: 8, Scale.SMALL: 20, Scale.FULL: 200}

EVOLUTION = Claim(
    name="state-evolution",
    statement="In the first stage the part of x_t across the signal follows the state evolution of an infinite sample.",
    refuted_by="a median deviation of β_t from the state evolution beyond 15% at t = 5 or beyond 30% at t = 10, at "
    "n = 500 and m = 10n.",
    kind="bound",
    source="the approximate state evolution",
    tolerance="The theorem bounds the perturbations by O(1/log n) for m of order n log¹³ n, without constants. At "
    "m = 10n a prototype had 11.6% and 22.9%; 34% at t = 15, so that longer tracking is not claimed. α_t is not "
    "judged: its start is random and small, and it deviates by a factor of 8 in unlucky runs.",
    seeds=TRACKED_SEEDS,
    build=_tracked,
    measure=_evolutions(RATIO),
    judge=_follows,
    control="m = 1.5n measurements",
    measure_control=_evolutions(FEW),
    draw=_draw_evolution,
)


CLAIMS = (STAGES, EVOLUTION)
