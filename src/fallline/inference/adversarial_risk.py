"""Adversarial risk: bounds on a classifier's error when each input may be moved, and the loss to train them down.

A score f(x) classifies by its sign, labels are y ∈ {−1, +1}, and a loss l falls in the margin y f(x). The
supremum transform has the worst score in the ball, so that its risk is the adversarial one:

    Ψf(x, y) = −y max_{‖w‖_p ≤ ε} (−y) f(x + w),   max_w l(y f(x + w)) = l(y Ψf(x, y))
    f(x) = θᵀx + b:   Ψf(x, y) = θᵀx + b − y ε ‖θ‖_q,   1/p + 1/q = 1

For networks f = A_d s(⋯ s(A_1 x)) the tree transform Tf gives each path from the output to the input a perturbation
of its own: a unit is written out once for each use, and each copy takes its smallest or largest value as the signs
of the weights after it ask. That is interval propagation, whose first layer has the dual norm:

    [lo, hi] = s(A_1 x ∓ ε ‖rows of A_1‖_q);   lo ← s(A⁺ lo + A⁻ hi),  hi ← s(A⁺ hi + A⁻ lo)
    Tf(x, +1) = lo,  Tf(x, −1) = hi,   y Tf(x, y) ≤ y Ψf(x, y) ≤ y f(x)

| paper        | here                                                     |
|--------------|----------------------------------------------------------|
| ε, p         | `radius`, `p`                                            |
| A_k, s       | layers of `monotone_network`                             |
| Ψf, Tf       | `supremum_transform`, `tree_transform`                   |
| l            | `loss`, of the margin                                    |
| Rad_n(T F)   | `rademacher`, or from `norm_bound` for linear classifiers |

Source: J. Khim and P.-L. Loh, *Adversarial Risk Bounds via Function Transformation*, 2018 (arXiv 1810.09519). The
abstract was at hand; the definitions are recalled, the form as intervals and the constants for linear classifiers
are derived here.

Guarantee: the order in the last line, for each x and y, so that the adversarial risk of f is at most E l(y Tf);
with probability 1 − δ at most (1/n) Σ l(yᵢ Tf(xᵢ, yᵢ)) + 2 Lip(l) Rad_n(T F) + 3 √(log(2/δ) / (2n)), l in [0, 1].

Departures: biases; several losses; a certificate from examples held out, which no class of functions enters.
The paper's regularized form for linear classifiers is Lip(l) ε ‖θ‖_q added to the plain loss, an upper bound on
that of Ψf: Optax and a penalty of one's own do that.

Use `transformed_loss` to train, with ε raised from 0 over the first half of the steps, and `adversarial_risk` to
certify. Of a network trained without it Tf is far from Ψf, and the certificate says little. Rounding is not bounded.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core import trees
from ..core.errors import InputError, check_count, check_fraction, check_nonnegative, check_positive, is_traced

__all__ = [
    "AdversarialRisk",
    "MonotoneNetwork",
    "adversarial_risk",
    "from_mlp",
    "interval",
    "logistic",
    "monotone_network",
    "projected_gradient_attack",
    "supremum_transform",
    "transformed_loss",
    "tree_transform",
]

Labels = Float[Array, " rows"]
Rows = Float[Array, "rows d"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda z: z,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
"""Activations that never fall."""

_FUNCTIONS: list[tuple[Any, str]] = [
    (jax.nn.relu, "relu"),
    (jax.nn.sigmoid, "sigmoid"),
    (jax.lax.logistic, "sigmoid"),
    (jnp.tanh, "tanh"),
    (jax.lax.tanh, "tanh"),
    (jax.nn.identity, "identity"),
    # What Equinox puts where no final activation is given is a function of its own.
    (inspect.signature(eqx.nn.MLP.__init__).parameters["final_activation"].default, "identity"),
]


# ---- networks --------------------------------------------------------------------------------------


class MonotoneNetwork(eqx.Module):
    """A score s_d(A_d s_{d−1}(⋯ s_1(A_1 x + b_1) ⋯) + b_d): a pytree of its weights and biases."""

    weights: tuple[Float[Array, "out in"], ...]
    biases: tuple[Float[Array, " out"] | None, ...]
    activations: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows"]:
        """The score of each row."""
        for weight, bias, name in zip(self.weights, self.biases, self.activations, strict=True):
            x = ACTIVATIONS[name](_affine(x, weight, bias))
        return x[..., 0]


def monotone_network(layers: Sequence[tuple[Any, Any, Any]]) -> MonotoneNetwork:
    """A network of layers `(weights, bias, activation)`, from the input on.

    **Arguments:** for each layer weights of shape (out, in), a bias of shape (out,) or None, and the activation:
    "identity", "relu", "tanh", "sigmoid", or JAX's function of that name. The last layer has one output.

    **Raises:** `InputError` for shapes that do not fit, and for an activation that is not among these: one that
    falls somewhere, as GELU and SiLU do, would make the bounds false.
    """
    if not layers:
        raise InputError("layers", "none", "at least one layer (weights, bias, activation)")
    weights, biases, names = [], [], []
    for i, layer in enumerate(layers):
        if not isinstance(layer, tuple | list) or len(layer) != 3:
            raise InputError(f"layers[{i}]", type(layer).__name__, "a tuple (weights, bias, activation)")
        weight, bias, activation = layer
        _check_real(f"layers[{i}]: weights", weight, 2)
        out, width = np.shape(weight)
        if weights and width != (before := weights[-1].shape[0]):
            raise InputError(f"layers[{i}]: weights", trees.describe(weight), f"{before} columns, as the layer before")
        if bias is not None:
            _check_real(f"layers[{i}]: bias", bias, 1)
            if np.shape(bias) != (out,):
                raise InputError(f"layers[{i}]: bias", trees.describe(bias), f"shape ({out},), or None")
        weights.append(jnp.asarray(weight))
        biases.append(None if bias is None else jnp.asarray(bias))
        names.append(_activation(f"layers[{i}]: activation", activation))
    if (rows := weights[-1].shape[0]) != 1:
        raise InputError("layers", f"{rows} outputs", "one, the score; of several classes certify f_y − f_j")
    return MonotoneNetwork(tuple(weights), tuple(biases), tuple(names))


def from_mlp(model: Any) -> MonotoneNetwork:
    """The network of an `equinox.nn.MLP` with one output, or of anything with its `layers` and activations.

    **Raises:** `InputError` as `monotone_network`, and for a model without them.
    """
    missing = [name for name in ("layers", "activation", "final_activation") if not hasattr(model, name)]
    if missing or getattr(model, "scan", False):
        got = f"{type(model).__name__} without {', '.join(missing)}" if missing else "an MLP with scan=True"
        raise InputError("model", got, "an equinox.nn.MLP whose layers are listed, or a list for monotone_network")
    last = len(model.layers) - 1
    # Equinox leaves out every activation of an MLP without hidden layers.
    final = model.final_activation if last else "identity"
    return monotone_network(
        [(a.weight, a.bias, final if i == last else model.activation) for i, a in enumerate(model.layers)]
    )


def _activation(argument: str, given: Any) -> str:
    found = given if isinstance(given, str) else next((name for fn, name in _FUNCTIONS if fn is given), "")
    if found not in ACTIVATIONS:
        got = repr(given) if isinstance(given, str) else getattr(given, "__name__", repr(given))
        raise InputError(argument, got, f"one that never falls: {', '.join(ACTIVATIONS)}, or JAX's function of it")
    return found


def _check_real(argument: str, array: Any, ndim: int) -> None:
    floating = hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)
    if not floating or np.ndim(array) != ndim or 0 in np.shape(array):
        raise InputError(argument, trees.describe(array), f"a real floating array of {ndim} axes")
    trees.check_width(argument, array)
    trees.check_no_nan(argument, array)


# ---- the transforms --------------------------------------------------------------------------------


def interval(
    network: MonotoneNetwork, x: Float[Array, "*rows d"], radius: Any, p: float = math.inf
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Tf(x, +1) and Tf(x, −1): bounds on the scores in the ball ‖w‖_p ≤ ε around x. Traceable.

    **Arguments:** `radius` — ε, at least 0; `p` — 1, 2 or infinity.

    **Raises:** `InputError` for numbers out of range, and for x of another length.
    """
    check_nonnegative("radius", radius)
    first, width = network.weights[0], network.weights[0].shape[1]
    spread = radius * _dual_norms(first, p)
    if jnp.shape(x)[-1:] != (width,):
        raise InputError("x", trees.describe(x), f"{width} columns, as the first layer")
    trees.check_width("x", x)
    low = high = jnp.asarray(x)
    for i, (weight, bias, name) in enumerate(zip(network.weights, network.biases, network.activations, strict=True)):
        # A⁺ lo + A⁻ hi = A (lo + hi)/2 − |A| (hi − lo)/2: two products, not four.
        center = _affine((low + high) / 2 if i else low, weight, bias)
        half = _affine((high - low) / 2, jnp.abs(weight), None) if i else spread
        low, high = (ACTIVATIONS[name](z) for z in (center - half, center + half))
    return low[..., 0], high[..., 0]


def tree_transform(network: MonotoneNetwork, x: Any, y: Any, radius: Any, p: float = math.inf) -> Float[Array, "*rows"]:
    """Tf(x, y): y Tf is at most the margin of any input within the radius. Of linear classifiers it is Ψf.

    **Arguments:** as for `interval`; `y` — labels −1 and 1, one for each row.

    **Raises:** `InputError` as `interval`, and for other labels.
    """
    _check_labels(x, y)
    low, high = interval(network, x, radius, p)
    return jnp.where(jnp.asarray(y) > 0, low, high)


def supremum_transform(
    network: MonotoneNetwork, x: Any, y: Any, radius: Any, p: float = math.inf
) -> Float[Array, "*rows"]:
    """Ψf(x, y) of a classifier with one layer, in closed form: the worst score within the radius.

    **Raises:** `InputError` as `tree_transform`, and for several layers, where it is a problem without a closed form.
    """
    if (depth := len(network.weights)) > 1:
        raise InputError("network", f"{depth} layers", "one; tree_transform bounds the transform of several")
    return tree_transform(network, x, y, radius, p)


def _affine(x: Array, weight: Array, bias: Array | None) -> Array:
    image = jnp.matmul(x, weight.T, precision="highest")  # a bound in a GPU's short formats would be none
    return image if bias is None else image + bias


def _dual_norms(weight: Float[Array, "out in"], p: float) -> Float[Array, " out"]:
    """‖row‖_q with 1/p + 1/q = 1: how far a row's product moves in the unit ball of the p-norm."""
    if p == math.inf:
        return jnp.sum(jnp.abs(weight), axis=1)
    if p == 1:
        return jnp.max(jnp.abs(weight), axis=1)
    if p == 2:
        squares = jnp.sum(weight**2, axis=1)
        # The derivative of a root at zero is infinite: that of a row of zeros shall be zero.
        return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))
    raise InputError("p", p, "1, 2 or infinity")


def _check_labels(x: Any, y: Any) -> None:
    if np.shape(y) != np.shape(x)[:-1]:
        raise InputError("y", trees.describe(y), f"one label for each row of x, which is {trees.describe(x)}")
    if not is_traced(y) and not np.isin(np.asarray(y), (-1, 1)).all():
        raise InputError("y", f"labels such as {np.setdiff1d(np.asarray(y), (-1, 1))[0]}", "labels −1 and 1")


# ---- training --------------------------------------------------------------------------------------


def logistic(margin: Array) -> Array:
    """log(1 + exp(−m)): for it the transformed loss of a linear classifier is convex."""
    return jax.nn.softplus(-margin)


def transformed_loss(
    radius: float, p: float = math.inf, *, loss: Callable[[Array], Array] = logistic
) -> Callable[..., Float[Array, " rows"]]:
    """l(y Tf(x, y)) of each row, as a function `(network, (x, y))`: an upper bound on the adversarial loss.

    It is what `FiniteSum` takes as a loss; a network is a point that `minimize` and Optax take. A third argument
    replaces the radius, to raise it from 0 during training.

    **Arguments:** `radius`, `p` — as for `interval`; `loss` — of the margin, never rising in it.

    **Raises:** `InputError` for numbers out of range.
    """
    check_nonnegative("radius", radius)
    if p not in (1, 2, math.inf):
        raise InputError("p", p, "1, 2 or infinity")

    def losses(network: MonotoneNetwork, batch: tuple[Rows, Labels], radius: Any = radius) -> Float[Array, " rows"]:
        x, y = batch
        return loss(jnp.asarray(y) * tree_transform(network, x, y, radius, p))

    return losses


# ---- the certificate and the attack ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AdversarialRisk:
    """What examples say of a classifier whose inputs may be moved by the radius.

    **Fields:**
    - `clean_error`: share of the rows with a margin of at most 0; `certified_error`: of those with y Tf ≤ 0, at
      least the error of any attack on these rows.
    - `certified_loss`: the mean ramp loss min(1, max(0, 1 − m/margin)) of m = y Tf (held out: the certified error).
    - `complexity`, `deviation`: the other two terms of the bound.
    - `bound`: with probability 1 − δ at least the adversarial risk on new examples; `vacuous`: it is at least 1.
    """

    clean_error: float
    certified_error: float
    certified_loss: float
    complexity: float
    deviation: float

    @property
    def bound(self) -> float:
        return self.certified_loss + self.complexity + self.deviation

    @property
    def vacuous(self) -> bool:
        return self.bound >= 1


def adversarial_risk(
    network: MonotoneNetwork,
    x: Rows,
    y: Labels,
    radius: float,
    p: float = math.inf,
    *,
    held_out: bool = False,
    norm_bound: float | None = None,
    rademacher: float | None = None,
    margin: float = 1.0,
    failure_probability: float = 0.05,
) -> AdversarialRisk:
    """A bound on the adversarial risk, from examples that were held out or from those that it was trained on.

    **Arguments:** as for `tree_transform`, and one of these three:
    - `held_out`: the examples had no part in training: certified error + √(log(1/δ)/(2n)), by Hoeffding.
    - `norm_bound`: M, fixed before the data were seen, of linear classifiers with ‖(θ, b)‖₂ ≤ M.
    - `rademacher`: Rad_n(T F) of the class of networks that training chose from.

    `margin` is that of the ramp loss, whose Lipschitz constant is 1/margin; `failure_probability` is δ.

    **Raises:** `InputError` as `tree_transform`, and for numbers out of range or a network outside of the class.
    """
    if sum((held_out, norm_bound is not None, rademacher is not None)) != 1:
        got = f"held_out={held_out}, norm_bound={norm_bound}, rademacher={rademacher}"
        raise InputError("held_out, norm_bound and rademacher", got, "exactly one of them")
    check_positive("margin", margin)
    check_fraction("failure_probability", failure_probability)
    check_positive("failure_probability", failure_probability)
    margins = np.asarray(y * tree_transform(network, x, y, radius, p), np.float64)
    if margins.ndim != 1 or not (n := margins.size):
        raise InputError("x", trees.describe(x), "an array of shape (rows, columns) with at least 1 row")
    clean = float(np.mean(~(np.asarray(y * network(jnp.asarray(x))) > 0)))
    certified = float(np.mean(~(margins > 0)))
    if held_out:
        return AdversarialRisk(clean, certified, certified, 0.0, math.sqrt(math.log(1 / failure_probability) / (2 * n)))
    if norm_bound is not None:
        rademacher = _linear_rademacher(network, np.asarray(x), radius, p, norm_bound)
    check_nonnegative("rademacher", rademacher)
    ramp = float(np.mean(np.clip(1 - margins / margin, 0, 1)))
    deviation = 3 * math.sqrt(math.log(2 / failure_probability) / (2 * n))
    return AdversarialRisk(clean, certified, ramp, 2 / margin * float(rademacher or 0.0), deviation)


def _linear_rademacher(network: MonotoneNetwork, x: np.ndarray, radius: float, p: float, norm_bound: Any) -> float:
    """M r/√n + ε M c/(2√n) with r² = mean ‖(x, 1)‖₂², and c = max ‖θ‖_q/‖θ‖₂: √d for p = ∞, else 1.

    The second term: sup over θ of −ε‖θ‖_q (1/n) Σ σᵢyᵢ has the mean ε M c E max(0, (1/n) Σ σᵢ) ≤ ε M c/(2√n).
    """
    check_positive("norm_bound", norm_bound)
    if len(network.weights) > 1 or network.activations[0] != "identity":
        raise InputError("norm_bound", norm_bound, "a linear classifier; for other classes give their `rademacher`")
    norm = float(trees.norm(network))
    if norm > norm_bound:
        raise InputError("norm_bound", norm_bound, f"at least the norm {norm:.6g} of the weights and bias")
    n, d = x.shape
    constant = 0.0 if network.biases[0] is None else 1.0
    size = math.sqrt(float(np.sum(np.square(x, dtype=np.float64))) / n + constant)
    return norm_bound * (size + radius * (math.sqrt(d) if p == math.inf else 1.0) / 2) / math.sqrt(n)


def projected_gradient_attack(
    network: MonotoneNetwork, x: Rows, y: Labels, radius: Any, p: float = math.inf, *, steps: int = 40
) -> Float[Array, "rows d"]:
    """Moved inputs x + w with ‖w‖_p ≤ ε and small margins: steepest descent of the margin from w = 0.

    Steps of length 2.5 ε / `steps`: those of a linear classifier end at the worst point. For p = 2 and infinity.

    **Raises:** `InputError` as `tree_transform`, and for p = 1.
    """
    check_count("steps", steps, 1)
    check_nonnegative("radius", radius)
    if p not in (2, math.inf):
        raise InputError("p", p, "2 or infinity: the attack has no projection for others")
    _check_labels(x, y)
    x, length = jnp.asarray(x), 2.5 * radius / steps

    def size(rows: Array) -> Array:
        return jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), jnp.finfo(rows.dtype).tiny)

    def descend(_: Any, w: Array) -> Array:
        slope = jax.grad(lambda w: jnp.sum(y * network(x + w)))(w)
        if p == math.inf:
            return jnp.clip(w - length * jnp.sign(slope), -radius, radius)
        w = w - length * slope / size(slope)
        return w * jnp.minimum(1.0, radius / size(w))

    return x + jax.lax.fori_loop(0, steps, descend, jnp.zeros_like(x))
