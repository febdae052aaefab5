"""What is written down of a run: plain values, the versions it ran on, files that are whole or not there."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = ["environment", "plain", "write_json"]

_PACKAGES = ("fallline", "jax", "jaxlib", "equinox", "optax", "numpy")


def environment() -> dict[str, Any]:
    """Versions and the device, as they bear on the numbers."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    kind = "" if device.device_kind == device.platform else f": {device.device_kind}"
    return {"versions": versions, "device": f"{device.platform}{kind}"}


def plain(content: Any) -> Any:
    """The same with plain numbers; JSON has no NaN and no infinity, they become null."""
    if isinstance(content, Mapping):
        return {str(name): plain(value) for name, value in content.items()}
    if isinstance(content, np.ndarray | np.generic | jax.Array):
        content = np.asarray(content).tolist()
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content if content is None or isinstance(content, str | bool | int | float) else repr(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values, indented, lists on a line; a file that is there is replaced at once or not at all."""
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    # A line break is never inside of a string.
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r",\n *", ", ", found[1]) + "]", text)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", "utf-8")
    os.replace(part, path)
