"""Exponential time in depth: how long gradient descent takes to fit a product of k factors, as k grows.

The objective, of k scalars or of k matrices of shape (d, d), has no local minima but global ones:

    F(w) = ½ (p − y)²,   p = w₁ ⋯ w_k,   ∂F/∂wᵢ = (w₁ ⋯ wᵢ₋₁) (p − y) (wᵢ₊₁ ⋯ w_k)
    F(W) = ½ ‖P − Y‖²,   P = W₁ ⋯ W_k,   ∂F/∂Wᵢ = (W₁ ⋯ Wᵢ₋₁)ᵀ (P − Y) (Wᵢ₊₁ ⋯ W_k)ᵀ

But it has a plateau at p ≈ 0, the flatter the deeper. `exponential_linear_nets` measures T(k), the number
of steps until F is within a tolerance of its minimum 0, from many random starts at each depth.

| paper         | here                       |
|---------------|----------------------------|
| f(x)          | ½ (x − y)², y the `target` |
| k             | depth                      |
| w₁ … w_k      | `x`, of shape (k,)         |
| η             | `step_size`                |

Source: O. Shamir, *Exponential Convergence Time of Gradient Descent for One-Dimensional Deep Linear Neural
Networks*, COLT 2019 (arXiv 1809.08587): the setting of its theorems, and of its experiments with matrices.

Guarantee: from standard random initializations, and under mild assumptions on f, gradient descent needs a
number of steps that is exponential in k; of scalars, with a probability and constants that are not
verified here.

Departures: f is the squared error only. Gradients are products of what stands before and after a factor,
never p / wᵢ, which fails where it matters, at wᵢ ≈ 0.

What is exact: gradient flow keeps wᵢ² − wⱼ², so the smallest factor moves fastest, and it is the one to
change its sign. From equal factors and a target on the other side it ends at w = 0, never at y. From
"xavier" E log|wᵢ| = −(γ + log 2)/2 = −0.635, so that a typical start has |p| ≈ e^{−0.635 k}, and every other
one is on the wrong side of 0. From "near-identity" only a target below 0 shows anything.

Use it to see whether an optimizer, an initialization or a width is subject to the law. Steps of one
length are not: normalized gradient descent crosses the plateau in a time that hardly grows with k. In
float32 the plateau's gradient underflows from k ≈ 30 on. The product is unrolled in the compiled program:
a second to compile at k = 8, ten at k = 64.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ..core import trees
from ..core.errors import InputError, check_choice, check_count, check_nonnegative, check_positive, is_traced
from ..core.optimizer import optimizer
from ..core.problem import Problem
from ..core.setup import check_key
from ..core.solution import Solution
from ..core.solver import Solver
from ..core.status import Ending
from ..core.stopping import residual
from ..core.sweep import sweep

__all__ = ["INITIALIZATIONS", "DepthSweep", "DepthTimes", "LinearNet", "exponential_linear_nets", "initial_factors"]

INITIALIZATIONS = ("xavier", "xavier-uniform", "near-identity")

_PATH_ROWS = 200


class LinearNet(Problem):
    """½ ‖w₁ ⋯ w_k − target‖² of k factors: an array of shape (k,), or (k, d, d) for matrices.

    **Arguments:** `target` — a number, or a real floating array of shape (d, d).

    **Raises:** `InputError` for a target that is neither or is not finite; when it is asked at factors of
    another shape.
    """

    target: Float[Array, ...]

    def __init__(self, target: Any):
        if isinstance(target, int | float):
            target = np.asarray(target, jax.dtypes.canonicalize_dtype(float))
        is_real = hasattr(target, "dtype") and jnp.issubdtype(target.dtype, jnp.floating)
        if not is_real or target.shape not in ((), 2 * target.shape[:1]):
            raise InputError("target", trees.describe(target), "a real number, or a floating array of shape (d, d)")
        if not is_traced(target) and not np.all(np.isfinite(target)):
            raise InputError("target", target, "finite numbers")
        self.target = target

    def value(self, x: Float[Array, "k ..."]) -> Float[Array, ""]:
        return _half_square(self._error(self._products(x)[-1]))

    def value_and_gradient(self, x: Float[Array, "k ..."]) -> tuple[Float[Array, ""], Float[Array, "k ..."]]:
        """Value and gradient, from the products of what stands before and after each factor."""
        multiply = _multiply(x)
        *before, product = self._products(x)
        error = self._error(product)
        after = accumulate(x[:0:-1], lambda tail, factor: multiply(tail, factor.T), initial=error)
        gradient = [multiply(head.T, tail) for head, tail in zip(before, reversed(list(after)), strict=True)]
        return _half_square(error), jnp.stack(gradient)

    @property
    def lower_bound(self) -> float:
        return 0.0

    def _error(self, product: Float[Array, ...]) -> Float[Array, ...]:
        return product - jnp.asarray(self.target, product.dtype)

    def _products(self, x: Float[Array, "k ..."]) -> list[Float[Array, ...]]:
        """w₁ ⋯ wᵢ for i = 0 … k; the first is the identity."""
        shape = np.shape(self.target)
        is_real = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        if not is_real or x.ndim != 1 + len(shape) or x.shape[1:] != shape:
            expected = f"factors: a real floating array of shape {('k', *shape)}".replace("'", "")
            raise InputError("x0", trees.describe(x), expected)
        one = jnp.eye(*shape, dtype=x.dtype) if shape else jnp.ones((), x.dtype)
        return list(accumulate(x, _multiply(x), initial=one))


def _multiply(x: Float[Array, "k ..."]) -> Callable[[Array, Array], Array]:
    return jnp.multiply if x.ndim == 1 else functools.partial(jnp.matmul, precision="highest")


def _half_square(error: Float[Array, ...]) -> Float[Array, ""]:
    return 0.5 * jnp.sum(error * error)


def initial_factors(
    key: Array | int, depth: int, initialization: str = "xavier", *, scale: float = 0.1, width: int = 1
) -> Float[Array, "k ..."]:
    """Random factors in JAX's default precision: of shape (depth,), or (depth, width, width) above width 1.

    **Arguments:** `initialization` — "xavier", Gaussian with mean 0 and variance 1/width; "xavier-uniform",
    uniform with the same moments; "near-identity", the identity plus `scale` times "xavier".

    **Raises:** `InputError` for another name, and for numbers out of range.
    """
    check_choice("initialization", initialization, INITIALIZATIONS)
    check_count("depth", depth, 1)
    check_count("width", width, 1)
    check_nonnegative("scale", scale)
    shape = (int(depth),) if width == 1 else (int(depth), int(width), int(width))
    return _draw(check_key(key, "the initialization"), scale, shape=shape, initialization=initialization)


@functools.partial(jax.jit, static_argnames=("shape", "initialization"))
def _draw(key: Array, scale: Any, *, shape: tuple[int, ...], initialization: str) -> Array:
    deviation = 1 / math.sqrt(shape[-1]) if len(shape) == 3 else 1.0
    if initialization == "xavier-uniform":
        return deviation * jax.random.uniform(key, shape, minval=-math.sqrt(3), maxval=math.sqrt(3))
    noise = deviation * jax.random.normal(key, shape)
    if initialization == "xavier":
        return noise
    return (jnp.eye(shape[-1]) if len(shape) == 3 else 1.0) + scale * noise


@dataclasses.dataclass(frozen=True)
class DepthTimes:
    """The replicas of one depth.

    **Fields:**
    - `steps`: until the loss was within the tolerance; `cap` + 1 where it never was.
    - `gradient_norms`: at the end of each run. Where it never arrived, a small one means the plateau, a large
      one a step size that is unstable.
    - `overflowed`: how many runs left the finite numbers, as they do from large factors. They never arrived.
    """

    depth: int
    cap: int
    steps: Int[np.ndarray, " replicas"]
    gradient_norms: Float[np.ndarray, " replicas"]
    overflowed: int

    @property
    def censored(self) -> float:
        """The share of the replicas that never arrived, without those that overflowed."""
        return (int(np.sum(self.steps > self.cap)) - self.overflowed) / len(self.steps)

    @property
    def median(self) -> float:
        """The median of the steps, where never is infinite."""
        return self.quantile(0.5)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the steps, where never is infinite."""
        return self.quantile(0.25), self.quantile(0.75)

    def quantile(self, share: float) -> float:
        """The mean of the two order statistics next to a share of the replicas, where never is infinite."""
        times = np.sort(np.where(self.steps <= self.cap, self.steps, np.inf))
        rank = share * (len(times) - 1)
        return float(times[math.floor(rank)] + times[math.ceil(rank)]) / 2


@dataclasses.dataclass(frozen=True)
class DepthSweep:
    """How the number of steps grows with the depth.

    **Fields:**
    - `rows`: the replicas of each depth, in the order given.
    - `path`: one run, that of the median number of steps at the last depth: arrays `"step"`, `"value"` and
      `"gradient_norm"`, of at most 200 looks and the start.
    """

    rows: tuple[DepthTimes, ...]
    path: Mapping[str, np.ndarray]

    def __str__(self) -> str:
        lines = ["depth    median  quartiles          censored  overflowed"]
        for row in self.rows:
            low, high = row.quartiles
            lines.append(
                f"{row.depth:5d}  {row.median:8g}  {low:8g} {high:8g}  {row.censored:8.1%}  {row.overflowed:10d}"
            )
        return "\n".join(lines)


def exponential_linear_nets(
    depths: Sequence[int],
    initialization: str = "xavier",
    *,
    key: Array | int,
    target: float = 1.0,
    solver: Solver | None = None,
    step_size: float = 0.02,
    tolerance: float = 1e-2,
    steps: int = 60_000,
    replicas: int = 100,
    scale: float = 0.1,
    width: int = 1,
) -> DepthSweep:
    """The number of steps to fit a product of factors, for each of several depths (Shamir 2019).

    **Arguments:**
    - `depths`: the numbers of factors k, each at least 1; one program is compiled for each.
    - `initialization`, `scale`, `width`: as for `initial_factors`.
    - `key`: a key of `jax.random`, or a seed. A depth's replicas do not depend on the other depths.
    - `target`: y; for matrices the target is y times the identity, whose determinant has the sign of y where
      the width is odd.
    - `solver`: any, in the place of gradient descent with `step_size`.
    - `tolerance`: the loss at which a run has arrived; `steps`: the cap, at which it has not.
    - `replicas`: random starts of each depth.

    **Returns:** a `DepthSweep`.

    **Raises:** `InputError` for arguments that cannot be used.
    """
    if np.ndim(depths) != 1 or not len(depths):
        raise InputError("depths", depths, "a sequence of at least one depth")
    for depth in depths:
        check_count("depths", depth, 1)
    check_choice("initialization", initialization, INITIALIZATIONS)
    check_positive("step_size", step_size)
    check_positive("tolerance", tolerance)
    check_count("steps", steps, 1)
    check_count("replicas", replicas, 1)
    check_nonnegative("scale", scale)
    check_count("width", width, 1)
    depths, steps, replicas = [int(depth) for depth in depths], int(steps), int(replicas)
    key = check_key(key, "the initialization")
    net = LinearNet(target)
    if np.shape(net.target):
        raise InputError("target", trees.describe(net.target), "a number")
    problem = net if width == 1 else LinearNet(net.target * np.eye(int(width), dtype=net.target.dtype))
    solver = optimizer(optax.sgd, learning_rate=step_size) if solver is None else solver

    def run(depth: int, keys: Any, **options: Any) -> Solution:
        draw = functools.partial(initial_factors, depth=depth, initialization=initialization, scale=scale, width=width)
        return sweep(problem, draw, solver, keys, stop=residual(tolerance), **options)

    rows: list[DepthTimes] = []
    keys: Any = None
    for depth in depths:
        keys = jax.random.split(jax.random.fold_in(key, depth), replicas)
        ends = run(depth, keys, steps=steps, record=())
        endings = np.asarray(ends.status.code)
        if np.any(endings == Ending.INTERRUPTED):
            raise KeyboardInterrupt
        taken = np.where(np.asarray(ends.value) <= tolerance, np.asarray(ends.steps), steps + 1)
        overflowed = int(np.sum(endings == Ending.DIVERGED))
        rows.append(DepthTimes(depth, steps, taken, np.asarray(ends.gradient_norm), overflowed))
    typical = int(np.argsort(rows[-1].steps, kind="stable")[(replicas - 1) // 2])
    length = min(int(rows[-1].steps[typical]), steps)
    example = run(depths[-1], keys[typical : typical + 1], steps=length, every=max(1, -(-length // _PATH_ROWS)))
    path = {name: np.asarray(column) for name, column in example.history.items()}
    return DepthSweep(tuple(rows), {name: a if name == "step" else a[0] for name, a in path.items()})
