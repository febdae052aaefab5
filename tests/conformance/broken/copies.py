"""It keeps the last points in a buffer that it shifts along: arrays of the point's size are copied."""

from typing import Any

import jax.numpy as jnp

from conformance.broken.descent import Descended, Descent, settings
from conformance.cases import on
from conformance.checks import no_parameter_sized_copy

CAUGHT_BY = no_parameter_sized_copy


class Buffered(Descended):
    before: Any
    long_before: Any


class Shifts(Descent):
    def init(self, problem, x, *, key):
        return Buffered(**vars(super().init(problem, x, key=key)), before=x + 0, long_before=x + 1)

    def step(self, problem, state, *, key):
        after = super().step(problem, state, key=key)
        # The two swap places: neither can be written where it is.
        return Buffered(**vars(after), before=state.long_before, long_before=state.before)


def bowl(x):
    return 0.5 * jnp.sum(x**2)


CASE = on(bowl, lambda dtype: jnp.ones(4096, dtype), *settings(Shifts))
