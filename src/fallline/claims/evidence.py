"""Evidence: the findings of a method's claims as one JSON file, and whether it still is of today's code.

The committed files lie in the package, `evidence/NAME.json`; the documents and `fallline show` are
drawn from them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..core.records import environment, plain
from ..core.registry import Entry
from .claim import Check, Claim, Finding, Scale, all_of

__all__ = ["claims_of", "committed", "evidence", "is_stale", "source_hash"]


def claims_of(row: Entry) -> Sequence[Claim]:
    """The claims of a method, in the order of their module."""
    return importlib.import_module(row.claim).CLAIMS


def evidence(row: Entry, findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as plain values; `verdict` is the worst of them."""
    return {
        "method": row.id,
        "verdict": str(all_of(finding.verdict for finding in findings)),
        "scale": str(findings[0].scale),
        "claims": [_plain(finding) for finding in findings],
        **environment(),
        "sources": source_hash(row.claim),
    }


def _plain(finding: Finding) -> dict[str, Any]:
    claim = finding.claim
    said = ("name", "statement", "refuted_by", "kind", "source", "tolerance", "control", "precision", "finding")
    return {
        **{name: getattr(claim, name) for name in said},
        "verdict": str(finding.verdict),
        "reason": finding.reason,
        "seeds": claim.seeds[Scale(finding.scale)],
        "hypotheses": [_check(check) for check in finding.hypotheses],
        "checks": [_check(check) for check in finding.checks],
        "control_checks": [_check(check) for check in finding.control_checks],
        "measured": plain(finding.measured),
        "control_measured": plain(finding.control_measured),
        "seconds": round(finding.seconds, 1),
    }


def _check(check: Check) -> dict[str, Any]:
    return plain({**dataclasses.asdict(check), "met": check.met})


def committed(name: str) -> dict[str, Any] | None:
    """The evidence that the package carries for a method; None where there is none."""
    file = resources.files("fallline").joinpath("evidence", f"{name}.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def is_stale(row: Entry) -> bool:
    """Whether the committed evidence was measured on other sources than these."""
    found = committed(row.id)
    return found is None or found["sources"] != source_hash(row.claim)


def source_hash(module: str) -> str:
    """A hash over the source of a module and of all modules of fallline that it imports, directly or not."""
    pending, sources = [module], {}
    while pending:
        name = pending.pop()
        if name not in sources:
            sources[name], imported = _read(name)
            pending += imported
    total = hashlib.sha256()
    for name in sorted(sources):
        total.update(f"{name}\0{len(sources[name])}\0".encode())
        total.update(sources[name])
    return total.hexdigest()[:16]


@functools.cache
def _read(name: str) -> tuple[bytes, tuple[str, ...]]:
    """The source of a module, and the modules of fallline that it imports; read once in a process."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_bytes()
    package = name if spec.submodule_search_locations else name.rpartition(".")[0]
    return source, tuple(_imports(ast.parse(source), package))


def _imports(tree: ast.AST, package: str) -> list[str]:
    """The modules of fallline that a syntax tree imports; those for type checkers too."""
    found: list[str] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else relative
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        found += [name for name in names if name.split(".")[0] == "fallline" and _is_module(name)]
    return found


def _is_module(name: str) -> bool:
    # To look for something inside a module would import it.
    package = name.rpartition(".")[0]
    if package:
        parent = importlib.util.find_spec(package)
        if parent is None or parent.submodule_search_locations is None:
            return False
    return importlib.util.find_spec(name) is not None
