"""Codecs and robust aggregation against their floors, NumPy and, where it is installed, PyTorch.

Floors: packing reads 4 bytes an entry and writes a bit; unpacking the other way; an aggregate over n workers reads n
vectors. A read is a product with a vector of ones, a copy an addition of 1.
"""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, report

from fallline.parts.codecs import Signs, TopK
from fallline.parts.sorting import median, trimmed_mean
from fallline.parts.voting import majority

N, M, WORKERS = 10_000_000, 1_000_000, 32


def ready(fn, *args):
    compiled = jax.jit(fn)
    return lambda: jax.block_until_ready(compiled(*args))


def vectors() -> None:
    v = jax.random.normal(jax.random.key(0), (N,))
    signs, top = Signs("none"), TopK(N // 1000)
    payload = signs.encode(v)
    runs = {
        "read": ready(jnp.sum, v),
        "write": ready(lambda x: jnp.full(N, x), jnp.float32(1)),
        "pack": ready(signs.encode, v),
        "unpack": ready(lambda p: signs.decode(p, N), payload),
        "top-k": ready(top.encode, v),
        "lax.top_k": ready(lambda v: jax.lax.top_k(jnp.abs(v), N // 1000), v),
    }
    if importlib.util.find_spec("torch"):
        import torch

        tensor = torch.from_numpy(np.array(v))
        runs["torch.topk"] = lambda: torch.topk(tensor.abs(), N // 1000)
    times = interleaved(runs, rounds=9)
    rows = {f"{name}, ms": 1e3 * seconds for name, seconds in times.items()}
    rows["packing over its floor"] = times["pack"] / (times["read"] + times["write"] / 32)
    rows["unpacking over its floor"] = times["unpack"] / (times["write"] + times["read"] / 32)
    for name in ("lax.top_k", "torch.topk"):
        if name in times:
            rows[f"{name} over ours"] = times[name] / times["top-k"]
    report(f"codecs, {N} entries", rows, "packing at most 2 floors, top-k at least 3 times faster")


def aggregates() -> None:
    x = jax.random.normal(jax.random.key(1), (WORKERS, M))
    words = jnp.stack([Signs("none").encode(row)[0] for row in x])
    host = np.asarray(x)
    runs = {
        "read": ready(lambda x: jnp.ones(WORKERS) @ x, x),
        "median": ready(median, x),
        "trimmed mean": ready(lambda x: trimmed_mean(x, 8), x),
        "majority": ready(majority, words),
        "numpy median": lambda: np.median(host, axis=0),
    }
    times = interleaved(runs, rounds=5)
    rows = {f"{name}, ms": 1e3 * seconds for name, seconds in times.items()}
    rows |= {f"{name} over a read": times[name] / times["read"] for name in ("median", "trimmed mean", "majority")}
    rows["numpy over our median"] = times["numpy median"] / times["median"]
    report(f"aggregates over {WORKERS} workers, {M} entries", rows, "median 20 times NumPy's, at most 4 reads")


if __name__ == "__main__":
    vectors()
    aggregates()
