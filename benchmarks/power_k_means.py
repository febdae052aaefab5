"""Lloyd and power k-means against scikit-learn's `KMeans(algorithm="lloyd")`: same data, same seeds, float32.

Whole runs, with the checks of their input: Lloyd on both sides from the same seeds, until the assignments
repeat. scikit-learn runs with all threads and with one, because on small data, or beside other work, its
threads wait for each other; the ratios are to the faster. Time to the same objective: power k-means,
finished by Lloyd, once from random seeds; scikit-learn restarts from k-means++ seeds of its own until it
is within 0.05% of that objective, and is cut off after 100 restarts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans as ScikitKMeans
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from timing import interleaved, report

import fallline as fl
from fallline.clustering.k_means import KMeans, lloyd
from fallline.clustering.power_k_means import power_k_means

MOST_RESTARTS = 100


def gaussian_clusters(n: int, d: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.uniform(0, 3, (k, d))[rng.integers(0, k, n)] + rng.standard_normal((n, d))).astype(np.float32)


def scikit(points: np.ndarray, k: int, threads: int | None, **settings: Any) -> ScikitKMeans:
    with threadpool_limits(threads):
        return ScikitKMeans(k, n_init=1, algorithm="lloyd", tol=0, max_iter=1000, **settings).fit(points)


def restarts(points: np.ndarray, k: int, threads: int | None, target: float) -> Iterator[bool]:
    """One restart an item: whether the target is reached."""
    for seed in range(MOST_RESTARTS):
        reached = scikit(points, k, threads, random_state=seed).inertia_ <= target
        yield reached
        if reached:
            return


def compare(name: str, points: np.ndarray, k: int, rounds: int) -> None:
    problem = KMeans(jnp.asarray(points))
    start = points[np.random.default_rng(0).choice(len(points), k, replace=False)]

    def power() -> fl.Solution:
        return fl.minimize(problem, start, power_k_means())

    def finished() -> fl.Solution:
        return fl.minimize(problem, power().x, lloyd())

    target = 1.0005 * float(finished().value)
    runs = {
        "Lloyd": lambda: fl.minimize(problem, start, lloyd()),
        "power": power,
        "finished": finished,
        "scikit": lambda: scikit(points, k, None, init=start),
        "scikit, one thread": lambda: scikit(points, k, 1, init=start),
        "restarts": lambda: list(restarts(points, k, None, target)),
        "restarts, one thread": lambda: list(restarts(points, k, 1, target)),
    }
    times = interleaved(runs, rounds=rounds, warm=1)
    theirs, needed = runs["scikit"](), runs["restarts"]()
    ours, annealed = int(runs["Lloyd"]().steps) + 1, int(power().steps) + 1
    lloyd_pass, power_pass = 1e3 * times["Lloyd"] / ours, 1e3 * times["power"] / annealed
    scikit_pass = 1e3 * min(times["scikit"], times["scikit, one thread"]) / theirs.n_iter_
    report(
        f"k-means on {name}, {len(points)} x {points.shape[1]}, k = {k}, float32",
        {
            f"scikit-learn Lloyd, ms a pass of {theirs.n_iter_}": scikit_pass,
            f"fallline Lloyd, ms a pass of {ours}": lloyd_pass,
            f"power k-means, ms a pass of {annealed}": power_pass,
            "ratio, Lloyd": lloyd_pass / scikit_pass,
            "ratio, power k-means": power_pass / scikit_pass,
            "power k-means finished by Lloyd, s": times["finished"],
            f"scikit-learn, {len(needed)} restarts, s": min(times["restarts"], times["restarts, one thread"]),
            "restarts reached the objective": "yes" if needed[-1] else "no, cut off",
        },
    )


def main() -> None:
    compare("the digits", (load_digits().data / 16).astype(np.float32), 10, rounds=15)
    compare("Gaussian clusters", gaussian_clusters(100_000, 20, 20), 20, rounds=3)


if __name__ == "__main__":
    main()
