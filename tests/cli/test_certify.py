"""`certify`: the verdict on a run's point and on a point in a file, and what it leaves behind."""

import json
import shlex

import numpy as np
import pytest
from sklearn.datasets import load_digits

SGD = ("--with", "sgd", "--set", "learning_rate=0.05")
SMALL = ("--option", "dimension=4")
SADDLE = ("saddle", *SGD, *SMALL)


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def saddle(x, curvature=1.0):
    h = np.concatenate([[-curvature], np.linspace(1, 10, len(x) - 1)])
    return np.sum(0.5 * h * x**2 + 0.25 * x**4)


def test_a_run_that_stopped_at_the_saddle_gets_the_way_out(run, folder):
    assert run("solve", *SADDLE, "--out", "r").code == 0
    code, out, err = run("certify", "r")
    assert (code, err) == (0, "")
    assert out.startswith("strict saddle: ") and out.endswith("report: r/index.html\n")
    direction, escape = arrays("r/direction.npz")["x"], arrays("r/escape.npz")["x"]
    assert np.abs(direction) == pytest.approx(np.eye(4)[0], abs=1e-12)
    # Along e₁ the value is −½t² + ¼t⁴, lowest at t = ±1.
    assert np.abs(escape) == pytest.approx(np.eye(4)[0], abs=1e-12)
    found = json.loads((folder / "r/certificate.json").read_text())
    assert found["verdict"] == "strict saddle" and found["method"] == "dense"
    assert found["rayleigh"] == pytest.approx(-1, abs=1e-12)
    assert saddle(escape) == pytest.approx(found["value"] - found["decrease"], abs=1e-15)
    assert saddle(escape) < saddle(arrays("r/point.npz")["x"]) - 0.2499
    page = (folder / "r/index.html").read_text()
    assert "Strict saddle" in page and "escape.npz" in page


def test_the_escape_goes_on_to_a_minimum(run):
    run("solve", *SADDLE, "--option", "curvature=4.0", "--out", "r")
    run("certify", "r", "--quiet")
    assert run("solve", *SADDLE, "--option", "curvature=4.0", "--init", "r/escape.npz", "--out", "s").code == 0
    assert saddle(arrays("s/point.npz")["x"], 4.0) == pytest.approx(-4, abs=1e-10)
    assert run("certify", "s").out.startswith("global minimum: ")
    assert run("certify", "s", "--json").json["lower_bound"] == -4


def test_a_minimum_has_no_way_out(run, folder):
    np.save("minimizer.npy", np.eye(4)[0])
    assert run("solve", *SADDLE, "--init", "minimizer.npy", "--out", "r").code == 0
    assert run("certify", "r").out.startswith("global minimum: ")
    assert not (folder / "r/direction.npz").exists() and not (folder / "r/escape.npz").exists()


def test_json_is_what_the_certificate_file_holds(run, folder):
    run("solve", *SADDLE, "--out", "r")
    found = run("certify", "r", "--json").json
    kept = json.loads((folder / "r/certificate.json").read_text())
    assert kept.pop("text").startswith("strict saddle: ")
    assert kept == found


@pytest.mark.parametrize("file", ["zero.npz", "zero.npy"])
def test_a_point_in_a_file_is_certified_alone(run, folder, file):
    np.savez("zero.npz", x=np.zeros(4))
    np.save("zero.npy", np.zeros(4))
    words = ("certify", "saddle", *SMALL, "--option", "curvature=2.0", "--at", file)
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out.startswith("strict saddle: ") and "report" not in out
    assert list(folder.glob("*.html")) == []
    assert run(*words, "--out", "c").out.endswith("report: c/index.html\n")
    assert {p.name for p in (folder / "c").iterdir()} == {
        "index.html", "certificate.json", "direction.npz", "escape.npz",
    }  # fmt: skip
    assert run(*words, "--json").json["rayleigh"] == pytest.approx(-2, abs=1e-12)


def test_the_way_out_of_the_autoencoder_s_zero_is_the_first_principal_component(run, folder):
    # f = ‖X‖² − 2 tr(E D C) + …, C = XᵀX/n: along (u, u)/√2, u the component, the curvature is −2σ₁².
    np.savez("zero.npz", encode=np.zeros((64, 1)), decode=np.zeros((1, 64)))
    rows = load_digits().data / 16
    values, components = np.linalg.svd((rows - rows.mean(0)) / np.sqrt(len(rows)), full_matrices=False)[1:]
    words = ("certify", "linear-autoencoder", "--option", "rank=1", "--at", "zero.npz", "--out", "c")
    found = run(*words, "--json").json
    assert found["verdict"] == "strict saddle"
    assert found["rayleigh"] == pytest.approx(-2 * values[0] ** 2, rel=1e-10)
    encode = arrays("c/direction.npz")["encode"][:, 0]
    assert abs(encode @ components[0]) == pytest.approx(np.sqrt(0.5), abs=1e-10)
    assert (folder / "c/direction.svg").exists()
    page = (folder / "c/index.html").read_text()
    assert "The way out" in page and "principal component 1" in page


def test_a_file_s_function_is_certified_at_its_run_s_point(run, folder):
    (folder / "loss.py").write_text(
        "import jax.numpy as jnp, numpy as np\nx0 = np.array([0.0, 2.0])\n"
        "def loss(x): return x[1] ** 2 + x[0] ** 4 - x[0] ** 2\n"
    )
    assert run("solve", "loss.py:loss", *SGD, "--out", "r").code == 0
    assert run("certify", "r", "--json").json["verdict"] == "strict saddle"
    # −t² + t⁴ is lowest at ±1/√2, but the trial steps are powers of two; ½ is the best of them.
    assert np.abs(arrays("r/escape.npz")["x"]) == pytest.approx([0.5, 0], abs=1e-6)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_run_is_certified_in_its_own_precision(run, bits):
    run("solve", *SADDLE, "--precision", bits, "--out", "r")
    found = run("certify", "r", "--json").json
    assert found["precision"] == bits
    assert arrays("r/direction.npz")["x"].dtype == f"float{bits}"


def test_a_folder_may_have_the_name_of_a_problem(run):
    np.save("zero.npy", np.zeros(3))
    run("solve", *SADDLE, "--out", "saddle")
    assert run("certify", "saddle", "--json").json["problem"]["options"]["dimension"] == 4
    at = run("certify", "saddle", "--at", "zero.npy", "--option", "dimension=3", "--json")
    assert at.json["problem"]["options"]["dimension"] == 3


@pytest.mark.parametrize("of", ["run", "point"])
def test_the_command_repeats_the_certificate(run, folder, of):
    np.save("zero.npy", np.zeros(4))
    run("solve", *SADDLE, "--out", "r")
    named = ("r",) if of == "run" else ("saddle", "--at", "zero.npy", *SMALL)
    first = run("certify", *named, "--tolerance", "1e-5", "--seed", 7, "--json").json
    program, *words = shlex.split(first["command"])
    assert program == "fallline"
    again = run(*words, "--json").json
    del first["seconds"], again["seconds"]
    assert again == first


def test_budget_below_the_dimension_goes_to_lanczos_and_says_its_probability(run):
    np.save("zero.npy", np.zeros(40))
    words = ("--at", "zero.npy", "--option", "dimension=40", "--max-hvp", 39, "--failure-probability", "0.01")
    found = run("certify", "saddle", *words, "--json").json
    assert found["method"] == "lanczos" and found["failure_probability"] == 0.01
    # The eigenvalue −1 is where the evidence says.
    assert abs(found["rayleigh"] + 1) <= found["residual"] and found["lower"] <= -1 <= found["rayleigh"]
