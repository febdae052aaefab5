"""Problems: data and an objective, and the oracles that methods may ask.

A plain callable is a problem already. `Objective` adds what a certificate can use (a lower bound,
the tangents of a symmetry); `FiniteSum` is a mean of per-example losses; a subclass of `Problem`
is for whoever has oracles in closed form.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from . import trees
from .errors import FalllineError, InputError, check_count
from .program import Program, trace
from .smoothness import kinks

__all__ = ["FiniteSum", "Objective", "Problem", "bind", "check_needs"]


class Problem(eqx.Module):
    """Data and an objective of a point `x`, any pytree of floating or complex arrays.

    A subclass defines `value`; it overrides another oracle only where a closed form is faster.
    Arrays among its fields are data: changing their values never recompiles.
    """

    oracles: ClassVar[frozenset[str]] = frozenset({"value", "gradient", "hvp"})

    @property
    def random(self) -> bool:
        """Whether methods should draw minibatches instead of asking for the full gradient."""
        return False

    def minibatch(self, x: PyTree, key: Array) -> tuple[Float[Array, ""], PyTree]:
        """Value and gradient on a random sample, unbiased for the full objective's."""
        raise NotImplementedError(f"{type(self).__name__} has no oracle 'minibatch'")

    def value(self, x: PyTree) -> Float[Array, ""]:
        """The objective at `x`: a real scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not define 'value'")

    def value_and_gradient(self, x: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """Value and gradient at `x`, one pass.

        For complex leaves the gradient is the steepest-ascent direction in the inner product
        Re⟨u, v⟩: the conjugate of what `jax.grad` returns.
        """
        value, gradient = jax.value_and_grad(self.value)(x)
        return value, jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient)

    def gradient(self, x: PyTree) -> PyTree:
        """Gradient at `x`; see `value_and_gradient` for the complex convention."""
        return self.value_and_gradient(x)[1]

    def hvp(self, x: PyTree, v: PyTree) -> PyTree:
        """Hessian–vector product: the derivative of the gradient along `v`, forward over reverse."""
        return jax.jvp(self.gradient, (x,), (v,))[1]

    def hessian(self, x: PyTree) -> Callable[[PyTree], PyTree]:
        """`v -> H(x) v` for many products at one point: the gradient is linearized once."""
        if type(self).hvp is Problem.hvp:
            return jax.linearize(self.gradient, x)[1]
        return lambda v: self.hvp(x, v)

    @property
    def lower_bound(self) -> Float[Array, ""] | float | None:
        """A number that the objective never goes below, where one is known (0 for a residual)."""
        return None

    def symmetry(self, x: PyTree) -> PyTree | None:
        """Directions along which the objective is constant by symmetry, stacked on a leading axis."""
        return None

    def kinks(self, x: PyTree) -> list[str]:
        """Why the objective may not be twice differentiable in `x`: names of primitives."""
        jaxpr = jax.make_jaxpr(self.value)(x).jaxpr
        return kinks(jaxpr, [True] * len(jaxpr.invars))

    def aux(self, x: PyTree) -> Any:
        """What the user's function returns beside its value, where it does (`has_aux`)."""
        return None

    def of_arrays(self, rebuild: Callable[[PyTree], PyTree]) -> Problem:
        """The problem of points as arrays alone; `rebuild` gives them the form of the user's (a model's, say)."""
        return self

    @property
    def label(self) -> str:
        """The name that messages use."""
        return type(self).__name__


def _declared(lower_bound: Any) -> Any:
    if lower_bound is None:
        return None
    bound = np.asarray(lower_bound, jax.dtypes.canonicalize_dtype(float))
    if bound.shape or not np.isfinite(bound):
        raise InputError("lower_bound", lower_bound, "a finite number")
    return bound


class Objective(Problem):
    """A function `fn(x, *args) -> scalar`, with what is known of it.

    **Arguments:**
    - `fn`: returns a real scalar, or `(scalar, aux)` with `has_aux=True`.
    - `args`: further arguments, any pytree; arrays in it are data.
    - `lower_bound`: a number that the objective never goes below.
    - `symmetry`: `x -> tangents`, a pytree like `x` with a leading axis: directions of invariance.
    - `smooth`: set True where the kinks that the certificate sees in the program are never felt.
    """

    fn: Callable[..., Any] = eqx.field(static=True)
    args: tuple = ()
    declared_bound: Any = None
    tangents: Callable[..., Any] | None = eqx.field(static=True, default=None)
    has_aux: bool = eqx.field(static=True, default=False)
    smooth: bool = eqx.field(static=True, default=False)

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple = (),
        *,
        lower_bound: float | None = None,
        symmetry: Callable[..., Any] | None = None,
        has_aux: bool = False,
        smooth: bool = False,
    ):
        if not callable(fn):
            raise InputError("problem", f"{type(fn).__name__}", "a callable fn(x, *args) or a Problem")
        if not isinstance(args, tuple):
            raise InputError("args", type(args).__name__, "a tuple: args=(data,) even for one argument")
        self.fn, self.args, self.declared_bound = fn, args, _declared(lower_bound)
        self.tangents, self.has_aux, self.smooth = symmetry, has_aux, smooth

    def value(self, x: PyTree) -> Float[Array, ""]:
        out = self.fn(x, *self.args)
        return out[0] if self.has_aux else out

    def aux(self, x: PyTree) -> Any:
        return self.fn(x, *self.args)[1] if self.has_aux else None

    @property
    def lower_bound(self) -> Any:
        return self.declared_bound

    def symmetry(self, x: PyTree) -> PyTree | None:
        return None if self.tangents is None else self.tangents(x)

    def kinks(self, x: PyTree) -> list[str]:
        return [] if self.smooth else super().kinks(x)

    @property
    def label(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)


class TracedObjective(Problem):
    """An `Objective` bound to the shapes of a point: what the compiled loop sees.

    Two of them compare equal as far as compilation goes where their programs do.
    """

    program: Program = eqx.field(static=True)
    consts: list[Any]
    args: list[Any]
    declared_bound: Any = None
    has_aux: bool = eqx.field(static=True, default=False)

    def value(self, x: PyTree) -> Float[Array, ""]:
        return self._call(x)[0]

    def aux(self, x: PyTree) -> Any:
        return self._call(x)[1]

    def _call(self, x: PyTree) -> tuple[Float[Array, ""], Any]:
        out = self.program(self.consts, x, self.args)
        return out if self.has_aux else (out, None)

    @property
    def lower_bound(self) -> Any:
        return self.declared_bound

    @property
    def label(self) -> str:
        return "Objective"


class FiniteSum(Problem):
    """The mean of per-example losses: (1/n) Σᵢ loss(x, data)ᵢ.

    **Arguments:**
    - `loss`: `loss(x, batch) -> losses` of shape `(rows of the batch,)`.
    - `data`: a pytree of arrays with one leading axis of length n.
    - `batch_size`: rows of a minibatch, drawn uniformly with replacement; with None the problem is
      deterministic and methods see the full objective.
    - `lower_bound`, `symmetry`: as for `Objective`.
    """

    oracles: ClassVar[frozenset[str]] = Problem.oracles | {"minibatch", "per_example"}

    loss: Callable[..., Any] = eqx.field(static=True)
    data: PyTree
    batch_size: int | None = eqx.field(static=True, default=None)
    declared_bound: Any = None
    tangents: Callable[..., Any] | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        loss: Callable[..., Any],
        data: PyTree,
        batch_size: int | None = None,
        *,
        lower_bound: float | None = None,
        symmetry: Callable[..., Any] | None = None,
    ):
        if not callable(loss):
            raise InputError("loss", type(loss).__name__, "a callable loss(x, batch) -> per-example losses")
        leaves = jax.tree.leaves(data)
        if not leaves:
            raise InputError("data", "a pytree without leaves", "arrays with a leading axis of examples")
        lengths = {np.shape(a)[0] if np.ndim(a) else None for a in leaves}
        if len(lengths) != 1 or None in lengths or 0 in lengths:
            shapes = ", ".join(dict.fromkeys(trees.describe(a) for a in leaves))
            raise InputError("data", shapes, "arrays that share one leading axis of at least one example")
        if batch_size is not None:
            check_count("batch_size", batch_size, 1)
            if batch_size > (n := len(leaves[0])):
                raise InputError("batch_size", batch_size, f"at most the number of examples, {n}")
            batch_size = int(batch_size)
        self.loss, self.data, self.batch_size = loss, data, batch_size
        self.declared_bound, self.tangents = _declared(lower_bound), symmetry

    @property
    def random(self) -> bool:
        return self.batch_size is not None

    @property
    def size(self) -> int:
        """Number of examples n."""
        return np.shape(jax.tree.leaves(self.data)[0])[0]

    def losses(self, x: PyTree, batch: PyTree) -> Float[Array, " rows"]:
        """Per-example losses on the given rows."""
        return self.loss(x, batch)

    def value(self, x: PyTree) -> Float[Array, ""]:
        return jnp.mean(self.losses(x, self.data))

    def per_example_gradients(self, x: PyTree, batch: PyTree) -> PyTree:
        """Gradient of each row's own loss, on a leading axis."""

        def single(x: PyTree, row: PyTree) -> Array:
            return self.losses(x, jax.tree.map(lambda a: a[None], row))[0]

        gradients = jax.vmap(jax.grad(single), in_axes=(None, 0))(x, batch)
        return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradients)

    def sample(self, key: Array) -> PyTree:
        """A minibatch of `batch_size` rows, uniform with replacement."""
        rows = jax.random.randint(key, (self.batch_size or self.size,), 0, self.size)
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0), self.data)

    def minibatch(self, x: PyTree, key: Array) -> tuple[Float[Array, ""], PyTree]:
        """Value and gradient on one random minibatch: unbiased for the full objective's."""
        batch = self.sample(key)
        return _Minibatch(self, batch).value_and_gradient(x)

    @property
    def lower_bound(self) -> Any:
        return self.declared_bound

    def symmetry(self, x: PyTree) -> PyTree | None:
        return None if self.tangents is None else self.tangents(x)

    @property
    def label(self) -> str:
        return f"FiniteSum({getattr(self.loss, '__name__', type(self.loss).__name__)})"


class _Minibatch(Problem):
    parent: FiniteSum
    batch: PyTree

    def value(self, x: PyTree) -> Float[Array, ""]:
        return jnp.mean(self.parent.losses(x, self.batch))


class TracedFiniteSum(FiniteSum):
    """A `FiniteSum` bound to the shapes of a point: its loss is traced once for each number of rows."""

    programs: dict[int, Program] = eqx.field(static=True, default_factory=dict)
    consts: dict[int, list[Any]] = eqx.field(default_factory=dict)

    def __init__(self, problem: FiniteSum, programs: dict[int, Program], consts: dict[int, list[Any]]):
        super().__init__(_no_loss, problem.data, problem.batch_size)
        self.declared_bound = problem.declared_bound
        self.programs, self.consts = _Frozen(programs), consts

    def losses(self, x: PyTree, batch: PyTree) -> Float[Array, " rows"]:
        rows = jnp.shape(jax.tree.leaves(batch)[0])[0]
        return self.programs[rows](self.consts[rows], x, batch)

    @property
    def label(self) -> str:
        return "FiniteSum"


class _Frozen(dict):
    """A hashable dictionary for static fields."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items(), key=lambda item: str(item[0]))))


def _no_loss(x: PyTree, batch: PyTree) -> Array:
    raise AssertionError("a traced finite sum evaluates its programs")


def bind(
    problem: Problem | Callable[..., Any],
    x: PyTree,
    rebuild: Callable[[PyTree], PyTree],
    *,
    args: tuple = (),
    has_aux: bool = False,
    needs: frozenset[str] = frozenset(),
) -> Problem:
    """Make anything that the user passed into a problem of the arrays `x`, tracing callables once.

    **Raises:** `InputError` naming the argument where the function fails at these shapes, returns
    no real scalar, or where data hold NaN or would be narrowed silently.
    """
    if isinstance(problem, Problem):
        if args:
            raise InputError("args", f"{len(args)} arguments", f"none: {problem.label} holds its own data")
        if has_aux and not (isinstance(problem, Objective) and problem.has_aux):
            raise InputError("has_aux", True, f"False: {problem.label} says it itself, as Objective(fn, has_aux=True)")
    else:
        problem = Objective(problem, args, has_aux=has_aux)
    name, data = ("args", problem.args) if isinstance(problem, Objective) else ("problem", problem)
    trees.check_width(name, data)
    trees.check_no_nan(name, data)

    if isinstance(problem, Objective):
        return _bind_objective(problem, x, rebuild)
    if type(problem) is FiniteSum:  # a subclass has oracles of its own
        return _bind_finite_sum(problem, x, rebuild, needs)
    problem = problem.of_arrays(rebuild)
    shape = _guard(problem.label, lambda: jax.eval_shape(problem.value, x))
    _check_scalar(problem.label, shape)
    return problem


def _bind_objective(problem: Objective, x: PyTree, rebuild: Callable[..., Any]) -> Problem:
    _check_captured("problem", problem.fn)
    dynamic, static = eqx.partition(problem.args, eqx.is_array_like)
    leaves, tree = jax.tree.flatten(dynamic)

    def flat(x: PyTree, leaves: list[Any]) -> Any:
        args = eqx.combine(jax.tree.unflatten(tree, leaves), static)
        return problem.fn(rebuild(x), *args)

    program, consts = _guard(problem.label, lambda: trace(flat, x, leaves, owner=problem.fn, static=(static, rebuild)))
    trees.check_no_nan("problem", consts)
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in program.jaxpr.outvars]
    out = jax.tree.unflatten(program.out_tree, shapes)
    if problem.has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise InputError("problem", f"{problem.label} returning {_shapes(out)}", "(scalar, aux), for has_aux=True")
        out = out[0]
    _check_scalar(problem.label, out)
    return TracedObjective(program, consts, leaves, problem.declared_bound, problem.has_aux)


def _bind_finite_sum(problem: FiniteSum, x: PyTree, rebuild: Callable[..., Any], needs: frozenset[str]) -> Problem:
    _check_captured("loss", problem.loss)
    rows = {problem.size}
    if problem.batch_size is not None:
        rows.add(problem.batch_size)
    if "per_example" in needs:
        rows.add(1)
    programs, consts = {}, {}

    def flat(x: PyTree, batch: PyTree) -> Array:
        return problem.loss(rebuild(x), batch)

    for n in sorted(rows):
        batch = jax.tree.map(
            lambda a, n=n: jax.ShapeDtypeStruct((n, *np.shape(a)[1:]), jnp.result_type(a)), problem.data
        )
        run = functools.partial(trace, flat, x, batch, owner=problem.loss, static=rebuild)
        programs[n], consts[n] = _guard(problem.label, run)
        trees.check_no_nan("loss", consts[n])
        out = [v.aval for v in programs[n].jaxpr.outvars]
        if len(out) != 1 or out[0].shape != (n,) or not jnp.issubdtype(out[0].dtype, jnp.floating):
            got = ", ".join(trees.describe(a) for a in out)
            raise InputError("loss", f"{got} from {n} rows", f"one real loss for each row: float[{n}]")
    return TracedFiniteSum(problem, programs, consts)


def _check_captured(name: str, fn: Callable[..., Any]) -> None:
    """Check the width of what a function is bound to, closes over or reads as globals.

    Functions among it are followed within one module: what a library keeps for itself is its own affair.
    """
    module: str | None = None
    seen: set[int] = set()
    queue: list[Any] = [fn]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, functools.partial):
            inside = {**{f"args[{i}]": value for i, value in enumerate(item.args)}, **item.keywords}
            queue.append(item.func)
        elif isinstance(item, types.FunctionType):
            module = module or item.__module__
            inside = _scope(item) if item.__module__ == module else {}
        else:  # a bound method, or what `jax.jit` and its like made of a function
            queue.append(getattr(item, "__func__", getattr(item, "__wrapped__", None)))
            continue
        trees.check_width(name, inside)
        queue += inside.values()


def _scope(fn: types.FunctionType) -> dict[str, Any]:
    """The closure of a function and the globals that its code reads."""
    found: dict[str, Any] = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    codes = [fn.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        found.update({name: fn.__globals__[name] for name in names & fn.__globals__.keys()})
    return found


def _guard(label: str, run: Callable[[], Any]) -> Any:
    """Run a trace of the user's function; its failure becomes one line that says where it arose."""
    try:
        return run()
    except FalllineError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        reason = reason if len(reason) <= 240 else reason[:237] + "..."
        raise InputError(
            "problem", f"{label}, which fails at x0 with {type(error).__name__}: {reason}", "a function of x0's shapes"
        ) from error


def _shapes(out: Any) -> str:
    return ", ".join(trees.describe(a) for a in jax.tree.leaves(out)) or "nothing"


def _check_scalar(label: str, out: Any) -> None:
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        hint = "; sum or average it" if leaves and leaves[0].shape else ""
        raise InputError("problem", f"{label} returning {_shapes(out)}", f"one real scalar{hint}")


def check_needs(solver: Any, problem: Problem) -> None:
    """Refuse a problem that lacks an oracle of the solver, before anything is compiled."""
    for name in sorted(solver.needs - problem.oracles):
        raise InputError(
            "problem",
            f"{problem.label} without the oracle '{name}'",
            f"one that offers what {type(solver).__name__} needs: {', '.join(sorted(solver.needs))}",
        )
