"""Bad input: exit code 2 and one line that names the argument and what was expected."""

import dataclasses
import zipfile

import numpy as np
import pytest

from fallline.cli import claiming, solving
from fallline.core.registry import catalog

LOSS = """
import jax.numpy as jnp
import numpy as np

WIDE = np.ones(3)
HOLES = np.array([1.0, np.nan, 1.0])
number = 3
x0 = jnp.ones(3)


def loss(x):
    return jnp.sum(x**2)


def vector(x):
    return x**2


def integer(x):
    return jnp.argmax(x)


def wide(x):
    return jnp.sum(WIDE * x)


def holes(x):
    return jnp.sum(HOLES * x)


def fails(x):
    raise RuntimeError("first line\\nsecond line")
"""
FUNCTION = "def loss(x):\n    return (x**2).sum()\n"
CALL = """{"format": 1, "folder": ".", "call": {"problem": "rosenbrock", "solver": "sgd", "set": ["learning_rate=1e-4"],
"option": [], "steps": 5, "tolerance": null, "init": null, "seed": 0, "precision": "64", "out": null}}"""
FILES = {
    "loss.py": LOSS,
    "integer.py": f"import numpy as np\nx0 = np.array([1, 2])\n{FUNCTION}",
    "empty.py": f"import numpy as np\nx0 = np.zeros(0)\n{FUNCTION}",
    "holes.py": f"import numpy as np\nx0 = np.array([1.0, np.nan])\n{FUNCTION}",
    "wide.py": f"import numpy as np\nx0 = np.ones(2)\n{FUNCTION}",
    "nothing.py": FUNCTION,
    "raising.py": f"def x0(key):\n    raise ValueError('no start')\n{FUNCTION}",
    "syntax.py": "x = 1\ny = 2\ndef f(:\n    pass\n",
    "zero.py": "x = 1\n\ny = 1 / 0\n",
    "missing.py": "import a_module_that_is_not_there\n",
    "deeper.py": "def g():\n    return {}['key']\n\n\nx = g()\n",
    "leaving.py": "import sys\n\nsys.exit('bye')\n",
    "nul.py": "x = '\0'\n",
    "text.npz": "no arrays",
    "run/run.json": "{}",
    "list/run.json": "[1]",
    "cut/run.json": '{"problem": ',
    "full/file.txt": "here already",
    "reports/diffgrad/file.txt": "here already",
    "kept/solve.json": CALL,
    "half/solve.json": CALL[:40],
    "listed/solve.json": "[]",
    "other/solve.json": CALL.replace('"steps"', '"stops"'),
    "later/solve.json": CALL.replace('"format": 1', '"format": 99'),
    "moved/solve.json": CALL.replace('"."', '"/no/such/place"'),
}

SOLVE = ("--with", "sgd", "--set", "learning_rate=0.1")
ADAM = ("solve", "rosenbrock", "--with", "adam")
PGD = ("solve", "saddle", "--with", "perturbed-gradient-descent")
ROSENBROCK = ("solve", "rosenbrock", *SOLVE)
RACE = ("race", "rosenbrock", "--set", "sgd.learning_rate=1e-4")


def file(name):
    return ("solve", name, *SOLVE)


# what is wrong: the command line, and what its message must hold
TABLE = {
    # names
    "no problem": (("solve",), ["PROBLEM"]),
    "no solver": (("solve", "saddle"), ["--with"]),
    "unknown command": (("slove", "saddle"), ["slove", "solve"]),
    "unknown problem": (
        ("solve", "sadle", *SOLVE),
        ["PROBLEM", "'sadle'", "did you mean 'saddle'?", "file.py:function"],
    ),
    "unknown solver": (("solve", "saddle", "--with", "adm"), ["--with", "'adm'", "did you mean 'adam'?"]),
    "nothing to show": (("show", "perturbed"), ["NAME", "'perturbed'", "perturbed-gradient-descent"]),
    "unknown flag": ((*ROSENBROCK, "--step", "3"), ["--step"]),
    "a word too many": ((*ROSENBROCK, "extra"), ["extra"]),
    # numbers of the solver
    "option without a value": ((*ADAM, "--set", "learning_rate"), ["--set", "'learning_rate'", "NAME=VALUE"]),
    "option without a name": ((*ADAM, "--set", "=0.1"), ["--set", "'=0.1'", "NAME=VALUE"]),
    "option twice": ((*ADAM, "--set", "b1=0.1", "--set", "b1=0.2"), ["--set", "b1 twice", "once"]),
    "optimizer without its rate": (ADAM, ["--set", "nothing", "learning_rate", "adam"]),
    "method without its step size": (PGD, ["--set", "nothing", "step_size"]),
    "unknown number of an optimizer": (
        (*ADAM, "--set", "learning_rat=0.1"),
        ["adam", "'learning_rat'", "did you mean 'learning_rate'?"],
    ),
    "unknown number of a method": ((*PGD, "--set", "step_siz=1"), ["'step_siz'", "did you mean 'step_size'?"]),
    "negative step size": ((*PGD, "--set", "step_size=-0.1"), ["step_size", "-0.1", "above 0"]),
    "negative learning rate": ((*ADAM, "--set", "learning_rate=-1"), ["learning_rate", "-1", "above 0"]),
    "step size in words": ((*PGD, "--set", "step_size=small"), ["step_size", "'small'", "a number"]),
    "learning rate in words": ((*ADAM, "--set", "learning_rate=small"), ["learning_rate", "'small'", "a number"]),
    "half a step": ((*PGD, "--set", "step_size=1", "--set", "patience=2.5"), ["patience", "2.5", "whole number"]),
    "decay in words": (
        (*ADAM, "--set", "learning_rate=0.1", "--set", "b1=slow"),
        ["--set", "b1=slow", "adam", "TypeError"],
    ),
    "no literal": ((*PGD, "--set", "step_size={[]: 1}"), ["step_size", "a number"]),
    # options of the problem
    "unknown option": ((*ROSENBROCK, "--option", "dimensions=3"), ["'dimensions'", "did you mean 'dimension'?"]),
    "option out of range": ((*ROSENBROCK, "--option", "dimension=1"), ["dimension", "1", "at least 2"]),
    "option of another kind": ((*ROSENBROCK, "--option", "dimension=2.5"), ["dimension", "2.5", "whole number"]),
    "option item": ((*ROSENBROCK, "--option", "dimension"), ["--option", "'dimension'", "NAME=VALUE"]),
    "options of a file": ((*file("loss.py:loss"), "--option", "a=1"), ["--option", "a", "built-in"]),
    # other numbers
    "negative steps": ((*ROSENBROCK, "--steps", "-1"), ["steps", "-1", "at least 0"]),
    "steps in words": ((*ROSENBROCK, "--steps", "many"), ["--steps", "many"]),
    "negative tolerance": ((*ROSENBROCK, "--tolerance", "-1"), ["tolerance", "-1", "at least 0"]),
    "tolerance that is no number": ((*ROSENBROCK, "--tolerance", "nan"), ["tolerance", "nan", "finite"]),
    "negative seed": ((*ROSENBROCK, "--seed", "-1"), ["--seed", "-1", "0 to"]),
    "seed too large": ((*ROSENBROCK, "--seed", str(2**32)), ["--seed", str(2**32), "0 to"]),
    "precision": ((*ROSENBROCK, "--precision", "16"), ["--precision", "16", "32", "64"]),
    # the start
    "start of another shape": ((*ROSENBROCK, "--init", "two.npy"), ["--init", "two.npy", "(2,)", "(10,)"]),
    "start with other names": (
        (*ROSENBROCK, "--init", "names.npz"),
        ["--init", "names.npz", "a, b", "the arrays x"],
    ),
    "complex start": ((*ROSENBROCK, "--init", "complex.npy"), ["--init", "complex128", "real"]),
    "start of words": ((*ROSENBROCK, "--init", "words.npy"), ["--init", "words.npy", "numbers"]),
    "start that needs pickle": ((*ROSENBROCK, "--init", "pickle.npy"), ["--init", "pickle.npy", ".npz"]),
    "start that is text": ((*ROSENBROCK, "--init", "text.npz"), ["--init", "text.npz", ".npz or .npy"]),
    "start that was cut": ((*ROSENBROCK, "--init", "cut.npz"), ["--init", "cut.npz", ".npz or .npy"]),
    "archive of other things": ((*ROSENBROCK, "--init", "other.npz"), ["--init", "other.npz", "numbers"]),
    "start that is not there": ((*ROSENBROCK, "--init", "nowhere.npz"), ["--init", "nowhere.npz", "No such file"]),
    "start that is a folder": ((*ROSENBROCK, "--init", "full"), ["--init", "full", "directory"]),
    "missing x0": (file("nothing.py:loss"), ["--init", "nothing", "x0", "nothing.py"]),
    "integer x0": (file("integer.py:loss"), ["x0", "int64[2]", "floating"]),
    "empty x0": (file("empty.py:loss"), ["x0", "float64[0]", "at least one"]),
    "NaN in x0": (file("holes.py:loss"), ["x0", "1 NaN", "no NaN"]),
    "x0 fails": (file("raising.py:loss"), ["x0", "ValueError: no start", "key"]),
    "wide x0 in 32 bits": ((*file("wide.py:loss"), "--precision", "32"), ["x0", "float64[2]", "--precision 64"]),
    # the function
    "vector": (file("loss.py:vector"), ["problem", "vector returning float64[3]", "one real scalar", "sum or average"]),
    "no real number": (file("loss.py:integer"), ["problem", "integer returning", "one real scalar"]),
    "NaN in data": (file("loss.py:holes"), ["problem", "1 NaN", "no NaN"]),
    "wide data in 32 bits": (
        (*file("loss.py:wide"), "--precision", "32"),
        ["problem", "WIDE", "float64[3]", "--precision 64"],
    ),
    "function fails": (file("loss.py:fails"), ["problem", "fails", "RuntimeError: first line"]),
    # the file
    "no such file": (file("nowhere.py:loss"), ["PROBLEM", "nowhere.py", "a file"]),
    "no function": (file("loss.py"), ["PROBLEM", "'loss.py'", "file.py:function"]),
    "no function's name": (file("loss.py:"), ["PROBLEM", "'loss.py:'", "file.py:function"]),
    "unknown function": (file("loss.py:lost"), ["PROBLEM", "'loss.py:lost'", "loss, vector"]),
    "a number": (file("loss.py:number"), ["PROBLEM", "'loss.py:number'", "a function or a problem"]),
    "syntax error": (file("syntax.py:f"), ["PROBLEM", "syntax.py, line 3: SyntaxError"]),
    "exception": (file("zero.py:f"), ["PROBLEM", "zero.py, line 3: ZeroDivisionError: division by zero"]),
    "exception deeper": (file("deeper.py:f"), ["PROBLEM", "deeper.py, line 2: KeyError: 'key'"]),
    "import error": (file("missing.py:f"), ["PROBLEM", "missing.py, line 1: ModuleNotFoundError", "a_module_that"]),
    "exit": (file("leaving.py:f"), ["PROBLEM", "leaving.py, line 3: SystemExit: bye"]),
    "no text": (file("nul.py:f"), ["PROBLEM", "nul.py: SyntaxError", "null bytes"]),
    # the report
    "folder in use": ((*ROSENBROCK, "--out", "full"), ["--out", "full", "a new or an empty folder"]),
    "report is a file": ((*ROSENBROCK, "--out", "text.npz"), ["--out", "text.npz", "folder"]),
    "report below a file": ((*ROSENBROCK, "--out", "text.npz/r"), ["--out", "text.npz/r", "Not a directory"]),
    # certify
    "certify nothing": (("certify",), ["PROBLEM"]),
    "certify without a point": (("certify", "saddle"), ["--at", "a file with the point", "no folder of a run"]),
    "certify no folder": (("certify", "nowhere"), ["--at", "nowhere is no folder of a run"]),
    "certify no run": (("certify", "full"), ["PROBLEM", "full", "run.json", "No such file"]),
    "certify an empty run": (("certify", "run"), ["PROBLEM", "run", "run.json"]),
    "certify a list": (("certify", "list"), ["PROBLEM", "list", "run.json"]),
    "certify a cut run": (("certify", "cut"), ["PROBLEM", "cut", "run.json"]),
    "certify a run elsewhere": (("certify", "run", "--at", "two.npy"), ["--at", "nothing", "run"]),
    "certify a run to elsewhere": (("certify", "run", "--out", "new"), ["--out", "nothing", "run"]),
    "certify at another shape": (("certify", "saddle", "--at", "two.npy"), ["--at", "(2,)", "(20,)"]),
    "certify at nothing": (("certify", "saddle", "--at", "nowhere.npz"), ["--at", "nowhere.npz", "No such file"]),
    "certify into a folder in use": (
        ("certify", "saddle", "--at", "x.npy", "--out", "full"),
        ["--out", "empty folder"],
    ),
    "certify with an option of a file": (
        ("certify", "loss.py:loss", "--at", "x.npy", "--option", "a=1"),
        ["--option", "a", "built-in"],
    ),
    "certain": (
        ("certify", "saddle", "--at", "x.npy", "--failure-probability", "1"),
        ["failure_probability", "below 1"],
    ),
    "no budget": (("certify", "saddle", "--at", "x.npy", "--max-hvp", "1"), ["max_hvp", "1", "at least 4"]),
    # checkpoints
    "checkpoint in use": ((*ROSENBROCK, "--checkpoint", "full"), ["--checkpoint", "full", "a new or an empty folder"]),
    "checkpoint of another run": (
        (*ROSENBROCK, "--checkpoint", "kept"),
        ["--checkpoint", "kept", "a new or an empty folder", "fallline resume kept goes on"],
    ),
    "resume nothing": (("resume",), ["FOLDER"]),
    "resume nowhere": (("resume", "nowhere"), ["FOLDER", "nowhere", "solve.json", "--checkpoint", "No such file"]),
    "resume no run": (("resume", "full"), ["FOLDER", "full", "solve.json", "No such file"]),
    "resume a cut file": (("resume", "half"), ["FOLDER", "half/solve.json", "damaged"]),
    "resume a list": (("resume", "listed"), ["FOLDER", "listed/solve.json", "damaged"]),
    "resume another call": (("resume", "other"), ["FOLDER", "other/solve.json", "damaged"]),
    "resume a later format": (("resume", "later"), ["FOLDER", "later/solve.json of format 99", "format 1"]),
    "resume a run begun elsewhere": (("resume", "moved"), ["FOLDER", "moved", "/no/such/place"]),
    "resume into a folder in use": (("resume", "kept", "--out", "full"), ["--out", "full", "a new or an empty folder"]),
    # race
    "race nobody": (("race", "saddle"), ["--with"]),
    "race an unknown solver": (("race", "saddle", "--with", "adm,sgd"), ["--with", "'adm'", "did you mean 'adam'?"]),
    "race one twice": ((*RACE, "--with", "sgd,sgd"), ["--with", "sgd twice", "LABEL=SOLVER"]),
    "race an empty name": ((*RACE, "--with", "sgd,"), ["--with", "'sgd,'", "commas"]),
    "race a label with a dot": ((*RACE, "--with", "a.b=sgd"), ["--with", "'a.b=sgd'", "LABEL=SOLVER"]),
    "race without a rate": (("race", "saddle", "--with", "sgd"), ["--set", "nothing", "learning_rate", "sgd"]),
    "race with an option of nobody": (
        (*RACE, "--with", "sgd", "--set", "learning_rate=1"),
        ["--set", "'learning_rate'", "SOLVER.NAME=VALUE"],
    ),
    "race with an option of another": (
        (*RACE, "--with", "sgd", "--set", "sdg.learning_rate=1"),
        ["--set", "'sdg'", "did you mean 'sgd'?"],
    ),
    "race at no cost": ((*RACE, "--with", "sgd", "--cost", "0"), ["cost", "0", "above 0"]),
    "race at another price": ((*RACE, "--with", "sgd", "--weights", "hvps=1"), ["weights", "'hvps'", "'hvp'"]),
    "race at a price in words": ((*RACE, "--with", "sgd", "--weights", "hvp=much"), ["hvp", "'much'", "a number"]),
    "race without seeds": ((*RACE, "--with", "sgd", "--seeds", "0"), ["--seeds", "0", "at least 1"]),
    "race from nowhere": (
        ("race", "nothing.py:loss", "--with", "sgd", "--set", "sgd.learning_rate=1"),
        ["--init", "nothing", "x0", "nothing.py"],
    ),
    "race into a folder in use": ((*RACE, "--with", "sgd", "--out", "full"), ["--out", "full", "empty folder"]),
    # claim
    "claim nothing": (("claim",), ["NAMES", "nothing", "fallline list"]),
    "claim of nobody": (("claim", "diffgrad", "difgrad"), ["method", "'difgrad'", "did you mean 'diffgrad'?"]),
    "claim of a problem": (("claim", "saddle"), ["method", "'saddle'"]),
    "claim at another scale": (("claim", "diffgrad", "--scale", "large"), ["--scale", "large", "smoke"]),
    "commit another scale": (
        ("claim", "diffgrad", "--scale", "smoke", "--commit"),
        ["--commit", "smoke", "the scale small"],
    ),
    "claim into a folder in use": (("claim", "diffgrad", "--out", "reports"), ["--out", "reports/diffgrad", "empty"]),
    "BibTeX of a problem": (("show", "saddle", "--bibtex"), ["--bibtex", "given", "built-in problem"]),
    "kind of tolerance": (("certify", "saddle", "--at", "x.npy", "--tolerance", "0"), ["tolerance", "0", "above 0"]),
}


@pytest.fixture(autouse=True)
def _files(folder):
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    np.save("two.npy", np.zeros(2))
    np.save("x.npy", np.zeros(20))
    np.save("complex.npy", np.zeros(10) + 1j)
    np.save("words.npy", np.array(["a"] * 10))
    np.save("pickle.npy", np.array([{}] * 10), allow_pickle=True)
    np.savez("names.npz", a=np.zeros(2), b=np.zeros(2))
    with zipfile.ZipFile("other.npz", "w") as archive:
        archive.writestr("x", "text")
    (folder / "cut.npz").write_bytes((folder / "names.npz").read_bytes()[:200])


@pytest.mark.parametrize("case", TABLE)
def test_one_line_names_the_argument_and_what_was_expected(run, case):
    words, parts = TABLE[case]
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("fallline: ") and err.endswith("\n") and err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("case", ["negative step size", "unknown flag", "exception", "function fails"])
def test_debug_adds_the_traceback_before_the_line(run, case):
    words, _ = TABLE[case]
    line = run(*words).err
    code, out, err = run(*words, "--debug")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback (most recent call last):\n") and err.endswith(f"\n{line}")


def test_debug_shows_the_user_s_own_line(run):
    assert 'zero.py", line 3' in run(*TABLE["exception"][0], "--debug").err


def test_a_report_s_folder_is_left_as_it_was(run, folder):
    run(*TABLE["folder in use"][0])
    assert [path.name for path in (folder / "full").iterdir()] == ["file.txt"]


def broken(*_, **__):
    raise RuntimeError("a\nbug")


def test_internal_error_is_code_1_and_points_to_debug(run, monkeypatch):
    monkeypatch.setattr(solving, "minimize", broken)
    assert run(*ROSENBROCK) == (1, "", "fallline: internal error, RuntimeError: a bug (--debug shows where)\n")


def test_internal_error_with_debug_shows_where(run, monkeypatch):
    monkeypatch.setattr(solving, "minimize", broken)
    code, _, err = run(*ROSENBROCK, "--debug")
    assert code == 1 and "in broken" in err
    assert err.endswith("\nfallline: internal error, RuntimeError: a bug\n")


def test_interrupted_before_the_run_is_code_130(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(solving, "find_problem", interrupt)
    assert run(*ROSENBROCK) == (130, "", "fallline: interrupted\n")


@pytest.mark.parametrize("where", ["no module", "no claims"])
def test_a_method_without_claims_is_bad_input(run, monkeypatch, where):
    row = catalog()["diffgrad"]
    if where == "no module":
        bare = dataclasses.replace(row, room="nowhere")
        monkeypatch.setattr(claiming, "entry", lambda name: bare)
    else:
        monkeypatch.setattr(claiming, "claims_of", lambda row: ())
    assert run("claim", "diffgrad") == (2, "", "fallline: NAMES: got diffgrad; expected methods that have claims\n")


def test_a_call_that_cannot_be_used_leaves_its_folder_free(run, folder):
    assert run(*ROSENBROCK, "--checkpoint", "new", "--steps", "-1").code == 2
    assert list((folder / "new").iterdir()) == []
    assert run(*ROSENBROCK, "--checkpoint", "new", "--steps", "1").code == 5
    before = (folder / "new/solve.json").read_bytes()
    assert run("resume", "new", "--steps", "-1").code == 2
    assert (folder / "new/solve.json").read_bytes() == before
