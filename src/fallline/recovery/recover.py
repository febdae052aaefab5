"""`recover`: this signal from these measurements, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree

from ..core.errors import InputError, is_traced
from ..core.loop import minimize
from ..core.optimizer import optimizer
from ..core.setup import check_key
from ..core.solution import Solution
from ..core.solver import Solver
from ..core.stopping import StoppingRule, gradient_norm
from . import starts
from .losses import Loss
from .problem import Recovery
from .structures import Structure, Vector

__all__ = ["begin", "default_solver", "default_stop", "recover"]

_START = 2**31  # no step of a run has this number
_TOLERANCE = 1e-8  # of the gradient, relative to the size of the signal; float32 stalls before


def recover(
    op: Any,
    y: Array,
    structure: Structure | None = None,
    loss: Loss | None = None,
    *,
    init: str | Callable[[Recovery, Array], PyTree] | PyTree = "auto",
    solver: Solver | None = None,
    steps: int = 1000,
    stop: StoppingRule | None | str = "auto",
    key: Array | int = 0,
    **options: Any,
) -> Solution:
    """Recover a signal from its measurements: a start, then `minimize`.

    **Arguments:**
    - `op`, `y`, `structure`, `loss`: see `Recovery`.
    - `init`: a start by name (`"optimal"`, `"truncated"`, `"spectral"`, …, of `STARTS`, for intensities;
      `"spectral"`, `"signs"` for low rank; `"random"`), a function `(problem, key) -> x0`, or a point.
      `"auto"` is `"optimal"` for intensities, `"spectral"` for low rank, else `"random"`.
    - `solver`: any solver; by default gradient descent with the step size of the loss's paper. Step sizes
      are in units of the data.
    - `stop`: a stopping rule; `"auto"` is a gradient of 1e-8 times the size of the signal.
    - `key`: for the start and for random solvers.
    - `options`: further ones of `minimize`: `record`, `callback`, `checkpoint`, …

    **Returns:** the `Solution` of `minimize`; its `value` is the loss over gain and unit, see `Recovery`.

    **Raises:** `InputError` where an argument cannot be used.
    """
    problem = Recovery(op, y, structure, loss)
    drawn = check_key(key, "the start")
    chosen = default_solver(problem) if solver is None else solver
    rule = default_stop(problem) if isinstance(stop, str) and stop == "auto" else stop
    x0 = begin(problem, init, drawn)
    return minimize(problem, x0, chosen, steps=steps, stop=rule, key=drawn, **options)


def begin(problem: Recovery, init: Any, key: Array) -> PyTree:
    """The starting point that `init` names, makes or is.

    Its key is derived from `key`: whoever drew the operator with the same one does not start at a row of it.
    """
    key = jax.random.fold_in(key, _START)
    if isinstance(init, str):
        return _named(problem, init)(problem, key)
    return init(problem, key) if callable(init) else init


def _named(problem: Recovery, init: str) -> starts.Start:
    phaseless = problem.loss.phaseless
    known: dict[str, starts.Start] = {}
    if phaseless:
        known = {name: starts.start(name) for name in starts.STARTS}
    elif not isinstance(problem.structure, Vector):
        known = {"spectral": starts.spectral, "signs": starts.signs}
    known["random"] = starts.random()
    if init == "auto":
        init = "optimal" if phaseless else "spectral" if "spectral" in known else "random"
    if init not in known:
        raise InputError("init", repr(init), f"one of auto, {', '.join(known)}, a function or a point")
    return known[init]


def default_solver(problem: Recovery) -> Solver:
    """Gradient descent with the step size of the loss's paper.

    **Raises:** `InputError` for a loss that has none.
    """
    if problem.loss.step_size is None:
        raise InputError("solver", None, f"a solver: {type(problem.loss).__name__} has no step size that always works")
    return optimizer(optax.sgd, learning_rate=problem.loss.step_size)


def default_stop(problem: Recovery) -> StoppingRule:
    """A small gradient, relative to the size of the signal."""
    tolerance = _TOLERANCE * problem.scale
    return gradient_norm(tolerance if is_traced(tolerance) else float(tolerance))
