"""signSGD and Signum with majority vote: one bit a coordinate, in both directions.

    worker m:   v_m ← β v_m + (1 − β) g_m,   sends sign(v_m)
    server:     sends sign(Σ_m sign(v_m))
    all:        x ← x − η (sign(Σ_m sign(v_m)) + λ x)

β = 0 is signSGD, otherwise Signum: the momentum is the worker's, before the sign, and the decay λ x is outside of it.
Bits are really packed, 32 a word, and votes counted on the packed words. sign(0) = 1, and an even tie of votes is 1.

| paper | here           |
|-------|----------------|
| η     | `step_size`    |
| β     | `beta`         |
| λ     | `weight_decay` |

Source: J. Bernstein, J. Zhao, K. Azizzadenesheli and A. Anandkumar, *signSGD with Majority Vote is Communication
Efficient and Fault Tolerant*, ICLR 2019 (arXiv 1810.05291), Algorithm 1; J. Bernstein, Y.-X. Wang, K. Azizzadenesheli
and A. Anandkumar, *signSGD: Compressed Optimisation for Non-Convex Problems*, ICML 2018 (arXiv 1802.04434), for the
densities and the failure of a sign.

Guarantee: for noise in each coordinate that is unimodal and symmetric, with standard deviations σ, and a fraction
α < 1/2 of workers that invert their signs, N gradients of each in large batches:

    (1/K Σ_k E‖g_k‖₁)² ≤ 4/√N (‖σ‖₁/((1 − 2α)√M) + √(‖L‖₁ (f_0 − f*)))²      (constants from memory)

with η = √((f_0 − f*)/(‖L‖₁ K)). A fixed η ends in a box of its size: let it fall to converge to a point.

Departures: none. Zeros and ties are as in the authors' code; the paper leaves them open.

Use it where a link is slow or some workers are wrong. The vote is the sign of a median: where workers have unlike data
it goes to a point of median type, not to the minimizer of the mean. Workers that collude with knowledge of all others
are outside of the theorem. Clipping or scaling gradients changes nothing. A gradient that is exactly zero, such as a
ReLU unit's that is off, is a vote for +1 and moves the model all the same: there use smooth units or momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..core.errors import check_nonnegative, check_positive
from ..core.optimizer import optimizer
from ..parts.codecs import Signs
from .aggregators import Majority
from .round import Round
from .rules import Momentum, Step

__all__ = ["density", "sign_failure_bound", "sign_sgd_majority_vote", "signal_to_noise"]


def decayed_step(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """x ← x − η (u + λ x) for an update u."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate))


def sign_sgd_majority_vote(
    step_size: float | Callable[[Any], Any], beta: float = 0.9, *, weight_decay: float = 0.0, **options: Any
) -> Round:
    """signSGD or Signum with majority vote (Bernstein et al. 2019, Algorithm 1), a solver of `Sharded` problems.

    **Arguments:**
    - `step_size`: η, a number or an Optax schedule. Every coordinate moves by it in every round: as small as for Adam,
      1e-4 in the paper's training on ImageNet.
    - `beta`: β, at least 0 and below 1; 0 is signSGD.
    - `weight_decay`: λ.
    - `options`: attack, channel, blocks and exchange, as for `Round`; `SignFlip` and `RandomSigns` are the adversaries
      of the theorem.

    **Raises:** `InputError` for numbers out of range, and as `Round` does: for half of the workers or more Byzantine.
    """
    if not callable(step_size):
        check_positive("step_size", step_size)
    check_nonnegative("weight_decay", weight_decay)
    return Round(
        worker=Momentum(beta),
        uplink=Signs("none"),
        aggregator=Majority(),
        downlink=Signs("none"),
        server=Step(optimizer(decayed_step, learning_rate=step_size, weight_decay=weight_decay)),
        label="Signum" if beta else "signSGD",
        **options,
    )


def density(v: Float[Array, " d"]) -> Float[Array, ""]:
    """φ(v) = ‖v‖₁²/(d ‖v‖₂²), from 1/d for one entry that is not zero to 1 for entries of one size.

    Of gradient, noise and curvature it says which of signSGD and SGD has the better bound.
    """
    return jnp.sum(jnp.abs(v)) ** 2 / (v.size * jnp.sum(v**2))


def signal_to_noise(gradients: Float[Array, "samples d"]) -> Float[Array, " d"]:
    """S_i = |mean|/σ_i of stochastic gradients at one point, one a row; infinite where they all agree."""
    return jnp.abs(jnp.mean(gradients, axis=0)) / jnp.std(gradients, axis=0, ddof=1)


def sign_failure_bound(s: Float[Array, ...]) -> Float[Array, ...]:
    """A bound for the probability that a stochastic gradient has the wrong sign, at a signal-to-noise ratio S.

    2/(9 S²) where S > 2/√3, else 1/2 − S/(2√3): Gauss's inequality, for noise that is unimodal and symmetric.
    """
    s = jnp.asarray(s)
    small = s <= 2 / jnp.sqrt(3)
    return jnp.where(small, 0.5 - s / (2 * jnp.sqrt(3)), 2 / (9 * jnp.where(small, 1, s) ** 2))
