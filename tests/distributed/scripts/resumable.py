"""A run of DoubleSqueeze with a checkpoint: `resumable.py FOLDER STEPS`; it leaves the number of each process there."""

import hashlib
import os
import sys
from pathlib import Path

import jax
import numpy as np

import fallline as fl
from fallline.distributed import Sharded, join
from fallline.distributed.double_squeeze import double_squeeze

mesh = join()
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
(folder / f"{jax.process_index()}.pid").write_text(str(os.getpid()))


def loss(x, batch):
    return 0.5 * ((batch - x) ** 2).sum(axis=1)


rows = np.random.default_rng(0).normal(size=(4, 50, 101)).astype(np.float32)
problem = Sharded(loss, rows, 5, mesh=mesh, exact=True)
checkpoint = fl.Checkpoint(folder / "run", seconds=0.5)
x0 = np.zeros(101, np.float32)
solution = fl.minimize(problem, x0, double_squeeze(0.01), steps=steps, key=0, every=100, checkpoint=checkpoint)
bits = np.asarray(solution.x).tobytes() + solution.history["value"].tobytes()
print(solution.status, hashlib.sha256(bits).hexdigest())
