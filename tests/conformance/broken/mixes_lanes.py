"""It asks the host for a scale that, under `vmap`, is that of all lanes together."""

import jax
import numpy as np

from conformance.broken.descent import Descent, settings
from conformance.cases import near_the_saddle, on, saddle
from conformance.checks import vmap_is_a_loop

CAUGHT_BY = vmap_is_a_loop


class Mixes(Descent):
    def step(self, problem, state, *, key):
        # The largest gradient over whatever the host is given: under `vmap`, over all lanes.
        def largest(g: np.ndarray) -> np.ndarray:
            return np.full(np.shape(g)[:-1], np.max(np.abs(g)), np.float32)

        shape = jax.ShapeDtypeStruct((), np.float32)
        scale = jax.pure_callback(largest, shape, state.gradient.astype(np.float32), vmap_method="expand_dims")
        x = (state.x - self.step_size * state.gradient / (1 + scale)).astype(state.x.dtype)
        return self.look(problem, x, state.calls)


CASE = on(saddle, near_the_saddle, *settings(Mixes))
