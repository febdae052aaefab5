"""The commands, in modules by topic. Each returns its exit code, and prints its result to stdout."""

from . import certifying, claiming, launching, listing, racing, solving
from .app import app

__all__ = ["app", "certifying", "claiming", "launching", "listing", "racing", "solving"]
