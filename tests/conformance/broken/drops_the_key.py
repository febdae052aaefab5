"""The noise is drawn from a key of its own."""

import jax

from conformance.broken.descent import Descent, settings
from conformance.cases import near_the_saddle, on, saddle
from conformance.checks import keys_are_honoured

CAUGHT_BY = keys_are_honoured


class Deaf(Descent):
    random = True

    def step(self, problem, state, *, key):
        noise = jax.random.normal(jax.random.key(0), state.x.shape, state.x.dtype)
        x = (state.x - self.step_size * (state.gradient + 0.01 * noise)).astype(state.x.dtype)
        return self.look(problem, x, state.calls)


CASE = on(saddle, near_the_saddle, *settings(Deaf))
