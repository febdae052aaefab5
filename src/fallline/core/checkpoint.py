"""Checkpoints: everything that a run needs to go on, in one file that is whole or not there.

A file is a line that names the format, the length of a header, the header as JSON (what is where),
the raw bytes of each array, and the SHA-256 of all that. Nothing is pickled, and every dtype of JAX
comes back as it was. It is written beside its place and moved there, and the one before it is kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from . import trees
from .errors import FalllineError, InputError, check_nonnegative
from .hosts import is_spread, placed, whole

__all__ = ["Checkpoint", "CheckpointError", "Keeper", "digest", "read_arrays", "restore", "write_arrays"]

_FORMAT = b"fallline checkpoint 1\n"
_SUFFIX = ".checkpoint"
_KEPT = 2


class CheckpointError(FalllineError):
    """A checkpoint is damaged. The message says which file, and which one is whole."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where `minimize` keeps a run, so that it can go on after a crash.

    **Fields:** `folder`, made where it is not there, for this run alone; `seconds`, the time between
    two checkpoints (one more is written at the end of the run).
    """

    folder: str | Path
    seconds: float = 10.0

    @staticmethod
    def of(given: Checkpoint | str | Path) -> Checkpoint:
        """A `Checkpoint` from what a user may pass.

        **Raises:** `InputError` where it is none, or its folder cannot be made.
        """
        made = given if isinstance(given, Checkpoint) else None
        if isinstance(given, str | Path):
            made = Checkpoint(given)
        if made is None:
            raise InputError("checkpoint", type(given).__name__, "a folder, or Checkpoint(folder, seconds=…)")
        check_nonnegative("checkpoint.seconds", made.seconds)
        try:
            Path(made.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError("checkpoint", made.folder, f"a folder that can be made ({error.strerror})") from None
        return made

    def files(self) -> list[Path]:
        """The checkpoints in the folder, the newest last."""
        return sorted(Path(self.folder).glob(f"*{_SUFFIX}"))

    def save(self, step: int, tree: PyTree, about: Mapping[str, Any]) -> None:
        """Write a checkpoint, and remove all but the one before it."""
        write_arrays(Path(self.folder) / f"{step:012d}{_SUFFIX}", tree, about)
        for old in self.files()[:-_KEPT]:
            old.unlink(missing_ok=True)

    def load(self, about: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """The arrays of the newest checkpoint; None where there is none yet.

        **Raises:** `CheckpointError` where it is damaged; `InputError` where it is of another run:
        where its header differs from `about`.
        """
        files = self.files()
        if not files:
            return None
        try:
            arrays, found = read_arrays(files[-1])
        except CheckpointError as error:
            before = f"; remove it to go on from {files[-2].name}" if len(files) > 1 else ""
            raise CheckpointError(f"{error}{before}") from None
        differs = [name for name in about if found.get(name) != about[name]]
        if differs:
            raise InputError("checkpoint", self.folder, f"a folder of this very run; its {differs[0]} is another one")
        return arrays


class Keeper:
    """The checkpoints of one run: `about` is its fingerprint, and says whose a checkpoint is."""

    def __init__(self, checkpoint: Checkpoint, about: Mapping[str, Any]):
        self._checkpoint, self._about, self._saved = checkpoint, about, time.perf_counter()

    def load(self) -> dict[str, Any] | None:
        """See `Checkpoint.load`."""
        return self._checkpoint.load(self._about)

    def is_due(self) -> bool:
        """Whether it is time for another."""
        return time.perf_counter() - self._saved >= self._checkpoint.seconds

    def save(self, step: int, tree: PyTree, *, write: bool = True) -> None:
        """Write one; of several processes one writes, and all call this."""
        tree = jax.tree.map(whole, tree)
        if write:
            self._checkpoint.save(step, tree, self._about)
        self._saved = time.perf_counter()


def _named(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def write_arrays(path: Path, tree: PyTree, about: Mapping[str, Any]) -> None:
    """Write the leaves of a pytree by their paths, with a header of plain values, atomically."""
    entries, blocks = [], []
    for name, leaf in _named(tree).items():
        array = np.asarray(jax.random.key_data(leaf) if trees.is_key(leaf) else leaf)
        entries.append({"path": name, "dtype": str(array.dtype), "shape": list(array.shape)})
        if trees.is_key(leaf):
            entries[-1]["key"] = str(jax.random.key_impl(leaf))
        blocks.append(array.tobytes())
    header = json.dumps({"about": dict(about), "arrays": entries}).encode()
    part, check = path.with_name(path.name + ".part"), hashlib.sha256()
    with part.open("wb") as file:
        for block in (_FORMAT, struct.pack("<Q", len(header)), header, *blocks):
            check.update(block)
            file.write(block)
        file.write(check.digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by path and the header of a file.

    **Raises:** `CheckpointError` where a single byte is missing or altered.
    """
    content = memoryview(path.read_bytes())
    begin = len(_FORMAT) + 8
    body, check = content[:-32], content[-32:]
    if len(content) < begin + 32 or bytes(content[: len(_FORMAT)]) != _FORMAT:
        raise CheckpointError(f"{path}: no checkpoint of this version of fallline, or one cut short")
    if hashlib.sha256(body).digest() != bytes(check):
        raise CheckpointError(f"{path}: damaged or cut short, its checksum does not fit")
    (length,) = struct.unpack("<Q", body[len(_FORMAT) : begin])
    header = json.loads(bytes(body[begin : begin + length]))
    arrays, at = {}, begin + length
    for entry in header["arrays"]:
        dtype, shape = jnp.dtype(entry["dtype"]), tuple(entry["shape"])
        size = dtype.itemsize * int(np.prod(shape))
        array = np.frombuffer(body[at : at + size], dtype).reshape(shape)
        arrays[entry["path"]] = (
            jax.random.wrap_key_data(jnp.asarray(array), impl=entry["key"]) if "key" in entry else array
        )
        at += size
    return arrays, header["about"]


def restore(arrays: Mapping[str, Any], like: PyTree, prefix: str = "") -> PyTree:
    """A pytree of device arrays in the form of `like`, whose leaves have shape and dtype.

    **Raises:** `InputError` where a leaf is missing, or of another shape or dtype.
    """

    def take(path: Any, leaf: Any) -> Any:
        name = prefix + jax.tree_util.keystr(path)
        array = arrays.get(name)
        if array is None or array.shape != leaf.shape or array.dtype != leaf.dtype:
            got = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise InputError("checkpoint", f"{got} for {name}", f"{leaf.dtype}{list(leaf.shape)}, as in this run")
        return array if trees.is_key(leaf) else placed(array, leaf)

    return jax.tree_util.tree_map_with_path(take, like)


def digest(tree: Any) -> str:
    """A hash of the arrays of a pytree and of everything static in it, the same in every process."""
    leaves, structure = jax.tree.flatten(tree)
    total = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(structure)).encode())
    for leaf in leaves:
        if is_spread(leaf):
            total.update(_spread_digest(leaf))
        elif hasattr(leaf, "dtype"):
            array = np.ascontiguousarray(jax.random.key_data(leaf) if trees.is_key(leaf) else leaf)
            total.update(f"{array.dtype}{array.shape}".encode())
            total.update(array.tobytes())
        else:
            total.update(re.sub(r"0x[0-9a-f]+", "", repr(leaf)).encode())
    return total.hexdigest()[:32]


def _spread_digest(leaf: jax.Array) -> bytes:
    """Of an array that is cut among processes: each hashes what it has, and all agree."""
    mine = hashlib.sha256()
    for shard in sorted(leaf.addressable_shards, key=lambda shard: str(shard.index)):
        mine.update(np.ascontiguousarray(shard.data).tobytes())
    said = multihost_utils.process_allgather(np.frombuffer(mine.digest(), np.uint8))
    return np.asarray(said).tobytes()
