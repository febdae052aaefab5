"""Evidence: plain values, the files that the package carries, and the hash that tells when they are stale."""

import json
import math
import sys
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest

import fallline
from fallline.claims import evidence as module
from fallline.claims.claim import Check, Claim, Scale, Verdict, all_of, run
from fallline.claims.evidence import committed, evidence, is_stale, source_hash
from fallline.core.registry import catalog

ROW = catalog()["diffgrad"]


def finding(value=0.5):
    return run(
        Claim(
            name="one",
            statement="it is small",
            refuted_by="it is large",
            kind="bound",
            source="Theorem 1",
            tolerance="1",
            seeds={Scale.SMOKE: 2, Scale.SMALL: 5, Scale.FULL: 9},
            build=lambda scale: (scale, [Check("sound", 0.0, "<=", 0.0)]),
            measure=lambda instance, track: {"value": np.float64(value), "curve": np.arange(3.0), 5: [math.inf]},
            judge=lambda measured: [Check("value", measured["value"], "<=", 1.0, (0.25, 0.75))],
            control="none",
            measure_control=lambda instance, track: {"value": math.nan},
        ),
        "smoke",
    )


def test_evidence_is_plain_and_complete():
    found = evidence(ROW, [finding(), finding(2.0)])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["method"], found["scale"], found["verdict"]) == ("diffgrad", "smoke", "reproduced")
    assert found["sources"] == source_hash(ROW.claim)
    assert {"python", "jax", "numpy"} <= set(found["versions"])
    one = found["claims"][0]
    assert (one["name"], one["statement"], one["seeds"], one["precision"]) == ("one", "it is small", 2, 64)
    assert one["measured"] == {"value": 0.5, "curve": [0, 1, 2], "5": [None]}
    assert one["control_measured"] == {"value": None}
    assert one["hypotheses"] == [
        {"name": "sound", "value": 0, "relation": "<=", "threshold": 0, "interval": None, "met": True}
    ]
    assert one["checks"][0]["interval"] == [0.25, 0.75] and one["checks"][0]["met"] is True
    assert one["control_checks"][0]["value"] is None and one["control_checks"][0]["met"] is False


def test_the_evidence_in_the_package_is_of_methods_that_there_are():
    folder = resources.files("fallline").joinpath("evidence")
    names = {file.name.removesuffix(".json") for file in folder.iterdir()}
    assert names and names <= set(catalog())
    for name in names:
        found = committed(name)
        assert found is not None
        assert (found["method"], found["scale"]) == (name, "small")
        assert found["verdict"] == all_of(Verdict(one["verdict"]) for one in found["claims"])


def test_what_the_package_does_not_carry_is_none_and_stale(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "resources", SimpleNamespace(files=lambda package: tmp_path))
    assert committed("diffgrad") is None and is_stale(ROW)
    (tmp_path / "evidence").mkdir()
    file = tmp_path / "evidence" / "diffgrad.json"
    file.write_text(json.dumps(evidence(ROW, [finding()])))
    assert committed("diffgrad")["verdict"] == "reproduced" and not is_stale(ROW)
    file.write_text(file.read_text().replace(source_hash(ROW.claim), "0" * 16))
    assert is_stale(ROW)


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Modules beside those of fallline: `sources(name, text)` writes one, and forgets what was read."""
    monkeypatch.setattr(fallline, "__path__", [*fallline.__path__, str(tmp_path)])

    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        module._read.cache_clear()

    yield write
    module._read.cache_clear()


FILES = {
    "hashed_claim": "from .hashed_method import step\nimport fallline.hashed_direct\n",
    "hashed_method": "import numpy\nfrom . import hashed_part as part\n\ndef step():\n    from .hashed_lazy import x\n",
    "hashed_part": "A = 1\n",
    "hashed_direct": "B = 1\n",
    "hashed_lazy": "x = 1\n",
    "hashed_other": "C = 1\n",
}


def test_the_hash_is_over_all_that_is_imported_and_nothing_else(sources):
    for name, text in FILES.items():
        sources(name, text)
    before = source_hash("fallline.hashed_claim")
    assert len(before) == 16 and source_hash("fallline.hashed_claim") == before
    changed = {}
    for name, text in FILES.items():
        sources(name, text + "\n")
        changed[name] = source_hash("fallline.hashed_claim") != before
        sources(name, text)
    assert changed == {name: name != "hashed_other" for name in FILES}
    assert source_hash("fallline.hashed_claim") == before
    assert not {f"fallline.{name}" for name in FILES} & set(sys.modules)  # read, not imported


def test_sources_are_read_once_in_a_process(sources):
    for name, text in FILES.items():
        sources(name, text)
    source_hash("fallline.hashed_claim")
    read = module._read.cache_info().misses
    source_hash("fallline.hashed_method")
    assert module._read.cache_info().misses == read
