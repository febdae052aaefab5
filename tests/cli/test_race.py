"""`race`: the table, the report and its files, against loops by hand and `fallline.race`."""

import csv
import json
import shlex
import xml.etree.ElementTree as ET

import jax
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.problems import instance

# ½‖x − TARGET‖²: gradient descent with the step η is at TARGET + (1 − η)ᵗ (x0 − TARGET).
FILE = """
import jax
import jax.numpy as jnp
import numpy as np
import fallline as fl

TARGET = np.array([1.0, -2.0, 0.5])
ROWS = np.random.default_rng(0).normal(size=(40, 3))


def bowl(x):
    return 0.5 * jnp.sum((x - TARGET) ** 2)


problem = fl.FiniteSum(lambda x, rows: 0.5 * (rows @ (x - TARGET)) ** 2, ROWS, batch_size=10, lower_bound=0.0)


def x0(key):
    return jax.random.normal(key, (3,))
"""
TARGET = np.array([1.0, -2.0, 0.5])
PAIR = ("--with", "slow=sgd,fast=sgd", "--set", "slow.learning_rate=0.1", "--set", "fast.learning_rate=0.5")
BOWL = ("race", "bowl.py:bowl", *PAIR)


@pytest.fixture(autouse=True)
def _file(folder):
    (folder / "bowl.py").write_text(FILE)


def start(seed):
    with jax.enable_x64(True):
        return np.asarray(jax.random.normal(jax.random.key(seed), (3,)))


def values(seed, rate, steps):
    """½‖x_t − TARGET‖² for t = 0 … steps."""
    return 0.5 * (1 - rate) ** (2 * np.arange(steps + 1)) * np.sum((start(seed) - TARGET) ** 2)


def test_the_table_is_that_of_the_closed_form(run):
    code, out, err = run(*BOWL, "--cost", 8, "--seeds", 3)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "lowest value within cost 8 (gradient 1, value 0.5, hvp 2, minibatch 1), 3 keys"
    for line, (name, rate) in zip(lines[2:], (("fast", 0.5), ("slow", 0.1)), strict=True):
        last = [values(seed, rate, 7)[-1] for seed in range(3)]
        expected = [f"{v:.6g}" for v in (np.median(last), min(last), max(last))]
        assert line.split()[:7] == [name, *expected, "budget", "7", "8"]


def test_json_agrees_with_race(run):
    words = ("--with", "adam,lbfgs", "--set", "adam.learning_rate=0.02", "--cost", 30, "--seeds", 2)
    found = run("race", "rosenbrock", *words, "--option", "dimension=4", "--weights", "value=0.25", "--json").json
    with jax.enable_x64(True):
        made = instance("rosenbrock", dimension=4)
        solvers = {"adam": fl.optimizer(optax.adam, learning_rate=0.02), "lbfgs": fl.optimizer(optax.lbfgs)}
        result = fl.race(made.problem, made.start, solvers, cost=30, keys=(0, 1))
        rows = [(row.name, row.value, row.lowest, row.highest, row.steps, row.cost) for row in result.table()]
    keys = ("name", "value", "lowest", "highest", "steps", "cost")
    assert [tuple(row[key] for key in keys) for row in found["table"]] == rows
    assert found["weights"] == {"gradient": 1, "value": 0.25, "hvp": 2, "minibatch": 1}
    assert found["solvers"]["adam"] == {"name": "adam", "options": {"learning_rate": 0.02}}
    assert (found["seeds"], found["cost"], found["interrupted"]) == (2, 30, False)
    assert all(set(row["calls"]) == {"gradient"} for row in found["table"])


def test_the_report_holds_page_picture_curves_and_table(run, folder):
    code, out, _ = run(*BOWL, "--cost", 8, "--seeds", 2, "--out", "r")
    assert code == 0 and out.endswith("report: r/index.html\n")
    assert {path.name for path in (folder / "r").iterdir()} == {"index.html", "race.json", "race.svg", "curves.csv"}
    page = (folder / "r/index.html").read_text()
    best = np.median([values(seed, 0.5, 7)[-1] for seed in (0, 1)])
    assert f"fast is lowest at the cost 8: {best:.6g} in the median of 2 seeds." in page
    assert (folder / "r/race.svg").read_text() in page
    ET.fromstring((folder / "r/race.svg").read_text())
    with open("r/curves.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == [
        "solver", "key", "step", "calls.gradient", "calls.value", "calls.hvp", "calls.minibatch", "cost", "value",
    ]  # fmt: skip
    assert len(rows) == 2 * 2 * 8
    for name, rate in (("slow", 0.1), ("fast", 0.5)):
        for seed in (0, 1):
            table = np.array([row[2:] for row in rows if row[:2] == [name, str(seed)]], np.float64)
            assert table[:, 0].tolist() == list(range(8))
            assert table[:, 1].tolist() == table[:, 5].tolist() == list(range(1, 9))
            np.testing.assert_allclose(table[:, 6], values(seed, rate, 7), rtol=1e-12)
    found = json.loads((folder / "r/race.json").read_text())
    assert [row["name"] for row in found["table"]] == ["fast", "slow"]
    assert found["problem"]["name"] == "bowl.py:bowl"


def test_minibatches_cost_their_share(run):
    words = (
        "--with",
        "sgd,pgd=perturbed_gradient_descent",
        "--set",
        "sgd.learning_rate=0.1",
        "--set",
        "pgd.step-size=0.1",
    )
    found = run("race", "bowl.py:problem", *words, "--cost", 5, "--seeds", 1, "--json").json
    calls = {row["name"]: row["calls"] for row in found["table"]}
    assert calls == {"sgd": {"minibatch": 20}, "pgd": {"gradient": 5}}
    assert found["minibatch_share"] == 0.25
    out = run("race", "bowl.py:problem", *words, "--cost", 5, "--seeds", 1, "--weights", "minibatch=4").out
    assert out.splitlines()[0].endswith(
        "(gradient 1, value 0.5, hvp 2, minibatch 4 times its share of the data, 0.25), 1 key"
    )
    assert "  5 minibatch\n" in out


def test_init_is_where_all_runs_start(run):
    np.save("start.npy", np.array([3.0, 4.0, 5.0]))
    found = run(*BOWL, "--init", "start.npy", "--cost", 4, "--seeds", 2, "--json").json
    gap = 0.5 * np.sum((np.array([3.0, 4, 5]) - TARGET) ** 2)
    rows = {row["name"]: row for row in found["table"]}
    for name, rate in (("slow", 0.1), ("fast", 0.5)):
        assert rows[name]["lowest"] == rows[name]["highest"] == pytest.approx(gap * (1 - rate) ** 6, rel=1e-12)


@pytest.mark.parametrize(("bits", "dtype"), [(32, np.float32), (64, np.float64)])
def test_precision_is_that_of_the_runs(run, bits, dtype):
    words = ("--with", "sgd", "--set", "sgd.learning_rate=1e-4", "--cost", 20, "--precision", bits)
    found = run("race", "rosenbrock", *words, "--json").json
    assert found["precision"] == bits
    value = found["table"][0]["value"]
    assert (float(np.float32(value)) == value) == (dtype is np.float32)


def test_the_command_repeats_the_race(run):
    np.save("start.npy", np.ones(3))
    first = run(*BOWL, "--cost", 6.5, "--seeds", 2, "--weights", "gradient=0.5", "--init", "start.npy", "--json").json
    program, *words = shlex.split(first["command"])
    assert program == "fallline"
    again = run(*words, "--json").json
    for found in (first, again):
        for row in found["table"]:
            del row["seconds"], row["compile_seconds"]
    assert again == first


def test_quiet_prints_nothing(run):
    assert run(*BOWL, "--cost", 3, "--out", "r", "--quiet") == (0, "", "")


def test_a_race_that_everybody_loses_is_code_3(run, folder):
    wild = ("race", "rosenbrock", "--with", "sgd", "--set", "sgd.learning_rate=10.0", "--cost", 50)
    assert run(*wild, "--out", "r").code == 3
    assert json.loads((folder / "r/race.json").read_text())["table"][0]["status"] == "diverged"
    assert run(*wild[:3], "sgd,adam", *wild[4:], "--set", "adam.learning_rate=0.1").code == 0


def test_interrupt_is_code_130_and_keeps_what_was_run(run, folder):
    (folder / "stop.py").write_text(
        "import os, signal, jax, jax.numpy as jnp\nasked = []\nx0 = jnp.ones(2)\n"
        "def tick():\n    asked.append(1)\n    if len(asked) == 40: os.kill(os.getpid(), signal.SIGINT)\n"
        "def loss(x):\n    jax.debug.callback(tick)\n    return jnp.sum(x**2)\n"
    )
    words = ("--with", "a=sgd,b=sgd", "--set", "a.learning_rate=1e-9", "--set", "b.learning_rate=0.1")
    code, out, err = run("race", "stop.py:loss", *words, "--cost", 1e5, "--out", "r")
    assert code == 130
    assert err == "fallline: interrupted: stopped by the user; the table holds the runs begun\n"
    assert out.splitlines()[2].split()[0] == "a" and len(out.splitlines()) == 4
    assert json.loads((folder / "r/race.json").read_text())["interrupted"] is True
    assert "Interrupted. a is lowest" in (folder / "r/index.html").read_text()
