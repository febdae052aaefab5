"""What a method is about to allocate, against what there is: said beforehand, with the figure."""

from __future__ import annotations

import math
import os
from typing import Any

import jax

from .errors import InputError

__all__ = ["check_allocation", "memory_size", "shown_bytes"]


def memory_size() -> float:
    """Bytes of memory of the default device: of its own where it says so, else of the machine; inf where unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def shown_bytes(nbytes: float) -> str:
    """A number of bytes for messages, such as `"2.3 GB"`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} bytes"


def check_allocation(argument: str, value: Any, nbytes: float, instead: str) -> None:
    """Refuse what would allocate more bytes than the default device has; `instead` says what would fit.

    **Raises:** `InputError` naming the argument that decides the size, and both figures.
    """
    if nbytes > (most := memory_size()):
        needed = f"{value}, which takes {shown_bytes(nbytes)}"
        raise InputError(argument, needed, f"less than the {shown_bytes(most)} of memory: {instead}")
