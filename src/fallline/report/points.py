"""Points in files: one `.npz` with an array for each leaf, named by its place in the pytree.

A bare array is called `x`. Dtypes that NumPy does not have (bfloat16) are written as float32, which
holds each of their values, and come back by the dtype of the point that they are read into.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ..core import trees
from ..core.errors import InputError

__all__ = ["load_point", "names", "save_point"]


def names(x: PyTree) -> list[str]:
    """A name for each leaf: its path, such as `layers/0/weight`; `x` for a bare array."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") or "x" for path in paths]


def save_point(path: Path, x: PyTree) -> None:
    """Write the floating leaves of a pytree or model; a file that is there is replaced at once or not at all."""
    point = trees.split(x)[0]
    arrays = {}
    for name, leaf in zip(names(point), jax.tree.leaves(point), strict=True):
        array = np.asarray(leaf)
        arrays[name] = array if array.dtype.kind in "fc" else array.astype(np.float32)
    part = path.with_name(path.name + ".part")
    with zipfile.ZipFile(part, "w") as file:  # np.savez has names of its own that no array may have
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    os.replace(part, path)


def load_point(path: Path, like: PyTree | None = None, *, argument: str = "point") -> PyTree:
    """Read a `.npz` or `.npy` file into the form, shapes and dtypes of `like`.

    Without `like` the structure comes from the names: nested dictionaries, or one array.

    **Raises:** `InputError` where the file cannot be read, or does not fit `like`.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise InputError(argument, path, f"a .npz or .npy file of arrays{reason}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fciu":
            raise InputError(argument, f"{path} with {name} of {trees.describe(array)}", "arrays of numbers")
    if like is None:
        return _nested(arrays)
    point, rebuild = trees.split(like)
    wanted, leaves = names(point), jax.tree.leaves(point)
    if set(arrays) != set(wanted):
        raise InputError(argument, f"{path} with {_listed(arrays)}", f"the arrays {_listed(wanted)}")
    read: list[Any] = []
    for name, leaf in zip(wanted, leaves, strict=True):
        if arrays[name].shape != leaf.shape:
            got = f"{path} with {name} of shape {arrays[name].shape}"
            raise InputError(argument, got, f"shape {leaf.shape}")
        if arrays[name].dtype.kind == "c" and leaf.dtype.kind != "c":
            raise InputError(argument, f"{path} with {name} of {arrays[name].dtype}", f"real numbers, {leaf.dtype}")
        read.append(arrays[name].astype(leaf.dtype))
    return rebuild(jax.tree.unflatten(jax.tree.structure(point), read))


def _listed(found: Any) -> str:
    return ", ".join(sorted(found)) or "nothing"


def _nested(arrays: dict[str, np.ndarray]) -> PyTree:
    if set(arrays) == {"x"}:
        return arrays["x"]
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = array
    return tree
