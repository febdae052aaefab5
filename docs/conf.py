"""Sphinx: pages in Markdown by MyST-NB, the interface from docstrings, the methods from the catalog."""

from pathlib import Path

import docutils.utils
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.util.docutils import SphinxDirective

import fallline
from fallline.claims.evidence import committed, is_stale
from fallline.core.registry import catalog
from fallline.report.findings import figure_of

project = "fallline"
author = "The fallline developers"
version = release = fallline.__version__

extensions = ["sphinx.ext.autodoc", "myst_nb", "sphinxcontrib.bibtex"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"fallline {version}"
html_copy_source = html_show_sphinx = html_show_copyright = False
pygments_style = "friendly"

myst_enable_extensions = ["deflist"]  # no dollars: formulas are Unicode, as in the docstrings
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 60
bibtex_bibfiles = ["references.bib"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80


class Markdown(SphinxDirective):
    """A docstring: Markdown, where a public name in backticks is a link."""

    has_content = True

    def run(self):
        document = docutils.utils.new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        for literal in list(document.findall(nodes.literal)):
            name = literal.astext()
            if name in fallline.__all__:
                reference = self.parse_inline(f":py:obj:`{name} <fallline.{name}>`")[0]
                literal.replace_self(reference)
        return document.children


def as_markdown(app, what, name, obj, options, lines):
    """Hand a docstring to MyST."""
    if what != "module":
        lines[:] = [".. markdown::", "", *(f"   {line}" for line in lines), ""]


def methods():
    """A section for each row of the catalog."""
    for row in catalog().values():
        found = committed(row.id)
        verdict = "no evidence yet" if found is None else f"[{found['verdict']}](claims.md#{row.id})"
        yield f"""
## {row.title}

`{row.id}`, a {row.kind} in the room `{row.room}`:
{{py:func}}`fallline.{row.snake}`

Update
: {row.update}

Needs
: {", ".join(row.needs)}

Assumptions
: {row.assumptions}

Guarantee
: {row.guarantee}

Departures from the source
: {row.departures}

Claims
: {verdict}

Source
: {row.source}

```bibtex
{row.source.bibtex()}
```
"""


GENERATED = Path(__file__).parent / "_generated"
RELATION = {"<=": "≤", ">=": "≥"}
MET = {True: "met", False: "**missed**", None: "open"}


def evidence():
    """A section for each method whose evidence the package carries, with its figures and every number."""
    GENERATED.mkdir(exist_ok=True)
    for row in catalog().values():
        found = committed(row.id)
        if found is None:
            continue
        stale = " The code has changed since: the evidence is stale." if is_stale(row) else ""
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        yield f"""
({row.id})=
## {row.title}: {found["verdict"]}

{row.source}.{stale}
"""
        for claim in found["claims"]:
            svg = figure_of(row, claim)
            if svg is not None:
                (GENERATED / f"{row.id}-{claim['name']}.svg").write_text(svg, encoding="utf-8")
            yield claim_section(row, claim, svg is not None)
        yield f"\n*{versions}; {found['device']}.*\n"


def claim_section(row, claim, has_figure):
    """One claim: what it says, what was measured, and the control."""
    seeds = f"{claim['seeds']} seed" + ("s" if claim["seeds"] != 1 else "")
    figure = f"![{claim['name']}](_generated/{row.id}-{claim['name']}.svg)" if has_figure else ""
    finding = f"What we found: {claim['finding']}" if claim["finding"] else ""
    rows = [("measured", check) for check in claim["checks"]]
    rows += [("control", check) for check in claim["control_checks"]]
    table = "\n".join(
        f"| {label} | {check['name'].replace('|', '&#124;')} | {number(check)} | "
        f"{RELATION[check['relation']]} {check['threshold']:.4g} | {MET[check['met']]} |"
        for label, check in rows
    )
    return f"""
### {claim["name"]}: {claim["verdict"]}

{claim["statement"]}

{figure}

| | | value | threshold | |
|---|---|---|---|---|
{table}

{finding}

Refuted by
: {claim["refuted_by"]}

Control
: {claim["control"]}

Thresholds
: {claim["tolerance"]}

Source
: {claim["source"]}; {seeds}, {claim["precision"]} bits, {claim["seconds"]:g} s
"""


def number(check):
    """A measured value, with its interval where it has one."""
    value = "not finite" if check["value"] is None else f"{check['value']:.4g}"
    return value if check["interval"] is None else value + " [{:.3g}, {:.3g}]".format(*check["interval"])


def from_the_catalog(app, docname, source):
    """Put the methods and the evidence in their places."""
    for place, sections in (("<!-- methods -->", methods), ("<!-- evidence -->", evidence)):
        if place in source[0]:
            source[0] = source[0].replace(place, "".join(sections()))


def setup(app):
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", as_markdown)
    app.connect("source-read", from_the_catalog)
