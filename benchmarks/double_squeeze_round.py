"""A whole round of DoubleSqueeze with the 1-bit codec, 8 workers × 10M float32, without its gradients.

The floor is a program that touches only what a round must: for each worker, gradient and memory are read once for the
scale, and once more while the memory is written; the server does the same with one memory, and the model is read and
written. (The bits are 1/32 of a vector and are not counted.) All run donated, several rounds in one program.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from timing import interleaved, report

from fallline.distributed.double_squeeze import double_squeeze
from fallline.distributed.round import Round
from fallline.distributed.rules import WorkerRule
from fallline.distributed.sharded import Sharded

WORKERS, N, ROUNDS = 8, 10_000_000, 4


class Given(WorkerRule):
    """The message is what the worker has, two leaves one after another: there is no gradient to compute."""

    def message(self, problem, x, own, memory, round_, key):
        return own[0].reshape(-1), memory, jnp.float32(0)


def donated(step, kept, data):
    """`ROUNDS` times `step(kept, data)` in one program that overwrites what it keeps."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(kept, data):
        return jax.lax.fori_loop(0, ROUNDS, lambda _, carry: (step(*carry), carry[1]), (kept, data))[0]

    box = [kept]

    def go():
        box[0] = jax.block_until_ready(run(box[0], data))

    return go


def one_bit(gradients, exact: bool):
    named = double_squeeze(0.1)
    given = Round(Given(), named.uplink, named.aggregator, named.downlink, named.server)
    problem = Sharded(lambda x, batch: x, gradients, exact=exact)
    state = jax.jit(lambda: given.init(problem, jnp.zeros(N), key=None))()
    return donated(lambda state, problem: given.step(problem, state, key=None), state, problem)


def floor(gradients):
    def touch(kept, gradients):
        memories, server, x = kept
        moved = []
        for memory, gradient in zip(memories, gradients, strict=True):
            scale = jnp.dot(gradient, memory)
            moved.append(memory + 1e-9 * scale * gradient)
        server = server + 1e-9 * jnp.dot(server, server)
        return moved, server, x * (1 + 1e-9 * server[0])

    kept = [jnp.full(N, float(i)) for i in range(WORKERS)], jnp.full(N, 0.1), jnp.full(N, 0.2)
    return donated(touch, kept, [gradient.reshape(-1) for gradient in gradients])


def main() -> None:
    gradients = jax.random.normal(jax.random.key(0), (WORKERS, 1, 2, N // 2))
    runs = {
        "floor": floor(gradients),
        "exact=True": one_bit(gradients, exact=True),
        "exact=False": one_bit(gradients, exact=False),
    }
    times = interleaved(runs, rounds=12, pick=min)
    rows = {f"{name}, ms a round": 1e3 * seconds / ROUNDS for name, seconds in times.items()}
    rows |= {f"{name} over the floor": times[name] / times["floor"] for name in runs if name != "floor"}
    report(f"a round of DoubleSqueeze, {WORKERS} workers, {N} entries", rows, "at most 3 floors")


if __name__ == "__main__":
    main()
