"""The compiled chunk: what is compiled again (nothing), what is copied (nothing), what an end is written as."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core import chunk, loop
from fallline.core.status import OWN_TEST, Ending

A = np.array([1.0, 2.0, 0.5], np.float32)
ON_DEVICE = jnp.asarray(A)
START = np.array([0.3, -1.7, 2.0], np.float32)


def wells(x, a):
    return 0.25 * jnp.sum((x**2 - a) ** 2)


def losses(x, rows):
    return jnp.sum((x - rows) ** 2, axis=-1)


# --- an end as one integer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [e for e in Ending if e is not Ending.RUNNING])
@pytest.mark.parametrize("test", [OWN_TEST, 0, 1, 5])
def test_an_end_is_read_as_it_was_written(ending, test):
    code = chunk.encode(ending, test)
    assert code > Ending.RUNNING
    assert chunk.decode(code) == (ending, test)
    assert tuple(map(int, chunk.decode(jnp.int32(code)))) == (ending, test)


@pytest.mark.parametrize("looks", [0, -1, -99])
def test_looks_without_a_change_are_no_end(looks):
    assert chunk.decode(looks)[0] == chunk.decode(jnp.int32(looks))[0] == Ending.RUNNING


# --- nothing is compiled twice -------------------------------------------------------------------------------------

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: _compiled.append(event))


@pytest.fixture
def compilations():
    """The number of XLA compilations since the last call."""
    _compiled.clear()

    def count():
        events = [event for event in _compiled if event == "/jax/core/compile/backend_compile_duration"]
        _compiled.clear()
        return len(events)

    return count


def sgd(**numbers):
    return fl.optimizer(optax.sgd, **{"learning_rate": 0.05, **numbers})


def perturbed(**numbers):
    return fl.perturbed_gradient_descent(**{"step_size": 0.05, "patience": 10, **numbers})


def minimize(solver=None, a=A, x0=START, fn=wells, **options):
    return fl.minimize(fn, x0, solver or sgd(), args=(a,), **{"steps": 30, **options})


RATE = jnp.asarray(np.float32(0.04))  # made here: making it compiles something itself

SAME = {
    "step size": (lambda: minimize(sgd(learning_rate=0.06))),
    "step size as an array": (lambda: minimize(sgd(learning_rate=RATE))),
    "step size in NumPy": (lambda: minimize(sgd(learning_rate=np.float64(0.03)))),
    "data": (lambda: minimize(a=2 * A)),
    "data on the device": (lambda: minimize(a=ON_DEVICE)),
    "point": (lambda: minimize(x0=ON_DEVICE)),
    "tolerance": (lambda: minimize(stop=fl.gradient_norm(1e-3))),
    "tolerance as an array": (lambda: minimize(stop=fl.gradient_norm(np.float64(1e-2)))),
    "steps": (lambda: minimize(steps=400)),
    "a key for nobody": (lambda: minimize(key=3)),
    "an equal lambda": (lambda: minimize(fn=lambda x, a: 0.25 * jnp.sum((x**2 - a) ** 2))),
    "an equal objective": (lambda: fl.minimize(fl.Objective(wells, (3 * A,)), START, sgd(), steps=30)),
    "a callback": (lambda: minimize(callback=lambda progress: False)),
    "records beyond a chunk": (lambda: minimize(sgd(learning_rate=1e-5), steps=5000)),
}


@pytest.mark.parametrize("name", SAME)
def test_numbers_compile_nothing(name, compilations):
    minimize()
    compilations()
    SAME[name]()
    assert compilations() == 0


PAIRS = {
    "key": (lambda: minimize(perturbed(), key=1), lambda: minimize(perturbed(), key=jax.random.key(2))),
    "numbers of a method": (
        lambda: minimize(perturbed(), key=1),
        lambda: minimize(perturbed(step_size=0.01, radius=0.5, patience=7), key=1),
    ),
    "every": (lambda: minimize(every=2), lambda: minimize(every=5)),
    "window": (lambda: minimize(stop=fl.decrease(1e-3)), lambda: minimize(stop=fl.decrease(1e-5, window=3))),
    "budget": (
        lambda: minimize(stop=fl.call_budget(9) | fl.gradient_norm(0)),
        lambda: minimize(stop=fl.call_budget(5, gradient=0.5) | fl.gradient_norm(1)),
    ),
    "captured data": (
        lambda: fl.minimize(lambda x: jnp.sum((x - A) ** 2), START, sgd()),
        lambda: fl.minimize(lambda x, c=2 * A: jnp.sum((x - c) ** 2), START, sgd()),
    ),
    "data of a finite sum": (
        lambda: fl.minimize(fl.FiniteSum(losses, np.ones((6, 3), np.float32), 2), START, sgd(), key=0),
        lambda: fl.minimize(fl.FiniteSum(losses, np.zeros((6, 3), np.float32), 2), START, sgd(), key=1),
    ),
    "adam": (
        lambda: minimize(fl.optimizer(optax.adam, learning_rate=0.1)),
        lambda: minimize(fl.optimizer(optax.adam, learning_rate=0.2), steps=2000),
    ),
    "lbfgs": (lambda: minimize(fl.optimizer(optax.lbfgs), steps=2), lambda: minimize(fl.optimizer(optax.lbfgs))),
    "divergence": (
        lambda: minimize(x0=np.float32([0.9, 1, 1]), a=np.float32(1)),
        lambda: minimize(sgd(learning_rate=50.0), x0=START, a=np.float32(1)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_second_run_compiles_nothing(name, compilations):
    first, second = PAIRS[name]
    first()
    assert compilations() >= 0
    second()
    assert compilations() == 0


def test_what_is_another_program_is_compiled(compilations):
    """The counter counts."""
    minimize()
    compilations()
    minimize(fn=lambda x, a: 0.25 * jnp.sum((x**2 - a) ** 4))
    assert compilations() >= 2
    minimize(x0=np.ones(4, np.float32), a=np.zeros(4, np.float32))
    assert compilations() >= 2


class Loose(fl.Solver):
    """A state with Python's numbers in it, and with arrays that are weakly typed."""

    def init(self, problem, x, *, key):
        return LooseState(x, fl.Calls(), 1.0, jnp.asarray(2), jnp.full((), 1.5))

    def step(self, problem, state, *, key):
        return LooseState(0.9 * state.x, state.calls, jnp.exp(1.0), state.count + 1, 2.0)


class LooseState(fl.State):
    number: Any
    count: Any
    rate: Any


def test_the_second_chunk_is_the_first_one(compilations, monkeypatch):
    """Chunks of one step; `init` and `step` leave types of Python's numbers in the state."""
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 0.0)
    for solver in (Loose(), fl.optimizer(optax.lbfgs)):
        size = chunk.compiled_advance._cache_size()
        minimize(solver, steps=6, stop=None)
        assert chunk.compiled_advance._cache_size() == size + 1


def test_a_function_is_traced_once():
    traces = []

    def fn(x, a):
        traces.append(1)
        return jnp.sum((x - a) ** 2) + jnp.sum(jnp.cos(x))

    for n, solver in enumerate(
        (sgd(), sgd(learning_rate=0.01), perturbed(), fl.optimizer(optax.adam, learning_rate=1e-2))
    ):
        minimize(solver, fn=fn, key=0)
        assert len(traces) == n + 1


# --- nothing of the size of the parameters is copied ---------------------------------------------------------------

N = 1_000_000


class Rotating(fl.Solver):
    """A state that cannot stay in place: what one step calls `a` the next calls `b`."""

    def init(self, problem, x, *, key):
        return Rotated(x, fl.Calls(), x + 1, x + 2)

    def step(self, problem, state, *, key):
        return Rotated(state.b, state.calls, state.x, jnp.roll(state.a, 1))


class Rotated(fl.State):
    a: Any
    b: Any


def compiled(problem, x0, solver, **options):
    """The executable of the chunks of one run."""
    found = []

    def advance(*args, **static):
        if not found:
            found.append(chunk.compiled_advance.lower(*args, **static).compile())
        return chunk.compiled_advance(*args, **static)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compiled_advance", advance)
        fl.minimize(problem, x0, solver, steps=2, stop=None, **options)
    return found[0]


def while_copies(text, n):
    """Copies of arrays with `n` entries in the loop's body, and in all that the body calls."""
    computations = {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)}
    todo = re.findall(r" while\(.*?body=%?([\w.\-]+)", text)
    assert todo
    seen, copies = set(), []
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        copies += re.findall(rf"= \w+\[{n}\]\S* copy(?:-start)?\([^\n]*", computations[name])
        todo += [word for word in re.findall(r"%?([\w.\-]+)", computations[name]) if word in computations]
    return copies


def real(x, c):
    return 0.5 * jnp.sum((x - c) ** 2)


ADAM = fl.optimizer(optax.adam, learning_rate=1e-3)
X0, C = np.zeros(N, np.float32), np.ones(N, np.float32)
RUNS = {
    "adam": (real, ADAM, {"args": (C,)}, 4),
    "momentum": (real, sgd(momentum=0.9), {"args": (C,)}, 3),
    "sgd, every": (real, sgd(), {"args": (C,), "every": 10}, 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_copy_of_the_parameters(name):
    problem, solver, options, arrays = RUNS[name]
    executable = compiled(problem, X0, solver, **options)
    assert while_copies(executable.as_text(), N) == []
    memory = executable.memory_analysis()
    # The carry is donated whole, and comes out where it went in.
    assert memory.alias_size_in_bytes >= arrays * 4 * N
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000


def test_a_copy_would_be_seen():
    text = compiled(real, X0, Rotating(), args=(C,), every=10).as_text()
    assert len(while_copies(text, N)) >= 1
