"""A classifier of the digits with one hidden layer.

    f = mean cross-entropy(softmax(tanh(X W + b) V + c), labels) + λ/2 (‖W‖² + ‖b‖² + ‖V‖² + ‖c‖²)

The weight decay makes the minimum attained. No closed form is known. A hidden unit added with zero
weights in and out leaves the value as it is, and first-order methods leave the unit as it is: its
gradient is exactly zero. Where the residual correlates with the input by more than λ the new point
is a strict saddle, for the unit's block of the Hessian is [[λ, M], [Mᵀ, λ]] with M that correlation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core.errors import InputError, check_count, check_positive
from ..core.problem import Objective
from .digits import SIDE, as_image, digits, leading_pattern
from .instance import Images, Instance, real

__all__ = ["tanh_classifier", "widen_classifier"]

CLASSES = 10
TRAIN = 1200  # the first rows train, the other 597 (other writers, in part) test

Weights = dict[str, Array]


def logits(x: Weights, pixels: Float[Array, "rows 64"]) -> Float[Array, "rows 10"]:
    """The output of the network."""
    return jnp.tanh(pixels @ x["hidden"] + x["hidden_bias"]) @ x["output"] + x["output_bias"]


def random_weights(key: Array, hidden: int, dtype: Any) -> Weights:
    """Gaussian weights whose sums have variance one, no biases."""
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (SIDE**2, hidden), dtype) / SIDE,
        "hidden_bias": jnp.zeros(hidden, dtype),
        "output": jax.random.normal(second, (hidden, CLASSES), dtype) / np.sqrt(hidden),
        "output_bias": jnp.zeros(CLASSES, dtype),
    }


def widen_classifier(x: Weights, hidden: int) -> Weights:
    """The same function with hidden units added, all of their weights zero.

    **Raises:** `InputError` where `hidden` is below the present number.
    """
    old = x["output"].shape[0]
    if hidden < old:
        raise InputError("hidden", hidden, f"at least the present number, {old}")
    more = hidden - old
    pads = {
        "hidden": ((0, 0), (0, more)),
        "hidden_bias": ((0, more),),
        "output": ((0, more), (0, 0)),
        "output_bias": ((0, 0),),
    }
    return {name: jnp.pad(x[name], pad) for name, pad in pads.items()}


def tanh_classifier(hidden: int = 8, weight_decay: float = 1e-3) -> Instance:
    """The digits' labels from one hidden layer of tanh units and a softmax.

    **Arguments:** `hidden`, the number of units; `weight_decay` λ.

    **Raises:** `InputError` for numbers out of range.
    """
    check_count("hidden", hidden, 1)
    check_positive("weight_decay", weight_decay)
    pixels, labels = digits()
    pixels = real(pixels)

    def loss(x: Weights, rows: Float[Array, "rows 64"], answers: Int[Array, " rows"]) -> Float[Array, ""]:
        log_odds = jax.nn.log_softmax(logits(x, rows))
        picked = jnp.take_along_axis(log_odds, answers[:, None], axis=1)
        return -jnp.mean(picked) + 0.5 * weight_decay * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))

    def measure(x: Weights) -> dict[str, float]:
        right = np.argmax(np.asarray(logits(x, jnp.asarray(pixels))), axis=1) == labels
        return {"training accuracy": float(right[:TRAIN].mean()), "test accuracy": float(right[TRAIN:].mean())}

    def draw(direction: Weights) -> Images:
        return {"direction, incoming weights": as_image(leading_pattern(np.asarray(direction["hidden"])))}

    data = (pixels[:TRAIN], labels[:TRAIN].astype(np.int32))
    return Instance(
        problem=Objective(loss, data),
        start=lambda key: random_weights(key, hidden, pixels.dtype),
        description=f"Digits by one hidden layer of {hidden} tanh units, cross-entropy, weight decay {weight_decay:g}; "
        f"{TRAIN} digits train, {len(labels) - TRAIN} test.",
        answer="no closed form is known",
        measure=measure,
        draw=draw,
    )
