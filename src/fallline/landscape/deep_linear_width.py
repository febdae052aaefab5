"""Deep linear networks: how wide they must be for gradient descent to reach a global minimum.

Solves min ℓ = ½ ‖U X − Y‖²_F over the weights of a network without activations or biases,

    U = W_L ⋯ W_1 / √(m^{L−1} d_out),   W_1 of shape (m, d_in), W_L of shape (d_out, m), the others (m, m)
    W_l ← W_l − η ∂ℓ/∂W_l in all layers at once,   ∂ℓ/∂W_l = a (W_L ⋯ W_{l+1})ᵀ (U X − Y) (W_{l−1} ⋯ W_1 X)ᵀ

from entries that are independent and N(0, 1), with a = 1 / √(m^{L−1} d_out). Narrow and deep, it stands
still or diverges; wide, it converges at a rate that knows nothing of the depth.

| paper                    | here                                             |
|--------------------------|--------------------------------------------------|
| L, m                     | `depth`, `width`                                 |
| f(·; W_1 … W_L) = U      | `end_to_end`                                     |
| η = d_out / (3L ‖XᵀX‖₂)  | `step_size`                                      |
| r, κ = λ_max / λ_r       | from `eigenvalues`: those of XᵀX that are not 0  |
| OPT = min_Φ ½ ‖ΦX − Y‖²_F | `DeepLinear.lower_bound`                        |
| 1 − ηLλ_r / (4 d_out)    | `certified_rate`                                 |

Source: S. S. Du and W. Hu, *Width Provably Matters in Optimization for Deep Linear Neural Networks*,
ICML 2019 (arXiv 1901.08572), abstract and main theorem.

Guarantee: for m ≥ C L max{r κ³ d_out (1 + ‖Φ*‖²), r κ³ log(r/δ), log L} with a C that the paper leaves
open, with probability at least 1 − δ, ℓ(t) − OPT ≤ (1 − ηLλ_r / (4 d_out))ᵗ (ℓ(0) − OPT) for all t: O(κ log(1/ε))
steps, whatever the depth. Narrow networks need exp(Ω(L)) steps (Shamir 2019).

Departures: none in the iterates. The abstract was at hand when this was written; the constants in η, in the rate
and in the width are recalled, and confirmed by measurement only. `infinite_width_factor` is not the paper's.

Nobody knows how small C may be: widths far below `required_width(…, C=1)` already work, so never read it
as necessary. The rule for η counts on the concentration that width brings, and m = 1 diverges under it.
The theorem is about gradient descent; `DeepLinear` runs with any solver.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from ..core import trees
from ..core.errors import InputError, check_count, check_fraction, check_nonnegative, check_positive, is_traced
from ..core.optimizer import optimizer
from ..core.problem import Problem
from ..core.setup import check_key
from ..core.status import Ending
from ..core.sweep import sweep

__all__ = [
    "DeepLinear",
    "WidthSweep",
    "certified_rate",
    "deep_linear_width",
    "eigenvalues",
    "end_to_end",
    "infinite_width_factor",
    "initial_weights",
    "required_width",
    "step_size",
]

Weights = Sequence[Float[Array, "rows columns"]]


class DeepLinear(Problem):
    """½ ‖U X − Y‖²_F of a list of weights W_1 … W_L; depth and widths are those of the list.

    Its lower bound is OPT, the least value over all linear maps, which every width of at least
    min(d_in, d_out) attains.

    **Arguments:** `X` of shape (d_in, n) and `Y` of shape (d_out, n): a column for each example.

    **Raises:** `InputError` for data of another kind, and for X = 0; when it is asked at weights whose
    shapes do not lead from d_in to d_out.
    """

    inputs: Float[Array, "d_in n"]
    targets: Float[Array, "d_out n"]
    optimum: Any

    def __init__(self, X: Any, Y: Any):
        residual = np.asarray(Y, np.float64) - best_fit(X, Y)
        trees.check_width("X", X)
        trees.check_width("Y", Y)
        self.inputs, self.targets = X, Y
        self.optimum = np.asarray(0.5 * np.sum(residual**2), jax.dtypes.canonicalize_dtype(float))

    def value(self, x: Weights) -> Float[Array, ""]:
        _check_weights(x, len(self.inputs), len(self.targets))
        residual = jnp.matmul(end_to_end(x), jnp.asarray(self.inputs), precision="highest") - self.targets
        return 0.5 * jnp.sum(residual**2)

    @property
    def lower_bound(self) -> Any:
        return self.optimum


def end_to_end(weights: Weights) -> Float[Array, "d_out d_in"]:
    """The map U of the network.

    Each layer is divided by the root of its number of rows as it is multiplied: the product of the
    weights alone, and m^{(L−1)/2}, overflow float32 at m = 256 and L = 33, their squares at L = 17.
    """
    *others, last = weights
    product = last / math.sqrt(last.shape[0])
    for weight in reversed(others):
        product = jnp.matmul(product, weight, precision="highest") / math.sqrt(weight.shape[0])
    return product


def initial_weights(
    key: Array | int, d_in: int, width: int, depth: int, d_out: int, dtype: Any = float
) -> list[Float[Array, "rows columns"]]:
    """W_1 … W_L with independent N(0, 1) entries; ℓ is of order ‖X‖²_F + ‖Y‖²_F there, whatever the width.

    **Arguments:** `key` — a key of `jax.random`, or a seed; `depth` L counts the matrices.

    **Raises:** `InputError` for sizes below 1.
    """
    for name, size in {"d_in": d_in, "width": width, "depth": depth, "d_out": d_out}.items():
        check_count(name, size, 1)
    sizes = [d_in, *[width] * (depth - 1), d_out]
    keys = jax.random.split(check_key(key, "initial_weights"), depth)
    return [jax.random.normal(k, (b, a), dtype) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)]


# ---- what the theorem says ------------------------------------------------------------------------


def eigenvalues(X: Any) -> Float[np.ndarray, " r"]:
    """The eigenvalues of XᵀX that are not zero, in decreasing order: r of them, κ the first over the last.

    **Raises:** `InputError` where X is no finite real matrix, or zero.
    """
    return _thin_svd(X)[0] ** 2


def best_fit(X: Any, Y: Any) -> Float[np.ndarray, "d_out n"]:
    """Φ* X, the least-squares fit of Y by a linear map of X, in float64.

    **Raises:** `InputError` for arrays that are no finite real matrices with as many columns, and for X = 0.
    """
    columns = _thin_svd(X)[1]
    _check_matrix("Y", Y)
    if np.shape(Y)[1] != np.shape(X)[1]:
        raise InputError("Y", trees.describe(Y), f"{np.shape(X)[1]} columns, as X has")
    return np.asarray(Y, np.float64) @ columns.T @ columns


def step_size(X: Any, depth: int, d_out: int) -> float:
    """The theorem's η = d_out / (3L ‖XᵀX‖₂)."""
    check_count("depth", depth, 1)
    check_count("d_out", d_out, 1)
    return float(d_out / (3 * depth * eigenvalues(X)[0]))


def certified_rate(X: Any, depth: int, d_out: int, step_size: float) -> float:
    """The factor 1 − ηLλ_r / (4 d_out) by which ℓ − OPT falls in each step, if the network is wide enough.

    **Raises:** `InputError` for numbers out of range. Warns where η is above the theorem's.
    """
    per_direction = _per_direction(X, depth, d_out, step_size)
    if (times := 3 * per_direction[0]) > 1 + 1e-6:
        message = f"step_size: {step_size:g} is {times:.4g} times the theorem's; no rate is guaranteed for it"
        warnings.warn(message, stacklevel=2)
    return float(1 - per_direction[-1] / 4)


def infinite_width_factor(X: Any, depth: int, d_out: int, step_size: float) -> float:
    """The factor of ℓ − OPT per step in the slowest direction as m → ∞: max_i (1 − ηLλ_i / d_out)².

    With the theorem's η that is (1 − 1/(3κ))². Weights hardly move then, and the residual in the i-th
    eigendirection of XᵀX is multiplied by 1 − ηLλ_i / d_out in each step.
    """
    return float(np.max((1 - _per_direction(X, depth, d_out, step_size)) ** 2))


def _per_direction(X: Any, depth: int, d_out: int, step_size: float) -> Float[np.ndarray, " r"]:
    """ηLλ_i / d_out, in decreasing order."""
    check_count("depth", depth, 1)
    check_count("d_out", d_out, 1)
    check_positive("step_size", step_size)
    return step_size * depth * eigenvalues(X) / d_out


def required_width(
    depth: int, rank: int, kappa: float, d_out: int, phi_norm: float, delta: float, C: float = 1.0
) -> float:
    """The theorem's width C L max{r κ³ d_out (1 + ‖Φ*‖²), r κ³ log(r/δ), log L}.

    **Arguments:** `rank` r and `kappa` κ of X; `phi_norm` the spectral norm of the least-squares map;
    `delta` δ, the probability of failure; `C`, the theorem's constant, which nobody knows: what counts is how the
    number grows.

    **Raises:** `InputError` for numbers out of range.
    """
    for name, count in {"depth": depth, "rank": rank, "d_out": d_out}.items():
        check_count(name, count, 1)
    check_positive("kappa", kappa)
    if kappa < 1:
        raise InputError("kappa", kappa, "a number of at least 1")
    check_nonnegative("phi_norm", phi_norm)
    for name, number in {"delta": delta, "C": C}.items():
        check_positive(name, number)
    check_fraction("delta", delta)
    spectral = rank * kappa**3
    return C * depth * max(spectral * d_out * (1 + phi_norm**2), spectral * math.log(rank / delta), math.log(depth))


# ---- the sweep ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WidthSweep:
    """Gradient descent over a grid; the leading axes of the arrays are depths, widths, seeds.

    **Fields:**
    - `depths`, `widths`, `seeds`: the grid; `optimum`: OPT.
    - `gaps`: ℓ(t) − OPT before the first step and after each; infinite from where a run diverged.
    - `drift`: ‖W_l(T) − W_l(0)‖₂ / ‖W_l(0)‖₂ of the layer that moved most; infinite where the run diverged.
    - `rate`: the certified factor per step; `limit`: that of infinite width. Neither depends on the depth.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    optimum: float
    gaps: Float[np.ndarray, "depths widths seeds times"]
    drift: Float[np.ndarray, "depths widths seeds"]
    rate: float
    limit: float

    @property
    def ratio(self) -> Float[np.ndarray, "depths widths seeds"]:
        """The final gap over the first."""
        return self.gaps[..., -1] / self.gaps[..., 0]

    @property
    def violations(self) -> Bool[np.ndarray, "depths widths seeds times"]:
        """Where the gap is above what the theorem's bound leaves of the first, rounding apart."""
        left = self.rate ** np.arange(self.gaps.shape[-1])
        return self.gaps > np.maximum(left, self._resolution) * self.gaps[..., :1]

    @property
    def factor(self) -> Float[np.ndarray, "depths widths seeds"]:
        """The factor per step: the geometric mean over all steps before the gap is lost in rounding."""
        relative = self.gaps / self.gaps[..., :1]
        steps = np.maximum(np.sum(relative > self._resolution, axis=-1) - 1, 1)
        return np.take_along_axis(relative, steps[..., None], axis=-1)[..., 0] ** (1 / steps)

    def steps_to(self, target: float) -> Float[np.ndarray, "depths widths seeds"]:
        """Steps until the gap is `target` times the first; infinite where it never was."""
        reached = self.gaps <= target * self.gaps[..., :1]
        return np.where(reached.any(axis=-1), reached.argmax(axis=-1), np.inf)

    def success(self, target: float = 1e-3) -> Float[np.ndarray, "depths widths"]:
        """The share of seeds whose final gap is at most `target` times the first."""
        return np.mean(self.ratio <= target, axis=-1)

    @property
    def _resolution(self) -> float:
        """What rounding leaves of a gap that is a sum of squares, relative to the first."""
        return float(100 * np.finfo(self.gaps.dtype).eps) ** 2


def deep_linear_width(
    X: Any,
    Y: Any,
    *,
    depths: Sequence[int],
    widths: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 300,
    step_scale: float = 1.0,
) -> WidthSweep:
    """Gradient descent on `DeepLinear(X, Y)` at every depth and width, from the weights of every seed.

    **Arguments:**
    - `X` of shape (d_in, n), `Y` of shape (d_out, n); the runs are in X's precision.
    - `depths`, `widths`, `seeds`: the grid; `steps`: taken in each run.
    - `step_scale`: what the theorem's η is multiplied by.

    All seeds of one depth and width run in one compiled loop. The residual of the least-squares fit is
    orthogonal to all that a network can change, so the runs are on the fit in place of Y: the same
    gradients, and ℓ − OPT without cancellation.

    **Raises:** `InputError` for numbers and data that cannot be used. Warns where η is above the theorem's.
    """
    check_positive("step_scale", step_scale)
    depths, widths = _checked("depths", depths, 1), _checked("widths", widths, 1)
    seeds = _checked("seeds", seeds, 0)
    check_count("steps", steps, 1)
    whole = DeepLinear(X, Y)
    problem = DeepLinear(X, best_fit(X, Y).astype(X.dtype))
    d_out = np.shape(Y)[0]
    etas = {depth: step_scale * step_size(X, depth, d_out) for depth in depths}
    first = (X, depths[0], d_out, etas[depths[0]])
    rate, limit = certified_rate(*first), infinite_width_factor(*first)
    cells = [[_cell(problem, depth, width, seeds, steps, etas[depth]) for width in widths] for depth in depths]
    gaps, drift = (np.array([[cell[part] for cell in row] for row in cells]) for part in (0, 1))
    return WidthSweep(depths, widths, seeds, float(whole.optimum), gaps, drift, rate, limit)


def _cell(
    problem: DeepLinear, depth: int, width: int, seeds: tuple[int, ...], steps: int, eta: float
) -> tuple[Float[np.ndarray, "seeds times"], Float[np.ndarray, " seeds"]]:
    """The gaps and the drift of all seeds at one depth and width."""
    d_in, d_out = len(problem.inputs), len(problem.targets)

    def start(key: Array) -> list[Float[Array, "rows columns"]]:
        return initial_weights(key, d_in, width, depth, d_out, problem.inputs.dtype)

    descent = optimizer(optax.sgd, learning_rate=eta)
    end = sweep(problem, start, descent, seeds, steps=steps, stop=None, record=("value",))
    endings, recorded = np.asarray(end.status.code), np.asarray(end.history["value"])
    if np.any(endings == Ending.INTERRUPTED):
        raise KeyboardInterrupt
    diverged = endings == Ending.DIVERGED
    gaps = np.full((len(seeds), steps + 1), np.nan, recorded.dtype)
    gaps[:, : recorded.shape[1]] = recorded
    # A run that ended early has lost its last point, or can no longer leave it.
    gaps = np.where(np.isnan(gaps), np.where(diverged, np.inf, np.asarray(end.value))[:, None], gaps)
    drift = np.full(len(seeds), np.inf)
    for i in np.flatnonzero(~diverged):
        layers = zip(end.x, start(jax.random.key(seeds[i])), strict=True)
        drift[i] = max(_spectral_norm(after[i] - before) / _spectral_norm(before) for after, before in layers)
    return gaps, drift


def _spectral_norm(matrix: Any) -> float:
    matrix = np.asarray(matrix)
    side = min(matrix.shape)
    if side <= 32 or not matrix.any():
        return float(np.linalg.norm(matrix, ord=2))
    # A dense decomposition of every layer would take longer than the descent.
    from scipy.sparse.linalg import svds

    largest: Any = svds(matrix, k=1, v0=np.ones(side, matrix.dtype), return_singular_vectors=False)
    return float(largest[0])


# ---- checks ---------------------------------------------------------------------------------------


def _thin_svd(X: Any) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, "r n"]]:
    """The singular values of X above its rounding, and their right singular vectors as rows."""
    _check_matrix("X", X)
    _, sizes, rows = np.linalg.svd(np.asarray(X, np.float64), full_matrices=False)
    rank = int(np.sum(sizes > max(X.shape) * float(jnp.finfo(X.dtype).eps) * sizes[0]))
    if rank == 0:
        raise InputError("X", f"{trees.describe(X)} of rank 0", "a matrix that is not zero")
    return sizes[:rank], rows[:rank]


def _check_matrix(name: str, matrix: Any) -> None:
    is_real = hasattr(matrix, "dtype") and jnp.issubdtype(matrix.dtype, jnp.floating)
    if is_traced(matrix):
        raise InputError(name, "a traced value", "an array known on the host: its rank decides")
    if not is_real or matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(name, trees.describe(matrix), "a real floating array of two axes, a column for each example")
    if not np.isfinite(np.asarray(matrix)).all():
        raise InputError(name, f"{trees.describe(matrix)} with NaN or infinity", "finite numbers")


def _check_weights(x: Any, d_in: int, d_out: int) -> None:
    shapes = [np.shape(weight) for weight in x] if isinstance(x, list | tuple) else []
    if all(len(shape) == 2 for shape in shapes) and shapes:
        rows, columns = zip(*shapes, strict=True)
        if (d_in, *rows) == (*columns, d_out):
            return
    shown = ", ".join(map(str, shapes)) or type(x).__name__
    raise InputError("x0", shown, f"a list of matrices W_1 … W_L whose product has the shape ({d_out}, {d_in})")


def _checked(name: str, numbers: Sequence[int], least: int) -> tuple[int, ...]:
    listed = np.ravel(numbers).tolist()
    if not listed:
        raise InputError(name, "none", "at least one")
    for number in listed:
        check_count(name, number, least)
    return tuple(map(int, listed))
