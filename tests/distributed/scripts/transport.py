"""Rounds over a million numbers: what the operating system counted on the loopback interface, and what is declared."""

import numpy as np
from jax.experimental import multihost_utils

import fallline as fl
from fallline.distributed import Plain, Sharded, Signs, join
from fallline.distributed.double_squeeze import double_squeeze

mesh = join()
SIZE, ROUNDS = 1_000_003, 10


def loss(x, batch):
    return (batch * x).sum(axis=1)


def loopback():
    """Bytes sent over the loopback interface since it is up."""
    with open("/proc/net/dev") as file:
        return next(int(line.split(":")[1].split()[8]) for line in file if line.strip().startswith("lo:"))


def sent(solver, rounds):
    multihost_utils.sync_global_devices("before")
    before = loopback()
    fl.minimize(problem, x0, solver, steps=rounds, every=1000)
    multihost_utils.sync_global_devices("after")
    return loopback() - before


rows = np.random.default_rng(0).normal(size=(4, 1, SIZE)).astype(np.float32)
problem, x0 = Sharded(loss, rows, mesh=mesh), np.zeros(SIZE, np.float32)
for codec in (Plain(), Signs()):
    for exchange in ("gathered", "sliced"):
        solver = double_squeeze(0.1, codec, blocks=4, exchange=exchange)
        few = min(sent(solver, 1) for _ in range(3))
        counted = (min(sent(solver, 1 + ROUNDS) for _ in range(2)) - few) / ROUNDS
        print(f"{exchange} {counted / (solver.account(problem, x0).transport * mesh.size):.6f}")
