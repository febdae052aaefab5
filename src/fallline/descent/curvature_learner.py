"""A learning rate and a momentum learned on the fly from the spectrum of the training batch's Hessian.

Heavy-ball SGD whose pair (α, ρ) is measured again every k steps (an epoch, say) by m steps of stochastic Lanczos
quadrature from a vector of random signs: Ritz values θ_i with weights w_i, which sum to 1.

    λ₁ = max θ_i,   λ_b = the positive θ_i of largest weight, at least λ₁/κ_max
    α = c (2/(√λ₁ + √λ_b))²,   ρ = ((√λ₁ − √λ_b)/(√λ₁ + √λ_b))²
    each step:  buf ← ρ buf + g,   x ← x − α buf

Where λ₁ is not positive or not finite the previous pair stays. c = 1 is Polyak's pair for the quadratic with spectrum
in [λ_b, λ₁].

| symbol    | here                         |
|-----------|------------------------------|
| λ₁, λ_b   | `largest`, `bulk`            |
| α, ρ      | `learning_rate`, `momentum`  |
| m         | `steps`                      |
| c, κ_max  | `safety`, `kappa_max` (ours) |

Source: D. Granziol, S. Zohren and S. Roberts, *Learning Rates as a Function of Batch Size: A Random Matrix Theory
Approach to Neural Network Training*, JMLR 2022 (arXiv 2006.09092), the learner. Reconstructed: that it sets Polyak's
pair from a Lanczos spectrum is from memory, and the choice of λ_b and how often it measures are ours.

Guarantee: on a quadratic with spectrum in [λ_b, λ₁] and without noise, the fastest linear rate of heavy ball at c = 1,
and a stable pair at every c ≤ 1. Nothing is claimed of other losses.

Departures: κ_max and c. With tiny λ_b the plain pair goes to 4/λ₁ with ρ → 1, which diverges on noisy losses that are
not quadratic: on the digits c = 1 and 1/2 did, 1/4 did not.

Use it for a first run on a new problem, without a grid; a tuned pair ends lower. Measure on the batch size that trains:
the curvature of a larger batch is smaller, and the step from it too large. The Hessian may be indefinite: its negative
side is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_choice, check_fraction, check_nonnegative, check_positive, is_traced
from ..parts.curvature import Quadrature, lanczos_quadrature

__all__ = ["CurvatureLearnerState", "PolyakPair", "curvature_learner", "edge_and_bulk", "polyak_pair", "refresh"]

Product = Callable[[PyTree], PyTree]

RULES = ("polyak", "inverse")


class PolyakPair(NamedTuple):
    """A learning rate and a momentum for heavy ball. Real scalars."""

    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]


def polyak_pair(largest: Any, bulk: Any, safety: Any = 0.25) -> PolyakPair:
    """Heavy ball's pair for curvatures between `bulk` λ_b > 0 and `largest` λ₁ ≥ λ_b, its rate times `safety`.

    **Raises:** `InputError` for curvatures that are not positive or in the wrong order, or `safety` outside (0, 1].
    """
    check_positive("largest", largest)
    check_positive("bulk", bulk)
    if not is_traced((largest, bulk)) and bulk > largest:
        raise InputError("bulk", bulk, f"at most largest, {largest}")
    _check_safety(safety)
    dtype = jnp.result_type(jnp.float32, largest, bulk)
    return _pair(jnp.asarray(largest, dtype), jnp.asarray(bulk, dtype), safety)


def _pair(largest: Array, bulk: Array, safety: Any) -> PolyakPair:
    top, low = jnp.sqrt(largest), jnp.sqrt(bulk)
    return PolyakPair(safety * (2 / (top + low)) ** 2, ((top - low) / (top + low)) ** 2)


def edge_and_bulk(found: Quadrature, kappa_max: Any = 100.0) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """λ₁ and λ_b of a quadrature; of several probes, the nodes of all. λ_b is NaN where no node is positive."""
    _check_kappa_max(kappa_max)
    nodes, weights = found.nodes.ravel(), found.weights.ravel()
    largest = jnp.max(nodes)
    heaviest = jnp.argmax(jnp.where(nodes > 0, weights, -1))
    bulk = jnp.where(nodes[heaviest] > 0, nodes[heaviest], jnp.nan)
    return largest, jnp.maximum(bulk, largest / kappa_max)


class CurvatureLearnerState(NamedTuple):
    """The pair that the next step uses, and the momentum's buffer like the parameters, in at least float32.

    `largest`, `bulk`: λ₁ and λ_b as last measured, also where the pair was kept for them; 0 before the first `refresh`.
    """

    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    largest: Float[Array, ""]
    bulk: Float[Array, ""]
    trace: optax.Updates


def curvature_learner(learning_rate: Any = 0.01, momentum: Any = 0.0) -> optax.GradientTransformation:
    """Heavy ball whose pair is part of its state; `refresh` learns it.

        from fallline.parts.curvature import hessian

        update = curvature_learner()
        state = update.init(params)
        for batch in batches:
            if step % every == 0:  # begin with it
                state = refresh(state, hessian(loss, params, batch), key, params)
            updates, state = update.update(grad(loss)(params, batch), state)

    **Arguments:** `learning_rate`, `momentum`: the pair until the first `refresh` (our choice, not the paper's); they
    are read by `init` alone, so that a number that `optax.inject_hyperparams` changes later has no effect: the state
    holds the pair.

    **Raises:** `InputError` for a negative rate, or a momentum outside [0, 1); in `init`, for parameters not real.
    """
    check_nonnegative("learning_rate", learning_rate)
    check_fraction("momentum", momentum)

    def init(params: PyTree) -> CurvatureLearnerState:
        for leaf in jax.tree.leaves(params):
            if not trees.is_floating(leaf) or jnp.iscomplexobj(leaf):
                raise InputError("params", trees.describe(leaf), "real floating arrays")
        dtype = trees.real_dtype(params)
        rate, decay = jnp.asarray(learning_rate, dtype), jnp.asarray(momentum, dtype)
        trace = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.promote_types(a.dtype, jnp.float32)), params)
        return CurvatureLearnerState(rate, decay, jnp.zeros((), dtype), jnp.zeros((), dtype), trace)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, CurvatureLearnerState]:
        del params
        trace = jax.tree.map(lambda g, b: (state.momentum * b + g).astype(b.dtype), updates, state.trace)
        steps = jax.tree.map(lambda b: -state.learning_rate * b, trace)
        return trees.cast_like(steps, updates), state._replace(trace=trace)

    return optax.GradientTransformation(init, update)


def refresh(
    state: PyTree,
    product: Product,
    key: Array,
    params: PyTree | None = None,
    *,
    steps: int = 10,
    safety: Any = 0.25,
    kappa_max: Any = 100.0,
    rule: str = "polyak",
) -> PyTree:
    """The same state with the pair learned anew; the buffer stays. Pure and traceable.

    **Arguments:**
    - `state`: of `curvature_learner`, or the state of a chain that holds one; `key`: new at every call.
    - `product`: `v -> H v` on the present batch, of the size that trains: `hessian(loss, params, batch)`.
    - `params`: whose shapes and dtypes the product takes; by default those of the buffer.
    - `steps` m: products taken, fewer where there are fewer parameters; `kappa_max`: the largest λ₁/λ_b, at least 1.
    - `safety`: multiplies the rate, in (0, 1].
    - `rule`: `"polyak"`, or `"inverse"`: the rate 1/λ₁ as it is, and the momentum kept.

    **Raises:** `InputError` for `steps` below 1, `kappa_max` below 1, `safety` outside (0, 1], another rule, or a
    state that holds no learner, or several.
    """
    check_choice("rule", rule, RULES)
    _check_safety(safety)
    _check_kappa_max(kappa_max)
    leaves, structure = jax.tree.flatten(state, is_leaf=_is_learner)
    at = [i for i, leaf in enumerate(leaves) if _is_learner(leaf)]
    if len(at) != 1:
        raise InputError(
            "state", f"a state with {len(at)} learners", "the state of one curvature_learner, or a chain's"
        )
    learner = leaves[at[0]]
    like = learner.trace if params is None else params
    taken = min(steps, trees.flat_size(like)) if steps >= 1 else steps  # the quadrature refuses what is below 1
    largest, bulk = edge_and_bulk(lanczos_quadrature(product, like, key, taken), kappa_max)
    pair = _pair(largest, bulk, safety)
    if rule == "inverse":
        pair = PolyakPair(1 / largest, learner.momentum)
    usable = jnp.isfinite(largest) & (largest > 0)
    measured = {"learning_rate": pair.learning_rate, "momentum": pair.momentum}
    kept = {name: jnp.where(usable, new, getattr(learner, name)) for name, new in measured.items()}
    kept |= {"largest": largest, "bulk": bulk}
    leaves[at[0]] = learner._replace(**{k: v.astype(learner.learning_rate.dtype) for k, v in kept.items()})
    return jax.tree.unflatten(structure, leaves)


def _is_learner(node: Any) -> bool:
    return isinstance(node, CurvatureLearnerState)


def _check_safety(safety: Any) -> None:
    check_positive("safety", safety)
    if not is_traced(safety) and safety > 1:
        raise InputError("safety", safety, "a number above 0 and at most 1")


def _check_kappa_max(kappa_max: Any) -> None:
    check_positive("kappa_max", kappa_max)
    if not is_traced(kappa_max) and kappa_max < 1:
        raise InputError("kappa_max", kappa_max, "a finite number of at least 1")
