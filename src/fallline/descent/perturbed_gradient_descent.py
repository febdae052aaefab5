"""Perturbed gradient descent: gradient descent that leaves strict saddles.

Solves min f(x) for f smooth with a Lipschitz Hessian. At a point with a small gradient it adds one
uniform perturbation; if that bought no decrease within a fixed number of steps, the point before the
perturbation is second-order stationary with high probability, and is returned.

    if ‖∇f(x_t)‖ ≤ g_thres and t − t_noise > t_thres:   x̃ ← x_t, t_noise ← t, x_t ← x̃ + ξ,  ξ ~ U(B(r))
    if t − t_noise = t_thres and f(x_t) − f(x̃) > −f_thres:   return x̃
    x_{t+1} ← x_t − η ∇f(x_t)

| paper   | here                 |
|---------|----------------------|
| η       | `step_size`          |
| r       | `radius`             |
| g_thres | `gradient_threshold` |
| f_thres | `decrease_threshold` |
| t_thres | `patience`           |
| ℓ, ρ    | `smoothness`, `hessian_lipschitz` |

Source: C. Jin, R. Ge, P. Netrapalli, S. M. Kakade and M. I. Jordan, *How to Escape Saddle Points
Efficiently*, ICML 2017 (arXiv 1703.00887), Algorithm 2.

Guarantee: with `theory_parameters`, an ε-second-order stationary point (‖∇f‖ ≤ ε,
λ_min ≥ −√(ρε)) with probability at least 1 − δ in O(ℓ Δ_f / ε² · log⁴(dℓΔ_f / (ε²δ))) steps.

Departures: none in the iterates. The value comes with the gradient of the same point, so that no
separate value is asked at perturbations; a step that perturbs asks for two gradients.

Use it where saddles are strict and a plain gradient step is what you can afford; `fallline.certify`
and `fallline.escape` do with a few Hessian products what the perturbation does by waiting. In
float32 a `decrease_threshold` below 1e-7 · |f| is under the resolution of the values compared.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..core import trees
from ..core.errors import InputError, check_count, check_positive
from ..core.problem import Problem
from ..core.solver import GRADIENT, Solver, State
from ..core.stopping import StoppingRule
from ..parts.control import in_place
from ..parts.sampling import uniform_ball

__all__ = ["perturbed_gradient_descent", "theory_parameters"]


class PerturbedState(State):
    """Scalars are of `x` unless the name says `before`: the point before the last perturbation."""

    gradient: PyTree
    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    before: PyTree
    value_before: Float[Array, ""]
    gradient_norm_before: Float[Array, ""]
    since_noise: Int[Array, ""]
    perturbations: Int[Array, ""]
    done: Bool[Array, ""]


class PerturbedGradientDescent(Solver):
    """See the module's docstring for the algorithm and the names."""

    random: ClassVar[bool] = True

    step_size: Any
    radius: Any
    gradient_threshold: Any
    decrease_threshold: Any
    patience: Any

    def stopping(self) -> StoppingRule | None:
        return None  # a small gradient is where the work begins; the method has a test of its own

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> PerturbedState:
        here = _look(problem, x)
        return PerturbedState(
            **here,
            calls=GRADIENT,
            before=trees.copy_tree(x),
            value_before=here["value"],
            gradient_norm_before=here["gradient_norm"],
            since_noise=jnp.asarray(self.patience + 1, jnp.int32),
            perturbations=jnp.int32(0),
            done=jnp.bool_(False),
        )

    def step(self, problem: Problem, state: PerturbedState, *, key: Array | None) -> PerturbedState:
        perturb = (state.gradient_norm <= self.gradient_threshold) & (state.since_noise > self.patience)
        futile = (state.since_noise == self.patience) & (state.value - state.value_before > -self.decrease_threshold)
        state = in_place(perturb, lambda state: self._perturb(problem, state, key), state)
        state = in_place(~futile, lambda state: self._descend(problem, state), state)
        return in_place(futile, _return, state)

    def _descend(self, problem: Problem, state: PerturbedState) -> PerturbedState:
        x = jax.tree.map(lambda a, g: (a - self.step_size * g).astype(a.dtype), state.x, state.gradient)
        return dataclasses.replace(
            state, **_look(problem, x), calls=state.calls + GRADIENT, since_noise=state.since_noise + 1
        )

    def _perturb(self, problem: Problem, state: PerturbedState, key: Any) -> PerturbedState:
        x = jax.tree.map(jnp.add, state.x, uniform_ball(key, state.x, self.radius))
        return dataclasses.replace(
            state,
            **_look(problem, x),
            calls=state.calls + GRADIENT,
            before=state.x,
            value_before=state.value,
            gradient_norm_before=state.gradient_norm,
            since_noise=jnp.int32(0),
            perturbations=state.perturbations + 1,
        )


def _look(problem: Problem, x: PyTree) -> dict[str, Any]:
    """The point with its value, gradient and gradient norm: one call of the gradient oracle."""
    value, gradient = problem.value_and_gradient(x)
    value = value.astype(trees.real_dtype(x))  # decreases are compared at full width
    return {"x": x, "value": value, "gradient": gradient, "gradient_norm": trees.norm(gradient)}


def _return(state: PerturbedState) -> PerturbedState:
    """The point before the perturbation that led nowhere, with what is known of it."""
    return dataclasses.replace(
        state,
        x=state.before,
        value=state.value_before,
        gradient_norm=state.gradient_norm_before,
        done=jnp.bool_(True),
    )


def perturbed_gradient_descent(
    step_size: float,
    *,
    radius: float = 1e-2,
    gradient_threshold: float = 1e-3,
    decrease_threshold: float = 1e-6,
    patience: int = 200,
) -> PerturbedGradientDescent:
    """Perturbed gradient descent (Jin et al. 2017, Algorithm 2); needs a random key.

    **Arguments:**
    - `step_size`: η, at most 1/ℓ for an ℓ-smooth objective.
    - `radius`: r, of the ball of perturbations.
    - `gradient_threshold`: g_thres, the gradient norm below which the point is perturbed.
    - `decrease_threshold`: f_thres, the least decrease that a perturbation must buy.
    - `patience`: t_thres, the steps within which it must, and between two perturbations.

    The defaults are for objectives and points of order one; `theory_parameters` gives the paper's.
    The run ends by the method's own test, at the point before the last perturbation.

    **Raises:** `InputError` for numbers that are not positive.
    """
    check_positive("step_size", step_size)
    check_positive("radius", radius)
    check_positive("gradient_threshold", gradient_threshold)
    check_positive("decrease_threshold", decrease_threshold)
    check_count("patience", patience, 1)
    return PerturbedGradientDescent(step_size, radius, gradient_threshold, decrease_threshold, patience)


def theory_parameters(
    *,
    smoothness: float,
    hessian_lipschitz: float,
    epsilon: float,
    dimension: int,
    gap: float,
    failure_probability: float = 0.1,
    c: float = 0.5,
) -> dict[str, Any]:
    """The paper's parameters, as keyword arguments of `perturbed_gradient_descent`.

    **Arguments:** `smoothness` ℓ and `hessian_lipschitz` ρ of the objective; `epsilon` ε, the gradient
    norm asked for, at most ℓ²/ρ; `dimension` d; `gap` Δ_f ≥ f(x0) − min f; `failure_probability` δ;
    `c` ≤ c_max, the paper's absolute constant, whose value it does not give.

    **Raises:** `InputError` for numbers that are not positive, and for those beyond these limits.

    **Source:** Jin et al. (2017), Algorithm 2, initialization (χ, η, r, g_thres, f_thres, t_thres).
    """
    numbers = {
        "smoothness": smoothness,
        "hessian_lipschitz": hessian_lipschitz,
        "epsilon": epsilon,
        "gap": gap,
        "failure_probability": failure_probability,
        "c": c,
    }
    for name, number in numbers.items():
        check_positive(name, number)
    check_count("dimension", dimension, 1)
    if epsilon > (most := smoothness**2 / hessian_lipschitz):
        raise InputError("epsilon", epsilon, f"at most smoothness² / hessian_lipschitz = {most:g}")
    if failure_probability >= 1:
        raise InputError("failure_probability", failure_probability, "a number below 1")
    log = math.log(dimension * smoothness * gap / (c * epsilon**2 * failure_probability))
    chi = 3 * max(log, 4.0)
    return {
        "step_size": c / smoothness,
        "radius": math.sqrt(c) * epsilon / (chi**2 * smoothness),
        "gradient_threshold": math.sqrt(c) * epsilon / chi**2,
        "decrease_threshold": c / chi**3 * math.sqrt(epsilon**3 / hessian_lipschitz),
        "patience": math.ceil(chi * smoothness / (c**2 * math.sqrt(hessian_lipschitz * epsilon))),
    }
