"""Dynamical stability: the trace of the minima that SGD finds, and the largest step at which it can stay.

The thresholds were fixed after a prototype in NumPy and before the first run of this code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...landscape.dynamical_stability import dynamical_stability, largest_stable_step, moment_map
from ..claim import Check, Claim, Scale, Track

__all__ = ["CLAIMS"]


# ---- SGD on a diagonal linear network -----------------------------------------------------------

N, D, SPARSE = 30, 60, 3
STEPS = {Scale.SMOKE: 150_000, Scale.SMALL: 300_000, Scale.FULL: 1_000_000}
RATES = {
    Scale.SMOKE: (0.02, 0.04, 0.08),
    Scale.SMALL: (0.005, 0.02, 0.03, 0.04, 0.06, 0.08),
    Scale.FULL: (0.005, 0.02, 0.03, 0.04, 0.06, 0.08),
}
GD_RATE, GD_STEPS = 0.03, 20_000


@dataclasses.dataclass(frozen=True)
class Nets:
    """Data of each seed, and how long and how fast to train."""

    inputs: Float[np.ndarray, "seeds n d"]
    targets: Float[np.ndarray, "seeds n"]
    steps: int
    rates: tuple[float, ...]


def _truth() -> Float[np.ndarray, " d"]:
    return (np.arange(D) < SPARSE).astype(float)


def predict(x: dict[str, Array], inputs: Float[Array, "n d"]) -> Float[Array, " n"]:
    """The diagonal linear network: a linear model with coefficients u² − v²."""
    return inputs @ (x["u"] ** 2 - x["v"] ** 2)


def _nets(scale: Scale) -> tuple[Nets, list[Check]]:
    seeds = TRACE.seeds[scale]
    inputs = np.stack([np.random.default_rng(seed).standard_normal((N, D)) for seed in range(seeds)])
    targets = inputs @ _truth()
    ranks = [np.linalg.matrix_rank(a) for a in inputs]
    return Nets(inputs, targets, STEPS[scale], RATES[scale]), [
        Check(
            "examples beyond the rank of the inputs, so that not all can be fitted", N - float(min(ranks)), "<=", 0.0
        ),
        Check("coefficients beyond the examples, so that many interpolate", float(D - N), ">=", 1.0),
    ]


@functools.partial(jax.jit, static_argnames=("steps", "warm", "whole"))
def _train(
    inputs: Array, targets: Array, key: Array, rate: Array, start: Array, *, steps: int, warm: float, whole: bool
) -> Any:
    """Plain steps with a batch of one (or of all), the rate rising linearly over the first `warm` of them."""

    def step(x: dict[str, Array], t: Array) -> tuple[dict[str, Array], None]:
        eta = rate * (jnp.minimum(1.0, (t + 1) / (warm * steps)) if warm else 1.0)
        if whole:
            slope = inputs.T @ (predict(x, inputs) - targets) / inputs.shape[0]
        else:
            i = jax.random.randint(jax.random.fold_in(key, t), (), 0, inputs.shape[0])
            slope = inputs[i] * (predict(x, inputs[i][None])[0] - targets[i])
        return {"u": x["u"] - 2 * eta * slope * x["u"], "v": x["v"] + 2 * eta * slope * x["v"]}, None

    x = {name: jnp.full(inputs.shape[1], start) for name in "uv"}
    return jax.lax.scan(step, x, jnp.arange(steps))[0]


def _end(inputs: Array, targets: Array, x: Any, rate: Array) -> dict[str, Array]:
    found = dynamical_stability(predict, x, inputs, targets, step_size=rate, batch_size=1)
    coefficients = x["u"] ** 2 - x["v"] ** 2
    return {
        "trace": found.trace.value,
        "largest": found.largest,
        "loss": found.residual / 2,
        "error": jnp.sum((coefficients - _truth()) ** 2),
    }


def _minima(nets: Nets, *, whole: bool) -> dict[str, Any]:
    """Of each rate (first axis) and seed: what is measured at the end of a run from u = v = 1/2 with a warm-up."""

    def one(inputs: Array, targets: Array, key: Array, rate: Array) -> dict[str, Array]:
        x = _train(inputs, targets, key, rate, jnp.float64(0.5), steps=nets.steps, warm=0.8, whole=whole)
        return _end(inputs, targets, x, rate)

    keys = jax.random.split(jax.random.key(0), len(nets.inputs))
    over_seeds = jax.vmap(one, (0, 0, 0, None))
    over_rates = jax.jit(jax.vmap(over_seeds, (None, None, None, 0)))
    return over_rates(jnp.asarray(nets.inputs), jnp.asarray(nets.targets), keys, jnp.asarray(nets.rates))


def _measure_minima(whole: bool) -> Any:
    def measure(nets: Nets, track: Track) -> dict[str, Any]:
        found = jax.tree.map(np.asarray, _minima(nets, whole=whole))
        inputs, targets = jnp.asarray(nets.inputs[0]), jnp.asarray(nets.targets[0])
        rate = jnp.float64(GD_RATE)
        x = _train(inputs, targets, jax.random.key(0), rate, jnp.float64(1.0), steps=GD_STEPS, warm=0.0, whole=True)
        descent = {name: float(value) for name, value in _end(inputs, targets, x, rate).items()}
        return {
            "rates": list(nets.rates),
            **{name: values.tolist() for name, values in found.items()},
            "gradient descent": {"rate": GD_RATE, **descent},
        }

    return measure


def _flatter(measured: Mapping[str, Any]) -> list[Check]:
    rates = np.asarray(measured["rates"])
    trace, loss = np.asarray(measured["trace"]), np.asarray(measured["loss"])
    errors = np.mean(measured["error"], axis=1)[rates >= 0.02]
    descent = measured["gradient descent"]
    return [
        Check("largest loss at the end", float(np.max(loss)), "<=", 1e-9),
        Check("largest ratio of the trace to 2/η, batch of one", float(np.max(trace * rates[:, None] / 2)), "<=", 1.02),
        Check("least fall of the test error from one rate to the next", float(np.min(-np.diff(errors))), ">=", 0.0),
        Check("gradient descent: trace over 2/η", descent["trace"] * descent["rate"] / 2, ">=", 3.0),
        Check("gradient descent: λ_max over 2/η", descent["largest"] * descent["rate"] / 2, "<=", 1.02),
    ]


def _draw_minima(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    rates = np.asarray(measured["rates"])
    left, right = axes
    left.loglog(rates, 2 / rates, color="#999", label="2/η")
    left.loglog(rates, np.mean(measured["trace"], axis=1), "o-", color="#1f5fa8", label="trace where SGD ends")
    descent = measured["gradient descent"]
    left.loglog([descent["rate"]], [descent["trace"]], "s", color="#b3431e", label="where gradient descent ends")
    left.set(xlabel="step size η")
    left.legend(frameon=False)
    right.semilogx(rates, np.mean(measured["error"], axis=1), "o-", color="#1f5fa8")
    right.set(xlabel="step size η", ylabel="test error")


TRACE = Claim(
    name="trace",
    statement="Minima at which SGD with a batch of one ends have a trace of the Hessian of at most 2/η, so that a "
    "larger step generalizes better on a sparse target; gradient descent is held by the largest eigenvalue alone.",
    refuted_by="A run that reached zero loss with a trace above 1.02 · 2/η; a test error that does not fall with η; or "
    "gradient descent that meets the trace's condition where it is told to start beyond it.",
    kind="bound",
    source="The stability conditions for SGD and gradient descent, and the diagonal linear network, of which no figure "
    "is quoted: sizes, rates and schedule are our own",
    tolerance="1.02: the condition is of the linearization, the runs end at a distance from the minimum that their "
    "last noise gives (the prototype's largest ratio was 0.94). 3 for gradient descent: the prototype had 7.3. Loss "
    "1e-9: interpolation, beside targets of the size 1. Errors must fall over η ≥ 0.02, where the condition binds.",
    seeds={Scale.SMOKE: 2, Scale.SMALL: 3, Scale.FULL: 10},
    build=_nets,
    measure=_measure_minima(whole=False),
    judge=_flatter,
    control="the whole gradient in place of one example's, with the same steps and warm-up",
    measure_control=_measure_minima(whole=True),
    draw=_draw_minima,
    panels=2,
)


# ---- the largest stable step ---------------------------------------------------------------------

BATCHES = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Gradients of the examples of small linear models, one for each seed, and how often the moment is moved."""

    rows: Float[np.ndarray, "seeds n p"]
    steps: int


def _linear(scale: Scale) -> tuple[Linear, list[Check]]:
    seeds = OPERATOR.seeds[scale]
    rows = np.stack([np.random.default_rng(seed).standard_normal((6, 4)) for seed in range(seeds)])
    least = min(np.linalg.eigvalsh(a.T @ a / 6)[0] for a in rows)
    return Linear(rows, 2000), [Check("smallest eigenvalue of H: no direction is neutral", float(least), ">=", 1e-3)]


def _growth(rows: Array, eta: Array, share: Array, steps: int) -> Array:
    """The rate at which E‖d‖² grows a step, by the exact recursion of the second moment."""

    def step(carry: tuple[Array, Array], _: Any) -> tuple[tuple[Array, Array], None]:
        moment, _ = carry
        moved = moment_map(rows, moment, eta, share)
        size = jnp.trace(moved)
        return (moved / size, size), None

    start = jnp.eye(rows.shape[1]) / rows.shape[1]
    return jax.lax.scan(step, (start, jnp.ones(())), length=steps)[0][1]


def _steps(linear: Linear, track: Track, *, noise: bool) -> dict[str, Any]:
    del track  # one compiled program

    def one(rows: Array, share: Array) -> tuple[Array, Array, Array]:
        hessian = rows.T @ rows / rows.shape[0]
        values, vectors = jnp.linalg.eigh(hessian)
        largest = largest_stable_step(rows @ vectors, values, share if noise else jnp.zeros_like(share))
        trace, fourth = jnp.sum(values), jnp.mean(jnp.sum(rows**2, axis=1) ** 2)
        probed = 2 * trace / ((1 - share) * jnp.sum(values**2) + share * fourth)
        growth = jax.vmap(lambda factor: _growth(rows, factor * largest, share, linear.steps))
        below, above = growth(jnp.array([0.98, 1.02]))
        return below, above, jnp.stack([largest, probed, 2 / (share * trace)])

    over_batches = jax.vmap(one, (None, 0))
    found = jax.jit(jax.vmap(over_batches, (0, None)))(jnp.asarray(linear.rows), 1 / jnp.asarray(BATCHES, float))
    below, above, bounds = (np.asarray(part) for part in found)
    return {"below": below.ravel().tolist(), "above": above.ravel().tolist(), "bounds": bounds.reshape(-1, 3).tolist()}


def _sharp(measured: Mapping[str, Any]) -> list[Check]:
    largest, probed, trace = np.asarray(measured["bounds"]).T
    return [
        Check("growth of E‖d‖² at 0.98 of the largest stable step", max(measured["below"]), "<=", 1.0),
        Check("growth of E‖d‖² at 1.02 of it", min(measured["above"]), ">=", 1.0),
        Check(
            "largest stable step over the step of the condition at S = I", float(np.max(largest / probed)), "<=", 1.0
        ),
        Check("which over that of the trace", float(np.max(probed / trace)), "<=", 1.0),
    ]


OPERATOR = Claim(
    name="largest-stable-step",
    statement="SGD on a linear model is stable in the mean square exactly up to the step at which ρ(T) = 1; the "
    "condition at S = I and that of the trace are necessary, the second the weaker.",
    refuted_by="E‖d‖², moved exactly, that grows at 0.98 of that step or falls at 1.02; or a condition that refuses "
    "a stable step.",
    kind="bound",
    source="Linear stability, and the necessary conditions",
    tolerance="1: exact statements of linear algebra. 2 % around the step leave the growth rate 2000 steps to settle.",
    seeds={Scale.SMOKE: 3, Scale.SMALL: 20, Scale.FULL: 100},
    build=_linear,
    measure=functools.partial(_steps, noise=True),
    judge=_sharp,
    control="the largest step of gradient descent, without the noise of the batch",
    measure_control=functools.partial(_steps, noise=False),
)


CLAIMS = (TRACE, OPERATOR)
