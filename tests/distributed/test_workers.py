"""Workers on devices: the same bits as simulated, whatever the number of devices.

This file is also a script: with four emulated devices, which a process must have from its beginning, it makes the
runs and writes down what they ended in.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fallline import minimize
from fallline.core import chunk, loop
from fallline.core.errors import InputError
from fallline.distributed import (
    Adopt,
    Corrupts,
    Delays,
    Drops,
    Gradient,
    IterativeFiltering,
    LargeNoise,
    LocalSteps,
    Mean,
    Momentum,
    Round,
    Sharded,
    StaleReads,
    Step,
    TrimmedMean,
    mesh_of,
    shard,
)
from fallline.distributed.workers import Workers, in_order
from fallline.parts.codecs import QSGD, Plain, Signs, TopK
from fallline.parts.feedback import ErrorFeedback

WORKERS, ROWS, D = 8, 5, 13
DRAWN = np.random.default_rng(5)
DATA = DRAWN.normal(size=(WORKERS * ROWS, D)).astype(np.float32), DRAWN.normal(size=WORKERS * ROWS).astype(np.float32)
START = {"w": DRAWN.normal(size=(3, 4)).astype(np.float32), "b": np.float32(0.5)}  # 13 numbers, which 4 does not divide
SGD = Step(optax.sgd, learning_rate=0.1)

RUNS = {
    "gathered": Round(
        Momentum(0.5),
        ErrorFeedback(TopK(2)),
        TrimmedMean(2),
        None,
        Step(optax.adam, learning_rate=0.1),
        attack=LargeNoise(2),
        channel=Drops(0.3),
        reads=StaleReads(2),
        blocks=3,
    ),
    "sliced": Round(
        Gradient(),
        ErrorFeedback(QSGD(7)),
        TrimmedMean(2),
        ErrorFeedback(QSGD(7)),
        SGD,
        attack=LargeNoise(2),
        channel=Corrupts(0.02),
        blocks=4,
        exchange="sliced",
    ),
    "filtered": Round(Gradient(), Plain(), IterativeFiltering(1.0), None, SGD, channel=Delays(2)),
    "local": Round(LocalSteps(3, 0.1), Plain(), Mean(), None, Adopt()),
}
DEVICES = dict.fromkeys(RUNS, (0, 4)) | {"sliced": (0, 2, 4)}  # 0 simulates
DTYPE = dict.fromkeys(RUNS, "float32") | {"local": "bfloat16"}


def bent(x, batch):
    rows, sides = batch
    w = jnp.concatenate([x["w"].reshape(-1), x["b"][None]])
    return jnp.log1p((jnp.tanh(rows.astype(w.dtype) @ w) - sides) ** 2)


def run(solver, devices, exact=True, dtype="float32"):
    """The end of a run."""
    mesh = mesh_of(jax.devices()[:devices]) if devices else None
    problem = Sharded(bent, shard(DATA, WORKERS), 3, mesh=mesh, exact=exact)
    x0 = jax.tree.map(lambda a: jnp.asarray(a, dtype), START)
    return minimize(problem, x0, solver, steps=7, key=1, every=3, record=("value", "gradient_norm", "batch_value"))


def digest(solution):
    """Every bit of the state (point, memories, what is under way, the server's) and of the history."""
    leaves = jax.tree.leaves((solution.state, solution.history, solution.value, solution.status.code))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def ends():
    """For each run the digests by the number of devices, and how often the chunk was compiled for each.

    And how far off the point is without `exact`, on four devices.
    """
    found = {}
    for name, solver in RUNS.items():
        before = chunk.compiled_advance._cache_size()
        solutions = [run(solver, devices, dtype=DTYPE[name]) for devices in DEVICES[name]]
        compiled = chunk.compiled_advance._cache_size() - before
        found[name] = {"digests": [digest(s) for s in solutions], "compiled": compiled / len(solutions)}
        if name == "filtered":  # where what is nearly equal goes on so
            side_by_side = run(solver, 4, exact=False, dtype=DTYPE[name])
            pairs = zip(jax.tree.leaves(side_by_side.x), jax.tree.leaves(solutions[0].x), strict=True)
            found[name]["off"] = max(float(np.abs(np.float64(a) - np.float64(b)).max()) for a, b in pairs)
    return found


def primitives():
    """What the few operations do with the numbers 0 … of four devices."""
    workers = Workers(WORKERS, mesh_of())
    numbers = np.arange(WORKERS * 4 * 3, dtype=np.float32).reshape(WORKERS, 4, 3)

    @jax.jit
    @workers.spread
    def stage(stacked, shared):
        everything, mine = workers.gather(stacked), workers.transpose(stacked)
        out = workers.each(lambda one, shared: one + shared, workers.ids(), shared)
        return (out, mine.transpose(1, 0, 2)), (everything, workers.mean(stacked))

    @functools.partial(jax.jit, static_argnums=0)
    def curvature(mesh, x, v):
        return Sharded(bent, shard(DATA, WORKERS), mesh=mesh).hvp(x, v)

    (out, mine), (everything, mean) = stage(workers.put(numbers), jnp.int32(100))
    v = jax.tree.map(np.ones_like, START)
    products = [jax.tree.leaves(curvature(mesh, START, v)) for mesh in (None, mesh_of())]
    return {
        "local": [workers.local, workers.devices],
        "ids": np.asarray(out).tolist(),
        "gathered": bool(np.array_equal(everything, numbers)),
        "transposed": bool(np.array_equal(mine, numbers.transpose(1, 0, 2))),
        "mean": float(np.abs(np.asarray(mean) - numbers.mean(0)).max()),
        "refused": refused(Workers, 6, mesh_of()),
        "refused sliced": refused(
            run, Round(Gradient(), Plain(), Mean(), Plain(), SGD, blocks=6, exchange="sliced"), 4
        ),
        "hvp": max(float(np.abs(a - b).max()) for a, b in zip(*products, strict=True)),
    }


def refused(make, *arguments):
    """The message of the error."""
    try:
        make(*arguments)
    except InputError as error:
        return str(error)
    return ""


def traffic():
    """Bytes that one device sends in a round by its collectives, and what the account says."""
    found = {}
    for name, solver in RUNS.items():
        problem = Sharded(bent, shard(DATA, WORKERS), 3, mesh=mesh_of())
        state = jax.eval_shape(lambda x, p=problem, s=solver: s.init(p, x, key=jax.random.key(0)), START)
        step = functools.partial(solver.step, problem)
        jaxpr = jax.make_jaxpr(lambda state, key, step=step: step(state, key=key))(state, jax.random.key(0))
        found[name] = [sent_in(jaxpr.jaxpr), solver.account(problem, START).transport]
    return found


def sent_in(jaxpr):
    """All of an array to each of three others (gather), or three quarters of it (all-to-all)."""
    shares = {"all_gather": 3, "all_to_all": 0.75}
    total = 0
    for eqn in jaxpr.eqns:
        total += shares.get(eqn.primitive.name, 0) * sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            total += sent_in(inner) if hasattr(inner, "eqns") else 0
    return total


def main():
    loop._CHUNK_SECONDS = 0.0  # a chunk for every record
    assert jax.device_count() == 4
    print(json.dumps({"ends": ends(), "primitives": primitives(), "traffic": traffic()}))


if __name__ == "__main__":
    main()


@pytest.fixture(scope="module")
def found():
    """What the script found."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "0",
    }
    done = subprocess.run([sys.executable, "-W", "error", __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_bits_do_not_depend_on_the_devices(found):
    """Point, memories, server, what is under way and history, after 7 rounds; `local` is in bfloat16."""
    ends = {name: set(end["digests"]) for name, end in found["ends"].items()}
    assert ends.keys() == RUNS.keys() and all(
        len(found["ends"][name]["digests"]) == len(DEVICES[name]) for name in ends
    )
    assert {name: len(digests) for name, digests in ends.items()} == dict.fromkeys(RUNS, 1)
    assert len(set.union(*ends.values())) == len(RUNS)  # and each run has an end of its own


def test_a_second_chunk_compiles_nothing(found):
    assert {name: end["compiled"] for name, end in found["ends"].items()} == dict.fromkeys(RUNS, 1.0)


def test_without_exact_the_ends_are_close(found):
    """7 rounds of float32, in points of the size 1: simulated exactly, and side by side on devices."""
    assert found["ends"]["filtered"]["off"] < 1e-5


def test_what_the_operations_do(found):
    seen = found["primitives"]
    assert seen["local"] == [2, 4]
    assert seen["ids"] == list(range(100, 108))
    assert seen["gathered"] and seen["transposed"]
    assert seen["mean"] == 0 and seen["hvp"] < 1e-6


def test_shares_are_equal(found):
    expected = "workers: got 6; expected a multiple of the 4 devices of the mesh, for equal shares"
    assert found["primitives"]["refused"] == expected
    expected = "blocks: got 6; expected a multiple of the 4 devices that serve them"
    assert found["primitives"]["refused sliced"] == expected


def test_the_account_of_the_transport_is_what_the_collectives_send(found):
    for name, (sent, declared) in found["traffic"].items():
        assert sent == declared, name


# --- simulated -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_each_is_a_loop(exact):
    """A tree of stacked arrays, and one that all share."""
    workers, stacked = Workers(3, exact=exact), {"a": np.arange(6.0, dtype=np.float32).reshape(3, 2), "n": np.arange(3)}
    result = workers.each(lambda one, shared: (one["a"] * shared + one["n"], one["n"]), stacked, np.float32(10))
    np.testing.assert_array_equal(result[0], [[0, 10], [21, 31], [42, 52]])
    np.testing.assert_array_equal(result[1], [0, 1, 2])


@pytest.mark.parametrize("count", [1, 3, 64, 65, 100])
def test_sums_are_taken_in_order(count):
    """The float32 sum of NumPy, one after another, to the bit; and the mean of it."""
    stacked = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32) * 10 ** np.arange(count)[:, None] % 7
    stacked = stacked.astype(np.float32)
    expected = stacked[0]
    for row in stacked[1:]:
        expected = expected + row
    np.testing.assert_array_equal(in_order(jnp.asarray(stacked)), expected)
    mean = Workers(count).mean({"a": jnp.asarray(stacked), "s": jnp.asarray(stacked[:, 0])})
    for name, total in (("a", expected), ("s", expected[0])):  # XLA may multiply by 1 / count, which rounds twice
        np.testing.assert_allclose(mean[name], total / np.float32(count), rtol=2e-7)


def test_simulated_nothing_moves():
    workers, stacked = Workers(3), {"a": np.ones((3, 2))}
    assert workers.put(stacked) is workers.gather(stacked) is workers.transpose(stacked) is stacked
    np.testing.assert_array_equal(workers.ids(), [0, 1, 2])
    assert (workers.devices, workers.local) == (1, 3)


def test_a_mesh_of_one_device_is_a_simulation():
    """The whole machinery of collectives, and no bit differs."""
    squeezed = Round(Gradient(), ErrorFeedback(Signs("l2")), Mean(), ErrorFeedback(Signs("l2")), SGD)
    assert digest(run(squeezed, 0)) == digest(run(squeezed, 1))


def test_bad_input():
    with pytest.raises(InputError, match="count: got 0; expected a whole number of at least 1"):
        Workers(0)
    with pytest.raises(InputError, match="count: got 2.5"):
        Workers(2.5)
    with pytest.raises(InputError, match="mesh: got list; expected a mesh with one axis named 'workers': see mesh_of"):
        Workers(2, jax.devices())
    other = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    with pytest.raises(InputError, match=r"mesh: got axes \('data',\); expected a mesh with one axis named 'workers'"):
        Workers(2, other)
