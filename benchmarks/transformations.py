"""One step of each first-order transformation on 10M float32 parameters, against memory's floor and PyTorch.

A step is `update` and `apply_updates`, donated, the gradient given. The floor is the donated update of as many
arrays as the method keeps (x and its state) from one more, the gradient; that of SGLD, whose gradient is the mean of
4 clipped examples, is two passes over these, and its normal numbers drawn alone. Peers, where they are installed
(`pip install torch pytorch_optimizer torch-optimizer`), take the same step on the same cores, in the same rounds.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleaved, report

import fallline as fl
from fallline.parts.prox import L1

try:
    import torch
except ImportError:
    torch = None

N = 10_000_000

# Each: the transformation, arrays kept beside x, and peers as (name, factory of an optimizer from parameters).
METHODS = {
    "diffgrad": (fl.diffgrad(1e-3), 3, ("pytorch_optimizer.DiffGrad", "torch_optimizer.DiffGrad")),
    "adaptive saddle escape, diagonal": (
        fl.adaptive_saddle_escape(1e-3, blocks="diag", burn_in=0),
        1,
        ("torch.optim.RMSprop",),
    ),
    "last iterate": (fl.last_iterate("linear", 0.1, 1000), 0, ("torch.optim.SGD",)),
    "last iterate, l1": (fl.last_iterate("linear", 0.1, 1000, prox=L1(1e-3)), 0, ("torch.optim.SGD",)),
    "AdaGradNorm": (fl.adagrad_norm(1e-2), 0, ("torch.optim.SGD",)),
    "AdaGrad": (fl.adagrad(1e-2), 1, ("torch.optim.Adagrad",)),
}


@functools.partial(jax.jit, donate_argnums=0)
def floor(arrays, g):
    return [a + 1e-3 * g for a in arrays]


def stepper(update, g):
    """Takes the next step of a run whose buffers are donated each time."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(x, state, g):
        updates, state = update.update(g, state, x)
        return optax.apply_updates(x, updates), state

    carry = [jnp.zeros(N, jnp.float32) + 1, update.init(jnp.zeros(N, jnp.float32) + 1)]

    def run():
        carry[:] = jax.block_until_ready(step(*carry, g))

    return run


def langevin(examples):
    """SGLD's step, and its floor."""
    update = fl.sgld(1e-3, clip=1.0, seed=0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(x, state, g, examples):
        updates, state = update.update(g, state, x, per_example_gradients=examples)
        return optax.apply_updates(x, updates), state

    @functools.partial(jax.jit, donate_argnums=0)
    def least(x, examples, key):
        weights = jnp.sum(examples * examples, axis=1)
        return x + weights @ examples + jax.random.normal(key, x.shape)

    carry = [jnp.ones(N, jnp.float32), update.init(jnp.ones(N, jnp.float32))]
    kept = [jnp.ones(N, jnp.float32)]
    g = examples[0]

    def run():
        carry[:] = jax.block_until_ready(step(*carry, g, examples))

    def lowest():
        kept[0] = jax.block_until_ready(least(kept[0], examples, jax.random.key(0)))

    return {"floor": lowest, "fallline": run}


def peer(path, g):
    """The same of a PyTorch optimizer by its dotted name; None where it is not installed."""
    module, name = path.rsplit(".", 1)
    try:
        factory = getattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        return None
    x = torch.ones(N, requires_grad=True)
    x.grad = torch.from_numpy(np.array(g))
    optimizer = factory([x], lr=1e-3)
    return optimizer.step


def main() -> None:
    g = jnp.asarray(np.random.default_rng(0).standard_normal(N, dtype=np.float32))
    if torch is not None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name, (update, arrays, peers) in METHODS.items():
        kept = [[jnp.zeros(N, jnp.float32) for _ in range(1 + arrays)]]

        def lowest(kept=kept):
            kept[0] = jax.block_until_ready(floor(kept[0], g))

        runs = {"floor": lowest, "fallline": stepper(update, g)}
        runs |= {path: run for path in peers if torch is not None and (run := peer(path, g)) is not None}
        times = interleaved(runs, rounds=15, warm=3, pick=min)
        rows = {f"{key}, ms": 1e3 * seconds for key, seconds in times.items()}
        rows["ratio to the floor"] = times["fallline"] / times["floor"]
        rows |= {f"{key} over fallline": times[key] / times["fallline"] for key in runs if "." in key}
        report(f"{name} on 10M parameters, a step", rows, "ratio at most 1.5, peers above 1")
    examples = jnp.asarray(np.random.default_rng(1).standard_normal((4, N), dtype=np.float32))
    times = interleaved(langevin(examples), rounds=9, warm=2, pick=min)
    rows = {f"{key}, ms": 1e3 * seconds for key, seconds in times.items()}
    report(
        "SGLD on 10M parameters, 4 examples, a step",
        {**rows, "ratio to the floor": times["fallline"] / times["floor"]},
        "ratio at most 1.5",
    )


if __name__ == "__main__":
    main()
