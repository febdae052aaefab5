"""What `minimize` does between two chunks: lengths of chunks, snapshots, clock, callback, Ctrl-C and bar."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core import chunk, loop
from fallline.core.progress import Bar, interruptible

START = np.array([0.3, -1.7, 2.0], np.float32)
LONG = 2**31 - 1


def wells(x):
    return 0.25 * jnp.sum((x**2 - 1) ** 2) + 0.1 * jnp.sum(x) ** 2


def cliff(x, edge):
    """Each step of size 1 adds 1 to every coordinate, exactly, until one passes `edge`: from there NaN."""
    return jnp.sum(-x + 0.0 * jnp.sqrt(edge - x))


def sgd(rate=0.05):
    return fl.optimizer(optax.sgd, learning_rate=rate)


def forever(x):
    """A descent without an end: each step of size 1 adds 1 until float32 is used up, after 2²⁴ steps."""
    return -jnp.sum(x)


WIDE = np.zeros(20_000, np.float32)  # some microseconds a step


class Clock:
    """Time as the loop sees it: a reading takes a microsecond, the start and each step take `pace` seconds."""

    def __init__(self, monkeypatch):
        self.now, self.pace = 0.0, 1e-3
        self.seconds = 0.0  # of compiling
        self.lengths: list[int] = []
        starts, advances = loop.compiled_start, loop.compiled_advance

        def start(*args, **options):
            self.now += self.pace
            return starts(*args, **options)

        def advance(carry, *args, **options):
            before = int(carry.step)
            carry = advances(carry, *args, **options)
            self.lengths.append(int(carry.step) - before)
            self.now += self.pace * self.lengths[-1]
            return carry

        monkeypatch.setattr(loop, "time", self)
        monkeypatch.setattr(loop, "compile_clock", self)
        monkeypatch.setattr(loop, "compiled_start", start)
        monkeypatch.setattr(loop, "compiled_advance", advance)

    def together(self):
        return contextlib.nullcontext()

    def perf_counter(self):
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


# --- chunks --------------------------------------------------------------------------------------------------------

NOISY = fl.FiniteSum(lambda x, rows: (x[0] - rows) ** 2 / 2 + 0.1 * x[1] ** 4, np.arange(6, dtype=np.float32), 2)
RUNS = {
    "sgd": (wells, START, sgd(), {}),
    "adam": (wells, START, fl.optimizer(optax.adam, learning_rate=0.1), {"every": 7}),
    "perturbed": (wells, START, fl.perturbed_gradient_descent(0.05, patience=10, gradient_threshold=0.1), {"key": 4}),
    "minibatches": (NOISY, START, sgd(), {"key": 5}),
    "noise of Optax's own": (wells, START, fl.optimizer(optax.noisy_sgd, learning_rate=0.05, key=1), {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_length_of_chunks_changes_no_bit(name, monkeypatch):
    problem, x0, solver, options = RUNS[name]
    solutions = []
    for seconds in (0.0, 1e-3, 1e9):  # one step a chunk; as the clock will have it; as long as can be
        monkeypatch.setattr(loop, "_CHUNK_SECONDS", seconds)
        solutions.append(fl.minimize(problem, x0, solver, steps=90, stop=None, **options))
    first, *others = ((s.x, s.history, s.calls.as_dict(), str(s.status), s.value) for s in solutions)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.fixture
def lengths(monkeypatch):
    """The steps at which the chunks of a run ended."""
    ends = []
    compiled = loop.compiled_advance

    def advance(*args, **options):
        carry = compiled(*args, **options)
        ends.append(int(carry.step))
        return carry

    monkeypatch.setattr(loop, "compiled_advance", advance)
    return ends


@pytest.mark.parametrize(("every", "most"), [(1, 1024), (3, 3072)])
def test_chunks_fit_their_records(every, most, lengths, monkeypatch):
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 1e9)
    solution = fl.minimize(lambda x: -x, np.float32(0), sgd(1.0), steps=7000, every=every, stop=None)
    assert lengths[-1] == 7000
    assert max(np.diff(lengths)) in (most, most - every)
    np.testing.assert_array_equal(solution.history["value"], -np.arange(0, 7001, every))


def test_chunks_take_their_time(clock):
    """0.35 s are 350 steps of a millisecond. At first nothing is known of a step; the next run knows it."""
    chunk.pace_of.cache_clear()
    fl.minimize(forever, np.zeros(1, np.float32), sgd(1.0), steps=5000, every=10**6)
    assert clock.lengths[:2] == [1, 100]  # it grows a hundredfold at most
    assert set(clock.lengths[2:-1]) <= {348, 349, 350}
    assert sum(clock.lengths) == 5000
    clock.lengths.clear()
    fl.minimize(forever, np.ones(1, np.float32), sgd(2.0), steps=5000, every=10**6)
    assert set(clock.lengths[:-1]) <= {348, 349, 350}
    assert sum(clock.lengths) == 5000


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("snapshots", [-1.0, 1e9], ids=["many", "one"])
@pytest.mark.parametrize("name", ["sgd", "noisy sgd", "minibatches", "noisy minibatches"])
def test_divergence_in_a_run_of_many_chunks(name, snapshots, every, lengths, monkeypatch):
    """The steps since the last snapshot are taken again: bit for bit the run that ended a step before."""
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(loop, "_SNAPSHOT_SECONDS", snapshots)
    monkeypatch.setattr(loop, "_ROWS", 16)
    problem, x0, solver = cliff, np.zeros(2, np.float32), sgd(1.0)
    options: dict = {"every": every, "args": (np.float32(200.5),)}
    if "minibatches" in name:
        problem = fl.FiniteSum(lambda x, edges: -x[0] + 0.0 * jnp.sqrt(edges - x[0]), np.full(9, 200.5, np.float32), 3)
        options = {"every": every, "key": 0}
    if "noisy" in name:  # with a key in the state
        solver = fl.optimizer(optax.noisy_sgd, learning_rate=1.0, eta=0.01, key=1)
    solution = fl.minimize(problem, x0, solver, steps=400, stop=fl.gradient_norm(1e-9), **options)
    assert len(lengths) > 100
    assert solution.status.name == "diverged"
    lost = int(solution.steps)
    assert lost == 201 or "noisy" in name
    assert len(solution.history["value"]) >= (lost - 1) // every + 1
    before = fl.minimize(problem, x0, solver, steps=lost - 1, stop=fl.gradient_norm(1e-9), **options)
    assert str(before.status) == f"step limit at step {lost - 1}"
    np.testing.assert_array_equal(solution.x, before.x)
    np.testing.assert_array_equal(solution.value, before.value)
    np.testing.assert_array_equal(solution.gradient_norm, before.gradient_norm)
    if "noisy" not in name:
        np.testing.assert_array_equal(solution.x[0], 200)


def test_a_time_limit_does_not_end_the_way_back(clock, monkeypatch):
    """The limit passes after the divergence, while the last steps are taken again."""
    back = loop._Run._before_loss

    def late(*args):
        clock.now += 1000.0
        return back(*args)

    monkeypatch.setattr(loop._Run, "_before_loss", late)
    stop = fl.time_limit(500.0)
    solution = fl.minimize(cliff, np.zeros(2, np.float32), sgd(1.0), args=(np.float32(30.5),), stop=stop)
    assert str(solution.status) == "diverged at step 31"
    np.testing.assert_array_equal(solution.x, [30, 30])


@pytest.fixture
def each_step(monkeypatch):
    """Chunks of one step, and a callback after each."""
    monkeypatch.setattr(loop, "_CHUNK_SECONDS", 0.0)


# --- clock, callback, Ctrl-C -----------------------------------------------------------------------------------------


def test_time_limit(clock):
    """The clock is read before each chunk: the limit is passed by one chunk at most."""
    stop = fl.time_limit(7.0)
    solution = fl.minimize(forever, np.zeros(2, np.float32), sgd(1.0), steps=LONG, every=10**6, stop=stop)
    assert str(solution.status) == f"budget by time_limit(7) at step {solution.steps}"
    assert 7000 <= solution.steps <= 7351
    assert 7.0 <= solution.seconds < 7.4
    assert solution.x.tolist() == [solution.steps, solution.steps]


def test_time_limit_by_the_real_clock():
    began = time.perf_counter()
    solution = fl.minimize(forever, WIDE, sgd(1.0), steps=LONG, every=10**6, stop=fl.time_limit(0.4))
    assert solution.status.name == "budget"
    assert 0.4 <= solution.seconds <= time.perf_counter() - began
    assert 0 <= solution.compile_seconds <= solution.seconds
    np.testing.assert_array_equal(solution.x, np.full_like(WIDE, solution.steps))


def test_a_callback_sees_the_run_and_ends_it(each_step):
    seen, points = [], []

    def callback(progress):
        seen.append(progress)
        points.append(progress.point())
        return len(seen) == 3

    solution = fl.minimize(lambda x: -jnp.sum(x), np.zeros(2, np.float32), sgd(1.0), steps=10**6, callback=callback)
    assert str(solution.status) == f"interrupted at step {seen[-1].step}"
    assert "point reached" in solution.status.advice
    assert len(seen) == 3
    assert [p.steps for p in seen] == [10**6] * 3
    assert all(a.step < b.step and a.seconds < b.seconds for a, b in zip(seen, seen[1:], strict=False))
    for progress, point in zip(seen, points, strict=True):
        np.testing.assert_array_equal(point, [progress.step] * 2)
        assert progress.value == -2 * progress.step
        np.testing.assert_allclose(progress.gradient_norm, np.sqrt(2), rtol=1e-6)
    np.testing.assert_array_equal(solution.x, points[-1])
    assert solution.value == seen[-1].value
    assert len(solution.history["value"]) == seen[-1].step + 1


def test_a_callback_is_called_about_twice_a_second(clock):
    """Although the records end a chunk after 1024 steps, here a hundredth of a second."""
    clock.pace, seen = 1e-5, []
    stop = fl.time_limit(10.0)
    fl.minimize(forever, START, sgd(1.0), steps=LONG, stop=stop, callback=lambda progress: seen.append(progress))
    assert max(clock.lengths) == 1024
    assert 25 <= len(seen) <= 28
    between = np.diff([progress.seconds for progress in seen])
    assert 0.35 <= between.min() <= between.max() < 0.37


def test_a_callback_sees_the_form_of_the_start(each_step):
    forms = []
    x0 = {"a": np.float32(1), "b": np.zeros(2, np.float32)}
    fl.minimize(lambda x: x["a"] ** 2 + jnp.sum(x["b"]), x0, sgd(), steps=3, callback=lambda p: forms.append(p.point()))
    assert jax.tree.structure(forms[0]) == jax.tree.structure(x0)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(forms))


def test_an_error_in_a_callback_comes_out(each_step):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        fl.minimize(wells, START, sgd(), callback=lambda progress: 1 / 0, progress=True)
    assert signal.getsignal(signal.SIGINT) is before


def press(times):
    def callback(progress):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    return callback


def test_the_first_interrupt_gives_back_the_point_and_the_second_raises(each_step):
    before = signal.getsignal(signal.SIGINT)
    run = lambda times: fl.minimize(forever, np.zeros(1, np.float32), sgd(1.0), steps=10**6, callback=press(times))  # noqa: E731
    solution = run(1)
    assert solution.status.name == "interrupted"
    assert solution.x == solution.steps > 0
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        run(2)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_is_not_pythons_is_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as interrupted:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread():
    """Python allows signal handlers in the main thread only."""
    found = []
    run = lambda: found.append(fl.minimize(wells, START, sgd(), steps=5, stop=None))  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0].x, fl.minimize(wells, START, sgd(), steps=5, stop=None).x)


SCRIPT = """
import time
import jax.numpy as jnp, numpy as np, optax
import fallline as fl

def started(progress):
    if progress.step > 1000:
        print("running", flush=True)

solver = fl.optimizer(optax.sgd, learning_rate=1.0)
solution = fl.minimize(
    lambda x: -jnp.sum(x), np.zeros(20_000, np.float32), solver, steps=2**31 - 1, every=10**6, callback=started
)
print(time.time(), solution.status.name, bool((solution.x == solution.steps).all()), flush=True)
"""


def latency():
    """Seconds from a real Ctrl-C in a long run to its solution."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.3)
        pressed = time.time()
        os.kill(process.pid, signal.SIGINT)
        lines = process.communicate(timeout=60)[0].splitlines()
    finally:
        process.kill()
    returned, *rest = lines[-1].split()
    assert rest == ["interrupted", "True"]
    assert process.returncode == 0
    return float(returned) - pressed


def test_ctrl_c_gives_back_a_solution_within_a_second():
    """Three attempts: the rest of the machine may be busy in the wrong second."""
    assert any(latency() < 1.0 for _ in range(3))


# --- the bar ---------------------------------------------------------------------------------------------------------


def test_a_bar_after_a_second_where_somebody_looks(capsys, monkeypatch):
    bar = Bar("sgd", 10, "auto")
    bar._start -= 2
    bar.update(1, "value 1")
    bar.close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    bar = Bar("sgd", 10, "auto")
    bar.update(1, "value 1")
    assert capsys.readouterr().err == ""
    bar._start -= 2
    bar.update(4, "value 0.25")
    bar.close()
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("sgd", "4/10", "value 0.25"))


def test_the_bar_is_taken_down_when_a_callback_fails(each_step, monkeypatch):
    closed = []
    monkeypatch.setattr(Bar, "close", lambda self: closed.append(self))
    with pytest.raises(ZeroDivisionError):
        fl.minimize(wells, START, sgd(), callback=lambda progress: 1 / 0)
    assert len(closed) == 1
