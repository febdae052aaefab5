"""The suite catches what it is meant to: every broken method fails its check, and sound descent passes all."""

import importlib
from pathlib import Path

import jax
import pytest

from conformance.broken.descent import Descent, settings
from conformance.cases import near_the_saddle, on, saddle
from conformance.checks import CHECKS, Failure, a_resumed_run_is_the_unbroken_one

BROKEN = sorted(
    p.stem for p in (Path(__file__).parent / "broken").glob("*.py") if p.stem not in ("__init__", "descent")
)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_caught_by_the_check_meant_for_it(name):
    module = importlib.import_module(f"conformance.broken.{name}")
    with pytest.raises((Failure, ValueError)) as caught:
        module.CAUGHT_BY(module.CASE)
    assert str(caught.value)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_plain_gradient_descent_conforms(check):
    check(on(saddle, near_the_saddle, *settings(Descent)))


def test_plain_gradient_descent_resumes(tmp_path):
    a_resumed_run_is_the_unbroken_one(on(saddle, near_the_saddle, *settings(Descent)), tmp_path)
