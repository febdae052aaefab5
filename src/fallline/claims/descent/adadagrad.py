"""AdAdaGrad: robust regression on a stream at equal samples, and the front of accuracy against steps on the digits.

The thresholds were fixed after a prototype in NumPy and before the first run of this code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ...core.loop import minimize
from ...core.optimizer import optimizer
from ...core.problem import FiniteSum
from ...core.stopping import call_budget
from ...descent.adadagrad import AdAdaGrad, adadagrad, adagrad
from ...parts.batch_size import InnerProductTest, NormTest
from ...problems.digits import digits
from ..claim import Check, Claim, Scale, Track

__all__ = ["CLAIMS"]


# ---- robust regression on a stream --------------------------------------------------------------

BUDGET, LARGEST, FIRST, MICRO = 100_000, 20_000, 16, 256
FIXED = (16, 64, 256, 1024, 4096)
VARIANCES = np.linspace(0.3, 2.0, 10)
NODES = np.linspace(-8.0, 8.0, 1601)
WEIGHTS = np.exp(-0.5 * NODES**2) / np.exp(-0.5 * NODES**2).sum()
_LAST = 5  # steps over which the squared gradient norm is averaged


def _robust(x: Float[Array, " d"], batch: Any) -> Float[Array, " rows"]:
    rows, targets = batch
    r = rows @ x - targets
    return _phi(r)


def _phi(r: Array) -> Array:
    return 0.5 * r**2 / (1 + r**2)


def _curvature(r: Array) -> Array:
    """φ″."""
    return (1 - 3 * r**2) / (1 + r**2) ** 3


class Stream(FiniteSum):
    """Residuals aᵀx − y with a ~ N(0, Σ) and y ~ N(0, 1), so that x* = 0: each sample is seen once, in one pass.

    Value and gradient are those of the expectation: r ~ N(0, 1 + xᵀΣx), and Σx E φ″(r) by Stein's lemma.
    """

    def __init__(self, seed: int):
        draw = np.random.default_rng(seed)
        rows = draw.normal(size=(BUDGET, len(VARIANCES))) * np.sqrt(VARIANCES)
        super().__init__(_robust, (rows, draw.normal(size=BUDGET)), batch_size=MICRO)

    def _residuals(self, x: Array) -> Array:
        return jnp.sqrt(1 + jnp.sum(VARIANCES * x**2)) * NODES

    def value(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        return WEIGHTS @ _phi(self._residuals(x))

    def value_and_gradient(self, x: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, " d"]]:
        residuals = self._residuals(x)
        return WEIGHTS @ _phi(residuals), VARIANCES * x * (WEIGHTS @ _curvature(residuals))


@dataclasses.dataclass(frozen=True)
class Streams:
    """One stream for each seed, the fixed batch sizes and the tests to compare; what was measured, by solver."""

    streams: Sequence[Stream]
    fixed: tuple[int, ...]
    tests: Mapping[str, Any]
    known: dict[Any, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def measured(self, test: Any, size: int | None) -> dict[str, Any]:
        """The ends of all seeds, with a fixed batch or, for None, an adaptive one."""
        if (test, size) not in self.known:
            ends = [_end(problem, test, size, seed) for seed, problem in enumerate(self.streams)]
            self.known[test, size] = _summary(ends)
        return self.known[test, size]


STREAM_SEEDS = {Scale.SMOKE: 2, Scale.SMALL: 5, Scale.FULL: 50}
BEST = "inner product, ϑ = 0.5"
TESTS = {
    "norm, η = 1": NormTest(1.0),
    BEST: InnerProductTest(0.5),
    "with orthogonality, ν = 1": InnerProductTest(0.5, 1.0),
    "norm, η = 0.5": NormTest(0.5),
}


def _streams(scale: Scale) -> tuple[Streams, list[Check]]:
    # The prototype's best of both kinds where there is time for two runs only.
    fixed, names = ((1024,), (BEST,)) if scale is Scale.SMOKE else (FIXED, tuple(TESTS))
    streams = [Stream(seed) for seed in range(STREAM_SEEDS[scale])]
    instance = Streams(streams, fixed, {name: TESTS[name] for name in names})
    return instance, [
        Check(name, float(value), relation, threshold)
        for (name, relation, threshold), value in zip(_HYPOTHESES, _look(streams[0]), strict=True)
    ]


_HYPOTHESES = (
    ("Stein's gradient, relative distance from the derivative of the value", "<=", 1e-8),
    ("the mean of a sample's gradients, from Stein's", "<=", 0.1),
    ("smoothness of the loss in a residual", "<=", 1.0),
    ("its smallest curvature: it is not convex", "<=", -0.2),
)


@jax.jit
def _look(problem: Stream) -> Array:
    x, grid = jnp.ones(len(VARIANCES)), _curvature(jnp.linspace(-20.0, 20.0, 40_001))
    exact, slope = problem.value_and_gradient(x)[1], jax.grad(problem.value)(x)
    sample = jax.grad(lambda x: jnp.mean(problem.losses(x, problem.data)))(x)
    return jnp.stack([_apart(exact, slope), _apart(sample, exact), jnp.max(jnp.abs(grid)), jnp.min(grid)])


def _apart(a: Array, b: Array) -> Array:
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def _end(problem: Stream, test: Any, size: int | None, seed: int) -> dict[str, Any]:
    """The exact squared gradient norm over the last steps within the budget, the steps, and the path of sizes."""
    first, most = (FIRST, LARGEST) if size is None else (size, size)
    solver = adadagrad(1.0, test=test, batch_size=first, max_batch_size=most, replace=False, initial_accumulator=1.0)
    steps, stop = (BUDGET // first, _enough(test, math.inf)) if size else (1000, _enough(test, BUDGET / MICRO))
    names = ("gradient_norm", "batch_size", "samples")
    run = minimize(problem, jnp.ones(len(VARIANCES)), solver, steps=steps, stop=stop, key=seed, record=names, every=1)
    history = {name: np.asarray(run.history[name]) for name in names}
    last = int(np.flatnonzero(history["samples"] <= BUDGET)[-1])
    squared = history["gradient_norm"] ** 2
    return {
        "squared norm": float(np.mean(squared[last + 1 - _LAST : last + 1])),
        "steps": last,
        "sizes": history["batch_size"][:last],
        "squared": squared[1 : last + 1],
        "samples": history["samples"][1 : last + 1],
    }


def _enough(test: Any, micro_batches: float) -> Any:
    """A rule that ends a run after so many full ones: not all are full, and some tests take two passes.

    In every run, since a rule is part of the program that is compiled.
    """
    return call_budget(min(1.5 * (1 + ("along" in test.needs)) * micro_batches, 1e9), gradient=0)


def _summary(ends: Sequence[dict[str, Any]]) -> dict[str, Any]:
    norms = [end["squared norm"] for end in ends]
    return {
        "squared norm": float(np.mean(norms)),
        "deviation": float(np.std(norms)),
        "steps": float(np.mean([end["steps"] for end in ends])),
        "final size": float(np.mean([end["sizes"][-1] for end in ends])),
        "falls of the size": int(sum(np.sum(np.diff(end["sizes"]) < 0) for end in ends)),
        "path": {"samples": _thin(ends[0]["samples"]), "squared": _thin(ends[0]["squared"])},
    }


def _thin(values: np.ndarray) -> np.ndarray:
    return values[:: -(-len(values) // 200)]


def _compare(constant: bool) -> Callable[[Streams, Track], dict[str, Any]]:
    """Fixed and adaptive batches; or, for `constant`, in place of each adaptive run one of its mean size."""

    def measure(instance: Streams, track: Track) -> dict[str, Any]:
        first = next(iter(instance.tests.values()))  # which fixed batches never make
        fixed = {str(size): instance.measured(first, size) for size in track(instance.fixed, "fixed batches")}
        adaptive: dict[str, Any] = {}
        for name, test in track(instance.tests.items(), "tests"):
            found = instance.measured(test, None)
            adaptive[name] = instance.measured(first, round(BUDGET / found["steps"])) if constant else found
        return {"fixed": fixed, "adaptive": adaptive}

    return measure


def _halves_the_best(measured: Mapping[str, Any]) -> list[Check]:
    fixed, adaptive = (
        min(measured[kind].values(), key=lambda found: found["squared norm"]) for kind in ("fixed", "adaptive")
    )
    ratio = adaptive["squared norm"] / fixed["squared norm"]
    falls = sum(found["falls of the size"] for found in measured["adaptive"].values())
    return [
        Check("squared gradient norm, best adaptive over best fixed batch", ratio, "<=", 0.5),
        Check("steps after which the batch is smaller", falls, "<=", 0),
    ]


def _draw_streams(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    for kind, shades in (("fixed", ("#bbb", "#999", "#777", "#555", "#333")), ("adaptive", _SHADES)):
        for (name, found), color in zip(measured[kind].items(), shades, strict=False):
            path, label = found["path"], name if kind == "adaptive" else f"{name} examples"
            axes[0].loglog(path["samples"], path["squared"], color=color, lw=1, label=label)
    axes[0].set(xlabel="examples", ylabel="squared norm of the true gradient")
    axes[0].legend(fontsize="small")


_SHADES = ("#1f5fa8", "#e08214", "#1b7837", "#9ec3e6")

STREAMING = Claim(
    name="streaming",
    statement="AdaGradNorm with adaptive batches ends, for the same number of examples, at a far smaller gradient than "
    "with any fixed batch, and its batches only grow.",
    refuted_by="a mean squared gradient norm above half of the best fixed batch's, or a batch smaller than the last.",
    kind="comparison",
    source="the theorem for AdAdaGradNorm, O(1/K) in place of O(1/√K); the regression and its budget are the card's",
    tolerance="1/2, as the card sets it: the prototype ended at 3.4e-4, 2.6e-4, 2.1e-4, 1.0e-4 and 2.2e-3 with 16, 64, "
    "256, 1024 and 4096 examples, at 3.4e-5 with the norm test (η = 1), 1.5e-5 with the inner product (ϑ = 0.5), "
    "3.2e-5 with orthogonality (ν = 1); η = 0.5 grows too fast for the budget (3.0e-4). Mean over 5 "
    "seeds and the last 5 steps.",
    seeds=STREAM_SEEDS,
    build=_streams,
    measure=_compare(constant=False),
    judge=_halves_the_best,
    control="in place of each adaptive run a constant batch of its mean size: as many steps, as many examples",
    measure_control=_compare(constant=True),
    draw=_draw_streams,
)


# ---- the front on the digits --------------------------------------------------------------------

TRAINING, SAMPLES, ROWS, HIDDEN = 1257, 60_000, 64, 64
SMALL, ALL, NORM, INNER = "fixed 8", "all", "norm, η = 0.5", "inner product, ϑ = 0.5"


@dataclasses.dataclass(frozen=True)
class Digits:
    """Training problem, test rows, the runs to compare by name, and how many seeds; what was measured."""

    problem: FiniteSum
    pixels: Any
    labels: Any
    runs: Mapping[str, AdAdaGrad]
    seeds: int
    known: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def measured(self, name: str) -> dict[str, Any]:
        """Accuracy and steps of a run, over the seeds."""
        if name not in self.known:
            ends = [_accuracy_and_steps(self, self.runs[name], seed) for seed in range(self.seeds)]
            accuracies, steps = np.array(ends).T
            self.known[name] = {"accuracy": accuracies.mean(), "deviation": accuracies.std(), "steps": steps.mean()}
        return self.known[name]


def _logits(x: PyTree, pixels: Array) -> Array:
    return jax.nn.relu(pixels @ x["in"] + x["in_bias"]) @ x["out"] + x["out_bias"]


def _cross_entropy(x: PyTree, batch: Any) -> Float[Array, " rows"]:
    pixels, labels = batch
    return -jnp.take_along_axis(jax.nn.log_softmax(_logits(x, pixels)), labels[:, None], axis=1)[:, 0]


def _start(seed: int) -> dict[str, Array]:
    first, second = jax.random.split(jax.random.key(1000 + seed))
    return {
        "in": jax.random.normal(first, (64, HIDDEN)) * np.float32(np.sqrt(2 / 64)),
        "in_bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(second, (HIDDEN, 10)) * np.float32(np.sqrt(2 / HIDDEN)),
        "out_bias": jnp.zeros(10),
    }


def _run(size: int, test: Any = None) -> AdAdaGrad:
    update = optimizer(adagrad, learning_rate=0.05)
    most = size if test is None else TRAINING
    rule = NormTest(0.5) if test is None else test
    return adadagrad(update=update, test=rule, batch_size=size, max_batch_size=most, replace=False)


def _digits(scale: Scale) -> tuple[Digits, list[Check]]:
    pixels, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order].astype(np.float32), labels[order].astype(np.int32)
    train, test = slice(None, TRAINING), slice(TRAINING, None)
    runs = {SMALL: _run(8), NORM: _run(8, NormTest(0.5)), ALL: _run(TRAINING)}
    if scale is not Scale.SMOKE:
        runs |= {"fixed 64": _run(64), "fixed 512": _run(512), INNER: _run(8, InnerProductTest(0.5))}
    problem = FiniteSum(_cross_entropy, (pixels[train], labels[train]), batch_size=ROWS)
    return Digits(problem, pixels[test], labels[test], runs, DIGIT_SEEDS[scale]), [
        Check("examples for training and testing", len(labels), ">=", 1797),
    ]


def _accuracy_and_steps(instance: Digits, solver: AdAdaGrad, seed: int) -> tuple[float, int]:
    """The accuracy on the test rows, and the steps, at the last step, or the last but one, within the samples."""

    def run(steps: int, every: int, micro_batches: float) -> Any:
        stop = _enough(solver.test, micro_batches)
        return minimize(
            instance.problem, _start(seed), solver, steps=steps, stop=stop, key=seed, every=every, record=("samples",)
        )

    steps = SAMPLES // int(solver.batch_size)
    if int(solver.max_batch_size) > int(solver.batch_size):
        tried = run(1000, 2, SAMPLES / ROWS)
        steps = int(tried.history["step"][np.flatnonzero(np.asarray(tried.history["samples"]) <= SAMPLES)[-1]])
    x = run(steps, 10 * steps, math.inf).x
    return float(np.mean(np.argmax(np.asarray(_logits(x, instance.pixels)), axis=1) == instance.labels)), steps


def _front(adaptive: Sequence[str]) -> Callable[[Digits, Track], dict[str, Any]]:
    def measure(instance: Digits, track: Track) -> dict[str, Any]:
        found = {name: instance.measured(name) for name in track(instance.runs, "batches")}
        return {"runs": found, "candidates": [name for name in adaptive if name in found]}

    return measure


def _small_batch_accuracy(measured: Mapping[str, Any]) -> list[Check]:
    runs = measured["runs"]
    small, best = runs[SMALL], max((runs[n] for n in measured["candidates"]), key=lambda found: found["accuracy"])
    return [
        Check("test accuracy, best adaptive less fixed 8", best["accuracy"] - small["accuracy"], ">=", -0.005),
        Check("its steps over those of fixed 8", best["steps"] / small["steps"], "<=", 0.25),
    ]


def _draw_front(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    for name, found in measured["runs"].items():
        adaptive = name in measured["candidates"]
        axes[0].errorbar(
            found["steps"], found["accuracy"], found["deviation"], fmt="o", color="#1f5fa8" if adaptive else "#999"
        )
        axes[0].annotate(name, (found["steps"], found["accuracy"]), xytext=(5, 5), textcoords="offset points")
    axes[0].set(xscale="log", xlabel="steps for 60,000 samples", ylabel="test accuracy")
    axes[0].margins(x=0.2, y=0.2)


DIGIT_SEEDS = {Scale.SMOKE: 1, Scale.SMALL: 5, Scale.FULL: 20}

DIGITS = Claim(
    name="digits",
    statement="AdAdaGrad trains a network to the test accuracy of small batches in far fewer steps: for 60,000 samples "
    "of the digits within half a point of batches of 8, in at most a quarter of their steps.",
    refuted_by="the better of the norm test (η = 0.5) and the inner-product test (ϑ = 0.5) more than half a point "
    "below batches of 8.",
    kind="comparison",
    source="the paper's headline on MNIST and CIFAR-10; the data, the network and the budget are the card's",
    tolerance="half a point, ours: the paper's tables are not verified. The prototype measured 98.3% in 7,500 steps "
    "(8), 98.6% in 938 (64), 97.6% in 118 (512), 96.2% in 48 (all), 97.5% in 427 (inner product), 96.7% in 68 (norm).",
    seeds=DIGIT_SEEDS,
    build=_digits,
    measure=_front((NORM, INNER)),
    judge=_small_batch_accuracy,
    control="all examples in each batch from the start",
    measure_control=_front((ALL,)),
    draw=_draw_front,
    precision=32,
    finding="not at this size. Over 5 seeds: 98.3% with batches of 8 (7,500 steps) and of 64 (937), 97.7% in 456 steps "
    "with the inner-product test, 0.63 points below, 97.3% with 512 (117 steps), 95.8% in 69 steps with the norm test, "
    "95.6% with all examples (47). Adaptive batches lie on the front that fixed ones span, and do not go beyond it.",
)

CLAIMS = (STREAMING, DIGITS)
