"""Error feedback: what a codec could not send is kept, and added to the next message.

    payload, memory = feedback.encode(v, memory, key=key)      Q[v + memory],  v + memory − Q[v + memory]

It goes around any codec, on either side of a link. Whether the step size is in `v` already (Stich et al.) or comes
after the aggregation (Tang et al.) is for whoever makes `v`: with a constant step size both are the same.

Sources: S. Stich, J.-B. Cordonnier and M. Jaggi, *Sparsified SGD with Memory* (2018), Algorithm 1; H. Tang et al.,
*DoubleSqueeze* (2019), Algorithm 1; F. Seide et al., *1-Bit Stochastic Gradient Descent* (2014).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..core.errors import InputError
from .codecs import Codec

__all__ = ["ErrorFeedback"]


class ErrorFeedback(eqx.Module):
    """A codec with a memory of what it has left out.

    **Arguments:** `codec` — any codec of `fallline.parts.codecs`.

    **Raises:** `InputError` where it is none.
    """

    codec: Codec

    def __init__(self, codec: Codec):
        if not isinstance(codec, Codec):
            got = f"the class {codec.__name__}" if isinstance(codec, type) else type(codec).__name__
            raise InputError("codec", got, "a codec such as TopK(density=0.01) or Signs()")
        self.codec = codec

    def init(self, n: int, dtype: Any = jnp.float32) -> Float[Array, " n"]:
        """The memory before the first message; at least 32 bits wide, as less loses the small remainders."""
        return jnp.zeros(n, jnp.promote_types(dtype, jnp.float32))

    def encode(
        self, v: Float[Array, " n"], memory: Float[Array, " n"], *, key: Array | None = None
    ) -> tuple[PyTree, Float[Array, " n"]]:
        """What crosses the wire for `v`, and the new memory."""
        return self.codec.encode_with_residual(v + memory, key=key)

    def decode(self, payload: PyTree, n: int) -> Float[Array, " n"]:
        """What a payload says."""
        return self.codec.decode(payload, n)
