"""Payloads as one buffer of 32-bit words, so that one collective carries all of a payload."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

__all__ = ["from_words", "to_words", "words_of"]


def _flat(a: Array) -> Array:
    """One array as words; numbers of 8 or 16 bits are filled up to whole words."""
    a = jnp.ravel(a)
    if a.dtype == jnp.bool_:
        a = a.astype(jnp.uint8)
    size = a.dtype.itemsize
    if size >= 4:
        return jax.lax.bitcast_convert_type(a, jnp.uint32).reshape(-1)
    a = jnp.pad(a, (0, -a.size % (4 // size)))
    return jax.lax.bitcast_convert_type(a.reshape(-1, 4 // size), jnp.uint32).reshape(-1)


def words_of(leaf: Any) -> int:
    """How many words an array takes."""
    return -(-leaf.size * leaf.dtype.itemsize // 4)


def to_words(payload: PyTree) -> UInt32[Array, " words"]:
    """All arrays of a payload, one after another."""
    parts = [_flat(leaf) for leaf in jax.tree.leaves(payload)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def from_words(words: UInt32[Array, " words"], like: PyTree) -> PyTree:
    """The payload again; `like` has its shapes and dtypes."""
    leaves, tree = jax.tree.flatten(like)
    out, at = [], 0
    for leaf in leaves:
        piece = words[at : at + words_of(leaf)]
        at += words_of(leaf)
        dtype = jnp.uint8 if leaf.dtype == jnp.bool_ else leaf.dtype
        size = jnp.dtype(dtype).itemsize
        if size > 4:
            piece = piece.reshape(-1, size // 4)
        numbers = jax.lax.bitcast_convert_type(piece, dtype).reshape(-1)[: leaf.size]
        out.append(numbers.reshape(leaf.shape).astype(leaf.dtype))
    return jax.tree.unflatten(tree, out)
