"""`solve` and `resume`: one run, and the same run again after a crash."""

from __future__ import annotations

import contextlib
import dataclasses
import json as json_format
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from cyclopts import Parameter

from ..core.checkpoint import Checkpoint, CheckpointError
from ..core.errors import InputError
from ..core.loop import minimize
from ..core.records import environment, write_json
from ..core.solution import Solution
from ..core.solver import Solver
from ..core.status import Ending
from ..core.stopping import StoppingRule, gradient_norm
from ..report import folder as reports
from .app import (
    EXIT,
    NOT_CONVERGED,
    Flag,
    Options,
    Settings,
    app,
    check_seed,
    command_line,
    print_json,
    print_measured,
    use_precision,
)
from .target import Target, choose_solver, find_problem, parse_settings, usable_options

_KEPT = "solve.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of `solve`: everything that decides its result, and where its report goes."""

    problem: str
    solver: str | None
    set: tuple[str, ...]
    option: tuple[str, ...]
    steps: int
    tolerance: float | None
    init: str | None
    seed: int
    precision: str
    out: str | None


@app.command
def solve(
    problem: str,
    /,
    *,
    with_: Annotated[str | None, Parameter(name="--with")] = None,
    set_: Settings = (),
    data: Path | None = None,
    option: Options = (),
    steps: int = 10_000,
    tolerance: float | None = None,
    init: Path | None = None,
    seed: int = 0,
    precision: Literal["32", "64"] = "64",
    out: Path | None = None,
    checkpoint: Path | None = None,
    json: Flag = False,
    quiet: Flag = False,
) -> int:
    """Minimize a problem from its starting point, and say how the run ended.

    Parameters
    ----------
    problem
        A built-in problem, or `file.py:function` for a function of yours; `x0` in the same file, an
        array, a pytree of arrays or a function of a key, is where it starts.
    with_
        A method that `list` shows, or an optimizer of Optax: `adam`, `lbfgs`, … Some built-in problems
        have one of their own.
    set_
        NAME=VALUE, a number or an option of the solver; again for each.
    data
        A file of yours for a built-in problem that takes one, as its option `data` says.
    option
        NAME=VALUE, an option of a built-in problem; again for each.
    steps
        The step limit.
    tolerance
        Converged at this gradient norm; by default what the solver says, mostly 1e-6.
    init
        A `.npz` or `.npy` file with the starting point.
    seed
        For the starting point and for random methods.
    precision
        Bits of a real number.
    out
        A new folder for the report: page, figures, arrays, and the command that repeats the run.
    checkpoint
        A new folder where the run is kept every few seconds, for `fallline resume`.
    json
        Print the result for programs.
    quiet
        Print nothing but errors.
    """
    check_seed(seed)
    if data is not None:
        option = (*option, f"data={data.resolve()}")
    names = [None if path is None else str(path) for path in (init, out)]
    call = _Call(problem, with_, set_, option, steps, tolerance, names[0], seed, precision, names[1])
    if out is not None:
        reports.check_folder(out)
    if checkpoint is not None:
        if (checkpoint / _KEPT).exists():
            expected = f"a new or an empty folder (fallline resume {checkpoint} goes on with the run that is there)"
            raise InputError("--checkpoint", checkpoint, expected)
        reports.check_folder(checkpoint, "--checkpoint")
    return _run(call, checkpoint, json, quiet)


@app.command
def resume(
    folder: Path,
    /,
    *,
    steps: int | None = None,
    out: Path | None = None,
    json: Flag = False,
    quiet: Flag = False,
) -> int:
    """Go on with a run that was interrupted or killed, to the result of the unbroken one.

    Parameters
    ----------
    folder
        The folder that `solve --checkpoint` was given.
    steps
        Another step limit, for a run that came to its own.
    out
        A new folder for the report, in the place of the one that `solve` was given.
    json
        Print the result for programs.
    quiet
        Print nothing but errors.
    """
    begun, call = _read(folder)
    folder = folder.resolve()
    if not begun.is_dir():
        raise InputError("FOLDER", folder, f"the folder of a run that was begun in one that is still there, {begun}")
    if out is not None:
        reports.check_folder(out)
        call = dataclasses.replace(call, out=str(out.resolve()))
    elif call.out is not None:
        out = begun / call.out
        call = dataclasses.replace(call, out=str(out))
        reports.check_folder(out, checkpoint=folder)
    if steps is not None:
        call = dataclasses.replace(call, steps=steps)
    with contextlib.chdir(begun):  # files go by the names that they had
        return _run(call, folder, json, quiet)


def _read(folder: Path) -> tuple[Path, _Call]:
    """Where a run was begun, and the call that began it."""
    file, expected = folder / _KEPT, f"a folder with the {_KEPT} that `fallline solve --checkpoint` wrote"
    try:
        kept = json_format.loads(file.read_text("utf-8"))
        if kept["format"] != _FORMAT:
            raise InputError("FOLDER", f"{file} of format {kept['format']}", f"format {_FORMAT}, of this version")
        call: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in kept["call"].items()}
        return Path(kept["folder"]), _Call(**call)
    except OSError as error:
        raise InputError("FOLDER", folder, f"{expected} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("FOLDER", file, f"{expected}; this one is damaged") from error


def _run(call: _Call, checkpoint: Path | None, json: bool, quiet: bool) -> int:
    """Do what `solve` was asked for; with a checkpoint, go on from there."""
    use_precision(call.precision)
    target = find_problem(call.problem, parse_settings("--option", call.option))
    chosen = parse_settings("--set", call.set)
    solver, stop = _method(call, target, chosen)
    start = target.starts(call.init)(jax.random.key(call.seed))
    try:
        with _kept(checkpoint, call), usable_options(solver.name, call.set):
            solution = minimize(
                target.problem,
                start,
                solver,
                steps=call.steps,
                stop=stop,
                key=call.seed,
                checkpoint=checkpoint,
                progress=False if quiet else "auto",
            )
    except CheckpointError as error:
        assert checkpoint is not None
        if len(Checkpoint(checkpoint).files()) > 1:  # it says which one is whole
            raise
        raise CheckpointError(f"{error}; remove it to begin anew") from None
    about = {
        "command": _command(call),
        "problem": target.about(),
        "solver": {"name": call.solver or solver.name, "options": chosen},
        "steps": call.steps,
        "tolerance": call.tolerance,
        "seed": call.seed,
        "precision": int(call.precision),
        "init": call.init,
        "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
        "measure": target.measure(solution.x),
    }
    if call.out is not None:
        pictures = {} if target.view is None else target.view(start, solution.x)
        reports.write_run(Path(call.out), solution, start, about, pictures)
    if json:
        print_json({**about, **reports.summary(solution), **environment()})
    elif not quiet:
        print(solution)
        print_measured(about["measure"])
        if call.out is not None:
            print(f"report: {Path(call.out) / 'index.html'}")
        if not solution.status.converged:
            print(f"fallline: {solution.status.name}: {_advice(solution, checkpoint)}", file=sys.stderr)
    return EXIT.get(solution.status.ending, NOT_CONVERGED)


def _method(call: _Call, target: Target, chosen: dict[str, Any]) -> tuple[Solver, StoppingRule | str]:
    """The solver that was named, or the problem's own, and where it stops."""
    stop = (target.stop or "auto") if call.tolerance is None else gradient_norm(call.tolerance)
    if call.solver is not None:
        return choose_solver(call.solver, chosen, call.seed), stop
    if target.solver is None:
        raise InputError("--with", "nothing", f"a method or an optimizer: {target.name} has none of its own")
    if chosen:
        raise InputError("--set", ", ".join(chosen), "none without --with: they are options of a solver")
    return target.solver, stop


@contextlib.contextmanager
def _kept(folder: Path | None, call: _Call) -> Generator[None]:
    """The call in the folder of its checkpoints; a call that cannot be used leaves what was there before."""
    if folder is None:
        yield
        return
    file = folder / _KEPT
    before = file.read_bytes() if file.exists() else None
    write_json(file, {"format": _FORMAT, "folder": str(Path.cwd()), "call": dataclasses.asdict(call)})
    try:
        yield
    except InputError:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)
        raise


def _command(call: _Call) -> str:
    given = {"with": call.solver, "set": call.set, "option": call.option, "steps": call.steps}
    given |= {"tolerance": call.tolerance, "init": call.init, "seed": call.seed, "precision": call.precision}
    return command_line("solve", call.problem, **given)


def _advice(solution: Solution, checkpoint: Path | None) -> str:
    advice = solution.status.advice
    if checkpoint is None:
        return advice
    more = {Ending.INTERRUPTED: "", Ending.STEP_LIMIT: " --steps N"}.get(solution.status.ending)
    return advice if more is None else f"{advice}; fallline resume {checkpoint}{more} goes on"
