"""What the tests of reports share: 64 bits, as the command has them by default."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield
