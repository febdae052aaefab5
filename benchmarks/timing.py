"""Interleaved timings: every competitor runs once in each round, so that noise hits all alike."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def interleaved(
    runs: dict[str, Callable[[], Any]],
    rounds: int = 15,
    warm: int = 2,
    pick: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median seconds of each run over `rounds` rounds, after `warm` rounds that do not count.

    `pick=min` takes the least instead: for runs of milliseconds, on cores that others use too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warm + rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if i >= warm:
                seconds[name].append(time.perf_counter() - began)
    return {name: pick(times) for name, times in seconds.items()}


def report(title: str, rows: dict[str, Any], limit: str = "") -> None:
    """Print one comparison for people, and one JSON line for machines."""
    print(f"\n{title}" + (f"   (goal: {limit})" if limit else ""))
    for name, value in rows.items():
        print(f"  {name:44s} {value:.4g}" if isinstance(value, float) else f"  {name:44s} {value}")
    print(json.dumps({"benchmark": title, **rows}))
