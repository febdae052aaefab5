"""TopK SGD: each worker sends the K largest entries of its step, and keeps the rest for later.

    worker p:   acc^p = ε^p_t + α_t G^p(v_t),   sends TopK(acc^p),   ε^p_{t+1} = acc^p − TopK(acc^p)
    all:        v_{t+1} = v_t − 1/P Σ_p TopK(acc^p)

| paper | here             |
|-------|------------------|
| v     | `x`              |
| α_t   | `step_size`      |
| K     | `k` or `density` |
| x_t   | `virtual`        |
| ξ_t   | `xi`             |

Source: D. Alistarh, T. Hoefler, M. Johansson, S. Khirirat, N. Konstantinov and C. Renggli, *The Convergence of
Sparsified Gradient Methods*, NeurIPS 2018 (arXiv 1809.10505), Algorithm 1 and Assumption 1.

Guarantee: non-convex and smooth, with steps that decrease and fulfil Σ_k (2γ²)^k α²_{t−k}/α_t² ≤ D, γ² = 1 − K/n: the
weighted mean of E‖∇f(v_t)‖² is at most 4(f(x_0) − f*)/Σ α_t + (2LM² + 4L²M²(1 + ξ/γ)² D) Σ α_t²/Σ α_t, constants as
recalled. The condition asks for K > n/2 on paper; gradients are skewed, so that far smaller K do.

Departures: none. Selection is global; for one in each layer build the `Round` with `Split(TopK(…), sizes)`.

Use it where messages of all to all are slow, and with a step size that changes: what is kept back was scaled when it
was computed. In `double_squeeze` it is scaled when it is sent. `dense_shadow` measures along a run what the analysis
assumes; the assumption that ξ is a constant is the one to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.calls import Calls
from ..core.errors import InputError, check_positive
from ..core.problem import Problem
from ..core.solver import Solver, State
from ..core.stopping import StoppingRule
from ..parts.codecs import Plain, TopK
from ..parts.feedback import ErrorFeedback
from .aggregators import Mean
from .round import Round, RoundState
from .rules import Adopt, Gradient, Step
from .sharded import Sharded

__all__ = ["DenseShadow", "dense_shadow", "topk_sparsified"]


def topk_sparsified(
    step_size: float | Callable[[Any], Any], k: int | None = None, *, density: float | None = None, **options: Any
) -> Round:
    """TopK SGD (Alistarh et al. 2018, Algorithm 1), a solver of `Sharded` problems.

    **Arguments:**
    - `step_size`: α_t, a number or a schedule `round -> number`; it multiplies before the selection.
    - `k`, `density`: K, or the share of all entries, at least one; one of the two.
    - `options`: channel, attack, reads and blocks, as for `Round`.

    **Raises:** `InputError` for a step size that is not positive, for a K that is none, and as `Round` does.
    """
    if not callable(step_size):
        check_positive("step_size", step_size)
    return Round(
        worker=Gradient(step_size),
        uplink=ErrorFeedback(TopK(k, density=density)),
        aggregator=Mean(),
        downlink=None,
        server=Step(optax.sgd, learning_rate=1.0),
        label="TopK SGD",
        **options,
    )


def dense_shadow(solver: Round) -> DenseShadow:
    """The same run, with the dense iterate of the paper's analysis beside it: x_{t+1} = x_t − α_t/P Σ_p G^p(v_t).

    Its state has, to be recorded:
    - `virtual`: x_t, and `gap`: ‖v_t − x_t‖;
    - `identity_error`: the largest entry of |v_t − x_t − 1/P Σ_p ε^p_t|, which is rounding;
    - `xi`: ξ = ‖TopK(1/P Σ_p acc^p) − 1/P Σ_p TopK(acc^p)‖ / ‖α/P Σ_p G^p‖ of the last round, Assumption 1;
    - `left_out`: ‖g − TopK(g)‖ / ‖g‖ of the last dense step g = α/P Σ_p G^p, at most γ = √(1 − K/n);
    - `lemma_ratio`: ‖v_{t+1} − x_{t+1}‖ over the lemma's bound γ‖v_t − x_t‖ + (γ + ξ)‖x_{t+1} − x_t‖, at most 1.

    Workers are asked for their gradients twice, and both are counted.

    **Arguments:** `solver` — a `topk_sparsified`.

    **Raises:** `InputError` for another solver, or one with blocks, a channel, an attack or stale reads.
    """
    if not isinstance(solver, Round) or not _is_plain(solver):
        got = getattr(solver, "name", type(solver).__name__)
        raise InputError("solver", got, "a topk_sparsified without blocks, channel, attack and reads")
    return DenseShadow(solver)


def _is_plain(solver: Round) -> bool:
    link = solver.uplink
    sends = isinstance(solver.worker, Gradient) and isinstance(link, ErrorFeedback) and isinstance(link.codec, TopK)
    extras = solver.downlink, solver.channel, solver.attack, solver.reads
    return sends and solver.blocks == 1 and all(part is None for part in extras)


class ShadowState(State):
    """`x` is v_t; `inner` is the state of the round. The rest is of the last round, see `dense_shadow`."""

    batch_value: Float[Array, ""]
    virtual: PyTree
    gap: Float[Array, ""]
    identity_error: Float[Array, ""]
    xi: Float[Array, ""]
    left_out: Float[Array, ""]
    lemma_ratio: Float[Array, ""]
    inner: RoundState


class DenseShadow(Solver):
    """See `dense_shadow`."""

    needs: ClassVar[frozenset[str]] = Round.needs

    solver: Round

    @property
    def name(self) -> str:
        return self.solver.name

    def check(self, problem: Problem, x: PyTree) -> None:
        self.solver.check(problem, x)

    def stopping(self) -> StoppingRule | None:
        return self.solver.stopping()

    def cause(self, problem: Problem, state: ShadowState, *, key: Array | None) -> str:
        return self.solver.cause(problem, state.inner, key=key)

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> ShadowState:
        zero, inner = jnp.zeros((), trees.real_dtype(x)), self.solver.init(problem, x, key=key)
        return ShadowState(x, Calls(), zero, x, zero, zero, zero, zero, zero, inner)

    def step(self, problem: Problem, state: ShadowState, *, key: Array | None) -> ShadowState:
        assert isinstance(problem, Sharded)
        inner = self.solver.step(problem, state.inner, key=key)
        dense = self._dense_step(problem, state.inner, key)
        virtual = jax.tree.map(jnp.subtract, state.virtual, dense)
        before, after = _mean_memory(state.inner), _mean_memory(inner)
        gap = trees.flatten(inner.x) - trees.flatten(virtual)
        xi, left_out, ratio = self._analysis(before, after, trees.flatten(dense))
        asked, dtype = self.solver.worker.calls(problem), gap.dtype
        return ShadowState(
            x=inner.x,
            calls=state.calls + asked + asked,
            batch_value=inner.batch_value,
            virtual=virtual,
            gap=jnp.linalg.norm(gap),
            identity_error=jnp.max(jnp.abs(gap - after)).astype(dtype),
            xi=xi.astype(dtype),
            left_out=left_out.astype(dtype),
            lemma_ratio=ratio.astype(dtype),
            inner=inner,
        )

    def _dense_step(self, problem: Sharded, inner: RoundState, key: Array | None) -> PyTree:
        """α_t/P Σ_p G^p(v_t), by a round that sends everything and adopts the mean."""
        plain = Round(self.solver.worker, Plain(), Mean(), None, Adopt())
        begun = plain.init(problem, inner.x, key=None)
        return plain.step(problem, eqx.tree_at(lambda s: s.rounds, begun, inner.rounds), key=key).x

    def _analysis(self, before: Array, after: Array, g: Array) -> tuple[Array, Array, Array]:
        """ξ, ‖g − TopK(g)‖/‖g‖ and the ratio of the lemma, of a round with these mean memories and dense step."""
        assert isinstance(self.solver.uplink, ErrorFeedback)
        codec, n = self.solver.uplink.codec, len(g)
        assert isinstance(codec, TopK)

        def top(v: Array) -> Array:
            return codec.decode(codec.encode(v), n)

        size, total = jnp.linalg.norm(g), before + g
        xi = _over(jnp.linalg.norm(top(total) - (total - after)), size)
        gamma = jnp.sqrt(1 - codec.count(n) / n)
        bound = gamma * jnp.linalg.norm(before) + (gamma + xi) * size
        return xi, _over(jnp.linalg.norm(g - top(g)), size), _over(jnp.linalg.norm(after), bound)


def _mean_memory(state: RoundState) -> Float[Array, " n"]:
    """1/P Σ_p ε^p."""
    assert state.uplink is not None
    return jnp.mean(state.uplink[:, 0], axis=0)


def _over(a: Array, b: Array) -> Array:
    """a / b, and a where b is 0 (and a with it)."""
    return a / jnp.where(b > 0, b, 1)
