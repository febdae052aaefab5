"""`fallline launch`: several processes on this machine that make one run, watched over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Annotated, Any

from cyclopts import Parameter

from ..core.errors import InputError, check_count, check_positive
from ..distributed.processes import BEAT_SECONDS, Invitation
from .app import INTERRUPTED, WORKER_LOST, app

__all__ = ["launch"]

_GRACE = 4.0  # seconds between SIGTERM and SIGKILL


@app.command
def launch(
    processes: int,
    script: Path,
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
    heartbeat: float = 10.0,
) -> int:
    """Start processes that run a Python script together, and watch over them.

    The script calls `fallline.distributed.join()` first. What it prints comes with the number of the process in front.
    When a process dies or freezes, the others are stopped; start the same line again to go on from the checkpoint.

    Parameters
    ----------
    processes
        How many.
    script
        A Python file.
    arguments
        What the script finds in `sys.argv`.
    heartbeat
        Seconds without a sign of life after which a process counts as frozen.
    """
    check_count("processes", processes, 1)
    check_positive("--heartbeat", heartbeat)
    if heartbeat < 4 * BEAT_SECONDS:
        raise InputError("--heartbeat", heartbeat, f"at least {4 * BEAT_SECONDS:g} seconds")
    if not script.is_file():
        raise InputError("script", script, "a Python file")
    with tempfile.TemporaryDirectory(prefix="fallline-") as beats:
        return _Launch(processes, [sys.executable, "-u", str(script), *arguments], Path(beats), heartbeat).run()


class _Launch:
    """The processes of one launch, and who of them ended first."""

    def __init__(self, count: int, command: list[str], beats: Path, heartbeat: float):
        self.beats, self.heartbeat = beats, heartbeat
        self.ended: list[tuple[int, int]] = []  # rank and exit code, in the order in which they ended
        self.changed = threading.Condition()
        coordinator = f"127.0.0.1:{_free_port()}"
        environment = {"JAX_PLATFORMS": "cpu", **os.environ}
        self.children = [
            subprocess.Popen(
                command,
                env={**environment, **Invitation(coordinator, count, rank, str(beats)).environment()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(count)
        ]
        self.threads = [threading.Thread(target=self._wait, args=(rank,)) for rank in range(count)]
        for rank, child in enumerate(self.children):
            for pipe, out in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                self.threads.append(threading.Thread(target=_pass_on, args=(rank, pipe, out)))
        for thread in self.threads:
            thread.start()

    def run(self) -> int:
        """Wait for all, or for the first that fails; the exit code of the launch."""
        try:
            code = self._watch()
        except KeyboardInterrupt:  # the processes have it too: they end with the point reached, unless it comes again
            print("fallline: interrupted; once more to stop at once", file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                self._until(lambda: len(self.ended) == len(self.children))
            code = INTERRUPTED
        finally:
            self._stop()
            for thread in self.threads:
                thread.join()
        return code

    def _watch(self) -> int:
        while True:
            self._until(lambda: any(code for _, code in self.ended) or len(self.ended) == len(self.children), 0.25)
            failed = [(rank, code) for rank, code in self.ended if code]
            if failed:
                return self._report(*failed[0])
            if len(self.ended) == len(self.children):
                return 0
            frozen = self._frozen()
            if frozen is not None:
                print(
                    f"fallline: process {frozen} of {len(self.children)} is frozen: no sign of life for "
                    f"{self.heartbeat:g} s; the others are stopped",
                    file=sys.stderr,
                )
                return WORKER_LOST

    def _report(self, rank: int, code: int) -> int:
        """Say who ended first, and how; the launch's exit code."""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        rest = f"; the other {len(self.children) - 1} are stopped" if len(self.children) > 1 else ""
        print(f"fallline: process {rank} of {len(self.children)} {how}{rest}", file=sys.stderr)
        return WORKER_LOST if code < 0 else code

    def _frozen(self) -> int | None:
        """The process whose last sign of life is the oldest, where that is too old."""
        alive = set(range(len(self.children))) - {rank for rank, _ in self.ended}
        beats = {rank: _beat_of(self.beats / str(rank)) for rank in alive}
        old = {rank: beat for rank, beat in beats.items() if beat is not None and time.time() - beat > self.heartbeat}
        return min(old, key=lambda rank: old[rank]) if old else None

    def _wait(self, rank: int) -> None:
        code = self.children[rank].wait()
        with self.changed:
            self.ended.append((rank, code))
            self.changed.notify_all()

    def _until(self, done: Any, timeout: float | None = None) -> bool:
        with self.changed:
            return self.changed.wait_for(done, timeout)

    def _stop(self) -> None:
        """SIGTERM for whoever is left, then SIGKILL."""
        for child in self.children:
            if child.poll() is None:
                child.terminate()
        if not self._until(lambda: len(self.ended) == len(self.children), _GRACE):
            for child in self.children:
                if child.poll() is None:
                    child.kill()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _beat_of(file: Path) -> float | None:
    """When a process last showed a sign of life; None before its first."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def _pass_on(rank: int, pipe: IO[bytes] | None, out: IO[str]) -> None:
    """What a process prints, line by line, but for the greeting of JAX's transport, which cannot be switched off."""
    assert pipe is not None
    for line in pipe:
        if line.startswith(b"[Gloo] Rank "):
            continue
        out.write(f"[{rank}] {line.decode(errors='replace')}")
        out.flush()
