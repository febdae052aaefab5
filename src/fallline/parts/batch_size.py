"""Batch sizes that follow the noise of the gradient: statistics of a batch, tests of them, the next batch size.

Of the gradients g_1 … g_b of a batch's examples, of mean g, with the sample normalization 1/(b − 1) and over all leaves
together:

    V = Σ_j Var_i g_ij,    V_along = Var_i ⟨g_i, g/|g|⟩,    V_across = Σ_j Var_i (g_i − ⟨g_i, g⟩ g/|g|²)_j
    V = V_along + V_across

A test gives the batch size at which it would pass, from the variances measured on this batch:

    norm             V / (η² |g|²)
    inner product    V_along / (θ² |g|²) = Var_i ⟨g_i, g⟩ / (θ² |g|⁴);   with ν also V_across / (ν² |g|²)
    coordinates      max_j Var_i g_ij / (η² g_j²)

In a training loop: `test = NormTest(0.5)`, then each step `batch_size = next_batch_size(test, statistics(gradients),
batch_size, maximum)`, inside or outside of `jit`. A batch in micro-batches of one shape, on one device or many, has
`moments` of each, which `merge` to those of the whole, exactly.

|g|² exceeds the squared norm of the true gradient by V/b in the mean. Where that is most of it, near a stationary
point, the norm test's candidate is about b/η², however small the true gradient is: tests then ask for too little.

Source: R. H. Byrd, G. M. Chin, J. Nocedal and Y. Wu (2012), *Sample size selection in optimization methods for machine
learning* (norm test); R. Bollapragada, R. Byrd and J. Nocedal (2018), *Adaptive Sampling Strategies for Stochastic
Optimization* (inner product and orthogonality); T. Lau, H. Liu and M. Kolar (2024, arXiv 2402.11215) (coordinates);
T. F. Chan, G. H. Golub and R. J. LeVeque (1983), *Algorithms for Computing the Sample Variance* (merging).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.errors import InputError, check_count, check_nonnegative, check_positive, is_traced
from ..core.extra import require

__all__ = [
    "BatchSizeTest",
    "CoordinateTest",
    "InnerProductTest",
    "Moments",
    "NormTest",
    "Statistics",
    "adapt_batch_size",
    "by_samples",
    "merge",
    "moments",
    "next_batch_size",
    "statistics",
]


_MOST = 2**31 - 1


class Moments(NamedTuple):
    """Of some examples: how many, the mean of what they have, and the sum of squares around it.

    `squares` is a scalar over all leaves, or like `mean` where the coordinates are kept apart; in at least float32.
    """

    count: Float[Array, ""]  # type: ignore[assignment]  # hides a method of tuples that nobody calls
    mean: PyTree
    squares: Any

    def variance(self) -> Any:
        """`squares` / (count − 1): NaN of a single example."""
        return jax.tree.map(lambda a: a / (self.count - 1), self.squares)


def moments(stacked: PyTree, weights: Float[Array, " rows"] | None = None, *, by_coordinate: bool = False) -> Moments:
    """The moments of the entries of the leading axis; `weights` of 0 or 1 leave out those that fill up a last batch."""
    _check_stacked("stacked", stacked, 1)
    wide = trees.real_dtype(stacked)
    stacked = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, wide)), stacked)
    weights = jnp.ones(_rows(stacked), wide) if weights is None else jnp.asarray(weights, wide)
    count = jnp.sum(weights)
    mean = jax.tree.map(lambda a: _weighted(weights, a) / jnp.maximum(count, 1), stacked)
    away = jax.tree.map(lambda a, m: _rows_times(weights, a - m), stacked, mean)
    if by_coordinate:
        return Moments(count, mean, jax.tree.map(lambda d: _weighted(weights, _square(d)), away))
    # A product of a vector with itself: many times faster than a sum of squares on a processor.
    squares = [jnp.vdot(d, d).real.astype(wide) for d in jax.tree.leaves(away)]
    return Moments(count, mean, sum(squares, start=jnp.zeros((), wide)))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two groups of examples together: the law of total variance, for any two counts."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    change = jax.tree.map(jnp.subtract, b.mean, a.mean)
    mean = jax.tree.map(lambda m, d: m + share * d, a.mean, change)
    between = jax.tree.map(lambda d: a.count * share * _square(d), change)
    by_coordinate = _shapes(a.squares) == _shapes(a.mean)
    between = between if by_coordinate else _total(between, trees.real_dtype(between))
    return Moments(count, mean, jax.tree.map(lambda x, y, z: x + y + z, a.squares, b.squares, between))


class Statistics(NamedTuple):
    """What tests look at: the gradient g of the batch, |g|², and variances over its examples, None where not asked.

    `total`: V; `along`: V_along; `variances`: of each coordinate, like the gradient.
    """

    gradient: PyTree
    squared_norm: Float[Array, ""]
    total: Float[Array, ""] | None = None
    along: Float[Array, ""] | None = None
    variances: PyTree | None = None


def statistics(per_example_gradients: PyTree, *, rows: Any = 1) -> Statistics:
    """All statistics of a batch whose gradients are stacked on a leading axis.

    **Arguments:** `rows` — each entry is the mean over that many examples, of micro-batches that were drawn
    independently: the variance of one example is then `rows` times that between the entries.

    **Raises:** `InputError` where there is no leading axis or less than two entries, of which there is no variance.
    """
    _check_stacked("per_example_gradients", per_example_gradients, 2)
    check_positive("rows", rows)
    each = moments(per_example_gradients, by_coordinate=True)
    wide = trees.real_dtype(each.mean)
    variances = jax.tree.map(lambda v: rows * v, each.variance())
    square = _total(jax.tree.map(_square, each.mean), wide)
    unit = direction(each.mean, jnp.sqrt(square))
    parts = jax.tree.map(
        lambda a, u: jnp.sum((jnp.conj(u) * a).real.reshape(a.shape[0], -1), axis=1), per_example_gradients, unit
    )
    projected = jax.tree.reduce(jnp.add, parts).astype(wide)
    along = rows * moments(projected).variance()
    return Statistics(each.mean, square, _total(variances, wide), along, variances)


def direction(gradient: PyTree, norm: Float[Array, ""]) -> PyTree:
    """g/|g|, zero where g is."""
    return jax.tree.map(lambda g: g / jnp.where(norm == 0, 1, norm), gradient)


class BatchSizeTest(eqx.Module):
    """A test; `needs` names the fields of `Statistics` that it looks at beside |g|². Its numbers are leaves."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def candidate(self, seen: Statistics) -> Float[Array, ""]:
        """The batch size at which the test would pass; infinite for noise around g = 0."""
        raise NotImplementedError


class NormTest(BatchSizeTest):
    """The norm test, E|g − ∇F|² ≤ η² |∇F|²: candidate V / (η² |g|²). `eta` between 0.1 and 1."""

    needs: ClassVar[frozenset[str]] = frozenset({"total"})

    eta: Any = 0.5

    def __check_init__(self) -> None:
        check_positive("eta", self.eta)

    def candidate(self, seen: Statistics) -> Float[Array, ""]:
        return over(seen.total, self.eta**2 * seen.squared_norm)


class InnerProductTest(BatchSizeTest):
    """The inner-product test, Var ⟨g, ∇F⟩ ≤ θ² |∇F|⁴, and with `nu` the orthogonality test beside it.

    The candidate is V_along / (θ² |g|²), or the larger of it and V_across / (ν² |g|²). `theta` between 0.1 and 0.5,
    `nu` about 1.
    """

    theta: Any = 0.5
    nu: Any = None

    def __check_init__(self) -> None:
        check_positive("theta", self.theta)
        if self.nu is not None:
            check_positive("nu", self.nu)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"along"} if self.nu is None else {"along", "total"})

    def candidate(self, seen: Statistics) -> Float[Array, ""]:
        assert seen.along is not None
        along = over(seen.along, self.theta**2 * seen.squared_norm)
        if self.nu is None:
            return along
        assert seen.total is not None
        across = seen.total - seen.along  # V = V_along + V_across
        return jnp.maximum(along, over(jnp.maximum(across, 0), self.nu**2 * seen.squared_norm))


class CoordinateTest(BatchSizeTest):
    """The norm test in each coordinate, E(g_j − ∂_jF)² ≤ η² (∂_jF)²: candidate max_j Var_i g_ij / (η² g_j²).

    Coordinates with g_j² ≤ `tolerance` are left out: the candidate explodes where g_j is near 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"variances"})

    eta: Any = 0.5
    tolerance: Any = 0.0

    def __check_init__(self) -> None:
        check_positive("eta", self.eta)
        check_nonnegative("tolerance", self.tolerance)

    def candidate(self, seen: Statistics) -> Float[Array, ""]:
        def largest(v: Array, g: Array) -> Array:
            square = _square(g)
            # A NaN is no coordinate to leave out.
            return jnp.max(jnp.where(square <= self.tolerance, 0, over(v, self.eta**2 * square)), initial=0)

        return jax.tree.reduce(jnp.maximum, jax.tree.map(largest, seen.variances, seen.gradient))


def next_batch_size(test: BatchSizeTest, seen: Statistics, batch_size: Any, maximum: Any) -> Int[Array, ""]:
    """min(maximum, max(batch_size, ⌈candidate⌉)): the batch size of the next step, never a smaller one."""
    return grown(test.candidate(seen), batch_size, maximum)


def grown(candidate: Float[Array, ""], batch_size: Any, maximum: Any) -> Int[Array, ""]:
    """min(maximum, max(batch_size, ⌈candidate⌉)); a candidate of NaN changes nothing."""
    size, most = jnp.asarray(batch_size, jnp.int32), jnp.asarray(maximum, jnp.int32)
    wanted = jnp.ceil(jnp.where(candidate < most, candidate, 0)).astype(jnp.int32)
    return jnp.minimum(most, jnp.maximum(size, jnp.where(candidate >= most, most, wanted)))


def check_sizes(batch_size: Any, maximum: Any, test_interval: Any) -> None:
    """Refuse batch sizes whose variance is undefined, a maximum below the first one, or no interval."""
    check_count("batch_size", batch_size, 2)
    check_count("test_interval", test_interval, 1)
    if maximum is not None:
        check_count("max_batch_size", maximum, 2)
        if not is_traced((batch_size, maximum)) and maximum < batch_size:
            raise InputError("max_batch_size", maximum, f"at least batch_size, {batch_size}")


def checked_test(test: Any) -> BatchSizeTest:
    """The test, or the norm test where it is None."""
    if test is None:
        return NormTest()
    if not isinstance(test, BatchSizeTest):
        raise InputError("test", repr(test), "NormTest(…), InnerProductTest(…) or CoordinateTest(…)")
    return test


class SampleState(NamedTuple):
    """Examples that went into the gradients so far."""

    samples: Int[Array, ""]


def by_samples(schedule: Callable[[Array], Any]) -> optax.GradientTransformationExtraArgs:
    """As `optax.scale_by_learning_rate`, but the schedule is measured in examples: steps −schedule(samples) · g.

    `update` needs the number of examples of its gradient: `update(g, state, params, batch_size=b)`; `adadagrad`
    passes it.

    **Raises:** `InputError` where the schedule is not callable; in `update`, without `batch_size`.
    """
    if not callable(schedule):
        raise InputError("schedule", repr(schedule), "a schedule: samples -> learning rate")

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, *, batch_size: Any = None, **extra: Any
    ) -> tuple[PyTree, SampleState]:
        del params, extra
        if batch_size is None:
            raise InputError("batch_size", None, "the examples of this gradient; pass it as update(..., batch_size=b)")
        rate = schedule(state.samples)
        return jax.tree.map(lambda g: (-rate * g).astype(g.dtype), updates), SampleState(
            plus_samples(state.samples, batch_size)
        )

    return optax.GradientTransformationExtraArgs(lambda params: SampleState(jnp.int32(0)), update)


def plus_samples(samples: Array, batch_size: Any) -> Array:
    """The sum of two counts, at most 2³¹ − 1."""
    room = _MOST - jnp.asarray(batch_size, jnp.int32)
    return jnp.minimum(samples, room) + jnp.asarray(batch_size, jnp.int32)


class BatchSizeState(NamedTuple):
    """`batch_size` for the next step, updates so far, and the candidate of the last test (0 before the first)."""

    batch_size: Int[Array, ""]
    steps: Int[Array, ""]
    candidate: Float[Array, ""]


def adapt_batch_size(
    test: BatchSizeTest | None = None, batch_size: int = 32, max_batch_size: int = _MOST, test_interval: int = 1
) -> optax.GradientTransformationExtraArgs:
    """A transformation that leaves updates as they are and says in its state which `batch_size` comes next.

    `update` needs `per_example_gradients`, the gradients of the batch's examples on a leading axis.

    **Arguments:** as for `adadagrad`.

    **Raises:** `InputError` for numbers out of range; in `update`, where the per-example gradients are missing, have no
    leading axis or are less than two.
    """
    rule = checked_test(test)
    check_sizes(batch_size, max_batch_size, test_interval)

    def init(params: PyTree) -> BatchSizeState:
        return BatchSizeState(jnp.int32(batch_size), jnp.int32(0), jnp.zeros((), trees.real_dtype(params)))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        per_example_gradients: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, BatchSizeState]:
        del params, extra
        require(updates, per_example_gradients=per_example_gradients)
        steps = jnp.asarray(optax.safe_increment(state.steps))
        if not jax.tree.leaves(updates):  # all behind a mask
            return updates, BatchSizeState(state.batch_size, steps, state.candidate)
        due = (steps % test_interval == 0) & (state.batch_size < max_batch_size)
        candidate = rule.candidate(statistics(per_example_gradients)).astype(state.candidate.dtype)
        size = grown(candidate, state.batch_size, max_batch_size)
        return updates, BatchSizeState(
            jnp.where(due, size, state.batch_size), steps, jnp.where(due, candidate, state.candidate)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def over(part: Any, whole: Any) -> Array:
    """`part` / `whole`, 0 where the part is."""
    return jnp.where(part == 0, 0, part / whole)


def _check_stacked(name: str, stacked: PyTree, least: int) -> None:
    leaves = jax.tree.leaves(stacked)
    lengths = {jnp.shape(a)[0] if jnp.ndim(a) else None for a in leaves}
    if len(lengths) != 1 or None in lengths:
        shapes = ", ".join(dict.fromkeys(trees.describe(a) for a in leaves)) or "no arrays"
        raise InputError(name, shapes, "arrays that share one leading axis, of the examples")
    if (count := lengths.pop()) < least:  # type: ignore[operator]
        what = "two: of less there is no variance" if least == 2 else "one"
        raise InputError(name, f"{count} examples", f"at least {what}")


def _rows(stacked: PyTree) -> int:
    return jnp.shape(jax.tree.leaves(stacked)[0])[0]


def _shapes(tree: PyTree) -> Any:
    return jax.tree.structure(tree), [jnp.shape(a) for a in jax.tree.leaves(tree)]


def _square(a: Array) -> Array:
    return jnp.square(a.real) + jnp.square(a.imag) if jnp.iscomplexobj(a) else jnp.square(a)


def _rows_times(weights: Array, a: Array) -> Array:
    return weights.astype(a.dtype).reshape(-1, *[1] * (a.ndim - 1)) * a


def _weighted(weights: Array, a: Array) -> Array:
    """Σ_i w_i a_i."""
    return jnp.tensordot(weights.astype(a.dtype), a, axes=1)


def _total(tree: PyTree, dtype: Any) -> Float[Array, ""]:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda a: jnp.sum(a, dtype=dtype), tree), jnp.zeros((), dtype))
