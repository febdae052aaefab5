"""A whole round of DoubleSqueeze with the 1-bit codec, 8 workers × 10M float32, without its gradients.

The floor is a program that touches only what a round must: for each worker, gradient and memory are read once for the
scale, and once more while the memory is written; the server does the same with one memory, and the model is read and
written. (The bits are 1/32 of a vector and are not counted.) Both run donated, several rounds in one program.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fallline.distributed.double_squeeze import double_squeeze
from fallline.distributed.round import Round
from fallline.distributed.rules import WorkerRule
from fallline.distributed.sharded import Sharded

WORKERS, N, ROUNDS, GOAL = 8, 10_000_000, 4, 3


class Given(WorkerRule):
    """The message is what the worker has: there is no gradient to compute."""

    def message(self, problem, x, own, memory, round_, key):
        return own[0], memory, jnp.float32(0)


def one_bit(exact: bool):
    """`ROUNDS` rounds in one compiled loop, the state donated."""
    given = Round(Given(), *[getattr(double_squeeze(0.1), part) for part in PARTS])
    problem = Sharded(lambda x, batch: x, gradients, exact=exact)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, problem):
        return jax.lax.fori_loop(0, ROUNDS, lambda _, state: given.step(problem, state, key=None), state)

    kept = [jax.jit(lambda: given.init(problem, jnp.zeros(N), key=None))()]

    def go():
        kept[0] = jax.block_until_ready(run(kept[0], problem))

    return go
