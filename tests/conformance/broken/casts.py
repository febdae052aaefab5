"""The step is taken in 32 bits whatever the point is."""

import jax.numpy as jnp

from conformance.broken.descent import Descent, settings
from conformance.cases import near_the_saddle, on, saddle
from conformance.checks import state_is_stable

CAUGHT_BY = state_is_stable


class Narrow(Descent):
    def step(self, problem, state, *, key):
        x = (state.x - self.step_size * state.gradient).astype(jnp.float32)
        return self.look(problem, x, state.calls)


CASE = on(saddle, near_the_saddle, *settings(Narrow))
