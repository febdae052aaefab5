"""The command `fallline`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from ..core.checkpoint import CheckpointError
from ..core.errors import InputError

__all__ = ["main"]

INTERNAL_ERROR, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default that of the process) and return its exit code.

    0 converged or done, 1 internal error, 2 bad input, 3 diverged, 4 worker lost, 5 not converged, 6 claim not
    reproduced, 130 interrupted.
    Results go to stdout; progress and errors, one line each, to stderr.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    from cyclopts import CycloptsError

    from .commands import app

    code = 0
    try:
        code = app(
            [argument for argument in arguments if argument != "--debug"],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        ) or 0  # fmt: skip
    except (InputError, CheckpointError, CycloptsError) as error:
        # Said for Python, where there is no flag.
        message = str(error).replace("jax.config.update('jax_enable_x64', True)", "--precision 64")
        code = _fail(BAD_INPUT, message, error, debug)
    except KeyboardInterrupt as error:
        code = _fail(INTERRUPTED, "interrupted", error, debug)
    except BrokenPipeError:
        pass
    except Exception as error:
        hint = "" if debug else " (--debug shows where)"
        code = _fail(INTERNAL_ERROR, f"internal error, {type(error).__name__}: {error}{hint}", error, debug)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away: nobody is left to tell, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _fail(code: int, message: str, error: BaseException, debug: bool) -> int:
    """Say in one line what happened, and with `debug` where; return the code."""
    if debug:
        traceback.print_exception(error)
    print(f"fallline: {' '.join(message.split())}", file=sys.stderr)
    return code
