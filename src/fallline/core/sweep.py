"""`sweep`: one problem, many solvers, keys and starts at once.

Unlike `vmap` of `minimize`, whose loop counter and records differ from lane to lane, all lanes here
share one step counter, and the records are written outside of the lanes: a step of 64 lanes costs
little more than one of a single lane. A lane that has ended is held where it is.

A lane's bits do not depend on the other lanes: a sweep of one gives the same. `minimize` gives them up to
rounding, since the compiler fuses products into sums (FMA) by what stands around them; where it may
not (`XLA_FLAGS=--xla_cpu_max_isa=AVX`), bit for bit on objectives without matrix products.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from . import trees
from .chunk import Carry, End, Numbers, Plan, settle, start, take_step
from .errors import InputError
from .problem import Problem
from .program import Static
from .progress import Bar, compile_clock, interruptible
from .setup import Setup, check_key, prepare
from .solution import Solution
from .solver import Solver, with_array_numbers
from .status import Ending, Status
from .stopping import StoppingRule

__all__ = ["sweep"]

_CHUNK_SECONDS = 0.35
_ROWS, _TABLE_ENTRIES = 1024, 2**21  # records that one chunk can hold, of one lane and over all
_AXES = Numbers(0, None, None)  # type: ignore[arg-type]  # each lane has a key of its own


def sweep(
    problem: Problem | Callable[..., Any],
    x0: PyTree | Callable[[Array], PyTree],
    solvers: Solver | Sequence[Solver],
    keys: Sequence[int] | Array | None = None,
    *,
    args: tuple = (),
    has_aux: bool = False,
    steps: int = 1000,
    stop: StoppingRule | None | str = "auto",
    record: Sequence[str] = ("value", "gradient_norm"),
    every: int | None = None,
    progress: bool | str = "auto",
) -> Solution:
    """Minimize with every solver from every key at once; each lane ends by its own tests.

    **Arguments:** as for `minimize`, but
    - `x0`: a point for all lanes, or a function of a key that gives the lane's own.
    - `solvers`: a solver, or several that differ in their numbers only.
    - `keys`: seeds or keys, needed as for `minimize`. Lane `(i, j)` is
      `minimize(problem, x0(keys[j]), solvers[i], key=keys[j])`.

    **Returns:** a `Solution` whose arrays have the leading axes `(len(solvers), len(keys))`, without the
    first where a single solver was given and without the second where no keys were. Records beyond a
    lane's end are NaN; `history["step"]` is shared. The first Ctrl-C returns the points reached.

    **Raises:** `InputError` before anything is compiled where an argument cannot be used.
    """
    clock = time.perf_counter()
    several = not isinstance(solvers, Solver)
    rows: list[Solver] = [solvers] if isinstance(solvers, Solver) else list(solvers)
    if not rows:
        raise InputError("solvers", "none", "at least one solver")
    seeds: list[Any] = [None] if keys is None else [check_key(key, "the sweep") for key in keys]
    if not seeds:
        raise InputError("keys", "none", "at least one seed or key")
    of_a_key = callable(x0) and jax.tree_util.all_leaves([x0])  # a model may be callable too, but is made of leaves
    if of_a_key and keys is None:
        raise InputError("keys", None, "seeds or keys: x0 is a function of a key")
    starts: list[Any] = [x0(key) for key in seeds] if of_a_key else [x0] * len(seeds)
    first = prepare(problem, starts[0], rows[0], args, has_aux, steps, stop, seeds[0], record, every)
    if first.plan.keep_last:
        raise InputError("sweep", "a traced value", "a call outside jit and vmap; inside, vmap minimize itself")
    for row in rows:
        row.check(first.problem, first.x)
    solver = _stacked([with_array_numbers(row, first.dtype) for row in rows], len(seeds), "solvers")
    xs = _stacked([trees.split(start)[0] for start in starts], 1, "x0")
    xs = jax.tree.map(lambda a: jnp.concatenate([a] * len(rows)), xs)
    lanes_keys = None if first.numbers.key is None else jnp.stack(seeds * len(rows))
    numbers = dataclasses.replace(first.numbers, key=lanes_keys)
    lanes = _Lanes(first, solver, numbers, xs, len(rows) * len(seeds))
    shape = ((len(rows),) if several else ()) + (() if keys is None else (len(seeds),))
    return lanes.run(clock, progress, shape)


def _stacked(trees: list[Any], repeats: int, argument: str) -> Any:
    """Pytrees of one structure as one, each `repeats` times in a row on a new leading axis."""
    split = [Static.split(tree) for tree in trees]
    static = split[0][1]
    if any(other != static for _, other in split):
        expected = "ones that differ in their numbers only; run the others in a sweep of their own"
        raise InputError(argument, f"{len(trees)} of different structure", expected)
    columns = list(zip(*(leaves for leaves, _ in split), strict=True))
    if any(len({(np.shape(a), jnp.result_type(a)) for a in column}) > 1 for column in columns):
        raise InputError(argument, "arrays of different shapes or dtypes", "the same shapes and dtypes in all lanes")
    return static.join([jnp.repeat(jnp.stack([jnp.asarray(a) for a in column]), repeats, axis=0) for column in columns])


@functools.partial(jax.jit, static_argnames=("static", "plan"))
def _begin(leaves: list[Any], xs: PyTree, *, static: Static, plan: Plan) -> tuple[Carry, Array]:
    problem, solver, numbers = static.join(leaves)
    return jax.vmap(lambda s, n, x: start(problem, s, n, x, plan, 0), in_axes=(0, _AXES, 0))(solver, numbers, xs)


@functools.partial(jax.jit, static_argnames=("static", "plan"), donate_argnames=("carry", "table"))
def _advance(
    carry: Carry,
    table: Array,
    leaves: list[Any],
    step: Array,
    until: Array,
    first_row: Array,
    seconds: Array,
    *,
    static: Static,
    plan: Plan,
) -> tuple[Carry, Array, Array]:
    """Step all lanes until `until`, or until the last of them has ended; records go to `table`."""
    problem, solver, numbers = static.join(leaves)

    def one(solver: Solver, numbers: Numbers, carry: Carry, step: Array) -> tuple[Carry, Array, Array | None]:
        return take_step(carry, problem, solver, numbers, plan, step, seconds)

    lanes = jax.vmap(one, in_axes=(0, _AXES, 0, None))

    def running(state: tuple[Carry, Array, Array]) -> Array:
        carry, _, step = state
        return (step < until) & jnp.any(carry.watch.code <= Ending.RUNNING)

    def body(state: tuple[Carry, Array, Array]) -> tuple[Carry, Array, Array]:
        carry, table, step = state
        step = step + 1
        active = carry.watch.code <= Ending.RUNNING
        after, rows, kept = lanes(solver, numbers, carry, step)
        seen = active if kept is None else active & kept
        rows = jnp.where(seen[:, None], rows, jnp.nan)
        row = step - first_row
        if not plan.each:
            due = jax.lax.rem(step, numbers.every) == 0
            row = jnp.where(due, jax.lax.div(step, numbers.every) - first_row, table.shape[0] - 1)
        table = jax.lax.dynamic_update_slice(table, rows[None], (row, jnp.int32(0), jnp.int32(0)))
        carry = jax.tree.map(lambda a, b: _where(active, a, b), after, carry)
        return carry, table, step

    return jax.lax.while_loop(running, body, (carry, table, step))


def _where(lanes: Array, a: Array, b: Array) -> Array:
    return jnp.where(lanes.reshape(lanes.shape + (1,) * (a.ndim - 1)), a, b)


@functools.partial(jax.jit, static_argnames=("static",))
def _settle(leaves: list[Any], carry: Carry, *, static: Static) -> End:
    problem = static.join(leaves)[0]
    return jax.vmap(lambda carry: settle(problem, carry))(carry)


class _Lanes:
    """One call of `sweep`, inputs checked and stacked."""

    def __init__(self, setup: Setup, solver: Solver, numbers: Numbers, xs: PyTree, count: int):
        self.setup, self.xs, self.count = setup, xs, count
        self.plan = dataclasses.replace(setup.plan, keep_last=True)
        self.leaves, self.static = Static.split((setup.problem, solver, numbers))

    def run(self, clock: float, progress: bool | str, shape: tuple[int, ...]) -> Solution:
        setup, plan, every = self.setup, self.plan, int(self.setup.numbers.every)
        compiled_before = compile_clock.seconds
        carry, first = _begin(self.leaves, self.xs, static=self.static, plan=plan)
        columns = len(plan.record)
        capacity = max(16, min(_TABLE_ENTRIES // (self.count * max(columns, 1)), _ROWS))
        table = jnp.full((capacity + 1, self.count, columns), jnp.nan, setup.dtype)
        records, step, size, interrupted_at = [np.asarray(first)[None]], 0, 1, False
        running = bool(np.any(np.asarray(carry.watch.code) <= Ending.RUNNING))
        label = f"{self.count} × {setup.solver.name}"
        with interruptible() as interrupted, closing(Bar(label, setup.steps, progress)) as bar:
            while running and step < setup.steps:
                first_row = step // every + 1
                until = min(setup.steps, step + size, (first_row + capacity) * every - 1)
                began = time.perf_counter() - compile_clock.seconds
                seconds = np.asarray(time.perf_counter() - clock, setup.dtype)
                numbers = (np.int32(step), np.int32(until), np.int32(first_row), seconds)
                carry, table, reached = _advance(
                    carry, table, self.leaves, *numbers, static=self.static, plan=plan
                )  # fmt: skip
                reached, codes = int(reached), np.asarray(carry.watch.code)
                took = time.perf_counter() - compile_clock.seconds - began
                records.append(np.array(table)[: reached // every + 1 - first_row])
                size = max(1, min(100 * size, int(_CHUNK_SECONDS * (reached - step) / max(took, 1e-9))))
                step, running = reached, bool(np.any(codes <= Ending.RUNNING))
                ended = int(np.sum(codes > Ending.RUNNING))
                bar.update(step, f"{ended} of {self.count} lanes have ended")
                if running and interrupted():
                    running, interrupted_at = False, True
        end = _settle(self.leaves, carry, static=self.static)
        return self._solution(carry, end, np.concatenate(records), shape, clock, compiled_before, interrupted_at)

    def _solution(
        self,
        carry: Carry,
        end: End,
        table: np.ndarray,
        shape: tuple[int, ...],
        clock: float,
        compiled_before: float,
        interrupted: bool,
    ) -> Solution:
        def lanes(tree: Any) -> Any:
            return jax.tree.map(lambda a: a.reshape(shape + a.shape[1:]), tree)

        ending = np.array(end.ending)
        if interrupted:
            ending[(ending == Ending.STEP_LIMIT) & (np.asarray(carry.watch.code) <= Ending.RUNNING)] = (
                Ending.INTERRUPTED
            )
        steps = np.asarray(carry.step)
        history = {
            name: lanes(np.moveaxis(table[:, :, i], 1, 0)) for i, name in enumerate(self.plan.record)
        }  # fmt: skip
        history["step"] = np.arange(len(table)) * int(self.setup.numbers.every)
        status = Status(
            lanes(ending), lanes(steps), lanes(np.asarray(end.test)), self.setup.names, self.setup.solver.name
        )
        elapsed = time.perf_counter() - clock
        return Solution(
            self.setup.rebuild(lanes(end.state.x)),
            lanes(end.point.value),
            lanes(end.point.norm),
            status,
            lanes(steps),
            history,
            jax.tree.map(np.asarray, lanes(end.calls)),
            seconds=elapsed,
            compile_seconds=min(elapsed, compile_clock.seconds - compiled_before),
            state=lanes(end.state),
            aux=lanes(end.aux),
        )
