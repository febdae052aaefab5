"""What the tests of the command share: running it in this process, in an empty folder."""

import json
from typing import Any, NamedTuple

import jax
import pytest

from fallline.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of the test's own to work in, and the precision put back that a command switches."""
    monkeypatch.chdir(tmp_path)
    before = jax.config.read("jax_enable_x64")
    yield tmp_path
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def run(capsys):
    """`run("solve", "saddle", …)` gives the exit code and what was printed."""

    def call(*words: Any) -> Result:
        code = main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    return call
