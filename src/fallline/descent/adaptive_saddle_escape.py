"""Adaptive saddle escape: RMSProp with a matrix, whose preconditioner makes the gradients' noise isotropic.

Finds a point with |∇f| ≤ τ and λ_min(∇²f) ≥ −√(ρτ) of min E f(x, z), from stochastic gradients g. With A = (E ggᵀ)^(−½)
the noise has variance one in every direction, also in the one that leads out of a saddle, where that of plain SGD may
be tiny. `scale_by_preconditioner` takes A from the user; `scale_by_full_matrix_rms` estimates it:

    Ĝ ← β Ĝ + (1 − β) g gᵀ,   A = (Ĝ / (1 − βᵗ) + ε I)^(−½)        with Ĝ updated first: g is in its own A
    x ← x − η A g,   but x stays for the first W gradients, which only Ĝ sees (burn-in)
    every t_thresh steps one big step, x ← x − r A g with r > η, which the small ones then amplify

| paper             | here                                             |
|-------------------|--------------------------------------------------|
| η, r, t_thresh    | `learning_rate`, `big_learning_rate`, `t_thresh` |
| β, ε, W           | `beta`, `eps`, `burn_in`                         |
| Ĝ                 | `second_moment`, in the state                    |
| ν, Γ              | `nu`, `gamma` of `noise_isotropy`                |

Source: M. Staib, S. J. Reddi, S. Kale, S. Kumar and S. Sra, *Escaping Saddle Points with Adaptive Gradient Methods*,
ICML 2019 (arXiv 1901.09149): preconditioned SGD, RMSProp, its burn-in; the big and small steps are reconstructed.

Guarantee: with E|Ag|² ≤ Γ and A ⪰ λI, η = τ²λ/(LΓ) finds |∇f| ≤ τ in 2LΓ(f(x₀) − f*)/(τ⁴λ²) steps. With the big steps,
a second-order stationary point with high probability, sooner the larger ν = λ_min(A E[ggᵀ] Aᵀ) is: for A = (E ggᵀ)^(−½)
ν = 1 and Γ = d. The paper's exponents were not verified. Ĝ errs by √(1 − β) + η/(1 − β), up to constants and logs;
1 − β = η^(2/3) balances the two at η^(1/3), after W of order η^(−2/3).

Departures: ε, W and t_thresh have no numbers in the paper, the defaults are ours. Ĝ is divided by 1 − βᵗ also without
burn-in, or the first steps are too long by up to 1/√(1 − β), which looks like a fast escape. Also blocks for each leaf.

`blocks="full"` takes d² numbers and an eigendecomposition a step: up to about a thousand parameters. `"diag"` is
RMSProp, whitens only noise along the axes, and leaves noise that is turned by 45° as it is. Rounding turns up in Ĝ at
1e-7 of its largest eigenvalue in float32; a smaller ε amplifies it. Near a minimum the noise is as large as at the
saddle: let the learning rate decay at the end. Compare methods at equal length of the steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.errors import InputError, check_choice, check_count, check_fraction, check_positive, is_traced

__all__ = [
    "Isotropy",
    "adaptive_saddle_escape",
    "balanced_beta",
    "balanced_burn_in",
    "big_small_steps",
    "inverse_square_root",
    "noise_isotropy",
    "scale_by_full_matrix_rms",
    "scale_by_preconditioner",
]

_BLOCKS = ("full", "leaf", "diag")
_MOST_STATE = 2 * 2**30  # bytes of matrices that are held
_MOST_BURN_IN = 10_000


# ---- Algorithm 1: a preconditioner that the user knows ------------------------------------------------------


def scale_by_preconditioner(preconditioner: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """A(x) g for a known A, without the learning rate and its sign, to be chained.

    **Arguments:** `preconditioner` — traceable, from the parameters to one of: a matrix (d, d) on all of them, leaf
    after leaf; a pytree like them, whose leaves are the diagonal, of the leaf's shape, or a matrix (n, n) on its n
    entries. For the paper's choice see `inverse_square_root`.

    **Raises:** `InputError` for what is not callable; in `init`, for parameters that are not real, and for
    any other shape.
    """
    if not callable(preconditioner):
        raise InputError("preconditioner", type(preconditioner).__name__, "a function of the parameters")

    def init(params: PyTree) -> optax.EmptyState:
        _check_real("params", params)
        jax.eval_shape(lambda x: _times(preconditioner(x), x), params)
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise InputError("params", None, "the parameters, of which the preconditioner is a function")
        return _times(preconditioner(params), updates), state

    return optax.GradientTransformation(init, update)


def inverse_square_root(matrix: Float[Array, "n n"], eps: float = 0.0) -> Float[Array, "n n"]:
    """(G + ε I)^(−½) of a symmetric G, whose negative eigenvalues count as zero."""
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors / jnp.sqrt(jnp.maximum(values, 0) + eps)) @ vectors.T


def _times(matrix: PyTree, g: PyTree) -> PyTree:
    """A g, where A is one matrix, or a diagonal or matrix for each leaf."""

    def of_leaf(a: Any, leaf: Array) -> Array:
        if jnp.shape(a) == leaf.shape:
            return (a * leaf).astype(leaf.dtype)
        if jnp.shape(a) == (leaf.size, leaf.size):
            return (a @ leaf.ravel()).reshape(leaf.shape).astype(leaf.dtype)
        raise InputError(
            "preconditioner",
            trees.describe(a),
            f"for a leaf {trees.describe(leaf)} its diagonal, of that shape, or a matrix [{leaf.size},{leaf.size}]",
        )

    if jax.tree.structure(matrix) == jax.tree.structure(g):
        return jax.tree.map(of_leaf, matrix, g)
    d = trees.flat_size(g)
    if getattr(matrix, "shape", None) != (d, d):
        found = ", ".join(trees.describe(a) for a in jax.tree.leaves(matrix)) or "nothing"
        raise InputError("preconditioner", found, f"a matrix [{d},{d}], or a pytree like the parameters")
    whole: Any = matrix
    return trees.unflatten(whole @ trees.flatten(g), g)


# ---- Algorithm 2: the preconditioner from the gradients seen so far -----------------------------------------


class FullMatrixRmsState(NamedTuple):
    """Gradients so far, and Ĝ: (d, d), or (n, n) for each leaf of n entries, or like the parameters (its diagonal)."""

    count: Int[Array, ""]  # type: ignore[assignment]  # the name that Optax's tools look for
    second_moment: PyTree


def scale_by_full_matrix_rms(
    beta: float = 0.99, eps: float = 1e-8, burn_in: int = 0, blocks: str = "full", *, bias_correction: bool = True
) -> optax.GradientTransformation:
    """A_t g_t with A_t = (Ĝ_t + ε I)^(−½), and zero for the first `burn_in` gradients; to be chained.

    **Arguments:**
    - `beta`: decay of Ĝ, in [0, 1); `eps`: above 0, inside the root; `burn_in`: W, at least 0.
    - `blocks`: `"full"`, one matrix on all parameters; `"leaf"`, one for each array; `"diag"`, squares only.
    - `bias_correction`: whether Ĝ is divided by 1 − βᵗ.

    Ĝ is held in at least float32. `eps` is inside the root: `optax.scale_by_rms` with `bias_correction` is `"diag"`.

    **Raises:** `InputError` for numbers out of range; in `init`, for parameters that are not real, and where the
    matrices would take more than 2 GiB.
    """
    check_fraction("beta", beta)
    check_positive("eps", eps)
    check_count("burn_in", burn_in, 0)
    check_choice("blocks", blocks, _BLOCKS)

    def init(params: PyTree) -> FullMatrixRmsState:
        _check_real("params", params)
        vectors = _vectors(params, blocks)
        if blocks != "diag":
            _check_memory(vectors, blocks)
        zeros = jnp.zeros_like if blocks == "diag" else lambda v: jnp.zeros((v.size, v.size), v.dtype)
        second = jax.tree.map(zeros, vectors)
        return FullMatrixRmsState(jnp.zeros((), jnp.int32), second)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, FullMatrixRmsState]:
        del params
        count, vectors = jnp.asarray(optax.safe_increment(state.count)), _vectors(updates, blocks)
        second = jax.tree.map(lambda G, g: _averaged(G, g, beta), state.second_moment, vectors)
        # 1 − βᵗ, of the β that rounding leaves.
        weight = -jnp.expm1(count * jnp.log1p(-jnp.asarray(1 - beta, float))) if bias_correction else jnp.ones(())
        scaled = jax.tree.map(lambda G, g: _whitened(G, g, weight, eps, count > burn_in), second, vectors)
        return _like(scaled, updates, blocks), FullMatrixRmsState(count, second)

    return optax.GradientTransformation(init, update)


def _averaged(G: Array, g: Array, beta: Any) -> Array:
    """β Ĝ + (1 − β) g gᵀ, or its diagonal where Ĝ has the shape of g."""
    square = jnp.square(g) if G.shape == g.shape else jnp.outer(g, g)
    return jnp.asarray(beta, G.dtype) * G + jnp.asarray(1 - beta, G.dtype) * square


def _whitened(G: Array, g: Array, weight: Any, eps: Any, active: Array) -> Array:
    """(Ĝ/weight + ε I)^(−½) g, or zero where not `active`; times zero, so that NaN remains."""
    scale, eps = (1 / weight).astype(G.dtype), jnp.asarray(eps, G.dtype)
    if G.shape == g.shape:
        return g * (active * jax.lax.rsqrt(scale * G + eps))

    def apply(G: Array, g: Array) -> Array:
        values, vectors = jnp.linalg.eigh(G)
        # Rounding makes eigenvalues of a nearly singular Ĝ negative.
        return vectors @ ((g @ vectors) / jnp.sqrt(scale * jnp.maximum(values, 0) + eps))

    return jax.lax.cond(active, apply, lambda G, g: 0 * g, G, g)


def _vectors(tree: PyTree, blocks: str) -> PyTree:
    """What Ĝ has a block for, in at least float32: everything as one vector, each leaf as one, or the leaves."""
    if blocks == "full":
        return trees.flatten(tree) if jax.tree.leaves(tree) else jnp.zeros(0)
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32)), tree)
    return wide if blocks == "diag" else jax.tree.map(jnp.ravel, wide)


def _like(vectors: PyTree, like: PyTree, blocks: str) -> PyTree:
    """Inverse of `_vectors`, in the dtypes of `like`."""
    if blocks == "full":
        return trees.unflatten(vectors, like)
    return jax.tree.map(lambda v, a: v.reshape(jnp.shape(a)).astype(jnp.result_type(a)), vectors, like)


# ---- steps and defaults -------------------------------------------------------------------------------------


def balanced_beta(step_size: Any) -> Any:
    """1 − η^(2/3), which balances the noise of Ĝ with its lag."""
    return 1 - step_size ** (2 / 3)


def balanced_burn_in(beta: Any) -> Any:
    """W = ⌈ln 100 / (1 − β)⌉, after which Ĝ has forgotten its start to 1%; at most 10,000."""
    if is_traced(beta):
        return jnp.minimum(jnp.ceil(math.log(100) / (1 - beta)), _MOST_BURN_IN)
    return min(math.ceil(math.log(100) / (1 - beta)), _MOST_BURN_IN)


def big_small_steps(
    eta: optax.ScalarOrSchedule, r: optax.ScalarOrSchedule, t_thresh: int
) -> Callable[[Any], Float[Array, ""]]:
    """The schedule of the second-order theorem: r at counts 0, t_thresh, 2 t_thresh, …, and η at all others.

    **Arguments:** `eta`, `r`: above 0, or schedules; r at most η warns; `t_thresh`: at least 1.

    **Raises:** `InputError` for numbers out of range.
    """
    _check_steps({"eta": eta, "r": r}, t_thresh)
    return _alternating(eta, r, t_thresh)


def _alternating(eta: Any, r: Any, t_thresh: Any) -> Callable[[Any], Array]:
    def schedule(count: Any) -> Array:
        small, big = (jnp.asarray(s(count) if callable(s) else s) for s in (eta, r))
        return jnp.where(count % jnp.asarray(t_thresh, jnp.int32) == 0, big, small)

    return schedule


def adaptive_saddle_escape(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    big_learning_rate: optax.ScalarOrSchedule | None = None,
    t_thresh: int = 100,
    beta: float | None = None,
    eps: float = 1e-8,
    burn_in: int | None = None,
    blocks: str = "full",
    *,
    bias_correction: bool = True,
) -> optax.GradientTransformation:
    """Full-matrix RMSProp with burn-in (Staib et al. 2019), and with big steps where `big_learning_rate` is given.

    **Arguments:** as for `scale_by_full_matrix_rms`, and
    - `learning_rate`: η; `big_learning_rate`: r, above η. Numbers, or schedules of the steps after the burn-in.
    - `t_thresh`: steps from one big step to the next, of order ln(…)/(η |λ_min|) at a saddle.
    - `beta`: by default 1 − η^(2/3); `burn_in`: by default ⌈ln 100 / (1 − β)⌉, at most 10,000.

    **Raises:** `InputError` for numbers out of range, and for a schedule without `beta`; r at most η warns.
    """
    _check_steps({"learning_rate": learning_rate, "big_learning_rate": big_learning_rate}, t_thresh)
    if beta is None:
        if callable(learning_rate):
            raise InputError("beta", None, "a number, where the learning rate is a schedule")
        if not is_traced(learning_rate) and learning_rate > 1:
            raise InputError("beta", None, f"a number: 1 − η^(2/3) is negative at the learning rate {learning_rate}")
        beta = balanced_beta(learning_rate)
    check_fraction("beta", beta)
    wait: Any = balanced_burn_in(beta) if burn_in is None else burn_in
    estimate = scale_by_full_matrix_rms(beta, eps, wait, blocks, bias_correction=bias_correction)  # type: ignore[arg-type]
    if big_learning_rate is None and not callable(learning_rate):
        return optax.chain(estimate, optax.scale_by_learning_rate(learning_rate))
    big = learning_rate if big_learning_rate is None else big_learning_rate
    steps = _alternating(learning_rate, big, t_thresh)

    def after_burn_in(count: Any) -> Array:
        return steps(jnp.maximum(count - jnp.asarray(wait, jnp.int32), 0))

    return optax.chain(estimate, optax.scale_by_learning_rate(after_burn_in))


# ---- the noise ----------------------------------------------------------------------------------------------


class Isotropy(NamedTuple):
    """What the paper's theorem asks of the noise: ν = λ_min(A E[ggᵀ] Aᵀ), Γ = E|Ag|², and E⟨v, Ag⟩² along a unit v."""

    nu: Float[Array, ""]
    gamma: Float[Array, ""]
    along: Float[Array, ""] | None

    @property
    def share(self) -> Float[Array, ""] | None:
        """E⟨v, Ag⟩²/E|Ag|², which no step size changes: 1/d where the noise is isotropic."""
        return None if self.along is None else self.along / self.gamma


def noise_isotropy(
    gradients: PyTree, preconditioner: PyTree | None = None, direction: PyTree | None = None
) -> Isotropy:
    """How isotropic stochastic gradients at one point are, with a preconditioner or without.

    **Arguments:**
    - `gradients`: a pytree like the parameters with a leading axis of samples: `FiniteSum.per_example_gradients`, or
      minibatch gradients that were drawn again and again. With fewer samples than coordinates ν is 0.
    - `preconditioner`: A at this point, as `scale_by_preconditioner` takes it; none is plain SGD.
    - `direction`: v, a pytree like the parameters; `Certificate.direction` is the way out of a saddle.

    **Raises:** `InputError` for shapes that do not fit, a direction of norm zero, and where the matrix of all
    coordinates would take more than 2 GiB.
    """
    _check_real("gradients", gradients)
    leaves = jax.tree.leaves(gradients)
    if not leaves or any(not jnp.ndim(a) or jnp.shape(a)[:1] != jnp.shape(leaves[0])[:1] for a in leaves):
        raise InputError("gradients", [trees.describe(a) for a in leaves], "arrays with one leading axis of samples")
    if not len(leaves[0]):
        raise InputError("gradients", trees.describe(leaves[0]), "at least one sample")
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), gradients)
    _check_memory(jax.eval_shape(trees.flatten, one), "full", "gradients", "of fewer coordinates")
    return _isotropy(gradients, preconditioner, None if direction is None else _unit(direction, one))


@jax.jit
def _isotropy(gradients: PyTree, preconditioner: PyTree | None, v: Array | None) -> Isotropy:
    if preconditioner is not None:
        gradients = jax.vmap(lambda g: _times(preconditioner, g))(gradients)
    samples = jax.vmap(trees.flatten)(gradients)
    smallest = jnp.linalg.eigvalsh(samples.T @ samples / len(samples))[0]
    gamma = jnp.mean(jnp.sum(samples**2, axis=1))
    return Isotropy(jnp.maximum(smallest, 0), gamma, None if v is None else jnp.mean((samples @ v) ** 2))


def _unit(direction: PyTree, like: PyTree) -> Array:
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(like)]
    if [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(direction)] != shapes:
        found = [trees.describe(a) for a in jax.tree.leaves(direction)]
        raise InputError("direction", found, "a pytree like one of the gradients")
    v = trees.flatten(direction)
    size = jnp.linalg.norm(v)
    if not is_traced(size) and not size > 0:
        raise InputError("direction", f"norm {size}", "a direction of positive norm")
    return v / size


# ---- what is refused ----------------------------------------------------------------------------------------


def _check_real(name: str, tree: PyTree) -> None:
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(name, trees.describe(leaf), "real floating arrays")


def _check_memory(vectors: PyTree, blocks: str, name: str = "params", instead: str = "") -> None:
    """Refuse matrices above the cap before anything is allocated, with what they would take."""
    sizes = [(v.size, v.dtype.itemsize) for v in jax.tree.leaves(vectors)]
    held = sum(n * n * width for n, width in sizes)
    if held > _MOST_STATE:
        most = max(n for n, _ in sizes)
        smaller = 'with blocks="diag", or with blocks="leaf" where every array is small'
        raise InputError(
            name,
            f'{most:,} coordinates in one block of blocks="{blocks}", {held / 2**30:.3g} GiB of matrices',
            f"at most {_MOST_STATE / 2**30:g} GiB: {instead or smaller}",
        )


def _check_steps(sizes: dict[str, Any], t_thresh: Any) -> None:
    """Step sizes above 0 and in order, by name: the small one, the big one."""
    for name, size in sizes.items():
        if size is not None and not callable(size):
            check_positive(name, size)
    check_count("t_thresh", t_thresh, 1)
    (small, eta), (big, r) = sizes.items()
    known = not any(size is None or callable(size) or is_traced(size) for size in (eta, r))
    if known and float(np.asarray(r)) <= float(np.asarray(eta)):
        warnings.warn(f"{big}: got {r}, not above {small} = {eta}; the big steps are no kick", stacklevel=3)
