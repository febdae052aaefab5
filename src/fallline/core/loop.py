"""`minimize`: the one loop that runs every solver.

The loop is compiled whole and runs in chunks of a quarter to half a second. Between two chunks
the host reads one small array, and looks at the clock, the callback and Ctrl-C. Inside `jit` or
`vmap` the same loop runs as one `while_loop` without the host.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from . import trees
from .calls import Calls
from .checkpoint import Checkpoint, Keeper, digest, restore
from .chunk import (
    Carry,
    Point,
    advance,
    compile_together,
    compiled_advance,
    compiled_finish,
    compiled_start,
    decode,
    encode,
    has_aux,
    pace_of,
    settle,
    start,
    state_measures,
)
from .errors import InputError
from .hosts import Hosts, is_spread
from .problem import Problem
from .program import Static
from .progress import Bar, Progress, compile_clock, interruptible
from .setup import Setup, prepare
from .solution import Solution
from .solver import Solver
from .status import Ending, Status
from .stopping import StoppingRule

__all__ = ["minimize"]

_ROWS = 1024  # records that one chunk can hold
_MOST_STEPS = 2**31 - 1
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
    checkpoint: Checkpoint | str | Path | None = None,
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
    - `checkpoint`: a folder for this run alone, or a `Checkpoint`: the run is kept there every few
      seconds, and the same call goes on from there, to the same bits as an unbroken run. With more
      `steps` it goes beyond a step limit.
    - `progress`: a bar on stderr; `"auto"` shows it in a terminal after a second.
    - `throw`: raise `RunError` unless the run converged.

    **Returns:** a `Solution`. A diverging run stops at the step where value or gradient is no longer
    finite and returns the point before it (inside `jit`, where only the records are looked at, the
    last point known to be finite). The first Ctrl-C returns the point reached.

    **Raises:** `InputError` before anything is compiled where an argument cannot be used, or where the
    checkpoint is another run's; `CheckpointError` where it is damaged.
    """
    clock = time.perf_counter()
    if callback is not None and not callable(callback):
        raise InputError("callback", repr(callback), "a function of a Progress, or None")
    setup = prepare(problem, x0, solver, args, has_aux, steps, stop, key, record, every)
    run = _Run(setup)
    if setup.plan.keep_last:
        if callback is not None:
            raise InputError("callback", "a function", "None inside jit or vmap, where the host is not there")
        if checkpoint is not None:
            raise InputError("checkpoint", checkpoint, "None inside jit or vmap, where the host is not there")
        if throw:
            raise InputError("throw", True, "False inside jit or vmap; look at the status outside")
        solution = run.traced()
    else:
        setup.solver.check(setup.problem, setup.x)
        kept = None if checkpoint is None else Keeper(Checkpoint.of(checkpoint), _fingerprint(setup))
        solution = run.hosted(clock, callback, kept, progress)
    return solution.raise_for_status() if throw else solution


def _fingerprint(setup: Setup) -> dict[str, Any]:
    """What must agree for a run to go on from another call's checkpoint."""
    return {
        "problem": digest(setup.problem),
        "solver": digest(setup.solver),
        "start": digest(setup.x),
        "key": digest(setup.numbers.key),
        "stop": list(setup.names),
        "record": list(setup.plan.record),
        "every": int(setup.numbers.every),
    }


class _Run:
    """One call of `minimize`, inputs checked."""

    def __init__(self, setup: Setup):
        self.problem, self.solver, self.numbers = self.parts = setup.parts
        self.plan, self.x, self.rebuild, self.steps = setup.plan, setup.x, setup.rebuild, setup.steps
        self.names, self.dtype = setup.names, setup.dtype

    def traced(self) -> Solution:
        """The whole run as one `while_loop`, for `jit` and `vmap`."""
        if any("seconds" in rule.needs for rule in self.numbers.rules):
            raise InputError("stop", "time_limit", "a rule without a clock inside jit or vmap")
        every = int(self.numbers.every)
        rows = self.steps // every
        problem, solver, numbers = self.parts
        carry, first = start(problem, solver, numbers, self.x, self.plan, rows)
        no_time = np.zeros((), self.dtype)
        carry = advance(carry, problem, solver, numbers, self.plan, np.int32(self.steps), np.int32(1), no_time)
        end = settle(problem, carry)
        status = Status(end.ending, carry.step, end.test, self.names, self.solver.name)
        records = jnp.concatenate([first[None], carry.rows[:rows]])
        history = {name: records[:, i] for i, name in enumerate(self.plan.record)}
        history["step"] = jnp.arange(rows + 1) * every
        return Solution(
            self.rebuild(end.state.x),
            end.point.value,
            end.point.norm,
            status,
            carry.step,
            history,
            end.calls,
            state=end.state,
            aux=end.aux,
        )

    def hosted(
        self,
        clock: float,
        callback: Callable[[Progress], Any] | None,
        keeper: Keeper | None,
        progress: bool | str,
    ) -> Solution:
        """The run in compiled chunks, with the host between them."""
        leaves, static = self.split
        every = int(self.numbers.every)
        compiled_before = compile_clock.seconds
        pace = pace_of(static, self.plan, trees.signature((leaves, self.x)))
        if pace.seconds is None and self.steps:
            with compile_clock.together():
                compile_together(leaves, self.x, static=static, plan=self.plan, capacity=_ROWS)
        hosts = Hosts((leaves, self.x))
        saved = None if keeper is None else keeper.load()

        def begin() -> tuple[Carry, Array]:
            carry, first = compiled_start(leaves, self.x, static=static, plan=self.plan, capacity=_ROWS)
            return carry if saved is None else restore(saved, carry, "['carry']"), first

        carry, first = begin()
        records, spent = [np.asarray(first)[None]], 0.0
        if saved is not None:
            records, spent = [saved["['records']"]], float(saved["['seconds']"])
        code, step = int(carry.watch.code), int(carry.step)
        size = 1 if pace.seconds is None else max(1, int(_CHUNK_SECONDS / pace.seconds))
        size, now = hosts.agree(size, time.perf_counter() - clock + spent)
        measured, snapshot, looks = state_measures(carry.state), None, Calls()
        snapshot_time = told = time.perf_counter()
        with (
            interruptible() as interrupted,
            closing(Bar(self.solver.name, self.steps, hosts.speaks and progress)) as bar,
        ):
            while code <= Ending.RUNNING and step < self.steps:
                first_row = step // every + 1
                until = min(self.steps, step + int(size), (first_row + _ROWS) * every - 1)
                if until // every * every > step:
                    until = until // every * every
                began = time.perf_counter() - compile_clock.seconds
                carry = self._advance(carry, until, now)
                reached, code = int(carry.step), int(carry.watch.code)
                took = time.perf_counter() - compile_clock.seconds - began
                records.append(np.array(carry.rows)[: reached // every + 1 - first_row])
                pace.seconds = max(took, 1e-9) / max(1, reached - step)
                size = max(1, min(100 * size, int(_CHUNK_SECONDS / pace.seconds)))
                step = reached
                going, enough = code <= Ending.RUNNING and step < self.steps, False
                if going and time.perf_counter() - told >= _CHUNK_SECONDS:  # the records may have kept the chunk short
                    told, seen = time.perf_counter(), self._progress(carry, step, clock)
                    bar.update(step, f"value {seen.value:.6g}  ‖∇f‖ {seen.gradient_norm:.2g}")
                    enough = callback is not None and callback(seen)
                enough, stale, due, size, now = hosts.agree(
                    bool(enough or interrupted()),
                    time.perf_counter() - snapshot_time > _SNAPSHOT_SECONDS,
                    keeper is not None and keeper.is_due(),
                    size,
                    time.perf_counter() - clock + spent,
                )
                if going and enough:
                    code = encode(Ending.INTERRUPTED)
                elif going and stale and (measured or step % every == 0):
                    snapshot, snapshot_time = _to_host(carry), time.perf_counter()
                over = code > Ending.RUNNING or step >= self.steps
                if keeper is not None and code != encode(Ending.DIVERGED) and (over or due):
                    sound = measured or step % every == 0
                    if over and not sound:  # nobody has looked at this point
                        seen_last, _, paid = self._finish(carry.state)
                        sound, looks = _is_finite(seen_last), looks + paid
                    if sound:
                        seconds = np.float64(time.perf_counter() - clock + spent)
                        kept = {"carry": carry, "records": np.concatenate(records), "seconds": seconds}
                        keeper.save(step, kept, write=hosts.speaks)

        account = [carry.state.calls, carry.extra, looks]
        cause = ""
        point, aux, more = (None, None, Calls()) if code == encode(Ending.DIVERGED) else self._finish(carry.state)
        account.append(more)
        if point is None or not _is_finite(point):
            code = encode(Ending.DIVERGED)
            if step and self.steps:
                carry, step = self._before_loss(_to_host(begin()[0]) if snapshot is None else snapshot, step)
            point, aux, more = self._finish(carry.state)
            account.append(more)
            cause = self._cause(carry, step)
        ending, test = decode(encode(Ending.STEP_LIMIT) if code <= Ending.RUNNING else code)
        table = np.concatenate(records)
        history = {name: table[:, i] for i, name in enumerate(self.plan.record)}
        history["step"] = np.arange(len(table)) * every
        status = Status(np.int32(ending), np.int32(step), np.int32(test), self.names, self.solver.name, cause)
        elapsed = time.perf_counter() - clock
        return Solution(
            self.rebuild(carry.state.x),
            point.value,
            point.norm,
            status,
            np.int32(step),
            history,
            jax.tree.map(lambda *counts: np.asarray(sum(map(int, counts)), np.int32), *account),
            seconds=elapsed,
            compile_seconds=min(elapsed, compile_clock.seconds - compiled_before),
            state=carry.state,
            aux=aux,
        )

    @functools.cached_property
    def split(self) -> tuple[list[Any], Static]:
        """Problem, solver and numbers as the compiled functions take them."""
        return Static.split(self.parts)

    def _advance(self, carry: Carry, until: int, seconds: float = 0.0) -> Carry:
        leaves, static = self.split
        first_row = np.int32(int(carry.step) // int(self.numbers.every) + 1)
        now = np.asarray(seconds, self.dtype)
        return compiled_advance(carry, leaves, np.int32(until), first_row, now, static=static, plan=self.plan)

    def _finish(self, state: Any) -> tuple[Point, Any, Calls]:
        if state_measures(state) and not has_aux(self.problem):
            return Point(state.value.astype(self.dtype), state.gradient_norm.astype(self.dtype)), None, Calls()
        leaves, static = self.split
        return compiled_finish(leaves, state, static=static)

    def _cause(self, carry: Carry, lost: int) -> str:
        """What the solver knows of why the step `lost` after `carry` was lost: in that step, or where it led to."""

        def ask(state: Any, step: int) -> str:
            key = jax.random.fold_in(self.numbers.key, step) if self.plan.random else None
            return self.solver.cause(self.problem, state, key=key)

        if type(self.solver).cause is Solver.cause:
            return ""
        return ask(carry.state, lost) or ask(self._advance(_to_device(_to_host(carry)), lost).state, lost + 1)

    def _before_loss(self, snapshot: Carry, lost: int) -> tuple[Carry, int]:
        """The last finite point before the step `lost`, and the step that lost it.

        The same compiled code takes the steps again from the snapshot, bit for bit. Where points are
        only looked at for the records, the lost one is found by halving the steps since the last record.
        """
        every = int(self.numbers.every)

        def again(carry: Carry, until: int) -> Carry:
            return self._advance(_to_device(carry), until)  # the records, made already, may overflow

        if state_measures(snapshot.state):
            return again(snapshot, lost - 1), lost
        held = _to_host(again(snapshot, (lost - 1) // every * every))
        while lost - int(held.step) > 1:
            carry = again(held, (int(held.step) + lost) // 2)
            if int(carry.watch.code) <= Ending.RUNNING and _is_finite(self._finish(carry.state)[0]):
                held = _to_host(carry)
            else:
                lost = max(int(carry.step), int(held.step) + 1)
        return _to_device(held), lost

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


def _is_finite(point: Point) -> bool:
    return bool(np.isfinite(point.value) and np.isfinite(point.norm))


def _to_host(tree: Any) -> Any:
    """A copy, in host memory where it can be, that survives the donation of the original."""
    # A key of `jax.random` (an optimizer's own) has no NumPy form.
    return jax.tree.map(lambda leaf: leaf.copy() if trees.is_key(leaf) or is_spread(leaf) else np.array(leaf), tree)


def _to_device(tree: Any) -> Any:
    """A copy to donate."""
    return jax.tree.map(lambda leaf: leaf.copy() if is_spread(leaf) else jax.device_put(leaf.copy()), tree)
