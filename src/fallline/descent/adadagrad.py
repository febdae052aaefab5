"""AdAdaGrad and AdAdaGradNorm: AdaGrad with batches that grow as the gradient falls below their noise.

Solves min F(x) = E f(x; z) for smooth F, over the examples of a `FiniteSum`. Step k has a batch of b_k examples, of
gradients g_i and mean g:

    s ← s + |g|²,   x ← x − α g/√s             (AdAdaGradNorm: one scalar s, s₀ = b₀² > 0)
    s ← s + g²,     x ← x − α g/(√s + ε)       (AdAdaGrad: in each coordinate); or any other Optax optimizer
    b_{k+1} = min(b_max, max(b_k, ⌈candidate⌉))

where the candidate is that of a test on the same batch, over all parameters together (`parts/batch_size.py`):

| paper                     | here                                   | candidate                                   |
|---------------------------|----------------------------------------|---------------------------------------------|
| norm test, η              | `NormTest(eta)`                        | V / (η² |g|²)                               |
| inner product test, ϑ     | `InnerProductTest(theta)`              | Var_i ⟨g_i, g⟩ / (ϑ² |g|⁴)                  |
| augmented, with ν         | `InnerProductTest(theta, nu)`          | the larger of that and V_across / (ν² |g|²) |
| coordinate-wise norm test | `CoordinateTest(eta)`                  | max_j Var_i g_ij / (η² g_j²)                |
| α, s₀                     | `learning_rate`, `initial_accumulator` |                                             |
| b₀, b_max                 | `batch_size`, `max_batch_size`         |                                             |

Source: T. T.-K. Lau, H. Liu and M. Kolar, *AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods*,
2024 (arXiv 2402.11215), AdAdaGrad and AdAdaGradNorm; defaults and the order of a step after the authors' code.

Guarantee: where the test holds for the true variance and gradient, min_k |∇F(x_k)|² = O(1/K) with high probability,
without knowing the smoothness or the noise; with the coordinate-wise test for AdAdaGrad. Recalled from the abstract,
the theorem's constants not verified.

Departures: none from the formulas. The authors' code adds the tests up over parameter tensors, and keeps an accumulator
for each row in place of the scalar s; here both are of the whole vector, as in the paper. ε = 1e-10 is PyTorch's.
`optax.adagrad` has ε inside the root and keeps s in the parameters' dtype, hence `adagrad`.

The gradient is accumulated over ⌈b/m⌉ micro-batches, m the problem's `batch_size`: nothing is compiled again for
another b, and a step works on ⌈b/m⌉ · m examples. `calls.minibatch` counts micro-batches: one pass for each step, in
which norm and coordinate-wise tests ask the gradient of each example, and a second one where an inner-product test is
made, which needs ⟨g_i, g⟩ for the final g: a directional derivative of the losses, forward. For a large model the first
takes many times a plain pass (ten times for 200,000 parameters on a processor), the second about one:
`InnerProductTest(theta)` is the cheapest test, and `test_interval` spreads the others.

Use it where the noise of small batches is what limits you at the end, and large batches are cheap for each example. For
a small fixed budget of examples a strict test (η ≤ 0.5) spends them on few large batches. Near a stationary point |g|²
is mostly noise, and tests pass too easily.
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
from ..core.errors import InputError, check_nonnegative, check_positive, is_traced
from ..core.optimizer import Optimizer, optimizer
from ..core.problem import FiniteSum
from ..core.solver import Solver, State
from ..parts.batch_size import (
    BatchSizeTest,
    Moments,
    Statistics,
    by_samples,
    check_sizes,
    checked_test,
    direction,
    grown,
    merge,
    moments,
    plus_samples,
)
from ..parts.control import in_place

__all__ = ["adadagrad", "adagrad", "adagrad_norm", "scale_by_adagrad", "scale_by_adagrad_norm"]

_ORDER, _OWN = 0x6F7264, 0x6F776E  # folded into a step's key for a permutation, and for the update's own draws

_CACHE, _DEVICE = 2**20, 2**27  # numbers of a few examples' gradients, on a processor with caches and on another


class AdaGradState(NamedTuple):
    """s: a scalar, or like the parameters; in at least float32."""

    sum_of_squares: Any


def scale_by_adagrad_norm(initial_accumulator: float = 1e-2) -> optax.GradientTransformation:
    """g/√s with one scalar s ← s + |g|² over all parameters, from `initial_accumulator` s₀ > 0.

    **Raises:** `InputError` where s₀ is not positive.
    """
    check_positive("initial_accumulator", initial_accumulator)

    def init(params: PyTree) -> AdaGradState:
        return AdaGradState(jnp.asarray(initial_accumulator, trees.real_dtype(params)))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, AdaGradState]:
        del params
        s = state.sum_of_squares + jnp.square(trees.norm(updates)).astype(state.sum_of_squares.dtype)
        scaled = jax.tree.map(lambda g: (g / jnp.sqrt(s)).astype(g.dtype), updates)
        return scaled, AdaGradState(s)

    return optax.GradientTransformation(init, update)


def scale_by_adagrad(initial_accumulator: float = 0.0, eps: float = 1e-10) -> optax.GradientTransformation:
    """g/(√s + ε) with s ← s + |g|² in each coordinate, from `initial_accumulator`; zero where s + ε is.

    **Raises:** `InputError` for negative numbers.
    """
    check_nonnegative("initial_accumulator", initial_accumulator)
    check_nonnegative("eps", eps)

    def init(params: PyTree) -> AdaGradState:
        return AdaGradState(jax.tree.map(lambda a: jnp.full(a.shape, initial_accumulator, trees.real_dtype(a)), params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, AdaGradState]:
        del params
        s = jax.tree.map(lambda s, g: s + jnp.square(jnp.abs(g.astype(_wide(g)))), state.sum_of_squares, updates)

        def scaled(s: Array, g: Array) -> Array:
            root = jnp.sqrt(s) + eps
            return jnp.where(root == 0, 0, g / jnp.where(root == 0, 1, root)).astype(g.dtype)

        return jax.tree.map(scaled, s, updates), AdaGradState(s)

    return optax.GradientTransformation(init, update)


def _wide(leaf: Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def adagrad_norm(learning_rate: Any, initial_accumulator: float = 1e-2) -> optax.GradientTransformation:
    """AdaGradNorm: x ← x − α g/√s, see `scale_by_adagrad_norm`; `learning_rate` a number or a schedule of steps."""
    return optax.chain(scale_by_adagrad_norm(initial_accumulator), _by_rate(learning_rate))


def adagrad(learning_rate: Any, initial_accumulator: float = 0.0, eps: float = 1e-10) -> optax.GradientTransformation:
    """AdaGrad: x ← x − α g/(√s + ε), see `scale_by_adagrad`; `learning_rate` a number or a schedule of steps."""
    return optax.chain(scale_by_adagrad(initial_accumulator, eps), _by_rate(learning_rate))


def _by_rate(learning_rate: Any) -> optax.GradientTransformation:
    if not callable(learning_rate):
        check_nonnegative("learning_rate", learning_rate)
    rate: Any = learning_rate
    return optax.scale_by_learning_rate(rate)


class AdAdaGradState(State):
    """`batch_size` of the next step; `samples` drawn and `steps` taken; the last test's `candidate`, 0 before it.

    `order` is a permutation of the examples of which batches are cut from `cursor` on, without replacement; else None.
    `inner` is Optax's state.
    """

    inner: Any
    batch_size: Int[Array, ""]
    samples: Int[Array, ""]
    steps: Int[Array, ""]
    candidate: Float[Array, ""]
    batch_value: Float[Array, ""]
    order: Int[Array, " n"] | None
    cursor: Int[Array, ""] | None


class AdAdaGrad(Solver):
    """See the module's docstring for the algorithm and the names."""

    needs: ClassVar[frozenset[str]] = frozenset({"minibatch", "per_example"})
    random: ClassVar[bool] = True

    update: Optimizer
    test: BatchSizeTest
    batch_size: Any
    max_batch_size: Any
    test_interval: Any
    replace: bool = eqx.field(static=True)

    def check(self, problem: Any, x: PyTree) -> None:
        if problem.batch_size is None:
            expected = "FiniteSum(..., batch_size=m), m the examples of a micro-batch"
            raise InputError("problem", f"{problem.label} without a batch size", expected)
        for name in ("batch_size", "max_batch_size"):
            size = getattr(self, name)
            if size is not None and not is_traced(size) and int(size) > problem.size:
                raise InputError(name, int(size), f"at most the number of examples, {problem.size}")
        _tried("update", self.update.label, lambda: jax.eval_shape(self._tried_update, x), "one of gradients alone")
        if "along" in self.test.needs:
            size: Any = np.int32(2)
            batch = Batch(problem, size, jax.random.key(0), None, None)
            # That a rule for backward derivatives has none forward is only said where a program is lowered.
            forward = jax.jit(lambda x: batch.slopes(jnp.int32(0), x, x))
            expected = "losses with forward derivatives, for an inner-product test"
            _tried("problem", problem.label, lambda: forward.lower(x), expected)

    def _tried_update(self, x: PyTree) -> PyTree:
        return self._moved(x, self.update.begin(x), x, jnp.zeros((), trees.real_dtype(x)), 2, jax.random.key(0))[0]

    def init(self, problem: Any, x: PyTree, *, key: Array | None) -> AdAdaGradState:
        none, zero = jnp.int32(0), jnp.zeros((), trees.real_dtype(x))
        size = jnp.minimum(jnp.asarray(self.batch_size, jnp.int32), problem.size)  # a sweep does not call `check`
        inner = jax.tree.map(lambda a: jax.lax.convert_element_type(a, jnp.asarray(a).dtype), self.update.begin(x))
        order, cursor = (None, None) if self.replace else (_permutation(key, problem.size), none)
        return AdAdaGradState(x, strong(Calls()), inner, size, none, none, zero, zero, order, cursor)

    def step(self, problem: Any, state: AdAdaGradState, *, key: Array | None) -> AdAdaGradState:
        b, steps = state.batch_size, state.steps + 1
        maximum = problem.size if self.max_batch_size is None else jnp.minimum(self.max_batch_size, problem.size)
        due = (steps % self.test_interval == 0) & (b < maximum)
        order, cursor = self._cut(state, problem.size, key)
        batch = Batch(problem, b, key, order, cursor)

        value, gradient, seen = self._look(batch, state.x, due)
        x, inner = self._moved(state.x, state.inner, gradient, value, b, key)
        candidate = jnp.where(due, self.test.candidate(seen), state.candidate)
        return AdAdaGradState(
            x,
            state.calls + Calls(minibatch=batch.passes * (1 + due * ("along" in self.test.needs))),
            inner,
            jnp.where(due, grown(candidate, b, maximum), b),
            plus_samples(state.samples, b),
            steps,
            candidate,
            value,
            order,
            None if cursor is None else cursor + b,
        )

    def _cut(self, state: AdAdaGradState, n: int, key: Any) -> tuple[Array | None, Array | None]:
        """The permutation, a new one where less than a batch is left of it, and where the batch begins."""
        if state.order is None or state.cursor is None:
            return None, None
        used_up = state.cursor + state.batch_size > n
        order = in_place(used_up & (state.batch_size < n), lambda _: _permutation(key, n), state.order)
        return order, jnp.where(used_up, 0, state.cursor)

    def _look(self, batch: Batch, x: PyTree, due: Array) -> tuple[Array, PyTree, Statistics]:
        """Mean loss and gradient of the batch, and where a test is due what it needs; else the rest is void.

        Loops of no micro-batches where there is nothing to do: under `vmap` a `cond` would do both for every lane.
        """
        needs, nothing = self.test.needs, jnp.int32(0)
        by_coordinate = "variances" in needs
        each = batch.nothing(x, by_coordinate)
        value = jnp.zeros((), trees.real_dtype(x))
        of_examples = bool(needs & {"total", "variances"})
        tested = jnp.where(due, batch.passes, nothing) if of_examples else nothing
        if of_examples:
            value, each = jax.lax.fori_loop(
                nothing, tested, lambda j, c: batch.add_examples(j, x, *c, by_coordinate=by_coordinate), (value, each)
            )
        plain = jnp.where(tested > 0, nothing, batch.passes)
        value, gradient = jax.lax.fori_loop(nothing, plain, lambda j, c: batch.add_mean(j, x, *c), (value, each.mean))

        norm = trees.norm(gradient)
        variance = each.variance() if of_examples else None
        along = None
        if "along" in needs:
            unit = trees.cast_like(direction(gradient, norm), x)
            zero = jnp.zeros_like(value)
            along = jax.lax.fori_loop(
                nothing,
                jnp.where(due, batch.passes, nothing),
                lambda j, found: trees.cast_like(merge(found, batch.slopes(j, x, unit)), found),
                Moments(zero, zero, zero),
            ).variance()
        total = variance if "total" in needs else None
        return value, gradient, Statistics(gradient, norm**2, total, along, variance if by_coordinate else None)

    def _moved(self, x: PyTree, inner: Any, gradient: PyTree, value: Any, b: Any, key: Any) -> tuple[PyTree, Any]:
        """One update by the Optax optimizer, which is told the batch's value and size."""
        own = {"key": jax.random.fold_in(key, _OWN)} if "key" in self.update.extra else {}
        update = optax.with_extra_args_support(self.update.transformation())
        gradient = trees.cast_like(gradient, x)
        updates, inner = update.update(gradient, inner, x, value=value, batch_size=b, **own)
        return optax.apply_updates(x, updates), inner


class Batch(NamedTuple):
    """A batch of `size` examples, `size` an array, in micro-batches of a fixed number m of rows.

    The last one is filled up with its first row, whose weight there is 0.
    """

    problem: Any
    size: Int[Array, ""]
    key: Any
    order: Array | None
    cursor: Array | None

    @property
    def passes(self) -> Int[Array, ""]:
        """⌈size / m⌉."""
        return -(-self.size // self.problem.batch_size)

    def micro_batch(self, j: Array) -> tuple[PyTree, Array]:
        """The rows of the micro-batch number j, and which of them belong to the batch."""
        m, n = self.problem.batch_size, self.problem.size
        inside = j * m + jnp.arange(m, dtype=jnp.int32) < self.size
        if self.order is None:
            rows = jax.random.randint(jax.random.fold_in(self.key, j), (m,), 0, n)
        else:
            rows = jnp.take(self.order, self.cursor + j * m + jnp.arange(m, dtype=jnp.int32), mode="clip")
        rows = jnp.where(inside, rows, rows[0])
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0), self.problem.data), inside

    def nothing(self, x: PyTree, by_coordinate: bool) -> Moments:
        """The moments of no examples."""
        zero = jnp.zeros((), trees.real_dtype(x))
        mean = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, zero.dtype)), x)
        squares = jax.tree.map(lambda a: jnp.zeros(a.shape, zero.dtype), x) if by_coordinate else zero
        return Moments(zero, mean, squares)

    def add_mean(self, j: Array, x: PyTree, value: Array, gradient: PyTree) -> tuple[Array, PyTree]:
        """Adds the micro-batch's share of the batch's mean loss and gradient."""
        rows, inside = self.micro_batch(j)

        def share(x: PyTree) -> Array:
            losses = self.problem.losses(x, rows).astype(value.dtype)
            return jnp.sum(inside * losses) / self.size

        more, slope = jax.value_and_grad(share)(x)
        return value + more, jax.tree.map(lambda a, g: a + jnp.conj(g).astype(a.dtype), gradient, slope)

    def add_examples(
        self, j: Array, x: PyTree, value: Array, found: Moments, *, by_coordinate: bool
    ) -> tuple[Array, Moments]:
        """Adds the micro-batch's share of the mean loss, and its examples' gradients to the moments.

        By a few examples at a time: gradients that leave the processor's cache cost many times their computation.
        """
        rows, inside = self.micro_batch(j)
        size = _few(self.problem.batch_size, trees.flat_size(x))
        pieces = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (rows, inside))

        def add(carry: tuple[Array, Moments], piece: Any) -> tuple[tuple[Array, Moments], None]:
            value, found = carry
            losses, gradients = _values_and_gradients(self.problem, x, piece[0])
            more = jnp.sum(piece[1] * losses.astype(value.dtype)) / self.size
            here = moments(gradients, piece[1], by_coordinate=by_coordinate)
            return (value + more, trees.cast_like(merge(found, here), found)), None

        return jax.lax.scan(add, (value, found), pieces)[0]

    def slopes(self, j: Array, x: PyTree, unit: PyTree) -> Moments:
        """The moments of ⟨g_i, unit⟩ over the micro-batch: forward, without any gradient."""
        rows, inside = self.micro_batch(j)
        along = jax.jvp(lambda x: self.problem.losses(x, rows), (x,), (unit,))[1]
        return moments(along, inside)


def _few(rows: int, parameters: int) -> int:
    """The largest divisor of `rows` examples whose gradients together are small."""
    most = max(1, (_CACHE if jax.default_backend() == "cpu" else _DEVICE) // parameters)
    return max(size for size in range(1, rows + 1) if rows % size == 0 and size <= most)


def _values_and_gradients(problem: Any, x: PyTree, rows: PyTree) -> tuple[Array, PyTree]:
    """Each row's loss and its gradient."""
    if type(problem).per_example_gradients is not FiniteSum.per_example_gradients:  # in closed form
        return problem.losses(x, rows), problem.per_example_gradients(x, rows)

    def single(x: PyTree, row: PyTree) -> Array:
        return problem.losses(x, jax.tree.map(lambda a: a[None], row))[0]

    values, gradients = jax.vmap(jax.value_and_grad(single), in_axes=(None, 0))(x, rows)
    return values, jax.tree.map(jnp.conj, gradients)


def _permutation(key: Any, n: int) -> Int[Array, " n"]:
    return jax.random.permutation(jax.random.fold_in(key, _ORDER), n).astype(jnp.int32)


def _tried(argument: str, label: str, run: Callable[[], Any], expected: str) -> None:
    """Refuse what cannot even be traced, in one line."""
    try:
        run()
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(argument, f"{label}, which fails with {type(error).__name__}: {reason}", expected) from error


def _by_samples(schedule: Callable[[Array], Any], initial_accumulator: Any) -> Any:
    """AdaGradNorm with a learning rate that is a schedule of examples."""
    return optax.chain(scale_by_adagrad_norm(initial_accumulator), by_samples(schedule))


def adadagrad(
    learning_rate: float | Callable[[Array], Any] | None = None,
    *,
    test: BatchSizeTest | None = None,
    batch_size: int = 32,
    max_batch_size: int | None = None,
    test_interval: int = 1,
    replace: bool = True,
    update: Optimizer | optax.GradientTransformation | None = None,
    initial_accumulator: float = 1e-2,
) -> AdAdaGrad:
    """AdAdaGradNorm (Lau, Liu and Kolar 2024), or any optimizer with adaptive batches; needs a random key.

    For a `FiniteSum` with `batch_size=m`, the examples of a micro-batch.

    **Arguments:**
    - `learning_rate`: α of AdaGradNorm, 1 by default: a number, or a schedule of the examples so far.
    - `test`: `NormTest(eta)`, `InnerProductTest(theta, nu)` or `CoordinateTest(eta)`; by default the first, η = 0.5.
    - `batch_size`: b₀, at least 2; `max_batch_size`: b_max, by default all examples. There tests end.
    - `test_interval`: steps from one test to the next.
    - `replace`: whether batches are drawn with replacement. Else they are cut from one permutation of the examples
      after another, a new one where less than a batch is left; a batch of all gives the deterministic gradient.
    - `update`: another optimizer in place of AdaGradNorm, its learning rate included: `optimizer(adagrad,
      learning_rate=0.05)`, `optax.adam(1e-3)`, `optax.chain(optax.scale_by_adam(), by_samples(schedule))`.
    - `initial_accumulator`: s₀ of AdaGradNorm.

    The state has `batch_size`, `samples` and `candidate`, which can be recorded. By default values are recorded every
    n/m steps; few are taken where batches grow, so pass `every`.

    **Raises:** `InputError` for numbers out of range, a batch of more examples than there are, an update that needs
    more than a gradient, or two learning rates.
    """
    rule = checked_test(test)
    check_sizes(batch_size, max_batch_size, test_interval)
    if update is None:
        check_positive("initial_accumulator", initial_accumulator)
        rate = {"learning_rate": 1.0 if learning_rate is None else learning_rate}
        rate, factory = ({"schedule": learning_rate}, _by_samples) if callable(learning_rate) else (rate, adagrad_norm)
        update = optimizer(factory, initial_accumulator=initial_accumulator, **rate)
    elif learning_rate is not None:
        raise InputError("learning_rate", learning_rate, "None beside an update, which has a learning rate of its own")
    elif not isinstance(update, Optimizer):
        if not all(callable(getattr(update, name, None)) for name in ("init", "update")):
            raise InputError("update", type(update).__name__, "optimizer(…), or an Optax transformation")
        update = optimizer(update)
    if more := sorted(update.extra & {"vector", "hvp", "per_example_gradients"}):
        raise InputError("update", f"{update.label}, which asks {', '.join(more)}", "one of gradients alone")
    return AdAdaGrad(update, rule, batch_size, max_batch_size, test_interval, bool(replace))
