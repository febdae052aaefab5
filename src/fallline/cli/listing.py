"""`list` and `show`: what there is, and what was found of its claims."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..claims.evidence import claims_of, committed, is_stale
from ..core.errors import InputError, check_choice
from ..core.registry import Entry, catalog, entry
from ..problems import PROBLEMS, instance, options
from ..report.findings import check_in_words
from .app import Flag, app, print_json, wrap
from .target import optax_factories

_NONE = "no evidence"


@app.command(name="list")
def list_(*, json: Flag = False) -> int:
    """The built-in problems, and the methods with the verdict on their claims.

    Parameters
    ----------
    json
        Machine-readable.
    """
    problems = {name: (inspect.getdoc(build) or "").splitlines()[0] for name, build in PROBLEMS.items()}
    methods = {
        row.id: {"title": row.title, "kind": row.kind, "room": row.room, **_verdict(row, committed(row.id))}
        for row in catalog().values()
    }
    optax = sorted(name.replace("_", "-") for name in optax_factories())
    if json:
        return print_json({"problems": problems, "methods": methods, "optax": optax})
    said = {name: f"{m['title']} ({m['kind']}, {m['room']}): {_in_words(m)}" for name, m in methods.items()}
    for heading, items in {"problems": problems, "methods": said}.items():
        print(heading)
        width = max(map(len, items))
        for name, what in items.items():
            print(wrap(what, f"  {name:{width}}  ", " " * (width + 4)))
        print()
    print("optimizers of Optax, by their own names")
    print(wrap(", ".join(optax), "  ", "  "))
    return 0


@app.command
def show(name: str, /, *, bibtex: Flag = False, json: Flag = False) -> int:
    """A method's update, source, guarantee and claims; or a problem, its options and its answer.

    Parameters
    ----------
    name
        As `list` prints it.
    bibtex
        Print the BibTeX entry of a method's source, and nothing else.
    json
        Machine-readable.
    """
    kebab = name.replace("_", "-")
    if kebab in PROBLEMS:
        if bibtex:
            raise InputError("--bibtex", "given", f"a method: {kebab} is a built-in problem")
        made = instance(kebab)
        about: dict[str, Any] = {"problem": kebab, "what": made.description, "answer": made.answer}
        about["options"] = options(kebab)
        return print_json(about) if json else _print_table(about)
    check_choice("NAME", kebab, [*PROBLEMS, *catalog()])
    row = entry(kebab)
    if bibtex and not json:
        print(row.source.bibtex())
        return 0
    about = {"method": f"{row.id}: {row.title}", **row.about()}
    about["options"] = {name: _default(p) for name, p in inspect.signature(row.load()).parameters.items()}
    found = committed(row.id)
    verdict, claims = _verdict(row, found), _claims(row, found)
    if json:
        return print_json({**about, "bibtex": row.source.bibtex(), **verdict, "claims": claims})
    _print_table(about)
    scale = f", measured at the scale {found['scale']}" if found else ""
    print(f"\nclaims: {_in_words(verdict)}{scale}")
    for claim in claims:
        print(wrap(f"{claim['name']}, {claim['verdict']}: {claim['statement']}", "  ", "    "))
        for check in claim["checks"]:
            print(wrap(check_in_words(check), "    ", "      "))
    return 0


def _verdict(row: Entry, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the package's evidence says of a method, and whether it is of other sources than these."""
    return {"verdict": found["verdict"], "stale": is_stale(row)} if found else {"verdict": _NONE, "stale": False}


def _in_words(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['verdict']}{' (stale)' if verdict['stale'] else ''}"


def _claims(row: Entry, found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The claims of a method, with what the evidence says of each."""
    measured = {claim["name"]: claim for claim in found["claims"]} if found else {}
    unknown = {"verdict": _NONE, "reason": "", "checks": [], "control_checks": []}
    return [
        {
            **{name: getattr(claim, name) for name in ("name", "statement", "kind", "source", "control", "finding")},
            **{name: measured.get(claim.name, unknown)[name] for name in unknown},
        }
        for claim in claims_of(row)
    ]


def _print_table(about: Mapping[str, Any]) -> int:
    width = max(map(len, about))
    for label, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        text = ", ".join(value) if isinstance(value, list) else str(value)
        print(wrap(text, f"{label:{width}}  ", " " * (width + 2)))
    return 0


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is parameter.empty:
        return "(needed)"
    return getattr(parameter.default, "__name__", parameter.default)
