"""`race`: several solvers on one problem, from the same starts and with the same keys, at equal cost.

What counts is what a method asks of the problem itself. What the loop asks besides, for the records
and the tests, is the same courtesy to all and free, so that a method is not charged for being looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from . import trees
from .calls import COST, Calls, cost_vector
from .chunk import COUNTED, state_measures
from .errors import InputError, check_positive, is_inside_jit, is_traced
from .loop import minimize
from .problem import Problem
from .progress import Bar, Progress, interruptible
from .setup import Setup, check_key, prepare, state_shapes
from .solution import Solution
from .solver import Solver
from .status import Ending
from .stopping import OwnBudget, StoppingRule

__all__ = ["COLUMNS", "Curve", "Race", "Row", "race"]

_RECORD = ("value", "gradient_norm", *COUNTED)
_LOOKS = 20  # at a run over minibatches, at least; one a pass over the data where that is more
_ROUNDING = 1e-9  # relative, in sums of prices
_BY_ITSELF = (Ending.CONVERGED, Ending.DIVERGED, Ending.STALLED)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: at each record the step, the solver's own calls so far by oracle, their cost, and the value."""

    step: Int[np.ndarray, " n"]
    calls: Mapping[str, Int[np.ndarray, " n"]]
    cost: Float[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]

    def best(self, cost: Any) -> Any:
        """The lowest value reached within a cost, or within each of several; NaN where there is none yet."""
        lowest = np.minimum.accumulate(np.where(np.isfinite(self.value), self.value, np.inf))
        last = np.searchsorted(self.cost, np.asarray(cost) * (1 + _ROUNDING), side="right") - 1
        found = np.where(last >= 0, lowest[last], np.inf)
        return np.where(np.isfinite(found), found, np.nan)


class Row(NamedTuple):
    """One solver in the table of a race.

    `value`, `lowest` and `highest` are the median and the ends of the spread over the keys, at the full
    cost. `steps`, `calls` and `cost` are medians of what was spent, `seconds` the median time of a run
    without compiling; `compile_seconds` is the sum.
    """

    name: str
    value: float
    lowest: float
    highest: float
    status: str
    steps: int
    calls: Calls
    cost: float
    seconds: float
    compile_seconds: float

    def in_words(self) -> tuple[str, ...]:
        """What stands under each of `COLUMNS`."""
        values = ("–" if np.isnan(v) else f"{v:.6g}" for v in (self.value, self.lowest, self.highest))
        seconds = (f"{s:.3g}" for s in (self.seconds, self.compile_seconds))
        return (self.name, *values, self.status, str(self.steps), f"{self.cost:g}", *seconds, str(self.calls))


COLUMNS = ("solver", "median", "lowest", "highest", "status", "steps", "cost", "seconds", "compiling", "calls")
_WORDS = (0, 4, 9)  # of them, the columns that are no numbers


@dataclasses.dataclass(frozen=True)
class Race:
    """The outcome of a race.

    **Fields:**
    - `solutions`: by solver, the `Solution` of each key, in the order of `keys`. After Ctrl-C those of
      the runs that were begun.
    - `keys`: as they were given.
    - `cost`: what each solver could spend, in gradients.
    - `weights`, `minibatch_share`: the price of one call of each oracle; that of a minibatch is its
      weight times its share of the data.
    - `interrupted`: whether Ctrl-C ended the race before its time.
    """

    solutions: Mapping[str, tuple[Solution, ...]]
    keys: tuple[Any, ...]
    cost: float
    weights: Mapping[str, float]
    minibatch_share: float = 1.0
    interrupted: bool = False

    @functools.cached_property
    def curves(self) -> dict[str, tuple[Curve, ...]]:
        """By solver, the value against the cost for each key."""
        return {name: tuple(self._curve(run) for run in runs) for name, runs in self.solutions.items()}

    def at(self, cost: Any) -> dict[str, np.ndarray]:
        """The lowest value that each solver reached within a cost, for each key; NaN where there is none yet.

        **Arguments:** `cost`: a number up to that of the race, or an array of them, whose axes come last.

        **Raises:** `InputError` for a cost beyond that of the race.
        """
        if not np.all(np.asarray(cost) <= self.cost * (1 + _ROUNDING)):
            raise InputError("cost", cost, f"at most that of the race, {self.cost:g}")
        return {name: np.stack([curve.best(cost) for curve in curves]) for name, curves in self.curves.items()}

    def table(self) -> list[Row]:
        """A row for each solver, the lowest median first."""
        values = self.at(self.cost)
        rows = [self._row(name, values[name]) for name in self.solutions]
        return sorted(rows, key=lambda row: (np.isnan(row.value), row.value))

    def with_weights(self, weights: Mapping[str, float]) -> Race:
        """The same runs under another cost vector, up to the largest cost that is known for all of them.

        **Arguments:** `weights`: the price of one call by oracle name; the others stay as they are.

        **Raises:** `InputError` for an unknown oracle or a negative price, and where nothing costs anything.
        """
        other = dataclasses.replace(self, weights=cost_vector({**self.weights, **weights}))
        ended = [(run, other._spent(run)) for runs in self.solutions.values() for run in runs]
        # A run that ended by itself stays where it is whatever one spends; of the others nobody knows.
        limits = [spent for run, spent in ended if run.status.ending not in _BY_ITSELF]
        cost = min(limits) if limits else max(spent for _, spent in ended)
        check_positive("cost of the race under these weights", cost)
        return dataclasses.replace(other, cost=cost)

    @property
    def _prices(self) -> dict[str, float]:
        return _prices(self.weights, self.minibatch_share)

    def _spent(self, run: Solution) -> float:
        return run.state.calls.cost(self._prices)

    def _curve(self, run: Solution) -> Curve:
        step = np.asarray(run.history["step"])
        value = np.asarray(run.history["value"], np.float64)
        calls = {oracle: np.asarray(run.history[f"calls.{oracle}"], np.int64) for oracle in COST}
        if int(run.steps) > step[-1] and run.status.ending is not Ending.DIVERGED:
            step, value = np.append(step, int(run.steps)), np.append(value, float(run.value))
            calls = {
                oracle: np.append(counts, int(getattr(run.state.calls, oracle))) for oracle, counts in calls.items()
            }
        cost = sum((price * calls[oracle] for oracle, price in self._prices.items()), start=np.zeros(len(step)))
        return Curve(step, calls, cost, value)

    def _row(self, name: str, values: Float[np.ndarray, " keys"]) -> Row:
        runs = self.solutions[name]
        reached = values[np.isfinite(values)]
        spread = [float(np.quantile(reached, q)) if len(reached) else np.nan for q in (0.5, 0.0, 1.0)]
        words = [run.status.name for run in runs]
        counted = [f"{words.count(word)} × {word}" for word in dict.fromkeys(words)]
        own = [run.state.calls for run in runs]
        took = [(run.seconds or 0.0, run.compile_seconds or 0.0) for run in runs]
        return Row(
            name,
            *spread,
            status=words[0] if len(counted) == 1 else ", ".join(counted),
            steps=_median(run.steps for run in runs),
            calls=Calls(*(_median(getattr(calls, oracle) for calls in own) for oracle in COST)),
            cost=float(np.median([self._spent(run) for run in runs])),
            seconds=float(np.median([whole - compiling for whole, compiling in took])),
            compile_seconds=sum({id(run): compiling for run, (_, compiling) in zip(runs, took, strict=True)}.values()),
        )

    def __str__(self) -> str:
        weights = ", ".join(f"{oracle} {weight:g}" for oracle, weight in self.weights.items())
        if self.minibatch_share != 1:
            weights += f" times its share of the data, {self.minibatch_share:.4g}"
        keys = max(map(len, self.solutions.values()))
        lines = [f"lowest value within cost {self.cost:g} ({weights}), {keys} {'key' if keys == 1 else 'keys'}"]
        rows = [COLUMNS, *(row.in_words() for row in self.table())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [word.ljust(width) if i in _WORDS else word.rjust(width)
                     for i, (word, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Race: {', '.join(f'{row.name} {row.value:.6g}' for row in self.table())} at cost {self.cost:g}>"


def _prices(weights: Mapping[str, float], minibatch_share: float) -> dict[str, float]:
    return {**weights, "minibatch": weights["minibatch"] * minibatch_share}


def _median(numbers: Any) -> int:
    return int(np.median([int(number) for number in numbers]))


def race(
    problem: Problem | Callable[..., Any],
    x0: PyTree | Callable[[Array], PyTree],
    solvers: Mapping[str, Solver],
    *,
    cost: float,
    weights: Mapping[str, float] = COST,
    keys: Sequence[int] | Array = (0,),
    args: tuple = (),
    has_aux: bool = False,
    stop: StoppingRule | None = None,
    steps: int = 1_000_000,
    progress: bool | str = "auto",
) -> Race:
    """Run several solvers until the oracle calls of each one cost the same.

    **Arguments:** as for `minimize`, but
    - `x0`: a point for all runs, or a function of a key that gives the start of the key's runs.
    - `solvers`: by the names that they go by in the race.
    - `cost`: what each run may spend, in gradients: it ends with the step that spends it.
    - `weights`: the price of one call by oracle name; where it says nothing a gradient costs 1, a value
      0.5, a Hessian–vector product 2 and a minibatch 1, times its share of the data. Only what a method
      asks itself counts, not what the loop asks to record it.
    - `keys`: seeds or keys; every solver runs with each of them.
    - `stop`: a rule that may end a run before; None for none but a method's own test.
    - `progress`: one bar for the whole race.

    Values of methods that do not bring them along, as over minibatches, are known at the records only,
    once a pass over the data (more often in a short race). Runs of one solver that can only be the same,
    with nothing random and the same start, are made once.

    **Returns:** a `Race`. The first Ctrl-C returns the runs that were begun.

    **Raises:** `InputError` before anything is compiled where an argument cannot be used.
    """
    if is_traced((x0, args)) or is_inside_jit():
        raise InputError("race", "a traced value", "a call outside jit and vmap")
    check_positive("cost", cost)
    weights = cost_vector(weights)
    keys = _check_keys(keys)
    _check_solvers(solvers)
    if stop is not None and not isinstance(stop, StoppingRule):
        raise InputError("stop", repr(stop), "a stopping rule, or None")
    seeds = [check_key(key, "the race") for key in keys]
    # A model may be callable too, but is made of leaves.
    of_a_key = callable(x0) and jax.tree_util.all_leaves([x0])
    starts: list[Any] = [x0(seed) for seed in seeds] if of_a_key else [x0] * len(seeds)
    setups = {
        name: prepare(problem, starts[0], solver, args, has_aux, steps, stop, seeds[0], _RECORD, None)
        for name, solver in solvers.items()
    }
    share = _minibatch_share(next(iter(setups.values())).problem)
    prices = _prices(weights, share)
    budget: StoppingRule = OwnBudget(float(cost), prices)
    runs: dict[str, list[Solution]] = {}
    over, stopped = 0, False
    with interruptible() as interrupted, closing(Bar("race", len(seeds) * len(solvers), progress)) as bar:

        def tell(seen: Progress) -> None:
            bar.update(over, f"{name}, key {j + 1} of {len(seeds)}: step {seen.step}, value {seen.value:.6g}")

        for j, name in itertools.product(range(len(seeds)), solvers):
            done = runs.setdefault(name, [])
            if done and not setups[name].plan.random and _same(starts[j], starts[0]):
                done.append(done[0])
            else:
                run = minimize(
                    problem,
                    starts[j],
                    solvers[name],
                    args=args,
                    has_aux=has_aux,
                    steps=steps,
                    stop=budget if stop is None else stop | budget,
                    key=seeds[j],
                    record=_RECORD,
                    every=_every(setups[name], float(cost), prices["minibatch"]),
                    callback=tell,
                    progress=False,
                )
                done.append(run)
                stopped = interrupted() or run.status.ending is Ending.INTERRUPTED
            over += 1
            if stopped:
                break
    solutions = {name: tuple(done) for name, done in runs.items()}
    return Race(solutions, keys, float(cost), weights, share, interrupted=stopped)


def _check_keys(keys: Any) -> tuple[Any, ...]:
    if isinstance(keys, str) or not hasattr(keys, "__len__") or getattr(keys, "shape", (1,)) == ():
        raise InputError("keys", repr(keys), "a sequence of seeds or keys")
    if len(keys) == 0:
        raise InputError("keys", "none", "at least one seed or key")
    known: set[bytes] = set()
    for key in keys:
        data = np.asarray(jax.random.key_data(check_key(key, "the race"))).tobytes()
        if data in known:
            raise InputError("keys", f"{key} twice", "each key once")
        known.add(data)
    return tuple(keys)


def _check_solvers(solvers: Any) -> None:
    if not isinstance(solvers, Mapping):
        raise InputError("solvers", type(solvers).__name__, "a dictionary of solvers by name")
    if not solvers:
        raise InputError("solvers", "none", "at least one solver")
    for name, solver in solvers.items():
        if not isinstance(name, str):
            raise InputError("solvers", f"the name {name!r}", "names as text")
        if not isinstance(solver, Solver):
            expected = "a fallline solver; wrap Optax ones in optimizer(...)"
            raise InputError(f"solvers[{name!r}]", type(solver).__name__, expected)


def _minibatch_share(problem: Any) -> float:
    """The part of the data in one minibatch; 1 where the problem has no minibatches."""
    batch = getattr(problem, "batch_size", None)
    return 1.0 if batch is None else batch / problem.size


def _every(setup: Setup, cost: float, minibatch: float) -> int:
    """Steps between two records: each step where they are free, else `minimize`'s choice, but enough looks."""
    if state_measures(state_shapes(setup)):
        return 1
    every = int(setup.numbers.every)
    return every if every == 1 or minibatch == 0 else max(1, min(every, int(cost / (_LOOKS * minibatch))))


def _same(a: PyTree, b: PyTree) -> bool:
    """Whether two starts are the same, bit for bit."""
    one, other = (jax.tree.leaves(trees.split(x)[0]) for x in (a, b))
    return a is b or all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
