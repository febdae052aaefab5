"""The report of a method's claims: a page drawn from its evidence, with the figures and the evidence itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..claims.claim import Verdict
from ..claims.evidence import claims_of
from ..core.records import write_json
from ..core.registry import Entry
from .figures import new_figure, to_svg
from .page import Section, write_page

__all__ = ["check_in_words", "figure_of", "write_findings"]


def figure_of(row: Entry, found: Mapping[str, Any]) -> str | None:
    """The picture of one claim, from its part of the evidence; None where it has none."""
    claim = next((claim for claim in claims_of(row) if claim.name == found["name"]), None)
    if claim is None or claim.draw is None or not found["measured"]:
        return None
    figure = new_figure(4.6 * claim.panels, 3.2)
    axes = figure.subplots(1, claim.panels, squeeze=False)[0]
    claim.draw(found["measured"], axes)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return to_svg(figure)


def write_findings(folder: Path, row: Entry, evidence: Mapping[str, Any], command: str) -> None:
    """Write `evidence.json`, a figure for each claim that has one, and the page."""
    write_json(folder / "evidence.json", evidence)
    sections: list[Section] = []
    for found in evidence["claims"]:
        svg = figure_of(row, found)
        if svg is not None:
            (folder / f"{found['name']}.svg").write_text(svg, encoding="utf-8")
        sections.append(_section(found, svg))
    sections += [Section("The paper", text=f"{row.source}."), Section("To repeat it", code=command)]
    claims = evidence["claims"]
    reproduced = sum(found["verdict"] == Verdict.REPRODUCED for found in claims)
    versions = ", ".join(f"{name} {version}" for name, version in evidence["versions"].items())
    write_page(
        folder / "index.html",
        title=f"{row.title}: {evidence['verdict']}",
        lead=f"{reproduced} of {len(claims)} claims reproduced, at the scale {evidence['scale']}.",
        sections=sections,
        footer=f"{versions}; {evidence['device']}; sources {evidence['sources']}",
    )


def _section(found: Mapping[str, Any], svg: str | None) -> Section:
    rows = [
        ("the statement", found["statement"]),
        ("its source", found["source"]),
        ("would refute it", found["refuted_by"]),
        ("the thresholds", found["tolerance"]),
        ("the control", found["control"]),
        ("seeds, precision, time", f"{found['seeds']}, {found['precision']} bits, {found['seconds']} s"),
        ("what we found", found["finding"]),
    ]
    parts = {"hypothesis": "hypotheses", "measured": "checks", "control": "control_checks"}
    checks = [(label, *_cells(check)) for label, part in parts.items() for check in found[part]]
    return Section(
        f"{found['name']}: {found['verdict']}",
        text=f"{found['reason'][0].upper()}{found['reason'][1:]}.",
        table=[(name, value) for name, value in rows if value],
        grid=[("", "", "value", "threshold", ""), *checks],
        figures=[] if svg is None else [(svg, "What was measured.")],
    )


_RELATION = {"<=": "≤", ">=": "≥"}
_OUTCOME = {True: "met", False: "missed", None: "open"}


def _cells(check: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A check of the evidence: name, value, threshold, and how it came out."""
    value = "not finite" if check["value"] is None else f"{check['value']:.6g}"
    within = "" if check["interval"] is None else " [{:.4g}, {:.4g}]".format(*check["interval"])
    threshold = f"{_RELATION[check['relation']]} {check['threshold']:.6g}"
    return check["name"], value + within, threshold, _OUTCOME[check["met"]]


def check_in_words(check: Mapping[str, Any]) -> str:
    """A check of the evidence as a line."""
    name, value, threshold, outcome = _cells(check)
    return f"{name}: {value} {threshold}, {outcome}"
