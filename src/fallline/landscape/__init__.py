"""What kind of point, what kind of landscape: certificates and probes."""

from .certify import certify, escape

__all__ = ["certify", "escape"]
