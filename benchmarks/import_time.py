"""What `import fallline` costs over `import jax`, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

from timing import report


def seconds(module: str) -> float:
    script = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    pairs = [(seconds("jax"), seconds("fallline")) for _ in range(9)]
    jax, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    report(
        "import",
        {"import jax, s": jax, "import fallline, s": ours, "difference, s": ours - jax},
        "difference at most 0.3 s",
    )


if __name__ == "__main__":
    main()
