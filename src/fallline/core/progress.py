"""What the user sees while a run goes on: a bar, a callback, and Ctrl-C that keeps the result."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import jax

__all__ = ["Bar", "Progress", "compile_clock", "interruptible"]


class _CompileClock:
    """Seconds that JAX spent on tracing, lowering and compiling in this process, by its own events."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs

    @contextmanager
    def together(self) -> Generator[None]:
        """What is compiled at the same time counts once."""
        before, began = self.seconds, time.perf_counter()
        yield
        self.seconds = min(self.seconds, before + time.perf_counter() - began)


compile_clock = _CompileClock()


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback receives, about twice a second, between two compiled chunks.

    `point()` copies the current point to the host; the scalars cost nothing.
    """

    step: int
    steps: int
    value: float
    gradient_norm: float
    seconds: float
    point: Callable[[], Any]


class Bar:
    """A progress bar on stderr that appears after one second, in a terminal only (or when asked)."""

    def __init__(self, label: str, steps: int, show: bool | str):
        self._label, self._steps = label, steps
        self._bar: Any = None
        self._task: Any = None
        self._wanted = sys.stderr.isatty() if show == "auto" else bool(show)
        self._start = time.perf_counter()

    def update(self, step: int, words: str) -> None:
        """Show the step, and what there is to say of it."""
        if not self._wanted or (self._bar is None and time.perf_counter() - self._start < 1.0):
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            count, rest, said = MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[words]}")
            columns = (TextColumn("{task.description}"), BarColumn(), count, rest, said)
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._steps, words="")
        self._bar.update(self._task, completed=step, words=words)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def interruptible() -> Generator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads; the second one interrupts at once."""
    pressed = False

    def interrupted() -> bool:
        return pressed

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handler(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):  # ignored, or set outside Python: leave it
        yield interrupted
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
