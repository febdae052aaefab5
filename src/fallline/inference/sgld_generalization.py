"""How far the training error of a noisy iterative algorithm can be from its population error: SGLD and SGHMC.

Gradient steps of bounded length to which Gaussian noise is added learn little of the data, so that they cannot
overfit. Per step, with F_t the mean over a batch of the gradients gᵢ clipped one by one, and ξ, ζ ~ N(0, I):

    F_t = (1/b) Σᵢ gᵢ min(1, L/‖gᵢ‖)
    SGLD:   W_t = W_{t−1} − η_t F_t + σ_t ξ_t,   σ_t² = 2 η_t T
    SGHMC:  V_t = (1 − α) V_{t−1} − η_t F_t + σ_t ξ_t,   W_t = W_{t−1} + V_t + σ_t ζ_t,   σ_t² = 2 α η_t T

    I(S; W) ≤ Σ_t (d/2) log(1 + η_t² L² / (d σ_t²)) ≤ Σ_t η_t² L² / (2 σ_t²)
    |E[population risk − empirical risk]| ≤ √(2 R² I(S; W) / n)

`sgld` and `sghmc` are Optax transformations that keep both sums in their state; `sgld_generalization` gives the
bound along a run that is only planned.

| paper       | here                                             |
|-------------|--------------------------------------------------|
| η_t, L      | `learning_rate`, `clip`                          |
| σ_t         | `noise`, or √(2 η_t T) from the `temperature` T  |
| n, d, R     | `examples`, `dimension`, `sub_gaussian`          |
| I(S; W)     | `information` (with the logarithm), `linear`     |

Source: A. Pensia, V. Jog and P.-L. Loh, *Generalization Error Bounds for Noisy, Iterative Algorithms*, ISIT 2018
(arXiv 1801.04295): the mutual-information bound of the iterates, SGLD, SGHMC; the bound by mutual information after
Xu and Raginsky (2017). Recalled and derived anew, not checked against the papers' text.

Guarantee: the last line for any output computed from the whole path, where the examples are independent, a batch
is chosen without looking at the iterates, and the loss is R-sub-Gaussian (R = 1/2 for losses in [0, 1]).

Departures: the paper's SGLD has σ_t = √η_t, which is T = 1/2. SGHMC adds its position noise to W_{t−1} + V_t,
where the paper's variants differ: given the state before, W_t − V_t then has no data in it, the velocity alone
tells of them, and a step counts as one of SGLD with its η_t and σ_t. The logarithms for SGHMC are ours.

Temperature: the stationary density is ∝ exp(−U/T) as η → 0, with U the *mean* loss whose gradient is clipped; the
Bayesian posterior of n examples has T = 1/n. Noise that makes the bound say something is far from that: a useful
fit on little data mostly comes with a vacuous bound, which is flagged, not hidden. Use it where each step's
influence must be bounded, as in private learning. The bound is on the mean over runs, not on yours. What is
trained without this noise on the same data (masked parameters, batch statistics) is not in the account.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..core import trees
from ..core.errors import InputError, check_count, check_fraction, check_positive, is_traced
from ..core.extra import require
from ..parts.sampling import key_of

__all__ = [
    "Account",
    "GeneralizationBound",
    "RunningBound",
    "SamplerState",
    "examples_needed",
    "running_bound",
    "sghmc",
    "sgld",
    "sgld_generalization",
]


class Account(NamedTuple):
    """The two sums over the steps so far, in nats, what was rounded off in adding to them, and d."""

    information: Float[Array, ""]
    linear: Float[Array, ""]
    rounded_off: Float[Array, " sums"]
    dimension: Float[Array, ""]


class SamplerState(NamedTuple):
    """Steps so far, the key of the next one, the account; the velocity, in at least float32, where there is one."""

    count: Int[Array, ""]  # type: ignore[assignment]  # the name that Optax's tools look for
    key: Array
    account: Account
    velocity: Any


# ---- the transformations ---------------------------------------------------------------------------


def sgld(
    learning_rate: optax.ScalarOrSchedule,
    clip: float,
    *,
    temperature: float | None = None,
    noise: optax.ScalarOrSchedule | None = None,
    seed: int | Array,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient Langevin dynamics with clipped examples; its state holds the account of the bound.

    `update` asks for the extra argument `per_example_gradients`: like the parameters, with a leading axis of
    examples. The gradient that it is given has no part in the step (but NaN stay), so that this is the first link
    of a chain, and decay is a link after it. `optax.MultiSteps` hands on the examples of its last small batch only.

    **Arguments:**
    - `learning_rate`: η, a number or a schedule; the noise is added after it has been multiplied in.
    - `clip`: L, the largest norm of an example's gradient, over all parameters.
    - `temperature`: T, for noise of variance 2ηT in each coordinate; 1/2, the paper's σ = √η, where neither this
      nor `noise` is given.
    - `noise`: instead, the standard deviation σ of the noise, a number or a schedule.
    - `seed`: of the noise, an integer or a key of `jax.random`. Runs of the same seed have the same noise.

    **Raises:** `InputError` for numbers that are not positive, and where both `temperature` and `noise` are given;
    in `init`, for parameters that are not real; in `update`, for gradients of examples that are missing.
    """
    return _sampler(learning_rate, clip, temperature, noise, seed, None)


def sghmc(
    learning_rate: optax.ScalarOrSchedule,
    clip: float,
    *,
    friction: float = 0.1,
    temperature: float | None = None,
    noise: optax.ScalarOrSchedule | None = None,
    seed: int | Array,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient Hamiltonian Monte Carlo with clipped examples and noise on velocity and position.

    **Arguments:** as for `sgld`; `friction` α, above 0 and at most 1: the velocity is multiplied by 1 − α. The noise
    of a temperature T has the variance 2αηT. The position's own noise is of the same level, which heats the
    position by a factor of about 1 + α².

    **Raises:** `InputError` as `sgld`, and for a friction out of range.
    """
    check_positive("friction", friction)
    if not is_traced(friction) and float(friction) > 1:
        raise InputError("friction", friction, "a number above 0 and at most 1")
    return _sampler(learning_rate, clip, temperature, noise, seed, friction)


def _sampler(
    learning_rate: Any, clip: Any, temperature: Any, noise: Any, seed: Any, friction: Any
) -> optax.GradientTransformationExtraArgs:
    """Both samplers; SGLD is the one without a friction."""
    if temperature is not None and noise is not None:
        raise InputError("noise", noise, "either a temperature or a noise level, not both")
    numbers = {"learning_rate": learning_rate, "clip": clip, "temperature": temperature, "noise": noise}
    for name, number in numbers.items():
        if number is not None and not (callable(number) and name in ("learning_rate", "noise")):
            check_positive(name, number)
    key = key_of(seed, "the noise")
    warmth = (0.5 if temperature is None else temperature) * (1.0 if friction is None else friction)
    kept = None if friction is None else 1 - friction

    def init(params: PyTree) -> SamplerState:
        account, velocity = _empty_account(params), None
        if friction is not None:
            velocity = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.promote_types(a.dtype, jnp.float32)), params)
        # A copy: a state that is donated must not take the seed with it.
        return SamplerState(jnp.zeros((), jnp.int32), jnp.copy(key), account, velocity)

    def update(
        updates: PyTree, state: Any, params: Any = None, *, per_example_gradients: Any = None, **extra_args: Any
    ) -> tuple[PyTree, SamplerState]:
        del params, extra_args
        require(updates, per_example_gradients=per_example_gradients)
        eta = _at(learning_rate, state.count)
        sigma = jnp.sqrt(2 * warmth * eta) if noise is None else jnp.asarray(_at(noise, state.count))
        key, of_gradient, of_position = jax.random.split(state.key, 3)
        mean = clipped_mean(per_example_gradients, clip)
        steps = jax.tree.map(lambda g, xi: sigma * xi - eta * g, mean, trees.normal_like(of_gradient, mean))
        velocity = None
        if kept is not None:
            velocity = jax.tree.map(lambda v, s: (kept * v + s).astype(v.dtype), state.velocity, steps)
            zeta = trees.normal_like(of_position, mean)
            steps = jax.tree.map(lambda v, zeta: v + sigma * zeta, velocity, zeta)
        account, count = _add(state.account, eta, sigma, clip), jnp.asarray(optax.safe_increment(state.count))
        return _like(steps, updates), SamplerState(count, key, account, velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def clipped_mean(per_example_gradients: PyTree, clip: Any) -> PyTree:
    """(1/b) Σᵢ gᵢ min(1, L/‖gᵢ‖), in at least float32: one pass for the norms, one for the mean.

    A norm that is not finite makes the mean NaN.
    """
    leaves = jax.tree.leaves(per_example_gradients)
    if not leaves:
        return per_example_gradients
    dtype = trees.real_dtype(per_example_gradients)
    squares = sum(jnp.sum(jnp.square(g.astype(dtype)), axis=tuple(range(1, g.ndim))) for g in leaves)
    norms = jnp.sqrt(jnp.asarray(squares))
    # Where the squares overflow, a factor of zero would hide the example.
    factors = jnp.where(jnp.isfinite(norms), clip / jnp.maximum(norms, clip), jnp.nan) / len(norms)
    return jax.tree.map(
        # A product with a vector: on CPUs far faster than a sum over the leading axis.
        lambda g: jnp.tensordot(factors.astype(dtype), g.astype(dtype), axes=1, precision="highest"),
        per_example_gradients,
    )


def _at(number: Any, count: Array) -> Any:
    return number(count) if callable(number) else number


def _like(steps: PyTree, updates: PyTree) -> PyTree:
    """The steps in the dtypes of the gradient, and NaN where that is not finite."""
    return jax.tree.map(
        lambda step, u: jnp.where(jnp.isfinite(u), step, jnp.nan).astype(jnp.result_type(u)), steps, updates
    )


# ---- the account -----------------------------------------------------------------------------------


def step_information(power: Any, dimension: Any, log1p: Callable[[Any], Any] = jnp.log1p) -> tuple[Any, Any]:
    """(d/2) log(1 + p/d) and p/2, with p = η² L² / σ²: what one step can tell of its batch, in nats.

    The capacity of d Gaussian channels whose input has the power L². SGHMC's step tells the same: of
    (V_t, W_t − V_t) only the first depends on the batch.
    """
    return dimension / 2 * log1p(power / dimension), power / 2


def _empty_account(params: PyTree) -> Account:
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError("params", trees.describe(leaf), "real floating arrays: noise is added to each coordinate")
    dtype = trees.real_dtype(params)
    # An array for each, so that the state can be donated.
    return Account(
        jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros(2, dtype), jnp.asarray(trees.flat_size(params), dtype)
    )


def _add(account: Account, eta: Any, sigma: Array, clip: Any) -> Account:
    """The account after one more step, by compensated sums: later terms are far smaller than the sums."""
    # A schedule may end at η = 0, where σ = 0 too and nothing is learned; where all is masked, d = 0.
    power = jnp.where((eta == 0) | (account.dimension == 0), 0.0, jnp.square(eta * clip / sigma))
    sums = jnp.stack([account.information, account.linear])
    terms = jnp.stack(step_information(power, jnp.maximum(account.dimension, 1))).astype(sums.dtype)
    terms = terms - account.rounded_off
    after = sums + terms
    return Account(after[0], after[1], (after - sums) - terms, account.dimension)


class RunningBound(NamedTuple):
    """The bound, and whether it says nothing: it is at least 2R, which no gap of a loss of that range exceeds."""

    bound: Float[Array, ""]
    vacuous: Bool[Array, ""]


def running_bound(state: Any, *, examples: int, sub_gaussian: float = 0.5) -> RunningBound:
    """The bound on |E[population risk − empirical risk]| after the steps that a state has seen. Traceable.

    **Arguments:**
    - `state`: of `sgld` or `sghmc`, or of a chain or other wrapper around some: their accounts are added up.
    - `examples`: n, the number of examples in the data set, not in a batch.
    - `sub_gaussian`: R, 1/2 for a loss in [0, 1], such as the 0/1 loss.

    **Raises:** `InputError` where the state holds no account, and for numbers out of range.
    """
    check_count("examples", examples, 1)
    check_positive("sub_gaussian", sub_gaussian)
    held = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Account))
    accounts = [node for node in held if isinstance(node, Account)]
    if not accounts:
        raise InputError("state", type(state).__name__, "the state of sgld, sghmc, or of a chain with one of them")
    information = sum((account.information for account in accounts[1:]), start=accounts[0].information)
    bound = jnp.sqrt(2 * information / examples) * sub_gaussian
    return RunningBound(bound, bound >= 2 * sub_gaussian)


@dataclasses.dataclass(frozen=True)
class GeneralizationBound:
    """The bound after each step t = 1 … T of a run.

    **Fields:**
    - `information`, `linear`: the two bounds on I(S; W), in nats.
    - `bound`: √(2R²/n · information), on |E[population risk − empirical risk]|; `linear_bound` the same of `linear`.
    - `vacuous`: where `bound` is at least 2R: the gap of a loss of that range never exceeds it.
    """

    information: Float[np.ndarray, " T"]
    linear: Float[np.ndarray, " T"]
    examples: int
    sub_gaussian: float

    @property
    def bound(self) -> Float[np.ndarray, " T"]:
        return self.sub_gaussian * np.sqrt(2 * self.information / self.examples)

    @property
    def linear_bound(self) -> Float[np.ndarray, " T"]:
        return self.sub_gaussian * np.sqrt(2 * self.linear / self.examples)

    @property
    def vacuous(self) -> Bool[np.ndarray, " T"]:
        return self.bound >= 2 * self.sub_gaussian

    @property
    def vacuous_from(self) -> int | None:
        """The first step after which the bound says nothing; None where it says something to the end."""
        return int(np.argmax(self.vacuous)) + 1 if self.vacuous.any() else None

    def with_probability(self, failure_probability: float) -> Float[np.ndarray, " T"]:
        """A gap that is exceeded with at most this probability δ: √(8R²/n · (I/δ + log(2/δ)))."""
        delta = _probability(failure_probability)
        return self.sub_gaussian * np.sqrt(8 / self.examples * (self.information / delta + math.log(2 / delta)))


def sgld_generalization(
    learning_rate: Any,
    noise: Any,
    *,
    clip: float,
    dimension: int,
    examples: int,
    sub_gaussian: float = 0.5,
    steps: int | None = None,
) -> GeneralizationBound:
    """The mutual-information bound along a run of SGLD, SGHMC or perturbed SGD (Pensia, Jog and Loh 2018).

    Computed on the host in float64, before or after the run: the steps' sizes are all that it depends on.

    **Arguments:**
    - `learning_rate`: η_t, a number or one for each step.
    - `noise`: σ_t, the standard deviation of the noise in each coordinate, likewise (for SGHMC, that of the velocity).
    - `clip`: L; `dimension`: d, the number of trained coordinates; `examples`: n.
    - `sub_gaussian`: R of the loss whose gap is bounded, 1/2 for the 0/1 loss.
    - `steps`: how many, where both `learning_rate` and `noise` are numbers.

    **Raises:** `InputError` for numbers out of range, and for steps that do not agree.

    **Source:** Pensia, Jog and Loh (2018), the bound for updates of norm at most η_t L with Gaussian noise.
    """
    check_positive("clip", clip)
    check_count("dimension", dimension, 1)
    check_count("examples", examples, 1)
    check_positive("sub_gaussian", sub_gaussian)
    eta, sigma = _per_step("learning_rate", learning_rate), _per_step("noise", noise)
    lengths = {a.size for a in (eta, sigma) if a.ndim}
    if steps is not None:
        check_count("steps", steps, 1)
        lengths.add(int(steps))
    if len(lengths) != 1:
        got = f"{trees.describe(eta)} and {trees.describe(sigma)} with steps={steps}"
        raise InputError("learning_rate and noise", got, "one number for each step, or numbers and `steps`")
    power = np.broadcast_to((eta * clip / sigma) ** 2, lengths.pop())
    information, linear = step_information(power, int(dimension), np.log1p)
    return GeneralizationBound(np.cumsum(information), np.cumsum(linear), int(examples), float(sub_gaussian))


def _per_step(name: str, numbers: Any) -> Float[np.ndarray, ...]:
    if callable(numbers):
        raise InputError(name, "a schedule", "its values: [schedule(t) for t in range(steps)]")
    numbers = np.asarray(numbers, np.float64)
    if numbers.ndim == 0:
        check_positive(name, float(numbers))
    elif numbers.ndim > 1 or not numbers.size or not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise InputError(name, trees.describe(numbers), "a vector of finite numbers above 0, one for each step")
    return numbers


def examples_needed(
    information: float, *, gap: float, failure_probability: float = 0.05, sub_gaussian: float = 0.5
) -> int:
    """How many examples make the gap at most `gap` with probability 1 − δ: n ≥ (8R²/a²) (I/δ + log(2/δ)).

    **Arguments:** `information` — the bound on I(S; W) in nats, at least 0.

    **Raises:** `InputError` for numbers out of range.

    **Source:** Xu and Raginsky (2017), recalled.
    """
    check_positive("gap", gap)
    check_positive("sub_gaussian", sub_gaussian)
    delta, nats = _probability(failure_probability), float(information)
    if not (nats >= 0 and math.isfinite(nats)):
        raise InputError("information", information, "a finite number of at least 0")
    return math.ceil(8 * sub_gaussian**2 / gap**2 * (nats / delta + math.log(2 / delta)))


def _probability(delta: Any) -> float:
    check_fraction("failure_probability", delta)
    check_positive("failure_probability", delta)
    return float(delta)
