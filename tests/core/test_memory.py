"""Allocations are refused beforehand, with both figures."""

import math
import os

import pytest

import fallline as fl
from fallline.core import memory


def test_the_size_is_that_of_the_machine():
    """On the CPU, where devices say nothing of their own."""
    known = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.memory_size() == known > 2**28


def test_more_than_there_is_is_refused_with_both_figures(monkeypatch):
    monkeypatch.setattr(memory, "memory_size", lambda: 8e9)
    memory.check_allocation("window", 10, 8e9, "a smaller window")
    with pytest.raises(
        fl.InputError, match=r"window: got 1024, which takes 8.2 GB; expected less than the 8 GB .*a smal"
    ):
        memory.check_allocation("window", 1024, 8.2e9, "a smaller window")


@pytest.mark.parametrize(
    ("nbytes", "shown"), [(12, "12 bytes"), (1500, "1.5 kB"), (2e6, "2 MB"), (3.256e9, "3.26 GB"), (4e13, "40 TB")]
)
def test_bytes_as_they_are_shown(nbytes, shown):
    assert memory.shown_bytes(nbytes) == shown


def test_an_unknown_size_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "memory_size", lambda: math.inf)
    memory.check_allocation("window", 1, 1e30, "less")
