"""Mem-SGD: stochastic gradient descent that sends k of d coordinates, and remembers the others.

    worker w:   v = m_w + η_t ∇f_i(x),   g_w = comp_k(v),   m_w ← v − g_w,   i uniformly at random
    memory:     x ← x − Σ_w g_w
    result:     x̄_T = Σ_{t<T} (t + a)² x_t / Σ_{t<T} (t + a)²,   with η_t = γ / (λ (t + a))

One worker is the sequential method. Of several each adds its own update to a shared x: their sum, not their mean, so
that a round of W workers is W steps. What they do without locks is `reads=StaleReads(D)`: each worker sees the x of 0
to D rounds ago. What is remembered are steps, with the η_t of their time in them.

| paper   | here                                 |
|---------|--------------------------------------|
| comp_k  | `codec`                              |
| γ, λ, a | `gamma`, `strong_convexity`, `shift` |

Source: S. U. Stich, J.-B. Cordonnier and M. Jaggi, *Sparsified SGD with Memory*, NeurIPS 2018 (arXiv 1809.07599),
Algorithms 1 and 2; γ = 2 after the authors' code, whose λ is the weight of the ℓ2 penalty.

Guarantee: for a λ-strongly convex mean of L-smooth functions with gradients of mean square at most G², γ = 8 and a of
order d/k, E f(x̄_T) − f* is O(G²/(λT)) as soon as T = Ω(d/k √(L/λ)): the rate of plain SGD, whatever k. The memory has
E‖m_t‖² = O(η_t² (d/k)² G²). For any codec x_t − Σ_w m_w = x_0 − Σ η_s ∇f_i(x_s).

Departures: an index has 32 bits on the wire, not ⌈log₂ d⌉. Examples are drawn with replacement, as in the theorem; the
authors' code shuffles them. The parallel method runs in rounds, with delays of whole rounds. Ultra-sparsification
(k < 1) is not here: an array of fixed size would still be sent.

Use it for strongly convex finite sums where sending is dear. With a shift far below d/k the memory is still full of the
first steps, which are large, when the later ones are small; with one far above it the first steps are tiny. For another
step size, or without the average, build the `Round`: it is the few lines of `mem_sgd`.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import optax
from jaxtyping import Array, Float, Int

from ..core.errors import InputError, check_positive
from ..parts.averaging import Averaged
from ..parts.codecs import Codec, Plain, TopK
from ..parts.feedback import ErrorFeedback
from .aggregators import Total
from .round import Round
from .rules import Gradient, Step

__all__ = ["ShiftedDecay", "mem_sgd"]


class ShiftedDecay(eqx.Module):
    """The schedule η_t = γ / (λ (t + a)), t from 0; γ, λ and a are numbers that never recompile.

    **Raises:** `InputError` for γ or λ that is not positive, and for a shift below 1.
    """

    gamma: Any
    strong_convexity: Any
    shift: Any

    def __check_init__(self) -> None:
        check_positive("gamma", self.gamma)
        check_positive("strong_convexity", self.strong_convexity)
        check_positive("shift", self.shift)
        if self.shift < 1:
            raise InputError("shift", self.shift, "at least 1, which is no shift, and for the theory of order d/k")

    def __call__(self, t: Int[Array, ""]) -> Float[Array, ""]:
        return self.gamma / (self.strong_convexity * (t + self.shift))


def mem_sgd(
    codec: Codec | None = None, *, strong_convexity: float, shift: float, gamma: float = 2.0, **options: Any
) -> Averaged:
    """Mem-SGD (Stich et al. 2018, Algorithms 1 and 2), a solver of `Sharded` problems.

    **Arguments:**
    - `codec`: comp_k, a contraction; None is `TopK(1)`. `RandomK` is the paper's random-k, not rescaled.
    - `strong_convexity`: λ, of the objective: the weight of its ℓ2 penalty (λ/2)‖x‖².
    - `shift`: a; the theory has (α + 2) d/k with α > 4; the authors' experiments d (dense data) and 10 d/k (sparse).
    - `gamma`: γ; the theory has 8.
    - `options`: `reads`, attack, channel, blocks, as for `Round`.

    **Returns:** an `Averaged` solver: `x` is the average, `state.inner.x` the last iterate, `state.inner` the state of
    the round.

    **Raises:** `InputError` for numbers out of range, a codec that leaves nothing to remember, and as `Round` does.
    """
    if isinstance(codec, Plain):
        raise InputError("codec", "Plain()", "one that leaves something to remember, such as TopK(1) or RandomK(1)")
    step_size = ShiftedDecay(gamma, strong_convexity, shift)
    return Averaged(
        Round(
            worker=Gradient(step_size),
            uplink=ErrorFeedback(TopK(1) if codec is None else codec),
            aggregator=Total(),
            downlink=None,
            server=Step(optax.sgd, learning_rate=1.0),
            label="Mem-SGD",
            **options,
        ),
        power=2.0,
        shift=shift,
    )
