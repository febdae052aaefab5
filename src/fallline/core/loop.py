"""`minimize`: the one loop that runs every solver.

The loop is compiled whole and runs in chunks of a quarter to half a second. Between two chunks
the host reads one small array, and looks at the clock, the callback and Ctrl-C. Inside `jit` or
`vmap` the same loop runs as one `while_loop` without the host.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from . import trees
from .calls import Calls, strong
from .errors import InputError, check_count, is_traced
from .problem import Problem, bind, check_needs
from .program import Static
from .progress import Bar, Progress, interruptible
from .solution import Solution
from .solver import Solver, with_array_numbers
from .status import OWN_TEST, Ending, Status
from .stopping import Seen, StoppingRule

__all__ = ["minimize"]

_ROWS = 1024  # records that one chunk can hold
_STALL = 100  # steps without a bit of change before a run counts as stalled
_CHUNK_SECONDS = 0.35
_SNAPSHOT_SECONDS = 3.0
_MEASURED = ("value", "gradient_norm")


class _Carry(eqx.Module):
    """Everything that one step hands to the next; one pytree, donated whole."""

    state: Any
    step: Array
    code: Array
    test: Array
    measured: tuple[Array, Array]  # value and gradient norm at the last look
    quiet: Array  # looks without a bit of change
    memory: tuple[Any, ...]  # of the stopping rules
    extra: Calls  # oracle calls paid for by the loop's own measurements
    rows: Array  # (capacity, quantities): the records of this chunk
    last_finite: Any  # the last finite point, where it cannot be recomputed (inside jit); else None


class _Plan(eqx.Module):
    """The static part of a run: what is recorded and which rules are asked."""

    record: tuple[str, ...] = eqx.field(static=True)
    random: bool = eqx.field(static=True)
    keep_last: bool = eqx.field(static=True)


class _Numbers(eqx.Module):
    """The numbers of a run: changing them never recompiles."""

    key: Any
    every: Any
    rules: tuple[StoppingRule, ...]


def _from_state(state: Any) -> bool:
    """Whether the state brings value and gradient norm of its point for nothing."""
    return all(getattr(state, name, None) is not None for name in _MEASURED)


def _measure(problem: Problem, state: Any, dtype: Any) -> tuple[tuple[Array, Array], Calls]:
    """Value and gradient norm of the state's point, computed where the state has none."""
    if _from_state(state):
        return (state.value.astype(dtype), state.gradient_norm.astype(dtype)), Calls()
    value, gradient = problem.value_and_gradient(state.x)
    return (value.astype(dtype), trees.norm(gradient).astype(dtype)), Calls(gradient=1)


def _row(plan: _Plan, state: Any, measured: tuple[Array, Array]) -> Array:
    known = dict(zip(_MEASURED, measured, strict=True))
    columns = [known[name] if name in known else getattr(state, name) for name in plan.record]
    return jnp.stack([jnp.asarray(c, measured[0].dtype) for c in columns]) if columns else jnp.zeros(0, measured[0].dtype)


def _judge(
    problem: Problem, numbers: _Numbers, carry: _Carry, measured: tuple[Array, Array], seconds: Any
) -> tuple[Array, Array, Array, tuple]:
    """Code, test, quiet count and rule memories after a look at the current point."""
    value, norm = measured
    code, test = jnp.int32(Ending.RUNNING), jnp.int32(OWN_TEST)
    quiet = jnp.where((value == carry.measured[0]) & (norm == carry.measured[1]), carry.quiet + 1, 0)
    code = jnp.where(quiet >= _STALL, Ending.STALLED, code)

    bound = problem.lower_bound
    calls = carry.state.calls + carry.extra
    seen = Seen(value, norm, None if bound is None else jnp.asarray(bound), calls, seconds)
    memories = []
    for index in reversed(range(len(numbers.rules))):  # the first rule in the user's order wins
        rule = numbers.rules[index]
        met, memory = rule(seen, carry.memory[index])
        code = jnp.where(met, Ending.CONVERGED if rule.converges else Ending.BUDGET, code)
        test = jnp.where(met, index, test)
        memories.insert(0, trees.cast_like(memory, carry.memory[index]))
    done = getattr(carry.state, "done", None)
    if done is not None:
        code = jnp.where(done, Ending.CONVERGED, code)
        test = jnp.where(done, OWN_TEST, test)
    code = jnp.where(jnp.isfinite(value) & jnp.isfinite(norm), code, Ending.DIVERGED)
    return code.astype(jnp.int32), test.astype(jnp.int32), quiet.astype(jnp.int32), tuple(memories)


def _start(
    problem: Problem, solver: Solver, numbers: _Numbers, x: PyTree, plan: _Plan, capacity: int
) -> tuple[_Carry, Array]:
    """The carry before the first step, and the first record."""
    dtype = trees.real_dtype(x)
    key = jax.random.fold_in(numbers.key, 0) if plan.random else None
    state = solver.init(problem, trees.copy_tree(x), key=key)
    state = jax.tree.map(lambda a: jax.lax.convert_element_type(a, jnp.asarray(a).dtype), state)
    state = eqx.tree_at(lambda s: s.calls, state, strong(state.calls))
    measured, extra = _measure(problem, state, dtype)
    memory = tuple(
        jax.tree.map(lambda a: jnp.asarray(a, dtype if trees.is_floating(a) else jnp.int32), rule.init())
        for rule in numbers.rules
    )
    nan = jnp.asarray(jnp.nan, dtype)
    carry = _Carry(
        state=state,
        step=jnp.int32(0),
        code=jnp.int32(Ending.RUNNING),
        test=jnp.int32(OWN_TEST),
        measured=(nan, nan),
        quiet=jnp.int32(0),
        memory=memory,
        extra=strong(extra),
        rows=jnp.full((capacity + 1, len(plan.record)), jnp.nan, dtype),
        last_finite=trees.copy_tree(x) if plan.keep_last else None,
    )
    code, test, quiet, memory = _judge(problem, numbers, carry, measured, jnp.zeros((), dtype))
    carry = eqx.tree_at(
        lambda c: (c.code, c.test, c.measured, c.quiet, c.memory), carry, (code, test, measured, quiet, memory)
    )
    return carry, _row(plan, state, measured)


def _advance(
    carry: _Carry,
    problem: Problem,
    solver: Solver,
    numbers: _Numbers,
    plan: _Plan,
    until: Array,
    first_row: Array,
    seconds: Array,
) -> _Carry:
    """Step until `until` or the end. Records of steps divisible by `every` go to `rows`."""
    dtype = carry.rows.dtype

    def running(carry: _Carry) -> Array:
        return (carry.step < until) & (carry.code == Ending.RUNNING)

    def body(carry: _Carry) -> _Carry:
        step = carry.step + 1
        key = jax.random.fold_in(numbers.key, step) if plan.random else None
        state = trees.cast_like(solver.step(problem, carry.state, key=key), carry.state)
        due = jax.lax.rem(step, numbers.every) == 0
        carry = eqx.tree_at(lambda c: (c.state, c.step), carry, (state, step))
        if _from_state(state):
            carry = _look(carry, *_measure(problem, state, dtype))
        else:
            # The point's value costs an oracle call: it is asked for the records alone.
            measured, extra = jax.lax.cond(
                due,
                lambda: (lambda m, e: (m, carry.extra + e))(*_measure(problem, state, dtype)),
                lambda: (carry.measured, carry.extra),
            )
            carry = eqx.tree_at(lambda c: c.extra, carry, strong(extra))
            looked = _look(carry, measured, Calls())
            carry = jax.tree.map(lambda a, b: jnp.where(due, a, b), *map(_scalars, (looked, carry))).put(carry)
        batch_value = getattr(state, "batch_value", None)
        if batch_value is not None:
            finite = jnp.isfinite(batch_value)
            carry = eqx.tree_at(lambda c: c.code, carry, jnp.where(finite, carry.code, Ending.DIVERGED))
        # A step without a record writes to the spare last row.
        row = jnp.where(due, jax.lax.div(step, numbers.every) - first_row, carry.rows.shape[0] - 1)
        rows = jax.lax.dynamic_update_slice(carry.rows, _row(plan, state, carry.measured)[None], (row, jnp.int32(0)))
        carry = eqx.tree_at(lambda c: c.rows, carry, rows)
        if plan.keep_last:
            ok = carry.code != Ending.DIVERGED
            last = jax.tree.map(lambda a, b: jnp.where(ok, a, b), state.x, carry.last_finite)
            carry = eqx.tree_at(lambda c: c.last_finite, carry, last)
        return carry

    def _look(carry: _Carry, measured: tuple[Array, Array], extra: Calls) -> _Carry:
        code, test, quiet, memory = _judge(problem, numbers, carry, measured, seconds)
        return eqx.tree_at(
            lambda c: (c.code, c.test, c.quiet, c.memory, c.measured), carry, (code, test, quiet, memory, measured)
        )

    return jax.lax.while_loop(running, body, carry)


class _Scalars(eqx.Module):
    """The few scalars of a carry that a look changes."""

    values: tuple

    def put(self, carry: _Carry) -> _Carry:
        return eqx.tree_at(lambda c: (c.code, c.test, c.quiet, c.memory, c.measured), carry, self.values)


def _scalars(carry: _Carry) -> _Scalars:
    return _Scalars((carry.code, carry.test, carry.quiet, carry.memory, carry.measured))


def _finish(problem: Problem, state: Any) -> tuple[tuple[Array, Array], Any, Calls]:
    """Value and gradient norm of the final point, and the user's aux there."""
    measured, extra = _measure(problem, state, trees.real_dtype(state.x))
    return measured, problem.aux(state.x), strong(extra)


def _split_static(tree: Any) -> tuple[Any, Static]:
    arrays, static = eqx.partition(tree, eqx.is_array_like)
    return arrays, Static(static)


@functools.partial(jax.jit, static_argnames=("static", "plan", "capacity"))
def _compiled_start(arrays: Any, x: Any, *, static: Static, plan: _Plan, capacity: int) -> Any:
    return _start(*eqx.combine(arrays, static.unwrap()), x, plan, capacity)


@functools.partial(jax.jit, static_argnames=("static", "plan"), donate_argnames="carry")
def _compiled_advance(
    carry: Any, arrays: Any, until: Any, first_row: Any, seconds: Any, *, static: Static, plan: _Plan
) -> Any:
    problem, solver, numbers = eqx.combine(arrays, static.unwrap())
    return _advance(carry, problem, solver, numbers, plan, until, first_row, seconds)


@functools.partial(jax.jit, static_argnames=("static",))
def _compiled_finish(arrays: Any, state: Any, *, static: Static) -> Any:
    return _finish(eqx.combine(arrays, static.unwrap())[0], state)


def minimize(
    problem: Problem | Callable,
    x0: PyTree,
    solver: Solver,
    *,
    args: tuple = (),
    has_aux: bool = False,
    steps: int = 1000,
    stop: StoppingRule | None | str = "auto",
    key: Array | int | None = None,
    record: Sequence[str] = ("value", "gradient_norm"),
    every: int | None = None,
    callback: Callable[[Progress], Any] | None = None,
    progress: bool | str = "auto",
    throw: bool = False,
) -> Solution:
    """Minimize an objective from a starting point.

    **Arguments:**
    - `problem`: a callable `fn(x, *args) -> scalar`, or a `Problem`.
    - `x0`: any pytree of floating or complex arrays, or an Equinox or Flax NNX model. Its dtype is
      the dtype of the run.
    - `solver`: the method, such as `optimizer(optax.adam, learning_rate=1e-2)`.
    - `args`, `has_aux`: further arguments of the callable; whether it returns `(scalar, aux)`.
    - `steps`: the step limit.
    - `stop`: a stopping rule; `"auto"` takes the solver's own, which is `gradient_norm(1e-6)` where
      it says nothing else; None runs to the step limit.
    - `key`: a key of `jax.random`, or a seed. Needed where solver or problem is random. Step `t`
      uses `fold_in(key, t)`, whatever the chunks.
    - `record`: names of scalars of the solver's state to keep; `value` and `gradient_norm` always
      exist, and are computed (and counted) where the state does not bring them.
    - `every`: steps between two records: 1 by default, or one pass over the data for minibatches.
      Where the records must be computed, the stopping rule looks at them only.
    - `callback`: called with a `Progress` about twice a second; a true answer ends the run.
    - `progress`: a bar on stderr; `"auto"` shows it in a terminal after a second.
    - `throw`: raise `RunError` unless the run converged.

    **Returns:** a `Solution`. A diverging run stops at the step where value or gradient is no longer
    finite and returns the point before it. The first Ctrl-C returns the point reached.

    **Raises:** `InputError` before anything is compiled where an argument cannot be used.
    """
    clock = time.perf_counter()
    check_count("steps", steps, 0)
    if not isinstance(solver, Solver):
        raise InputError("solver", type(solver).__name__, "a fallline solver; wrap Optax ones in optimizer(...)")
    x, rebuild = trees.split(x0)
    bound = bind(problem, x, rebuild, args=args, has_aux=has_aux, needs=solver.needs)
    check_needs(solver, bound)
    random = solver.random or bool(bound.random)
    key = _check_key(key, random, solver, bound)
    if every is None:
        batch = getattr(bound, "batch_size", None)
        every = 1 if batch is None else -(-bound.size // batch)  # type: ignore[attr-defined]
    check_count("every", every, 1)
    rules = _check_rules(stop, solver, bound)
    dtype = trees.real_dtype(x)
    numbers = with_array_numbers(_Numbers(key, every, rules), dtype)
    solver = with_array_numbers(solver, dtype)
    names = tuple(rule.describe() if not is_traced(rule) else type(rule).__name__ for rule in rules)
    plan = _Plan(tuple(record), random, keep_last=is_traced((x, bound, solver, numbers)))
    run = _Run(bound, solver, numbers, plan, x, rebuild, steps, names)
    _check_record(run)
    if plan.keep_last:
        if callback is not None:
            raise InputError("callback", "a function", "None inside jit or vmap, where the host is not there")
        if throw:
            raise InputError("throw", True, "False inside jit or vmap; look at the status outside")
        solution = run.traced()
    else:
        solution = run.hosted(clock, callback, progress)
    return solution.raise_for_status() if throw else solution


def _check_key(key: Any, random: bool, solver: Solver, problem: Problem) -> Any:
    if not random:
        return None
    if key is None:
        who = solver.name if solver.random else problem.label
        raise InputError("key", None, f"a key of jax.random or an integer seed: {who} is random")
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(int(key))
    if not isinstance(key, jax.Array):
        raise InputError("key", type(key).__name__, "a key of jax.random or an integer seed")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def _check_rules(stop: Any, solver: Solver, problem: Problem) -> tuple[StoppingRule, ...]:
    if isinstance(stop, str):
        if stop != "auto":
            raise InputError("stop", repr(stop), 'a stopping rule, None or "auto"')
        stop = solver.stopping()
    if stop is None:
        return ()
    if not isinstance(stop, StoppingRule):
        raise InputError("stop", repr(stop), "a stopping rule such as gradient_norm(1e-6), None or 'auto'")
    if "lower_bound" in stop.needs and problem.lower_bound is None:
        raise InputError("stop", stop.describe(), f"a problem with a lower bound; {problem.label} declares none")
    return stop.leaves()


def _check_record(run: _Run) -> None:
    if set(run.plan.record) <= set(_MEASURED):
        return
    state = run.shapes.state
    known = set(_MEASURED) | {
        name for name, leaf in vars(state).items() if getattr(leaf, "shape", None) == () and name != "done"
    }
    for name in run.plan.record:
        if name not in known:
            raise InputError("record", repr(name), f"one of {', '.join(sorted(known))}")


class _Run:
    """One call of `minimize`, inputs checked."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        numbers: _Numbers,
        plan: _Plan,
        x: PyTree,
        rebuild: Callable,
        steps: int,
        names: tuple[str, ...],
    ):
        self.problem, self.solver, self.numbers, self.plan = problem, solver, numbers, plan
        self.x, self.rebuild, self.steps, self.names = x, rebuild, int(steps), names
        self.parts = (problem, solver, numbers)
        self.has_aux = getattr(problem, "has_aux", False)

    @functools.cached_property
    def shapes(self) -> _Carry:
        start = lambda parts, x: _start(*parts, x, self.plan, 1)[0]  # noqa: E731
        return eqx.filter_eval_shape(start, self.parts, self.x)

    def traced(self) -> Solution:
        """The whole run as one `while_loop`, for `jit` and `vmap`."""
        if any("time_limit" in name or "TimeLimit" in name for name in self.names):
            raise InputError("stop", "time_limit", "a rule without a clock inside jit or vmap")
        every = self.numbers.every
        if is_traced(every):
            raise InputError("every", "a traced value", "a Python integer inside jit or vmap")
        rows = self.steps // int(every)
        carry, first = _start(*self.parts, self.x, self.plan, max(rows, 1))
        zero = jnp.zeros((), carry.rows.dtype)
        carry = _advance(carry, *self.parts, self.plan, jnp.int32(self.steps), jnp.int32(1), zero)
        code = jnp.where(carry.code == Ending.RUNNING, Ending.STEP_LIMIT, carry.code)
        history = {name: jnp.concatenate([first[i : i + 1], carry.rows[:rows, i]]) for i, name in enumerate(self.plan.record)}
        history["step"] = jnp.arange(rows + 1) * int(every)
        state = eqx.tree_at(lambda s: s.x, carry.state, carry.last_finite)
        ok = carry.code != Ending.DIVERGED
        if _from_state(carry.state):
            # After a divergence the state's scalars belong to the point that was given up.
            measured, aux, extra = jax.lax.cond(
                ok,
                lambda: (_measure(self.problem, carry.state, zero.dtype)[0], self.problem.aux(state.x), strong(Calls())),
                lambda: self._final_scalars(state.x),
            )
        else:
            measured, aux, extra = self._final_scalars(state.x)
        return self._solution(
            state, state.x, measured, aux, code, carry.step, carry.test, history, carry.state.calls + carry.extra + extra
        )

    def _final_scalars(self, x: PyTree) -> tuple:
        value, gradient = self.problem.value_and_gradient(x)
        dtype = trees.real_dtype(x)
        return (value.astype(dtype), trees.norm(gradient).astype(dtype)), self.problem.aux(x), strong(Calls(gradient=1))

    def hosted(self, clock: float, callback: Callable | None, progress: bool | str) -> Solution:
        """The run in compiled chunks, with the host between them."""
        arrays, static = _split_static(self.parts)
        kwargs = {"static": static, "plan": self.plan}
        every = int(self.numbers.every)

        def advance(carry: _Carry, until: int, first_row: int) -> _Carry:
            seconds = np.asarray(time.perf_counter() - clock, dtype)
            return _compiled_advance(carry, arrays, np.int32(until), np.int32(first_row), seconds, **kwargs)

        dtype = np.dtype(trees.real_dtype(self.x))
        carry, first = _compiled_start(arrays, self.x, capacity=_ROWS, **kwargs)
        carry = advance(carry, 0, 0)  # compiles, takes no step
        code, step = int(carry.code), 0
        compile_seconds = time.perf_counter() - clock
        records, size, snapshot, snapshot_time = [np.asarray(first)[None]], 1, None, time.perf_counter()
        bar = Bar(self.solver.name, self.steps, progress)
        with interruptible() as interrupted:
            if self.steps and not code:
                snapshot = (0, _to_host(carry))
            while code == Ending.RUNNING and step < self.steps:
                first_row = step // every + 1
                until = min(self.steps, step + size, (first_row + _ROWS) * every - 1)
                began = time.perf_counter()
                carry = advance(carry, until, first_row)
                new_step, code = int(carry.step), int(carry.code)
                took = time.perf_counter() - began
                rows = np.asarray(carry.rows[: new_step // every + 1 - first_row]) if every > 1 else np.array(carry.rows)[: new_step + 1 - first_row]
                records.append(rows)
                size = max(1, min(16 * size, int(_CHUNK_SECONDS * (new_step - step) / max(took, 1e-9))))
                step = new_step
                value, norm = (float(m) for m in carry.measured)
                bar.update(step, value, norm)
                if code == Ending.RUNNING and step < self.steps:
                    if time.perf_counter() - snapshot_time > _SNAPSHOT_SECONDS:
                        snapshot, snapshot_time = (step, _to_host(carry)), time.perf_counter()
                    if callback is not None:
                        point = lambda c=carry: self.rebuild(jax.tree.map(np.array, c.state.x))  # noqa: E731
                        seen = Progress(step, self.steps, value, norm, time.perf_counter() - clock, point)
                        if callback(seen):
                            code = int(Ending.INTERRUPTED)
                    if interrupted():
                        code = int(Ending.INTERRUPTED)
        bar.close()

        state, taken, extra, test = carry.state, carry.step, carry.extra, carry.test
        if code == Ending.DIVERGED and snapshot is not None:
            # Replay to the step before: the same compiled steps from the last snapshot, bit for bit.
            at, host = snapshot
            carry = jax.tree.map(jnp.asarray, host)
            while at < step - 1:
                at = min(step - 1, at + (_ROWS - 1) * every)
                carry = advance(carry, at, int(carry.step) // every + 1)
            calls = state.calls
            state = eqx.tree_at(lambda s: s.calls, carry.state, calls)
        elif code == Ending.RUNNING:
            code = int(Ending.STEP_LIMIT)
        measured, aux, more = (state.value, state.gradient_norm), None, Calls()
        if not _from_state(state) or self.has_aux:
            measured, aux, more = _compiled_finish(arrays, state, static=static)
        history = np.concatenate(records)
        columns = {name: history[:, i] for i, name in enumerate(self.plan.record)}
        columns["step"] = np.arange(len(history)) * every
        solution = self._solution(
            state, state.x, measured, aux, np.int32(code), np.asarray(taken), np.asarray(test), columns,
            _on_host(state.calls) + _on_host(extra) + _on_host(more),
            seconds=time.perf_counter() - clock, compile_seconds=compile_seconds,
        )  # fmt: skip
        return solution

    def _solution(
        self, state: Any, x: PyTree, measured: tuple, aux: Any, code: Any, step: Any, test: Any, history: dict, calls: Calls,
        **times: float,
    ) -> Solution:  # fmt: skip
        status = Status(code, step, test, self.names, self.solver.name)
        return Solution(
            self.rebuild(x), measured[0], measured[1], status, step, history, calls, state=state, aux=aux, **times
        )


def _on_host(calls: Calls) -> Calls:
    return jax.tree.map(np.asarray, calls)


def _to_host(tree: Any) -> Any:
    """A copy in host memory that survives the donation of the original."""
    return jax.tree.map(lambda a: np.array(a), tree)
