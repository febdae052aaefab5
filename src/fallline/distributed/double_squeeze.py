"""DoubleSqueeze: stochastic gradient descent with compression and error feedback in both directions.

    worker i:   v⁽ⁱ⁾ = ∇F(x_t; ζ⁽ⁱ⁾) + δ⁽ⁱ⁾_{t−1},   sends Q[v⁽ⁱ⁾],   δ⁽ⁱ⁾_t = v⁽ⁱ⁾ − Q[v⁽ⁱ⁾]
    server:     v = 1/n Σ_i Q[v⁽ⁱ⁾] + δ_{t−1},       sends Q[v],      δ_t = v − Q[v]
    all:        x_{t+1} = x_t − γ Q[v]

| paper | here        |
|-------|-------------|
| γ     | `step_size` |
| Q     | `codec`     |

Source: H. Tang, C. Yu, X. Lian, T. Zhang and J. Liu, *DoubleSqueeze: Parallel Stochastic Gradient Descent with
Double-pass Error-Compensated Compression*, ICML 2019 (arXiv 1905.05957), Algorithm 1.

Guarantee: with E‖Q[v] − v‖ ≤ ε/2 and γ = 1/(4L + σ√(T/n) + ε^{2/3}T^{1/3}), constants as recalled, the mean of
E‖∇f(x_t)‖² over T steps is O(σ/√(nT) + ε^{2/3}/T^{2/3} + 1/T): what the compression costs is of higher order. For any
Q, and γ that does not change, x_t − γ δ_{t−1} − γ/n Σ_i δ⁽ⁱ⁾_{t−1} moves as uncompressed stochastic gradient descent
does.

Departures: none.

Use it where both directions are slow. The 1-bit codec's ℓ2 scale is the paper's, and is no contraction where gradients
are sparse; `Signs("l1")` always is. Around a codec whose error exceeds the vector, such as `QSGD(1)`, memories may grow
until the run is lost. With momentum or Adam build the `Round` yourself: they stand in the server rule, after the
downlink.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from ..core.errors import check_positive
from ..parts.codecs import Codec, Signs
from ..parts.feedback import ErrorFeedback
from .aggregators import Mean
from .round import Round
from .rules import Gradient, Step

__all__ = ["double_squeeze"]


def double_squeeze(step_size: float | Callable[[Any], Any], codec: Codec | None = None, **options: Any) -> Round:
    """DoubleSqueeze (Tang et al. 2019, Algorithm 1), a solver of `Sharded` problems.

    **Arguments:**
    - `step_size`: γ, a number or an Optax schedule; it multiplies after both compressions.
    - `codec`: Q, of both directions; None is the paper's 1-bit codec, `Signs("l2")`.
    - `options`: channel, attack, blocks and exchange, as for `Round`.

    **Raises:** `InputError` for a step size that is not positive, and as `Round` does.
    """
    if not callable(step_size):
        check_positive("step_size", step_size)
    feedback = ErrorFeedback(Signs("l2") if codec is None else codec)
    return Round(
        worker=Gradient(),
        uplink=feedback,
        aggregator=Mean(),
        downlink=feedback,
        server=Step(optax.sgd, learning_rate=step_size),
        label="DoubleSqueeze",
        **options,
    )
