"""Learning rates against batch size: the matrix model, stable rates of a network, its noise, and the learner.

The thresholds were fixed after a prototype in NumPy and before the first run of this code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ...core import trees
from ...descent.batch_size_learning_rates import effective_batch_size, noise_variance, spike
from ...descent.curvature_learner import curvature_learner, refresh
from ...parts.curvature import hessian
from ...parts.linalg import leading_eigenvector
from ...problems.digits import digits
from ..claim import Check, Claim, Scale, Track
from ..statistics import fit_line

__all__ = ["CLAIMS"]


# ---- the matrix model ---------------------------------------------------------------------------

CASES = ((100, 4.0), (400, 1.5), (400, 4.0), (1600, 1.5), (100, 1.5), (400, 1.0))  # b̃, λ; σ² P = 600


@dataclasses.dataclass(frozen=True)
class Model:
    """Noise of variance 600/P for one example, at several seeds."""

    size: int
    seeds: int

    @property
    def level(self) -> float:
        return 600.0

    def noise(self, seed: int) -> Float[np.ndarray, "p p"]:
        """A symmetric matrix whose entries off the diagonal have variance σ²."""
        g = np.random.default_rng(seed).standard_normal((self.size, self.size))
        return (g + g.T) * np.sqrt(self.level / self.size / 2)


def _model(scale: Scale) -> tuple[Model, list[Check]]:
    model = Model(1500 if scale is Scale.FULL else 600, MATRIX.seeds[scale])
    noise = model.noise(0)
    off = noise[np.triu_indices(model.size, 1)]
    return model, [
        Check("asymmetry of the noise", float(np.abs(noise - noise.T).max()), "<=", 0.0),
        Check(
            "variance of its entries over σ², distance from 1",
            abs(float(np.var(off)) * model.size / model.level - 1),
            "<=",
            0.02,
        ),
    ]


def _outliers(with_noise: bool) -> Callable[[Model, Track], dict[str, Any]]:
    def measure(model: Model, track: Track) -> dict[str, Any]:
        from scipy.linalg import eigvalsh

        found: dict[str, list[float]] = {_case(*case): [] for case in CASES}
        for seed in track(range(model.seeds), "seeds"):
            noise = model.noise(seed)
            for batch, outlier in CASES:
                matrix = noise / np.sqrt(batch)
                matrix[0, 0] += outlier
                last = (model.size - 1, model.size - 1)
                found[_case(batch, outlier)].append(float(eigvalsh(matrix, subset_by_index=last)[0]))
        predicted = {
            _case(batch, outlier): float(spike(outlier, model.level / batch if with_noise else 0.0).value)
            for batch, outlier in CASES
        }
        return {name: {"measured": float(np.mean(v)), "predicted": predicted[name]} for name, v in found.items()}

    return measure


def _case(batch: int, outlier: float) -> str:
    return f"b = {batch}, lambda = {outlier:g}"


def _agree(measured: Mapping[str, Any]) -> list[Check]:
    return [
        Check(f"{name}: |measured / predicted − 1|", abs(v["measured"] / v["predicted"] - 1), "<=", 0.03)
        for name, v in measured.items()
    ]


def _draw_outliers(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    ax = axes[0]
    predicted = [v["predicted"] for v in measured.values()]
    ax.plot(predicted, predicted, color="0.7", label="equal")
    ax.plot(predicted, [v["measured"] for v in measured.values()], "o", label="random matrices")
    ax.set(xlabel="predicted largest eigenvalue", ylabel="measured")
    ax.legend()


MATRIX = Claim(
    name="matrix-model",
    statement="Under symmetric noise of independent entries an eigenvalue λ of the Hessian moves to λ + Pσ²/(b̃λ) where "
    "λ > σ √(P/b̃), and disappears in the noise, of edge 2σ √(P/b̃), elsewhere.",
    refuted_by="a largest eigenvalue more than 3% off.",
    kind="bound",
    source="the random matrix model and its outliers",
    tolerance="3%, four cases above the threshold and two below: the prototype was at most 1.9% off, at P = 600, where "
    "the edge lies about 1% inside its limit.",
    seeds={Scale.SMOKE: 1, Scale.SMALL: 5, Scale.FULL: 10},
    build=_model,
    measure=_outliers(True),
    judge=_agree,
    control="the prediction without noise, λ′ = λ",
    measure_control=_outliers(False),
    draw=_draw_outliers,
)


# ---- the largest rate that trains a network -----------------------------------------------------

HIDDEN, STEPS, DONE = 64, 200, 1.0
SIZES = {
    Scale.SMOKE: (1, 4, 64, 256),
    Scale.SMALL: (1, 4, 16, 64, 256, 1024),
    Scale.FULL: (1, 4, 16, 64, 256, 1024),
}

Weights = dict[str, Array]


def _starts(seeds: int) -> Any:
    """Gaussian weights of each seed, no biases."""
    draws = [np.random.default_rng([1, seed]) for seed in range(seeds)]
    start = {
        "in": np.stack([draw.standard_normal((64, HIDDEN)) * np.sqrt(2 / 64) for draw in draws]),
        "in_bias": np.zeros((seeds, HIDDEN)),
        "out": np.stack([draw.standard_normal((HIDDEN, 10)) * np.sqrt(2 / HIDDEN) for draw in draws]),
        "out_bias": np.zeros((seeds, 10)),
    }
    return {name: leaf.astype(np.float32) for name, leaf in start.items()}


def _log_odds(x: Weights, pixels: Array) -> Array:
    return jax.nn.log_softmax(jax.nn.relu(pixels @ x["in"] + x["in_bias"]) @ x["out"] + x["out_bias"])


def _losses(x: Weights, batch: Any) -> Float[Array, " rows"]:
    return -jnp.take_along_axis(_log_odds(x, batch[0]), batch[1][:, None], axis=1)[:, 0]


def _loss(x: Weights, batch: Any) -> Float[Array, ""]:
    return jnp.mean(_losses(x, batch))


@dataclasses.dataclass(frozen=True)
class Training:
    """Batch sizes, the grids of rates, and data. With `padded` all batches have one shape, and so one program."""

    sizes: tuple[int, ...]
    seeds: int
    data: tuple[Any, Any]
    grids: dict[str, Float[np.ndarray, " rates"]]
    padded: bool


def _training(scale: Scale) -> tuple[Training, list[Check]]:
    pixels, labels = digits()
    data = (pixels.astype(np.float32), labels.astype(np.int32))
    start = float(jax.jit(_loss)({name: leaf[0] for name, leaf in _starts(1).items()}, data))
    small = scale is Scale.SMOKE
    grids = {
        "sgd": 2.0 ** (np.arange(-4, 1.1) if small else np.arange(-5, 3.1, 0.5)),
        "adam": 2.0 ** (np.arange(-7, -0.9) if small else np.arange(-8, 1.1, 0.5)),
    }
    return Training(SIZES[scale], STABLE.seeds[scale], data, grids, small), [
        Check("loss at the start, which is no success", start, ">=", DONE),
        Check("largest batch size, of the number of examples", max(SIZES[scale]) / len(labels), "<=", 1.0),
    ]


@jax.jit
def _ends(
    rates: Array, adaptive: Array, starts: Weights, rows: Array, weights: Array, data: Any
) -> Float[Array, "seeds rates"]:
    """The loss on all data after steps on batches of these weighted rows; of Adam where `adaptive`, else of SGD."""
    adam = optax.scale_by_adam()

    def run(rate: Array, adaptive: Array, x: Weights, rows: Array) -> Array:
        def step(carry: Any, rows: Array) -> tuple[Any, None]:
            x, moments = carry
            batch = jax.tree.map(lambda a: a[rows], data)
            gradient = jax.grad(lambda x: weights @ _losses(x, batch))(x)
            scaled, moments = adam.update(gradient, moments)
            moved = jax.tree.map(lambda a, g, s: a - rate * jnp.where(adaptive, s, g), x, gradient, scaled)
            return (moved, moments), None

        (x, _), _ = jax.lax.scan(step, (x, adam.init(x)), rows)
        return _loss(x, data)

    return jax.lax.map(lambda seed: jax.vmap(run, (0, 0, None, None))(rates, adaptive, *seed), (starts, rows))


def _batches(seeds: int, size: int, width: int, total: int, copies: bool) -> tuple[Any, Any]:
    """Rows of each seed and step, drawn with replacement, and their weights: 1/size, and 0 up to the width."""
    drawn = np.stack(
        [np.random.default_rng([seed, size]).integers(total, size=(STEPS, width)) for seed in range(seeds)]
    )
    rows = np.broadcast_to(drawn[:, :, :1], drawn.shape) if copies else drawn
    return rows.astype(np.int32), (np.arange(width) < size).astype(np.float32) / min(size, width)


def _largest_rates(copies: bool) -> Callable[[Training, Track], dict[str, Any]]:
    def measure(training: Training, track: Track) -> dict[str, Any]:
        grids = training.grids
        rates = np.concatenate([grids["sgd"], grids["adam"]]).astype(np.float32)
        adaptive = np.arange(len(rates)) >= len(grids["sgd"])
        starts, total = _starts(training.seeds), len(training.data[1])
        found: dict[str, Any] = {"sgd": {}, "adam": {}, "best of adam": {}}
        for size in track(training.sizes, "batch sizes"):
            width = max(training.sizes) if training.padded else 1 if copies else size
            rows, weights = _batches(training.seeds, size, width, total, copies)
            ends = np.asarray(_ends(rates, adaptive, starts, rows, weights, training.data))
            for name, values in (("sgd", ends[:, ~adaptive]), ("adam", ends[:, adaptive])):
                largest = [float(max(grids[name][row < DONE], default=np.nan)) for row in values]
                found[name][str(size)] = float(np.median(largest))
            means = np.where(np.isfinite(ends), ends, np.inf)[:, adaptive].mean(axis=0)
            found["best of adam"][str(size)] = float(grids["adam"][np.argmin(means)])
        return found

    return measure


def _slope(rates: Mapping[str, float], low: int, high: int) -> float:
    """Of log rate on log batch size, over low … high."""
    points = [(np.log(int(b)), np.log(rate)) for b, rate in rates.items() if low <= int(b) <= high]
    if len(points) == 2:
        return float((points[1][1] - points[0][1]) / (points[1][0] - points[0][0]))
    return fit_line(*zip(*points, strict=True)).slope


def _two_rules(measured: Mapping[str, Any]) -> list[Check]:
    adam = _slope(measured["adam"], 1, 256)
    return [
        Check("SGD: slope over batch sizes 1 to 4", _slope(measured["sgd"], 1, 4), ">=", 0.8),
        Check("SGD: slope over batch sizes from 64", _slope(measured["sgd"], 64, 1024), "<=", 0.3),
        Check("Adam: slope over batch sizes 1 to 256", adam, ">=", 0.35),
        Check("Adam: slope over batch sizes 1 to 256, above", adam, "<=", 0.65),
    ]


def _draw_rates(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    ax = axes[0]
    for name in ("sgd", "adam"):
        sizes = [int(b) for b in measured[name]]
        ax.loglog(sizes, list(measured[name].values()), "o-", label=name)
    ax.set(xlabel="batch size", ylabel="largest learning rate that trains")
    ax.legend()


STABLE = Claim(
    name="two-rules",
    statement="The largest learning rate of SGD grows as the batch size and then saturates, that of Adam as its root.",
    refuted_by="slopes of log rate on log batch size outside of the thresholds.",
    kind="rate",
    source="the linear rule for SGD and the square-root rule for Adam",
    tolerance="SGD ≥ 0.8 over 1 … 4 and ≤ 0.3 from 64 on; Adam in [0.35, 0.65] over 1 … 256. The prototype measured "
    "0.125, 0.5, 1, 1.41, 1.41, 2 for SGD at B = 1, 4, 16, 64, 256, 1024 and a slope of 0.40 for Adam. A rate trains "
    "where the loss on all digits is below 1 after 200 steps; grid of half octaves (of octaves in `smoke`), the median "
    "over the seeds.",
    seeds={Scale.SMOKE: 1, Scale.SMALL: 3, Scale.FULL: 10},
    build=_training,
    measure=_largest_rates(False),
    judge=_two_rules,
    control="copies of a single example in the batch, so that its noise is that of B = 1",
    measure_control=_largest_rates(True),
    draw=_draw_rates,
    precision=32,
)


# ---- the noise of a real Hessian ----------------------------------------------------------------

SIZES_OF_NOISE = (8, 32, 128, 512)


@dataclasses.dataclass(frozen=True)
class Regression:
    """Softmax regression on the digits, a point, and how many batches to draw."""

    data: tuple[Any, Any]
    x: Weights
    batches: int


def _row_losses(x: Weights, batch: Any) -> Float[Array, " rows"]:
    log_odds = jax.nn.log_softmax(batch[0] @ x["weights"] + x["bias"])
    return -jnp.take_along_axis(log_odds, batch[1][:, None], axis=1)[:, 0]


def _mean_loss(x: Weights, batch: Any) -> Float[Array, ""]:
    return jnp.mean(_row_losses(x, batch))


def _regression(scale: Scale) -> tuple[Regression, list[Check]]:
    pixels, labels = digits()
    data = (pixels.astype(np.float32), labels.astype(np.int32))
    start = {"weights": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}
    x, loss = _descended(start, data)
    instance = Regression(data, x, NOISE.seeds[scale])
    return instance, [
        Check("parameters", float(trees.flat_size(start)), ">=", 650.0),
        Check("loss, far from its start", float(loss), "<=", 0.5),
    ]


@jax.jit
def _descended(x: Weights, data: Any) -> tuple[Weights, Array]:
    """A hundred steps of gradient descent at rate 1, and the loss there."""

    def step(_: Any, x: Weights) -> Weights:
        return jax.tree.map(lambda a, g: a - g, x, jax.grad(_mean_loss)(x, data))

    x = jax.lax.fori_loop(0, 100, step, x)
    return x, _mean_loss(x, data)


@jax.jit
def _tops(x: Weights, data: Any, rows: Array, weights: Array, starts: Array) -> Float[Array, " batches"]:
    """λ₁ of the Hessian on each batch of weighted rows, by 20 steps of Lanczos."""

    def one(each: tuple[Array, Array]) -> Array:
        rows, start = each
        batch = jax.tree.map(lambda a: a[rows], data)
        product = hessian(lambda x: weights @ _row_losses(x, batch), x)
        flat = lambda v: trees.flatten(product(trees.unflatten(v, x)))  # noqa: E731
        return leading_eigenvector(flat, start / jnp.linalg.norm(start), 20)[0]

    return jax.lax.map(one, (rows, starts))


def _inflation(isotropic: bool) -> Callable[[Regression, Track], dict[str, Any]]:
    def measure(instance: Regression, track: Track) -> dict[str, Any]:
        noise = noise_variance(_row_losses, instance.x, instance.data, probes=4)
        total, full = len(instance.data[1]), _dense(instance) if isotropic else np.zeros(0)
        tops: dict[int, Any] = {}
        for size in track(SIZES_OF_NOISE, "batch sizes"):
            if isotropic:
                scale = np.sqrt(float(noise.variance.value / effective_batch_size(size, total)))
                tops[size] = _noisy_top(full, scale)
            else:
                draw, width = np.random.default_rng(size), max(SIZES_OF_NOISE)  # one shape, so one program
                rows = np.stack([draw.permutation(total)[:width] for _ in range(instance.batches)])
                weights = (np.arange(width) < size).astype(np.float32) / size
                starts = draw.standard_normal((instance.batches, noise.parameters)).astype(np.float32)
                tops[size] = _tops(instance.x, instance.data, rows, weights, starts)
        sizes = np.array(SIZES_OF_NOISE)
        return {
            "all data": float(noise.largest),
            "P sigma^2": float(noise.variance.value) * noise.parameters,
            "s_1": float(noise.along),
            "measured": _by_size([np.mean(tops[size]) for size in sizes]),
            "isotropic": _by_size(noise.rates(sizes, anisotropic=False).largest),
            "anisotropic": _by_size(noise.rates(sizes).largest),
        }

    return measure


def _by_size(values: Any) -> dict[str, float]:
    return {str(size): float(v) for size, v in zip(SIZES_OF_NOISE, values, strict=True)}


def _dense(instance: Regression) -> Float[np.ndarray, "p p"]:
    """The Hessian of all data in closed form: the mean of (diag p − p pᵀ) ⊗ x xᵀ, coordinates in another order."""
    inputs = np.hstack([instance.data[0], np.ones((len(instance.data[1]), 1))]).astype(float)
    scores = inputs @ np.vstack([instance.x["weights"], instance.x["bias"][None]])
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    inner = p[:, :, None] * np.eye(10) - p[:, :, None] * p[:, None, :]
    outer = inputs[:, :, None] * inputs[:, None, :]
    mean = inner.reshape(len(p), -1).T @ outer.reshape(len(p), -1) / len(p)
    return mean.reshape(10, 10, 65, 65).transpose(0, 2, 1, 3).reshape(650, 650)


def _noisy_top(full: Float[np.ndarray, "p p"], scale: float) -> float:
    from scipy.linalg import eigvalsh

    g = np.random.default_rng(0).standard_normal(full.shape)
    last = (len(full) - 1, len(full) - 1)
    return float(eigvalsh(full + scale * (g + g.T) / np.sqrt(2), subset_by_index=last)[0])


def _gap(measured: Mapping[str, Any]) -> list[Check]:
    found, whole = measured["measured"], measured["all data"]
    pairs = zip(SIZES_OF_NOISE[:-1], SIZES_OF_NOISE[1:], strict=True)
    drops = [Check(f"fall from B = {a} to {b}", found[str(a)] - found[str(b)], ">=", 0.0) for a, b in pairs]
    first, inflation = str(SIZES_OF_NOISE[0]), found[str(SIZES_OF_NOISE[0])] - whole
    return [
        *drops,
        Check("B = 512: distance from all data, relative", abs(found["512"] / whole - 1), "<=", 0.03),
        Check(
            "B = 8: share of the rise that P sigma^2 predicts",
            (measured["isotropic"][first] - whole) / inflation,
            "<=",
            0.1,
        ),
        Check("B = 8: share that s_1 predicts", (measured["anisotropic"][first] - whole) / inflation, ">=", 0.2),
    ]


def _draw_noise(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    ax = axes[0]
    for name in ("measured", "isotropic", "anisotropic"):
        ax.semilogx([int(b) for b in measured[name]], list(measured[name].values()), "o-", label=name)
    ax.axhline(measured["all data"], color="0.7", label="all data")
    ax.set(xlabel="batch size", ylabel="largest eigenvalue")
    ax.legend()


NOISE = Claim(
    name="real-noise",
    statement="Softmax regression on the digits: a batch's largest eigenvalue falls with the batch size to that of all "
    "data; the isotropic rule predicts next to nothing of that, s₁ a part. (Not the paper's claim, but the gap "
    "between its model and a real Hessian of 650 parameters, whose noise is not isotropic.)",
    refuted_by="an eigenvalue that rises with the batch size, isotropic noise that explains more than a tenth of the "
    "rise at B = 8, or s₁ that explains less than a fifth.",
    kind="comparison",
    source="the outlier rule against measured Hessians",
    tolerance="The prototype measured 1.183, 0.847, 0.773, 0.707 at B = 8, 32, 128, 512, and 0.712 of all data; "
    "Pσ² = 0.017 predicts 0.715 at B = 8 and s₁ 0.868, which is a third of the rise. The point has the prototype's λ₁, "
    "0.712: a hundred steps of gradient descent at rate 1 from zero. (At zero, where we looked first, λ₁ = 1.144, and "
    "20 batches of 8 rise by 0.016 only, less than their scatter.)",
    seeds={Scale.SMOKE: 60, Scale.SMALL: 400, Scale.FULL: 2000},
    build=_regression,
    measure=_inflation(False),
    judge=_gap,
    control="isotropic noise of the same σ² in place of the batch's",
    measure_control=_inflation(True),
    draw=_draw_noise,
    precision=32,
)


# ---- the learner --------------------------------------------------------------------------------

BATCH, EPOCHS, TRAIN = 64, 15, 1347
PAIRS = tuple((rate, momentum) for rate in (0.01, 0.03, 0.1, 0.3) for momentum in (0.0, 0.9))


@dataclasses.dataclass(frozen=True)
class Split:
    """Digits to train on and to test on, and the seeds."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]
    seeds: int


def _split(scale: Scale) -> tuple[Split, list[Check]]:
    return _split_of(LEARNER.seeds[scale])


def _split_of(seeds: int) -> tuple[Split, list[Check]]:
    pixels, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))
    data = (pixels.astype(np.float32)[order], labels.astype(np.int32)[order])
    train, test = ((data[0][part], data[1][part]) for part in (slice(TRAIN), slice(TRAIN, None)))
    share = float(np.min(np.bincount(train[1], minlength=10)) / TRAIN)
    return Split(train, test, seeds), [Check("smallest share of a digit in training", share, ">=", 0.05)]


@functools.partial(jax.jit, static_argnums=0)
def _trained(seeds: int, lanes: Any, orders: Array, train: Any, test: Any) -> tuple[Array, Array]:
    """Training loss and the number of test digits named right, of each lane and seed.

    `lanes`: rate, momentum, safety; a rate of NaN is a pair that is measured each epoch.
    """

    def run(lane: Array, x: Weights, orders: Array, key: Array) -> tuple[Array, Array]:
        learned = jnp.isnan(lane[0])
        update = curvature_learner(jnp.where(learned, 0.01, lane[0]), lane[1])

        def step(carry: Any, rows: Array) -> tuple[Any, None]:
            x, state = carry
            moved, state = update.update(jax.grad(_loss)(x, jax.tree.map(lambda a: a[rows], train)), state)
            return (optax.apply_updates(x, moved), state), None

        def epoch(carry: Any, each: tuple[Array, Array]) -> tuple[Any, None]:
            (x, state), (batches, key) = carry, each
            product = hessian(_loss, x, jax.tree.map(lambda a: a[batches[0]], train))
            measured = refresh(state, product, key, x, safety=lane[2])
            state = jax.tree.map(lambda new, old: jnp.where(learned, new, old), measured, state)
            return jax.lax.scan(step, (x, state), batches)

        (x, _), _ = jax.lax.scan(epoch, (x, update.init(x)), (orders, jax.random.split(key, EPOCHS)))
        return _loss(x, train), jnp.sum(jnp.argmax(_log_odds(x, test[0]), axis=1) == test[1])

    keys = jax.random.split(jax.random.key(0), seeds)
    over_seeds = jax.vmap(run, (None, 0, 0, 0))
    return jax.vmap(over_seeds, (0, None, None, None))(lanes, _starts(seeds), orders, keys)


@functools.cache
def _all_lanes(seeds: int) -> tuple[Any, Any]:
    """The grid's pairs, then the learner at safety 1/4 and at 1: one program, one run."""
    split, _ = _split_of(seeds)
    draw = np.random.default_rng(1)
    taken = TRAIN // BATCH * BATCH
    orders = np.stack(
        [[draw.permutation(TRAIN)[:taken].reshape(-1, BATCH) for _ in range(EPOCHS)] for _ in range(seeds)]
    )
    lanes = np.array([(*pair, 1.0) for pair in PAIRS] + [(np.nan, 0.0, 0.25), (np.nan, 0.0, 1.0)], np.float32)
    losses, right = _trained(seeds, lanes, orders, split.train, split.test)
    return np.asarray(losses), np.asarray(right) / len(split.test[1])


def _learner(lane: int) -> Callable[[Split, Track], dict[str, Any]]:
    def measure(split: Split, track: Track) -> dict[str, Any]:
        losses, accuracies = _all_lanes(split.seeds)
        found = {"learner": _ends_of(losses[lane], accuracies[lane])}
        return found | {
            f"{rate:g}, {momentum:g}": _ends_of(losses[i], accuracies[i]) for i, (rate, momentum) in enumerate(PAIRS)
        }

    return measure


def _ends_of(loss: Any, accuracy: Any) -> dict[str, float]:
    return {"loss": float(np.mean(loss)), "accuracy": float(np.mean(accuracy))}


def _near_the_best(measured: Mapping[str, Any]) -> list[Check]:
    fixed = [v for name, v in measured.items() if name != "learner"]
    median = float(np.median([v["loss"] if np.isfinite(v["loss"]) else np.inf for v in fixed]))
    best = max(v["accuracy"] for v in fixed)
    learner = measured["learner"]
    accuracy = learner["accuracy"] if np.isfinite(learner["loss"]) else float("nan")
    return [
        Check("test accuracy below that of the best pair", round(best - accuracy, 9), "<=", 0.01),
        Check("training loss, of the pairs' median", learner["loss"] / median, "<=", 1.0),
    ]


def _draw_learner(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    ax = axes[0]
    fixed = {name: v for name, v in measured.items() if name != "learner"}
    ax.semilogy([v["accuracy"] for v in fixed.values()], [v["loss"] for v in fixed.values()], "o", label="fixed pairs")
    ax.semilogy([measured["learner"]["accuracy"]], [measured["learner"]["loss"]], "s", label="learner")
    ax.set(xlabel="test accuracy", ylabel="training loss")
    ax.legend()


LEARNER = Claim(
    name="learner",
    statement="A pair learned from the spectrum of the training batch, once an epoch and without tuning, trains a "
    "network on the digits about as well as the best of a grid of fixed pairs.",
    refuted_by="test accuracy more than a point below the best pair's, or a training loss above the grid's median.",
    kind="comparison",
    source="the learner's preliminary results",
    tolerance="The prototype ended at 0.067 and 96.9%, the best of 8 pairs at 0.0037 and 97.5%, their median at 0.096. "
    "Here rates 0.01, 0.03, 0.1, 0.3 with momentum 0 and 0.9; batch 64, 15 epochs, 1,347 digits train and 450 test.",
    seeds={Scale.SMOKE: 3, Scale.SMALL: 30, Scale.FULL: 100},
    build=_split,
    measure=_learner(-2),
    judge=_near_the_best,
    control="safety 1 in place of 1/4: Polyak's own rate",
    measure_control=_learner(-1),
    draw=_draw_learner,
    precision=32,
    finding="The loss is as stated; the accuracy is at the threshold and, over enough seeds, beyond it. 30 seeds end "
    "at a loss of 0.060 and 97.45%, the best of the eight pairs (0.3, 0.9) at 0.0054 and 98.55%, which is 1.10 points "
    "above; the median loss of the pairs is 0.156. Three seeds are 0.74 points apart, ten exactly 1.00. The learner "
    "needs no grid and has a lower loss than six of the eight pairs, but the best one is ahead by more than a point. "
    "At safety 1 the run diverges, as it did in the prototype.",
)

CLAIMS = (MATRIX, STABLE, NOISE, LEARNER)
