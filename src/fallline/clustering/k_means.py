"""The k-means problem, Lloyd's algorithm for it, and k-means++ seeds.

Points x₁ … xₙ in ℝᵈ, centers Θ = (θ₁ … θₖ), a point of shape (k, d):

    f(Θ) = Σᵢ minⱼ ‖xᵢ − θⱼ‖²,   ∂f/∂θⱼ = 2 Σ (θⱼ − xᵢ) over the xᵢ nearest to θⱼ

Lloyd moves each center to the mean of the points nearest to it, which minimizes f at fixed
assignments: f never rises, and after finitely many steps the assignments repeat. k-means++ draws each
seed among the points with probability in proportion to the squared distance from the nearest seed so far.

Sources: S. P. Lloyd, *Least Squares Quantization in PCM*, IEEE Transactions on Information Theory 28
(1982); D. Arthur and S. Vassilvitskii, *k-means++: The Advantages of Careful Seeding*, SODA 2007,
Section 2.2: seeds whose expected f is at most 8 (ln k + 2) times the minimum.

Squared distances are sums of squared differences. The expansion ‖x‖² − 2xᵀθ + ‖θ‖² by a matrix product
is several times as fast on large data, and in float32 its rounding hides clusters that are narrow against
their distance from the origin. A center without points stays where it is; ties go to the first center.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..core import trees
from ..core.calls import Calls
from ..core.errors import InputError, check_count
from ..core.problem import Problem
from ..core.setup import check_key
from ..core.solver import GRADIENT, Solver, State
from ..core.stopping import StoppingRule

__all__ = ["KMeans", "Pass", "assign", "k_means_plus_plus", "lloyd", "look"]


class KMeans(Problem):
    """The k-means objective of centers, an array of shape (k, d), over the rows of `data`.

    Offers the oracle `squared_distances`: methods that ask for it find the points in `data`.

    **Arguments:** `data` — real floating array of shape (n, d).

    **Raises:** `InputError` for data of another kind; when it is asked at centers of another shape than
    (k, d) with 1 ≤ k ≤ n.
    """

    oracles: ClassVar[frozenset[str]] = Problem.oracles | {"squared_distances"}

    data: Float[Array, "n d"]

    def __init__(self, data: Any):
        _check_points("data", data)
        self.data = data

    def squared_distances(self, x: Float[Array, "k d"]) -> Float[Array, "n k"]:
        """‖xᵢ − θⱼ‖², in at least float32: one pass over the data."""
        _check_centers("x0", x, self.data)
        return _squared_distances(jnp.asarray(self.data), x)

    def value(self, x: Float[Array, "k d"]) -> Float[Array, ""]:
        return jnp.sum(jnp.min(self.squared_distances(x), axis=1))

    def value_and_gradient(self, x: Float[Array, "k d"]) -> tuple[Float[Array, ""], Float[Array, "k d"]]:
        """Value and gradient, one pass; where a point has two nearest centers, the first one's share."""
        here = look(self, x)
        return here.value, here.gradient

    @property
    def lower_bound(self) -> float:
        return 0.0


class Pass(NamedTuple):
    """What one pass over the data tells of centers.

    The squared distances, the index of the nearest center for each point, and value and gradient of the
    k-means objective.
    """

    squared_distances: Float[Array, "n k"]
    labels: Int[Array, " n"]
    value: Float[Array, ""]
    gradient: Float[Array, "k d"]


def look(problem: KMeans, x: Float[Array, "k d"]) -> Pass:
    """One call of the oracle `squared_distances`, and what follows from it."""
    distances = problem.squared_distances(x)
    labels = jnp.argmin(distances, axis=1).astype(jnp.int32)
    sums, sizes = _sums(problem.data, labels, x)
    gradient = (2 * (sizes * x - sums)).astype(x.dtype)
    return Pass(distances, labels, jnp.sum(jnp.min(distances, axis=1)), gradient)


def _sums(
    data: Any, labels: Int[Array, " n"], x: Float[Array, "k d"]
) -> tuple[Float[Array, "k d"], Float[Array, "k 1"]]:
    """The sum of the points of each center, and how many they are."""
    points = jnp.asarray(data, jnp.promote_types(trees.real_dtype(x), data.dtype))
    sizes = jax.ops.segment_sum(jnp.ones_like(points[:, :1]), labels, len(x))
    return jax.ops.segment_sum(points, labels, len(x)), sizes


def _means(data: Any, labels: Int[Array, " n"], x: Float[Array, "k d"]) -> Float[Array, "k d"]:
    """The mean of the points of each center; the center itself where it has none."""
    sums, sizes = _sums(data, labels, x)
    return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), x).astype(x.dtype)


class LloydState(State):
    """`value` and `gradient_norm` are of `x`, `labels` say which of its centers is nearest to each point."""

    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    labels: Int[Array, " n"]
    done: Bool[Array, ""]


class Lloyd(Solver):
    """See `lloyd`."""

    needs: ClassVar[frozenset[str]] = frozenset({"squared_distances"})

    def stopping(self) -> StoppingRule | None:
        return None  # the repeated assignment is exact

    def init(self, problem: Any, x: Float[Array, "k d"], *, key: Array | None) -> LloydState:
        return _lloyd_state(x, look(problem, x), GRADIENT, jnp.bool_(False))

    def step(self, problem: Any, state: LloydState, *, key: Array | None) -> LloydState:
        x = _means(problem.data, state.labels, state.x)
        here = look(problem, x)
        return _lloyd_state(x, here, state.calls + GRADIENT, jnp.all(here.labels == state.labels))


def _lloyd_state(x: Float[Array, "k d"], here: Pass, calls: Calls, done: Bool[Array, ""]) -> LloydState:
    return LloydState(x, calls, here.value, trees.norm(here.gradient), here.labels, done)


def lloyd() -> Lloyd:
    """Lloyd's algorithm for a `KMeans` problem; the starting point is the seeds, of shape (k, d).

    A step moves each center to the mean of its points and is one pass over the data, counted as one
    gradient: value and gradient of the new centers come out of the same distances. The run ends by the
    method's own test, when a step left every assignment as it was: then the centers are the means of
    their points. A center without points stays where it is.
    """
    return Lloyd()


def k_means_plus_plus(key: Array | int, data: Any, k: int) -> Float[Array, "k d"]:
    """`k` seeds among the rows of `data`: k-means++, one candidate a draw.

    **Arguments:** `key` — a key of `jax.random`, or a seed; `data` of shape (n, d), real; `k` from 1 to n.

    Where fewer than `k` rows differ, the seeds beyond them are drawn uniformly.

    **Raises:** `InputError` for data of another kind, and for `k` out of range.

    **Source:** Arthur and Vassilvitskii (2007), Section 2.2. scikit-learn draws several candidates at each
    turn and keeps the best of them, which is another algorithm.
    """
    _check_points("data", data)
    check_count("k", k, 1)
    if k > len(data):
        raise InputError("k", k, f"at most the number of points, {len(data)}")
    return _draw_seeds(check_key(key, "k-means++"), jnp.asarray(data), k=int(k))


@functools.partial(jax.jit, static_argnames="k")
def _draw_seeds(key: Array, data: Float[Array, "n d"], *, k: int) -> Float[Array, "k d"]:
    def distances_from(i: Int[Array, ""]) -> Float[Array, " n"]:
        return _squared_distances(data, data[i][None])[:, 0]

    def draw(nearest: Float[Array, " n"], key: Array) -> tuple[Float[Array, " n"], Int[Array, ""]]:
        i = jax.random.categorical(key, jnp.where(jnp.max(nearest) > 0, jnp.log(nearest), 0.0))
        return jnp.minimum(nearest, distances_from(i)), i

    first, *others = jax.random.split(key, k)
    i = jax.random.randint(first, (), 0, len(data))
    if not others:
        return data[i][None]
    chosen = jax.lax.scan(draw, distances_from(i), jnp.stack(others))[1]
    return data[jnp.concatenate([i[None], chosen])]


def assign(centers: Any, data: Any) -> Int[Array, " n"]:
    """The index of the nearest center, for each row of `data`; ties go to the first.

    **Raises:** `InputError` for arrays that are not real or whose shapes are not (k, d) and (n, d).
    """
    _check_points("data", data)
    _check_points("centers", centers)
    if np.shape(centers)[1] != np.shape(data)[1]:
        raise InputError("centers", trees.describe(centers), f"rows of length {np.shape(data)[1]}, as the data have")
    return _nearest(jnp.asarray(centers), jnp.asarray(data))


@jax.jit
def _nearest(centers: Float[Array, "k d"], data: Float[Array, "n d"]) -> Int[Array, " n"]:
    return jnp.argmin(_squared_distances(data, centers), axis=1).astype(jnp.int32)


def _squared_distances(data: Float[Array, "n d"], centers: Float[Array, "k d"]) -> Float[Array, "n k"]:
    wide = jnp.promote_types(trees.real_dtype(centers), data.dtype)
    return jnp.sum((data.astype(wide)[:, None] - centers.astype(wide)) ** 2, axis=-1)


def _check_points(name: str, points: Any) -> None:
    """Refuse anything but a real floating array of shape (rows, d), neither of them 0, without NaN."""
    is_real = hasattr(points, "dtype") and jnp.issubdtype(points.dtype, jnp.floating)
    if not is_real or points.ndim != 2 or 0 in points.shape:
        raise InputError(name, trees.describe(points), "a real floating array of shape (rows, d)")
    trees.check_width(name, points)
    trees.check_no_nan(name, points)


def _check_centers(name: str, x: Any, data: Any) -> None:
    n, d = np.shape(data)
    is_real = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    if not is_real or x.ndim != 2 or x.shape[1] != d or not 1 <= x.shape[0] <= n:
        raise InputError(name, trees.describe(x), f"centers: a real floating array of shape (k, {d}), k from 1 to {n}")
