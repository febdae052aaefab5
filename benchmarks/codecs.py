"""Codecs against their floors, and where it is installed, PyTorch.

Floors: packing reads 4 bytes an entry and writes a bit, unpacking the other way. A read is a sum, a write fills an
array with one number; both are allocated anew, as the results of the codecs are.
"""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, report

from fallline.parts.codecs import Signs, TopK

N = 10_000_000
K = N // 1000


def ready(fn, *args):
    compiled = jax.jit(fn)
    return lambda: jax.block_until_ready(compiled(*args))


def signs() -> None:
    v = jax.random.normal(jax.random.key(0), (N,))
    codec = Signs("none")
    payload = codec.encode(v)
    runs = {
        "read": ready(jnp.sum, v),
        "write": ready(lambda x: jnp.full(N, x), jnp.float32(1)),
        "pack": ready(codec.encode, v),
        "unpack": ready(lambda p: codec.decode(p, N), payload),
    }
    times = interleaved(runs, rounds=40, pick=min)
    rows = {f"{name}, ms": 1e3 * seconds for name, seconds in times.items()}
    rows["packing over its floor"] = times["pack"] / (times["read"] + times["write"] / 32)
    rows["unpacking over its floor"] = times["unpack"] / (times["write"] + times["read"] / 32)
    report(f"signs of {N} entries", rows, "at most 2 floors")


def top_k() -> None:
    draw = jax.random.normal(jax.random.key(0), (N,))
    for title, v in {"of no two equal": draw, "with ties": jnp.round(8 * draw) / 8}.items():
        expected = np.sort(np.argsort(-np.abs(np.asarray(v)), kind="stable")[:K])
        np.testing.assert_array_equal(TopK(K).encode(v)[0], expected)
        runs = {
            "read": ready(jnp.sum, v),
            "top-k": ready(TopK(K).encode, v),
            "lax.top_k": ready(lambda v: jax.lax.top_k(jnp.abs(v), K), v),
        }
        if importlib.util.find_spec("torch"):
            import torch

            tensor = torch.from_numpy(np.array(v))
            runs["torch.topk"] = lambda tensor=tensor: torch.topk(tensor.abs(), K, sorted=False)
        else:
            print("torch is not installed: without torch.topk")
        times = interleaved(runs, rounds=15, pick=min)
        rows = {f"{name}, ms": 1e3 * seconds for name, seconds in times.items()}
        rows |= {
            f"{name} over ours": times[name] / times["top-k"] for name in runs if name.endswith("k") and "." in name
        }
        report(f"the {K} largest of {N} entries, {title}", rows, "at least 3 times faster, ties to the lower index")


if __name__ == "__main__":
    signs()
    top_k()
