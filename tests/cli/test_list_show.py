"""`list` and `show`: everything that there is, in words and for programs."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import fallline as fl
from fallline.claims import evidence as module
from fallline.cli import listing
from fallline.cli.target import choose_solver, optax_factories

# The built-in problems with the options that their documentation names.
PROBLEMS = {
    "coded-diffraction": {"data": None, "loss": "truncated-amplitude", "patterns": 12, "seed": 0},
    "linear-autoencoder": {"rank": 10, "scale": 0.1},
    "digits-on-workers": {"workers": 8, "batch_size": 16, "hidden": 32, "by_label": False, "exact": False},
    "missing-entries": {"data": None, "rank": 3, "known": 0.2, "held_out": 0.1, "seed": 0},
    "gaussian-phase-retrieval": {"measurements": 500, "dimension": 50, "seed": 0},
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


@pytest.mark.parametrize("command", ["list", "show", "solve", "resume", "race", "certify", "claim"])
def test_help_of_every_command(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: fallline {command}" in out


# --- claims and their evidence ---------------------------------------------------------------------


def check(name, value, relation, threshold, met, interval=None):
    return {
        "name": name,
        "value": value,
        "relation": relation,
        "threshold": threshold,
        "interval": interval,
        "met": met,
    }


def evidence(verdict, sources):
    """What the package might carry of diffGrad: three claims, of which the last is not in its module."""
    claims = [
        ("synthetic", "reproduced", [check("F1", 1e-9, "<=", 1e-3, True)]),
        ("half-adam", "not reproduced", [check("share", 0.5, ">=", 0.9, False, [0.25, 0.75])]),
        ("gone", "inconclusive", []),
    ]
    return {
        "method": "diffgrad",
        "verdict": verdict,
        "scale": "small",
        "sources": sources,
        "claims": [
            {
                "name": n,
                "verdict": v,
                "reason": "why",
                "checks": c,
                "control_checks": [check("F1", None, "<=", 1e-3, False)],
            }
            for n, v, c in claims
        ],
    }


@pytest.fixture
def carried(monkeypatch, tmp_path):
    """`carried(method, content)` puts evidence in the place of the package's; without a call there is none."""
    monkeypatch.setattr(module, "resources", SimpleNamespace(files=lambda package: tmp_path))
    (tmp_path / "evidence").mkdir()

    def put(method, content):
        (tmp_path / "evidence" / f"{method}.json").write_text(json.dumps(content))

    return put


def test_list_says_what_was_found_of_each_method(run, carried):
    assert "diffGrad (transformation, descent): no evidence\n" in run("list").out
    assert run("list", "--json").json["methods"]["diffgrad"] == {
        "title": "diffGrad", "kind": "transformation", "room": "descent", "verdict": "no evidence", "stale": False,
    }  # fmt: skip
    now = module.source_hash("fallline.claims.descent.diffgrad")
    for verdict in ("reproduced", "not reproduced", "inconclusive"):
        carried("diffgrad", evidence(verdict, now))
        assert f"diffGrad (transformation, descent): {verdict}\n" in run("list").out
    carried("diffgrad", evidence("reproduced", "0" * 16))
    assert "diffGrad (transformation, descent): reproduced (stale)\n" in run("list").out
    found = run("list", "--json").json["methods"]
    assert found["diffgrad"]["verdict"] == "reproduced" and found["diffgrad"]["stale"] is True
    assert found["perturbed-gradient-descent"]["verdict"] == "no evidence"


def test_show_says_what_was_found_of_each_claim(run, carried):
    carried("diffgrad", evidence("not reproduced", "0" * 16))
    out = run("show", "diffgrad").out
    assert "\nclaims: not reproduced (stale), measured at the scale small\n" in out
    told = out[out.index("\nclaims: ") :]
    assert "\n  synthetic, reproduced: From x = −1, with learning rate 0.1" in told
    assert "\n    F1: 1e-09 ≤ 0.001, met\n" in told
    assert "\n    share: 0.5 [0.25, 0.75] ≥ 0.9, missed\n" in told
    assert "\n  scale-dependence, no evidence: diffGrad depends on the scale" in told and "gone" not in told
    assert max(map(len, out.splitlines())) <= 100


def test_show_without_evidence_names_the_claims(run, carried):
    out = run("show", "diffgrad").out
    assert "\nclaims: no evidence\n  synthetic, no evidence: From x = −1" in out


def test_show_for_programs_holds_the_claims(run, carried):
    carried("diffgrad", evidence("not reproduced", module.source_hash("fallline.claims.descent.diffgrad")))
    found = run("show", "diffgrad", "--json").json
    assert (found["verdict"], found["stale"]) == ("not reproduced", False)
    assert [(one["name"], one["verdict"]) for one in found["claims"]] == [
        ("synthetic", "reproduced"), ("half-adam", "not reproduced"), ("scale-dependence", "no evidence"),
    ]  # fmt: skip
    first = found["claims"][0]
    assert first["checks"] == [check("F1", 1e-9, "<=", 1e-3, True)]
    assert first["control_checks"] == [check("F1", None, "<=", 1e-3, False)]
    assert first["kind"] == "comparison" and first["control"].startswith("friction ≡ 1")
    assert found["bibtex"] == run("show", "diffgrad", "--bibtex").out.rstrip("\n")


def test_show_of_a_method_can_be_its_bibtex_alone(run):
    code, out, err = run("show", "perturbed_gradient_descent", "--bibtex")
    assert (code, err) == (0, "")
    assert out == (
        "@inproceedings{jin2017escape,\n"
        "  author        = {C. Jin and R. Ge and P. Netrapalli and S. M. Kakade and M. I. Jordan},\n"
        "  title         = {{How to Escape Saddle Points Efficiently}},\n"
        "  booktitle     = {ICML},\n"
        "  year          = {2017},\n"
        "  eprint        = {1703.00887},\n"
        "  archiveprefix = {arXiv}\n"
        "}\n"
    )


def test_list_does_not_build_the_problems(run, monkeypatch):
    built = []
    monkeypatch.setitem(sys.modules, "sklearn", None)  # the digits could not be loaded
    monkeypatch.setattr(listing, "instance", built.append)
    assert run("list").code == 0 and built == []


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
