"""Report folders: one page that needs nothing else, and files that say the same."""

import json
import re
from html.parser import HTMLParser

import jax
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core.records import plain
from fallline.problems import instance
from fallline.report import folder as reports
from fallline.report.page import Section, write_page


class Page(HTMLParser):
    """What a page loads or links to, its tags, and its text by section."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.open, self.rows = [], [], [], {}
        self.heading, self.text = "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name.rpartition(":")[2] in ("src", "href", "data", "action", "srcset", "poster"):
                self.links.append(value)
            if name == "style" or tag == "style":
                self.links += re.findall(r"url\(([^)]*)\)", value or "")
        if tag == "h2":
            self.heading = ""
        if tag == "th":
            self.name = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every element is closed, in order
        if tag == "th":
            self.rows[self.heading, self.name] = ""

    def handle_data(self, data):
        self.text += data
        inside = self.open[-1:] + self.open[-2:-1]
        if "h2" in inside:
            self.heading += data
        elif "th" in inside:
            self.name += data
        elif "td" in self.open:
            self.rows[self.heading, self.name] += data


@pytest.fixture(scope="module")
def solved():
    """A short run of Adam on Rosenbrock's function, its start and what a command says of it."""
    with jax.enable_x64(True):
        made, solver = instance("rosenbrock", dimension=3), fl.optimizer(optax.adam, learning_rate=0.1)
        start = made.start(jax.random.key(0))
        solution = fl.minimize(made.problem, start, solver, steps=25)
    problem = {"name": "rosenbrock", "options": {"dimension": 3}, "description": "a <valley> & more", "answer": ""}
    about = {
        "command": "fallline solve 'my file.py:f' --with adam",
        "problem": {**problem, "lower_bound": 0.0},
        "solver": {"name": "adam", "options": {"learning_rate": 0.1}},
        "steps": 25,
        "tolerance": None,
        "seed": 0,
        "precision": 64,
        "init": None,
        "measure": {"distance to the minimizer": 0.5, "lost": float("nan")},
    }
    return solution, start, about


@pytest.fixture
def written(solved, tmp_path):
    reports.write_run(tmp_path, *solved)
    return tmp_path


@pytest.fixture(scope="module")
def certificate():
    with jax.enable_x64(True):
        made = instance("saddle", dimension=3)
        return fl.certify(made.problem, np.zeros(3))


def test_the_page_needs_nothing_else(written, solved, certificate):
    reports.write_certificate(written, certificate, {**solved[2], **reports.environment()}, {"a": np.eye(2)})
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.open == [] and page.tags.count("svg") == 2
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert page.links and all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "@import" not in text and all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", text))
    assert set(re.findall(r"https?://[\w.]+", text)) <= {  # names of XML vocabularies: nothing is loaded from there
        "http://www.w3.org", "http://purl.org", "http://creativecommons.org",
    }  # fmt: skip


def test_the_page_shows_how_the_run_ended(written, solved):
    solution, _, _ = solved
    rows = Page((written / "index.html").read_text()).rows
    assert rows["How it ended", "value"] == f"{float(solution.value):.10g}"
    assert rows["How it ended", "gradient norm"] == f"{float(solution.gradient_norm):.4g}"
    assert rows["How it ended", "oracle calls"] == "26 gradient"
    assert rows["How it ended", "distance to the minimizer"] == "0.5"
    assert rows["How it ended", "lost"] == "not finite"
    assert rows["What was run", "solver: learning_rate"] == "0.1"
    assert rows["What was run", "precision"] == "64 bits"
    assert ("What was run", "tolerance") not in rows and ("What was run", "what is known") not in rows


def test_text_is_escaped_and_the_command_can_be_copied(written):
    page = Page((written / "index.html").read_text())
    assert page.rows["What was run", "problem"] == "a <valley> & more"
    assert "valley" not in page.tags
    assert "fallline solve 'my file.py:f' --with adam" in page.text


def test_the_page_names_the_files_that_are_there(written):
    rows = Page((written / "index.html").read_text()).rows
    named = {name for heading, name in rows if heading == "Files"}
    assert named == {path.name for path in written.iterdir()} - {"index.html", "history.svg"}


def test_the_certificate_joins_the_page_with_the_way_out(written, solved, certificate):
    reports.write_certificate(written, certificate, {**solved[2], **reports.environment()}, {"images": np.eye(2)})
    page = Page((written / "index.html").read_text())
    assert page.rows["Certificate", "value"] == "0"
    assert page.rows["Certificate", "the way out"] == "step 1 along v lowers the value by 0.25"
    assert "The direction along which the value falls." in page.text
    assert "Step limit at step 25. Strict saddle: " in page.text
    found = json.loads((written / "certificate.json").read_text())
    assert found["decrease"] == 0.25 and found["residual"] is not None


def test_no_section_is_empty(written, tmp_path_factory, solved, certificate):
    alone = tmp_path_factory.mktemp("alone")
    reports.write_certificate(alone, certificate, {**solved[2], **reports.environment()}, {})
    for folder in (written, alone):
        text = (folder / "index.html").read_text()
        sections = re.findall(r"<section>(.*?)</section>", text, re.DOTALL)
        assert len(sections) >= 4
        for section in sections:
            assert re.search(r"<(p|tr|figure|pre)\b", section)


def test_run_json_reads_again(written, solved):
    solution, _, about = solved
    found = reports.read_run(written)
    assert found["value"] == float(solution.value) and found["status"]["step"] == 25
    assert found["measure"] == {"distance to the minimizer": 0.5, "lost": None}
    assert {name: found[name] for name in about if name != "measure"} == {
        name: value for name, value in about.items() if name != "measure"
    }
    assert {"python", "jax", "numpy", "fallline"} <= set(found["versions"])


def test_a_run_of_no_steps_has_a_page_without_a_figure(solved, tmp_path):
    made, solver = instance("saddle", dimension=3), fl.optimizer(optax.sgd, learning_rate=0.1)
    solution = fl.minimize(made.problem, np.zeros(3), solver)
    reports.write_run(tmp_path, solution, np.zeros(3), solved[2])
    assert (tmp_path / "history.csv").read_text().splitlines() == ["step,value,gradient_norm", "0,0.0,0.0"]
    assert not (tmp_path / "history.svg").exists()
    assert "svg" not in Page((tmp_path / "index.html").read_text()).tags


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"problem": 3}'])
def test_a_folder_without_a_run_is_refused(tmp_path, content):
    if content:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(fl.InputError, match=r"PROBLEM: got .*; expected a folder with the run.json"):
        reports.read_run(tmp_path)


def test_only_a_new_or_empty_folder_is_written_to(tmp_path):
    reports.check_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    reports.check_folder(tmp_path / "a" / "b")
    with pytest.raises(fl.InputError, match=r"--out: got .*; expected a new or an empty folder"):
        reports.check_folder(tmp_path / "a")


def test_the_report_of_the_same_kept_run_may_be_written_again(solved, certificate, tmp_path):
    folder, kept = tmp_path / "r", tmp_path / "kept"
    folder.mkdir()
    solution, start, about = solved
    reports.write_run(folder, solution, start, {**about, "checkpoint": str(kept)})
    reports.write_certificate(folder, certificate, {**about, **reports.environment()}, {"a": np.eye(2)})
    reports.check_folder(folder, checkpoint=kept)
    for other in (None, tmp_path / "other"):
        with pytest.raises(fl.InputError, match="a new or an empty folder"):
            reports.check_folder(folder, checkpoint=other)
    reports.write_run(folder, solution, start, {**about, "checkpoint": str(kept)})
    # The certificate was of the point before.
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "run.json", "start.npz", "point.npz", "history.csv", "history.svg"}
    page = Page((folder / "index.html").read_text())
    assert page.rows["What was run", "checkpoint"] == str(kept) and "Certificate" not in page.text
    (folder / "run.json").write_text("cut")
    with pytest.raises(fl.InputError, match="a new or an empty folder"):
        reports.check_folder(folder, checkpoint=kept)


def test_plain_values_are_json_s():
    found = plain(
        {"a": np.float64(1.5), "b": jax.numpy.int32(3), "c": [float("inf"), np.nan], "d": (True, None, "x"), 5: {1}}
    )
    assert found == {"a": 1.5, "b": 3, "c": [None, None], "d": [True, None, "x"], "5": "{1}"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_page_s_parts_come_in_order(tmp_path):
    drawn = ("<svg></svg>", "drawn")
    grid = [("head", ""), ("cell 1", "cell-2"), ("cell 3", "<4>")]
    code = "x -y\n\n  z 1e-3\nw"
    section = Section("Part", text="words", table=[("name", "a-b c")], grid=grid, figures=[drawn], code=code)
    write_page(tmp_path / "p.html", title="T", lead="L", sections=[section], footer="F")
    text = re.sub("</?span>", "", (tmp_path / "p.html").read_text())
    parts = [
        "<h1>T",
        "L</p>",
        "<h2>Part",
        "<p>words",
        "name</th><td>a-b c</td>",
        ">head</th>",
        "<td>cell 1</td><td>cell-2</td>",
    ]
    parts += ["<td>cell 3</td><td>&lt;4&gt;</td>", "<svg>", "drawn</figcaption>"]
    parts += ["<pre>\nx -y\n\n  z 1e-3\nw\n</pre>", "F</footer>"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
