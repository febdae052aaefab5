"""The step size is static: every other one compiles again."""

import equinox as eqx

from conformance.broken.descent import Descent
from conformance.cases import near_the_saddle, on, saddle
from conformance.checks import numbers_never_recompile

CAUGHT_BY = numbers_never_recompile


class Static(Descent):
    step_size: float = eqx.field(static=True)


CASE = on(saddle, near_the_saddle, lambda: Static(0.1), lambda: Static(0.05))
