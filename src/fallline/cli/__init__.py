"""The command `fallline`: `list`, `show`, `solve` and `certify`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from ..core.errors import InputError

__all__ = ["main"]

INTERNAL_ERROR, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default that of the process) and return its exit code.

    0 converged or done, 1 internal error, 2 bad input, 3 diverged, 5 not converged, 130 interrupted.
    Results go to stdout; progress and errors, one line each, to stderr.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    from cyclopts import CycloptsError

    from .commands import app

    try:
        return app(
            [argument for argument in arguments if argument != "--debug"],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        ) or 0  # fmt: skip
    except (InputError, CycloptsError) as error:
        code, message = BAD_INPUT, " ".join(str(error).split())
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    except BrokenPipeError:  # the reader of our output went away: nobody is left to tell
        sys.stderr.close()
        return 0
    except Exception as error:
        code, message = INTERNAL_ERROR, f"internal error, {type(error).__name__}: {' '.join(str(error).split())}"
        if not debug:
            message += " (--debug shows where)"
    if debug:
        traceback.print_exc()
    print(f"fallline: {message}", file=sys.stderr)
    return code
