"""Points as pytrees: what is optimised in them, their norms, and their view as one real vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .errors import InputError, is_traced

__all__ = [
    "cast_like",
    "check_no_nan",
    "copy_tree",
    "describe",
    "flat_size",
    "flatten",
    "is_floating",
    "is_key",
    "norm",
    "normal_like",
    "real_dtype",
    "signature",
    "split",
    "unflatten",
]


def _is_nnx_module(x: Any) -> bool:
    return any(c.__module__.startswith("flax.nnx") and c.__name__ == "Module" for c in type(x).__mro__)


def _holds_module(x: Any) -> bool:
    found = False

    def look(node: Any) -> bool:
        nonlocal found
        found = found or isinstance(node, eqx.Module)
        return found

    jax.tree.leaves(x, is_leaf=look)
    return found


def describe(leaf: Any) -> str:
    """``float32[3,4]`` for an array, the type's name for anything else."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return type(leaf).__name__


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is a floating or complex array or number (tracers too)."""
    if hasattr(leaf, "dtype"):
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    return isinstance(leaf, float | complex)


def is_key(leaf: Any) -> bool:
    """Whether an array holds keys of `jax.random`."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def signature(tree: PyTree) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Shape and dtype of each leaf."""
    return tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in jax.tree.leaves(tree))


def _path(name: str, path: tuple) -> str:
    return name + jax.tree_util.keystr(path)


def check_width(name: str, tree: PyTree) -> None:
    """Refuse 64-bit NumPy floats while JAX's 64-bit mode is off: they would be narrowed silently."""
    if jax.config.read("jax_enable_x64"):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype in (np.float64, np.complex128):
            narrow = "float32" if leaf.dtype == np.float64 else "complex64"
            raise InputError(
                _path(name, path),
                describe(leaf),
                f"{narrow} (pass .astype('{narrow}')), "
                "or 64-bit mode switched on: jax.config.update('jax_enable_x64', True)",
            )


def check_no_nan(name: str, tree: PyTree) -> None:
    """Refuse NaN in any floating leaf whose value is known on the host."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer) or not is_floating(leaf):
            continue
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            continue
        # NaN propagates through min, which needs no temporary of the array's size.
        array = np.asarray(leaf)
        parts = (np.real(array), np.imag(array)) if np.iscomplexobj(array) else (array,)
        if any(part.size and np.isnan(np.min(part)) for part in parts):
            count = int(np.isnan(array).sum())
            raise InputError(_path(name, path), f"{describe(array)} with {count} NaN", "no NaN (mask missing entries)")


def split(x0: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Split a starting point into what is optimised and the function that puts it back together.

    **Arguments:** `x0` — any pytree of floating or complex arrays; or an Equinox or Flax NNX
    model, whose other leaves (activations, integer buffers, NNX states that are no parameters)
    are carried through unchanged.

    **Returns:** `(x, rebuild)`: `x` holds arrays only, and `rebuild(x)` has the form of `x0`. As a
    pytree, `rebuild` holds what it carries through.

    **Raises:** `InputError` where nothing is left to optimise, where a plain container holds a
    leaf that cannot be optimised, or where a float64 array would be narrowed silently.
    """
    if _is_nnx_module(x0):
        from flax import nnx  # the user's own installation

        graph, x, rest = nnx.split(x0, nnx.Param, ...)
        return x, jax.tree_util.Partial(nnx.merge, graph, rest)

    leaves = jax.tree_util.tree_leaves_with_path(x0)
    if not leaves:
        raise InputError("x0", f"{type(x0).__name__} without leaves", "at least one array to optimize")
    check_width("x0", x0)
    if _holds_module(x0):
        x, static = eqx.partition(x0, eqx.is_inexact_array)
        if not jax.tree.leaves(x):
            raise InputError("x0", f"{type(x0).__name__} without floating arrays", "a model with parameters")
        rebuild = jax.tree_util.Partial(eqx.combine, static)
    else:
        for path, leaf in leaves:
            # Python floats are welcome as leaves; integers are almost always a slip.
            if not is_floating(leaf):
                raise InputError(_path("x0", path), describe(leaf), "a floating or complex array")
        x = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else _as_array(a), x0)
        rebuild = _same
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if leaf.size == 0:
            raise InputError(_path("x0", path), describe(leaf), "an array with at least one entry")
    if not is_traced(x):
        check_no_nan("x0", x)
    return x, rebuild


def _same(x: PyTree) -> PyTree:
    return x


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.asarray(leaf)
    return np.asarray(leaf, dtype=jax.dtypes.canonicalize_dtype(type(leaf)))


def real_dtype(tree: PyTree) -> jnp.dtype:
    """The widest real dtype among the leaves, at least float32: sums and hyperparameters use it."""
    return jnp.dtype(jnp.result_type(jnp.float32, *(jnp.finfo(a.dtype).dtype for a in jax.tree.leaves(tree))))


def norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm over all leaves, accumulated in at least float32."""
    squares = (jnp.sum(jnp.square(part)) for part in _real_parts(tree))
    return jnp.sqrt(sum(squares, start=jnp.zeros((), real_dtype(tree))))


def _real_parts(tree: PyTree) -> list[Array]:
    """Real parts, then imaginary parts, leaf by leaf, in the common real dtype."""
    dtype = real_dtype(tree)
    pieces = [(a.real, a.imag) if jnp.iscomplexobj(a) else (a,) for a in jax.tree.leaves(tree)]
    return [part.astype(dtype) for piece in pieces for part in piece]


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Cast each array leaf to its counterpart's dtype, dropping weak types; the shapes must agree."""

    def cast(a: Any, b: Any) -> Any:
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(f"a solver's step changed a state leaf from shape {jnp.shape(b)} to {jnp.shape(a)}")
        if jnp.iscomplexobj(a) and not jnp.iscomplexobj(b):
            raise ValueError("a solver's step turned a real state leaf into a complex one")
        return jax.lax.convert_element_type(a, b.dtype)

    return jax.tree.map(cast, tree, like)


def copy_tree(tree: PyTree) -> PyTree:
    """A copy that shares no buffer with the original, inside or outside of jit."""
    return jax.tree.map(lambda a: jnp.array(a, copy=True), tree)


def normal_like(key: Array, like: PyTree) -> PyTree:
    """Independent standard normal entries in the shapes and dtypes of `like`; complex ones of variance 1."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    )


def flat_size(tree: PyTree) -> int:
    """Number of real coordinates: a complex entry counts twice."""
    return sum(a.size * (2 if jnp.iscomplexobj(a) else 1) for a in jax.tree.leaves(tree))


def flatten(tree: PyTree) -> Float[Array, " n"]:
    """All leaves as one real vector (real parts, then imaginary parts, leaf by leaf).

    With this view Re⟨u, v⟩ is the ordinary dot product, and the Hessian of a real function of
    complex variables is an ordinary symmetric matrix.
    """
    parts = [jnp.ravel(part) for part in _real_parts(tree)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def unflatten(vector: Float[Array, " n"], like: PyTree) -> PyTree:
    """Inverse of `flatten`: shapes and dtypes are those of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    out, at = [], 0
    for a in leaves:
        piece = vector[at : at + a.size].reshape(a.shape)
        at += a.size
        if jnp.iscomplexobj(a):
            piece = jax.lax.complex(piece, vector[at : at + a.size].reshape(a.shape))
            at += a.size
        out.append(piece.astype(a.dtype))
    return jax.tree.unflatten(treedef, out)
