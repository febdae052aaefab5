"""The problem of many workers, each with data of its own.

f(x) = 1/n Σ_i f_i(x),   f_i(x) = 1/N Σ_j loss(x, data_ij)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from ..core import trees
from ..core.errors import InputError, check_count
from ..core.problem import Problem
from .workers import Workers

__all__ = ["Sharded", "shard"]


class Sharded(Problem):
    """The mean over workers of the mean over each one's examples.

    **Arguments:**
    - `loss`: `loss(x, batch) -> losses` of shape `(rows of the batch,)`.
    - `data`: a pytree of arrays of shape (workers, examples, …): see `shard`.
    - `batch_size`: examples that a worker draws for a gradient, uniformly with replacement; None takes all of its own.
    - `mesh`: devices, of this process or of many, that the workers are laid out on (`fallline.distributed.join`);
      None simulates them on one device.
    - `exact`: the same bits, simulated and real, see `fallline.distributed.workers`.
    - `lower_bound`: a number that the objective never goes below.

    **Raises:** `InputError` for data without workers and examples, and for a number of workers that the devices cannot
    share equally.
    """

    oracles: ClassVar[frozenset[str]] = Problem.oracles | {"minibatch", "workers"}

    loss: Callable[..., Any] = eqx.field(static=True)
    data: PyTree
    batch_size: int | None = eqx.field(static=True)
    workers: Workers
    declared_bound: Any
    rebuild: Any

    def __init__(
        self,
        loss: Callable[..., Any],
        data: PyTree,
        batch_size: int | None = None,
        *,
        mesh: Mesh | None = None,
        exact: bool = False,
        lower_bound: float | None = None,
    ):
        if not callable(loss):
            raise InputError("loss", type(loss).__name__, "a callable loss(x, batch) -> per-example losses")
        leaves = jax.tree.leaves(data)
        sizes = {np.shape(a)[:2] for a in leaves}
        if len(sizes) != 1 or len(size := sizes.pop()) < 2 or 0 in size:
            shapes = ", ".join(dict.fromkeys(trees.describe(a) for a in leaves)) or "a pytree without leaves"
            raise InputError("data", shapes, "arrays (workers, examples, …) that share both axes, of equal shards")
        if batch_size is not None:
            check_count("batch_size", batch_size, 1)
            if batch_size > size[1]:
                raise InputError("batch_size", batch_size, f"at most the examples of a worker, {size[1]}")
            batch_size = int(batch_size)
        if mesh is not None:  # laid out here, before any run looks at it
            trees.check_width("data", data)
        self.loss, self.batch_size, self.declared_bound = loss, batch_size, lower_bound
        self.workers = Workers(size[0], mesh, exact=exact)
        self.data = self.workers.put(data)
        self.rebuild = None

    @property
    def random(self) -> bool:
        return self.batch_size is not None

    @property
    def size(self) -> int:
        """Examples of one worker."""
        return np.shape(jax.tree.leaves(self.data)[0])[1]

    @property
    def lower_bound(self) -> Any:
        return self.declared_bound

    @property
    def label(self) -> str:
        return f"Sharded({getattr(self.loss, '__name__', type(self.loss).__name__)})"

    def of_arrays(self, rebuild: Callable[[PyTree], PyTree]) -> Sharded:
        return eqx.tree_at(lambda p: p.rebuild, self, rebuild, is_leaf=lambda leaf: leaf is None)

    def mean_loss(self, x: PyTree, batch: PyTree) -> Float[Array, ""]:
        """The mean loss over the rows of a batch."""
        losses = self.loss(x if self.rebuild is None else self.rebuild(x), batch)
        rows = jnp.shape(jax.tree.leaves(batch)[0])[0]
        if jnp.shape(losses) != (rows,) or not jnp.issubdtype(losses.dtype, jnp.floating):
            raise InputError(
                "loss", f"{trees.describe(losses)} from {rows} rows", f"one real loss a row: float[{rows}]"
            )
        return jnp.mean(losses)

    def ask(self, x: PyTree, own: PyTree, key: Array | None) -> tuple[Float[Array, ""], PyTree]:
        """Value and gradient of one worker on a sample of its data `own`; on all of it where `key` is None.

        For complex leaves the gradient is the steepest-ascent direction, as everywhere.
        """
        if key is not None:
            rows = jax.random.randint(key, (self.batch_size or self.size,), 0, self.size)
            own = jax.tree.map(lambda a: jnp.take(a, rows, axis=0), own)
        value, gradient = jax.value_and_grad(self.mean_loss)(x, own)
        return value, jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient)

    def value(self, x: PyTree) -> Float[Array, ""]:
        def stage(own: PyTree, x: PyTree) -> tuple[None, Array]:
            return None, self.workers.mean(self.workers.each(lambda own, x: self.mean_loss(x, own), own, x))

        return self.workers.spread(stage)(self.data, x)[1]

    def value_and_gradient(self, x: PyTree) -> tuple[Float[Array, ""], PyTree]:
        return self._mean(x, None)

    def minibatch(self, x: PyTree, key: Array) -> tuple[Float[Array, ""], PyTree]:
        """Mean over the workers of what `ask` gives each."""
        return self._mean(x, key)

    def _mean(self, x: PyTree, key: Array | None) -> tuple[Float[Array, ""], PyTree]:
        def stage(own: PyTree, shared: PyTree) -> tuple[None, PyTree]:
            def work(one: PyTree, shared: PyTree) -> PyTree:
                (number, own), (x, key) = one, shared
                return self.ask(x, own, None if key is None else jax.random.fold_in(key, number))

            return None, self.workers.mean(self.workers.each(work, (self.workers.ids(), own), shared))

        return self.workers.spread(stage)(self.data, (x, key))[1]


def shard(data: PyTree, workers: int, *, by: Any = None) -> PyTree:
    """Examples dealt out to workers: arrays (examples, …) to arrays (workers, examples // workers, …).

    Example j goes to worker j mod `workers`; with `by`, one number for each example, the examples are sorted by it
    first and dealt out in stretches, so that each worker has few of the values (labels, say): as unlike as possible.
    What is left over after equal shares is left out.

    **Raises:** `InputError` for fewer examples than workers, and arrays that do not have the same number of examples.
    """
    check_count("workers", workers, 1)
    leaves = jax.tree.leaves(data)
    lengths = {np.shape(a)[:1] for a in leaves}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(dict.fromkeys(trees.describe(a) for a in leaves)) or "a pytree without leaves"
        raise InputError("data", shapes, "arrays that share one leading axis, of examples")
    ((length,),) = lengths
    if by is not None and np.shape(by) != (length,):
        raise InputError("by", f"shape {np.shape(by)}", f"one number for each of {length} examples")
    each = length // workers
    if not each:
        raise InputError("workers", workers, f"at most the number of examples, {length}")
    if by is None:
        order = np.arange(each * workers).reshape(each, workers).T
    else:
        order = np.argsort(np.asarray(by), kind="stable")[: each * workers].reshape(workers, each)
    return jax.tree.map(lambda a: np.asarray(a)[order], data)
