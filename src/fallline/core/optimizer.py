"""Any Optax optimizer as a solver."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from . import trees
from .calls import Calls
from .errors import InputError, check_choice, check_positive
from .problem import Problem
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

    @property
    def name(self) -> str:
        return self.label

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation with the current numbers."""
        return self.factory(**self.numbers, **self.options)

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> OptimizerState:
        update = self.transformation()
        if problem.random:
            return OptimizerState(x, Calls(), None, None, None, jnp.zeros((), trees.real_dtype(x)), update.init(x))
        value, gradient = problem.value_and_gradient(x)
        view = _view(update, x)
        return OptimizerState(
            x, GRADIENT, gradient, value, trees.norm(gradient), None, update.init(view.forward(x))
        )

    def step(self, problem: Problem, state: OptimizerState, *, key: Array | None) -> OptimizerState:
        update = self.transformation()
        if problem.random:
            value, gradient = problem.minibatch(state.x, key)
            x, inner, used = _apply(update, problem, state.x, value, gradient, state.inner)
            return OptimizerState(x, state.calls + MINIBATCH + used, None, None, None, value, inner)
        x, inner, used = _apply(update, problem, state.x, state.value, state.gradient, state.inner)
        value, gradient = problem.value_and_gradient(x)
        return OptimizerState(
            x, state.calls + GRADIENT + used, gradient, value, trees.norm(gradient), None, inner
        )


def _apply(
    update: optax.GradientTransformation, problem: Problem, x: PyTree, value: Array, gradient: PyTree, inner: Any
) -> tuple[PyTree, Any, Calls]:
    """One `update`, with the extra arguments that it accepts, and the calls that it made itself."""
    view = _view(update, x)
    point, slope = view.forward(x), view.forward(gradient)
    extra = {
        "value": value,
        "grad": slope,
        "value_fn": lambda point: problem.value(view.backward(point)),
    }
    accepted = _extra_arguments(update)
    updates, inner = update.update(slope, inner, point, **{k: v for k, v in extra.items() if k in accepted})
    point = optax.apply_updates(point, updates)
    used = Calls()
    if "value_fn" in accepted:
        # Optax's line searches evaluate value and slope together, once for each trial.
        used = Calls(gradient=optax.tree.get(inner, "num_linesearch_steps", 0))
    return view.backward(point), inner, used


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
        join = lambda like, part: part[0] + 1j * part[1] if jnp.iscomplexobj(like) else part  # noqa: E731
        return jax.tree.map(join, self.like, tree)


def _view(update: optax.GradientTransformation, x: PyTree) -> _View:
    """Line searches run on a real view: Optax's two disagree about the complex convention."""
    complex_point = any(jnp.iscomplexobj(a) for a in jax.tree.leaves(x))
    return _View(x, complex_point and "value_fn" in _extra_arguments(update))


def optimizer(factory: Callable | optax.GradientTransformation, /, **options: Any) -> Solver:
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
    if isinstance(factory, optax.GradientTransformation):
        if options:
            raise InputError("options", ", ".join(options), "none: a ready-made transformation has its numbers already")
        return Optimizer({}, {}, _Fixed(factory), "optimizer")
    if not callable(factory):
        raise InputError("factory", type(factory).__name__, "an Optax factory such as optax.adam, or a transformation")
    label = getattr(factory, "__name__", type(factory).__name__)
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in options:
            check_choice(f"option of {label}", name, parameters)
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in options and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing:
        raise InputError(f"options of {label}", ", ".join(options) or "none", f"also {', '.join(missing)}")
    if "learning_rate" in options and np.ndim(options["learning_rate"]) == 0 and not callable(options["learning_rate"]):
        check_positive("learning_rate", options["learning_rate"])
    static = _branched_on(factory, options)
    for name in static:
        if isinstance(options[name], jax.Array | jax.core.Tracer):
            raise InputError(name, trees.describe(options[name]), f"a Python number: {label} branches on it, so it is fixed")
    numbers = {k: v for k, v in options.items() if _is_number(v) and k not in static}
    rest = {k: v for k, v in options.items() if k not in numbers}
    return Optimizer(numbers, _Options(rest), factory, label)


class _Fixed:
    """A factory that gives back one ready-made transformation."""

    def __init__(self, transformation: optax.GradientTransformation):
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


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | str) or callable(value):
        return False
    return isinstance(value, int | float | np.number) or (
        isinstance(value, np.ndarray | jax.Array) and value.ndim == 0
    )


def _branched_on(factory: Callable, options: dict[str, Any]) -> set[str]:
    """Numbers whose value the factory (or what it builds) looks at while it is traced."""
    static: set[str] = set()
    probe = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}

    def fails(names: list[str]) -> bool:
        def build(values: list[Any], params: Any) -> Any:
            made = factory(**{**options, **dict(zip(names, values, strict=True))})
            state = made.init(params)
            extra = {"value": jnp.float32(1), "grad": params, "value_fn": lambda p: jnp.sum(p["w"] ** 2)}
            accepted = _extra_arguments(made)
            return made.update(params, state, params, **{k: v for k, v in extra.items() if k in accepted})[0]

        try:
            jax.eval_shape(build, [np.asarray(options[n], np.float32 if isinstance(options[n], float) else None) for n in names], probe)
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
            return True
        except TypeError as error:
            return "traced" in str(error).lower() or "tracer" in str(error).lower() or "concrete" in str(error).lower()
        except Exception:  # the options fit the user's own point only; the run will say
            return False
        return False

    names = [n for n, v in options.items() if _is_number(v)]
    if names and fails(names):
        static = {n for n in names if fails([n])} or set(names)
    return static
