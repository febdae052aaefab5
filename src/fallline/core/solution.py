"""What `minimize` returns."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np
from jaxtyping import PyTree

from .calls import Calls
from .errors import RunError
from .status import Status

__all__ = ["Solution"]


class Solution(eqx.Module):
    """The end of a run, with its evidence. A pytree: it leaves `jit` and batches under `vmap`.

    **Fields:**
    - `x`: the final point, in the form of `x0`; after a divergence the last finite one.
    - `value`, `gradient_norm`: real scalars, of that `x`.
    - `status`: how the run ended; `steps`: how many were taken.
    - `history`: one array for each recorded quantity, and `"step"`; row 0 is the starting point.
      Under `jit` the arrays have a fixed length and NaN beyond the last record.
    - `calls`: the account of oracle calls, measurements included; the steps that are taken again to
      find the last finite point are not in it.
    - `seconds`, `compile_seconds`: wall time of the whole run, and of tracing and compiling in it
      (both None under `jit`).
    - `state`: the solver's last state; `aux`: what the user's function returned beside the value.
    """

    x: PyTree
    value: Any
    gradient_norm: Any
    status: Status
    steps: Any
    history: dict[str, Any]
    calls: Calls
    seconds: float | None = eqx.field(static=True, default=None)
    compile_seconds: float | None = eqx.field(static=True, default=None)
    state: Any = None
    aux: Any = None

    def raise_for_status(self) -> Solution:
        """Return the solution where the run converged; raise `RunError` with advice where not."""
        if not bool(np.all(np.asarray(self.status.converged))):
            advice = "" if np.ndim(self.status.code) else f" ({self.status.advice})"
            raise RunError(f"{self.status}{advice}")
        return self

    def __str__(self) -> str:
        lines = [f"{self.status}"]
        if not isinstance(self.value, jax.core.Tracer) and np.ndim(self.value) == 0:
            lines.append(f"value {float(self.value):.10g}, gradient norm {float(self.gradient_norm):.3g}")
            lines.append(f"calls: {self.calls}")
        if self.seconds is not None and self.compile_seconds is not None:
            lines.append(f"{self.seconds:.2f} s, of which {self.compile_seconds:.2f} s compiling")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Solution: {'; '.join(str(self).splitlines())}>"
