"""Report folders: what a run or a certificate leaves behind, and the page drawn from it.

| file | content |
|---|---|
| `index.html` | the page, drawn from the files below |
| `run.json`, `certificate.json` | what was run, how it ended, its calls; the verdict with its evidence |
| `start.npz`, `point.npz` | where the run started and ended |
| `direction.npz`, `escape.npz` | the way out of a strict saddle, and the point reached by it |
| `history.csv` | every record |
| `*.svg` | the figures |
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import PyTree

from ..core.certificate import Certificate, Verdict
from ..core.errors import InputError
from ..core.records import environment, write_json
from ..core.solution import Solution
from ..landscape.certify import escape
from . import figures
from .page import Section, write_page
from .points import save_point

__all__ = ["check_folder", "read_run", "summary", "write_certificate", "write_run"]

_OF_CERTIFICATE = ("certificate.json", "direction.npz", "escape.npz", "direction.svg")


def check_folder(folder: Path, argument: str = "--out", *, checkpoint: Path | None = None) -> None:
    """Refuse a folder that holds something already, or that cannot be made: no run is overwritten.

    What the same run wrote when it was interrupted may be there: the one that is kept in `checkpoint`.

    **Raises:** `InputError`.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if checkpoint is not None and _kept_in(folder) == str(checkpoint):
        return
    if folder.exists():
        raise InputError(argument, folder, "a new or an empty folder")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(argument, folder, f"a folder that can be made ({error.strerror})") from None


def _kept_in(folder: Path) -> Any:
    """Where the run is kept whose report is in the folder."""
    try:
        return read_run(folder).get("checkpoint")
    except InputError:
        return None


def summary(solution: Solution) -> dict[str, Any]:
    """How a run ended, as plain values."""
    status = solution.status
    return {
        "status": {"name": status.name, "by": status.met, "step": int(status.step), "advice": status.advice},
        "value": float(solution.value),
        "gradient_norm": float(solution.gradient_norm),
        "calls": solution.calls.as_dict(),
        "cost": float(solution.calls.cost()),
        "seconds": solution.seconds,
        "compile_seconds": solution.compile_seconds,
    }


def write_run(
    folder: Path,
    solution: Solution,
    start: PyTree,
    about: Mapping[str, Any],
    pictures: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a run into a folder that is empty, or its own from before it was resumed.

    `about` says what was run (`problem`, `solver`, `command`, …); `pictures` are images of its points by title.
    """
    for name in _OF_CERTIFICATE:  # of the point where the run was interrupted
        (folder / name).unlink(missing_ok=True)
    save_point(folder / "start.npz", start)
    save_point(folder / "point.npz", solution.x)
    columns = ["step", *(name for name in solution.history if name != "step")]
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(zip(*(np.asarray(solution.history[name]).tolist() for name in columns), strict=True))
    bound = about["problem"].get("lower_bound")
    if len(solution.history["step"]) > 1:
        (folder / "history.svg").write_text(figures.history(solution.history, bound), encoding="utf-8")
    if pictures:
        (folder / "pictures.svg").write_text(figures.photographs(pictures), encoding="utf-8")
    write_json(folder / "run.json", {**about, **summary(solution), **environment()})
    _write_folder_page(folder)


def write_certificate(folder: Path, certificate: Certificate, about: Mapping[str, Any], pictures: Mapping) -> None:
    """Write a certificate beside a run, or alone; `pictures` are images of its direction by title."""
    if certificate.verdict is Verdict.STRICT_SADDLE:
        save_point(folder / "direction.npz", certificate.direction)
        save_point(folder / "escape.npz", escape(certificate))
    if pictures:
        (folder / "direction.svg").write_text(figures.images(pictures), encoding="utf-8")
    write_json(folder / "certificate.json", {**about, **certificate.evidence(), "text": str(certificate)})
    _write_folder_page(folder)


def read_run(folder: Path) -> dict[str, Any]:
    """The `run.json` of a folder.

    **Raises:** `InputError` where there is none that can be read.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if isinstance(run, dict) and isinstance(run.get("problem"), dict):
            return run
        reason = "its run.json is no run's"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
    raise InputError("PROBLEM", folder, f"a folder with the run.json that `fallline solve --out` wrote ({reason})")


def _write_folder_page(folder: Path) -> None:
    """Draw the page of a folder from what is in it."""
    run, certificate = (_read_json(folder / f"{name}.json") for name in ("run", "certificate"))
    about = run or certificate
    sections: list[Section] = []
    lead = ""
    if run:
        by = f" by {run['status']['by']}" if run["status"]["by"] else ""
        lead = f"{run['status']['name'].capitalize()}{by} at step {run['status']['step']}."
        sections.append(_ending_of(run))
        sections += _figure(folder, "Pictures", "pictures.svg", "Where the run started, and where it ended.")
        sections += _figure(folder, "History", "history.svg", "Every record of the run, by step.")
    if certificate:
        lead = f"{lead} {certificate['verdict'].capitalize()}: {certificate['reason']}.".strip()
        sections.append(_evidence_of(certificate))
        sections += _figure(folder, "The way out", "direction.svg", "The direction along which the value falls.")
        if not run:
            sections.append(Section("What the point is good for", table=_measured(certificate)))
    sections += [_setting_of(about), _files(folder)]
    commands = [found["command"] for found in (run, certificate) if found]
    sections.append(Section("To repeat it", code="\n\n".join(commands)))
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    title = f"{about['problem']['name']}" + (f" by {run['solver']['name']}" if run else "")
    sections = [s for s in sections if s.text or s.table or s.figures or s.code]
    write_page(
        folder / "index.html", title=title, lead=lead, sections=sections, footer=f"{versions}; {about['device']}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _figure(folder: Path, heading: str, name: str, caption: str) -> list[Section]:
    path = folder / name
    return [Section(heading, figures=[(path.read_text("utf-8"), caption)])] if path.exists() else []


def _number(value: float | None, form: str = ".10g") -> str:
    return "not finite" if value is None else format(value, form)


def _ending_of(run: Mapping[str, Any]) -> Section:
    calls = ", ".join(f"{count} {name}" for name, count in run["calls"].items())
    if set(run["calls"]) != {"gradient"}:
        calls += f"; together {run['cost']:g} gradients"
    rows = [
        ("value", _number(run["value"])),
        ("gradient norm", _number(run["gradient_norm"], ".4g")),
        ("oracle calls", calls),
        ("time", f"{run['seconds']:.2f} s, of which {run['compile_seconds']:.2f} s compiling"),
    ]
    advice = run["status"]["advice"]
    return Section("How it ended", text=advice and f"{advice[0].upper()}{advice[1:]}.", table=rows + _measured(run))


def _evidence_of(certificate: Mapping[str, Any]) -> Section:
    # Two blanks or more part the name of a line from what it says.
    rows = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in certificate["text"].splitlines()[1:])
    return Section("Certificate", table=[(name, value) for name, value in rows])


def _measured(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _number(value, ".6g")) for name, value in found["measure"].items()]


def _setting_of(about: Mapping[str, Any]) -> Section:
    problem = about["problem"]
    rows = [("problem", problem["description"]), ("what is known", problem["answer"])]
    rows += [(f"problem: {name}", str(value)) for name, value in problem["options"].items()]
    if "solver" in about:
        rows.append(("solver", about["solver"]["name"]))
        rows += [(f"solver: {name}", str(value)) for name, value in about["solver"]["options"].items()]
    named = ("init", "steps", "tolerance", "seed", "checkpoint")
    rows += [(name, str(about[name])) for name in named if about.get(name) is not None]
    rows.append(("precision", f"{about['precision']} bits"))
    return Section("What was run", table=[(name, value) for name, value in rows if value])


def _files(folder: Path) -> Section:
    known = {
        "start.npz": "where the run started",
        "point.npz": "where it ended",
        "history.csv": "every record",
        "direction.npz": "the way out of the saddle, a unit vector",
        "escape.npz": "the point reached by it; fallline solve … --init goes on from there",
        "run.json": "all of this for programs",
        "certificate.json": "the verdict and its evidence",
    }
    return Section("Files", table=[(name, what) for name, what in known.items() if (folder / name).exists()])
