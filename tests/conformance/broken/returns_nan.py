"""It hides what the oracle returns, and says that it is done."""

from typing import Any

import jax.numpy as jnp

from conformance.broken.descent import Descended, Descent, settings
from conformance.cases import near_the_saddle, on, saddle
from conformance.checks import nan_is_never_an_answer

CAUGHT_BY = nan_is_never_an_answer


class Done(Descended):
    done: Any = False


class Hides(Descent):
    def look(self, problem, x, calls):
        seen = super().look(problem, x, calls)
        lost = jnp.isnan(seen.value)
        clean = {name: jnp.where(lost, 0.0, getattr(seen, name)) for name in ("value", "gradient", "gradient_norm")}
        return Done(x, seen.calls, **clean, done=lost)


CASE = on(saddle, near_the_saddle, *settings(Hides))
