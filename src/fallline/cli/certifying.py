"""`certify`: what kind of point that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..core.certificate import Certificate, Verdict
from ..core.errors import InputError
from ..core.records import environment
from ..landscape.certify import certify as certify_point
from ..report import folder as reports
from .app import Flag, Options, app, check_seed, command_line, print_json, print_measured, use_precision
from .target import Target, find_problem, is_built_in, parse_settings


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
    check_seed(seed)
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
    use_precision(precision)
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
        "command": command_line("certify", named, **given, seed=seed, precision=precision),
        "problem": target.about(),
        "precision": int(precision),
        "seed": seed,
        "measure": measured,
        **environment(),
    }
    if out is not None:
        reports.write_certificate(out, certificate, about, _pictures(target, certificate))
    if json:
        return print_json({**about, **certificate.evidence()})
    if not quiet:
        print(certificate)
        print_measured(measured)
        if out is not None:
            print(f"report: {out / 'index.html'}")
    return 0


def _pictures(target: Target, certificate: Certificate) -> dict[str, Any]:
    if certificate.verdict is not Verdict.STRICT_SADDLE:
        return {}
    return dict(target.draw(certificate.direction))
