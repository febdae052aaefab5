"""Unconstrained objectives: descent methods and the escape from saddles."""

from .perturbed_gradient_descent import perturbed_gradient_descent, theory_parameters

__all__ = ["perturbed_gradient_descent", "theory_parameters"]
