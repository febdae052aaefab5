"""Codecs: what a vector becomes on the wire, and what it is when it arrives.

    payload = codec.encode(v, key=key)      arrays, packed: their bytes are what is sent
    codec.decode(payload, n)                a vector of n numbers
    codec.total(payloads, n)                the sum of what many payloads say

| codec      | payload                          | decoded                                              |
|------------|----------------------------------|------------------------------------------------------|
| `Plain`    | v                                | v                                                    |
| `TopK`     | k indices, k values              | the k entries of largest magnitude; ties: lower index |
| `RandomK`  | k indices, k values              | k entries, uniformly without replacement             |
| `Signs`    | n bits, and a scale              | scale · sign(v), sign(0) = 1                         |
| `QSGD`     | ⌈log₂(2s + 1)⌉ bits each, a norm | ‖v‖ sign(v) ξ/s, ξ the stochastic rounding of s|v|/‖v‖ |
| `Split`    | one of another codec for each piece | piece by piece                                    |

Numbers of b bits lie one after another in words of 32: bits j b to (j + 1) b of word w belong to entry w 32/b + j.

Sources: S. Stich, J.-B. Cordonnier and M. Jaggi, *Sparsified SGD with Memory* (2018), Definition 2.1 (top-k, random-k);
H. Tang et al., *DoubleSqueeze* (2019), Section 5 (1-bit with the ℓ2 scale); S. P. Karimireddy et al., *Error Feedback
Fixes SignSGD* (2019), Section 4 (the ℓ1 scale, which is always a contraction); D. Alistarh et al., *QSGD* (2017),
Section 3.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, UInt32

from ..core import trees
from ..core.errors import InputError, check_choice, check_count
from ..core.setup import check_key

__all__ = ["QSGD", "Codec", "Plain", "RandomK", "Signs", "Split", "TopK", "largest", "pack", "unpack"]

_WORD = 32
_UNROLLED = 64  # payloads that one fused pass sums
_BLOCK = 32  # entries of which the first level of `largest` keeps the maximum
_INTEGERS = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


class Codec(eqx.Module):
    """`random` says that `encode` needs a key, or a seed."""

    random: ClassVar[bool] = False

    def encode(self, v: Float[Array, " n"], *, key: Array | None = None) -> PyTree:
        """What crosses the wire."""
        raise NotImplementedError

    def decode(self, payload: PyTree, n: int) -> Float[Array, " n"]:
        """What it says, a vector of n numbers."""
        raise NotImplementedError

    def encode_with_residual(
        self, v: Float[Array, " n"], *, key: Array | None = None
    ) -> tuple[PyTree, Float[Array, " n"]]:
        """The payload, and what it leaves out, v − decode(payload)."""
        payload = self.encode(v, key=key)
        return payload, v - self.decode(payload, v.shape[0])

    def total(self, payloads: PyTree, n: int) -> Float[Array, " n"]:
        """The sum, in order, of what stacked payloads say."""
        count = jax.tree.leaves(payloads)[0].shape[0]

        def one(i: Any) -> Array:
            return self.decode(jax.tree.map(lambda a: a[i], payloads), n)

        if count > _UNROLLED:
            return jax.lax.fori_loop(1, count, lambda i, total: total + one(i), one(0))
        return sum((one(i) for i in range(1, count)), start=one(0))

    def nbytes(self, n: int, dtype: Any = jnp.float32) -> int:
        """Bytes on the wire for a vector of n numbers."""
        key = jax.eval_shape(lambda: jax.random.key(0)) if self.random else None
        sent = jax.eval_shape(lambda v, key: self.encode(v, key=key), jax.ShapeDtypeStruct((n,), dtype), key)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sent))


def _check_vector(v: Any) -> None:
    if not trees.is_floating(v) or jnp.ndim(v) != 1 or not jnp.size(v) or jnp.iscomplexobj(v):
        raise InputError("v", trees.describe(v), "a real floating vector")


class Plain(Codec):
    """Everything as it is."""

    def encode(self, v: Float[Array, " n"], *, key: Array | None = None) -> PyTree:
        _check_vector(v)
        return v

    def decode(self, payload: PyTree, n: int) -> Float[Array, " n"]:
        return payload


class _Sparse(Codec):
    """k of the entries: `k` of them, or the share `density` of all, at least one."""

    k: int | None = eqx.field(static=True, default=None)
    density: float | None = eqx.field(static=True, default=None)

    def __init__(self, k: int | None = None, *, density: float | None = None):
        if (k is None) == (density is None):
            raise InputError("k and density", f"{k} and {density}", "one of the two")
        if k is not None:
            check_count("k", k, 1)
        if density is not None and not (isinstance(density, int | float) and 0 < density <= 1):
            raise InputError("density", density, "a number above 0, at most 1")
        self.k, self.density = k, density

    def count(self, n: int) -> int:
        """How many of n entries are sent."""
        k = max(1, round((self.density or 0) * n)) if self.k is None else self.k
        if k > n:
            raise InputError("k", k, f"at most the length of the vector, {n}")
        return k

    def decode(self, payload: PyTree, n: int) -> Float[Array, " n"]:
        indices, values = payload
        return jnp.zeros(n, values.dtype).at[indices].set(values, unique_indices=True)

    def encode_with_residual(
        self, v: Float[Array, " n"], *, key: Array | None = None
    ) -> tuple[PyTree, Float[Array, " n"]]:
        indices, values = self.encode(v, key=key)
        return (indices, values), v.at[indices].set(values - values, unique_indices=True)

    def total(self, payloads: PyTree, n: int) -> Float[Array, " n"]:
        indices, values = payloads
        return jnp.zeros(n, values.dtype).at[indices.ravel()].add(values.ravel())


class TopK(_Sparse):
    """The k entries of largest magnitude: ‖v − Q(v)‖² ≤ (1 − k/n) ‖v‖². Ties go to the lower index."""

    def encode(self, v: Float[Array, " n"], *, key: Array | None = None) -> PyTree:
        _check_vector(v)
        indices = largest(v, self.count(len(v)))
        return indices, v[indices]


class RandomK(_Sparse):
    """k entries, uniformly without replacement, and not rescaled: a contraction on average, biased."""

    random: ClassVar[bool] = True

    def encode(self, v: Float[Array, " n"], *, key: Array | None = None) -> PyTree:
        _check_vector(v)
        indices = jax.random.permutation(check_key(key, "RandomK"), len(v))[: self.count(len(v))].astype(jnp.int32)
        return indices, v[indices]


class Signs(Codec):
    """One bit an entry, and a scale for all.

    **Arguments:** `scale` — `"l1"`: ‖v‖₁/n, the best one, always a contraction; `"l2"`: ‖v‖₂/√n, which keeps the
    norm, and is none where v is sparse; `"none"`: 1, for votes.
    """

    scale: str = eqx.field(static=True, default="l1")

    def __init__(self, scale: str = "l1"):
        check_choice("scale", scale, ("l1", "l2", "none"))
        self.scale = scale

    def encode(self, v: Float[Array, " n"], *, key: Array | None = None) -> PyTree:
        _check_vector(v)
        bits = pack((v >= 0).astype(jnp.uint32), 1)
        if self.scale == "none":
            return (bits,)
        return bits, jnp.mean(jnp.abs(v)) if self.scale == "l1" else jnp.sqrt(jnp.mean(v**2))

    def decode(self, payload: PyTree, n: int) -> Float[Array, " n"]:
        bits, *scale = payload
        size = scale[0] if scale else jnp.float32(1)
        return jnp.where(unpack(bits, 1, n) > 0, size, -size)


class QSGD(Codec):
    """Stochastic rounding to s levels of the norm, unbiased.

    **Arguments:** `levels` — s, 1 to 127; `norm` — `"l2"`, the paper's, or `"max"`, whose error is smaller.
    """

    random: ClassVar[bool] = True

    levels: int = eqx.field(static=True)
    norm: str = eqx.field(static=True)

    def __init__(self, levels: int = 1, *, norm: str = "l2"):
        check_count("levels", levels, 1)
        if levels > 127:
            raise InputError("levels", levels, "at most 127")
        check_choice("norm", norm, ("l2", "max"))
        self.levels, self.norm = int(levels), norm

    @property
    def _bits(self) -> int:
        """Of a signed level, a power of two so that no number lies across two words."""
        return 1 << math.ceil(math.log2(math.ceil(math.log2(2 * self.levels + 1))))

    def encode(self, v: Float[Array, " n"], *, key: Array | None = None) -> PyTree:
        _check_vector(v)
        drawn = check_key(key, "QSGD")
        size = jnp.max(jnp.abs(v)) if self.norm == "max" else jnp.linalg.norm(v)
        scaled = jnp.abs(v) * (self.levels / jnp.where(size > 0, size, 1))
        level = jnp.floor(scaled + jax.random.uniform(drawn, v.shape, v.dtype))
        # Rounding in the sum above must not lift the largest entry over the top.
        level = jnp.minimum(level, self.levels).astype(jnp.int32)
        signed = jnp.where(v < 0, -level, level) + self.levels
        return pack(signed.astype(jnp.uint32), self._bits), size

    def decode(self, payload: PyTree, n: int) -> Float[Array, " n"]:
        words, size = payload
        level = unpack(words, self._bits, n).astype(jnp.int32) - self.levels
        return level.astype(size.dtype) * (size / self.levels)


class Split(Codec):
    """Each piece of the vector with a payload, and so a scale and a k, of its own: layers of a network, say.

    **Arguments:** `codec`; `sizes` — the lengths of the pieces, whose sum is the length of the vector.
    """

    codec: Codec
    sizes: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, codec: Codec, sizes: Sequence[int]):
        if not isinstance(codec, Codec):
            raise InputError("codec", type(codec).__name__, "a codec")
        if not sizes:
            raise InputError("sizes", sizes, "at least one length")
        for size in sizes:
            check_count("sizes", size, 1)
        self.codec, self.sizes = codec, tuple(int(size) for size in sizes)

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.codec.random

    def encode(self, v: Float[Array, " n"], *, key: Array | None = None) -> PyTree:
        _check_vector(v)
        if sum(self.sizes) != len(v):
            raise InputError("sizes", self.sizes, f"lengths whose sum is that of the vector, {len(v)}")
        pieces = jnp.split(v, list(itertools.accumulate(self.sizes))[:-1])
        keys = [None] * len(pieces) if key is None else jax.random.split(check_key(key, "Split"), len(pieces))
        return [self.codec.encode(piece, key=key) for piece, key in zip(pieces, keys, strict=True)]

    def decode(self, payload: PyTree, n: int) -> Float[Array, " n"]:
        return jnp.concatenate([self.codec.decode(p, size) for p, size in zip(payload, self.sizes, strict=True)])


def pack(numbers: UInt32[Array, " n"], bits: int) -> UInt32[Array, " words"]:
    """Numbers below 2^bits in words of 32 bits, the first in the lowest; the last word is filled up with zeros.

    `bits` divides 32.
    """
    each = _WORD // bits
    full = numbers.shape[0] // each * each
    words = _words(numbers[:full], bits)
    if full == numbers.shape[0]:
        return words
    return jnp.append(words, _words(jnp.pad(numbers[full:], (0, each - numbers.shape[0] + full)), bits))


def _words(numbers: UInt32[Array, " n"], bits: int) -> UInt32[Array, " words"]:
    """`pack` for numbers that fill their words; few are summed at a time, which XLA is fast with."""
    shifts = jnp.arange(0, _WORD, bits, dtype=jnp.uint32).reshape(-1, min(4, _WORD // bits))
    shifted = numbers.reshape(-1, *shifts.shape) << shifts
    return jnp.sum(jnp.sum(shifted, axis=2, dtype=jnp.uint32), axis=1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, " words"], bits: int, n: int) -> UInt32[Array, " n"]:
    """The n numbers that `pack` put into the words."""
    shifts = jnp.arange(0, _WORD, bits, dtype=jnp.uint32)
    return ((words[:, None] >> shifts) & jnp.uint32((1 << bits) - 1)).reshape(-1)[:n]


def largest(v: Float[Array, " n"], k: int) -> Int[Array, " k"]:
    """Indices of the k entries of largest magnitude, in ascending order; ties go to the lower index.

    Two levels: the k blocks with the largest maxima hold them all. NaN counts as larger than everything.
    """
    n = v.shape[0]
    blocks = -(-n // _BLOCK)
    if k * 4 >= blocks:
        return jnp.sort(jax.lax.top_k(jnp.abs(v), k)[1]).astype(jnp.int32)
    # The bits of magnitudes are ordered as these are, and of integers, few at a time, XLA takes maxima 20 times faster.
    bits = jax.lax.bitcast_convert_type(jnp.abs(v), _INTEGERS[v.dtype.itemsize])
    full = n // _BLOCK * _BLOCK
    tops = jnp.max(jnp.max(bits[:full].reshape(n // _BLOCK, -1, 4), axis=2), axis=1)
    if full < n:
        tops = jnp.append(tops, jnp.max(bits[full:]))
    tops = jax.lax.bitcast_convert_type(tops, v.dtype)
    # In ascending order, so that the lower index comes first among equals at the second level too.
    chosen = jnp.sort(jax.lax.top_k(tops, k)[1]).astype(jnp.int32)
    indices = (chosen[:, None] * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)).reshape(-1)
    candidates = jnp.abs(v.at[indices].get(mode="fill", fill_value=0))
    return jnp.sort(indices[jax.lax.top_k(candidates, k)[1]])
