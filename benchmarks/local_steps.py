"""Rounds of local SGD, 64 workers × 5 steps of a 64–32–10 network on batches of 16, through `minimize`, and the same
round as a plain loop over the workers in PyTorch, where that is installed. Flower's simulation is not timed here.
"""

from __future__ import annotations

import importlib.util
import time

import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from timing import report

import fallline as fl
from fallline.distributed import Adopt, LocalSteps, Mean, Plain, Round, Sharded, shard

WORKERS, STEPS, BATCH, RATE = 64, 5, 16, 0.1
ROUNDS, TORCH_ROUNDS, REPEATS = 2000, 20, 5


def loss(x, batch):
    pixels, labels = batch
    hidden = jnp.tanh(pixels @ x["w"] + x["b"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ x["v"] + x["c"], labels)


def ours(data, start, exact):
    problem = Sharded(loss, data, BATCH, exact=exact)
    solver = Round(LocalSteps(STEPS, RATE), Plain(), Mean(), Plain(), Adopt())

    def run(rounds):
        return fl.minimize(problem, start, solver, steps=rounds, key=0, every=rounds)

    run(1)
    return lambda: run(ROUNDS)


def in_torch(data, start):
    import torch

    pixels, labels = (torch.from_numpy(np.array(a)) for a in data)
    common = {name: torch.from_numpy(np.array(a)) for name, a in start.items()}

    def local(worker):
        x = {name: a.clone().requires_grad_() for name, a in common.items()}
        for _ in range(STEPS):
            rows = torch.randint(pixels.shape[1], (BATCH,))
            hidden = torch.tanh(pixels[worker, rows] @ x["w"] + x["b"])
            value = torch.nn.functional.cross_entropy(hidden @ x["v"] + x["c"], labels[worker, rows].long())
            gradients = torch.autograd.grad(value, list(x.values()))
            with torch.no_grad():
                for a, g in zip(x.values(), gradients, strict=True):
                    a -= RATE * g
        return x

    def run():
        for _ in range(TORCH_ROUNDS):
            models = [local(worker) for worker in range(WORKERS)]
            for name in common:
                common[name] = torch.stack([model[name].detach() for model in models]).mean(0)

    return run


def main() -> None:
    digits = load_digits()
    data = shard(((digits.data / 16).astype(np.float32), digits.target.astype(np.int32)), WORKERS)
    draw = np.random.default_rng(0)
    shapes = {"w": (64, 32), "b": (32,), "v": (32, 10), "c": (10,)}
    start = {name: (0.2 * draw.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    runs = {"side by side": (ours(data, start, False), ROUNDS), "exact": (ours(data, start, True), ROUNDS)}
    if importlib.util.find_spec("torch"):
        runs["PyTorch"] = (in_torch(data, start), TORCH_ROUNDS)
    else:
        print("torch is not installed: without its loop")
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(REPEATS):
        for name, (run, rounds) in runs.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - began) / rounds)
    rows = {f"{name}, rounds a second": 1 / seconds for name, seconds in best.items()}
    if "PyTorch" in best:
        rows |= {f"{name} over PyTorch": best["PyTorch"] / best[name] for name in ("side by side", "exact")}
    report(f"{WORKERS} workers × {STEPS} local steps", rows, "at least 20 times PyTorch's rounds a second")


if __name__ == "__main__":
    main()
