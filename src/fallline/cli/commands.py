"""The commands. Each returns its exit code, and prints its result to stdout."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from cyclopts import App, Parameter

from .. import __version__
from ..core.certificate import Certificate, Verdict
from ..core.errors import InputError, check_choice
from ..core.loop import minimize
from ..core.registry import catalog, entry
from ..core.status import Ending
from ..core.stopping import gradient_norm
from ..landscape.certify import certify as certify_point
from ..problems import PROBLEMS, instance, options
from ..report import folder as reports
from .target import Target, choose_solver, find_problem, is_built_in, optax_factories, parse_settings, usable_options

__all__ = ["app"]

app = App(
    name="fallline",
    help="Minimize non-convex losses, and find out what kind of point the optimizer stopped at.",
    version=__version__,
    help_epilogue="Exit codes: 0 converged or done, 1 internal error, 2 bad input, 3 diverged, 5 not converged, "
    "130 interrupted. `--debug` adds the traceback to an error.",
    suppress_keyboard_interrupt=False,
)

_EXIT = {Ending.CONVERGED: 0, Ending.DIVERGED: 3, Ending.INTERRUPTED: 130}
_NOT_CONVERGED = 5

Settings = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=False, negative=())]
Options = Annotated[tuple[str, ...], Parameter(name="--option", consume_multiple=False, negative=())]
Flag = Annotated[bool, Parameter(negative=())]


@app.command(name="list")
def list_(*, json: Flag = False) -> int:
    """The built-in problems and the methods.

    Parameters
    ----------
    json
        Machine-readable.
    """
    rows = catalog().values()
    found = {
        "problems": {name: instance(name).description for name in PROBLEMS},
        "methods": {row.id: f"{row.title} ({row.kind}, {row.room})" for row in rows},
    }
    optax = sorted(name.replace("_", "-") for name in optax_factories())
    if json:
        return _print_json({**found, "optax": optax})
    for heading, items in found.items():
        print(heading)
        width = max(map(len, items))
        for name, what in items.items():
            print(_wrap(what, f"  {name:{width}}  ", " " * (width + 4)))
        print()
    print("optimizers of Optax, by their own names")
    print(_wrap(", ".join(optax), "  ", "  "))
    return 0


@app.command
def show(name: str, /, *, json: Flag = False) -> int:
    """A method's update, source, assumptions and guarantee; or a problem, its options and its answer.

    Parameters
    ----------
    name
        As `list` prints it.
    json
        Machine-readable.
    """
    kebab = name.replace("_", "-")
    if kebab in PROBLEMS:
        made = instance(kebab)
        found: dict[str, Any] = {"problem": kebab, "what": made.description, "answer": made.answer}
        found["options"] = options(kebab)
    else:
        check_choice("NAME", kebab, [*PROBLEMS, *catalog()])
        row = entry(kebab)
        found = {"method": f"{row.id}: {row.title}", **row.about()}
        found["options"] = {name: _default(p) for name, p in inspect.signature(row.load()).parameters.items()}
    if json:
        return _print_json(found)
    width = max(map(len, found))
    for label, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        text = ", ".join(value) if isinstance(value, list) else str(value)
        print(_wrap(text, f"{label:{width}}  ", " " * (width + 2)))
    return 0


@app.command
def solve(
    problem: str,
    /,
    *,
    with_: Annotated[str, Parameter(name="--with")],
    set_: Settings = (),
    option: Options = (),
    steps: int = 10_000,
    tolerance: float | None = None,
    init: Path | None = None,
    seed: int = 0,
    precision: Literal["32", "64"] = "64",
    out: Path | None = None,
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
        A method that `list` shows, or an optimizer of Optax: `adam`, `lbfgs`, …
    set_
        NAME=VALUE, a number or an option of the solver; again for each.
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
    json
        Print the result for programs.
    quiet
        Print nothing but errors.
    """
    _check_seed(seed)
    _use_precision(precision)
    target = find_problem(problem, parse_settings("--option", option))
    chosen = parse_settings("--set", set_)
    solver = choose_solver(with_, chosen, seed)
    start = target.start(seed) if init is None else target.point(init, "--init")
    if start is None:
        raise InputError("--init", "nothing", f"a file with the starting point, or `x0` in {problem.split(':')[0]}")
    stop = "auto" if tolerance is None else gradient_norm(tolerance)
    if out is not None:
        reports.check_folder(out)
    progress = False if quiet else "auto"
    with usable_options(with_, set_):
        solution = minimize(target.problem, start, solver, steps=steps, stop=stop, key=seed, progress=progress)
    given = {"with": with_, "set": set_, "option": option, "steps": steps, "tolerance": tolerance, "init": init}
    about = {
        "command": _command("solve", problem, **given, seed=seed, precision=precision),
        "problem": target.about(),
        "solver": {"name": with_, "options": chosen},
        "steps": steps,
        "tolerance": tolerance,
        "seed": seed,
        "precision": int(precision),
        "init": None if init is None else str(init),
        "measure": target.measure(solution.x),
    }
    if out is not None:
        reports.write_run(out, solution, start, about)
    if json:
        _print_json({**about, **reports.summary(solution), **reports.environment()})
    elif not quiet:
        print(solution)
        _print_measured(about["measure"])
        if out is not None:
            print(f"report: {out / 'index.html'}")
        if not solution.status.converged:
            print(f"fallline: {solution.status.name}: {solution.status.advice}", file=sys.stderr)
    return _EXIT.get(solution.status.ending, _NOT_CONVERGED)


@app.command
def certify(
    problem: str,
    /,
    *,
    at: Path | None = None,
    option: Options = (),
    tolerance: float | None = None,
    curvature_tolerance: float = 1e-4,
    failure_probability: float = 1e-3,
    max_hvp: int = 2000,
    seed: int = 0,
    precision: Literal["32", "64"] | None = None,
    out: Path | None = None,
    json: Flag = False,
    quiet: Flag = False,
) -> int:
    """Say what kind of point that is: a minimum, a saddle with its way out, or no stationary point at all.

    Parameters
    ----------
    problem
        A folder that `solve --out` wrote; or a problem as for `solve`, together with `--at`.
    at
        A `.npz` or `.npy` file with the point.
    option
        NAME=VALUE, an option of a built-in problem; again for each.
    tolerance
        The gradient counts as zero up to this times ‖H‖ · max(‖x‖, 1).
    curvature_tolerance
        Curvature counts as zero up to this times ‖H‖.
    failure_probability
        Of a probabilistic bound on the smallest eigenvalue being wrong.
    max_hvp
        Hessian-vector products that may be spent.
    seed
        For the random start of Lanczos' method.
    precision
        Bits of a real number; by default those of the run, or 64.
    out
        A new folder for the report; a run's certificate goes into the run's own folder.
    json
        Print the evidence for programs.
    quiet
        Print nothing but errors.
    """
    _check_seed(seed)
    named, folder, chosen = problem, Path(problem), parse_settings("--option", option)
    # A folder may have the name of a built-in problem: `--at` says which one is meant.
    of_run = folder.is_dir() and (at is None or not is_built_in(problem))
    if of_run:
        if at is not None or chosen or out is not None:
            given = "--at" if at is not None else "--out" if out is not None else "--option"
            raise InputError(given, "given", f"nothing: point, options and report are those of {folder}")
        run = reports.read_run(folder)
        problem, chosen = run["problem"]["name"], run["problem"]["options"]
        at, out = folder / "point.npz", folder
        precision = precision or str(run["precision"])  # type: ignore[assignment]
    elif at is None:
        raise InputError("--at", "nothing", f"a file with the point: {problem} is no folder of a run")
    elif out is not None:
        reports.check_folder(out)
    precision = precision or "64"
    _use_precision(precision)
    target = find_problem(problem, chosen)
    certificate = certify_point(
        target.problem,
        target.point(at, "--at"),
        key=seed,
        tolerance=tolerance,
        curvature_tolerance=curvature_tolerance,
        failure_probability=failure_probability,
        max_hvp=max_hvp,
    )
    measured = target.measure(certificate.x)
    given = {
        "at": None if of_run else at,
        "option": option,
        "tolerance": tolerance,
        "curvature-tolerance": curvature_tolerance,
        "failure-probability": failure_probability,
        "max-hvp": max_hvp,
    }
    about = {
        "command": _command("certify", named, **given, seed=seed, precision=precision),
        "problem": target.about(),
        "precision": int(precision),
        "seed": seed,
        "measure": measured,
        **reports.environment(),
    }
    if out is not None:
        reports.write_certificate(out, certificate, about, _pictures(target, certificate))
    if json:
        return _print_json({**about, **certificate.evidence()})
    if not quiet:
        print(certificate)
        _print_measured(measured)
        if out is not None:
            print(f"report: {out / 'index.html'}")
    return 0


def _pictures(target: Target, certificate: Certificate) -> dict[str, Any]:
    if certificate.verdict is not Verdict.STRICT_SADDLE:
        return {}
    return dict(target.draw(certificate.direction))


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is parameter.empty:
        return "(needed)"
    return getattr(parameter.default, "__name__", parameter.default)


def _use_precision(bits: str) -> None:
    jax.config.update("jax_enable_x64", bits == "64")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError("--seed", seed, "a whole number from 0 to 2³² − 1")


def _command(name: str, problem: str, **given: Any) -> str:
    """The command line that does it again, defaults spelled out; it prints, and writes no report."""
    words = ["fallline", name, problem]
    for flag, value in given.items():
        for item in value if isinstance(value, tuple) else (value,):
            words += [] if item is None else [f"--{flag}", str(item)]
    return shlex.join(words)


def _print_json(content: Any) -> int:
    print(json.dumps(reports.plain(content), indent=2, ensure_ascii=False))
    return 0


def _print_measured(measured: Any) -> None:
    for name, value in measured.items():
        print(f"{name}: {value:.6g}")


def _wrap(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text, 100, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
