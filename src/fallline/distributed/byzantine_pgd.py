"""ByzantinePGD: gradient descent on robust aggregates that leaves saddles, and the minima that attackers fake there.

Near a saddle a few Byzantine workers can turn the aggregate ĝ, however robust, back to it: a fake local minimum, as
wide as what they shift ĝ by over the curvature. Perturbations that are larger than that leave it, and whether one did
is seen from how far the iterates moved, as no value can be trusted.

    main loop:   ĝ = GradAGG(w);  if ‖ĝ‖ > ε:  w ← w − η ĝ;   else Escape(w)
    Escape(w):   Q times:  v_0 = w + u,  u ~ U(B(r));  for t = 0 … T_th:
                     if ‖v_t − v_0‖ ≥ R:  w ← v_t, and on with the main loop;   v_{t+1} = v_t − η GradAGG(v_t)
                 return w

| paper     | here                 |
|-----------|----------------------|
| η         | `step_size`          |
| ε         | `gradient_threshold` |
| r         | `radius`             |
| R         | `distance`           |
| T_th      | `patience`           |
| Q         | `attempts`           |
| GradAGG   | `aggregator`         |
| Δ         | `inexactness`        |
| L_F, ρ_F  | `smoothness`, `hessian_lipschitz` |

Source: D. Yin, Y. Chen, K. Ramchandran and P. Bartlett, *Defending Against Saddle Point Attack in Byzantine-Robust
Distributed Learning*, ICML 2019 (arXiv 1806.05358), Algorithm 1 and its subroutine Escape, Theorem 3.

Guarantee: where ‖ĝ(w) − ∇F(w)‖ ≤ Δ for all w, with `theory_parameters`, with probability at least 1 − δ a point with
‖∇F‖ ≤ 4Δ and λ_min ≥ −1900 (√ρ_F + L_F) Δ^{2/5} d^{1/5} log(10/Δ), within 2 (F_0 − F*) L_F Q / (3Δ²) rounds.

Departures: the round in which Escape sees that it has moved is the main loop's first one there, where the paper asks
again. Iterative filtering has the spectral form with weights. The constants of the theorem are given as recalled; the
bounds 4Δ and 2 (F_0 − F*) L_F / (3Δ²) follow from ε = 3Δ and η = 1/L_F in a line each.

Use it where workers may lie and the objective has saddles; without liars it is perturbed gradient descent with a test
of movement. The theorem's numbers are for proofs. In practice: ε two to three times the error of ĝ; r such that
`ball_marginal(r, h/κ, d)`, the probability that one perturbation clears a fake minimum of half width h/κ, is not small
against 1/Q; R above r, since the stable coordinates come back by up to r, and below the distance to the minimum.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..core import trees
from ..core.calls import Calls, strong
from ..core.errors import InputError, check_count, check_nonnegative, check_positive
from ..core.problem import Problem
from ..core.solver import Solver, State
from ..core.stopping import StoppingRule
from ..parts.codecs import Plain
from ..parts.control import in_place
from ..parts.sampling import uniform_ball
from .aggregators import Aggregator
from .round import Round, RoundState
from .rules import Adopt, Gradient

__all__ = ["ball_marginal", "byzantine_pgd", "theory_parameters"]


class EscapeState(State):
    """Where a run stands: in the main loop where `attempt` is 0, else in that attempt of Escape."""

    round: RoundState  # its x is the aggregate at the point that the step began from
    aggregate_norm: Float[Array, ""]
    candidate: PyTree  # w of Escape(w)
    anchor: PyTree  # v_0
    attempt: Int[Array, ""]
    age: Int[Array, ""]  # t of v_t
    done: Bool[Array, ""]

    @property
    def batch_value(self) -> Float[Array, ""]:
        """What the workers' own values were in the last round."""
        return self.round.batch_value


class ByzantinePGD(Solver):
    """See the module's docstring for the algorithm and the names.

    `round` is one of which the aggregate is the next model, so that its step is GradAGG.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"workers"})
    random: ClassVar[bool] = True

    round: Round
    step_size: Any
    gradient_threshold: Any
    radius: Any
    distance: Any
    patience: Any
    attempts: Any

    def stopping(self) -> StoppingRule | None:
        return None  # a small gradient is where the work begins; the method has a test of its own

    def check(self, problem: Problem, x: PyTree) -> None:
        self.round.check(problem, x)

    def cause(self, problem: Problem, state: EscapeState, *, key: Array | None) -> str:
        return self.round.cause(problem, dataclasses.replace(state.round, x=state.x), key=_keys(key)[0])

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> EscapeState:
        none = strong(Calls())
        begun = dataclasses.replace(self.round.init(problem, x, key=key), calls=none)
        return EscapeState(
            x=x,
            calls=none,
            round=begun,
            aggregate_norm=jnp.zeros((), trees.real_dtype(x)),
            candidate=trees.copy_tree(x),
            anchor=trees.copy_tree(x),
            attempt=jnp.int32(0),
            age=jnp.int32(0),
            done=jnp.bool_(False),
        )

    def step(self, problem: Problem, state: EscapeState, *, key: Array | None) -> EscapeState:
        ask, draw = _keys(key)
        asked = self.round.step(problem, dataclasses.replace(state.round, x=state.x), key=ask)
        norm = trees.norm(asked.x)
        moved = trees.norm(jax.tree.map(jnp.subtract, state.x, state.anchor)) >= self.distance
        escaping = (state.attempt > 0) & ~moved
        enter = ~escaping & (norm <= self.gradient_threshold)
        over = escaping & (state.age >= self.patience)
        futile = over & (state.attempt >= self.attempts)
        perturb = enter | (over & ~futile)
        state = dataclasses.replace(
            state,
            round=asked,
            calls=asked.calls,
            aggregate_norm=norm,
            attempt=jnp.where(escaping, state.attempt + perturb, enter.astype(jnp.int32)),
            age=state.age + 1,
            done=futile,
        )
        state = in_place(enter, lambda state: dataclasses.replace(state, candidate=state.x), state)
        state = in_place(perturb, lambda state: self._perturb(state, draw), state)
        state = in_place(~perturb & ~futile, self._descend, state)
        return in_place(futile, lambda state: dataclasses.replace(state, x=state.candidate), state)

    def _descend(self, state: EscapeState) -> EscapeState:
        x = jax.tree.map(lambda a, g: (a - self.step_size * g).astype(a.dtype), state.x, state.round.x)
        return dataclasses.replace(state, x=x)

    def _perturb(self, state: EscapeState, key: Any) -> EscapeState:
        x = jax.tree.map(jnp.add, state.candidate, uniform_ball(key, state.x, self.radius))
        return dataclasses.replace(state, x=x, anchor=x, age=jnp.int32(0))


def _keys(key: Any) -> Any:
    """A key for the round, and one for the perturbation."""
    return jax.random.split(key)


def byzantine_pgd(
    step_size: float,
    aggregator: Aggregator,
    *,
    gradient_threshold: float,
    radius: float,
    distance: float,
    patience: int = 50,
    attempts: int = 10,
    **options: Any,
) -> ByzantinePGD:
    """ByzantinePGD (Yin et al. 2019, Algorithm 1), a solver of `Sharded` problems; needs a random key.

    **Arguments:**
    - `step_size`: η, at most 1/L for an L-smooth objective.
    - `aggregator`: GradAGG: the paper's are `Median()`, `TrimmedMean(cut)` and `IterativeFiltering(threshold)`.
    - `gradient_threshold`: ε, the norm of the aggregate below which the point is perturbed.
    - `radius`: r, of the ball of perturbations; `ball_marginal` says what it is good for.
    - `distance`: R, from the perturbed point, at which a fake minimum counts as left.
    - `patience`: T_th, the steps within which that must happen.
    - `attempts`: Q, perturbations of one point before it is returned.
    - `options`: channel, attack, blocks and exchange, as for `Round`.

    `theory_parameters` gives the theorem's numbers. The run ends by the method's own test, at the point before the
    last perturbations.

    **Raises:** `InputError` for numbers that are not positive, workers that read late (`reads`), and as `Round` does.
    """
    numbers = {
        "step_size": step_size,
        "gradient_threshold": gradient_threshold,
        "radius": radius,
        "distance": distance,
    }
    for name, number in numbers.items():
        check_positive(name, number)
    check_count("patience", patience, 1)
    check_count("attempts", attempts, 1)
    if options.get("reads") is not None:
        raise InputError("reads", options["reads"], "nothing: what is aggregated must be asked at one point")
    one = Round(Gradient(), Plain(), aggregator, None, Adopt(), label="GradAGG", **options)
    return ByzantinePGD(one, step_size, gradient_threshold, radius, distance, patience, attempts)


def theory_parameters(
    *,
    smoothness: float,
    hessian_lipschitz: float,
    inexactness: float,
    dimension: int,
    gap: float,
    failure_probability: float = 0.1,
) -> dict[str, Any]:
    """The theorem's parameters, as keyword arguments of `byzantine_pgd`.

    **Arguments:** `smoothness` L_F and `hessian_lipschitz` ρ_F of the objective; `inexactness` Δ ≤ 1, the error of
    the aggregates; `dimension` d; `gap` ≥ F(x0) − min F; `failure_probability` δ.

    **Raises:** `InputError` for numbers that are not positive, and for those beyond these limits.

    **Source:** Yin et al. (2019), Theorem 3.
    """
    numbers = {
        "smoothness": smoothness,
        "hessian_lipschitz": hessian_lipschitz,
        "inexactness": inexactness,
        "gap": gap,
        "failure_probability": failure_probability,
    }
    for name, number in numbers.items():
        check_positive(name, number)
    check_count("dimension", dimension, 1)
    for name in ("inexactness", "failure_probability"):
        if numbers[name] > 1:
            raise InputError(name, numbers[name], "at most 1")
    root, delta = math.sqrt(hessian_lipschitz), inexactness
    scale = delta**0.4 * dimension**0.2  # Δ^{2/5} d^{1/5}
    lost = 48 * smoothness * failure_probability * (scale**3 + delta**1.4 * dimension**0.7)
    return {
        "step_size": 1 / smoothness,
        "gradient_threshold": 3 * delta,
        "radius": 4 * delta**0.6 * dimension**0.3 / root,
        "distance": scale / root,
        "patience": max(1, math.ceil(smoothness / (384 * (root + smoothness) * scale))),
        "attempts": max(1, math.ceil(2 * math.log(hessian_lipschitz * gap / lost))),
    }


def ball_marginal(radius: float, height: float, dimension: int) -> float:
    """The probability that a coordinate of a uniform point in the ball is larger in size than `height`.

    P(|u_1| > h) = I_{1 − (h/r)²}((d + 1)/2, 1/2), the regularized incomplete beta function. With it, Q perturbations
    clear a fake minimum of half width h with probability 1 − (1 − P)^Q.

    **Raises:** `InputError` for a radius that is not positive, a negative height, or a dimension below 1.
    """
    check_positive("radius", radius)
    check_nonnegative("height", height)
    check_count("dimension", dimension, 1)
    from scipy.special import betainc  # not every import of fallline should pay for it

    return float(betainc((dimension + 1) / 2, 0.5, max(0.0, 1 - (height / radius) ** 2)))
