"""The catalog: which published methods there are, and where each one lives."""

from __future__ import annotations

import functools
import importlib
import tomllib
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

from .errors import check_choice

__all__ = ["Entry", "catalog", "entry"]


class Entry(NamedTuple):
    """One row of `catalog.toml`."""

    id: str
    title: str
    kind: str
    room: str
    module: str
    factory: str
    needs: list[str]
    update: str
    assumptions: str
    guarantee: str
    source: str
    departures: str

    def load(self) -> Callable[..., Any]:
        """The public factory of this method."""
        return getattr(importlib.import_module(self.module), self.factory)


@functools.cache
def catalog() -> dict[str, Entry]:
    """All rows by id, in the order of the file."""
    text = resources.files("fallline").joinpath("catalog.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)
    return {name: Entry(id=name, **row) for name, row in rows.items()}


def entry(name: str) -> Entry:
    """The row of a method, by its kebab or snake name.

    **Raises:** `InputError` naming the nearest method where there is none.
    """
    name = name.replace("_", "-")
    check_choice("method", name, catalog())
    return catalog()[name]
