"""A user's function as data: its jaxpr, a key that equal programs share, and its constants.

`jax.jit` keys compiled code by the function object, so a new lambda of the same program compiles
again. Here the function is traced once to a jaxpr, its captured arrays become arguments, and a
`Program` compares by structure: an equal program over other data reuses the compiled code.

Where the jaxpr does not say everything (callbacks, custom VJP rules, parameters of unknown kinds)
the function's identity joins the key: sharing too little costs a compilation, sharing too much
would be a wrong gradient.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex
import numpy as np

__all__ = ["Program", "Static", "trace"]


class _Identity:
    """Equal only for the same function object (or the same method of the same object)."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        bound = isinstance(fn, types.MethodType)
        self.ids = (id(fn.__self__), id(fn.__func__)) if bound else (id(fn),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.ids == other.ids

    def __hash__(self) -> int:
        return hash(self.ids)


class _Opaque(Exception):
    """A jaxpr holds something whose meaning cannot be read off its structure."""


_PLAIN = (bool, int, str, bytes, type(None), np.dtype, enum.Enum, type)
_BY_VALUE = (*_PLAIN, jax.sharding.Mesh, jax.sharding.Sharding, jax.tree_util.PyTreeDef)


def _array_key(a: Any) -> Hashable:
    a = np.asarray(a)
    return (a.shape, str(a.dtype), a.tobytes())


def _aval_key(aval: Any) -> Hashable:
    return (getattr(aval, "shape", None), str(getattr(aval, "dtype", aval)), getattr(aval, "weak_type", False))


def _param_key(value: Any) -> Hashable:
    if isinstance(value, _BY_VALUE):
        return (type(value).__name__, value)
    if isinstance(value, float | complex):
        return (type(value).__name__, repr(value))
    if isinstance(value, jex.ClosedJaxpr):
        return ("closed", _jaxpr_key(value.jaxpr), tuple(_array_key(c) for c in value.consts))
    if isinstance(value, jex.Jaxpr):
        return ("jaxpr", _jaxpr_key(value))
    if isinstance(value, tuple | list):
        return (type(value).__name__, *(_param_key(v) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, _param_key(v)) for k, v in sorted(value.items())))
    if isinstance(value, np.ndarray | np.generic):
        return _array_key(value)
    if isinstance(value, jax.core.AbstractValue):
        return _aval_key(value)
    if type(value).__module__.startswith("jax.") and type(value).__name__ in ("UnspecifiedValue", "AbstractMesh"):
        return (type(value).__name__, str(value))
    raise _Opaque(type(value).__name__)


def _custom_jvp_key(eqn: Any) -> Hashable:
    """The primal and the rule: tracing the rule is the only way to see what it does."""
    closed = eqn.params["call_jaxpr"]
    rule, consts, zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*(False for _ in closed.in_avals))
    return (
        _param_key(closed),
        _jaxpr_key(rule),
        tuple(_array_key(c) for c in consts),
        tuple(zeros),
        eqn.params["num_consts"],
        eqn.params["symbolic_zeros"],
    )


def _jaxpr_key(jaxpr: Any) -> Hashable:
    numbers: dict[Any, int] = {}

    def number(v: Any) -> Hashable:
        if isinstance(v, jex.Literal):
            return ("literal", _array_key(v.val), _aval_key(v.aval))
        return numbers.setdefault(v, len(numbers))

    heads = tuple((number(v), _aval_key(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "custom_jvp_call":
            try:
                params: Hashable = _custom_jvp_key(eqn)
            except _Opaque:
                raise
            except Exception as error:  # the rule's thunk is no public interface
                raise _Opaque("custom_jvp_call") from error
        else:
            params = tuple((k, _param_key(v)) for k, v in sorted(eqn.params.items()))
        ins = tuple(number(v) for v in eqn.invars)
        outs = tuple((number(v), _aval_key(v.aval)) for v in eqn.outvars)
        body.append((eqn.primitive.name, params, ins, outs))
    return (len(jaxpr.constvars), heads, tuple(body), tuple(number(v) for v in jaxpr.outvars))


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
        default = params[name][0] if params[name] else _default_spec(eqn, name)
        params[name] = (default,) * n + tuple(params[name])
    return eqn.replace(invars=[*extra, *eqn.invars], params=params)


def _default_spec(eqn: Any, name: str) -> Any:
    """What `jit` writes for an operand without a sharding or layout: as for its first output."""
    return eqn.params[name.replace("in_", "out_")][0] if name == "in_shardings" else None


class Program:
    """A traced function without its data. Hashable; equal where the computation is the same."""

    def __init__(self, jaxpr: Any, in_tree: Any, out_tree: Any, fn: Callable[..., Any]):
        self.jaxpr = jaxpr
        self.in_tree = in_tree
        self.out_tree = out_tree
        try:
            key = _jaxpr_key(jaxpr)
        except _Opaque:
            # Equal shapes and text are still required: the same function may see other data.
            key = (_Identity(fn), str(jaxpr))
        self.key = (key, in_tree, out_tree)
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Program) and self._hash == other._hash and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def __call__(self, consts: list[Any], *args: Any) -> Any:
        """Evaluate at ``args``, with ``consts`` in the place of the captured arrays."""
        leaves, tree = jax.tree.flatten(args)
        if tree != self.in_tree:
            raise TypeError(f"this program was traced for {self.in_tree}, not {tree}")
        out = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.jaxpr, consts))(*leaves)
        return jax.tree.unflatten(self.out_tree, out)


def trace(fn: Callable[..., Any], *args: Any, owner: Callable[..., Any] | None = None) -> tuple[Program, list[Any]]:
    """Trace ``fn`` at the shapes of ``args``, once.

    **Arguments:** `owner` — the object whose identity stands for `fn` where its jaxpr does not
    say everything; `fn` itself by default.

    **Returns:** the program and the arrays that `fn` captured.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, consts = _hoist(closed)
    program = Program(jaxpr, jax.tree.structure(args), jax.tree.structure(shape), fn if owner is None else owner)
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
