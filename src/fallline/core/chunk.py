"""The compiled part of the loop: one `while_loop` over a solver's steps, with its records and tests.

Everything that a step hands to the next is one pytree, donated whole. What the host must know of a
chunk is in a few scalars and one small array of records.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from operator import attrgetter
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from . import trees
from .calls import COST, Calls, strong
from .problem import Problem
from .program import Static
from .solver import GRADIENT, Solver
from .status import OWN_TEST, Ending
from .stopping import Seen, StoppingRule

__all__ = [
    "COUNTED",
    "MEASURED",
    "Carry",
    "Numbers",
    "Plan",
    "Point",
    "advance",
    "compile_together",
    "compiled_advance",
    "compiled_finish",
    "compiled_start",
    "decode",
    "encode",
    "finish",
    "has_aux",
    "pace_of",
    "settle",
    "start",
    "state_measures",
    "take_step",
]

MEASURED = ("value", "gradient_norm")
COUNTED = tuple(f"calls.{oracle}" for oracle in COST)  # what the method asked so far, itself
_STALL = 100  # looks without a bit of change before a run counts as stalled
_TESTS = 8  # the code of an end is the ending, plus this times (the index of the met rule + 1)


class Watch(eqx.Module):
    """The scalars by which a run is judged. `value` and `norm` are None where the state has them.

    `code` is positive once the run has ended, see `encode`. Until then it is minus the number of looks
    without a bit of change: one integer, because each scalar of a loop is a kernel of its own.
    """

    code: Array
    memory: tuple[Any, ...]  # of the stopping rules
    value: Array | None
    norm: Array | None


class Carry(eqx.Module):
    """Everything that one step hands to the next."""

    state: Any
    step: Array
    watch: Watch
    extra: Calls  # oracle calls for the loop's own measurements
    rows: Array  # (capacity + 1, quantities): the records of this chunk, and a spare row
    last_finite: Any  # the last point known to be finite, where it cannot be recomputed (inside jit); else None


class Plan(eqx.Module):
    """The static part of a run."""

    record: tuple[str, ...] = eqx.field(static=True)
    random: bool = eqx.field(static=True)
    keep_last: bool = eqx.field(static=True)
    each: bool = eqx.field(static=True)  # every step is recorded


class Numbers(eqx.Module):
    """The numbers of a run: changing them never recompiles."""

    key: Any
    every: Any
    rules: tuple[StoppingRule, ...]


class Point(NamedTuple):
    """What was measured of the current point."""

    value: Array
    norm: Array


def encode(ending: Ending, test: int = OWN_TEST) -> int:
    """An ending and the index of the rule that brought it, as one integer."""
    return int(ending) + _TESTS * (test - OWN_TEST)


def decode(code: Any) -> tuple[Any, Any]:
    """The ending and the index of the rule; any code of a run that goes on gives `RUNNING`."""
    code = np.maximum(code, 0) if isinstance(code, int) else jnp.maximum(code, 0)
    return code % _TESTS, code // _TESTS + OWN_TEST


def has_aux(problem: Problem) -> bool:
    """Whether the user's function returns more than its value."""
    return getattr(problem, "has_aux", False)


def state_measures(state: Any) -> bool:
    """Whether the state brings value and gradient norm of its point for nothing."""
    return all(getattr(state, name, None) is not None for name in MEASURED)


def measure(problem: Problem, state: Any, dtype: Any) -> tuple[Point, Calls]:
    """Value and gradient norm of the state's point, computed where the state has none."""
    if state_measures(state):
        return Point(state.value.astype(dtype), state.gradient_norm.astype(dtype)), Calls()
    value, gradient = problem.value_and_gradient(state.x)
    return Point(value.astype(dtype), trees.norm(gradient).astype(dtype)), Calls(gradient=1)


def _row(plan: Plan, state: Any, point: Point, dtype: Any) -> Array:
    known = dict(zip(MEASURED, point, strict=True))
    columns = [known[name] if name in known else attrgetter(name)(state) for name in plan.record]
    return jnp.stack([c.astype(dtype) for c in columns]) if columns else jnp.zeros(0, dtype)


def _look(
    problem: Problem,
    numbers: Numbers,
    watch: Watch,
    state: Any,
    extra: Calls,
    point: Point,
    before: Point,
    seconds: Any,
) -> Watch:
    """Judge the current point: the first rule in the user's order wins, divergence over all."""
    done = getattr(state, "done", None)
    code = jnp.int32(Ending.RUNNING)
    if done is None:  # a method with a test of its own may rest for as long as it likes
        same = (point.value == before.value) & (point.norm == before.norm)
        code = jnp.where(same, watch.code - 1, encode(Ending.RUNNING))
        code = jnp.where(code <= -_STALL, encode(Ending.STALLED), code)
    bound = problem.lower_bound
    seen = Seen(*point, None if bound is None else jnp.asarray(bound), state.calls + extra, state.calls, seconds)
    memories: list[Any] = []
    for index in reversed(range(len(numbers.rules))):
        rule = numbers.rules[index]
        met, memory = rule(seen, watch.memory[index])
        code = jnp.where(met, encode(Ending.CONVERGED if rule.converges else Ending.BUDGET, index), code)
        memories.insert(0, trees.cast_like(memory, watch.memory[index]))
    if done is not None:
        code = jnp.where(done, encode(Ending.CONVERGED), code)
    code = jnp.where(jnp.isfinite(point.value) & jnp.isfinite(point.norm), code, encode(Ending.DIVERGED))
    kept = Point(None, None) if state_measures(state) else point  # type: ignore[arg-type]
    return Watch(code.astype(jnp.int32), tuple(memories), *kept)


def start(
    problem: Problem, solver: Solver, numbers: Numbers, x: PyTree, plan: Plan, capacity: int
) -> tuple[Carry, Array]:
    """The carry before the first step, and the first record."""
    dtype = trees.real_dtype(x)
    key = jax.random.fold_in(numbers.key, 0) if plan.random else None
    # Without the copy the carry would hold the caller's own buffers, and donate them.
    state = solver.init(problem, trees.copy_tree(x), key=key)
    state = jax.tree.map(lambda a: jax.lax.convert_element_type(a, jnp.asarray(a).dtype), state)
    state = eqx.tree_at(lambda s: s.calls, state, strong(state.calls))
    point, calls = measure(problem, state, dtype)
    extra = strong(calls)
    memory = tuple(
        jax.tree.map(lambda a: jnp.asarray(a, dtype if trees.is_floating(a) else jnp.int32), rule.init())
        for rule in numbers.rules
    )
    nothing = Point(jnp.asarray(jnp.nan, dtype), jnp.asarray(jnp.nan, dtype))
    watch = Watch(jnp.int32(Ending.RUNNING), memory, None, None)
    watch = _look(problem, numbers, watch, state, extra, point, nothing, jnp.zeros((), dtype))
    rows = jnp.full((capacity + 1, len(plan.record)), jnp.nan, dtype)
    last = trees.copy_tree(x) if plan.keep_last else None
    return Carry(state, jnp.int32(0), watch, extra, rows, last), _row(plan, state, point, dtype)


def take_step(
    carry: Carry, problem: Problem, solver: Solver, numbers: Numbers, plan: Plan, step: Array, seconds: Any
) -> tuple[Carry, Array, Array | None]:
    """The step number `step`: the carry after it (its rows untouched), its record, and whether to keep that.

    The last is None where every step is recorded.
    """
    dtype, extra, watch = trees.real_dtype(carry.state.x), carry.extra, carry.watch
    key = jax.random.fold_in(numbers.key, step) if plan.random else None
    state = trees.cast_like(solver.step(problem, carry.state, key=key), carry.state)
    due = None if plan.each else jax.lax.rem(step, numbers.every) == 0
    measured = state_measures(state)
    if measured:
        before, (point, _) = measure(problem, carry.state, dtype)[0], measure(problem, state, dtype)
        watch = _look(problem, numbers, watch, state, extra, point, before, seconds)
    else:
        # The point's value costs an oracle call: it is asked, and judged, for the records alone.
        before = Point(watch.value, watch.norm)  # type: ignore[arg-type]

        def look() -> tuple[Watch, Calls]:
            point, calls = measure(problem, state, dtype)
            paid = strong(extra + calls)
            return _look(problem, numbers, watch, state, paid, point, before, seconds), paid

        watch, extra = look() if due is None else jax.lax.cond(due, look, lambda: (watch, extra))
        point = Point(watch.value, watch.norm)  # type: ignore[arg-type]
    kept, last = due, carry.last_finite
    if getattr(state, "batch_value", None) is not None:
        # It judges the point that the step began from: where that was lost, the step does not count.
        sound = jnp.isfinite(state.batch_value)
        code = jnp.where(sound, watch.code, encode(Ending.DIVERGED)).astype(jnp.int32)
        watch = eqx.tree_at(lambda w: w.code, watch, code)
        step, kept = jnp.where(sound, step, carry.step), sound if due is None else sound & due
        last = choose(sound, carry.state.x, last) if plan.keep_last else None
    if plan.keep_last:
        finite = watch.code != encode(Ending.DIVERGED)
        last = choose(finite if measured or due is None else finite & due, state.x, last)
    return Carry(state, step, watch, extra, carry.rows, last), _row(plan, state, point, dtype), kept


def advance(
    carry: Carry,
    problem: Problem,
    solver: Solver,
    numbers: Numbers,
    plan: Plan,
    until: Any,
    first_row: Any,
    seconds: Any,
) -> Carry:
    """Step until `until` or the end.

    The record of step `t`, where `every` divides it, goes to row `t / every − first_row`.
    """
    capacity = carry.rows.shape[0] - 1

    def running(carry: Carry) -> Array:
        return (carry.step < until) & (carry.watch.code <= Ending.RUNNING)

    def body(carry: Carry) -> Carry:
        step = carry.step + 1
        carry, record, kept = take_step(carry, problem, solver, numbers, plan, step, seconds)
        row = (step if plan.each else jax.lax.div(step, numbers.every)) - first_row
        row = row if kept is None else jnp.where(kept, row, capacity)
        rows = jax.lax.dynamic_update_slice(carry.rows, record[None], (row, jnp.int32(0)))
        return dataclasses.replace(carry, rows=rows)

    return jax.lax.while_loop(running, body, carry)


def choose(which: Array, a: PyTree, b: PyTree) -> PyTree:
    """One of two trees, by a scalar."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), a, b)


def finish(problem: Problem, state: Any) -> tuple[Point, Any, Calls]:
    """Value and gradient norm of the final point, and the user's aux there."""
    point, calls = measure(problem, state, trees.real_dtype(state.x))
    if has_aux(problem):
        calls = calls + Calls(value=1)
    return point, problem.aux(state.x), strong(calls)


class End(NamedTuple):
    """How a run without a host ended: its last finite point, and what is known of it."""

    state: Any
    point: Point
    aux: Any
    calls: Calls
    ending: Array
    test: Array


def settle(problem: Problem, carry: Carry) -> End:
    """The end of a run that kept its last finite point in the carry."""
    reached, aux, more = finish(problem, carry.state)
    ending, test = decode(carry.watch.code)
    ending = jnp.where(ending == Ending.RUNNING, Ending.STEP_LIMIT, ending)
    lost = (ending == Ending.DIVERGED) | ~(jnp.isfinite(reached.value) & jnp.isfinite(reached.norm))
    x = choose(lost, carry.last_finite, carry.state.x)

    def before() -> tuple[Point, Any, Calls]:
        # The state's scalars belong to the point that was given up.
        value, gradient = problem.value_and_gradient(x)
        dtype = trees.real_dtype(x)
        point = Point(value.astype(dtype), trees.norm(gradient).astype(dtype))
        return point, problem.aux(x), strong(more + GRADIENT)

    point, aux, more = jax.lax.cond(lost, before, lambda: (reached, aux, more))
    calls = carry.state.calls + carry.extra + more
    state = eqx.tree_at(lambda s: s.x, carry.state, x)
    return End(state, point, aux, calls, jnp.where(lost, Ending.DIVERGED, ending), test)


class Pace:
    """What is remembered of two compiled programs: the seconds that a step took when they last ran."""

    seconds: float | None = None


@functools.lru_cache(maxsize=256)
def pace_of(static: Static, plan: Plan, shapes: tuple[Any, ...]) -> Pace:
    """The memory of the programs for these parts and shapes; new where they were never asked for."""
    return Pace()


def compile_together(leaves: list[Any], x: Any, *, static: Static, plan: Plan, capacity: int) -> None:
    """Compile the start while the chunk is traced; the calls find both in JAX's own cache.

    Only where the shapes say all: where an input is bound to a device the chunk's input is too.
    """
    if any(isinstance(leaf, jax.Array) and leaf.committed for leaf in jax.tree.leaves((leaves, x))):
        return
    start_program = _start_program(jax.default_backend() == "cpu")
    lowered = start_program.lower(leaves, x, static=static, plan=plan, capacity=capacity)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lowered.compile).add_done_callback(Future.exception)  # the call meets it again
        carry, _ = lowered.out_info
        number, seconds = np.int32(0), np.zeros((), trees.real_dtype(x))
        carry = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), carry)
        compiled_advance.lower(carry, leaves, number, number, seconds, static=static, plan=plan).compile()


def compiled_start(leaves: list[Any], x: Any, *, static: Static, plan: Plan, capacity: int) -> tuple[Carry, Array]:
    """`start`, with problem, solver and numbers as array leaves and a static rest."""
    quickly = jax.default_backend() == "cpu"
    try:
        return _start_program(quickly)(leaves, x, static=static, plan=plan, capacity=capacity)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):  # another version of XLA may not have it
            raise
        return _start_program(False)(leaves, x, static=static, plan=plan, capacity=capacity)


@functools.cache
def _start_program(quickly: bool) -> Any:
    """It runs once a call: without XLA's newer emitters of fused loops it compiles in half of the time."""

    def begin(leaves: list[Any], x: Any, *, static: Static, plan: Plan, capacity: int) -> tuple[Carry, Array]:
        problem, solver, numbers = static.join(leaves)
        return start(problem, solver, numbers, x, plan, capacity)

    options = {"xla_cpu_use_fusion_emitters": False} if quickly else None
    return jax.jit(begin, static_argnames=("static", "plan", "capacity"), compiler_options=options)


@functools.partial(jax.jit, static_argnames=("static", "plan"), donate_argnames="carry")
def compiled_advance(
    carry: Carry, leaves: list[Any], until: Any, first_row: Any, seconds: Any, *, static: Static, plan: Plan
) -> Carry:
    """`advance`; the carry is donated whole."""
    problem, solver, numbers = static.join(leaves)
    return advance(carry, problem, solver, numbers, plan, until, first_row, seconds)


@functools.partial(jax.jit, static_argnames=("static",))
def compiled_finish(leaves: list[Any], state: Any, *, static: Static) -> tuple[Point, Any, Calls]:
    """`finish`."""
    return finish(static.join(leaves)[0], state)
