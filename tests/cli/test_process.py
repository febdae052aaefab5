"""What only a process of its own can show: a signal, and a reader that goes away."""

import json
import os
import signal
import subprocess
import sys
import time

FALLLINE = (sys.executable, "-m", "fallline")
# Each evaluation leaves a mark, so that the test knows when the loop runs; a step changes nothing that counts.
SLOW = """
import jax
import jax.numpy as jnp

x0 = jnp.ones(3)


def mark():
    with open("marks", "ab") as file:
        file.write(b".")


def slow(x):
    jax.debug.callback(mark)
    return jnp.sum(x**2)
"""


def test_interrupt_ends_the_run_at_once_with_status_and_report(folder):
    (folder / "slow.py").write_text(SLOW)
    words = ("solve", "slow.py:slow", "--with", "sgd", "--set", "learning_rate=1e-9", "--tolerance", "0")
    process = subprocess.Popen(
        [*FALLLINE, *words, "--steps", "2000000000", "--out", "r"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    marks = folder / "marks"
    try:
        while not (marks.exists() and marks.stat().st_size > 500):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        signaled = time.time()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    # The first file of the report is written when the run is over.
    assert (folder / "r/start.npz").stat().st_mtime - signaled < 2
    assert out.startswith("interrupted at step ") and out.endswith("report: r/index.html\n")
    assert err == "fallline: interrupted: stopped by the user; the solution holds the point reached\n"
    found = json.loads((folder / "r/run.json").read_text())
    step = found["status"]["step"]
    assert found["status"]["name"] == "interrupted" and step > 400
    assert len((folder / "r/history.csv").read_text().splitlines()) == step + 2
    assert marks.stat().st_size == found["calls"]["gradient"] == step + 1


def test_a_reader_that_goes_away_is_no_error(folder):
    process = subprocess.Popen(
        [*FALLLINE, "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # what is printed stays in the buffer until the end
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as err:
        assert err.read() == b""
    assert process.wait() == 0
