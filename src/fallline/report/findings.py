"""The report of a method's claims: a page drawn from its evidence, with the figures and the evidence itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..claims.evidence import claims_of
from ..core.records import write_json
from ..core.registry import Entry
from .figures import new_figure, to_svg
from .page import Section, write_page

__all__ = ["figure_of", "write_findings"]


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
    sections.append(Section("To repeat it", code=command))
    versions = ", ".join(f"{name} {version}" for name, version in evidence["versions"].items())
    write_page(
        folder / "index.html",
        title=f"{row.title}: {evidence['verdict']}",
        lead=f"{row.source}. Scale: {evidence['scale']}.",
        sections=sections,
        footer=f"{versions}; {evidence['device']}; sources {evidence['sources']}",
    )


def _section(found: Mapping[str, Any], svg: str | None) -> Section:
    rows = [
        ("the statement", found["statement"]),
        ("its source", found["source"]),
        ("would refute it", found["refuted_by"]),
        ("the thresholds", found["tolerance"]),
        *_checks("hypothesis", found["hypotheses"]),
        *_checks("measured", found["checks"]),
        ("the control", found["control"]),
        *_checks("measured in the control", found["control_checks"]),
        ("seeds, precision, time", f"{found['seeds']}, {found['precision']} bits, {found['seconds']} s"),
        ("what we found", found["finding"]),
    ]
    return Section(
        f"{found['name']}: {found['verdict']}",
        text=found["reason"],
        table=[(name, value) for name, value in rows if value],
        figures=[] if svg is None else [(svg, found["statement"])],
    )


def _checks(label: str, checks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    words = {True: "met", False: "missed", None: "open"}
    shown: list[tuple[str, str]] = []
    for check in checks:
        value = "not finite" if check["value"] is None else f"{check['value']:.6g}"
        within = "" if check["interval"] is None else " [{:.4g}, {:.4g}]".format(*check["interval"])
        shown.append(
            (
                label,
                f"{check['name']}: {value}{within} {check['relation']} {check['threshold']:.6g}, {words[check['met']]}",
            )
        )
    return shown
