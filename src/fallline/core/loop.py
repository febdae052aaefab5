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
from .chunk import (
    MEASURED,
    Carry,
    Numbers,
    Plan,
    Point,
    advance,
    compiled_advance,
    compiled_finish,
    compiled_start,
    decode,
    encode,
    finish,
    start,
    state_measures,
)
from .errors import InputError, check_count, is_traced
from .problem import Problem, bind, check_needs
from .program import Static
from .progress import Bar, Progress, compile_clock, interruptible
from .solution import Solution
from .solver import GRADIENT, Solver, with_array_numbers
from .status import Ending, Status
from .stopping import StoppingRule, TimeLimit

__all__ = ["minimize"]

_ROWS = 1024  # records that one chunk can hold
_CHUNK_SECONDS = 0.35
_SNAPSHOT_SECONDS = 3.0


def minimize(
    problem: Problem | Callable[..., Any],
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
    numbers = with_array_numbers(Numbers(key, every, rules), dtype)
    solver = with_array_numbers(solver, dtype)
    names = tuple(rule.describe() if not is_traced(rule) else type(rule).__name__ for rule in rules)
    plan = Plan(tuple(record), random, keep_last=is_traced((x, bound, solver, numbers)), each=every == 1)
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
    if set(run.plan.record) <= set(MEASURED):
        return
    scalars = {name for name, leaf in vars(run.shapes).items() if getattr(leaf, "shape", None) == ()}
    known = set(MEASURED) | scalars - {"done"}
    for name in run.plan.record:
        if name not in known:
            raise InputError("record", repr(name), f"one of {', '.join(sorted(known))}")


class _Run:
    """One call of `minimize`, inputs checked."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        numbers: Numbers,
        plan: Plan,
        x: PyTree,
        rebuild: Callable[[PyTree], PyTree],
        steps: int,
        names: tuple[str, ...],
    ):
        self.problem, self.solver, self.numbers, self.plan = problem, solver, numbers, plan
        self.x, self.rebuild, self.steps, self.names = x, rebuild, int(steps), names
        self.parts = (problem, solver, numbers)
        self.dtype = np.dtype(trees.real_dtype(x))

    @functools.cached_property
    def shapes(self) -> Any:
        """The solver's state as shapes and dtypes."""
        return eqx.filter_eval_shape(
            lambda parts, x: start(parts[0], parts[1], parts[2], x, self.plan, 1)[0].state, self.parts, self.x
        )

    def traced(self) -> Solution:
        """The whole run as one `while_loop`, for `jit` and `vmap`."""
        if any(isinstance(rule, TimeLimit) for rule in self.numbers.rules):
            raise InputError("stop", "time_limit", "a rule without a clock inside jit or vmap")
        every = int(self.numbers.every)
        rows = self.steps // every
        problem, solver, numbers = self.parts
        carry, first = start(problem, solver, numbers, self.x, self.plan, rows)
        no_time = np.zeros((), self.dtype)
        carry = advance(carry, problem, solver, numbers, self.plan, np.int32(self.steps), np.int32(1), no_time)
        ending, test = decode(carry.watch.code)
        ending = jnp.where(ending == Ending.RUNNING, Ending.STEP_LIMIT, ending)
        state = eqx.tree_at(lambda s: s.x, carry.state, carry.last_finite)

        def known() -> tuple[Point, Any, Calls]:
            return finish(self.problem, carry.state)

        def given_up() -> tuple[Point, Any, Calls]:
            # After a divergence the state's scalars belong to the point that was given up.
            value, gradient = self.problem.value_and_gradient(state.x)
            point = Point(value.astype(self.dtype), trees.norm(gradient).astype(self.dtype))
            return point, self.problem.aux(state.x), strong(GRADIENT)

        point, aux, more = jax.lax.cond(ending == Ending.DIVERGED, given_up, known)
        records = jnp.concatenate([first[None], carry.rows[:rows]])
        history = {name: records[:, i] for i, name in enumerate(self.plan.record)}
        history["step"] = jnp.arange(rows + 1) * every
        status = Status(ending, carry.step, test, self.names, self.solver.name)
        calls = carry.state.calls + carry.extra + more
        return Solution(
            self.rebuild(state.x), point.value, point.norm, status, carry.step, history, calls, state=state, aux=aux
        )

    def hosted(self, clock: float, callback: Callable[[Progress], Any] | None, progress: bool | str) -> Solution:
        """The run in compiled chunks, with the host between them."""
        leaves, static = Static.split(self.parts)
        every = int(self.numbers.every)
        compiled_before, began = compile_clock.seconds, time.perf_counter()

        def on(carry: Carry, until: int) -> Carry:
            first_row = int(carry.step) // every + 1
            seconds = np.asarray(time.perf_counter() - clock, self.dtype)
            return compiled_advance(
                carry, leaves, np.int32(until), np.int32(first_row), seconds, static=static, plan=self.plan
            )

        carry, first = compiled_start(leaves, self.x, static=static, plan=self.plan, capacity=_ROWS)
        code, step, size = int(carry.watch.code), 0, 1
        if compile_clock.seconds == compiled_before:  # the start is worth about one step
            size = max(1, int(0.1 * _CHUNK_SECONDS / (time.perf_counter() - began)))
        records = [np.asarray(first)[None]]
        snapshot = _to_host(carry) if code <= Ending.RUNNING and self.steps else None
        snapshot_time = time.perf_counter()
        bar = Bar(self.solver.name, self.steps, progress)
        with interruptible() as interrupted:
            while code <= Ending.RUNNING and step < self.steps:
                first_row = step // every + 1
                until = min(self.steps, step + size, (first_row + _ROWS) * every - 1)
                began = time.perf_counter() - compile_clock.seconds
                carry = on(carry, until)
                reached, code = int(carry.step), int(carry.watch.code)
                took = time.perf_counter() - compile_clock.seconds - began
                records.append(np.array(carry.rows)[: reached // every + 1 - first_row])
                size = max(1, min(100 * size, int(_CHUNK_SECONDS * (reached - step) / max(took, 1e-9))))
                step = reached
                if code <= Ending.RUNNING and step < self.steps:
                    seen = self._progress(carry, step, clock)
                    bar.update(step, seen.value, seen.gradient_norm)
                    if (callback is not None and callback(seen)) or interrupted():
                        code = encode(Ending.INTERRUPTED)
                    elif time.perf_counter() - snapshot_time > _SNAPSHOT_SECONDS:
                        snapshot, snapshot_time = _to_host(carry), time.perf_counter()
        bar.close()

        state, calls = carry.state, carry.state.calls + carry.extra
        if code == encode(Ending.DIVERGED) and snapshot is not None:
            # The steps before it again: the same compiled code from the last snapshot, bit for bit.
            carry = jax.tree.map(jnp.asarray, snapshot)
            while (at := int(carry.step)) < step - 1:
                carry = on(carry, min(step - 1, at + (_ROWS - 1) * every))
            state = carry.state
        ending, test = decode(encode(Ending.STEP_LIMIT) if code <= Ending.RUNNING else code)
        if state_measures(state) and not getattr(self.problem, "has_aux", False):
            point, aux = Point(state.value, state.gradient_norm), None
        else:
            point, aux, more = compiled_finish(leaves, state, static=static)
            calls = calls + more
        table = np.concatenate(records)
        history = {name: table[:, i] for i, name in enumerate(self.plan.record)}
        history["step"] = np.arange(len(table)) * every
        status = Status(np.int32(ending), np.int32(step), np.int32(test), self.names, self.solver.name)
        elapsed = time.perf_counter() - clock
        return Solution(
            self.rebuild(state.x),
            point.value,
            point.norm,
            status,
            np.int32(step),
            history,
            jax.tree.map(np.asarray, calls),
            seconds=elapsed,
            compile_seconds=min(elapsed, compile_clock.seconds - compiled_before),
            state=state,
            aux=aux,
        )

    def _progress(self, carry: Carry, step: int, clock: float) -> Progress:
        """What bar and callback may see of the run so far."""
        state, watch = carry.state, carry.watch
        measured = (state.value, state.gradient_norm) if state_measures(state) else (watch.value, watch.norm)
        value, norm = (float(m) for m in measured)  # type: ignore[arg-type]
        return Progress(
            step=step,
            steps=self.steps,
            value=value,
            gradient_norm=norm,
            seconds=time.perf_counter() - clock,
            point=lambda: self.rebuild(_to_host(carry.state.x)),
        )


def _to_host(tree: Any) -> Any:
    """A copy in host memory that survives the donation of the original."""

    def copy(leaf: Any) -> Any:
        # A key of `jax.random` (an optimizer's own) has no NumPy form.
        return leaf.copy() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.array(leaf)

    return jax.tree.map(copy, tree)
