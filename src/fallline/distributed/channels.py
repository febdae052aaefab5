"""Channels: what becomes of the payloads of a worker on their way, by a law with a seed.

    payload, memory = channel.carry(payload, memory, key)

A channel acts on each block of each worker alone. It changes what arrives and when, never the account: what was sent
was sent. A sender with error feedback does not learn of it.

| channel           | what arrives                                                                           |
|-------------------|----------------------------------------------------------------------------------------|
| `Drops`           | with probability p not this payload but the last one that did arrive (the first does)  |
| `Delays`          | the payload of `depth` rounds ago; nothing, a message of zeros, in the first rounds     |
| `Corrupts`        | each 32-bit word with probability p with one of its bits flipped                       |

A model that workers read late is `StaleReads`: not of payloads, it stands at the beginning of a round.
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..core.errors import check_count, check_fraction
from .wire import from_words, to_words

__all__ = ["Channel", "Corrupts", "Delays", "Drops", "StaleReads"]


class Channel(eqx.Module):
    """`random` says that it draws."""

    random: ClassVar[bool] = False

    def init(self, nothing: PyTree) -> PyTree:
        """Its memory; `nothing` is the payload of a message of zeros."""
        return None

    def carry(self, payload: PyTree, memory: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        """What arrives, and the new memory."""
        raise NotImplementedError


class Drops(Channel):
    """Payloads that never arrive: the receiver takes the last one that did.

    **Arguments:** `probability` — of each block of each worker in each round, in [0, 1).
    """

    random: ClassVar[bool] = True

    probability: Any

    def __init__(self, probability: float):
        check_fraction("probability", probability)
        self.probability = probability

    def init(self, nothing: PyTree) -> PyTree:
        return jnp.bool_(False), nothing

    def carry(self, payload: PyTree, memory: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        arrived_before, last = memory
        lost = arrived_before & jax.random.bernoulli(key, self.probability)
        arrives = jax.tree.map(lambda old, new: jnp.where(lost, old, new), last, payload)
        return arrives, (jnp.bool_(True), arrives)


class Delays(Channel):
    """A line of known depth: a payload arrives `depth` rounds later. Those under way at the end are lost."""

    depth: int = eqx.field(static=True)

    def __init__(self, depth: int):
        check_count("depth", depth, 1)
        self.depth = int(depth)

    def init(self, nothing: PyTree) -> PyTree:
        line = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.depth, *jnp.shape(a))), nothing)
        return jnp.int32(0), line

    def carry(self, payload: PyTree, memory: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        at, line = memory
        arrives = jax.tree.map(lambda a: a[at], line)
        line = jax.tree.map(lambda a, new: a.at[at].set(new), line, payload)
        return arrives, ((at + 1) % self.depth, line)


class Corrupts(Channel):
    """Words with a flipped bit: numbers may become anything, NaN too.

    **Arguments:** `probability` — of each word of 32 bits, in [0, 1).
    """

    random: ClassVar[bool] = True

    probability: Any

    def __init__(self, probability: float):
        check_fraction("probability", probability)
        self.probability = probability

    def carry(self, payload: PyTree, memory: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        words = to_words(payload)
        which, where = jax.random.split(key)
        hit = jax.random.bernoulli(which, self.probability, words.shape)
        bit = jnp.uint32(1) << jax.random.randint(where, words.shape, 0, 32).astype(jnp.uint32)
        return from_words(jnp.where(hit, words ^ bit, words), payload), memory


class StaleReads(eqx.Module):
    """Workers that read the model late: each a model of 0 to `most` rounds ago, uniformly at random.

    What several processors do that write to one memory without locks (Stich et al. 2018, Section 4: a read may be
    `most` updates old). In the first rounds the oldest model is the first one.
    """

    most: int = eqx.field(static=True)

    def __init__(self, most: int):
        check_count("most", most, 1)
        self.most = int(most)

    def init(self, x: PyTree) -> PyTree:
        """The models of the last rounds, the newest at place 0."""
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.most + 1, *jnp.shape(a))), x)

    def push(self, line: PyTree, x: PyTree) -> PyTree:
        """With the new model in front."""
        return jax.tree.map(lambda a, new: jnp.concatenate([new[None], a[:-1]]), line, x)

    def read(self, line: PyTree, key: Array) -> PyTree:
        """What a worker sees."""
        age = jax.random.randint(key, (), 0, self.most + 1)
        return jax.tree.map(lambda a: a[age], line)
