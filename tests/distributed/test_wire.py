"""Payloads as words: the bytes of the arrays, one after another, each filled up to whole words; and back, every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.distributed.wire import from_words, to_words, words_of
from fallline.parts.codecs import QSGD, RandomK, Signs, Split, TopK

SHAPES = [(1,), (3,), (4,), (5,), (2, 3), ()]
NARROW = ["bool", "uint8", "int8", "bfloat16", "float16", "int32", "uint32", "float32"]


def random_bits(dtype, shape, seed=0):
    """Any bits: NaN with payloads, infinities and numbers below the normal ones too."""
    dtype = jnp.dtype(dtype)
    drawn = np.random.default_rng(seed)
    if dtype == jnp.bool_:
        return drawn.integers(0, 2, shape).astype(bool)
    raw = drawn.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def words_of_numpy(array):
    raw = array.tobytes()
    return np.frombuffer(raw + bytes(-len(raw) % 4), "<u4")


def bits(array):
    return np.asarray(array).tobytes()


def comes_back(arrays):
    words = to_words(arrays)
    assert words.dtype == jnp.uint32
    np.testing.assert_array_equal(words, np.concatenate([words_of_numpy(a) for a in arrays]))
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    assert sum(map(words_of, like)) == len(words)
    for a, b in zip(from_words(words, like), arrays, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert bits(a) == bits(b)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_number_comes_back_bit_by_bit(dtype):
    """Of every shape at once: what fills the last word of one array is no part of the next."""
    comes_back([random_bits(dtype, shape, seed) for seed, shape in enumerate(SHAPES)])


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64"])
def test_wide_numbers_come_back_bit_by_bit(dtype, x64):
    comes_back([random_bits(dtype, shape, seed) for seed, shape in enumerate(SHAPES)])


def test_special_numbers():
    """NaN, −NaN, ±∞, −0 and the smallest number of all, which a conversion would change."""
    numbers = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    comes_back([numbers, numbers.astype(np.float16), numbers.astype(jnp.bfloat16)])


def test_mixed_payloads(x64):
    comes_back([random_bits(dtype, (5,), seed) for seed, dtype in enumerate([*NARROW, "float64", "bool"])])


@pytest.mark.parametrize(
    "codec", [Signs(), Signs("none"), TopK(3), QSGD(4), Split(RandomK(1), (4, 9))], ids=lambda c: type(c).__name__
)
def test_payloads_of_codecs_under_vmap(codec):
    """With workers and blocks as leading axes, as a round packs them, the tree too."""
    v = np.random.default_rng(1).normal(size=(2, 3, 13)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), (2, 3))
    payloads = jax.jit(jax.vmap(jax.vmap(lambda v, key: codec.encode(v, key=key))))(v, keys)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype), payloads)
    words = jax.jit(jax.vmap(jax.vmap(to_words)))(payloads)
    assert words.shape == (2, 3, codec.nbytes(13) // 4)
    back = jax.jit(jax.vmap(jax.vmap(lambda words: from_words(words, like))))(words)
    assert jax.tree.structure(back) == jax.tree.structure(payloads)
    assert [bits(a) for a in jax.tree.leaves(back)] == [bits(a) for a in jax.tree.leaves(payloads)]
