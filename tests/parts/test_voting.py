"""Majority votes on packed bits, against counting them one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.parts.codecs import pack, unpack
from fallline.parts.voting import majority


@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 100])
def test_the_majority_is_that_of_a_count(voters):
    bits = np.random.default_rng(voters).integers(0, 2, (voters, 1000)).astype(np.uint32)
    words = jnp.stack([pack(jnp.asarray(row), 1) for row in bits])
    expected = 2 * bits.sum(axis=0) >= voters  # a tie counts as set
    np.testing.assert_array_equal(unpack(jax.jit(majority)(words), 1, 1000), expected)


def test_every_count_of_five_voters():
    """All 32 patterns of five votes, one in each bit of a word."""
    patterns = np.arange(32)
    words = np.array([np.sum((patterns >> voter & 1) << patterns) for voter in range(5)], np.uint32)
    won = int(majority(jnp.asarray(words)[:, None])[0])
    assert [won >> p & 1 for p in range(32)] == [int(bin(p).count("1") >= 3) for p in range(32)]


@pytest.mark.parametrize("votes", [np.zeros((0, 3), np.uint32), np.zeros(3, np.uint32), np.zeros((2, 3), np.int32)])
def test_bad_input(votes):
    with pytest.raises(InputError, match="votes: got"):
        majority(jnp.asarray(votes))
