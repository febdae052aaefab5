"""A user's function as data: its jaxpr, a key that equal programs share, and its constants.

`jax.jit` keys compiled code by the function object, so a new lambda of the same program compiles
again. Here the function is traced once to a jaxpr, its captured arrays become arguments, and a
`Program` compares by structure: an equal program over other data reuses the compiled code.

Where the jaxpr does not say everything (callbacks, custom VJP rules, parameters of unknown kinds)
the function's identity joins the key, and so does all that it carries along: sharing too little
costs a compilation, sharing too much would be a wrong gradient.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

__all__ = ["Program", "Static", "trace"]


class _Identity:
    """Equal only for the same function object (or the same method of the same object)."""

    def __init__(self, fn: Any):
        self.fn = fn
        bound = isinstance(fn, types.MethodType)
        self.ids = (id(fn.__self__), id(fn.__func__)) if bound else (id(fn),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.ids == other.ids

    def __hash__(self) -> int:
        return hash(self.ids)


_PLAIN = (bool, int, str, bytes, type(None), np.dtype, enum.Enum, type)
_BY_VALUE = (*_PLAIN, jax.sharding.Mesh, jax.sharding.Sharding, jax.tree_util.PyTreeDef)


def _array_key(a: Any) -> Hashable:
    if isinstance(a, jax.core.Tracer):
        return _Identity(a)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return (str(a.dtype), _array_key(jax.random.key_data(a)))
    a = np.asarray(a)
    return (a.shape, str(a.dtype), a.tobytes())


def _aval_key(aval: Any) -> Hashable:
    return (getattr(aval, "shape", None), str(getattr(aval, "dtype", aval)), getattr(aval, "weak_type", False))


_MOST_DERIVATIVES = 3  # of the objective that any oracle takes


class _Reader:
    """Reads the key of a jaxpr off its structure; `opaque` says that it holds what cannot be read."""

    def __init__(self) -> None:
        self.opaque = False
        self._derivatives = 0

    def parameter(self, value: Any) -> Hashable:
        """The key of one parameter of an equation."""
        if isinstance(value, _BY_VALUE):
            return (type(value).__name__, value)
        if isinstance(value, float | complex):
            return (type(value).__name__, repr(value))
        if isinstance(value, jex.ClosedJaxpr):
            return ("closed", self.jaxpr(value.jaxpr), tuple(_array_key(c) for c in value.consts))
        if isinstance(value, jex.Jaxpr):
            return ("jaxpr", self.jaxpr(value))
        if isinstance(value, tuple | list):
            return (type(value).__name__, *(self.parameter(v) for v in value))
        if isinstance(value, dict):
            return ("dict", *((k, self.parameter(v)) for k, v in sorted(value.items())))
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return _array_key(value)
        if isinstance(value, jax.core.AbstractValue):
            return _aval_key(value)
        if type(value).__module__.startswith("jax.") and type(value).__name__ in ("UnspecifiedValue", "AbstractMesh"):
            return (type(value).__name__, str(value))
        self.opaque = True
        return type(value).__name__

    def jaxpr(self, jaxpr: Any) -> Hashable:
        """The key of a program: its operations, how they are wired, their types and literals."""
        numbers: dict[Any, int] = {}

        def number(v: Any) -> Hashable:
            if isinstance(v, jex.Literal):
                return ("literal", _array_key(np.asarray(v.val)), _aval_key(v.aval))
            return numbers.setdefault(v, len(numbers))

        heads = tuple((number(v), _aval_key(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars))
        body = []
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            params = self._custom_jvp(eqn) if name == "custom_jvp_call" else self.parameter(dict(eqn.params))
            ins = tuple(number(v) for v in eqn.invars)
            outs = tuple((number(v), _aval_key(v.aval)) for v in eqn.outvars)
            body.append((name, params, ins, outs))
        return (len(jaxpr.constvars), heads, tuple(body), tuple(number(v) for v in jaxpr.outvars))

    def _custom_jvp(self, eqn: Any) -> Hashable:
        """The primal and the rule: tracing the rule is the only way to see what it does."""
        closed, symbolic = eqn.params["call_jaxpr"], eqn.params["symbolic_zeros"]
        primal = (self.parameter(closed), eqn.params["num_consts"], symbolic)
        if symbolic:  # the rule may do anything with what it knows to be zero
            self.opaque = True
            return primal
        if self._derivatives == _MOST_DERIVATIVES:  # rules call each other, and themselves
            return primal
        self._derivatives += 1
        try:
            rule, consts, zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*(False for _ in closed.in_avals))
            return (*primal, self.jaxpr(rule), tuple(_array_key(c) for c in consts), tuple(zeros))
        except Exception:  # the rule's thunk is no public interface
            self.opaque = True
            return primal
        finally:
            self._derivatives -= 1


def _hoist(closed: Any) -> tuple[Any, list[Any]]:
    """Lift arrays captured inside inner `jit` calls to the top, so that they become arguments."""
    jaxpr, captured = closed.jaxpr, dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    eqns, changed = [], False
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jit":
            inner, consts = _hoist(eqn.params["jaxpr"])
            if consts:
                changed = True
                extra = list(inner.constvars)
                captured.update(zip(extra, consts, strict=True))
                eqn = _prepend_inputs(eqn, inner, extra)
        eqns.append(eqn)
    if changed:
        jaxpr = jaxpr.replace(constvars=list(captured), eqns=eqns)
    return jaxpr, list(captured.values())


def _prepend_inputs(eqn: Any, inner: Any, extra: list[Any]) -> Any:
    """The same `jit` equation with the constants of its body as leading operands."""
    n = len(extra)
    params = dict(eqn.params)
    params["jaxpr"] = jex.ClosedJaxpr(inner.replace(constvars=[], invars=[*extra, *inner.invars]), ())
    params["donated_invars"] = (False,) * n + tuple(params["donated_invars"])
    for name in ("in_shardings", "in_layouts"):
        params[name] = _plain_jit()[name] * n + tuple(params[name])
    return eqn.replace(invars=[*extra, *eqn.invars], params=params)


@functools.cache
def _plain_jit() -> dict[str, Any]:
    """What `jit` writes for an operand without a sharding or layout."""
    return jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0].params


class Program:
    """A traced function without its data. Hashable; equal where the computation is the same."""

    def __init__(self, jaxpr: Any, in_tree: Any, out_tree: Any, owner: Callable[..., Any], static: Any):
        self.jaxpr = jaxpr
        self.in_tree = in_tree
        self.out_tree = out_tree
        reader = _Reader()
        key = reader.jaxpr(jaxpr)
        if reader.opaque:
            # Equal structure is still required: the same function may see other data.
            key = (_Identity(owner), _static_key(static), key)
        self.key = (key, in_tree, out_tree)
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Program) and self._hash == other._hash and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Program({self.jaxpr})"

    def __call__(self, consts: list[Any], *args: Any) -> Any:
        """Evaluate at ``args``, with ``consts`` in the place of the captured arrays."""
        leaves, tree = jax.tree.flatten(args)
        if tree != self.in_tree:
            raise TypeError(f"this program was traced for {self.in_tree}, not {tree}")
        out = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.jaxpr, consts))(*leaves)
        return jax.tree.unflatten(self.out_tree, out)


def _static_key(static: Any) -> Hashable:
    """What a function carries along beside its arguments: plain values by value, all else by identity."""
    leaves, structure = jax.tree.flatten(static)
    keys = [
        _array_key(leaf)
        if hasattr(leaf, "dtype")
        else (type(leaf), leaf)
        if isinstance(leaf, _PLAIN)
        else _Identity(leaf)
        for leaf in leaves
    ]
    return (tuple(keys), structure)


def trace(
    fn: Callable[..., Any], *args: Any, owner: Callable[..., Any] | None = None, static: Any = None
) -> tuple[Program, list[Any]]:
    """Trace ``fn`` at the shapes of ``args``, once.

    **Arguments:** `owner`, `static` — the object whose identity, and the pytree whose leaves, stand for
    `fn` where its jaxpr does not say everything; `fn` itself by default.

    **Returns:** the program and the arrays that `fn` captured.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, consts = _hoist(closed)
    owner = fn if owner is None else owner
    program = Program(jaxpr, jax.tree.structure(args), jax.tree.structure(shape), owner, static)
    return program, [c if isinstance(c, jax.Array | jax.core.Tracer) else np.asarray(c) for c in consts]


class Static:
    """Everything of a pytree but its arrays, as one hashable argument of a compiled function.

    Flattened once: a compiled function that is called often then takes a flat list of arrays.
    """

    def __init__(self, rest: tuple[Any, ...], tree: Any):
        self.rest, self.tree = rest, tree

    @staticmethod
    def split(tree: Any) -> tuple[list[Any], Static]:
        """The array leaves of a pytree, and the static rest."""
        leaves, structure = jax.tree.flatten(tree)
        is_array = [eqx.is_array_like(leaf) for leaf in leaves]
        rest = tuple(_ARRAY if a else leaf for a, leaf in zip(is_array, leaves, strict=True))
        return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a], Static(rest, structure)

    def join(self, arrays: list[Any]) -> Any:
        """The pytree with these arrays."""
        remaining = iter(arrays)
        return jax.tree.unflatten(self.tree, [next(remaining) if leaf is _ARRAY else leaf for leaf in self.rest])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and (self.rest, self.tree) == (other.rest, other.tree)

    def __hash__(self) -> int:
        return hash((self.rest, self.tree))


_ARRAY = enum.Enum("_Place", "ARRAY").ARRAY
