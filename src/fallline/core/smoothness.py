"""Which steps of a program keep it from being twice differentiable everywhere.

A Hessian says nothing about a kink, so a second-order verdict on a non-smooth objective would be
worth nothing. The test reads the jaxpr: it follows what depends on the point through every
equation and reports the primitives that have a kink or a jump. It is conservative: a kink that
is never reached still counts.
"""

from __future__ import annotations

from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

__all__ = ["kinks"]

_KINKED = frozenset(
    {"abs", "max", "min", "reduce_max", "reduce_min", "cummax", "cummin", "reduce_window_max", "reduce_window_min"}
    | {"select_and_scatter_add", "select_and_gather_add", "sort", "top_k", "argmax", "argmin"}
    | {"sign", "floor", "ceil", "round", "rem", "clamp", "nextafter", "reduce_precision", "bitcast_convert_type"}
    | {"svd", "eigh", "eig"}  # where singular values vanish, or eigenvalues meet
    | {"pure_callback", "io_callback", "ffi_call"}  # nobody knows
)
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
# Smooth functions whose implementation guards against overflow with a maximum of its own.
_SMOOTH_CALLS = frozenset({"logaddexp", "logaddexp2", "_softmax"})


def kinks(jaxpr: Any, active: list[bool]) -> list[str]:
    """Names of the primitives that may make the program non-smooth in its active inputs.

    **Arguments:** `jaxpr`; `active[i]` says whether input `i` varies.

    **Returns:** sorted names, empty where every step is smooth on its natural domain.
    """
    found: set[str] = set()
    _walk(jaxpr, active, found)
    return sorted(found)


def _is_smooth_abs(out: Any, jaxpr: Any) -> bool:
    """|z| that is only ever squared is smooth; so is log|z| on its domain."""
    if any(v is out for v in jaxpr.outvars):
        return False
    for use in jaxpr.eqns:
        places = [i for i, v in enumerate(use.invars) if v is out]
        if not places:
            continue
        name = use.primitive.name
        if name == "jit":  # jnp.square and its like are jitted
            inner = use.params["jaxpr"].jaxpr
            if not all(_is_smooth_abs(inner.invars[i], inner) for i in places):
                return False
        elif not (
            name in ("square", "log")
            or (name == "integer_pow" and use.params["y"] % 2 == 0)
            or (name == "mul" and len(places) == 2)
        ):
            return False
    return True


def _walk(jaxpr: Any, active: list[bool], found: set[str]) -> list[bool]:
    live = {v for v, a in zip(jaxpr.invars, active, strict=True) if a}

    def is_live(v: Any) -> bool:
        return not isinstance(v, jex.Literal) and v in live

    needed, felt = _uses(jaxpr)
    for eqn in jaxpr.eqns:
        ins = [is_live(v) for v in eqn.invars]
        if not any(ins) or needed.isdisjoint(eqn.outvars):
            continue
        name = eqn.primitive.name
        if name in ("stop_gradient", "is_finite"):
            continue
        if name == "reduce_max" and felt.isdisjoint(eqn.outvars):
            continue  # the shift of a log-sum-exp or a softmax, which cancels
        if name in _COMPARISONS and eqn.invars[0] is eqn.invars[1]:
            continue  # x != x asks for NaN
        outs = [True] * len(eqn.outvars)
        if name == "custom_jvp_call" and _call_name(eqn) in _SMOOTH_CALLS:
            pass
        elif subs := _bodies(eqn, ins):
            if name == "cond" and ins[0]:
                found.add("cond")
            outs = [False] * len(eqn.outvars)
            for body, inner in subs:
                result = _walk(body, inner, found)
                if len(result) == len(outs):
                    outs = [a or b for a, b in zip(outs, result, strict=True)]
                else:
                    outs = [True] * len(outs)
        elif name in _KINKED:
            if not (name == "abs" and _is_smooth_abs(eqn.outvars[0], jaxpr)):
                found.add(name)
        elif name in _COMPARISONS:
            pass  # a jump only where something continuous is selected by it
        elif (name == "select_n" and ins[0]) or (
            name == "convert_element_type" and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.bool_)
        ):
            found.add("where" if name == "select_n" else "comparison")
        elif name == "convert_element_type" and not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
            found.add("cast to integer")
        live.update(v for v, a in zip(eqn.outvars, outs, strict=True) if a)
    return [is_live(v) for v in jaxpr.outvars]


def _uses(jaxpr: Any) -> tuple[set[Any], set[Any]]:
    """The variables that the outputs need, and those that they need by a way without `stop_gradient`."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    felt = set(needed)
    for eqn in reversed(jaxpr.eqns):
        operands = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        if not needed.isdisjoint(eqn.outvars):
            needed.update(operands)
        if eqn.primitive.name != "stop_gradient" and not felt.isdisjoint(eqn.outvars):
            felt.update(operands)
    return needed, felt


def _call_name(eqn: Any) -> str:
    call = eqn.params.get("call_jaxpr")
    debug = getattr(getattr(call, "jaxpr", None), "debug_info", None)
    return getattr(debug, "func_name", "") or eqn.params.get("name", "")


def _bodies(eqn: Any, ins: list[bool]) -> list[tuple[Any, list[bool]]]:
    """The inner programs of an equation with the activity of their inputs (loops: everything)."""
    name = eqn.primitive.name
    if name == "cond":
        return [(branch.jaxpr, ins[1:]) for branch in eqn.params["branches"]]
    bodies = [
        value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
        for value in eqn.params.values()
        if isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)
    ]
    exact = len(bodies) == 1 and len(bodies[0].invars) == len(ins) and name not in ("scan", "while")
    return [(body, ins if exact else [True] * len(body.invars)) for body in bodies]
