"""Aggregators: what the messages of n workers become at the receiver.

    aggregator(messages)             (n, m) to (m,)
    aggregator.of_payloads(...)      the same from what crossed the wire, where something shorter than decoding is known

| aggregator           | the result, in each coordinate                                    | tolerates          |
|----------------------|-------------------------------------------------------------------|--------------------|
| `Mean`, `Total`      | mean, sum                                                         | nothing            |
| `Median`             | the median; of an even number the mean of the two in the middle   | fewer than n/2     |
| `TrimmedMean`        | the mean without the b largest and the b smallest                 | b, for 2b < n      |
| `Majority`           | the sign that more workers have                                   | fewer than n/2     |
| `IterativeFiltering` | not by coordinate: a mean with weights, see there                 | fewer than n/2     |

A robust rule takes a message with NaN as one Byzantine vote. Each is usable alone, on any stacked array.

Sources: D. Yin, Y. Chen, K. Ramchandran and P. Bartlett, *Byzantine-Robust Distributed Learning* (2018), Definitions 1
and 2 (median, trimmed mean); D. Yin et al., *Defending Against Saddle Point Attack* (2019), and J. Steinhardt,
M. Charikar and G. Valiant, *Resilience* (2018) (filtering); J. Bernstein et al. (2019), Algorithm 1 (majority).
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..core.errors import InputError, check_choice, check_count, check_positive
from ..parts.codecs import Codec, Signs
from ..parts.sorting import median, trimmed_mean
from ..parts.voting import majority
from .workers import in_order

__all__ = ["Aggregator", "IterativeFiltering", "Majority", "Mean", "Median", "Total", "TrimmedMean"]


class Aggregator(eqx.Module):
    """`robust` says that a few messages may hold anything; `coordinatewise` that coordinates do not see each other."""

    robust: ClassVar[bool] = True
    coordinatewise: ClassVar[bool] = True

    def __call__(self, messages: Float[Array, "n m"]) -> Float[Array, " m"]:
        """The aggregate of n messages."""
        raise NotImplementedError

    def of_payloads(self, payloads: PyTree, codec: Codec, m: int) -> Float[Array, " m"]:
        """The aggregate of n payloads, stacked."""
        return self(jax.vmap(lambda payload: codec.decode(payload, m))(payloads))

    def tolerates(self, n: int) -> tuple[int, str] | None:
        """How many Byzantine workers of n, and the condition in words; None where it says nothing of them."""
        return (n - 1) // 2, "fewer than half of the workers"

    def check(self, n: int) -> None:
        """Refuse a number of workers with which the rule cannot work."""


class Mean(Aggregator):
    """The mean: one Byzantine worker moves it anywhere."""

    robust: ClassVar[bool] = False

    def __call__(self, messages: Float[Array, "n m"]) -> Float[Array, " m"]:
        return in_order(jnp.asarray(messages)) / len(messages)

    def of_payloads(self, payloads: PyTree, codec: Codec, m: int) -> Float[Array, " m"]:
        return codec.total(payloads, m) / len(jax.tree.leaves(payloads)[0])

    def tolerates(self, n: int) -> tuple[int, str] | None:
        return None


class Total(Mean):
    """The sum."""

    def __call__(self, messages: Float[Array, "n m"]) -> Float[Array, " m"]:
        return in_order(jnp.asarray(messages))

    def of_payloads(self, payloads: PyTree, codec: Codec, m: int) -> Float[Array, " m"]:
        return codec.total(payloads, m)


class Median(Aggregator):
    """The median of each coordinate."""

    def __call__(self, messages: Float[Array, "n m"]) -> Float[Array, " m"]:
        return median(messages)


class TrimmedMean(Aggregator):
    """The mean of each coordinate without its `cut` largest and its `cut` smallest entries.

    **Arguments:** `cut` — b, the entries cut from each side: at least as many as there are Byzantine workers.
    """

    cut: int = eqx.field(static=True)

    def __init__(self, cut: int):
        check_count("cut", cut, 0)
        self.cut = int(cut)

    def __call__(self, messages: Float[Array, "n m"]) -> Float[Array, " m"]:
        return trimmed_mean(messages, self.cut)

    def tolerates(self, n: int) -> tuple[int, str] | None:
        return self.cut, f"at most cut = {self.cut} workers"

    def check(self, n: int) -> None:
        if 2 * self.cut >= n:
            raise InputError("cut", self.cut, f"less than half of the {n} workers (2 cut < n), so that some are left")


class Majority(Aggregator):
    """The sign that more workers have: ±1.

    **Arguments:** `tie` — what an even tie of signs gives: `"plus"`, as on packed bits, or `"zero"`. A message that is
    zero in a coordinate has no vote there, unless its codec sends one.
    """

    tie: str = eqx.field(static=True)

    def __init__(self, tie: str = "plus"):
        check_choice("tie", tie, ("plus", "zero"))
        self.tie = tie

    def __call__(self, messages: Float[Array, "n m"]) -> Float[Array, " m"]:
        votes = jnp.where(jnp.isnan(messages), -1, jnp.sign(messages)).astype(jnp.int32)
        ahead = jnp.sum(votes, axis=0)
        signs = jnp.sign(ahead) if self.tie == "zero" else jnp.where(ahead >= 0, 1, -1)
        return signs.astype(messages.dtype)

    def of_payloads(self, payloads: PyTree, codec: Codec, m: int) -> Float[Array, " m"]:
        if self.tie == "plus" and isinstance(codec, Signs) and codec.scale == "none":
            return codec.decode((majority(payloads[0]),), m)
        return super().of_payloads(payloads, codec, m)


class IterativeFiltering(Aggregator):
    """The mean with weights that are taken from whoever stands out along the direction of largest variance.

        repeat:  μ = Σ c_i g_i / Σ c_i,   Σ = Σ c_i (g_i − μ)(g_i − μ)ᵀ / Σ c_i,   (λ, v) its top eigenpair
                 stop if λ ≤ threshold;   τ_i = ⟨v, g_i − μ⟩²,   c_i ← c_i (1 − τ_i / max_{c_j > 0} τ_j)

    At least one weight becomes zero at each pass, so that there are fewer than n; a pass that would leave nobody is
    not made. The eigenpair comes from the n × n Gram matrix, and the messages are read a few times, however many
    passes there are.

    **Arguments:** `threshold` — a bound for the variance of honest messages along any direction, C σ².
    """

    coordinatewise: ClassVar[bool] = False

    threshold: Any

    def __init__(self, threshold: float):
        check_positive("threshold", threshold)
        self.threshold = threshold

    def __call__(self, messages: Float[Array, "n m"]) -> Float[Array, " m"]:
        wide = messages.astype(jnp.promote_types(messages.dtype, jnp.float32))
        sound = jnp.all(jnp.isfinite(wide), axis=1)
        wide = jnp.where(sound[:, None], wide, 0)
        middle = wide[_central(_gram(wide), sound)]
        centered = jnp.where(sound[:, None], wide - middle, 0)
        gram = _gram(centered)
        sound = sound & jnp.isfinite(16 * jnp.diagonal(gram))  # what overflows in the sums below is as good as infinite
        centered = jnp.where(sound[:, None], centered, 0)
        weights = self._weights(jnp.where(sound[:, None] & sound, gram, 0), sound.astype(wide.dtype))
        mean = jnp.dot(weights / jnp.sum(weights), centered, precision="highest")
        return (middle + mean).astype(messages.dtype)

    def _weights(self, gram: Float[Array, "n n"], weights: Float[Array, " n"]) -> Float[Array, " n"]:
        def top(weights: Array) -> tuple[Array, Array]:
            """λ, and √τ up to a factor: with K the Gram matrix of g_i − μ, Σ has the eigenvalues of √c K √c / Σ c."""
            share = weights / jnp.sum(weights)
            shift = gram @ share
            inner = gram - shift[:, None] - shift[None] + share @ shift
            root = jnp.sqrt(share)
            values, vectors = jnp.linalg.eigh(root[:, None] * inner * root[None])
            return values[-1], jnp.where(weights > 0, jnp.abs(inner @ (root * vectors[:, -1])), 0)

        def going(carry: tuple[Array, Array, Array]) -> Array:
            return carry[1] > self.threshold

        def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            weights, _, out = carry
            most = jnp.max(out)
            fewer = jnp.where(out >= most, 0, weights * (1 - (out / most) ** 2))
            left = jnp.any(fewer > 0)
            weights = jnp.where(left, fewer, weights)
            value, out = top(weights)
            return weights, jnp.where(left, value, 0), out

        with jax.default_matmul_precision("highest"):
            return jax.lax.while_loop(going, body, (weights, *top(weights)))[0]


def _gram(rows: Float[Array, "n m"]) -> Float[Array, "n n"]:
    return jnp.dot(rows, rows.T, precision="highest")


def _central(gram: Float[Array, "n n"], sound: Bool[Array, " n"]) -> Int[Array, ""]:
    """The message from which half of the others are nearest: with it for origin no large common part is cancelled."""
    squares = jnp.diagonal(gram)
    apart = squares[:, None] + squares - 2 * gram
    apart = jnp.where(sound[:, None] & sound & jnp.isfinite(apart), apart, jnp.inf)
    return jnp.argmin(jnp.sort(apart, axis=1)[:, len(gram) // 2])
