"""Every row of the catalog, against all that must hold for its kind."""

import importlib
import re
from pathlib import Path

import jax
import pytest

from conformance.cases import CASES
from conformance.checks import CHECKS, a_resumed_run_is_the_unbroken_one, claims_are_complete
from fallline.claims.claim import Scale, Verdict, run
from fallline.claims.evidence import claims_of, committed
from fallline.core.registry import KINDS, catalog

TESTS = Path(__file__).resolve().parent.parent
# Of the drivers those that are solvers, and so have a case.
KINDS_RUN = ("solver", "transformation", "round")
RUNNABLE = [name for name, row in catalog().items() if row.kind in KINDS_RUN or name in CASES]


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_solvers_and_transformations(name, check):
    assert name in CASES, f"{name}: add a case to tests/conformance/cases.py"
    check(CASES[name])


@pytest.mark.parametrize("name", RUNNABLE)
def test_resume(name, tmp_path):
    a_resumed_run_is_the_unbroken_one(CASES[name], tmp_path)


@pytest.mark.parametrize("name", catalog())
def test_the_row_is_complete_and_everything_has_the_name_of_the_method(name):
    row = catalog()[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert row.kind in KINDS
    for said in (row.title, row.update, row.assumptions, row.guarantee, row.departures, row.source.places):
        assert said.strip(), f"{name}: an empty field in catalog.toml"
    assert row.load().__doc__, f"{name}: no docstring"
    module = importlib.import_module(row.module)
    assert row.source.title in " ".join((module.__doc__ or "").split()), f"{name}: the module does not name its paper"
    assert (TESTS / row.room / f"test_{row.snake}.py").is_file(), (
        f"{name}: no test file tests/{row.room}/test_{row.snake}.py"
    )


@pytest.mark.parametrize("name", catalog())
def test_the_claims_are_complete(name):
    claims_are_complete(catalog()[name])


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, row in catalog().items() for i in range(len(claims_of(row)))]
)
def test_the_claims_at_smoke_scale(name, index):
    """Reproduced, or said in the claim itself not to be."""
    claim = claims_of(catalog()[name])[index]
    finding = run(claim, Scale.SMOKE)
    expected = Verdict.REPRODUCED if not claim.finding else finding.verdict
    assert finding.verdict is expected, str(finding)


@pytest.mark.parametrize("name", catalog())
def test_evidence_is_committed(name):
    found = committed(name)
    assert found is not None, f"{name}: run `fallline claim {name} --commit`"
    assert found["scale"] == "small"
    assert [claim["name"] for claim in found["claims"]] == [claim.name for claim in claims_of(catalog()[name])]
