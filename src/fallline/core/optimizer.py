"""Any Optax optimizer as a solver."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from . import trees
from .calls import COST, Calls
from .errors import InputError, check_choice, check_positive, is_traced
from .extra import declared
from .problem import FiniteSum, Problem
from .solver import GRADIENT, MINIBATCH, Solver, State

__all__ = ["optimizer"]


class OptimizerState(State):
    """`x`, what is known of it, and Optax's own state."""

    gradient: PyTree
    value: Float[Array, ""] | None
    gradient_norm: Float[Array, ""] | None
    batch_value: Float[Array, ""] | None
    inner: Any


class Optimizer(Solver):
    """Runs an Optax transformation: gradient, `update`, `apply_updates`.

    Where the problem is deterministic the state holds value and gradient of its `x`; each step asks
    for one gradient, at the new point. Where it is random each step draws one minibatch.
    """

    numbers: dict[str, Any]
    options: dict[str, Any] = eqx.field(static=True)
    factory: Callable = eqx.field(static=True)
    label: str = eqx.field(static=True)
    extra: frozenset[str] = eqx.field(static=True, default=frozenset())

    @property
    def name(self) -> str:
        return self.label

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        oracles = {"hvp": "hvp", "per_example_gradients": "per_example"}
        return frozenset({"gradient"} | {oracles[name] for name in self.extra & oracles.keys()})

    @property
    def random(self) -> bool:  # type: ignore[override]
        return bool(self.extra & {"vector", "hvp", "key"})

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation with the current numbers."""
        return self.factory(**self.numbers, **self.options)

    def begin(self, x: PyTree) -> Any:
        """Optax's state at `x`."""
        update = self.transformation()
        inner = update.init(x)
        view = _view(update, inner, x)
        return update.init(view.forward(x)) if view.real else inner

    def move(
        self,
        objective: Callable,
        x: PyTree,
        value: Array,
        gradient: PyTree,
        inner: Any,
        extra: Mapping[str, Any] | None = None,
    ) -> tuple[PyTree, Any, Calls]:
        """One update of `x`: the new point, Optax's new state, and the calls of `objective` that it made itself."""
        return _apply(self.transformation(), objective, x, value, gradient, inner, extra or {})

    def _asked(self, problem: Problem, x: PyTree, key: Array | None) -> tuple[dict[str, Any], Calls]:
        """The extra arguments that the transformation declares, at `x` on the whole problem, and what they cost."""
        given, calls = self._drawn(x, key), Calls()
        if "hvp" in self.extra:
            given["hvp"], calls = problem.hvp(x, given["vector"]), calls + Calls(hvp=1)
        if "per_example_gradients" in self.extra:
            assert isinstance(problem, FiniteSum)
            given["per_example_gradients"] = problem.per_example_gradients(x, problem.data)
            calls += GRADIENT
        return given, calls

    def _asked_of_rows(self, problem: Problem, x: PyTree, key: Array) -> tuple[Array, PyTree, dict[str, Any], Calls]:
        """Value and gradient on a minibatch, the extra arguments on its rows, and what all of it cost."""
        given, calls = self._drawn(x, key), MINIBATCH
        if "hvp" in self.extra:

            def gradient_of(x: PyTree) -> tuple[PyTree, Array]:
                value, gradient = problem.minibatch(x, key)
                return gradient, value

            gradient, given["hvp"], value = jax.jvp(gradient_of, (x,), (given["vector"],), has_aux=True)
            calls += Calls(minibatch=_HVP)
        else:
            value, gradient = problem.minibatch(x, key)
        if "per_example_gradients" in self.extra:
            assert isinstance(problem, FiniteSum)
            given["per_example_gradients"] = problem.per_example_gradients(x, problem.sample(key))
            calls += MINIBATCH
        return value, gradient, given, calls

    def _drawn(self, x: PyTree, key: Array | None) -> dict[str, Any]:
        """What is drawn for a step by keys of its own: a Gaussian vector, and a key."""
        given: dict[str, Any] = {}
        if key is not None and self.random:
            vector, own = jax.random.split(jax.random.fold_in(key, _OWN))
            draws = {"vector": lambda: trees.normal_like(vector, x), "key": lambda: own}
            asked = self.extra | ({"vector"} if "hvp" in self.extra else set())
            given = {name: draw() for name, draw in draws.items() if name in asked}
        return given

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> OptimizerState:
        inner = self.begin(x)
        if problem.random:
            return OptimizerState(x, Calls(), None, None, None, jnp.zeros((), trees.real_dtype(x)), inner)
        value, gradient = problem.value_and_gradient(x)
        return OptimizerState(x, GRADIENT, gradient, value, trees.norm(gradient), None, inner)

    def step(self, problem: Problem, state: OptimizerState, *, key: Array | None) -> OptimizerState:
        if key is not None and problem.random:
            value, gradient, extra, asked = self._asked_of_rows(problem, state.x, key)

            def same_rows(x: PyTree) -> Array:
                return problem.minibatch(x, key)[0]

            x, inner, used = self.move(same_rows, state.x, value, gradient, state.inner, extra)
            asked += Calls(minibatch=used.gradient + used.value)
            return OptimizerState(x, state.calls + asked, None, None, None, value, inner)
        assert state.value is not None
        extra, before = self._asked(problem, state.x, key)
        x, inner, used = self.move(problem.value, state.x, state.value, state.gradient, state.inner, extra)
        value, gradient, asked = _value_and_gradient(self.transformation(), problem, x, inner, state)
        calls = state.calls + before + used + asked
        return OptimizerState(x, calls, gradient, value, trees.norm(gradient), None, inner)


_HVP = int(COST["hvp"])  # what a product on a minibatch costs, in minibatches
_OWN = 0x6F776E  # folded into a step's key for what is drawn beside the minibatch


def _apply(
    update: optax.GradientTransformation,
    objective: Callable,
    x: PyTree,
    value: Array,
    gradient: PyTree,
    inner: Any,
    given: Mapping[str, Any],
) -> tuple[PyTree, Any, Calls]:
    """One `update`, with the extra arguments that it accepts, and the calls that it made itself."""
    view = _view(update, inner, x)
    point, slope = view.forward(x), view.forward(gradient)

    def value_fn(point: PyTree) -> Array:
        # A search steps in its own width: its points are rounded to the run's before they are judged,
        # and it can only transpose a value of the default float.
        return objective(trees.cast_like(view.backward(point), x)).astype(float)

    extra = {"value": value, "grad": slope, "value_fn": value_fn}
    accepted = _extra_arguments(update)
    extra = {k: v for k, v in extra.items() if k in accepted}
    updates, inner = update.update(slope, inner, point, **extra, **given)
    used = sum((_search_calls(search) for search in _searches(inner)), start=Calls())
    return view.backward(optax.apply_updates(point, updates)), inner, used


def _value_and_gradient(
    update: optax.GradientTransformation, problem: Problem, x: PyTree, inner: Any, before: OptimizerState
) -> tuple[Array, PyTree, Calls]:
    """Value and gradient at the new point, taken from a line search that ended there."""
    view, search = _view(update, inner, x), _last_search(update, inner)
    known = None if search is None else (search.value, view.backward(search.grad))
    spec = jax.tree.map(lambda a: (a.shape, a.dtype), (before.value, before.gradient))
    if known is None or jax.tree.map(lambda a: (a.shape, a.dtype), known) != spec:
        return *problem.value_and_gradient(x), GRADIENT
    # A search that met infinity went back to its start and kept the value of its last trial.
    finite = jnp.isfinite(known[0])
    value, gradient = jax.lax.cond(finite, lambda: known, lambda: problem.value_and_gradient(x))
    return value, gradient, Calls(gradient=jnp.where(finite, 0, 1))


_SEARCHES = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)


def _searches(inner: Any) -> list[Any]:
    """The states of Optax's line searches in a transformation's state."""
    found = jax.tree.leaves(inner, is_leaf=lambda s: isinstance(s, _SEARCHES))
    return [s for s in found if isinstance(s, _SEARCHES)]


def _search_calls(search: Any) -> Calls:
    """What the last search asked: zoom a gradient for each trial, backtracking a value."""
    trials = search.info.num_linesearch_steps
    if isinstance(search, optax.ScaleByZoomLinesearchState):
        return Calls(gradient=trials)
    return Calls(value=trials) if search.grad is None else Calls(value=trials - 1, gradient=1)


def _last_search(update: optax.GradientTransformation, inner: Any) -> Any:
    """The line search whose point is the new point: the last link of a chain, with a gradient kept."""
    name = getattr(update.update, "__qualname__", "")
    if not (name == _CHAIN and type(inner) is tuple and inner and isinstance(inner[-1], _SEARCHES)):
        return None
    return None if inner[-1].grad is None else inner[-1]


_CHAIN = getattr(optax.chain(optax.identity()).update, "__qualname__", "")


def _extra_arguments(update: optax.GradientTransformation) -> frozenset[str]:
    """Names among value, grad and value_fn that `update` takes."""
    parameters = inspect.signature(update.update).parameters
    names = {"value", "grad", "value_fn"}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return frozenset(names)
    return frozenset(names & parameters.keys())


class _View:
    """How the transformation sees the point: as it is, or complex leaves as pairs of real ones."""

    def __init__(self, like: PyTree, real: bool):
        self.like, self.real = like, real

    def forward(self, tree: PyTree) -> PyTree:
        if not self.real:
            return tree
        return jax.tree.map(lambda a: (a.real, a.imag) if jnp.iscomplexobj(a) else a, tree)

    def backward(self, tree: PyTree) -> PyTree:
        if not self.real:
            return tree
        return jax.tree.map(lambda a, part: jax.lax.complex(*part) if jnp.iscomplexobj(a) else part, self.like, tree)


def _view(update: optax.GradientTransformation, inner: Any, x: PyTree) -> _View:
    """Line searches run on a real view: Optax's two disagree about the complex convention."""
    searching = bool(_searches(inner)) or "value_fn" in inspect.signature(update.update).parameters
    return _View(x, searching and any(jnp.iscomplexobj(a) for a in jax.tree.leaves(x)))


def optimizer(factory: Callable | optax.GradientTransformation, /, **options: Any) -> Optimizer:
    """Make a solver of an Optax optimizer.

    **Arguments:**
    - `factory`: an Optax factory such as `optax.adam`, whose options follow as keywords; numbers
      among them can change without recompiling, except those that the factory branches on. Or a
      ready-made transformation, which is keyed by identity and whose numbers are fixed.
    - `options`: keyword arguments of the factory.

    **Returns:** a solver that needs the oracle `gradient`.

    **Raises:** `InputError` for an option that the factory does not have, or a learning rate that is
    not positive.

    **Source:** Optax (DeepMind JAX ecosystem); the methods' own papers are named there.
    """
    ready = all(callable(getattr(factory, name, None)) for name in ("init", "update"))
    if ready and not isinstance(factory, type):  # `optax.MultiSteps` is a class, and a factory
        if options:
            raise InputError("options", ", ".join(options), "none: a ready-made transformation has its numbers already")
        return Optimizer({}, _Options(), _Fixed(factory), "optimizer", declared(factory))
    if not callable(factory):
        raise InputError("factory", type(factory).__name__, "an Optax factory such as optax.adam, or a transformation")
    label = getattr(factory, "__name__", type(factory).__name__)
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in options:
            check_choice(f"option of {label}", name, parameters)
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in options and p.kind in _NAMED]
    if missing:
        raise InputError(f"options of {label}", ", ".join(options) or "none", f"also {', '.join(missing)}")
    rate = options.get("learning_rate")
    if rate is None and "learning_rate" in options and parameters["learning_rate"].default is not None:
        raise InputError("learning_rate", None, "a number or a schedule")
    if rate is not None and not callable(rate) and np.ndim(rate) == 0:
        check_positive("learning_rate", rate)
    # With its own checks of numbers, which are arrays from here on; on the host, where nothing is compiled for them.
    extra = declared(factory(**(options if is_traced(options) else _on_host(options))))
    static = _branched_on(factory, options)
    for name in static:
        if isinstance(options[name], jax.Array):
            expected = f"a Python number: {label} branches on it, so it is fixed"
            raise InputError(name, trees.describe(options[name]), expected)
    numbers = {k: v for k, v in options.items() if _is_number(v) and k not in static}
    rest = {k: v for k, v in options.items() if k not in numbers}
    return Optimizer(numbers, _Options(rest), factory, label, extra)


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class _Fixed:
    """A factory that gives back one ready-made transformation."""

    def __init__(self, transformation: Any):
        self.transformation = transformation

    def __call__(self) -> optax.GradientTransformation:
        return self.transformation


class _Options(dict):
    """Static options: hashable, unhashable values by identity."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict) or self.keys() != other.keys():
            return False
        return all(self[k] is other[k] or _same(self[k], other[k]) for k in self)

    def __ne__(self, other: object) -> bool:
        return not self == other


def _same(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # arrays and the like: sharing too little is safe
        return False


def _on_host(options: dict[str, Any]) -> dict[str, Any]:
    """The options with NumPy's numbers in place of JAX's."""
    return {k: np.asarray(v) if isinstance(v, jax.Array) and _is_number(v) else v for k, v in options.items()}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | str) or callable(value):
        return False
    return isinstance(value, int | float | np.number) or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 0)


def _shape(number: Any) -> jax.ShapeDtypeStruct:
    """A scalar whose value nobody knows: with it a factory that looks at the value fails."""
    if isinstance(number, int | float):
        return jax.ShapeDtypeStruct((), jnp.int32 if isinstance(number, int) else jnp.float32)
    return jax.ShapeDtypeStruct((), jnp.result_type(number))


def _branched_on(factory: Callable, options: dict[str, Any]) -> set[str]:
    """Numbers whose value the factory (or what it builds) looks at while it is traced."""
    static: set[str] = set()
    probe = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}

    def fails(names: list[str]) -> bool:
        def build(values: list[Any], params: Any) -> Any:
            made = factory(**{**options, **dict(zip(names, values, strict=True))})
            state = made.init(params)
            extra = {"value": jnp.float32(1), "grad": params, "value_fn": lambda p: jnp.sum(p["w"] ** 2)}
            asked = {"vector": params, "hvp": params, "per_example_gradients": jax.tree.map(lambda a: a[None], params)}
            asked["key"] = jax.random.key(0)
            given = {k: v for k, v in extra.items() if k in _extra_arguments(made)}
            return made.update(params, state, params, **given, **{k: asked[k] for k in declared(made) & asked.keys()})[
                0
            ]

        try:
            jax.eval_shape(build, [_shape(options[n]) for n in names], probe)
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
            return True
        except TypeError as error:
            return any(word in str(error).lower() for word in ("traced", "tracer", "concrete"))
        except Exception:  # the options fit the user's own point only; the run will say
            return False
        return False

    names = [n for n, v in options.items() if _is_number(v)]
    if names and fails(names):
        static = {n for n in names if fails([n])} or set(names)
    return static
