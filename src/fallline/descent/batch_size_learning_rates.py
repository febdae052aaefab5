"""Learning rates and batch size: how large may the step be at batch size B?

A model of the Hessian on a batch of B of the N examples, with P parameters: H_batch = H + E, E symmetric with
independent entries of variance σ²/b̃. Of an eigenvalue λ > 0 of H and its eigenvector u the batch has, as P → ∞,

    b̃ = B / (1 − B/N),                                            ∞ at B = N
    λ′ = λ + Pσ²/(b̃λ)   where λ > σ √(P/b̃),   else 2σ √(P/b̃),      the edge of the noise's semicircle
    |⟨u′, u⟩|² = 1 − Pσ²/(b̃λ²)   there,        else 0
    σ² = E_i E_v |(H_i − H) v|² / P²,                               v of independent signs

SGD's largest stable step is 2/λ′ of the largest eigenvalue: the linear rule, B/B₀, as long as Pσ²/(b̃λ) makes most of
λ′, then 2/λ. (In the model itself that term never exceeds λ outside of the noise, and within the noise 2/λ′ grows as
√B.) Adaptive methods are held by the edge, so by √B. The outlier leaves the noise at b̃ = Pσ²/λ², where λ′ = 2λ: from
there on the stable step at most doubles.

Where noise is not isotropic, second-order perturbation of λ gives the same rule with s₁ in place of Pσ²,

    s₁ = E_i |(I − uuᵀ)(H_i − H) u|²

| paper   | here                             |
|---------|----------------------------------|
| b̃, λ′   | `effective_batch_size`, `spike`  |
| P, N    | `parameters`, `examples`         |
| σ²      | `variance`                       |
| s₁      | `along` (ours)                   |

Source: D. Granziol, S. Zohren and S. Roberts, *Learning Rates as a Function of Batch Size: A Random Matrix Theory
Approach to Neural Network Training*, JMLR 2022 (arXiv 2006.09092). The formulas are from memory and tested against
random matrices; s₁ is our own derivation. The law of Gauss–Newton noise (Marchenko–Pastur) is not here.

Guarantee: limits as P → ∞ under the matrix model; the two branches meet at the threshold. A step below 2/λ′ is stable
on the local quadratic, which says nothing of other points, nor of how well it trains.

Departures: the refinement by s₁, and a cap of the scaled rate.

Use it to carry a tuned learning rate to another batch size, and to see from which batch size on that stops paying. The
noise of real networks is far from isotropic: ask for s₁, and take the isotropic numbers for what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_choice, check_count, check_nonnegative, check_positive, is_traced
from ..parts.curvature import Estimate, hessian, per_example_hvp, probe
from ..parts.linalg import leading_eigenvector

__all__ = [
    "BatchSizeLearningRates",
    "CurvatureNoise",
    "Spike",
    "batch_size_learning_rates",
    "effective_batch_size",
    "noise_variance",
    "scale_damping",
    "scale_learning_rate",
    "spike",
]

POWERS = {"sgd": 1.0, "adaptive": 0.5}

_ROWS = 64  # examples whose products are held at once


def effective_batch_size(batch_size: Any, examples: int | None) -> Array:
    """b̃ = B/(1 − B/N) of batches drawn without replacement, ∞ at B = N; B itself where `examples` is None."""
    _check_batch_sizes("batch_sizes", batch_size, examples)
    sizes = jnp.asarray(batch_size, jnp.result_type(float))
    if examples is None:
        return sizes
    return sizes * examples / (examples - sizes)  # ∞ where nothing is left out


class Spike(NamedTuple):
    """What noise makes of an eigenvalue: where it goes, its eigenvector's squared overlap, whether it stands out."""

    value: Array
    overlap: Array
    outside: Bool[Array, "*shape"]


def spike(eigenvalue: Any, noise: Any) -> Spike:
    """An eigenvalue λ > 0 of H under noise of s = `noise` (Pσ²/b̃, or s₁/b̃): λ + s/λ where λ² > s, else 2√s.

    Arrays broadcast.

    **Raises:** `InputError` where an eigenvalue is not positive, or a noise negative.
    """
    _check_all("eigenvalue", eigenvalue, lambda a: np.isfinite(a) & (a > 0), "finite numbers above 0")
    _check_all("noise", noise, lambda a: np.isfinite(a) & (a >= 0), "finite numbers of at least 0")
    return _spike(*jnp.broadcast_arrays(jnp.asarray(eigenvalue, jnp.result_type(float)), jnp.asarray(noise)))


def _spike(eigenvalue: Array, noise: Array) -> Spike:
    outside = eigenvalue**2 > noise
    overlap = jnp.where(outside, 1 - noise / eigenvalue**2, 0)
    inside = eigenvalue**2 <= noise  # neither, where there is NaN
    value = jnp.where(inside, 2 * jnp.sqrt(noise), eigenvalue + noise / eigenvalue)
    return Spike(value, jnp.where(outside | inside, overlap, jnp.nan), outside)


class BatchSizeLearningRates(NamedTuple):
    """Predictions at each batch size, as arrays of one shape.

    `effective`: b̃; `edge`: 2σ √(P/b̃), the largest eigenvalue of noise alone; `largest`: λ′; `overlap`: of the batch's
    eigenvector with the full data's, squared; `outside`: whether λ stands out of the noise; `learning_rate`: 2/λ′, at
    which SGD on the quadratic is at the brink. `threshold`: the batch size at which λ leaves the noise, a scalar, which
    may be below 1.
    """

    batch_sizes: Array
    effective: Array
    edge: Array
    largest: Array
    overlap: Array
    outside: Array
    learning_rate: Array
    threshold: Float[Array, ""]


def batch_size_learning_rates(
    batch_sizes: Any, *, largest: Any, variance: Any, parameters: int, examples: int | None = None, along: Any = None
) -> BatchSizeLearningRates:
    """Largest eigenvalue and largest stable learning rate against batch size (Granziol, Zohren and Roberts 2022).

    **Arguments:**
    - `batch_sizes`: B, a number or an array; `examples`: N, None for batches drawn with replacement or a stream.
    - `largest`: λ₁ of the full Hessian; `variance`: σ²; `parameters`: P. `noise_variance` measures all three.
    - `along`: s₁, which replaces Pσ² in λ′, overlap and threshold where it is given; the edge remains that of σ².

    Traceable in all but the counts.

    **Raises:** `InputError` for a batch size below 1 or above N, λ₁ that is not positive, negative σ² or s₁.
    """
    check_count("parameters", parameters, 1)
    if examples is not None:
        check_count("examples", examples, 1)
    check_positive("largest", largest)
    check_nonnegative("variance", variance)
    if along is not None:
        check_nonnegative("along", along)
    effective = effective_batch_size(batch_sizes, examples)
    isotropic = parameters * jnp.asarray(variance, effective.dtype)
    strength = isotropic if along is None else jnp.asarray(along, effective.dtype)
    largest = jnp.asarray(largest, effective.dtype)
    found = _spike(*jnp.broadcast_arrays(largest, strength / effective))
    critical = strength / largest**2
    threshold = critical if examples is None else critical / (1 + critical / examples)
    edge = 2 * jnp.sqrt(isotropic / effective)
    return BatchSizeLearningRates(
        jnp.asarray(batch_sizes), effective, edge, *found, learning_rate=2 / found.value, threshold=threshold
    )


class CurvatureNoise(NamedTuple):
    """How the Hessians of single examples scatter around their mean H.

    `variance`: σ², with its standard error over the probes; `largest`, `vector`: λ₁ of H and its eigenvector u, of
    norm 1, like the parameters; `along`: s₁. `parameters`, `examples`: P, N, Python numbers.
    """

    variance: Estimate
    largest: Float[Array, ""]
    vector: PyTree
    along: Float[Array, ""]
    parameters: int
    examples: int

    def rates(self, batch_sizes: Any, *, anisotropic: bool = True) -> BatchSizeLearningRates:
        """`batch_size_learning_rates` of these numbers, by s₁ or by Pσ²."""
        return batch_size_learning_rates(
            batch_sizes,
            largest=self.largest,
            variance=self.variance.value,
            parameters=self.parameters,
            examples=self.examples,
            along=self.along if anisotropic else None,
        )


def noise_variance(
    loss: Callable[[PyTree, PyTree], Array],
    x: PyTree,
    data: PyTree,
    *,
    key: Array | int = 0,
    probes: int = 8,
    steps: int = 30,
) -> CurvatureNoise:
    """Measure σ², λ₁, u and s₁ by products with the Hessians of single examples; traceable.

    **Arguments:**
    - `loss`: `loss(x, batch) -> per-example losses`; `x`: real arrays; `data`: arrays with a leading axis of N rows.
    - `probes`: vectors of random signs, each one product with every example; 64 examples' products are held at once.
    - `steps`: of Lanczos for λ₁ and u, on all data.

    **Raises:** `InputError` for data without one leading axis, parameters that are not real, or counts below 1.
    """
    check_count("probes", probes, 1)
    check_count("steps", steps, 1)
    lengths = {jnp.shape(a)[0] if jnp.ndim(a) else 0 for a in jax.tree.leaves(data)}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(trees.describe(a) for a in jax.tree.leaves(data)) or "nothing"
        raise InputError("data", shapes, "arrays that share one leading axis of at least one example")
    for leaf in jax.tree.leaves(x):
        if not trees.is_floating(leaf) or jnp.iscomplexobj(leaf):
            raise InputError("x", trees.describe(leaf), "real floating arrays")
    size, rows = trees.flat_size(x), lengths.pop()
    key = jax.random.key(key) if isinstance(key, int) else key
    return CurvatureNoise(*_measure(loss, x, data, key, probes, min(steps, size)), size, rows)


@eqx.filter_jit
def _measure(
    loss: Callable[..., Array], x: PyTree, data: PyTree, key: Array, probes: int, steps: int
) -> tuple[Estimate, Array, PyTree, Array]:
    size = trees.flat_size(x)
    first, second = jax.random.split(key)
    product = hessian(lambda x: jnp.mean(loss(x, data)), x)

    def flat(v: Array) -> Array:
        return trees.flatten(product(trees.unflatten(v, x))).astype(v.dtype)

    def scatter(v: Array, outside: Array) -> Float[Array, ""]:
        """E_i |(I − wwᵀ)(H_i − H) v|² for w = `outside`."""
        mean = flat(v)

        def one(row: PyTree) -> Array:
            row = jax.tree.map(lambda a: a[None], row)
            image = jax.tree.map(lambda a: a[0], per_example_hvp(loss, x, row, trees.unflatten(v, x)))
            away = trees.flatten(image) - mean
            return jnp.sum((away - outside * jnp.vdot(outside, away)) ** 2)

        return jnp.mean(jax.lax.map(one, data, batch_size=_ROWS))

    start = trees.flatten(probe(second, x, "normal"))
    largest, u = leading_eigenvector(flat, start / jnp.linalg.norm(start), steps)

    def measured(each: tuple[Array, Array]) -> Array:
        """Of a probe, or of u where there is none: one loop, so that the products are compiled once."""
        key, last = each
        signs = trees.flatten(probe(key, x))
        return scatter(jnp.where(last, u, signs), jnp.where(last, u, 0))

    last = jnp.arange(probes + 1) == probes
    found = jax.lax.map(measured, (jax.random.split(first, probes + 1), last))
    samples = found[:probes] / float(size) ** 2
    variance = Estimate(jnp.mean(samples), jnp.std(samples, ddof=1) / jnp.sqrt(probes))
    return variance, largest, trees.unflatten(u, x), found[probes]


def scale_learning_rate(learning_rate: Any, batch_size: Any, new_batch_size: Any, kind: str, cap: Any = None) -> Any:
    """The learning rate at another batch size: α (B/B₀) for SGD, α √(B/B₀) for adaptive methods.

    **Arguments:**
    - `learning_rate` α: good at `batch_size` B₀; `new_batch_size`: B.
    - `kind`: `"sgd"`, with or without momentum, or `"adaptive"` (Adam and its kin with a small eps).
    - `cap`: the batch size from which on the rate stays, such as `BatchSizeLearningRates.threshold`.

    **Raises:** `InputError` for a rate that is negative, a batch size or cap below 1, or another kind.
    """
    check_choice("kind", kind, POWERS)
    check_nonnegative("learning_rate", learning_rate)
    for name, value in (("batch_size", batch_size), ("new_batch_size", new_batch_size)):
        check_count(name, value, 1)
    if cap is not None:
        check_positive("cap", cap)
        if not is_traced(cap) and cap < 1:
            raise InputError("cap", cap, "a batch size of at least 1")
        batch_size, new_batch_size = (jnp.minimum(b, cap) for b in (batch_size, new_batch_size))
    return learning_rate * (new_batch_size / batch_size) ** POWERS[kind]


def scale_damping(
    damping: Any, batch_size: Any, new_batch_size: Any, learning_rate: Any = 1.0, new_learning_rate: Any = 1.0
) -> Any:
    """The damping (Adam's eps, or of a second-order method) that another batch size needs: proportional to α/B.

    **Raises:** `InputError` for negative damping, a batch size below 1, or rates that are not positive.
    """
    check_nonnegative("damping", damping)
    for name, value in (("batch_size", batch_size), ("new_batch_size", new_batch_size)):
        check_count(name, value, 1)
    for name, value in (("learning_rate", learning_rate), ("new_learning_rate", new_learning_rate)):
        check_positive(name, value)
    return damping * (new_learning_rate / learning_rate) * (batch_size / new_batch_size)


def _check_batch_sizes(name: str, value: Any, examples: int | None) -> None:
    most = np.inf if examples is None else examples
    what = "numbers of at least 1" + ("" if examples is None else f" and at most the number of examples, {examples}")
    _check_all(name, value, lambda a: np.isfinite(a) & (a >= 1) & (a <= most), what)


def _check_all(name: str, value: Any, holds: Callable[[Any], Any], expected: str) -> None:
    if is_traced(value):
        return
    try:
        array = np.asarray(value, float)
    except (TypeError, ValueError):
        raise InputError(name, repr(value), expected) from None
    if not np.all(holds(array)):
        raise InputError(name, value, expected)
