"""Checkpoints: the file, and runs that go on from it."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core import loop
from fallline.core.checkpoint import digest, read_arrays, restore, write_arrays


def tree():
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": [jnp.array([1.5, -2.25], jnp.bfloat16), np.complex64(1 - 2j), np.bool_(True)],
        "c": jnp.zeros((0, 4), jnp.int32),
        "key": jax.random.key(7),
    }


# --- the file -------------------------------------------------------------------------------------


def test_every_dtype_comes_back(tmp_path):
    write_arrays(tmp_path / "x", tree(), {"who": "me"})
    arrays, about = read_arrays(tmp_path / "x")
    assert about == {"who": "me"}
    back = restore(arrays, jax.tree.map(jnp.asarray, tree()))
    assert jax.tree.structure(back) == jax.tree.structure(tree())
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree()), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(back["a"], tree()["a"])
    assert back["b"][0].tolist() == [1.5, -2.25] and complex(back["b"][1]) == 1 - 2j and bool(back["b"][2])
    np.testing.assert_array_equal(jax.random.normal(back["key"], (3,)), jax.random.normal(jax.random.key(7), (3,)))


def test_a_file_cut_short_or_altered_at_any_byte_is_refused(tmp_path):
    path = tmp_path / "x"
    write_arrays(path, {"a": np.arange(3.0)}, {})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(fl.CheckpointError, match="x: "):
            read_arrays(path)
        path.write_bytes(whole[:at])
        with pytest.raises(fl.CheckpointError):
            read_arrays(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(fl.CheckpointError):
        read_arrays(path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_arrays(path)[0]["['a']"], np.arange(3.0))


def test_other_shapes_are_refused(tmp_path):
    write_arrays(tmp_path / "x", {"a": np.zeros(3)}, {})
    arrays, _ = read_arrays(tmp_path / "x")
    for like in ({"a": np.zeros(4)}, {"a": np.zeros(3, np.float32)}, {"b": np.zeros(3)}):
        with pytest.raises(fl.InputError, match="checkpoint: got"):
            restore(arrays, like)


def test_a_digest_tells_data_and_programs_apart():
    base = digest({"a": np.zeros(3), "b": "word"})
    assert digest({"a": np.zeros(3), "b": "word"}) == base
    others = [{"a": np.ones(3), "b": "word"}, {"a": np.zeros(3), "b": "other"}, {"c": np.zeros(3), "b": "word"}]
    assert len({base, *(digest(other) for other in others)}) == 4


# --- runs -----------------------------------------------------------------------------------------


def loss(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def minibatches():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=40).astype(np.float32))
    return fl.FiniteSum(lambda x, batch: (batch[0] @ x - batch[1]) ** 2, rows, batch_size=8)


RUNS = {
    "adam": (loss, np.zeros(3, np.float32), fl.optimizer(optax.adam, learning_rate=0.01), {}),
    "every": (loss, np.zeros(3, np.float32), fl.optimizer(optax.adam, learning_rate=0.01), {"every": 7}),
    "lbfgs": (loss, np.zeros(3, np.float32), fl.optimizer(optax.lbfgs), {}),
    "noisy": (loss, np.zeros(3, np.float32), fl.optimizer(optax.noisy_sgd, learning_rate=1e-4, key=3), {}),
    "minibatch": (minibatches(), np.zeros(3, np.float32), fl.optimizer(optax.sgd, learning_rate=0.01), {"key": 1}),
    "perturbed": (loss, np.ones(3, np.float32), fl.perturbed_gradient_descent(1e-3, patience=20), {"key": 1}),
}


def bits(solution):
    leaves = jax.tree.leaves((solution.x, solution.value, solution.gradient_norm, solution.history, solution.calls))
    return [(str(a.dtype), np.asarray(a).tobytes()) for a in leaves]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_two_parts_is_the_unbroken_run(name, tmp_path, x32):
    problem, x0, solver, options = RUNS[name]
    whole = fl.minimize(problem, x0, solver, steps=100, stop=None, **options)
    fl.minimize(problem, x0, solver, steps=37, stop=None, checkpoint=tmp_path, **options)
    resumed = fl.minimize(problem, x0, solver, steps=100, stop=None, checkpoint=tmp_path, **options)
    assert bits(resumed) == bits(whole)
    assert str(resumed.status) == str(whole.status)
    again = fl.minimize(problem, x0, solver, steps=100, stop=None, checkpoint=tmp_path, **options)
    assert bits(again) == bits(whole)


def test_an_interrupted_run_goes_on(tmp_path, x32, monkeypatch):
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 0.0)
    problem, x0, solver, _ = RUNS["adam"]
    stopped = fl.minimize(
        problem, x0, solver, steps=50, stop=None, checkpoint=tmp_path, callback=lambda p: p.step >= 20
    )
    assert stopped.status.ending is fl.Ending.INTERRUPTED and int(stopped.steps) < 50
    resumed = fl.minimize(problem, x0, solver, steps=50, stop=None, checkpoint=tmp_path)
    assert bits(resumed) == bits(fl.minimize(problem, x0, solver, steps=50, stop=None))


def test_a_diverging_run_diverges_again_at_the_same_step(tmp_path, x32, monkeypatch):
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 0.0)
    wild = fl.optimizer(optax.sgd, learning_rate=2.5e-3)
    whole = fl.minimize(loss, 3 * np.ones(3, np.float32), wild, steps=300, stop=None)
    assert whole.status.ending is fl.Ending.DIVERGED
    kept = fl.Checkpoint(tmp_path, seconds=0)
    first = fl.minimize(loss, 3 * np.ones(3, np.float32), wild, steps=300, stop=None, checkpoint=kept)
    second = fl.minimize(loss, 3 * np.ones(3, np.float32), wild, steps=300, stop=None, checkpoint=kept)
    assert bits(first) == bits(whole) and bits(second)[:3] == bits(whole)[:3]
    assert int(second.steps) == int(whole.steps)


def test_a_point_lost_at_the_step_limit_is_not_kept(tmp_path, x32):
    """Step 4 takes the point past the edge, and nobody looks at it before the end."""

    def loss(x, rows):
        return -x + 0.0 * jnp.sqrt(3.5 - x) + 0.0 * rows

    problem = fl.FiniteSum(loss, np.zeros(6, np.float32), 2)
    solver = fl.optimizer(optax.sgd, learning_rate=1.0)
    for steps in (4, 9):  # the second call goes on from what the first has kept
        run = fl.minimize(problem, np.float32(0), solver, steps=steps, key=0, every=100, checkpoint=tmp_path / "run")
        assert (run.status.ending, int(run.steps), float(run.x)) == (fl.Ending.DIVERGED, 4, 3.0)


def test_two_checkpoints_are_kept_and_the_older_works_where_the_newer_is_damaged(tmp_path, x32, monkeypatch):
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 0.0)
    problem, x0, solver, _ = RUNS["adam"]
    run = lambda steps: fl.minimize(  # noqa: E731
        problem, x0, solver, steps=steps, stop=None, checkpoint=fl.Checkpoint(tmp_path, seconds=0)
    )
    run(50)
    older, newer = sorted(tmp_path.iterdir())
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    with pytest.raises(fl.CheckpointError, match=f"{newer.name}.*remove it to go on from {older.name}"):
        run(50)
    newer.unlink()
    assert bits(run(50)) == bits(fl.minimize(problem, x0, solver, steps=50, stop=None))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem": lambda x: 2 * loss(x)}, "its problem"),
        ({"solver": fl.optimizer(optax.adam, learning_rate=0.02)}, "its solver"),
        ({"x0": np.ones(3, np.float32)}, "its start"),
        ({"stop": fl.gradient_norm(1e-3)}, "its stop"),
        ({"every": 2}, "its every"),
        ({"record": ("value",)}, "its record"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(change, words, tmp_path, x32):
    problem, x0, solver, _ = RUNS["adam"]
    given = {"problem": problem, "x0": x0, "solver": solver, "steps": 10, "stop": None}
    fl.minimize(**given, checkpoint=tmp_path)
    with pytest.raises(fl.InputError, match=f"checkpoint: got .*{words}"):
        fl.minimize(**{**given, **change}, checkpoint=tmp_path)


def test_bad_input(tmp_path, x32):
    problem, x0, solver, _ = RUNS["adam"]
    (tmp_path / "file").write_text("")
    for given in (3, tmp_path / "file" / "below", fl.Checkpoint(tmp_path, seconds=-1)):
        with pytest.raises(fl.InputError, match="^checkpoint"):
            fl.minimize(problem, x0, solver, checkpoint=given)
    with pytest.raises(fl.InputError, match="^checkpoint.*inside jit"):
        jax.jit(lambda x: fl.minimize(problem, x, solver, checkpoint=tmp_path).x)(x0)


# --- kill -9 --------------------------------------------------------------------------------------

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
import fallline as fl
from fallline.core import loop
loop._CHUNK_SECONDS = 0.02

def loss(x, rows):
    return jnp.mean(jnp.tanh(rows @ x) ** 2) + 0.5 * jnp.mean((x - 1) ** 2)

rows = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32)
method, folder, out = sys.argv[1:]
solver = {
    "adam": fl.optimizer(optax.adam, learning_rate=1e-4),
    "perturbed": fl.perturbed_gradient_descent(
        1e-5, radius=1e-4, gradient_threshold=1.0, decrease_threshold=1e-9, patience=500
    ),  # slow, with a perturbation every 500 steps
}[method]
checkpoint = None if folder == "none" else fl.Checkpoint(folder, seconds=0.0)
options = {"args": (rows,), "steps": 300_000, "stop": None, "key": 1, "every": 50}
solution = fl.minimize(loss, np.zeros(300, np.float32), solver, checkpoint=checkpoint, **options)
np.savez(out, x=solution.x, steps=solution.steps, **solution.history)
"""


@pytest.mark.parametrize("method", ["adam", "perturbed"])
def test_kill_9_at_random_moments_ends_in_the_arrays_of_the_unbroken_run(method, tmp_path):
    """Ten kills for each of two methods."""
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    command = [sys.executable, "-c", SCRIPT, method]
    subprocess.run([*command, "none", str(tmp_path / "whole.npz")], check=True, env=environment, timeout=120)
    draw, kills, out = np.random.default_rng(0), 0, tmp_path / "broken.npz"
    folder = tmp_path / "run"
    while not out.exists():
        process = subprocess.Popen([*command, str(folder), str(out)], env=environment)
        if kills < 10:
            before, begun = set(folder.glob("*")), time.monotonic()
            while set(folder.glob("*")) == before and process.poll() is None and time.monotonic() - begun < 60:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.06))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        else:
            assert process.wait(timeout=120) == 0
    assert kills == 10
    whole, broken = np.load(tmp_path / "whole.npz"), np.load(out)
    assert set(whole.files) == set(broken.files)
    for name in whole.files:
        assert whole[name].tobytes() == broken[name].tobytes(), name
