"""What is shipped: the wheel's data, the metadata, a light import, and every code block of the documents."""

import ast
import contextlib
import importlib.metadata
import io
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

import fallline

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if BLOCK.search(p.read_text("utf-8"))], ids=lambda p: p.name)
def test_the_code_blocks_of_a_document_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in BLOCK.findall(path.read_text("utf-8")):
            exec(compile(block, path.name, "exec"), scope)
    if path.name == "README.md":
        assert "strict saddle" in printed.getvalue()
        assert scope["better"].value < scope["stopped"].value


def test_the_readme_starts_with_the_two_commands_then_the_picture():
    text = (ROOT / "README.md").read_text("utf-8")
    order = ["make demo", "make test", "docs/_static/demo.png", "```python"]
    assert sorted(order, key=text.index) == order


def test_links_between_the_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("name", ["py.typed", "catalog.toml"])
def test_the_package_holds_its_data(name):
    assert resources.files("fallline").joinpath(name).is_file()


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {fallline.__version__}\n" in citation
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        assert importlib.metadata.version("fallline") == fallline.__version__


def test_every_requirement_has_an_exact_version_for_make():
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {re.split(r"[\[>=<!;\s]", r)[0] for r in project["dependencies"] + sum(extras.values(), [])}
    assert wanted - {"fallline"} <= pinned


def test_requirements_have_no_upper_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for requirement in project["dependencies"]:
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", requirement), requirement


def test_import_loads_nothing_that_only_a_part_needs():
    lazy = ("matplotlib", "sklearn", "rich", "jinja2", "cyclopts", "flax", "scipy.optimize")
    done = python("-c", f"import fallline, sys; print([name for name in {lazy} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == []


def test_all_public_names_exist_and_are_documented():
    for name in fallline.__all__:
        assert getattr(fallline, name).__doc__, name


def test_the_command_says_what_it_can():
    done = python(
        "-c", "import sys; sys.argv = ['fallline', '--help']; from fallline.cli import main; sys.exit(main())"
    )
    assert done.returncode == 0, done.stderr
    assert "certify" in done.stdout
