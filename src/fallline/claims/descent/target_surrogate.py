"""Target-based surrogates: logistic regression on ill-conditioned columns, at equal numbers of target gradients.

The thresholds were fixed after a prototype in NumPy and before the first run of this code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ...core.loop import minimize
from ...core.optimizer import optimizer
from ...core.solver import Solver
from ...core.sweep import sweep
from ...descent.target_surrogate import TargetLoss, target_surrogate
from ..claim import Check, Claim, Scale, Track

__all__ = ["CLAIMS"]

SMOOTHNESS = 0.25  # of the logistic loss in its target
HALF_DECADES = tuple(float(10 ** (k / 2)) for k in range(-6, 7))


def _logits(weights: Float[Array, " d"], rows: Float[Array, "n d"]) -> Float[Array, " n"]:
    return rows @ weights


def _logistic(logits: Float[Array, " n"], signs: Float[Array, " n"]) -> Float[Array, " n"]:
    return jnp.logaddexp(0.0, -signs * logits)


def _cancer(batch_size: int | None = None, standardised: bool = False) -> TargetLoss:
    """The Wisconsin breast cancer data with a bias column, by its largest entries or standardised."""
    from sklearn.datasets import load_breast_cancer

    columns, labels = load_breast_cancer(return_X_y=True)
    columns = (columns - columns.mean(0)) / columns.std(0) if standardised else columns / np.abs(columns).max(0)
    rows = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    return TargetLoss(_logits, _logistic, (rows, 2.0 * labels - 1), batch_size)


def _start(problem: TargetLoss) -> Float[Array, " d"]:
    return jnp.zeros(problem.data[0].shape[1])


def _hypotheses(problem: TargetLoss) -> list[Check]:
    condition = float(np.linalg.cond(problem.data[0]))
    grid = jnp.linspace(-10.0, 10.0, 2001)
    curvature = jax.vmap(jax.grad(jax.grad(lambda z: _logistic(z, jnp.asarray(1.0)))))(grid)
    return [
        Check("smoothness of the loss in a target", float(jnp.max(curvature)), "<=", SMOOTHNESS + 1e-12),
        Check("condition number of the columns", condition, ">=", 1e3),
        Check("loss at the start, from ln 2", abs(float(problem.value(_start(problem))) - np.log(2)), "<=", 1e-12),
    ]


# ---- the whole batch ----------------------------------------------------------------------------

CALLS = 100
INNER_STEPS = (1, 5, 20, 100)


def _full_batch(scale: Scale) -> tuple[TargetLoss, list[Check]]:
    problem = _cancer()
    return problem, _hypotheses(problem)


def _descents(eta: float) -> Callable[[TargetLoss, Track], dict[str, Any]]:
    """The loss after each of 100 target gradients, for each number of inner steps; and gradient descent's."""

    def measure(problem: TargetLoss, track: Track) -> dict[str, Any]:
        def losses(solver: Solver) -> np.ndarray:
            run = minimize(problem, _start(problem), solver, steps=CALLS, stop=None, record=("value",))
            return np.asarray(run.history["value"])

        rows = problem.data[0]
        largest = SMOOTHNESS * float(np.linalg.norm(rows, 2)) ** 2 / len(rows)
        rates = (1 / largest, *HALF_DECADES)
        plain = [losses(optimizer(optax.sgd, learning_rate=rate)) for rate in rates]
        best = min(range(len(rates)), key=lambda i: plain[i][-1])
        found = [losses(target_surrogate(eta, inner_steps=m)) for m in track(INNER_STEPS, "numbers of inner steps")]
        return {
            "eta": eta,
            "losses": dict(zip(map(str, INNER_STEPS), found, strict=True)),
            "gradient descent, 1/L": plain[0],
            "gradient descent, best rate": {"rate": rates[best], "losses": plain[best]},
        }

    return measure


def _fall(measured: Mapping[str, Any]) -> list[Check]:
    losses = {m: np.asarray(values) for m, values in measured["losses"].items()}
    rises = [
        Check(f"m = {m}: largest rise of the loss in a step", float(np.max(np.diff(values))), "<=", 1e-12)
        for m, values in losses.items()
    ]
    names = list(losses)
    return rises + [
        Check(f"loss after {CALLS} calls, m = {more} over m = {m}", losses[more][-1] / losses[m][-1], "<=", 1.0)
        for m, more in zip(names, names[1:], strict=False)
    ]


def _draw_descents(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    shades = ("#9ec3e6", "#5f9bd1", "#1f5fa8", "#0c2f5c")
    for (m, losses), color in zip(measured["losses"].items(), shades, strict=True):
        axes[0].semilogy(losses, color=color, label=f"m = {m}")
    axes[0].semilogy(measured["gradient descent, best rate"]["losses"], "--", color="#999", label="gradient descent")
    axes[0].set(xlabel="target gradients", ylabel="loss")
    axes[0].legend()


FULL_BATCH = Claim(
    name="full-batch",
    statement="With η = 1/L on the whole batch the loss never rises, whatever the number m of inner steps, and for the "
    "same 100 target gradients it ends lower the more of them there are.",
    refuted_by="a step that raises the loss for some m among 1, 5, 20, 100; or a higher loss with more inner steps.",
    kind="comparison",
    source="the majorization by the deterministic surrogate; the data and the budget are the card's, not the paper's",
    tolerance="1e-12 for a rise: the rounding of a mean of 569 losses below 1; and ratios at most 1. The prototype "
    "ended at .1228, .0953, .0853, .0666 for m = 1, 5, 20, 100; gradient descent at .2552 with step 1/L, at .1015 with "
    "the best of a grid.",
    seeds=dict.fromkeys(Scale, 1),
    build=_full_batch,
    measure=_descents(1 / SMOOTHNESS),
    judge=_fall,
    control="η = 1000/L, beyond what majorizes",
    measure_control=_descents(1000 / SMOOTHNESS),
    draw=_draw_descents,
)


# ---- minibatches --------------------------------------------------------------------------------

STEPS, LARGEST = 200, 50
SEEDS = {Scale.SMOKE: 5, Scale.SMALL: 10, Scale.FULL: 100}  # the last iterate of a fast SGD varies much


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batch sizes, the numbers of inner steps to compare, the step sizes of both methods, how many seeds."""

    sizes: tuple[int, ...]
    inner_steps: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: int


def _batches(scale: Scale) -> tuple[Batches, list[Check]]:
    if scale is Scale.SMOKE:
        instance = Batches((25,), (LARGEST,), HALF_DECADES[4:11], SEEDS[scale])
    else:
        instance = Batches((25, 125), (1, 10, LARGEST), HALF_DECADES, SEEDS[scale])
    return instance, _hypotheses(_cancer())


def _scans(standardised: bool) -> Callable[[Batches, Track], dict[str, Any]]:
    """For each batch size and method the loss after 200 minibatches, by step size: mean and deviation of the seeds."""

    def measure(instance: Batches, track: Track) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        for size in track(instance.sizes, "batch sizes"):
            problem = _cancer(size, standardised)

            def scan(solver: Callable[[float], Solver], problem: TargetLoss = problem) -> dict[str, Any]:
                solvers = [solver(rate) for rate in instance.rates]
                keys = range(instance.seeds)
                runs = sweep(problem, _start(problem), solvers, keys, steps=STEPS, stop=None, every=STEPS)
                means, deviations = np.mean(np.asarray(runs.value), axis=1), np.std(np.asarray(runs.value), axis=1)
                best = int(np.nanargmin(means))
                return {
                    "loss": means[best],
                    "deviation": deviations[best],
                    "step size": instance.rates[best],
                    "step sizes": instance.rates,
                    "losses": means,
                }

            found = {"SGD": scan(lambda rate: optimizer(optax.sgd, learning_rate=rate))}
            for m in instance.inner_steps:
                found[f"SSO, m = {m}"] = scan(lambda eta, m=m: target_surrogate(eta, inner_steps=m))
            measured[str(size)] = found
        return measured

    return measure


def _beat_sgd(measured: Mapping[str, Any]) -> list[Check]:
    return [
        Check(
            f"batches of {size}: SSO with m = {LARGEST} over the best SGD",
            found[f"SSO, m = {LARGEST}"]["loss"] / found["SGD"]["loss"],
            "<=",
            0.6,
        )
        for size, found in measured.items()
    ]


def _draw_scans(measured: Mapping[str, Any], axes: Sequence[Any]) -> None:
    shades = ("#9ec3e6", "#5f9bd1", "#1f5fa8")
    for axis, (size, found) in zip(axes, measured.items(), strict=False):
        for (name, scan), color in zip(found.items(), ("#999", *shades[1 - len(found) :]), strict=True):
            axis.loglog(scan["step sizes"], scan["losses"], "s--" if name == "SGD" else "o-", color=color, label=name)
        axis.set(title=f"batches of {size}", xlabel="η, or SGD's learning rate", ylabel=f"loss after {STEPS} calls")
        axis.set_ylim(top=2.0)
        axis.legend()


MINIBATCHES = Claim(
    name="minibatches",
    statement="On ill-conditioned columns, at 200 stochastic target gradients and the best step size of each, SSO with "
    "50 inner steps ends at a far lower loss than SGD.",
    refuted_by="a full loss above 0.6 of SGD's, for batches of 25 or of 125.",
    kind="comparison",
    source="the paper's comparison with SGD on logistic regression; the data and the budget are the card's",
    tolerance="0.6, as the card sets it. The prototype with two seeds measured .1649 (SGD) against .0581 (m = 50) for "
    "batches of 25, .0837 against .0449 for 125; the same half-decade grid for both, means over the seeds.",
    seeds=SEEDS,
    build=_batches,
    measure=_scans(standardised=False),
    judge=_beat_sgd,
    control="standardised columns: what is gained is the conditioning",
    measure_control=_scans(standardised=True),
    draw=_draw_scans,
    panels=2,
)

CLAIMS = (FULL_BATCH, MINIBATCHES)
