"""Extra arguments of an Optax update: their names, which of them an update declares, and the refusal of a missing one.

An update declares what it asks beside gradient and parameters as keyword-only parameters of these names.
In a training loop of one's own they are passed by name, `update(gradient, state, params, vector=v, hvp=Hv)`;
`optimizer` supplies them to every transformation that declares them.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from . import trees
from .errors import InputError

__all__ = ["EXTRA", "declared", "require"]

EXTRA: Mapping[str, str] = {
    "value": "the loss at the parameters, a real scalar",
    "vector": "a random vector v like the gradient, of independent entries with mean 0 and variance 1",
    "hvp": "H v like the gradient: the Hessian at the parameters times `vector`, on the batch of the gradient",
    "per_example_gradients": "the gradient of each example of the batch, like the gradient with a leading axis",
    "key": "a key of jax.random that no other step is given",
}
"""What an update may ask, and what each one is."""


def require(updates: PyTree, **given: Any) -> None:
    """Refuse an extra argument that is missing or does not fit the gradient `updates`, before anything is compiled.

    **Raises:** `InputError` naming the first such argument.
    """
    for name, value in given.items():
        if value is None:
            raise InputError(name, None, f"{EXTRA[name]}; pass it as update(gradient, state, params, {name}=...)")
        if name == "value":
            if jnp.shape(value) != () or jnp.iscomplexobj(value):
                raise InputError(name, trees.describe(value), EXTRA[name])
        elif name == "key":
            if not (trees.is_key(value) or jnp.shape(value) == (2,)):
                raise InputError(name, trees.describe(value), EXTRA[name])
        else:
            _check_like(name, value, updates, leading=name == "per_example_gradients")


def _check_like(name: str, value: PyTree, updates: PyTree, *, leading: bool) -> None:
    if jax.tree.structure(value) != jax.tree.structure(updates):
        expected = f"{EXTRA[name]} (under optax.masked and multi_transform: mask_compatible_extra_args=True)"
        raise InputError(name, f"a pytree of another structure, {jax.tree.structure(value)}", expected)
    rows: set[int] = set()
    for given, like in zip(jax.tree.leaves(value), jax.tree.leaves(updates), strict=True):
        shape = jnp.shape(given)
        if leading and shape[:1]:
            rows.add(shape[0])
            shape = shape[1:]
        elif leading:
            shape = None
        if shape != jnp.shape(like):
            raise InputError(name, f"{trees.describe(given)} where the gradient is {trees.describe(like)}", EXTRA[name])
    if len(rows) > 1 or 0 in rows:
        raise InputError(name, f"{sorted(rows)} examples", f"{EXTRA[name]}, of one length of at least 1")


def declared(transformation: Any) -> frozenset[str]:
    """The names in `EXTRA` that a transformation or any that it is made of declares.

    `optax.chain` and its kin take any keyword and hand it on, so that their own signature says nothing:
    what they hold is looked through.
    """
    found: set[str] = set()
    seen: set[int] = set()
    queue: list[Any] = [transformation]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):
            names = list(inspect.signature(item).parameters)
            if names[1:2] == ["state"]:
                found |= EXTRA.keys() & {name for name in names if _keyword_only(item, name)}
            queue += [cell.cell_contents for cell in item.__closure__ or () if _filled(cell)]
        elif isinstance(item, types.MethodType):
            queue += [item.__func__, *vars(item.__self__).values()] if hasattr(item.__self__, "__dict__") else []
        elif isinstance(item, functools.partial):
            queue += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, Mapping):
            queue += list(item.values())
        elif isinstance(item, tuple | list):
            queue += list(item)
        elif callable(getattr(item, "update", None)) and callable(getattr(item, "init", None)):
            queue.append(item.update)
        elif hasattr(item, "__wrapped__"):
            queue.append(item.__wrapped__)
    return frozenset(found)


def _keyword_only(fn: types.FunctionType, name: str) -> bool:
    return inspect.signature(fn).parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that its function has not assigned
        return False
    return True
