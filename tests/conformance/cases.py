"""How the suite runs each method of the catalog that is a solver or a transformation: one case a method."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from conformance.checks import Case, counted, ticked
from fallline import (
    KMeans,
    TargetLoss,
    diffgrad,
    optimizer,
    perturbed_gradient_descent,
    power_k_means,
    target_surrogate,
)


def saddle(x):
    """A quartic with a strict saddle at 0 and minima at ±e₁ of value −1/4."""
    curvatures = jnp.linspace(0.5, 3.0, x.size, dtype=x.dtype).at[0].set(-1.0)
    return jnp.sum(0.5 * curvatures * x**2 + 0.25 * x**4)


def near_the_saddle(dtype):
    """37 coordinates, as no other array of a compiled step has."""
    return jnp.asarray(1e-3 + 0.3 * np.sin(np.arange(37.0)), dtype)


class CountedKMeans(KMeans):
    """A k-means problem that counts its passes over the data."""

    tick: Any = eqx.field(static=True)

    def __init__(self, data, tick):
        super().__init__(data)
        self.tick = tick

    def squared_distances(self, x):
        ticked(self.tick, "gradient")
        return super().squared_distances(x)


def three_clusters(dtype, tick):
    """37 points in the plane."""
    draw = np.random.default_rng(0)
    data = np.repeat([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], [12, 12, 13], axis=0) + 0.5 * draw.normal(size=(37, 2))
    return CountedKMeans(jnp.asarray(data, dtype), tick)


def on(fn, start, solver, other, **options):
    """A case for a method that asks values, gradients and products of a function of the user's."""
    return Case(solver, other, lambda dtype, tick: counted(fn, tick), start, **options)


def tanh_of_rows(x, rows):
    return jnp.tanh(rows @ x)


def logistic(targets, labels):
    return jnp.logaddexp(0.0, -labels * targets)


class CountedTargets(TargetLoss):
    """A `TargetLoss` that counts the passes through its model: forward and back, forward alone, or on a minibatch."""

    tick: object = eqx.field(static=True, default=None)

    def __init__(self, dtype, tick, batch_size=None):
        inputs = np.sin(np.arange(11 * 37.0) ** 1.5).reshape(11, 37)
        labels = np.where(np.arange(11) % 3 == 0, 1.0, -1.0)
        data = (jnp.asarray(inputs, dtype), jnp.asarray(labels, dtype))
        super().__init__(tanh_of_rows, logistic, data, batch_size)
        self.tick = tick

    def targets(self, x, inputs):
        whole, plain = len(inputs) == self.size, super().targets

        @jax.custom_vjp
        def counted_targets(x, inputs):
            ticked(self.tick, "value" if whole else "minibatch")
            return plain(x, inputs)

        def forward(x, inputs):
            ticked(self.tick, "gradient" if whole else "minibatch")
            return jax.vjp(plain, x, inputs)

        counted_targets.defvjp(forward, lambda back, cotangent: back(cotangent))
        return counted_targets(x, inputs)


CASES = {
    "power-k-means": Case(
        lambda: power_k_means(-1.0, eta=1.2),
        lambda: power_k_means(-2.0, eta=1.1),
        three_clusters,
        lambda dtype: jnp.asarray([[0.5, 0.1], [0.2, 1.0], [1.0, 1.0]], dtype),
    ),
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
    "target-surrogate": Case(
        # A fixed inner step: a line search would walk back from NaN.
        lambda: target_surrogate(4.0, inner_steps=4, inner=optimizer(optax.sgd, learning_rate=1.0)),
        lambda: target_surrogate(2.0, inner_steps=3, inner=optimizer(optax.sgd, learning_rate=0.5)),
        CountedTargets,
        near_the_saddle,
    ),
}
