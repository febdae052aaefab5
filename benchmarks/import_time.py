"""What `import fallline` costs over `import jax`, in fresh processes, with bytecode cached as users have it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from timing import report


def seconds(module: str) -> float:
    script = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", script]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def main() -> None:
    seconds("fallline")  # writes the bytecode
    pairs = [(seconds("jax"), seconds("fallline")) for _ in range(9)]
    jax, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    report(
        "import",
        {"import jax, s": jax, "import fallline, s": ours, "difference, s": ours - jax},
        "difference at most 0.3 s",
    )


if __name__ == "__main__":
    main()
