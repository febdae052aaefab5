"""diffGrad: Adam whose step is damped where the gradient hardly changes between two steps.

Solves min E f(x) from stochastic gradients g_t. Per coordinate:

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   ξ = σ(|g_prev − g|) = 1 / (1 + exp(−|g_prev − g|))
    x ← x − α ξ m̂ / (√v̂ + ε),   m̂ = m / (1 − β₁ᵗ),   v̂ = v / (1 − β₂ᵗ);   then g_prev ← g

| paper        | here              |
|--------------|-------------------|
| α            | `learning_rate`   |
| β₁, β₂, ε    | `b1`, `b2`, `eps` |
| ξ (DFC)      | `friction`        |

Source: S. R. Dubey, S. Chakraborty, S. K. Roy, S. Mukherjee, S. K. Singh and B. B. Chaudhuri,
*diffGrad: An Optimization Method for Convolutional Neural Networks*, IEEE TNNLS 2020
(arXiv 1909.11015), Algorithm 1.

Guarantee, as the paper claims it: regret O(√T) in online convex optimization under Adam's
assumptions. The proof inherits the gap of Adam's (Reddi, Kale and Kumar 2018).

Departures: none. The first official code kept g_prev by reference, so that ξ was 1/2 from the
second step on; this is the algorithm of the paper.

ξ lies in [1/2, 1): where gradients are small, as those of a mean loss are, ξ ≈ 1/2 and this is Adam
at half the learning rate (the claims measure it). Unlike Adam it is not invariant to the scale of
the loss, so not to summing in place of averaging, nor to clipping the gradient first. It holds one
array more than Adam. Use it where consecutive gradients differ by the order of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ..core.errors import InputError, check_fraction, check_nonnegative
from ..core.trees import cast_like, describe

__all__ = ["diffgrad", "scale_by_diffgrad"]

Friction = Callable[[Array, Array], Array]


class DiffGradState(NamedTuple):
    """Steps so far; the two moments and the previous gradient, each like the parameters, in at least float32."""

    count: Int[Array, ""]  # type: ignore[assignment]  # the name that Optax's tools look for
    mu: optax.Updates
    nu: optax.Updates
    previous: optax.Updates


def sigmoid_of_change(previous: Array, gradient: Array) -> Array:
    """The paper's friction coefficient ξ, elementwise in [1/2, 1)."""
    return jax.nn.sigmoid(jnp.abs(previous - gradient))


def scale_by_diffgrad(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, friction: Friction | None = None
) -> optax.GradientTransformation:
    """The update of diffGrad without the learning rate and its sign, to be chained.

    **Arguments:**
    - `b1`, `b2`: decay of the moments, in [0, 1); `eps`: added to the root, at least 0.
    - `friction`: `(previous gradient, gradient) -> coefficient`, elementwise; by default the paper's.

    **Raises:** `InputError` for numbers out of range; in `init`, for parameters that are not real.
    """
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    check_nonnegative("eps", eps)
    coefficient = sigmoid_of_change if friction is None else friction

    def init(params: PyTree) -> DiffGradState:
        for leaf in jax.tree.leaves(params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise InputError("params", describe(leaf), "real floating arrays: |g_prev − g| compares coordinates")
        mu, nu, previous = (jax.tree.map(lambda a: jnp.zeros_like(a, _wide(a)), params) for _ in range(3))
        return DiffGradState(jnp.zeros((), jnp.int32), mu, nu, previous)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, DiffGradState]:
        del params
        given, updates = updates, jax.tree.map(lambda g: g.astype(_wide(g)), updates)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = jnp.asarray(optax.safe_increment(state.count))
        corrected = (optax.tree.bias_correction(m, decay, count) for m, decay in ((mu, b1), (nu, b2)))
        scaled = jax.tree.map(
            lambda g, before, m, v: coefficient(before, g) * m / (jnp.sqrt(v) + eps),
            updates,
            state.previous,
            *corrected,
        )
        # g itself, but only once g_prev has been read: XLA copies g_prev otherwise.
        previous = jax.tree.map(lambda g, after: g + 0 * after, updates, scaled)
        return cast_like(scaled, given), DiffGradState(count, mu, nu, previous)

    return optax.GradientTransformation(init, update)


def _wide(leaf: Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def diffgrad(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    friction: Friction | None = None,
) -> optax.GradientTransformation:
    """diffGrad (Dubey et al. 2020, Algorithm 1) with the paper's defaults.

    **Arguments:** as for `scale_by_diffgrad`; `learning_rate` α, a number or a schedule; `weight_decay`
    adds that multiple of the parameters to the gradient, as the official code does. For decoupled
    decay chain `optax.add_decayed_weights` after `scale_by_diffgrad`.

    **Raises:** `InputError` for numbers out of range.
    """
    if not callable(learning_rate):
        check_nonnegative("learning_rate", learning_rate)
    check_nonnegative("weight_decay", weight_decay)
    # Without decay the update does not ask for the parameters.
    decayed = not isinstance(weight_decay, float | int) or weight_decay > 0
    return optax.chain(
        optax.add_decayed_weights(weight_decay) if decayed else optax.identity(),
        scale_by_diffgrad(b1, b2, eps, friction=friction),
        optax.scale_by_learning_rate(learning_rate),
    )
