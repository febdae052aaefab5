"""Control flow that leaves large arrays where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ..core import trees

__all__ = ["in_place"]

S = TypeVar("S")


def in_place(flag: Bool[Array, ""], change: Callable[[S], S], state: S) -> S:
    """`change(state)` where `flag`, else `state`.

    A loop that runs at most once: it changes its carry where it lies, while `cond` copies whatever a branch
    hands through. `change` must keep shapes; dtypes are cast back to those of `state`.
    """

    def body(carry: tuple[Any, S]) -> tuple[Any, S]:
        return jnp.bool_(False), trees.cast_like(change(carry[1]), carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], body, (jnp.asarray(flag), state))[1]
