"""The digits' labels by a small network, the images dealt out to workers.

f = mean over workers of the mean cross-entropy(softmax(tanh(X W + b) V + c), labels) of their own images
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core.errors import check_count
from ..distributed.sharded import Sharded, shard
from .digits import digits
from .instance import Instance, real
from .tanh_classifier import Weights, logits, random_weights

__all__ = ["digits_on_workers"]


def _losses(x: Weights, batch: tuple[Float[Array, "rows 64"], Int[Array, " rows"]]) -> Float[Array, " rows"]:
    pixels, labels = batch
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(x, pixels)), labels[:, None], axis=1)[:, 0]


def digits_on_workers(
    workers: int = 8, batch_size: int = 16, hidden: int = 32, by_label: bool = False, exact: bool = False
) -> Instance:
    """The digits' labels from one hidden layer of tanh units and a softmax, for rounds of many workers.

    **Arguments:** `workers`, of equal shares; `batch_size`, the images that a worker draws in a round; `hidden`, the
    number of units; `by_label` gives each worker few of the digits instead of a fair share of all; `exact` has workers
    compute one by one, for the bits that real processes give.

    **Raises:** `InputError` for numbers out of range.
    """
    check_count("hidden", hidden, 1)
    pixels, labels = digits()
    data = real(pixels), labels.astype(np.int32)
    dealt = shard(data, workers, by=labels if by_label else None)

    def measure(x: Weights) -> dict[str, float]:
        right = np.argmax(np.asarray(logits(x, jnp.asarray(data[0]))), axis=1) == labels
        return {"training accuracy": float(right.mean())}

    shares = f"{dealt[1].shape[1]} images each, " + ("sorted by label" if by_label else "of all labels")
    return Instance(
        problem=Sharded(_losses, dealt, batch_size, exact=exact, lower_bound=0.0),
        start=lambda key: random_weights(key, hidden, data[0].dtype),
        description=f"Digits by one hidden layer of {hidden} tanh units; {workers} workers with {shares}.",
        answer="no closed form is known",
        measure=measure,
    )
