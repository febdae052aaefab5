"""Target-based surrogates: several steps of the model for each gradient in the space of its targets.

Solves min h(θ) = (1/n) Σᵢ ℓ(f(θ)ᵢ, yᵢ) where the model f(θ), the targets of n examples, is cheap and ∇ℓ is
dear (a simulator, a labelling). One gradient G at z_t makes a surrogate that depends on f alone; m steps of
an inner optimizer from θ_t minimize it. Over the b examples of a batch (all n of them, or a minibatch: SSO):

    z_t = f(θ_t),   G_t = ∇_z Σᵢ ℓ(zᵢ, yᵢ) at z_t
    q_t(θ) = (1/b) [ Σᵢ ℓ(z_tᵢ, yᵢ) + ⟨G_t, f(θ) − z_t⟩ + ‖f(θ) − z_t‖² / (2 η_t) ]
    θ_{t+1} ≈ argmin q_t,   which projects z_t − η_t G_t on {f(θ)}

    η_t = η,   η/√t   or   η T^{−t/T}

| paper       | here                                            |
|-------------|-------------------------------------------------|
| f, ℓ        | `TargetLoss(model, loss, …)`                    |
| η, T        | `eta`, `horizon`                                |
| m           | `inner_steps`                                   |
| q_t         | `Surrogate`, without its constant h(θ_t)        |
| G_t, z_t    | the oracles `target_gradient` and `targets`     |

Source: J. W. Lavington, S. Vaswani, R. Babanezhad, M. Schmidt and N. Le Roux, *Target-based Surrogates for
Stochastic Optimization*, ICML 2023 (arXiv 2302.02607), the deterministic surrogate and SSO; the line search
and its numbers after the authors' code.

Guarantee: where ℓ is L-smooth in each example's targets and η ≤ 1/L, q_t ≥ h over the whole batch, with the
same value and gradient at θ_t: h never rises if the inner steps do not raise q_t, and the gradient's square falls
like 1/T. For convex ℓ, SSO is projected SGD in target space, up to a ball of the noise there that the falling η_t
remove. L is 1 for ½(z − y)², 1/4 for the logistic loss, 1/2 for softmax cross-entropy.

Departures: the Euclidean surrogate alone, not the adaptive, Newton and mirror ones. Minibatches are drawn
with replacement. The inner optimizer starts anew at each surrogate. η is as above; the authors' code minimizes
the mean of η J·f + (f − z_t)² with J the gradient of the mean loss, which is our η at 2b times the size.

Accounts: `target_gradients` in the state counts ∇ℓ: one a step, and over the whole batch one more at the start.
`calls` counts passes through f, so a step with m inner ones asks m: a `gradient` is forward and back, a `value`
forward alone (a trial of a line search); on minibatches either is a `minibatch`. What the loop asks to record
the loss of a random problem is in `calls`, not in `target_gradients`.

Use it where ∇ℓ costs more than m passes of f, or where f is ill-conditioned: the inner steps see it, ∇ℓ does not. With
m = 1 and a fixed inner step it is SGD, whatever η.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.calls import Calls, strong
from ..core.errors import InputError, check_choice, check_count, check_fraction, check_nonnegative, check_positive
from ..core.optimizer import Optimizer, optimizer
from ..core.problem import FiniteSum, Problem
from ..core.solver import GRADIENT, MINIBATCH, Solver, State
from ..parts.control import in_place

__all__ = ["Surrogate", "TargetLoss", "armijo", "target_surrogate"]

SCHEDULES = ("constant", "inverse_sqrt", "exponential")
_EXPAND = 1.8  # of the line search's step in an epoch
_TRIALS = 100


class TargetLoss(FiniteSum):
    """The mean over examples of a loss of the targets that a model gives them.

    **Arguments:**
    - `model`: `model(x, inputs) -> targets`, a real array with a row for each example, cheap to evaluate.
    - `loss`: `loss(targets, labels) -> losses` of shape `(rows,)`, each of its own row.
    - `data`: `(inputs, labels)`, two pytrees of arrays that share their leading axis.
    - `batch_size`: as for `FiniteSum`.
    - `lower_bound`: as for `Objective`.

    `x` is any pytree of arrays; of an Equinox model they are the first part of `eqx.partition(net, eqx.is_array)`.

    **Raises:** `InputError` for arguments of another kind; when it is asked, where the targets or the losses do not
    have one row for each example.
    """

    oracles: ClassVar[frozenset[str]] = FiniteSum.oracles | {"targets", "target_gradient"}

    model: Callable[..., Any] = eqx.field(static=True, default=None)  # type: ignore[assignment]

    def __init__(
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any],
        data: tuple[PyTree, PyTree],
        batch_size: int | None = None,
        *,
        lower_bound: float | None = None,
    ):
        if not callable(model):
            raise InputError("model", type(model).__name__, "a callable model(x, inputs) -> targets")
        if not callable(loss):
            raise InputError("loss", type(loss).__name__, "a callable loss(targets, labels) -> per-example losses")
        if not (isinstance(data, tuple) and len(data) == 2):
            raise InputError("data", type(data).__name__, "a pair (inputs, labels)")
        super().__init__(loss, data, batch_size, lower_bound=lower_bound)
        self.model = model

    def targets(self, x: PyTree, inputs: PyTree) -> Float[Array, "rows ..."]:
        """f(x) on the given rows: one pass through the model."""
        targets, rows = self.model(x, inputs), _rows(inputs)
        if not trees.is_floating(targets) or jnp.iscomplexobj(targets) or jnp.shape(targets)[:1] != (rows,):
            raise InputError("model", f"{_described(targets)} from {rows} rows", "one real array with a row for each")
        return targets

    def target_losses(self, targets: Float[Array, "rows ..."], labels: PyTree) -> Float[Array, " rows"]:
        """Per-example losses at the given targets."""
        losses, rows = self.loss(targets, labels), len(targets)
        if not trees.is_floating(losses) or jnp.shape(losses) != (rows,):
            raise InputError("loss", f"{_described(losses)} from {rows} rows", f"one real loss for each: float[{rows}]")
        return losses

    def target_gradient(
        self, targets: Float[Array, "rows ..."], labels: PyTree
    ) -> tuple[Float[Array, " rows"], Float[Array, "rows ..."]]:
        """Per-example losses, and the gradient of their sum in the targets."""
        losses, back = jax.vjp(lambda targets: self.target_losses(targets, labels), targets)
        return losses, back(jnp.ones_like(losses))[0]

    def losses(self, x: PyTree, batch: PyTree) -> Float[Array, " rows"]:
        inputs, labels = batch
        return self.target_losses(self.targets(x, inputs), labels)

    @property
    def label(self) -> str:
        return f"TargetLoss({getattr(self.loss, '__name__', type(self.loss).__name__)})"


def _rows(batch: PyTree) -> int:
    return np.shape(jax.tree.leaves(batch)[0])[0]


def _described(out: Any) -> str:
    return ", ".join(map(trees.describe, jax.tree.leaves(out))) or "nothing"


class Pass(NamedTuple):
    """Of a point and a batch: its targets, the loss's gradient there, and the objective's gradient in the point."""

    targets: Float[Array, "rows ..."]
    target_gradient: Float[Array, "rows ..."]
    gradient: PyTree


def look(problem: Any, x: PyTree, batch: PyTree) -> tuple[Float[Array, ""], Pass]:
    """The mean loss, and what a surrogate at `x` needs: one pass through f, forward and back, and one G."""
    inputs, labels = batch
    targets, back = jax.vjp(lambda x: problem.targets(x, inputs), x)
    losses, target_gradient = problem.target_gradient(targets, labels)
    gradient = back((target_gradient / len(losses)).astype(targets.dtype))[0]
    gradient = jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient)
    return jnp.mean(losses.astype(trees.real_dtype(x))), Pass(targets, target_gradient, gradient)


class Surrogate(Problem):
    """q_t − h(θ_t) on the batch whose `inputs` are given, with `seen` of θ_t."""

    problem: Any
    inputs: PyTree
    seen: Pass
    eta: Float[Array, ""]

    def value(self, x: PyTree) -> Float[Array, ""]:
        wide = trees.real_dtype(x)
        change = (self.problem.targets(x, self.inputs) - self.seen.targets).astype(wide)
        linear = jnp.sum(self.seen.target_gradient.astype(wide) * change)
        return (linear + jnp.sum(change**2) / (2 * self.eta)) / len(change)


class TargetState(State):
    """`value`, `gradient_norm` and `seen` are of `x` and all examples; None where the problem is random."""

    steps: Int[Array, ""]
    target_gradients: Int[Array, ""]
    value: Float[Array, ""] | None
    gradient_norm: Float[Array, ""] | None
    seen: Pass | None
    batch_value: Float[Array, ""] | None


class TargetSurrogate(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"targets", "target_gradient"})

    eta: Any
    inner_steps: Any
    horizon: Any
    tolerance: Any
    inner: Optimizer | None
    schedule: str = eqx.field(static=True)

    def init(self, problem: Any, x: PyTree, *, key: Array | None) -> TargetState:
        none = jnp.int32(0)
        if problem.random:
            return TargetState(x, strong(Calls()), none, none, None, None, None, jnp.zeros((), trees.real_dtype(x)))
        value, seen = look(problem, x, problem.data)
        return TargetState(x, strong(GRADIENT), none, none + 1, value, trees.norm(seen.gradient), seen, None)

    def step(self, problem: Any, state: TargetState, *, key: Array | None) -> TargetState:
        t, asked = state.steps + 1, state.target_gradients + 1
        if state.seen is None:
            batch = problem.sample(key)
            value, seen = look(problem, state.x, batch)
            x, used = self._minimize(problem, batch[0], seen, state.x, t)
            calls = state.calls + MINIBATCH + Calls(minibatch=used.gradient + used.value)
            return TargetState(x, calls, t, asked, None, None, None, value)
        x, used = self._minimize(problem, problem.data[0], state.seen, state.x, t)
        value, seen = look(problem, x, problem.data)
        calls = state.calls + used + GRADIENT
        return TargetState(x, calls, t, asked, value, trees.norm(seen.gradient), seen, None)

    def _minimize(self, problem: Any, inputs: PyTree, seen: Pass, x: PyTree, t: Array) -> tuple[PyTree, Calls]:
        """The inner steps on the surrogate from `x`, whose gradient is known, and the passes that they asked."""
        dtype = trees.real_dtype(x)
        surrogate = Surrogate(problem, inputs, seen, self._eta(t).astype(dtype))
        inner = self.inner or armijo(expand=_EXPAND ** (_rows(inputs) / problem.size))

        def move(at: tuple[PyTree, Any, Calls], value: Array, gradient: PyTree) -> tuple[PyTree, Any, Calls]:
            x, memory, used = at
            x, memory, more = inner.move(surrogate.value, x, value, gradient, memory)
            return trees.cast_like((x, memory, strong(used + more)), at)

        def step(carry: Any) -> Any:
            i, (x, memory, used) = carry
            value, gradient = surrogate.value_and_gradient(x)
            on = trees.norm(gradient) > self.tolerance
            at = in_place(on, lambda at: move(at, value, gradient), (x, memory, strong(used + GRADIENT)))
            return jnp.where(on, i + 1, self.inner_steps), at

        memory = jax.tree.map(lambda a: jax.lax.convert_element_type(a, jnp.asarray(a).dtype), inner.begin(x))
        first = move((x, memory, strong(Calls())), jnp.zeros((), dtype), seen.gradient)
        carry = jax.lax.while_loop(lambda carry: carry[0] < self.inner_steps, step, (jnp.int32(1), first))
        return carry[1][0], carry[1][2]

    def _eta(self, t: Int[Array, ""]) -> Float[Array, ""]:
        """The step size in target space at the step t = 1, 2, …"""
        if self.schedule == "inverse_sqrt":
            return jnp.asarray(self.eta / jnp.sqrt(t))
        if self.schedule == "exponential":
            return jnp.asarray(self.eta * self.horizon ** (-t / self.horizon))
        return jnp.asarray(self.eta)


def backtracking_descent(
    step_size: float, c: float, decrease: float, expand: float
) -> optax.GradientTransformationExtraArgs:
    """The Optax transformation of `armijo`."""
    return optax.chain(
        optax.scale(-step_size),
        optax.scale_by_backtracking_linesearch(
            _TRIALS - 1, slope_rtol=c, decrease_factor=decrease, increase_factor=expand, max_learning_rate=jnp.inf
        ),
    )  # type: ignore[return-value]  # a chain takes extra arguments where a link does


def armijo(step_size: float = 10.0, *, c: float = 0.5, decrease: float = 0.9, expand: float = _EXPAND) -> Optimizer:
    """Gradient descent with Armijo backtracking, as the authors of target-based surrogates have it.

    Each step first tries `expand` times the last step size, `step_size` before the first one, and shrinks it by
    `decrease` until f(x − s∇f) ≤ f(x) − c s‖∇f‖²; after 100 trials it takes the last one.

    **Arguments:** `step_size` above 0; `c` and `decrease` between 0 and 1; `expand` above 1.

    **Raises:** `InputError` for numbers out of range.
    """
    check_positive("step_size", step_size)
    for name, number in (("c", c), ("decrease", decrease)):
        check_positive(name, number)
        check_fraction(name, number)
    check_positive("expand", expand)
    if expand <= 1:
        raise InputError("expand", expand, "a number above 1")
    return optimizer(backtracking_descent, step_size=step_size, c=c, decrease=decrease, expand=expand)


def target_surrogate(
    eta: float,
    *,
    inner_steps: int = 20,
    inner: Optimizer | None = None,
    schedule: str = "constant",
    horizon: int | None = None,
    tolerance: float = 1e-6,
) -> TargetSurrogate:
    """Target-based surrogates (Lavington et al. 2023) for a `TargetLoss`; SSO where that draws minibatches.

    **Arguments:**
    - `eta`: η, at most 1/L for a loss that is L-smooth in the targets of each example.
    - `inner_steps`: m, the most inner steps on a surrogate; the authors' experiments have 1 to 100.
    - `inner`: `optimizer(…)` of any Optax factory, or `armijo(…)`; by default `armijo` with the authors'
      numbers, expanding by 1.8 in an epoch. It starts anew at each surrogate.
    - `schedule`: of η: `"constant"`, `"inverse_sqrt"` (η/√t) or `"exponential"` (η T^{−t/T}).
    - `horizon`: T, the number of steps, for the exponential schedule.
    - `tolerance`: no further inner step where the surrogate's gradient norm is at most this.

    **Raises:** `InputError` for numbers out of range, and for an inner solver of another kind.
    """
    check_positive("eta", eta)
    check_count("inner_steps", inner_steps, 1)
    check_nonnegative("tolerance", tolerance)
    check_choice("schedule", schedule, SCHEDULES)
    if inner is not None and not isinstance(inner, Optimizer):
        raise InputError("inner", type(inner).__name__, "optimizer(…) of an Optax factory, or armijo(…)")
    if schedule == "exponential":
        if horizon is None:
            raise InputError("horizon", None, "the number of steps T, for the exponential schedule")
        check_count("horizon", horizon, 1)
    elif horizon is not None:
        raise InputError("horizon", horizon, f"None with the schedule '{schedule}', which has no end")
    return TargetSurrogate(eta, inner_steps, horizon, tolerance, inner, schedule)
