"""What a training loop does with a gradient that is not finite: skip it, stop, or raise; never nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from ..core.errors import InputError, check_choice

__all__ = ["NonfiniteState", "on_nonfinite"]

ACTIONS = ("skip", "stop", "raise")


class NonfiniteState(NamedTuple):
    """`steps` so far, how many of them were `skipped`, whether it has `stopped`, and the state of the wrapped one."""

    steps: Int[Array, ""]
    skipped: Int[Array, ""]
    stopped: Bool[Array, ""]
    inner: Any


def on_nonfinite(inner: optax.GradientTransformation, action: str) -> optax.GradientTransformationExtraArgs:
    """Guard a transformation, its state above all, from gradients that are not finite.

    A gradient counts as not finite where any entry of it, or of an extra argument, is NaN or infinite; so does a
    finite gradient of which the transformation makes an update that is not.

    **Arguments:**
    - `inner`: any Optax transformation.
    - `action`: `"skip"`: that step changes nothing (zero updates, the state as it was) and is counted in
      `state.skipped`; `"stop"`: from that step on nothing changes, `state.stopped` is True and `state.steps` the
      number of steps before it; `"raise"`: an error at that step, from inside compiled code too.

    The first two choose between two states, a pass over the state that the transformation alone does not make.

    **Raises:** `InputError` for another action, or where `inner` is no transformation. With `"raise"`, in a step, the
    error of `equinox.error_if`.
    """
    check_choice("action", action, ACTIONS)
    if not all(callable(getattr(inner, name, None)) for name in ("init", "update")):
        raise InputError("inner", type(inner).__name__, "an Optax transformation")
    wrapped = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> NonfiniteState:
        return NonfiniteState(jnp.int32(0), jnp.int32(0), jnp.bool_(False), wrapped.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, NonfiniteState]:
        made, after = wrapped.update(updates, state.inner, params, **extra)
        finite = _all_finite((updates, extra, made))
        if action == "raise":
            made = eqx.error_if(made, ~finite, "a gradient, an extra argument or an update is not finite")
            return made, NonfiniteState(state.steps + 1, state.skipped, state.stopped, after)
        kept = finite & ~state.stopped
        made = jax.tree.map(lambda a: jnp.where(kept, a, jnp.zeros_like(a)), made)
        after = jax.tree.map(lambda a, b: jnp.where(kept, a, b), after, state.inner)
        stopped = state.stopped | (~finite if action == "stop" else False)
        skipped = state.skipped + (~kept if action == "skip" else 0)
        steps = state.steps + (kept if action == "stop" else 1)
        return made, NonfiniteState(steps, skipped, stopped, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating or complex entry of a pytree is finite."""
    leaves = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(a), jnp.inexact)]
    return jnp.stack([jnp.all(jnp.isfinite(a)) for a in leaves]).all() if leaves else jnp.bool_(True)
