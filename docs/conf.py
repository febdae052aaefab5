"""Sphinx: pages in Markdown by MyST-NB, the interface from docstrings, the methods from the catalog."""

import docutils.utils
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.util.docutils import SphinxDirective

import fallline
from fallline.core.registry import catalog

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

Source
: {row.source}
"""


def from_the_catalog(app, docname, source):
    """Put the methods in their place."""
    source[0] = source[0].replace("<!-- methods -->", "".join(methods()))


def setup(app):
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", as_markdown)
    app.connect("source-read", from_the_catalog)
