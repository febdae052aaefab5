"""It asks for the gradient twice and declares one."""

from conformance.broken.descent import Descent, settings
from conformance.cases import near_the_saddle, on, saddle
from conformance.checks import calls_are_those_made

CAUGHT_BY = calls_are_those_made


class Miscounts(Descent):
    def step(self, problem, state, *, key):
        middle = (state.x - self.step_size / 2 * state.gradient).astype(state.x.dtype)
        x = (state.x - self.step_size * problem.gradient(middle)).astype(state.x.dtype)
        return self.look(problem, x, state.calls)


CASE = on(saddle, near_the_saddle, *settings(Miscounts))
