"""A step of PSGD with Kronecker factors beside psgd-jax, and the loss that both reach on the digits.

Both update every factor in every step (`probability` 1), on a 784-512-512-10 network, the gradient given; psgd-jax
(`pip install psgd-jax chex flax`) whitens gradients, which is our Fisher type.
"""

from __future__ import annotations

import functools

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

SHAPES = ((785, 512), (513, 512), (513, 10))
STEPS = 300


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
    def step(x, state, key):
        rows = jax.random.randint(key, (64,), 0, len(labels))
        updates, state = update.update(jax.grad(loss)(x, rows), state, x)
        return optax.apply_updates(x, updates), state

    x = [jax.random.normal(jax.random.key(i), shape) / 8 for i, shape in enumerate(((65, 64), (65, 10)))]
    state = update.init(x)
    for t in range(STEPS):
        x, state = step(x, state, jax.random.fold_in(jax.random.key(7), t))
    return float(loss(x, jnp.arange(len(labels))))


def main() -> None:
    draw = np.random.default_rng(0)
    gradient = [jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in SHAPES]
    rates = (0.001, 0.003, 0.01, 0.03)
    runs = {"fallline": stepper(fl.psgd_lie_groups(1e-3, "fisher"), gradient)}
    losses = {"fallline": min(loss_reached(fl.psgd_lie_groups(rate, "fisher")) for rate in rates)}
    if kron is not None:
        peer = functools.partial(kron, b1=0.0, preconditioner_update_probability=1.0)
        runs["psgd-jax"] = stepper(peer(1e-3), gradient)
        losses["psgd-jax"] = min(loss_reached(peer(rate)) for rate in rates)
    times = interleaved(runs, rounds=9, warm=2, pick=min)
    rows = {f"{name}, ms a step": 1e3 * seconds for name, seconds in times.items()}
    if kron is not None:
        rows["psgd-jax over fallline"] = times["psgd-jax"] / times["fallline"]
    rows |= {f"{name}, loss after {STEPS} steps": loss for name, loss in losses.items()}
    report("PSGD with Kronecker factors, 0.67M parameters", rows, "psgd-jax over fallline at least 1, no worse loss")


if __name__ == "__main__":
    main()
