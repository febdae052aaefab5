"""What `minimize` and its kin do before anything is compiled: check the input, and put the parts together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from . import trees
from .chunk import COUNTED, MEASURED, Numbers, Plan, start
from .errors import InputError, check_count, is_inside_jit, is_traced
from .problem import Objective, Problem, bind, check_needs
from .solver import Solver, with_array_numbers
from .stopping import StoppingRule

__all__ = ["Setup", "check_key", "prepare", "state_shapes"]

_MOST_STEPS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that can begin: problem, solver and numbers as arrays, the static plan, and where it starts.

    `rebuild` gives a point the form of the user's; `names` are the stopping rules as users write them.
    """

    problem: Problem
    solver: Solver
    numbers: Numbers
    plan: Plan
    x: PyTree
    rebuild: Callable[[PyTree], PyTree]
    steps: int
    names: tuple[str, ...]

    @property
    def parts(self) -> tuple[Problem, Solver, Numbers]:
        """What the compiled functions take."""
        return self.problem, self.solver, self.numbers

    @property
    def dtype(self) -> Any:
        """NumPy's dtype of the scalars of the run."""
        return np.dtype(trees.real_dtype(self.x))


def prepare(
    problem: Problem | Callable[..., Any],
    x0: PyTree,
    solver: Solver,
    args: tuple,
    has_aux: bool,
    steps: int,
    stop: StoppingRule | None | str,
    key: Any,
    record: Sequence[str],
    every: int | None,
) -> Setup:
    """Check the arguments of `minimize`, which see, and trace the user's function.

    **Raises:** `InputError` where an argument cannot be used.
    """
    if is_traced((steps, every)):
        raise InputError("steps and every", "a traced value", "numbers: they fix the length of the history")
    check_count("steps", steps, 0)
    if steps > _MOST_STEPS:
        raise InputError("steps", steps, f"at most {_MOST_STEPS}: the step counter has 32 bits")
    if not isinstance(solver, Solver):
        raise InputError("solver", type(solver).__name__, "a fallline solver; wrap Optax ones in optimizer(...)")
    x, rebuild = trees.split(x0)
    bound = bind(problem, x, rebuild, args=args, has_aux=has_aux, needs=solver.needs)
    check_needs(solver, bound)
    label = problem.label if isinstance(problem, Problem) else Objective(problem).label
    random = solver.random or bool(bound.random)
    key = check_key(key, solver.name if solver.random else label) if random else None
    if every is None:
        batch = getattr(bound, "batch_size", None)
        every = 1 if batch is None else -(-bound.size // batch)  # type: ignore[attr-defined]
    check_count("every", every, 1)
    if isinstance(record, str):
        raise InputError("record", repr(record), "a tuple of names, such as ('value', 'gradient_norm')")
    rules = _check_rules(stop, solver, bound, label)
    dtype = trees.real_dtype(x)
    numbers = with_array_numbers(Numbers(key, int(every), rules), dtype)
    solver = with_array_numbers(solver, dtype)
    names = tuple(rule.describe() for rule in rules)
    inside = is_traced((x, bound, solver, numbers)) or is_inside_jit()
    plan = Plan(tuple(record), random, keep_last=inside, each=every == 1)
    setup = Setup(bound, solver, numbers, plan, x, rebuild, int(steps), names)
    _check_record(setup)
    return setup


def check_key(key: Any, who: str) -> Any:
    """One key of `jax.random` from a key or a seed; `who` is random and needs it.

    **Raises:** `InputError` where it is neither.
    """
    if key is None:
        raise InputError("key", None, f"a key of jax.random or an integer seed: {who} is random")
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(int(key))
    expected = "one key of jax.random or an integer seed"
    if not isinstance(key, jax.Array):
        raise InputError("key", type(key).__name__, expected)
    given = trees.describe(key)
    if not trees.is_key(key):
        try:
            key = jax.random.wrap_key_data(key)
        except TypeError:
            raise InputError("key", given, expected) from None
    if key.shape:
        raise InputError("key", given, expected)
    return key


def _check_rules(stop: Any, solver: Solver, problem: Problem, label: str) -> tuple[StoppingRule, ...]:
    if isinstance(stop, str):
        if stop != "auto":
            raise InputError("stop", repr(stop), 'a stopping rule, None or "auto"')
        stop = solver.stopping()
    if stop is None:
        return ()
    if not isinstance(stop, StoppingRule):
        raise InputError("stop", repr(stop), "a stopping rule such as gradient_norm(1e-6), None or 'auto'")
    if "lower_bound" in stop.needs and problem.lower_bound is None:
        raise InputError("stop", stop.describe(), f"a problem with a lower bound; {label} declares none")
    return stop.leaves()


def _check_record(setup: Setup) -> None:
    always = {*MEASURED, *COUNTED}
    if set(setup.plan.record) <= always:
        return
    scalars = {name for name, leaf in vars(state_shapes(setup)).items() if getattr(leaf, "shape", None) == ()}
    known = always | scalars - {"done"}
    for name in setup.plan.record:
        if name not in known:
            raise InputError("record", repr(name), f"one of {', '.join(sorted(known))}")


def state_shapes(setup: Setup) -> Any:
    """The solver's state as shapes and dtypes."""
    plan = dataclasses.replace(setup.plan, record=())
    return eqx.filter_eval_shape(
        lambda parts, x: start(parts[0], parts[1], parts[2], x, plan, 1)[0].state, setup.parts, setup.x
    )
