"""The catalog: which published methods there are, where each one lives, and where it comes from."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import tomllib
import unicodedata
from collections.abc import Callable
from importlib import resources
from typing import Any

from .errors import check_choice

__all__ = ["KINDS", "Entry", "Source", "catalog", "entry"]

KINDS = ("transformation", "solver", "round", "driver", "probe", "construction", "certificate")


@dataclasses.dataclass(frozen=True)
class Source:
    """The paper: its authors and title, where and when it appeared, and the places that the code follows."""

    authors: tuple[str, ...]
    title: str
    venue: str
    year: int
    places: str
    arxiv: str | None = None

    def __str__(self) -> str:
        *others, last = self.authors
        authors = f"{', '.join(others)} and {last}" if others else last
        arxiv = f", arXiv {self.arxiv}" if self.arxiv else ""
        return f"{authors}, {self.title}, {self.venue} {self.year}{arxiv}, {self.places}"

    @property
    def key(self) -> str:
        """The BibTeX key: family name of the first author, year, first long word of the title."""
        words = [_ascii(word).lower() for word in re.findall(r"\w+", self.title)]
        family = re.sub(r"\W", "", _ascii(self.authors[0]).split()[-1].lower())
        return f"{family}{self.year}{next((w for w in words if len(w) > 3), words[0])}"

    def bibtex(self) -> str:
        """The BibTeX entry."""
        fields = {
            "author": " and ".join(self.authors),
            "title": f"{{{self.title}}}",
            "booktitle": self.venue,
            "year": str(self.year),
        }
        if self.arxiv:
            fields.update(eprint=self.arxiv, archiveprefix="arXiv")
        lines = ",\n".join(f"  {name:13} = {{{value}}}" for name, value in fields.items())
        return f"@inproceedings{{{self.key},\n{lines}\n}}"


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of `catalog.toml`; its id is the kebab name of the method."""

    id: str
    title: str
    kind: str
    room: str
    needs: tuple[str, ...]
    update: str
    assumptions: str
    guarantee: str
    departures: str
    source: Source

    @property
    def snake(self) -> str:
        """The name in Python: of the module, of its public factory, of its claim and of its test."""
        return self.id.replace("-", "_")

    @property
    def module(self) -> str:
        """The module of the method."""
        return f"fallline.{self.room}.{self.snake}"

    @property
    def claim(self) -> str:
        """The module of its claims."""
        return f"fallline.claims.{self.room}.{self.snake}"

    def about(self) -> dict[str, Any]:
        """What there is to say of it, by name, as plain values."""
        shown = ("kind", "room", "needs", "update", "assumptions", "guarantee", "departures")
        said = {name: getattr(self, name) for name in shown}
        return {**said, "needs": list(self.needs), "module": self.module, "source": str(self.source)}

    def load(self) -> Callable[..., Any]:
        """The public factory, or the function of a probe or construction."""
        return getattr(importlib.import_module(self.module), self.snake)


def _entry(name: str, row: dict[str, Any]) -> Entry:
    place: dict[str, Any] = row.pop("source")
    needs, authors = tuple(row.pop("needs")), tuple(place.pop("authors"))
    return Entry(id=name, needs=needs, source=Source(authors=authors, **place), **row)


@functools.cache
def catalog() -> dict[str, Entry]:
    """All rows by id, in the order of the file."""
    text = resources.files("fallline").joinpath("catalog.toml").read_text(encoding="utf-8")
    return {name: _entry(name, row) for name, row in tomllib.loads(text).items()}


def entry(name: str) -> Entry:
    """The row of a method, by its kebab or snake name.

    **Raises:** `InputError` naming the nearest method where there is none.
    """
    name = name.replace("_", "-")
    check_choice("method", name, catalog())
    return catalog()[name]
