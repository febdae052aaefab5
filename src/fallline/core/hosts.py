"""A run that several processes make together: what their hosts must agree on, and arrays that no one of them has whole.

Where the problem's arrays span processes, each process calls `minimize` with the same arguments, and the compiled loop
meets the others in its collectives. Between two chunks the hosts then decide as one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

__all__ = ["Hosts", "is_spread", "whole"]


def is_spread(leaf: Any) -> bool:
    """Whether an array lies on devices of several processes."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def whole(leaf: Any) -> Any:
    """An array as this host can read it; one that is cut among processes is gathered, by all of them together."""
    if not is_spread(leaf) or leaf.is_fully_replicated:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


class Hosts:
    """The processes that make a run: one, or all where an array of `parts` is spread over them."""

    def __init__(self, parts: PyTree):
        self.many = any(is_spread(leaf) for leaf in jax.tree.leaves(parts))

    @property
    def speaks(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return not self.many or jax.process_index() == 0

    def agree(self, *numbers: Any) -> tuple[Any, ...]:
        """Each number as the largest that any host has."""
        if not self.many:
            return numbers
        said = multihost_utils.process_allgather(np.asarray(numbers, np.float32))
        return tuple(np.max(said, axis=0).tolist())


def placed(array: Any, like: Any) -> Any:
    """A host's array where `like` is: every process has the whole of it."""
    if is_spread(like):
        host = np.asarray(array)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: host[index])
    return jnp.array(array)
