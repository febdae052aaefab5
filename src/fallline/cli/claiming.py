"""`claim`: the headline statements of methods, measured."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..claims.claim import Claim, Finding, Scale, Track, Verdict
from ..claims.claim import run as run_claim
from ..claims.evidence import claims_of, evidence, source_hash
from ..core.errors import InputError
from ..core.records import write_json
from ..core.registry import Entry, entry
from ..report.findings import write_findings
from ..report.folder import check_folder
from .app import NOT_REPRODUCED, Flag, app, command_line, print_json


@app.command
def claim(
    *names: str,
    scale: Literal["smoke", "small", "full"] = "small",
    out: Path | None = None,
    commit: Flag = False,
    json: Flag = False,
    quiet: Flag = False,
) -> int:
    """Run the claims of methods, each with its negative control, and judge them.

    Parameters
    ----------
    names
        Methods, as `list` prints them.
    scale
        `smoke` takes seconds, `small` up to some minutes on two cores, `full` wants larger hardware.
    out
        A folder for reports: one in it for each method, with the page, the figures and the evidence.
    commit
        Keep the evidence in the package, where `list`, `show` and the documentation find it.
    json
        Print the evidence for programs, by method.
    quiet
        Print nothing but errors.
    """
    if not names:
        raise InputError("NAMES", "nothing", "methods, as `fallline list` prints them")
    rows = [entry(name) for name in dict.fromkeys(name.replace("_", "-") for name in names)]
    claims = {row.id: _claims_of(row) for row in rows}
    if commit and scale != Scale.SMALL:
        raise InputError("--commit", f"given at the scale {scale}", f"the scale {Scale.SMALL}")
    if out is not None:
        for row in rows:
            check_folder(out / row.id)
    for row in rows:
        source_hash(row.claim)  # reads the sources while they are what runs; they are read once in a process
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        findings: list[Finding] = []
        for one in claims[row.id]:
            findings.append(_measure(one, Scale(scale), quiet))
            if not (json or quiet):
                print(f"{row.id}: {findings[-1]}", flush=True)
        found[row.id] = evidence(row, findings)
        if commit:
            folder = evidence_folder()
            folder.mkdir(exist_ok=True)
            write_json(folder / f"{row.id}.json", found[row.id])
        if out is not None:
            write_findings(out / row.id, row, found[row.id], command_line("claim", row.id, scale=scale))
            if not (json or quiet):
                print(f"report: {out / row.id / 'index.html'}")
    if json:
        print_json(found)
    reproduced = all(one["verdict"] == Verdict.REPRODUCED for one in found.values())
    return 0 if reproduced else NOT_REPRODUCED


def evidence_folder() -> Path:
    """Where the package keeps evidence."""
    return Path(str(resources.files("fallline"))) / "evidence"


def _claims_of(row: Entry) -> tuple[Claim, ...]:
    try:
        claims = tuple(claims_of(row))
    except ModuleNotFoundError as error:
        if not row.claim.startswith(str(error.name)):
            raise
        claims = ()
    if not claims:
        raise InputError("NAMES", row.id, "methods that have claims")
    return claims


def _measure(one: Claim, scale: Scale, quiet: bool) -> Finding:
    """Run a claim. After Ctrl-C nothing is judged: its runs have ended early."""
    with _bars(one.name, quiet) as track, _pressed() as pressed:

        def watched(items: Iterable[Any], what: str) -> Iterator[Any]:
            for item in track(items, what):
                yield item
                if pressed():
                    raise KeyboardInterrupt

        finding = run_claim(one, scale, watched)
        if pressed():
            raise KeyboardInterrupt
    return finding


class _NoTerminal(io.TextIOBase):
    """A stream that passes everything on but is no terminal: the runs inside show no bars of their own."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str, /) -> int:
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextmanager
def _bars(name: str, quiet: bool) -> Generator[Track]:
    """A `Track` that shows a bar for each loop on stderr, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        with redirect_stderr(_NoTerminal(sys.stderr)):
            yield lambda items, what: items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = RichProgress(*columns, console=Console(file=sys.stderr), transient=True, redirect_stdout=False)
    with shown, redirect_stderr(_NoTerminal(sys.stderr)):

        def track(items: Iterable[Any], what: str) -> Iterator[Any]:
            several = list(items)
            task = shown.add_task(f"{name}: {what}", total=len(several))
            for item in several:
                yield item
                shown.advance(task)
            shown.remove_task(task)

        yield track


@contextmanager
def _pressed() -> Generator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed within the block. A run inside takes it as the wish to end that run."""
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # gets the number of every signal
    seen = bytearray()

    def pressed() -> bool:
        with suppress(BlockingIOError):
            seen.extend(os.read(read, 4096))
        return signal.SIGINT in seen

    try:
        yield pressed
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
