"""A step of PSGD with Kronecker factors beside psgd-jax and the official code, and the loss that each reaches.

All three are of the Fisher type, which whitens gradients, with triangular factors on both sides, μ = 0.1, Q₀ = I,
next to no damping, P g of root mean square at most 1.1 and an update of every factor in every step. A step is timed on
a 784-512-512-10 network, the gradient given. Each reaches its loss with the best of the same learning rates.

Peers, where they are there: `pip install psgd-jax chex flax`; `pip install torch opt_einsum`, and a folder with
`psgd.py` of github.com/lixilinx/psgd_torch named in `PSGD`, whose `update_precond_kron_whiten_eq` and
`precond_grad_kron` are called.
"""

from __future__ import annotations

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleaved, report

import fallline as fl
from fallline.problems.digits import digits

try:
    # A module of Optax that psgd-jax asks for by a name of before.
    optax._src.clipping = optax
    from psgd_jax.kron import kron
except ImportError:
    kron = None


def official():
    """The modules `torch` and `psgd` of the official code, or None."""
    try:
        import torch

        sys.path.insert(0, os.environ["PSGD"])
        import psgd
    except (ImportError, KeyError):
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch, psgd


SHAPES = ((785, 512), (513, 512), (513, 10))
SMALL = ((65, 64), (65, 10))
STEPS = 300
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
LARGEST = 1.1  # root mean square of P g


def stepper(update, gradient):
    """Takes the next step of a run whose buffers are donated each time."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(x, state, gradient):
        updates, state = update.update(gradient, state, x)
        return optax.apply_updates(x, updates), state

    x = jax.tree.map(jnp.zeros_like, gradient)
    carry = [x, update.init(jax.tree.map(jnp.zeros_like, gradient))]

    def run():
        carry[:] = jax.block_until_ready(step(*carry, gradient))

    return run


def ours(rate, shapes):
    """Our Fisher type at these settings; the cap is on the norm over all leaves."""
    cap = LARGEST * sum(m * n for m, n in shapes) ** 0.5
    return fl.psgd_lie_groups(rate, "fisher", damping=1e-9, clip=cap)


def start():
    return [jax.random.normal(jax.random.key(i), shape) / 8 for i, shape in enumerate(SMALL)]


def batch(t):
    """The rows of the batch of step `t`."""
    return jax.random.randint(jax.random.fold_in(jax.random.key(7), t), (64,), 0, 1797)


def loss_reached(update):
    """The training loss of a 64-64-10 network after `STEPS` batches of 64."""
    pixels, labels = (jnp.asarray(a) for a in digits())
    pixels = pixels.astype(jnp.float32)

    def ones(x):
        return jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1)

    def loss(x, rows):
        logits = ones(jnp.tanh(ones(pixels[rows]) @ x[0])) @ x[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    @jax.jit
    def step(x, state, rows):
        updates, state = update.update(jax.grad(loss)(x, rows), state, x)
        return optax.apply_updates(x, updates), state

    x = start()
    state = update.init(x)
    for t in range(STEPS):
        x, state = step(x, state, batch(t))
    return float(loss(x, jnp.arange(len(labels))))


def official_stepper(torch, psgd, gradient):
    """The same with the official functions; the state is its own, updated in place."""
    gradients = [torch.from_numpy(np.array(g)) for g in gradient]
    x = [torch.zeros_like(g) for g in gradients]
    move = official_move(psgd, gradients)

    def run():
        with torch.no_grad():
            for a, u in zip(x, move(gradients), strict=True):
                a.sub_(u, alpha=1e-3)

    return run


def official_move(psgd, like):
    """From gradients to P g, with root mean square at most `LARGEST`."""
    states = [psgd.init_kron(g, 1.0, max_skew=float("inf"), dQ="EQ") for g in like]

    def move(gradients):
        found = []
        for (fit, exprs), g in zip(states, gradients, strict=True):
            psgd.update_precond_kron_whiten_eq(fit, exprs, g, lr=0.1)
            u = psgd.precond_grad_kron(fit, exprs, g)
            found.append(u / max(1.0, float(u.square().mean().sqrt()) / LARGEST))
        return found

    return move


def official_loss_reached(torch, psgd, rate):
    """`loss_reached` with PyTorch: the same start and batches."""
    pixels, labels = (np.array(a) for a in digits())
    pixels, labels = torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
    x = [torch.from_numpy(np.array(a)).requires_grad_() for a in start()]
    move = official_move(psgd, x)
    torch.manual_seed(0)

    def ones(a):
        return torch.cat([a, torch.ones(len(a), 1)], dim=1)

    def loss(rows):
        logits = ones(torch.tanh(ones(pixels[rows]) @ x[0])) @ x[1]
        return torch.nn.functional.cross_entropy(logits, labels[rows])

    for t in range(STEPS):
        gradients = torch.autograd.grad(loss(torch.from_numpy(np.array(batch(t)))), x)
        with torch.no_grad():
            for a, u in zip(x, move(gradients), strict=True):
                a.sub_(u, alpha=rate)
    with torch.no_grad():
        return float(loss(slice(None)))


def main() -> None:
    draw = np.random.default_rng(0)
    gradient = [jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in SHAPES]
    runs = {"fallline": stepper(ours(1e-3, SHAPES), gradient)}
    reached = {"fallline": lambda rate: loss_reached(ours(rate, SMALL))}
    if kron is not None:
        peer = functools.partial(kron, b1=0.0, preconditioner_update_probability=1.0)
        runs["psgd-jax"] = stepper(peer(1e-3), gradient)
        reached["psgd-jax"] = lambda rate: loss_reached(peer(rate))
    if (found := official()) is not None:
        runs["official"] = official_stepper(*found, gradient)
        reached["official"] = functools.partial(official_loss_reached, *found)
    times = interleaved(runs, rounds=31, warm=3, pick=min)
    rows = {f"{name}, ms a step": 1e3 * seconds for name, seconds in times.items()}
    rows |= {f"{name} over fallline": times[name] / times["fallline"] for name in times if name != "fallline"}
    for name, run in reached.items():
        losses = {rate: run(rate) for rate in RATES}
        best = min(losses, key=lambda rate: losses[rate])
        rows[f"{name}, loss after {STEPS} steps, best of rates"] = losses[best]
        rows[f"{name}, that rate"] = best
    goal = "the others over fallline at least 1, no worse loss"
    report("PSGD with Kronecker factors, 0.67M parameters", rows, goal)


if __name__ == "__main__":
    main()
