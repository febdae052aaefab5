"""`solve --checkpoint` and `resume`: a run that was cut ends where the unbroken one does."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

FALLLINE = (sys.executable, "-m", "fallline")
# Checkpoints after every chunk of 20 ms, so that there is one to be killed after.
OFTEN = """
import functools, sys
from fallline.cli import main, solving
from fallline.core import checkpoint, loop
loop._CHUNK_SECONDS = 0.02
loop.Checkpoint.of = staticmethod(lambda folder: checkpoint.Checkpoint(folder, seconds=0.0))
sys.exit(main(sys.argv[1:]))
"""
FILE = """
import jax.numpy as jnp
import numpy as np

ROWS = np.load("rows.npy")
x0 = np.zeros(300)


def loss(x):
    return jnp.mean(jnp.tanh(ROWS @ x) ** 2) + 0.5 * jnp.mean((x - 1) ** 2)
"""
ROSENBROCK = ("solve", "rosenbrock", "--with", "adam", "--set", "learning_rate=0.02", "--tolerance", "0")
PGD = ("solve", "saddle", "--with", "perturbed-gradient-descent", "--set", "step_size=0.05", "--seed", 3)


def same(one, other):
    for name in ("start.npz", "point.npz", "history.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    kept = [json.loads((folder / "run.json").read_text()) for folder in (one, other)]
    for name in ("status", "value", "gradient_norm", "calls", "cost", "measure", "command"):
        assert kept[0][name] == kept[1][name], name


@pytest.fixture
def slow(folder):
    np.save("rows.npy", np.random.default_rng(0).normal(size=(400, 300)))
    (folder / "slow.py").write_text(FILE)
    words = ("solve", "slow.py:loss", "--with", "adam", "--set", "learning_rate=1e-4", "--tolerance", "0")
    return (*words, "--steps", "12000")


def process(*words, command=FALLLINE):
    return subprocess.Popen(
        [*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def test_kill_9_and_resume_end_in_the_report_of_the_unbroken_run(slow, folder, run):
    assert run(*slow, "--out", "whole").code == 5
    kept, often = folder / "kept", (sys.executable, "-c", OFTEN)
    killed = 0
    words = (*slow, "--checkpoint", "kept", "--out", "broken")
    while killed < 2:
        running = process(*words, command=often)
        before, begun = set(kept.glob("*.checkpoint")), time.monotonic()
        while set(kept.glob("*.checkpoint")) == before and running.poll() is None and time.monotonic() - begun < 60:
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, running.communicate()
        running.communicate()
        killed += 1
        assert not (folder / "broken/run.json").exists()
        words = ("resume", "kept")
    (folder / "elsewhere").mkdir()
    os.chdir("elsewhere")
    code, out, err = run("resume", "../kept")
    assert code == 5 and out.endswith(f"report: {folder}/broken/index.html\n")
    assert err == (
        f"fallline: step limit: raise `steps`, or look at the history; fallline resume {kept} --steps N goes on\n"
    )
    same(folder / "whole", folder / "broken")
    assert json.loads((folder / "broken/run.json").read_text())["checkpoint"] == str(kept)


def test_interrupt_and_resume_end_in_the_report_of_the_unbroken_run(slow, folder, run):
    assert run(*slow, "--out", "whole").code == 5
    running = process(*slow, "--checkpoint", "kept", "--out", "broken", command=(sys.executable, "-c", OFTEN))
    while not list((folder / "kept").glob("*.checkpoint")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and out.startswith("interrupted at step ")
    assert err.endswith("; fallline resume kept goes on\n")
    # A verdict on the point of the interrupted run does not outlive it.
    assert run("certify", "broken", "--max-hvp", 4, "--quiet").code == 0
    assert run("resume", "kept").code == 5
    same(folder / "whole", folder / "broken")
    assert not (folder / "broken/certificate.json").exists()
    assert "Certificate" not in (folder / "broken/index.html").read_text()


@pytest.mark.parametrize("words", [ROSENBROCK, PGD], ids=["adam", "perturbed"])
def test_a_run_goes_on_beyond_its_step_limit(run, folder, words):
    assert run(*words, "--steps", 400, "--out", "whole").code in (0, 5)
    assert run(*words, "--steps", 150, "--checkpoint", "kept", "--out", "first").code == 5
    assert json.loads((folder / "kept/solve.json").read_text())["call"]["steps"] == 150
    assert run("resume", "kept", "--steps", 400, "--out", "more").code in (0, 5)
    same(folder / "whole", folder / "more")
    # The step limit is kept too, and a run that is over is over.
    assert json.loads((folder / "kept/solve.json").read_text())["call"]["steps"] == 400
    assert run("resume", "kept").code in (0, 5)
    same(folder / "whole", folder / "more")


def test_everything_that_was_asked_for_is_asked_for_again(run, folder):
    np.save("start.npy", np.linspace(-1, 1, 4))
    words = ("solve", "rosenbrock", "--option", "dimension=4", "--with", "noisy-sgd", "--set", "learning_rate=1e-4",
             "--set", "eta=0.1", "--steps", 60, "--init", "start.npy", "--seed", 5, "--precision", "32",
             "--tolerance", "1e-3")  # fmt: skip
    first = run(*words, "--checkpoint", "kept", "--json").json
    again = run("resume", "kept", "--json").json
    for found in (first, again):
        del found["seconds"], found["compile_seconds"]
    assert again == first
    assert first["command"].split()[1] == "solve" and "checkpoint" not in first["command"]
    assert run("resume", "kept", "--quiet")[1:] == ("", "")


def test_the_folder_is_whole_before_the_run(run, folder, monkeypatch):
    from fallline.cli import solving

    def look(*_, **__):
        kept = json.loads((folder / "kept/solve.json").read_text())
        assert kept["folder"] == str(folder) and kept["call"]["problem"] == "rosenbrock"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(solving, "minimize", look)
        assert run(*ROSENBROCK, "--steps", 7, "--checkpoint", "kept").code == 130
    assert [path.name for path in (folder / "kept").iterdir()] == ["solve.json"]
    assert run("resume", "kept").out.startswith("step limit at step 7\n")


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_with_what_to_do(run, folder):
    run(*ROSENBROCK, "--steps", 20, "--checkpoint", "kept")
    (only,) = (folder / "kept").glob("*.checkpoint")
    damage(only)
    code, out, err = run("resume", "kept")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"fallline: {only}: damaged") and err.endswith("; remove it to begin anew\n")
    only.unlink()
    assert run("resume", "kept").out.startswith("step limit at step 20\n")
    run("resume", "kept", "--steps", 40, "--quiet")
    older, newer = sorted((folder / "kept").glob("*.checkpoint"))
    damage(newer)
    code, out, err = run("resume", "kept")
    assert (code, out) == (2, "") and err.endswith(f"; remove it to go on from {older.name}\n")
    newer.unlink()
    assert run("resume", "kept").out.startswith("step limit at step 40\n")


def test_another_function_in_the_same_file_is_another_run(run, folder):
    (folder / "loss.py").write_text("import numpy as np\nx0 = np.ones(2)\ndef f(x): return (x**2).sum()\n")
    sgd = ("--with", "sgd", "--set", "learning_rate=0.1", "--steps", 3)
    assert run("solve", "loss.py:f", *sgd, "--checkpoint", "kept").code == 5
    (folder / "loss.py").write_text("import numpy as np\nx0 = np.ones(2)\ndef f(x): return (x**4).sum()\n")
    code, _, err = run("resume", "kept")
    assert code == 2 and "its problem is another one" in err


def test_a_report_of_another_run_is_not_overwritten(run, folder):
    run(*ROSENBROCK, "--steps", 5, "--checkpoint", "kept", "--out", "r")
    (folder / "r/index.html").unlink()
    assert run("resume", "kept").code == 5 and (folder / "r/index.html").exists()
    kept = json.loads((folder / "r/run.json").read_text())
    (folder / "r/run.json").write_text(json.dumps({**kept, "checkpoint": "/elsewhere"}))
    code, _, err = run("resume", "kept")
    assert code == 2 and "--out" in err and "a new or an empty folder" in err
