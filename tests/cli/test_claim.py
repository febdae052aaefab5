"""`claim`: findings on stdout, reports, evidence in its place, and bars in a terminal."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optax
import pytest

import fallline as fl
from fallline.claims import evidence as module
from fallline.claims.claim import Check, Claim, Scale
from fallline.cli import claiming


def claim(name="one", value=0.5, control=2.0, measure=None, **options):
    """Measures `value`, and `control` in the control; the threshold is at most 1."""
    return Claim(
        **{
            "name": name,
            "statement": "it is small",
            "refuted_by": "it is large",
            "kind": "bound",
            "source": "Theorem 1",
            "tolerance": "1",
            "seeds": {Scale.SMOKE: 1, Scale.SMALL: 2, Scale.FULL: 3},
            "build": lambda scale: (scale, []),
            "measure": measure or (lambda instance, track: {"value": value, "curve": [3.0, 2.0, 1.0]}),
            "judge": lambda measured: [Check("value", measured["value"], "<=", 1.0)],
            "control": "it is doubled",
            "measure_control": lambda instance, track: {"value": control},
            "draw": lambda measured, axes: axes[0].plot(measured["curve"]),
            **options,
        }
    )


@pytest.fixture
def claims(monkeypatch, tmp_path):
    """`claims(*several)` makes these the claims of every method; evidence goes to a folder of the test's."""
    package = tmp_path / "package"
    package.mkdir()
    files = SimpleNamespace(files=lambda name: package)
    monkeypatch.setattr(module, "resources", files)
    monkeypatch.setattr(claiming, "resources", files)

    def put(*several):
        monkeypatch.setattr(claiming, "claims_of", lambda row: several)
        monkeypatch.setattr("fallline.report.findings.claims_of", lambda row: several)

    return put


def test_each_finding_is_printed_and_all_reproduced_is_code_0(run, claims):
    claims(claim(), claim("two", control=np.nan))
    code, out, err = run("claim", "diffgrad", "perturbed_gradient_descent")
    assert (code, err) == (0, "")
    heads = [line for line in out.splitlines() if not line.startswith(" ")]
    assert [line.split(" (")[0] for line in heads] == [
        "diffgrad: one: reproduced",
        "diffgrad: two: reproduced",
        "perturbed-gradient-descent: one: reproduced",
        "perturbed-gradient-descent: two: reproduced",
    ]
    assert "  value: 0.5 <= 1, met\n  control, it is doubled:\n    value: 2 <= 1, missed\n" in out


@pytest.mark.parametrize(
    ("options", "verdict"), [({"value": 1.5}, "not reproduced"), ({"control": 0.5}, "inconclusive")]
)
def test_one_that_is_not_reproduced_is_code_6(run, claims, options, verdict):
    claims(claim(), claim("two", **options))
    code, out, err = run("claim", "diffgrad")
    assert (code, err) == (6, "") and f"\ndiffgrad: two: {verdict} (" in out


def test_json_is_the_evidence_by_method(run, claims):
    claims(claim(value=1.5))
    code, out, _ = run("claim", "diffgrad", "--scale", "smoke", "--json")
    found = json.loads(out)
    assert code == 6 and set(found) == {"diffgrad"}
    assert (found["diffgrad"]["verdict"], found["diffgrad"]["scale"]) == ("not reproduced", "smoke")
    assert found["diffgrad"]["claims"][0]["seeds"] == 1


def test_a_method_that_is_named_twice_is_measured_once(run, claims):
    measured = []

    def measure(instance, track):
        measured.append(instance)
        return {"value": 0.5}

    claims(claim(measure=measure, draw=None))
    assert run("claim", "perturbed-gradient-descent", "perturbed_gradient_descent", "--quiet") == (0, "", "")
    assert measured == [Scale.SMALL]


def test_the_sources_are_read_before_the_run(run, claims):
    """An edit while it runs does not pass for what was measured."""
    read = []

    def measure(instance, track):
        read.append(module._read.cache_info().currsize)
        return {"value": 0.5, "curve": [1.0]}

    claims(claim(measure=measure))
    module._read.cache_clear()
    assert run("claim", "diffgrad", "--quiet").code == 0
    assert read == [module._read.cache_info().currsize] and read[0] > 10


def test_reports_go_to_a_folder_for_each_method(run, claims, folder):
    claims(claim(), claim("two", draw=None, value=2.0))
    code, out, _ = run("claim", "diffgrad", "perturbed-gradient-descent", "--out", "r")
    assert code == 6 and "report: r/diffgrad/index.html\n" in out
    assert {path.name for path in (folder / "r").iterdir()} == {"diffgrad", "perturbed-gradient-descent"}
    assert {path.name for path in (folder / "r/diffgrad").iterdir()} == {"index.html", "evidence.json", "one.svg"}
    page = (folder / "r/diffgrad/index.html").read_text()
    assert "1 of 2 claims reproduced, at the scale small." in page
    assert "fallline claim diffgrad <span>--scale</span> small" in page
    found = json.loads((folder / "r/diffgrad/evidence.json").read_text())
    assert found["verdict"] == "not reproduced" and found["claims"][0]["measured"]["curve"] == [3, 2, 1]


def test_committed_evidence_is_what_list_shows(run, claims, folder):
    claims(claim())
    assert "diffGrad (transformation, descent): no evidence" in run("list").out
    assert run("claim", "diffgrad", "--commit", "--quiet") == (0, "", "")
    assert [path.name for path in (folder / "package/evidence").iterdir()] == ["diffgrad.json"]
    assert "diffGrad (transformation, descent): reproduced\n" in run("list").out
    claims(claim(value=2.0))
    assert run("claim", "diffgrad", "--commit", "--quiet").code == 6
    assert "diffGrad (transformation, descent): not reproduced\n" in run("list").out


def test_the_evidence_of_the_package_lies_beside_its_modules():
    assert claiming.evidence_folder().parent.joinpath("catalog.toml").is_file()


# --- Ctrl-C ----------------------------------------------------------------------------------------


def pressing(instance, track):
    """A run that Ctrl-C ends early, as `minimize` has it, and a loop around it."""
    for item in track(range(3), "items"):
        if item == 1:
            run = fl.minimize(lambda x: x**2, 1.0, fl.optimizer(optax.sgd, learning_rate=1e-9), stop=None,
                              steps=10**9, callback=lambda now: os.kill(os.getpid(), signal.SIGINT))  # fmt: skip
            assert run.status.name == "interrupted"
        assert item < 2, "the loop went on"
    return {"value": 0.5}


def test_nothing_is_judged_after_ctrl_c(run, claims):
    claims(claim("first"), claim("pressed", measure=pressing), claim("never"))
    code, out, err = run("claim", "diffgrad", "--out", "r", "--commit")
    assert (code, err) == (130, "fallline: interrupted\n")
    assert "first: reproduced" in out and "pressed" not in out and "never" not in out


def test_ctrl_c_in_the_last_run_counts_too(run, claims):
    claims(
        claim("pressed", measure_control=lambda instance, track: {"value": os.kill(os.getpid(), signal.SIGINT) or 2})
    )
    # Python's own handler raises at once where no run has taken the signal.
    assert run("claim", "diffgrad") == (130, "", "fallline: interrupted\n")


# --- bars ------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True


def looping(instance, track):
    for _ in track(range(2), "outer"):
        for _ in track([1, 2, 3], "inner"):
            assert not sys.stderr.isatty()  # a bar of a run inside would garble ours
            time.sleep(0.05)
    return {"value": 0.5}


def test_a_bar_for_each_loop_in_a_terminal(run, claims, monkeypatch):
    claims(claim(measure=looping, draw=None))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    code, out, _ = run("claim", "diffgrad")
    assert code == 0 and out.startswith("diffgrad: one: reproduced (") and "\x1b" not in out
    assert "one: outer" in terminal.getvalue()
    assert sys.stderr is terminal
    shown = len(terminal.getvalue())
    assert run("claim", "diffgrad", "--quiet").code == 0 and len(terminal.getvalue()) == shown


def test_no_bars_where_stderr_is_no_terminal(run, claims):
    claims(claim(measure=lambda instance, track: {"value": sum(track([0.25, 0.25], "numbers")), "curve": [1.0]}))
    assert run("claim", "diffgrad")[::2] == (0, "")


# Each run takes longer than a run's own bar waits.
SLOW = """
import sys
import optax
import fallline as fl
from fallline.cli import claiming, main
sys.path.insert(0, sys.argv.pop(1))
from test_claim import claim

def measure(instance, track):
    for _ in track(range(2), "outer"):
        sgd = fl.optimizer(optax.sgd, learning_rate=1e-9)
        fl.minimize(lambda x: x**2, 1.0, sgd, stop=fl.time_limit(1.4), steps=10**9, every=10**6)
        print("said in between", file=sys.stderr)
    return {"value": 0.5}

claiming.claims_of = lambda row: [claim(measure=measure, draw=None)]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_in_a_real_terminal(quiet):
    leader, follower = pty.openpty()
    seen = bytearray()

    def read():
        with contextlib.suppress(OSError):  # how the leader learns that the follower is closed
            while part := os.read(leader, 4096):
                seen.extend(part)

    reader = threading.Thread(target=read)
    words = ("claim", "diffgrad", *(["--quiet"] if quiet else []))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(Path(__file__).parent), *words],
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(follower)
    reader.start()
    out, _ = process.communicate(timeout=120)
    reader.join(timeout=10)
    os.close(leader)
    text = seen.decode()
    assert process.returncode == 0, text
    assert text.count("said in between") == 2 and "sgd" not in text
    if quiet:
        assert (out, text.split()) == ("", ["said", "in", "between"] * 2)
    else:
        assert out.startswith("diffgrad: one: reproduced (") and "one: outer" in text
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
