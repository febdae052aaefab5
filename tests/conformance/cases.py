"""How the suite runs each method of the catalog that is a solver or a transformation: one case a method."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from conformance.checks import Case, counted
from fallline import diffgrad, optimizer, perturbed_gradient_descent


def saddle(x):
    """A quartic with a strict saddle at 0 and minima at ±e₁ of value −1/4."""
    curvatures = jnp.linspace(0.5, 3.0, x.size, dtype=x.dtype).at[0].set(-1.0)
    return jnp.sum(0.5 * curvatures * x**2 + 0.25 * x**4)


def near_the_saddle(dtype):
    """37 coordinates, as no other array of a compiled step has."""
    return jnp.asarray(1e-3 + 0.3 * np.sin(np.arange(37.0)), dtype)


def on(fn, start, solver, other, **options):
    """A case for a method that asks values, gradients and products of a function of the user's."""
    return Case(solver, other, lambda dtype, tick: counted(fn, tick), start, **options)


CASES = {
    "perturbed-gradient-descent": on(
        saddle,
        near_the_saddle,
        lambda: perturbed_gradient_descent(0.1, radius=0.05, gradient_threshold=1.0, patience=5),
        lambda: perturbed_gradient_descent(0.05, radius=0.01, gradient_threshold=2.0, patience=4),
        copies=2,  # x̃ ← x where it perturbs, x ← x̃ where it returns
    ),
    "diffgrad": on(
        saddle,
        near_the_saddle,
        lambda: optimizer(diffgrad, learning_rate=0.1),
        lambda: optimizer(diffgrad, learning_rate=0.05),
        copies=3,  # g_prev ← g, and two on the way that the compiler makes of it
    ),
}
