"""`race`: several solvers on one problem, at equal cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ..core.errors import InputError, check_choice, check_count
from ..core.race import Race
from ..core.race import race as run_race
from ..core.records import environment
from ..core.solver import Solver
from ..core.status import Ending
from ..report import folder as reports
from ..report.race import row_of, write_race
from .app import DIVERGED, INTERRUPTED, Flag, Options, Settings, app, command_line, print_json, use_precision
from .target import choose_solver, find_problem, parse_settings, usable_options

Weights = Annotated[tuple[str, ...], Parameter(name="--weights", consume_multiple=False, negative=())]


@app.command
def race(
    problem: str,
    /,
    *,
    with_: Annotated[str, Parameter(name="--with")],
    set_: Settings = (),
    option: Options = (),
    cost: float = 1000.0,
    weights: Weights = (),
    seeds: int = 3,
    init: Path | None = None,
    precision: Literal["32", "64"] = "64",
    out: Path | None = None,
    json: Flag = False,
    quiet: Flag = False,
) -> int:
    """Run several solvers from the same starts until the oracle calls of each cost the same.

    Parameters
    ----------
    problem
        A built-in problem, or `file.py:function`, as for `solve`.
    with_
        Solvers as for `solve`, with commas between them. LABEL=SOLVER enters one under another name, so
        that it can run twice: `slow=adam,fast=adam`.
    set_
        SOLVER.NAME=VALUE, a number or an option of that solver; again for each.
    option
        NAME=VALUE, an option of a built-in problem; again for each.
    cost
        What each run may spend, in gradients.
    weights
        ORACLE=PRICE, again for each; by default gradient=1, value=0.5, hvp=2, and minibatch=1 times its
        share of the data.
    seeds
        How many seeds each solver runs with: 0, 1, 2, …, for starting points and random methods.
    init
        A `.npz` or `.npy` file with the starting point of all runs.
    precision
        Bits of a real number.
    out
        A new folder for the report: page, picture, table, curves, and the command that repeats the race.
    json
        Print the table for programs.
    quiet
        Print nothing but errors.
    """
    check_count("--seeds", seeds, 1)
    use_precision(precision)
    target = find_problem(problem, parse_settings("--option", option))
    entries = _entries(with_)
    chosen = _settings_of(entries, set_)
    solvers: dict[str, Solver] = {label: choose_solver(name, chosen[label], 0) for label, name in entries.items()}
    starts = target.starts(None if init is None else str(init))
    if out is not None:
        reports.check_folder(out)
    with usable_options(with_, set_):
        result = run_race(
            target.problem,
            starts,
            solvers,
            cost=cost,
            weights=parse_settings("--weights", weights),
            keys=range(seeds),
            progress=False if quiet else "auto",
        )
    given = {"with": with_, "set": set_, "option": option, "cost": f"{cost:.17g}", "weights": weights}
    about = {
        "command": command_line("race", problem, **given, seeds=seeds, init=init, precision=precision),
        "problem": target.about(),
        "solvers": {label: {"name": name, "options": chosen[label]} for label, name in entries.items()},
        "cost": cost,
        "weights": dict(result.weights),
        "minibatch_share": result.minibatch_share,
        "seeds": seeds,
        "precision": int(precision),
        "init": None if init is None else str(init),
        "interrupted": result.interrupted,
    }
    if out is not None:
        write_race(out, result, about)
    if json:
        print_json({**about, "table": [row_of(row) for row in result.table()], **environment()})
    elif not quiet:
        print(result)
        if out is not None:
            print(f"report: {out / 'index.html'}")
        if result.interrupted:
            print("fallline: interrupted: stopped by the user; the table holds the runs begun", file=sys.stderr)
    return _code(result)


def _entries(with_: str) -> dict[str, str]:
    """The solvers by label."""
    found: dict[str, str] = {}
    for item in with_.split(","):
        label, equals, name = (part.strip() for part in item.partition("="))
        name = name if equals else label
        if not label or not name or "." in label:
            raise InputError("--with", repr(with_), "solvers with commas between them: SOLVER or LABEL=SOLVER")
        if label in found:
            raise InputError("--with", f"{label} twice", "each label once: LABEL=SOLVER gives another")
        found[label] = name
    return found


def _settings_of(entries: Mapping[str, str], set_: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The options of each solver by label."""
    chosen: dict[str, dict[str, Any]] = {label: {} for label in entries}
    labels = {label.replace("-", "_"): label for label in entries}
    for key, value in parse_settings("--set", set_).items():
        label, dot, name = key.partition(".")
        if not dot or not name:
            raise InputError("--set", repr(key), "SOLVER.NAME=VALUE")
        check_choice("--set", label, labels)
        chosen[labels[label]][name] = value
    return chosen


def _code(result: Race) -> int:
    if result.interrupted:
        return INTERRUPTED
    endings = {run.status.ending for runs in result.solutions.values() for run in runs}
    return DIVERGED if endings == {Ending.DIVERGED} else 0
