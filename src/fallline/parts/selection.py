"""Order statistics without sorting: a threshold above which a given number of entries lie."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = ["threshold_of_largest"]

_INTEGERS = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


def threshold_of_largest(a: Array, k: Any, axis: int) -> Array:
    """A number t for each line along `axis`: its entries of magnitude at least t are its k largest, with all ties.

    Bisection on the bits of the magnitudes, which are ordered as these are: about 20 counts where sorting is a
    hundred times slower; `k` is dynamic, at least 1. NaN counts as larger than everything.
    """
    integer = _INTEGERS[a.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(jnp.abs(a), integer)
    high = jnp.max(bits, axis=axis, keepdims=True) + 1

    # Always at least k entries are at or above `low`, and fewer at or above `high`.
    def halve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, found = carry
        middle = low + (high - low) // 2
        count = jnp.sum(bits >= middle, axis=axis, keepdims=True, dtype=jnp.int32)
        above = ~found & (count >= k)
        low = jnp.where(above, middle, low)
        high = jnp.where(found | above, high, middle)
        return low, high, found | (count == k) | (high - low <= 1)

    carry = (jnp.zeros_like(high), high, high <= 1)
    low = jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), halve, carry)[0]
    return jax.lax.bitcast_convert_type(low, a.dtype)
