"""`solve`: the runs that it does, against closed forms, NumPy and `fallline.minimize`."""

import csv
import json
import shlex

import jax
import numpy as np
import optax
import pytest
from scipy.optimize import rosen
from sklearn.datasets import load_digits

import fallline as fl
from fallline.problems import instance

# ½‖x − TARGET‖²: gradient descent with the step η is at TARGET + (1 − η)ᵗ (x0 − TARGET).
TARGET = np.array([1.0, -2.0, 0.5])
FILE = """
import jax
import jax.numpy as jnp
import numpy as np
from fallline import Objective
from fallline.problems import Instance

TARGET = np.array([1.0, -2.0, 0.5])


def bowl(x):
    \"\"\"Half the squared distance to a target.

    More words.
    \"\"\"
    return 0.5 * jnp.sum((x - TARGET) ** 2)


def tree(x):
    return 0.5 * sum(jnp.sum((x[name] - TARGET) ** 2) for name in ("file", "b"))


def nested(x):
    return bowl(x["a"]["deep"]) + bowl(x["b"])


ready = Instance(
    problem=Objective(bowl, lower_bound=0.0),
    start=lambda key: jnp.zeros(3),
    description="A bowl.",
    answer="the minimum is 0",
    measure=lambda x: {"distance": float(np.linalg.norm(np.asarray(x) - TARGET))},
)
"""
STARTS = {
    "array": "x0 = np.array([3.0, 4.0, 5.0])",
    "tree": "x0 = {'file': np.zeros(3), 'b': jnp.ones(3)}",
    "key": "def x0(key):\n    return jax.random.normal(key, (3,))",
    "narrow": "x0 = jnp.array([3.0, 4.0, 5.0])\nTARGET = TARGET.astype('float32')",
    "none": "",
}
SGD = ("--with", "sgd", "--set", "learning_rate=0.25")


@pytest.fixture
def bowl(folder):
    """`bowl("array")` writes `bowl.py` with that kind of start."""

    def write(start):
        (folder / "bowl.py").write_text(f"{FILE}\n{STARTS[start]}\n")

    return write


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def descent(start, steps, rate=0.25):
    return TARGET + (1 - rate) ** steps * (start - TARGET)


# --- built-in problems ----------------------------------------------------------------------------


def digits():
    data = load_digits()
    return data.data / 16, data.target


def saddle(x):
    h = np.concatenate([[-1.0], np.linspace(1, 10, 4)])
    return np.sum(0.5 * h * x["x"] ** 2 + 0.25 * x["x"] ** 4)


def autoencoder(x):
    rows = digits()[0]
    rows = rows - rows.mean(0)
    return np.sum((rows - rows @ x["encode"] @ x["decode"]) ** 2) / len(rows)


def phase(x):
    generator = np.random.default_rng(3)
    signal = generator.standard_normal(4)
    signal /= np.linalg.norm(signal)
    rows = generator.standard_normal((40, 4))
    return np.mean(((rows @ x["x"]) ** 2 - (rows @ signal) ** 2) ** 2) / 4


def classifier(x):
    rows, labels = (a[:1200] for a in digits())
    logits = np.tanh(rows @ x["hidden"] + x["hidden_bias"]) @ x["output"] + x["output_bias"]
    logits -= logits.max(1, keepdims=True)
    picked = logits[np.arange(1200), labels] - np.log(np.exp(logits).sum(1))
    return -picked.mean() + 0.5e-2 * sum(np.sum(a**2) for a in x.values())


# name: options, the same function in NumPy, a bound on its value after 300 steps
BUILT_IN = {
    "saddle": (("dimension=5",), saddle, -0.2499),
    "rosenbrock": (("dimension=3",), lambda x: rosen(x["x"]), 8.0),
    "linear-autoencoder": (("rank=2",), autoencoder, 4.0),
    "gaussian-phase-retrieval": (("measurements=40", "dimension=4", "seed=3"), phase, 0.1),
    "tanh-classifier": (("hidden=3", "weight_decay=0.01"), classifier, 2.0),
}
WITH = {
    "adam": ("learning_rate=0.01",),
    "perturbed-gradient-descent": ("step_size=0.001", "patience=50", "radius=0.5", "gradient_threshold=0.1"),
}


@pytest.mark.parametrize("solver", WITH)
@pytest.mark.parametrize("problem", BUILT_IN)
def test_every_built_in_problem_runs_and_its_value_is_that_of_numpy(run, problem, solver):
    options, value, bound = BUILT_IN[problem]
    np.savez("off.npz", x=0.1 * np.ones(5))
    init = ("--init", "off.npz") if problem == "saddle" else ()  # its own start is stationary
    flags = [*(w for o in options for w in ("--option", o)), *(w for o in WITH[solver] for w in ("--set", o))]
    snake = problem.replace("-", "_")
    code, out, err = run("solve", snake, "--with", solver, *flags, *init, "--steps", 300, "--out", "r", "--json")
    found = json.loads(out)
    assert code in (0, 5) and err == ""
    assert found["problem"]["name"] == problem
    assert found["value"] == pytest.approx(value(arrays("r/point.npz")), rel=1e-11)
    assert found["value"] < value(arrays("r/start.npz"))
    if solver == "adam":
        assert found["value"] < bound


def test_options_and_init_reach_the_known_minimum(run):
    # f = −2x₁² + ¼x₁⁴ + …: the minima are at ±2 e₁, with the value −4.
    np.save("start.npy", np.array([0.1, 0.2, -0.3]))
    flags = ("--option", "dimension=3", "--option", "curvature=4.0", "--init", "start.npy", "--out", "r")
    code, out, err = run("solve", "saddle", "--with", "sgd", "--set", "learning_rate=0.05", *flags)
    assert (code, err) == (0, "")
    assert arrays("r/point.npz")["x"] == pytest.approx([2, 0, 0], abs=1e-6)
    assert "value -4," in out and "distance to the nearest minimizer: " in out


def test_measured_distances_are_printed_with_the_result(run):
    out = run("solve", "saddle", *SGD).out
    assert out.splitlines()[0] == "converged by gradient_norm(1e-06) at step 0"
    assert out.splitlines()[-1] == "distance to the nearest minimizer: 1"


# --- file.py:function -----------------------------------------------------------------------------


def test_file_with_an_array_ends_at_the_closed_form(run, bowl):
    bowl("array")
    code, _, err = run("solve", "bowl.py:bowl", *SGD, "--steps", 7, "--out", "r")
    assert code == 5 and err == "fallline: step limit: raise `steps`, or look at the history\n"
    assert arrays("r/point.npz")["x"] == pytest.approx(descent(np.array([3.0, 4, 5]), 7), rel=1e-14)
    assert arrays("r/start.npz")["x"].tolist() == [3, 4, 5]


def test_file_with_a_pytree_ends_at_the_closed_form_whatever_its_names(run, bowl):
    bowl("tree")
    assert run("solve", "bowl.py:tree", *SGD, "--steps", 7, "--out", "r").code == 5
    point = arrays("r/point.npz")
    assert set(point) == {"file", "b"}
    assert point["file"] == pytest.approx(descent(np.zeros(3), 7), rel=1e-14)
    assert point["b"] == pytest.approx(descent(np.ones(3), 7), rel=1e-14)


def test_file_with_a_function_of_a_key_starts_where_the_seed_says(run, bowl):
    bowl("key")
    starts = []
    for seed in (0, 1):
        assert run("solve", "bowl.py:bowl", *SGD, "--seed", seed, "--steps", 0, "--out", f"r{seed}").code == 5
        starts.append(arrays(f"r{seed}/start.npz")["x"])
        with jax.enable_x64(True):
            assert starts[-1].tolist() == jax.random.normal(jax.random.key(seed), (3,)).tolist()
    assert not np.array_equal(*starts)


def test_file_with_an_instance_brings_start_and_measure(run, bowl):
    bowl("none")
    found = run("solve", "bowl.py:ready", *SGD, "--steps", 4, "--json").json
    assert found["problem"]["description"] == "A bowl." and found["problem"]["lower_bound"] == 0
    assert found["measure"]["distance"] == pytest.approx(0.75**4 * np.linalg.norm(TARGET), rel=1e-14)


def test_file_with_a_model_is_trained_although_a_model_can_be_called(run, folder):
    # One weight w from 0, loss (w − 1)²: each step of 0.25 halves the distance to 1.
    (folder / "model.py").write_text(
        "import equinox as eqx, jax, jax.numpy as jnp\n"
        "x0 = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))\n"
        "x0 = eqx.tree_at(lambda m: m.weight, x0, jnp.zeros((1, 1)))\n"
        "def loss(model): return jnp.sum((model(jnp.ones(1)) - 1) ** 2)\n"
    )
    assert run("solve", "model.py:loss", *SGD, "--steps", 5, "--out", "r").code == 5
    assert arrays("r/point.npz")["weight"] == pytest.approx(1 - 0.5**5, rel=1e-14)


def test_files_beside_the_file_can_be_imported(run, folder):
    (folder / "there").mkdir()
    (folder / "there" / "beside.py").write_text("import numpy as np\nSTART = np.ones(2)\n")
    (folder / "there" / "main.py").write_text("from beside import START as x0\ndef f(x): return (x**2).sum()\n")
    assert run("solve", "there/main.py:f", *SGD).code == 0


@pytest.mark.parametrize("file", ["start.npz", "start.npy"])
def test_init_is_where_the_run_starts(run, bowl, file):
    bowl("none")
    start = np.array([-1.0, 7.0, 2.0])
    np.save(file, start) if file.endswith("npy") else np.savez(file, x=start)
    assert run("solve", "bowl.py:bowl", *SGD, "--init", file, "--steps", 3, "--out", "r").code == 5
    assert arrays("r/start.npz")["x"].tolist() == start.tolist()
    assert arrays("r/point.npz")["x"] == pytest.approx(descent(start, 3), rel=1e-14)


def test_init_of_a_pytree_may_leave_the_form_to_its_names(run, bowl):
    bowl("none")
    np.savez("start.npz", **{"a/deep": np.zeros(3), "b": np.ones(3)})
    assert run("solve", "bowl.py:nested", *SGD, "--init", "start.npz", "--steps", 3, "--out", "r").code == 5
    point = arrays("r/point.npz")
    assert point["a/deep"] == pytest.approx(descent(np.zeros(3), 3), rel=1e-14)
    assert point["b"] == pytest.approx(descent(np.ones(3), 3), rel=1e-14)


def test_tolerance_ends_the_run_at_the_step_of_the_closed_form(run, bowl):
    bowl("array")
    # ‖∇f‖ = (3/4)ᵗ ‖x0 − TARGET‖ falls to the tolerance at the first whole step above this logarithm.
    step = int(np.ceil(np.log(1e-3 / np.linalg.norm(np.array([3.0, 4, 5]) - TARGET)) / np.log(0.75)))
    found = run("solve", "bowl.py:bowl", *SGD, "--tolerance", "1e-3", "--json").json
    assert found["status"] == {"name": "converged", "by": "gradient_norm(0.001)", "step": step, "advice": ""}


@pytest.mark.parametrize(("bits", "dtype"), [(32, "float32"), (64, "float64")])
def test_precision_is_that_of_the_run(run, bowl, bits, dtype):
    bowl("narrow")
    found = run("solve", "bowl.py:bowl", *SGD, "--steps", 9, "--precision", bits, "--out", "r", "--json").json
    assert found["precision"] == bits
    point = arrays("r/point.npz")["x"]
    assert point.dtype == dtype
    assert point == pytest.approx(descent(np.array([3.0, 4, 5]), 9), rel=float(10 * np.finfo(dtype).eps))


# --- results --------------------------------------------------------------------------------------

PGD = {"step_size": 0.05, "patience": 50}


def test_json_agrees_with_minimize(run):
    words = [w for name, value in PGD.items() for w in ("--set", f"{name}={value}")]
    found = run("solve", "saddle", "--with", "perturbed-gradient-descent", *words, "--seed", 5, "--json").json
    with jax.enable_x64(True):
        made = instance("saddle")
        x0, solver = made.start(jax.random.key(5)), fl.perturbed_gradient_descent(**PGD)
        solution = fl.minimize(made.problem, x0, solver, steps=10_000, key=5)
        assert found["value"] == float(solution.value)
        assert found["gradient_norm"] == float(solution.gradient_norm)
        assert found["calls"] == solution.calls.as_dict()
        assert found["cost"] == solution.calls.cost()
        assert found["status"]["step"] == int(solution.steps) > 50
        assert found["status"]["by"] == solution.status.met
        assert found["measure"] == made.measure(solution.x)
    assert found["solver"] == {"name": "perturbed-gradient-descent", "options": PGD}
    assert found["problem"]["options"] == {"dimension": 20, "curvature": 1.0}
    assert found["versions"]["jax"] == jax.__version__


RANDOM = {
    "method": ("saddle", "--with", "perturbed-gradient-descent", "--set", "step_size=0.05"),
    "optimizer": ("rosenbrock", "--with", "noisy-sgd", "--set", "learning_rate=0.0001", "--steps", 3),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_seed_decides_what_is_random(run, kind):
    values = [run("solve", *RANDOM[kind], "--seed", s, "--json").json["value"] for s in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_history_is_that_of_the_solution(run):
    assert run("solve", "rosenbrock", "--with", "adam", "--set", "learning_rate=0.02", "--steps", 40, "--out", "r")
    with open("r/history.csv", newline="") as file:
        header, *rows = csv.reader(file)
    with jax.enable_x64(True):
        made, solver = instance("rosenbrock"), fl.optimizer(optax.adam, learning_rate=0.02)
        solution = fl.minimize(made.problem, made.start(jax.random.key(0)), solver, steps=40)
    assert header == ["step", "value", "gradient_norm"] and len(rows) == 41
    table = np.array(rows, np.float64)
    for column, name in enumerate(header):
        assert table[:, column].tolist() == np.asarray(solution.history[name], np.float64).tolist()
    assert arrays("r/point.npz")["x"].tolist() == np.asarray(solution.x).tolist()


def test_run_json_is_what_json_prints(run):
    found = run("solve", "rosenbrock", *SGD, "--steps", 3, "--out", "r", "--json").json
    with open("r/run.json") as file:
        assert json.load(file) == found


def test_a_diverging_run_leaves_a_report_that_can_be_read(run):
    code, _, err = run("solve", "rosenbrock", "--with", "sgd", "--set", "learning_rate=0.1", "--out", "r")
    assert code == 3
    assert err.startswith("fallline: diverged: ") and "smaller step size" in err and err.count("\n") == 1
    with open("r/run.json") as file:
        found = json.load(file)  # strict: NaN would not be JSON
    assert found["status"]["name"] == "diverged" and np.isfinite(found["value"])
    assert np.isfinite(arrays("r/point.npz")["x"]).all()


REPEATED = {
    "random method": ("saddle", "--with", "perturbed-gradient-descent", "--set", "step_size=0.05", "--seed", 3),
    "options": ("saddle", *SGD, "--option", "dimension=4", "--steps", 30),
    "narrow": ("rosenbrock", *SGD, "--precision", 32, "--steps", 30),
    "file": ("my files/bowl.py:bowl", *SGD, "--seed", 4, "--tolerance", "1e-5"),
    "init": ("rosenbrock", *SGD, "--init", "start.npz", "--steps", 30),
}


@pytest.mark.parametrize("case", REPEATED)
def test_the_command_in_the_report_repeats_the_run_bit_for_bit(run, bowl, folder, case):
    bowl("key")
    (folder / "my files").mkdir()
    (folder / "bowl.py").rename("my files/bowl.py")
    np.savez("start.npz", x=np.linspace(-1, 1, 10))
    first = run("solve", *REPEATED[case], "--out", "r1")
    program, *words = shlex.split(json.loads((folder / "r1/run.json").read_text())["command"])
    assert program == "fallline"
    assert run(*words, "--out", "r2").code == first.code
    for name in ("start.npz", "point.npz", "history.csv"):
        assert (folder / "r1" / name).read_bytes() == (folder / "r2" / name).read_bytes()


def test_quiet_prints_nothing(run):
    for words in (("--steps", 3), ("--steps", 3, "--out", "r")):
        assert run("solve", "rosenbrock", *SGD, *words, "--quiet")[1:] == ("", "")
    assert run("certify", "r", "--quiet")[1:] == ("", "")


def test_report_is_named_where_it_was_written(run):
    assert run("solve", "saddle", *SGD, "--out", "a/new/folder").out.splitlines()[-1] == (
        "report: a/new/folder/index.html"
    )
