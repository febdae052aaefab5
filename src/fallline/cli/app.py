"""What the commands share: the application, its flags and exit codes, and how a result is printed."""

from __future__ import annotations

import json
import shlex
import textwrap
from typing import Annotated, Any

import jax
from cyclopts import App, Parameter

from .. import __version__
from ..core.errors import InputError
from ..core.records import plain
from ..core.status import Ending

__all__ = [
    "DIVERGED",
    "EXIT",
    "INTERRUPTED",
    "NOT_CONVERGED",
    "NOT_REPRODUCED",
    "WORKER_LOST",
    "Flag",
    "Options",
    "Settings",
    "app",
    "check_seed",
    "command_line",
    "print_json",
    "print_measured",
    "use_precision",
    "wrap",
]

app = App(
    name="fallline",
    help="Minimize non-convex losses, and find out what kind of point the optimizer stopped at.",
    version=__version__,
    help_epilogue="Exit codes: 0 converged or done, 1 internal error, 2 bad input, 3 diverged, 4 worker lost, "
    "5 not converged, 6 claim not reproduced, 130 interrupted. `--debug` adds the traceback to an error.",
    suppress_keyboard_interrupt=False,
)

DIVERGED, WORKER_LOST, NOT_CONVERGED, NOT_REPRODUCED, INTERRUPTED = 3, 4, 5, 6, 130
EXIT = {Ending.CONVERGED: 0, Ending.DIVERGED: DIVERGED, Ending.INTERRUPTED: INTERRUPTED}

Settings = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=False, negative=())]
Options = Annotated[tuple[str, ...], Parameter(name="--option", consume_multiple=False, negative=())]
Flag = Annotated[bool, Parameter(negative=())]


def use_precision(bits: str) -> None:
    """Switch JAX to 32 or 64 bits."""
    jax.config.update("jax_enable_x64", bits == "64")


def check_seed(seed: int) -> None:
    """Refuse what is no seed of JAX."""
    if not 0 <= seed < 2**32:
        raise InputError("--seed", seed, "a whole number from 0 to 2³² − 1")


def command_line(name: str, *words: str, **given: Any) -> str:
    """The command line that does it again, defaults spelled out; it prints, and writes no report."""
    line = ["fallline", name, *words]
    for flag, value in given.items():
        for item in value if isinstance(value, tuple) else (value,):
            line += [] if item is None else [f"--{flag}", str(item)]
    return shlex.join(line)


def print_json(content: Any) -> int:
    """Print a result for programs; the exit code 0."""
    print(json.dumps(plain(content), indent=2, ensure_ascii=False))
    return 0


def print_measured(measured: Any) -> None:
    """What a point is good for, a line each."""
    for name, value in measured.items():
        print(f"{name}: {value:.6g}")


def wrap(text: str, first: str, rest: str) -> str:
    """Text in lines of at most 100 characters, the first and the others indented."""
    return textwrap.fill(
        text, 100, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
