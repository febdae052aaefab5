"""One self-contained page: text, tables and figures in one file that needs nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["Section", "write_page"]


@dataclasses.dataclass
class Section:
    """A heading with, in this order: a paragraph, a table of two columns, a grid, figures, preformatted text.

    `grid` is a table with a row of headings first; `figures` are pairs of an `<svg>` element and its caption.
    """

    heading: str
    text: str = ""
    table: Sequence[tuple[str, str]] = ()
    grid: Sequence[Sequence[str]] = ()
    figures: Sequence[tuple[str, str]] = ()
    code: str = ""


@functools.cache
def _template() -> Any:
    from jinja2 import Environment

    text = resources.files("fallline.report").joinpath("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)


def write_page(path: Path, *, title: str, lead: str, sections: Sequence[Section], footer: str) -> None:
    """Write the page; `lead` is the answer in a sentence, under the title."""
    page = _template().render(title=title, lead=lead, sections=sections, footer=footer)
    path.write_text(page, encoding="utf-8")
