"""`list` and `show`: everything that there is, in words and for programs."""

import jax
import jax.numpy as jnp
import pytest

import fallline as fl
from fallline.cli.target import choose_solver, optax_factories

# The built-in problems with the options that their documentation names.
PROBLEMS = {
    "linear-autoencoder": {"rank": 10, "scale": 0.1},
    "phase-retrieval": {"measurements": 500, "dimension": 50, "seed": 0},
    "rosenbrock": {"dimension": 10},
    "saddle": {"dimension": 20, "curvature": 1.0},
    "tanh-classifier": {"hidden": 8, "weight_decay": 1e-3},
}


def test_list_names_every_problem_method_and_optimizer(run):
    code, out, err = run("list")
    assert (code, err) == (0, "")
    for name in (*PROBLEMS, "perturbed-gradient-descent", "adam", "lbfgs", "polyak-sgd"):
        assert f" {name}" in out
    assert max(map(len, out.splitlines())) <= 100


def test_list_for_programs_holds_the_same_names(run):
    found = run("list", "--json").json
    assert set(found) == {"problems", "methods", "optax"}
    assert set(found["problems"]) == set(PROBLEMS)
    assert "perturbed-gradient-descent" in found["methods"]
    assert {"adam", "lbfgs", "sgd"} <= set(found["optax"])
    words = run("list").out
    assert all(f" {name}" in words for group in found.values() for name in group)


@pytest.mark.parametrize("name", PROBLEMS)
def test_show_of_a_problem_names_its_options_in_kebab_and_snake(run, name):
    code, out, err = run("show", name)
    assert (code, err) == (0, "")
    assert run("show", name.replace("-", "_")).out == out
    assert all(f"{option}={value}" in out for option, value in PROBLEMS[name].items())
    assert run("show", name, "--json").json["options"] == PROBLEMS[name]


def test_show_of_a_problem_tells_its_answer(run):
    assert run("show", "rosenbrock", "--json").json["answer"] == "the minimum is 0, at (1, …, 1)"


def test_show_of_a_method_names_its_source_and_options_in_kebab_and_snake(run):
    code, out, err = run("show", "perturbed-gradient-descent")
    assert (code, err) == (0, "")
    assert run("show", "perturbed_gradient_descent").out == out
    assert "ICML 2017, arXiv 1703.00887" in out and "step_size=(needed)" in out
    found = run("show", "perturbed-gradient-descent", "--json").json
    assert found["options"] == {
        "step_size": "(needed)",
        "radius": 1e-2,
        "gradient_threshold": 1e-3,
        "decrease_threshold": 1e-6,
        "patience": 200,
    }
    assert found["needs"] == ["gradient"] and found["kind"] == "solver"


@pytest.mark.parametrize("command", ["list", "show", "solve", "certify"])
def test_help_of_every_command(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: fallline {command}" in out


def test_version_is_the_package_s(run):
    assert run("--version") == (0, f"{fl.__version__}\n", "")


def test_every_optimizer_listed_can_take_a_step():
    problem = fl.Objective(lambda x: jnp.sum(x**2))
    for name in optax_factories():
        rate = "max_learning_rate" if name == "polyak_sgd" else "learning_rate"
        solver = choose_solver(name, {rate: 0.1}, seed=0)

        def step(x, solver=solver):
            return solver.step(problem, solver.init(problem, x, key=None), key=None).x

        assert jax.eval_shape(step, jnp.ones((2, 3))).shape == (2, 3), name
