"""Unconstrained objectives: descent methods and the escape from saddles."""
