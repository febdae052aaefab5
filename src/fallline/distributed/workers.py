"""The workers of a round: simulated along a leading axis of one device, or one block of them on each device of a mesh.

A stage is a function of stacked arrays, one entry for each worker that is here (`local` ones), and of shared arrays.
`spread` runs it on every device; inside, `each` goes over the workers that are here, `gather` brings the entries of all
workers to every device, and `transpose` brings to each device its blocks of all workers. With one device both are
nothing, so that the same function is the simulation and the real thing.

With `exact=True` the bits are the same, simulated and real, on any number of devices: workers go one after another
through a compiled loop, with barriers around its body, so that the compiler cannot fuse what one worker computes with
something that depends on how many there are. Without, they go side by side under `vmap` where the model is small, which
is faster and agrees up to rounding; with large models that would be slower, and memory for all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from ..core.errors import InputError, check_count

__all__ = ["AXIS", "Workers", "mesh_of"]

AXIS = "workers"
_SMALL = 1 << 20  # numbers that workers share, up to which they go side by side


def mesh_of(devices: list[Any] | None = None) -> Mesh:
    """A mesh of all devices of all processes (or of these), along which workers are laid out."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


class Workers(eqx.Module):
    """`count` workers, numbered from 0.

    **Arguments:** `mesh` — a mesh with the one axis `"workers"`, over devices of one process or of many, each of which
    takes an equal share of the workers in order; None simulates them all on one device. `exact` — see above.

    **Raises:** `InputError` where the shares would be unequal.
    """

    count: int = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)
    exact: bool = eqx.field(static=True)

    def __init__(self, count: int, mesh: Mesh | None = None, *, exact: bool = False):
        check_count("count", count, 1)
        if not isinstance(mesh, Mesh | None) or (mesh is not None and mesh.axis_names != (AXIS,)):
            got = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else type(mesh).__name__
            raise InputError("mesh", got, f"a mesh with one axis named {AXIS!r}: see mesh_of")
        if mesh is not None and count % mesh.size:
            raise InputError("workers", count, f"a multiple of the {mesh.size} devices of the mesh, for equal shares")
        self.count, self.mesh, self.exact = int(count), mesh, exact

    @property
    def devices(self) -> int:
        """Over how many devices they are spread."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def local(self) -> int:
        """How many of them one device has."""
        return self.count // self.devices

    def ids(self) -> Int[Array, " local"]:
        """The numbers of the workers that are here (inside `spread`)."""
        first = 0 if self.mesh is None else jax.lax.axis_index(AXIS) * self.local
        return first + jnp.arange(self.local)

    def put(self, stacked: PyTree) -> PyTree:
        """Arrays with a leading worker axis where `spread` wants them."""
        if self.mesh is None:
            return stacked
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))

        def place(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                return leaf
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(place, stacked)

    def spread(self, stage: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]) -> Callable[..., tuple[PyTree, PyTree]]:
        """`stage(stacked, shared) -> (stacked, shared)` on every device; shared results must agree on all of them."""
        if self.mesh is None:
            return stage
        specs = (PartitionSpec(AXIS), PartitionSpec())
        return jax.shard_map(stage, mesh=self.mesh, in_specs=specs, out_specs=specs, check_vma=False)

    def each(self, work: Callable[[PyTree, PyTree], PyTree], stacked: PyTree, shared: PyTree) -> PyTree:
        """`work(one, shared)` for each entry along the leading axis of `stacked`; the results, stacked."""
        return self.update(lambda one, _, shared: (work(one, shared), None), stacked, None, shared)[0]

    def update(
        self,
        work: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
        stacked: PyTree,
        kept: PyTree,
        shared: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """`work(one, kept, shared)`, likewise: results, and what is kept, which is overwritten where it lies."""
        if not self.exact and sum(jnp.size(leaf) for leaf in jax.tree.leaves(shared)) <= _SMALL:
            return jax.vmap(work, in_axes=(0, 0, None))(stacked, kept, shared)

        def body(carry: PyTree, item: PyTree) -> tuple[PyTree, PyTree]:
            kept, shared = carry
            place, one = item
            mine = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, keepdims=False), kept)
            one, mine, shared = jax.lax.optimization_barrier((one, mine, shared))
            result, mine = jax.lax.optimization_barrier(work(one, mine, shared))

            def put(a: Array, new: Array) -> Array:
                return jax.lax.dynamic_update_index_in_dim(a, new.astype(a.dtype), place, 0)

            return (jax.tree.map(put, kept, mine), shared), result

        places = jnp.arange(jax.tree.leaves(stacked)[0].shape[0])
        (kept, _), results = jax.lax.scan(body, (kept, shared), (places, stacked))
        return results, kept

    def gather(self, stacked: PyTree) -> PyTree:
        """The entries of all workers, in order, on every device (inside `spread`)."""
        if self.mesh is None:
            return stacked
        return jax.tree.map(lambda a: jax.lax.all_gather(a, AXIS, tiled=True), stacked)

    def transpose(self, stacked: PyTree) -> PyTree:
        """From (local workers, blocks, …) to (all workers, the blocks that this device serves, …) (inside `spread`)."""
        if self.mesh is None:
            return stacked
        return jax.tree.map(lambda a: jax.lax.all_to_all(a, AXIS, 1, 0, tiled=True), stacked)

    def mean(self, stacked: PyTree) -> PyTree:
        """The mean over all workers, on every device (inside `spread`): summed in their order.

        Each device sums its slice of the coordinates for all workers, so that no device receives everything.
        """

        def one(a: Array) -> Array:
            size, devices = int(np.prod(a.shape[1:])), self.devices
            flat = jnp.pad(a.reshape(a.shape[0], size), ((0, 0), (0, -size % devices)))
            mine = self.transpose(flat.reshape(a.shape[0], devices, -1))  # (workers, 1, slice)
            total = jax.lax.optimization_barrier(in_order(mine))
            return self.gather(total).reshape(-1)[:size].reshape(a.shape[1:]) / self.count

        # What is computed of the mean must not be fused with how it came about.
        return jax.lax.optimization_barrier(jax.tree.map(one, stacked))


def in_order(stacked: Array) -> Array:
    """The sum over the leading axis, one after another: the same bits however the rest is cut."""
    if stacked.shape[0] <= 64:
        total = stacked[0]
        for row in range(1, stacked.shape[0]):
            total = total + stacked[row]
        return total
    return jax.lax.fori_loop(1, stacked.shape[0], lambda i, total: total + stacked[i], stacked[0])
