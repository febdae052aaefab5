"""Majority votes on packed bits: 32 votes of one voter are one word, and all of them are counted at once."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from ..core.errors import InputError

__all__ = ["majority"]


def majority(votes: UInt32[Array, "voters words"]) -> UInt32[Array, " words"]:
    """For each bit whether at least half of the voters have it set: an even tie counts as set.

    The count of each bit is kept in planes, one word for each binary digit; adding a voter is a carry through them.
    Every vote is read once, and nothing is unpacked.

    **Raises:** `InputError` for no voters, or words that are not unsigned 32-bit integers of shape (voters, words).
    """
    if votes.ndim != 2 or votes.dtype != jnp.uint32 or not votes.shape[0]:
        raise InputError("votes", f"{votes.dtype}{list(votes.shape)}", "uint32 of shape (voters, words), voters ≥ 1")
    count = votes.shape[0]
    planes: list[Array] = []
    for voter in range(count):
        carry = votes[voter]
        for digit, plane in enumerate(planes):
            planes[digit], carry = plane ^ carry, plane & carry
        if (voter + 1).bit_length() > len(planes):
            planes.append(carry)
    return _at_least(planes, -(-count // 2))


def _at_least(planes: list[Array], number: int) -> UInt32[Array, " words"]:
    """Where the count in the planes is at least `number`: digit by digit, the largest first."""
    equal, above = ~jnp.zeros_like(planes[0]), jnp.zeros_like(planes[0])
    for digit in reversed(range(len(planes))):
        if number >> digit & 1:
            equal = equal & planes[digit]
        else:
            above = above | (equal & planes[digit])
    return above | equal
