"""The report of a race: a page with its picture and its table, the curves, and all of it for programs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core.calls import COST
from ..core.race import COLUMNS, Race, Row
from ..core.records import environment, write_json
from . import figures
from .page import Section, write_page

__all__ = ["row_of", "write_race"]


def row_of(row: Row) -> dict[str, Any]:
    """A row of the table as plain values."""
    return {**row._asdict(), "calls": row.calls.as_dict()}


def write_race(folder: Path, result: Race, about: Mapping[str, Any]) -> None:
    """Write a race into an empty folder; `about` says what was run (`problem`, `solvers`, `command`, …)."""
    _write_curves(folder / "curves.csv", result)
    write_json(folder / "race.json", {**about, "table": [row_of(row) for row in result.table()], **environment()})
    picture = figures.race(result, about["problem"]["lower_bound"])
    (folder / "race.svg").write_text(picture, encoding="utf-8")
    versions = environment()
    packages = ", ".join(f"{name} {version}" for name, version in versions["versions"].items())
    seeds = f"{about['seeds']} seeds" if about["seeds"] > 1 else "one seed"
    write_page(
        folder / "index.html",
        title=f"{about['problem']['name']}: {', '.join(about['solvers'])} at equal cost",
        lead=_lead(result, seeds),
        sections=[
            Section("Value against cost", figures=[(picture, _caption(result, seeds))]),
            Section("Where they ended", grid=[COLUMNS, *(row.in_words() for row in result.table())]),
            _setting_of(result, about),
            Section("Files", table=_FILES),
            Section("To repeat it", code=about["command"]),
        ],
        footer=f"{packages}; {versions['device']}",
    )


_FILES = [
    ("race.json", "all of this for programs"),
    ("curves.csv", "every record of every run: the calls that the solver made itself, their cost, and the value"),
    ("race.svg", "the picture"),
]


def _write_curves(path: Path, result: Race) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["solver", "key", "step", *(f"calls.{oracle}" for oracle in COST), "cost", "value"])
        for name, curves in result.curves.items():
            for key, curve in zip(result.keys, curves, strict=False):
                columns = [curve.step, *curve.calls.values(), curve.cost, curve.value]
                table.writerows([name, key, *record] for record in zip(*(c.tolist() for c in columns), strict=True))


def _lead(result: Race, seeds: str) -> str:
    rows = result.table()
    if np.isnan(rows[0].value):
        return f"No solver reached a value within the cost {result.cost:g}."
    best = [row.name for row in rows if row.value == rows[0].value]
    names = f"{', '.join(best[:-1])} and {best[-1]} are" if len(best) > 1 else f"{best[0]} is"
    of = "" if seeds == "one seed" else f" in the median of {seeds}"
    start = "Interrupted. " if result.interrupted else ""
    return f"{start}{names} lowest at the cost {result.cost:g}: {rows[0].value:.6g}{of}."


def _caption(result: Race, seeds: str) -> str:
    spread = "" if seeds == "one seed" else f", the median of {seeds} and a band from the lowest to the highest"
    return (
        f"The lowest value reached within a cost{spread}. A dot is where a solver ended by itself; "
        "only the calls that it made itself count."
    )


def _setting_of(result: Race, about: Mapping[str, Any]) -> Section:
    problem = about["problem"]
    rows = [("problem", problem["description"]), ("what is known", problem["answer"])]
    rows += [(f"problem: {name}", str(value)) for name, value in problem["options"].items()]
    for label, solver in about["solvers"].items():
        options = ", ".join(f"{name} {value}" for name, value in solver["options"].items()) or "as it comes"
        rows.append((f"solver: {label}", options if solver["name"] == label else f"{solver['name']}: {options}"))
    prices = [f"{oracle} {result.weights[oracle]:g}" for oracle in COST]
    if result.minibatch_share != 1:
        prices[-1] += f" × {result.minibatch_share:.4g}, its share of the data"
    rows += [("prices", ", ".join(prices)), ("cost", f"{result.cost:g}"), ("seeds", str(about["seeds"]))]
    rows += [("init", about["init"] or ""), ("precision", f"{about['precision']} bits")]
    return Section("What was run", table=[(name, value) for name, value in rows if value])
