"""Aggregators against one read of the messages, NumPy and, where it is installed, byzfl.

The floor is a read of all messages: a product with a vector of ones. byzfl takes arrays of NumPy and tensors of
PyTorch; the faster of the two counts. The trimmed mean cuts a quarter from each side.
"""

from __future__ import annotations

import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, report

from fallline.distributed.aggregators import Mean, Median, TrimmedMean
from fallline.parts.codecs import Signs
from fallline.parts.voting import majority

M = 1_000_000
READS = {32: 4, 100: 8}


def peers(messages: np.ndarray, cut: int) -> dict:
    """The same of others, by our names."""
    runs = {
        "numpy mean": lambda: messages.mean(axis=0),
        "numpy median": lambda: np.median(messages, axis=0),
    }
    if not importlib.util.find_spec("byzfl"):
        print("byzfl is not installed: without it")
        return runs
    import byzfl
    import torch

    rules = {"mean": byzfl.Average(), "median": byzfl.Median(), "trimmed mean": byzfl.TrMean(f=cut)}
    tensor = torch.from_numpy(messages.copy())
    for name, rule in rules.items():
        runs[f"byzfl {name}, array"] = lambda rule=rule: rule(messages)
        runs[f"byzfl {name}, tensor"] = lambda rule=rule: rule(tensor)
    return runs


def compare(workers: int) -> None:
    cut = workers // 4
    messages = jax.random.normal(jax.random.key(1), (workers, M))
    votes = jnp.stack([Signs("none").encode(row)[0] for row in messages])
    ones = jnp.ones(workers)
    rules = {"read": lambda x: ones @ x, "mean": Mean(), "median": Median(), "trimmed mean": TrimmedMean(cut)}
    runs, rows = {}, {}
    for name, rule in rules.items():
        began, compiled = time.perf_counter(), jax.jit(rule).lower(messages).compile()
        rows[f"{name}, compiled in s"] = time.perf_counter() - began
        runs[name] = lambda compiled=compiled: jax.block_until_ready(compiled(messages))
    vote = jax.jit(majority)
    runs["majority of packed signs"] = lambda: jax.block_until_ready(vote(votes))

    host = np.asarray(messages)
    np.testing.assert_allclose(runs["median"](), np.median(host, axis=0), rtol=1e-6, atol=1e-7)
    kept = np.sort(host, axis=0)[cut : workers - cut]
    np.testing.assert_allclose(runs["trimmed mean"](), kept.mean(axis=0, dtype=np.float64), rtol=1e-4, atol=1e-5)

    times = interleaved(runs, rounds=30, pick=min)
    slow = interleaved(peers(host, cut), rounds=3, warm=1, pick=min)
    rows |= {f"{name}, ms": 1e3 * seconds for name, seconds in (times | slow).items()}
    ours = [name for name in runs if name != "read"]
    rows |= {f"{name}, in reads": times[name] / times["read"] for name in ours}
    for name in ("mean", "median", "trimmed mean"):
        if f"numpy {name}" in slow:
            rows[f"numpy over our {name}"] = slow[f"numpy {name}"] / times[name]
        paths = [seconds for key, seconds in slow.items() if key.startswith(f"byzfl {name},")]
        if paths:
            rows[f"byzfl over our {name}"] = min(paths) / times[name]
    goal = f"at most {READS[workers]} reads; median 20 times NumPy's and byzfl's, trimmed mean 5 times byzfl's"
    report(f"aggregates of {workers} workers, {M} entries", rows, goal)


if __name__ == "__main__":
    for count in READS:
        compare(count)
