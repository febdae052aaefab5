"""The report of claims: what the page says is what the evidence holds."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fallline.claims.claim import Check, Claim, Scale, run
from fallline.claims.evidence import evidence
from fallline.core.registry import catalog
from fallline.report import findings
from fallline.report.findings import check_in_words, figure_of, write_findings

ROW = catalog()["diffgrad"]


def claim(name, value, **options):
    return Claim(
        **{
            "name": name,
            "statement": f"{name} is <small>",
            "refuted_by": "it is large",
            "kind": "bound",
            "source": "Theorem 1",
            "tolerance": "1, by Lemma 2",
            "seeds": dict.fromkeys(Scale, 7),
            "build": lambda scale: (None, [Check("smooth", 0.25, "<=", 0.5)]),
            "measure": lambda instance, track: {"value": value, "curve": np.arange(4.0)},
            "judge": lambda m: [
                Check("gap", m["value"], "<=", 1.0),
                Check("share", 0.5, ">=", 0.1, (0.2, 0.8)),
            ],
            "control": "doubled",
            "measure_control": lambda instance, track: {"value": np.inf, "curve": [0.0]},
            **options,
        }
    )


def draw(measured, axes):
    axes[0].plot(measured["curve"], measured["curve"])
    axes[1].set(title="second panel")


@pytest.fixture
def written(tmp_path, monkeypatch):
    claims = (claim("first", 0.5, draw=draw, panels=2), claim("second", 3.0, finding="It is three."))
    monkeypatch.setattr(findings, "claims_of", lambda row: claims)
    found = evidence(ROW, [run(one, "smoke") for one in claims])
    write_findings(tmp_path, ROW, found, "fallline claim diffgrad --scale smoke")
    return tmp_path


def text_of(part):
    return " ".join(re.sub("<[^>]+>", " ", part).split())


def section(page, heading):
    return next(part for part in page.split("<section>") if f"<h2>{heading}</h2>" in part)


def test_the_folder_holds_page_evidence_and_figures(written):
    assert {path.name for path in written.iterdir()} == {"index.html", "evidence.json", "first.svg"}
    found = json.loads((written / "evidence.json").read_text())
    assert [one["verdict"] for one in found["claims"]] == ["reproduced", "not reproduced"]


def test_the_page_says_what_was_found(written):
    page = (written / "index.html").read_text()
    assert "<h1>diffGrad: not reproduced</h1>" in page
    assert "1 of 2 claims reproduced, at the scale smoke." in page
    first, second = section(page, "first: reproduced"), section(page, "second: not reproduced")
    assert "<p>Every threshold is met, and the control fails.</p>" in first
    assert "<p>Missed: gap.</p>" in second
    for part in (first, second):
        words = text_of(part)
        for said in ("is &lt;small&gt;", "Theorem 1", "it is large", "1, by Lemma 2", "doubled", "7, 64 bits"):
            assert said in words
    assert "what we found It is three." in text_of(second) and "what we found" not in text_of(first)
    assert "arXiv 1909.11015" in section(page, "The paper")
    assert "fallline claim diffgrad --scale smoke" in text_of(page)


def test_every_check_has_a_row_with_value_threshold_and_outcome(written):
    rows = [
        text_of(row)
        for row in re.findall(
            "<tr>.*?</tr>", section((written / "index.html").read_text(), "first: reproduced"), re.DOTALL
        )
    ]
    assert rows[-5:] == [
        "hypothesis smooth 0.25 ≤ 0.5 met",
        "measured gap 0.5 ≤ 1 met",
        "measured share 0.5 [0.2, 0.8] ≥ 0.1 met",
        "control gap not finite ≤ 1 missed",
        "control share 0.5 [0.2, 0.8] ≥ 0.1 met",
    ]


def test_a_figure_is_drawn_from_the_evidence_alone(written):
    svg = (written / "first.svg").read_text()
    ET.fromstring(svg)
    assert "second panel" in svg and svg in (written / "index.html").read_text()
    found = json.loads((written / "evidence.json").read_text())
    assert figure_of(ROW, found["claims"][0]) == svg
    assert figure_of(ROW, found["claims"][1]) is None
    assert figure_of(ROW, {**found["claims"][0], "measured": {}}) is None
    assert figure_of(ROW, {**found["claims"][0], "name": "gone"}) is None


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ((0.5, "<=", 1.0, None, True), "c: 0.5 ≤ 1, met"),
        ((None, ">=", 0.25, None, False), "c: not finite ≥ 0.25, missed"),
        ((0.5, ">=", 0.4, [0.1, 0.9], None), "c: 0.5 [0.1, 0.9] ≥ 0.4, open"),
    ],
)
def test_a_check_of_the_evidence_in_words(check, words):
    names = ("value", "relation", "threshold", "interval", "met")
    assert check_in_words({"name": "c", **dict(zip(names, check, strict=True))}) == words
