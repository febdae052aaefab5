"""Shared numerics that are no methods: usable alone, imported by the rooms."""
