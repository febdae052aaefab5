"""What every test file shares: the precision of the run."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.fixture
def x64():
    """64-bit mode for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def x32():
    """64-bit mode off, whatever the environment says."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Both precisions in turn, with JAX's mode to match; the value is NumPy's dtype."""
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


_MOST_MAPS = 30_000
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_programs():
    """Drop compiled programs before there are too many: each maps pieces of memory, of which a process has 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if next(_tests) % 20 == 0 and maps.exists() and maps.read_text().count("\n") > _MOST_MAPS:
        jax.clear_caches()
