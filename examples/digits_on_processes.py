"""A small network on scikit-learn's digits, trained by DoubleSqueeze: eight workers, one bit a number each way.

    python examples/digits_on_processes.py FOLDER                       simulates the workers in one process
    fallline launch 4 examples/digits_on_processes.py FOLDER            has four processes, two workers each

Both end at the same bits. The run is kept in FOLDER: started again after a crash it goes on from there.
"""

import hashlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fallline as fl
from fallline.distributed import Sharded, join, shard
from fallline.distributed.double_squeeze import double_squeeze

mesh = join()  # the devices of all processes; None where this one is alone


def loss(weights, batch):
    images, labels = batch
    hidden = jnp.tanh(images @ weights["in"] + weights["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weights["out"], labels)


digits = load_digits()
data = shard(((digits.data / 16).astype(np.float32), digits.target), workers=8)
problem = Sharded(loss, data, batch_size=16, mesh=mesh, exact=True)

draw = np.random.default_rng(0)
weights = {
    "in": draw.normal(size=(64, 32), scale=1 / 8).astype(np.float32),
    "bias": np.zeros(32, np.float32),
    "out": draw.normal(size=(32, 10), scale=1 / 6).astype(np.float32),
}
solver = double_squeeze(step_size=0.3)
solution = fl.minimize(problem, weights, solver, steps=600, key=0, every=20, checkpoint=Path(sys.argv[1]) / "run")

if jax.process_index() == 0:
    account = solver.account(problem, weights)
    print(solution.status, f"value {solution.value:.4f}")
    print(f"a worker sends {account.up} bytes a round and receives {account.down}, of {account.dense} uncompressed")
    print("bits of the model:", hashlib.sha256(b"".join(map(np.asarray, jax.tree.leaves(solution.x)))).hexdigest()[:16])
