"""Power k-means against Lloyd's algorithm from the same seeds: iris and wine, the digits, simulated clusters.

The thresholds were fixed after a prototype in NumPy and before the first run of this code. Two things were changed
after a first run: the control, which had been s = −120 (not yet Lloyd's algorithm: it still hits .8 of the time on
wine), and the number of runs on the digits, where those of the prototype do not decide. Every run of power k-means is
finished by Lloyd's algorithm; a pass over the data counts as one wherever it is spent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ...clustering.k_means import KMeans, assign, k_means_plus_plus, lloyd
from ...clustering.power_k_means import PowerKMeans, power_k_means
from ...core.loop import minimize
from ...core.solver import Solver
from ...parts.partitions import adjusted_rand_index, variation_of_information
from ...problems.digits import digits
from ..claim import Check, Claim, Scale, Track
from ..statistics import binomial_interval

__all__ = ["CLAIMS"]

STEPS = 1000
LLOYDS_LIMIT = power_k_means(-1e6, s_min=-1e6)


# ---- runs, seeds and their statistics -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where the runs ended; one entry a run."""

    centers: Float[np.ndarray, "runs k d"]
    values: Float[np.ndarray, " runs"]
    passes: Int[np.ndarray, " runs"]


@jax.jit
def _run_each(solver: Solver, points: Float[Array, "... n d"], starts: Float[Array, "runs k d"]) -> Any:
    def run(points: Float[Array, "n d"], start: Float[Array, "k d"]) -> Any:
        end = minimize(KMeans(points), start, solver, steps=STEPS, record=())
        return end.x, end.value, end.calls.gradient

    if points.ndim == 2:
        return jax.lax.map(lambda start: run(points, start), starts)
    return jax.lax.map(lambda both: run(*both), (points, starts))


def _ends(solver: Solver, points: Any, starts: Any) -> Ends:
    """Runs from each of the starts, all over the same points or each over its own."""
    return Ends(*(np.asarray(part) for part in _run_each(solver, points, starts)))


def _polished(power: PowerKMeans, points: Any, starts: Any) -> Ends:
    """Runs of power k-means, each finished by Lloyd's algorithm."""
    rough = _ends(power, points, starts)
    fine = _ends(lloyd(), points, rough.centers)
    return dataclasses.replace(fine, passes=rough.passes + fine.passes)


def _random_seeds(points: Float[np.ndarray, "n d"], k: int, runs: int) -> Float[np.ndarray, "runs k d"]:
    """`k` of the points, uniformly without replacement: the starts of the runs 0, 1, 2, …"""
    return np.stack([points[np.random.default_rng(i).choice(len(points), k, replace=False)] for i in range(runs)])


@functools.partial(jax.jit, static_argnames=("k", "runs"))
def _careful_seeds(points: Any, k: int, runs: int, restart: int = 0) -> Float[Array, "runs k d"]:
    """k-means++ seeds of the runs 0, 1, 2, …, all from the same points or each from its own."""
    keys = jax.vmap(lambda run: jax.random.fold_in(jax.random.key(run), restart))(jnp.arange(runs))
    if points.ndim == 2:
        return jax.lax.map(lambda key: k_means_plus_plus(key, points, k), keys)
    return jax.lax.map(lambda both: k_means_plus_plus(both[0], both[1], k), (keys, points))


def _mean(numbers: Any) -> dict[str, float]:
    """The mean over runs and its standard error."""
    return {"mean": float(np.mean(numbers)), "error": float(np.std(numbers, ddof=1) / np.sqrt(len(numbers)))}


def _interval(value: float, error: float) -> tuple[float, float]:
    return value - 1.96 * error, value + 1.96 * error


def _ratio(a: Any, b: Any) -> dict[str, float]:
    """The ratio of two means over the same runs, and its standard error to first order."""
    ratio = float(np.mean(a) / np.mean(b))
    return {"mean": ratio, "error": _mean(a - ratio * b)["error"] / float(np.mean(b))}


# ---- iris and wine --------------------------------------------------------------------------------

HITS = {Scale.SMOKE: 100, Scale.SMALL: 400, Scale.FULL: 4000}


@dataclasses.dataclass(frozen=True)
class Tables:
    """Data sets by name, each column with mean 0 and variance 1, and how many runs from each seeding."""

    points: Mapping[str, Float[np.ndarray, "n d"]]
    runs: int


def _iris_and_wine(scale: Scale) -> tuple[Tables, list[Check]]:
    from sklearn.datasets import load_iris, load_wine

    tables: dict[str, Any] = {"iris": load_iris(), "wine": load_wine()}
    names = ("iris",) if scale is Scale.SMOKE else ("iris", "wine")
    raw = {name: np.asarray(tables[name].data) for name in names}
    points = {name: (x - x.mean(axis=0)) / x.std(axis=0) for name, x in raw.items()}
    return Tables(points, HITS[scale]), [
        check
        for name, x in points.items()
        for check in (
            Check(f"{name}: different points", len(np.unique(x, axis=0)), ">=", 3),
            Check(f"{name}: |variance − 1| of a column", float(np.abs(x.var(axis=0) - 1).max()), "<=", 1e-12),
        )
    ]


def _hit_rates(power: PowerKMeans) -> Callable[[Tables, Track], dict[str, Any]]:
    def measure(instance: Tables, track: Track) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        for name, points in track(instance.points.items(), "data sets"):
            ends: dict[str, Ends] = {}
            for seeding, draw in {"random": _random_seeds, "k-means++": _careful_seeds}.items():
                starts = draw(points, 3, instance.runs)
                ends[f"power k-means, {seeding} seeds"] = _polished(power, points, starts)
                ends[f"Lloyd, {seeding} seeds"] = _ends(lloyd(), points, starts)
            best = min(float(end.values.min()) for end in ends.values())
            measured[name] = {
                which: {
                    "runs": instance.runs,
                    "hits": int(np.sum(end.values <= 1.0005 * best)),
                    "objective over best": _mean(end.values / best),
                    "passes": _mean(end.passes),
                }
                for which, end in ends.items()
            }
        return measured

    return measure


def _hits_more_often(measured: Mapping[str, Any]) -> list[Check]:
    checks: list[Check] = []
    for name, runs in measured.items():
        for which, end in runs.items():
            relation, threshold = (">=", 0.95) if which.startswith("power") else ("<=", 0.5)
            rate, interval = end["hits"] / end["runs"], binomial_interval(end["hits"], end["runs"])
            checks.append(Check(f"{name}, {which}: hit rate", rate, relation, threshold, interval))
    return checks


def _draw_hit_rates(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    bars = {
        f"{name}: {which}": (end["hits"] / end["runs"], "#1f5fa8" if which.startswith("power") else "#999")
        for name, runs in measured.items()
        for which, end in runs.items()
    }
    rates, colors = zip(*bars.values(), strict=True)
    axes[0].barh(list(bars), rates, color=colors)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="runs that reach the best objective", xlim=(0, 1))


IRIS_AND_WINE = Claim(
    name="iris-and-wine",
    statement="On iris and wine, from random and from k-means++ seeds, power k-means with s0 = −1 reaches the best "
    "k-means objective known, where Lloyd's algorithm from the same seeds mostly stops at a worse local minimum.",
    refuted_by="a hit rate of power k-means below 0.95, or one of Lloyd above 0.5, on either data set, either seeding.",
    kind="comparison",
    source="Abstract (less trapped by local minima, with any seeds); the data sets are ours",
    tolerance="A hit is an end within 0.05% of the best objective over all runs. 0.95 and 0.5: a prototype with 40 "
    "seeds measured 1.00 on both data sets from both seedings, and Lloyd .07 and .20 (iris), .33 and .20 (wine). "
    "Exact binomial intervals at 95%.",
    seeds=HITS,
    build=_iris_and_wine,
    measure=_hit_rates(power_k_means(-1.0)),
    judge=_hits_more_often,
    control="s fixed at −1e6, which is Lloyd's algorithm",
    measure_control=_hit_rates(LLOYDS_LIMIT),
    draw=_draw_hit_rates,
)


# ---- the digits -----------------------------------------------------------------------------------

DIGITS = {Scale.SMOKE: 200, Scale.SMALL: 400, Scale.FULL: 4000}


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
    """Pixels, labels, and how many runs from each seeding."""

    points: Float[np.ndarray, "1797 64"]
    labels: Int[np.ndarray, " 1797"]
    runs: int

    @functools.cache  # noqa: B019  # the claim and its control share Lloyd's runs
    def lloyd(self, draw: Callable[..., Any]) -> tuple[Ends, list[float]]:
        """Where Lloyd's algorithm ends from these seeds, and how that agrees with the labels."""
        end = _ends(lloyd(), self.points, draw(self.points, 10, self.runs))
        return end, _agreement(self, end)


def _digits(scale: Scale) -> tuple[Digits, list[Check]]:
    points, labels = digits()
    return Digits(points, labels, DIGITS[scale]), [
        Check("different points", len(np.unique(points, axis=0)), ">=", 10),
        Check("different labels", len(np.unique(labels)), ">=", 10),
    ]


def _agreement(instance: Digits, end: Ends) -> list[float]:
    """The adjusted Rand index of each run's clusters and the labels."""
    return [adjusted_rand_index(instance.labels, assign(centers, instance.points)) for centers in end.centers]


def _on_the_digits(power: PowerKMeans) -> Callable[[Digits, Track], dict[str, Any]]:
    def measure(instance: Digits, track: Track) -> dict[str, Any]:
        def polished() -> tuple[Ends, list[float]]:
            end = _polished(power, instance.points, _random_seeds(instance.points, 10, instance.runs))
            return end, _agreement(instance, end)

        jobs: dict[str, Callable[[], tuple[Ends, list[float]]]] = {
            "power k-means, random seeds": polished,
            "Lloyd, random seeds": lambda: instance.lloyd(_random_seeds),
            "Lloyd, k-means++ seeds": lambda: instance.lloyd(_careful_seeds),
        }
        ends = {which: job() for which, job in track(jobs.items(), "methods")}
        best = min(float(end.values.min()) for end, _ in ends.values())
        return {
            which: {
                "objective over best": _mean(end.values / best),
                "adjusted Rand index": _mean(agreement),
                "passes": _mean(end.passes),
            }
            for which, (end, agreement) in ends.items()
        }

    return measure


def _better_than_careful_seeds(measured: Mapping[str, Any]) -> list[Check]:
    power, careful = (measured[which] for which in ("power k-means, random seeds", "Lloyd, k-means++ seeds"))
    checks: list[Check] = []
    for quantity, relation, threshold in (("objective over best", "<=", 0.0), ("adjusted Rand index", ">=", 0.02)):
        ours, theirs = power[quantity], careful[quantity]
        difference = ours["mean"] - theirs["mean"]
        interval = _interval(difference, float(np.hypot(ours["error"], theirs["error"])))
        name = f"{quantity}: power k-means from random seeds minus Lloyd from k-means++ seeds"
        checks.append(Check(name, difference, relation, threshold, interval))
    return checks


def _draw_digits(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    for axis, quantity in zip(axes, ("objective over best", "adjusted Rand index"), strict=True):
        for row, (which, end) in enumerate(measured.items()):
            found = end[quantity]
            color = "#1f5fa8" if which.startswith("power") else "#999"
            axis.errorbar(found["mean"], -row, xerr=1.96 * found["error"], fmt="o", color=color)
        axis.set_yticks([-row for row in range(len(measured))], [which.replace(", ", "\n") for which in measured])
        axis.set(xlabel=quantity)
        axis.locator_params(axis="x", nbins=4)


ON_THE_DIGITS = Claim(
    name="digits",
    statement="On the digits (64 pixels, k = 10) power k-means with s0 = −1 from random seeds ends at a lower mean "
    "objective than Lloyd from k-means++ seeds, and at clusters that agree better with the labels.",
    refuted_by="a mean objective above Lloyd's, or a mean adjusted Rand index that is not higher by 0.02.",
    kind="comparison",
    source="Abstract (marked improvements on real data); the data set is ours",
    tolerance="0 and 0.02: a prototype with 12 seeds measured objectives of 1.0029 and 1.0091 over the best, and "
    "indices of .662 and .615. 95% intervals of the differences from the runs' standard errors. Lloyd's index varies "
    "by .05 from run to run, so that 12 seeds do not tell 0.05 from 0.02: here there are 200 and more.",
    seeds=DIGITS,
    build=_digits,
    measure=_on_the_digits(power_k_means(-1.0)),
    judge=_better_than_careful_seeds,
    control="s fixed at −1e6, which is Lloyd's algorithm",
    measure_control=_on_the_digits(LLOYDS_LIMIT),
    draw=_draw_digits,
    panels=2,
)


# ---- simulated clusters ---------------------------------------------------------------------------

CLUSTERS, PER_CLUSTER, NOISE = 3, 33, 0.35
SIMULATIONS = {Scale.SMOKE: 400, Scale.SMALL: 400, Scale.FULL: 2000}
DIMENSIONS = {Scale.SMOKE: (2, 50), Scale.SMALL: (2, 10, 50, 100), Scale.FULL: (2, 10, 50, 100, 200, 1000)}


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Points by dimension, for each run its own; the first 33 of them are of the first cluster, and so on."""

    points: Mapping[int, Float[np.ndarray, "runs 99 d"]]
    restarts: bool  # whether Lloyd is run from several seeds too, for comparison

    @property
    def labels(self) -> Int[np.ndarray, " 99"]:
        return np.repeat(np.arange(CLUSTERS), PER_CLUSTER)


def _simulate(dimension: int, run: int) -> tuple[Float[np.ndarray, "99 d"], Float[np.ndarray, "99 d"]]:
    """The points and their noise: centers uniform in [0, 4/√d]^d."""
    generator = np.random.default_rng((dimension, run))
    centers = generator.uniform(0, 4 / np.sqrt(dimension), (CLUSTERS, dimension))
    noise = NOISE * generator.standard_normal((CLUSTERS * PER_CLUSTER, dimension))
    return np.repeat(centers, PER_CLUSTER, axis=0) + noise, noise


def _clusters(dimensions: Mapping[Scale, Sequence[int]]) -> Callable[[Scale], tuple[Simulation, list[Check]]]:
    def build(scale: Scale) -> tuple[Simulation, list[Check]]:
        drawn = {d: [_simulate(d, run) for run in range(SIMULATIONS[scale])] for d in dimensions[scale]}
        points = {d: np.stack([points for points, _ in runs]) for d, runs in drawn.items()}
        return Simulation(points, restarts=scale is not Scale.SMOKE), [
            Check(f"d = {d}: |noise / 0.35 − 1|", abs(float(np.std([n for _, n in runs])) / NOISE - 1), "<=", 0.02)
            for d, runs in drawn.items()
        ]

    return build


def _variations(instance: Simulation, points: Any, centers: Any) -> Float[np.ndarray, " runs"]:
    """The variation of information between each run's clusters and the true ones."""
    found = jax.vmap(assign)(centers, points)
    return np.array([variation_of_information(instance.labels, labels) for labels in np.asarray(found)])


def _against_lloyd(powers: Mapping[str, PowerKMeans]) -> Callable[[Simulation, Track], dict[str, dict[str, Any]]]:
    def measure(instance: Simulation, track: Track) -> dict[str, dict[str, Any]]:
        return {
            f"{d}": _in_one_dimension(instance, points, powers)
            for d, points in track(instance.points.items(), "dimensions")
        }

    return measure


def _in_one_dimension(instance: Simulation, points: Any, powers: Mapping[str, PowerKMeans]) -> dict[str, Any]:
    starts = _careful_seeds(points, CLUSTERS, len(points))
    plain = _ends(lloyd(), points, starts)
    ends = {"Lloyd": plain, **{s0: _polished(power, points, starts) for s0, power in powers.items()}}
    # The first power is chosen without labels.
    picked = min(powers, key=lambda s0: float(ends[s0].values.mean()))
    if instance.restarts:
        budget = round(float(ends[picked].passes.mean() / plain.passes.mean()))
        ends |= {
            "Lloyd, best of 3": _best_of(3, points, plain),
            "Lloyd, as many passes": _best_of(budget, points, plain),
        }
    variations = {which: _variations(instance, points, end.centers) for which, end in ends.items()}
    return {
        "picked": picked,
        "runs": {
            which: {
                "variation of information": _mean(variations[which]),
                "over Lloyd's": _ratio(variations[which], variations["Lloyd"]),
                "objective": _mean(end.values),
                "passes": _mean(end.passes),
            }
            for which, end in ends.items()
        },
    }


def _best_of(count: int, points: Any, first: Ends) -> Ends:
    """Of `count` runs of Lloyd's algorithm, each from k-means++ seeds of its own, the one with the lowest objective."""
    seeds = [_careful_seeds(points, CLUSTERS, len(points), restart) for restart in range(1, count)]
    ends = [first, *(_ends(lloyd(), points, starts) for starts in seeds)]
    values = np.stack([end.values for end in ends])
    best, runs = np.argmin(values, axis=0), np.arange(len(points))
    centers = np.stack([end.centers for end in ends])[best, runs]
    return Ends(centers, values[best, runs], np.sum([end.passes for end in ends], axis=0))


def _closer_in_all_dimensions(measured: Mapping[str, Any]) -> list[Check]:
    checks: list[Check] = []
    for d, found in measured.items():
        ratio = found["runs"][found["picked"]]["over Lloyd's"]
        name = f"d = {d}: variation of information at the picked s0, over Lloyd's"
        threshold = 0.95 if int(d) < 50 else 0.6
        checks.append(Check(name, ratio["mean"], "<=", threshold, _interval(ratio["mean"], ratio["error"])))
    return checks


def _draw_dimensions(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    def variations(which: Callable[[Mapping[str, Any]], str]) -> list[float]:
        return [found["runs"][which(found)]["variation of information"]["mean"] for found in measured.values()]

    dimensions = list(measured)  # as categories: they grow by factors
    for name, style in {"Lloyd": ":", "Lloyd, best of 3": "--", "Lloyd, as many passes": "-"}.items():
        if all(name in found["runs"] for found in measured.values()):
            axes[0].plot(dimensions, variations(lambda _, name=name: name), style, color="#999", label=name)
    axes[0].plot(dimensions, variations(lambda found: found["picked"]), "o-", color="#1f5fa8", label="power k-means")
    axes[0].set(xlabel="dimension", ylabel="variation of information", ylim=(0, None))
    axes[0].legend()


SIMULATED = Claim(
    name="simulated-clusters",
    statement="Three Gaussian clusters of 33 points in dimensions 2 to 100: from the same k-means++ seeds power "
    "k-means, its s0 among −1, −3, −9, −18 picked by the k-means objective, finds clusters nearer to the true ones "
    "than Lloyd does in every dimension, and by far in high ones.",
    refuted_by="a mean variation of information above 0.95 of Lloyd's in a dimension, or above 0.6 of it for d ≥ 50.",
    kind="comparison",
    source="Abstract (improvements on simulated data); the set-up is read from a public port of the authors' code",
    tolerance="0.95 and 0.6: a prototype with 100 runs measured .61 against .645 at d = 2, .28 against .32 at 10, .27 "
    "against .47 at 50, .315 against 1.00 at 100. 95% intervals of the ratio over paired runs, to first order.",
    seeds=SIMULATIONS,
    build=_clusters(DIMENSIONS),
    measure=_against_lloyd({f"s0 = {s0:g}": power_k_means(s0) for s0 in (-1.0, -3.0, -9.0, -18.0)}),
    judge=_closer_in_all_dimensions,
    control="s fixed at −1e6, which is Lloyd's algorithm",
    measure_control=_against_lloyd({"s = -1e6": LLOYDS_LIMIT}),
    draw=_draw_dimensions,
    finding="Nearer in every dimension, but by 3% at d = 2, not by 5%: a variation of information of .636 against .656 "
    "of Lloyd's (ratio .969 [.951, .986], 400 runs); .306 against .364 at d = 10 (.84), .272 against .514 at 50 "
    "(.53), .336 against 1.02 at 100 (.33). Lloyd with as many passes over the data, the best of 11 runs by "
    "objective, is as good at d = 2 (.636) and at 10 (.307): what is left is the overlap of the clusters. In "
    "high dimension it is not: .303 at d = 50 (6 runs), .712 at 100 (3 runs).",
)


def _worse_than_lloyd(measured: Mapping[str, Any]) -> list[Check]:
    (found,) = measured.values()
    ratio = found["runs"][found["picked"]]["over Lloyd's"]
    name = "d = 50: variation of information over Lloyd's"
    return [Check(name, ratio["mean"], ">=", 1.0, _interval(ratio["mean"], ratio["error"]))]


FIRST_POWER = Claim(
    name="first-power",
    statement="The first power must fall with the dimension: at d = 50 power k-means with s0 = −1 finds worse clusters "
    "than Lloyd from the same k-means++ seeds.",
    refuted_by="a mean variation of information below Lloyd's.",
    kind="comparison",
    source="the paper's choice of s0 by dimension; the comparison with Lloyd is the prototype's",
    tolerance="1: the prototype measured .83 against .47. 95% interval of the ratio over paired runs, to first order.",
    seeds=SIMULATIONS,
    build=_clusters(dict.fromkeys(Scale, (50,))),
    measure=_against_lloyd({"s0 = -1": power_k_means(-1.0)}),
    judge=_worse_than_lloyd,
    control="s0 = −9, the power for this dimension",
    measure_control=_against_lloyd({"s0 = -9": power_k_means(-9.0)}),
    finding="The opposite: .277 against .514 of Lloyd's, as good as s0 = −9 (.274). No run stops here before s ≤ −20. "
    "With runs that stop as soon as five steps change no assignment, at any s, as the ported code's do, the "
    "centers at d = 50 have often not parted yet, and the advantage is gone: .47 against .47 (a NumPy version, "
    "100 runs, 24 steps in the mean). At d = 100 s0 = −1 does end worse than −9 (.70 against .336), and still "
    "better than Lloyd (1.02).",
)

CLAIMS = (IRIS_AND_WINE, ON_THE_DIGITS, SIMULATED, FIRST_POWER)
