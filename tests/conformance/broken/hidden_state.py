"""It remembers in a Python object how often it was set up."""

from conformance.broken.descent import Descent, settings
from conformance.cases import near_the_saddle, on, saddle
from conformance.checks import runs_repeat

CAUGHT_BY = runs_repeat
MEMORY: list[int] = []


class Remembers(Descent):
    def init(self, problem, x, *, key):
        import jax
        import numpy as np

        def count() -> np.ndarray:
            MEMORY.append(1)
            return np.asarray(1e-3 * len(MEMORY), x.dtype)

        shift = jax.pure_callback(count, jax.ShapeDtypeStruct((), x.dtype))
        return super().init(problem, x + shift, key=key)


CASE = on(saddle, near_the_saddle, *settings(Remembers))
