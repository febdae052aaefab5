"""What every solver and transformation must do, whatever its paper: one function for each property.

A check takes a `Case` and returns nothing, or raises `Failure`, whose message says what to mend.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fallline import Calls, Checkpoint, Ending, InputError, Problem, Solver, minimize
from fallline.claims.claim import Scale
from fallline.claims.evidence import claims_of
from fallline.core import chunk, loop
from fallline.core.program import Static
from fallline.core.registry import Entry
from fallline.core.solver import with_array_numbers

Tick = Callable[[str], None]


class Failure(AssertionError):
    """A method does not conform."""


@dataclasses.dataclass(frozen=True)
class Case:
    """How the suite runs a method.

    `solver` and `other` build it with two settings of its numbers; `problem(dtype, tick)` an instance
    that it can run on, whose oracles call `tick(name)` when they are asked (`counted` makes one of any
    function), and `start(dtype)` a point; `dtypes` are those that the method is for, and `copies` the
    arrays of the point's size that its own update moves from one place of the state to another.
    """

    solver: Callable[[], Solver]
    other: Callable[[], Solver]
    problem: Callable[[str, Tick | None], Problem]
    start: Callable[[str], Any]
    steps: int = 25
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    copies: int = 0

    def run(
        self, solver: Solver | None = None, dtype: str = "float64", tick: Tick | None = None, **options: Any
    ) -> Any:
        """A run to the step limit, with a key in any case."""
        solver = self.solver() if solver is None else solver
        options = {"steps": self.steps, "stop": None, "key": 0, **options}
        return minimize(self.problem(dtype, tick), self.start(dtype), solver, **options)


def same(a: Any, b: Any) -> bool:
    """Whether two pytrees of arrays agree bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@contextmanager
def compilations() -> Iterator[list[float]]:
    """The compilations within a block, as a list of their seconds."""
    found: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextmanager
def chunks_of(seconds: float) -> Iterator[None]:
    """Runs in chunks of another length."""
    before = loop._CHUNK_SECONDS
    loop._CHUNK_SECONDS = seconds
    try:
        yield
    finally:
        loop._CHUNK_SECONDS = before


def numbers_never_recompile(case: Case) -> None:
    case.run()
    with compilations() as found:
        case.run(case.other())
    if found:
        raise Failure(
            f"other numbers compiled {len(found)} programs again: make the numbers fields of the solver, neither "
            "static nor Python values that `step` branches on"
        )


def a_second_chunk_never_recompiles(case: Case) -> None:
    case.run(steps=1)
    with chunks_of(0.0), compilations() as found:
        case.run(steps=4)
    if found:
        raise Failure("the second chunk compiled again: `step` must return the state's dtypes, shapes and strong types")


def chunks_do_not_matter(case: Case) -> None:
    whole = case.run()
    with chunks_of(0.0):
        parts = case.run()
    if not (same(whole.x, parts.x) and same(whole.history, parts.history)):
        raise Failure("the result depends on where the run was cut: everything that a step needs belongs in the state")


def runs_repeat(case: Case) -> None:
    solver = case.solver()
    first, second = case.run(solver), case.run(solver)
    fresh = case.run()
    if not (same(first.x, second.x) and same(first.x, fresh.x)):
        raise Failure("a second run ends elsewhere: `init` and `step` must be pure, without state outside of the state")


def state_is_stable(case: Case) -> None:
    solver, problem, x = (
        with_array_numbers(case.solver(), jnp.float64),
        case.problem("float64", None),
        case.start("float64"),
    )
    key = jax.random.key(0)
    state = jax.eval_shape(lambda x: solver.init(problem, x, key=key), x)
    after = jax.eval_shape(lambda s: solver.step(problem, s, key=key), state)
    if jax.tree.structure(state) != jax.tree.structure(after):
        raise Failure("`step` returns a state of another structure than `init`")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise Failure(f"`step` turns a leaf of the state from {a.dtype}{a.shape} into {b.dtype}{b.shape}")


def dtypes_are_kept(case: Case) -> None:
    for dtype in case.dtypes:
        solution = case.run(dtype=dtype)
        for leaf in jax.tree.leaves(solution.x):
            if str(leaf.dtype) != dtype:
                raise Failure(f"a point in {dtype} came back in {leaf.dtype}: cast the update to the leaf's dtype")
        if not all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(solution.x)):
            raise Failure(f"not finite in {dtype}: keep hyperparameters and accumulators in at least float32")


def jit_changes_nothing(case: Case) -> None:
    outside, problem = case.run(), case.problem("float64", None)
    key = jax.random.key(0)
    inside = jax.jit(lambda x: minimize(problem, x, case.solver(), steps=case.steps, stop=None, key=key).x)(
        case.start("float64")
    )
    if not _close(outside.x, inside):
        raise Failure("inside `jit` the run ends elsewhere: the step must not look at concrete values")


def vmap_is_a_loop(case: Case) -> None:
    problem, x = case.problem("float64", None), case.start("float64")
    starts = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a, 1.1 * a]), x)

    def run(x: Any) -> Any:
        return minimize(problem, x, case.solver(), steps=case.steps, stop=None, key=jax.random.key(0)).x

    batched = jax.vmap(run)(starts)
    for i in range(3):
        alone = run(jax.tree.map(lambda a, i=i: a[i], starts))
        if not _close(jax.tree.map(lambda a, i=i: a[i], batched), alone):
            raise Failure("under `vmap` a lane ends elsewhere than alone: lanes must not see each other")


def _close(a: Any, b: Any) -> bool:
    """Equal up to the rounding of another order of summation."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, rtol=1e-9, atol=1e-9) for x, y in pairs)


def calls_are_those_made(case: Case) -> None:
    made: dict[str, int] = {}

    def tick(name: str) -> None:
        made[name] = made.get(name, 0) + 1

    solution = case.run(tick=tick)
    jax.effects_barrier()
    declared = solution.calls.as_dict()
    if declared != made:
        raise Failure(
            f"the account says {Calls(**declared)}, the problem was asked {Calls(**made)}: mend `calls` in `step`"
        )


def keys_are_honoured(case: Case) -> None:
    solver, problem, x = case.solver(), case.problem("float64", None), case.start("float64")
    options: dict[str, Any] = {"steps": case.steps, "stop": None}
    random = solver.random or problem.random
    if not random:
        without = minimize(problem, x, solver, **options)
        if not same(without.x, case.run().x):
            raise Failure("a solver that is not `random` depends on the key")
        return
    try:
        minimize(problem, x, solver, **options)
    except InputError as error:
        if not str(error).startswith("key:"):
            raise Failure(f"without a key the error must name it, not: {error}") from None
    else:
        raise Failure("a random solver ran without a key: say `random = True`")
    first, again, other = (minimize(problem, x, solver, **options, key=seed) for seed in (0, 0, 1))
    if not same(first.x, again.x):
        raise Failure("the same key gave two results")
    if same(first.x, other.x):
        raise Failure("another key gave the same result: `step` must draw from the key that it is given")


def nan_is_never_an_answer(case: Case) -> None:
    problem = _breaking(case.problem("float64", None), jax.tree.leaves(case.start("float64"))[0])
    solution = minimize(problem, case.start("float64"), case.solver(), steps=case.steps, key=0)
    finite = all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(solution.x))
    if solution.status.ending is not Ending.DIVERGED or not finite or not np.isfinite(float(solution.value)):
        raise Failure(
            f"on NaN the run ended as '{solution.status}' with value {float(solution.value)}: do not hide what the "
            "oracle returns, and do not say `done` on it"
        )


def _breaking(problem: Problem, first: Any) -> Problem:
    """The problem with NaN for a value and a gradient wherever the first leaf differs from `first`."""
    cls = type(problem)

    def spoil(problem: Any, x: Any, out: Any) -> Any:
        moved = jnp.any(jax.tree.leaves(x)[0] != first)
        return jax.tree.map(lambda a: jnp.where(moved, jnp.nan, a) if jnp.issubdtype(a.dtype, jnp.inexact) else a, out)

    def spoiled(name: str) -> Callable[..., Any]:
        method = getattr(cls, name)
        return lambda self, x, *rest: spoil(self, x, method(self, x, *rest))

    oracles = {name: spoiled(name) for name in ORACLES if hasattr(cls, name)}
    made = type(f"Breaking{cls.__name__}", (cls,), oracles)
    broken = object.__new__(made)
    for field in dataclasses.fields(problem):
        object.__setattr__(broken, field.name, getattr(problem, field.name))
    return broken


ORACLES = (
    "value",
    "value_and_gradient",
    "minibatch",
    "per_example_gradients",
    "squared_distances",
    "targets",
    "signal_gradient",
    "ask",
)
"""Methods of problems, of a point first, whose answers a run may be spoiled by."""


def no_parameter_sized_copy(case: Case) -> None:
    problem, x = case.problem("float32", None), case.start("float32")
    largest = max(a.nbytes for a in jax.tree.leaves(x))
    solver = with_array_numbers(case.solver(), jnp.float32)
    plan = chunk.Plan(("value", "gradient_norm"), bool(solver.random or problem.random), keep_last=False, each=True)
    numbers = with_array_numbers(chunk.Numbers(jax.random.key(0) if plan.random else None, 1, ()), jnp.float32)
    leaves, static = Static.split((problem, solver, numbers))
    carry, _ = jax.eval_shape(lambda leaves, x: chunk.start(*static.join(leaves), x, plan, 4), leaves, x)
    compiled = chunk.compiled_advance.lower(
        carry, leaves, np.int32(5), np.int32(1), np.float32(0), static=static, plan=plan
    ).compile()
    shapes = {a.shape for a in jax.tree.leaves(x) if a.nbytes == largest}
    lines = [line.strip() for line in compiled.as_text().splitlines() if _copied(line) in shapes]
    if len(lines) > case.copies:
        raise Failure(
            f"the compiled step copies {len(lines)} arrays of the point's size ({lines[0][:80]} …): leave what does "
            "not change in its place in the state, and branch by `in_place`, not by `cond`"
        )


def _copied(line: str) -> tuple[int, ...] | None:
    """The shape of the floats that an instruction of compiled code copies; None where it copies none."""
    found = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = f32\[([\d,]*)\]\S* copy\(", line)
    return tuple(int(n) for n in found[1].split(",") if n) if found else None


def a_resumed_run_is_the_unbroken_one(case: Case, folder: Path) -> None:
    whole = case.run(every=1)  # a run that is kept looks once more at a last point that is not recorded
    with chunks_of(0.0):
        case.run(steps=case.steps // 2, checkpoint=Checkpoint(folder, seconds=0), every=1)
    resumed = case.run(checkpoint=folder, every=1)
    if not (same(whole.x, resumed.x) and same(whole.history, resumed.history)):
        raise Failure("a resumed run ends elsewhere: everything that a step needs belongs in the state")
    if whole.calls.as_dict() != resumed.calls.as_dict():
        raise Failure("a resumed run has another account of calls")


def claims_are_complete(row: Entry) -> None:
    """Every method brings claims, each with all of its fields and a number of seeds for every scale."""
    try:
        claims = claims_of(row)
    except ModuleNotFoundError:
        claims = ()
    if not claims:
        raise Failure(f"{row.id} has no claim: write `CLAIMS` in {row.claim}")
    if len({claim.name for claim in claims}) < len(claims):
        raise Failure(f"two claims of {row.id} have the same name")
    for claim in claims:
        said = (claim.statement, claim.refuted_by, claim.source, claim.tolerance, claim.control)
        if not all(words.strip() for words in said) or set(claim.seeds) != set(Scale):
            raise Failure(f"the claim {claim.name} of {row.id} has an empty field, or no seeds for a scale")


def counted(fn: Callable[[Any], Any], tick: Tick | None) -> Problem:
    """The objective `fn` as a problem that calls `tick` for each value, gradient and product."""
    return _Counted(fn, tick)


class _Counted(Problem):
    fn: Callable[[Any], Any] = eqx.field(static=True)
    tick: Tick | None = eqx.field(static=True)

    def value(self, x: Any) -> Any:
        ticked(self.tick, "value")
        return self.fn(x)

    def value_and_gradient(self, x: Any) -> Any:
        ticked(self.tick, "gradient")
        return jax.value_and_grad(self.fn)(x)

    def hvp(self, x: Any, v: Any) -> Any:
        ticked(self.tick, "hvp")
        return jax.jvp(jax.grad(self.fn), (x,), (v,))[1]


def ticked(tick: Tick | None, name: str) -> None:
    """Count one call when the compiled program runs."""
    if tick is not None:
        jax.debug.callback(lambda: tick(name))


CHECKS: tuple[Callable[[Case], None], ...] = (
    numbers_never_recompile,
    a_second_chunk_never_recompiles,
    chunks_do_not_matter,
    runs_repeat,
    state_is_stable,
    dtypes_are_kept,
    jit_changes_nothing,
    vmap_is_a_loop,
    calls_are_those_made,
    keys_are_honoured,
    nan_is_never_an_answer,
    no_parameter_sized_copy,
)
