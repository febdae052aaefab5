"""The methods of the room in few rounds: one line of bits for each."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

import fallline as fl
from fallline.distributed import Median, RandomK, Sharded, SignFlip, StaleReads, TopK, join
from fallline.distributed.byzantine_pgd import byzantine_pgd
from fallline.distributed.double_squeeze import double_squeeze
from fallline.distributed.mem_sgd import mem_sgd
from fallline.distributed.sign_sgd_majority_vote import sign_sgd_majority_vote
from fallline.distributed.topk_sparsified import topk_sparsified

mesh = join()


def loss(x, batch):
    rows, targets = batch
    return (jnp.tanh(rows @ x["in"]) @ x["out"] - targets) ** 2 + 0.01 * jnp.sum(x["out"] ** 2)


draw = np.random.default_rng(0)
data = draw.normal(size=(4, 40, 13)).astype(np.float32), draw.normal(size=(4, 40)).astype(np.float32)
x0 = {"in": draw.normal(size=(13, 7)).astype(np.float32), "out": draw.normal(size=7).astype(np.float32)}
problem = Sharded(loss, data, 5, mesh=mesh, exact=True)
solvers = (
    double_squeeze(0.05, TopK(9), blocks=4, exchange="sliced"),
    topk_sparsified(lambda t: 0.05 / (1 + t / 10), density=0.1),
    mem_sgd(RandomK(5), strong_convexity=0.5, shift=100.0, reads=StaleReads(3)),
    sign_sgd_majority_vote(1e-2, attack=SignFlip(1)),
    byzantine_pgd(
        0.05, Median(), gradient_threshold=1.0, radius=0.1, distance=0.3, patience=5, attempts=2, attack=SignFlip(1)
    ),
)
for solver in solvers:
    solution = fl.minimize(problem, x0, solver, steps=40, key=0, every=10)
    bits = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((solution.x, solution.history)))
    print(f"{solver.name} {solution.status} {hashlib.sha256(bits).hexdigest()}")
