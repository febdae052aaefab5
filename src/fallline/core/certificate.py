"""A verdict on a point, with the evidence that it rests on."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from jaxtyping import PyTree

from .calls import Calls

__all__ = ["Certificate", "Verdict"]


class Verdict(enum.StrEnum):
    """What kind of point it is. `inconclusive` is an answer: the budget did not settle the question."""

    NOT_STATIONARY = "not stationary"
    STRICT_SADDLE = "strict saddle"
    SECOND_ORDER_STATIONARY = "second-order stationary to tolerance"
    LOCAL_MINIMUM = "local minimum"
    MINIMUM_MODULO_SYMMETRY = "minimum modulo symmetry"
    GLOBAL_MINIMUM = "global minimum"
    INCONCLUSIVE = "inconclusive"


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What kind of point `x` is, and why one may believe it.

    **The verdict and its reason:** `verdict`, `reason` (one sentence).

    **First order:** `value`; `gradient_norm`; `gradient_scale`: the gradient counts as zero at
    `tolerance` times this, where the scale is ‖H‖ · max(‖x‖, 1).

    **Second order** (on the complement of the declared symmetry, dimension `dimension`):
    - `rayleigh`: vᵀHv for the unit vector `direction`, and `residual` = ‖Hv − (vᵀHv)v‖: the point has
      an eigenvalue within `residual` of `rayleigh`, and λ_min is at most `rayleigh`.
    - `lower`: λ_min is at least this — `method` says how it is known: "dense" (up to rounding, which
      is included) or "lanczos" (with probability at least 1 − `failure_probability`, from
      `lanczos_steps` steps with a random start and the spread `spread` of the spectrum).
    - `curvature_tolerance`: the curvature that counts as zero, absolute: the given one times ‖H‖.
    - `symmetry_dimension`: directions deflated because the objective declares them symmetric, and
      `symmetry_residual`: the largest ‖Ht‖/‖H‖ measured on unit tangents t (None without).

    **The way out:** `direction` (a pytree like `x`, unit norm) and `step`: f(x + step·direction) is
    `decrease` below f(x), measured. None where there is no way out.
    """

    verdict: Verdict
    reason: str
    x: PyTree = dataclasses.field(repr=False)
    value: float
    gradient_norm: float
    gradient_scale: float
    tolerance: float
    dimension: int
    lower_bound: float | None = None
    value_tolerance: float | None = None
    rayleigh: float | None = None
    residual: float | None = None
    lower: float | None = None
    largest: float | None = None
    spread: float | None = None
    curvature_tolerance: float | None = None
    method: str | None = None
    lanczos_steps: int | None = None
    failure_probability: float | None = None
    symmetry_dimension: int = 0
    symmetry_residual: float | None = None
    direction: PyTree | None = dataclasses.field(default=None, repr=False)
    step: float | None = None
    decrease: float | None = None
    calls: Calls = dataclasses.field(default_factory=Calls)
    seconds: float = 0.0

    @property
    def is_minimum(self) -> bool:
        """Whether the verdict is one of the three minima."""
        return self.verdict in (Verdict.LOCAL_MINIMUM, Verdict.MINIMUM_MODULO_SYMMETRY, Verdict.GLOBAL_MINIMUM)

    def evidence(self) -> dict[str, Any]:
        """The numbers as a flat dictionary of plain Python values, without the point and the direction."""
        skip = {"x", "direction", "calls"}
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        plain["verdict"] = str(self.verdict)
        return {**plain, "calls": self.calls.as_dict()}

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {self.reason}", f"  value            {self.value:.10g}"]
        if self.lower_bound is not None:
            near = "" if self.value_tolerance is None else f"  (counts as met within {self.value_tolerance:.1e})"
            lines.append(f"  lower bound      {self.lower_bound:.10g}{near}")
        zero = f"  (zero at {self.tolerance * self.gradient_scale:.1e})"
        lines.append(f"  gradient norm    {self.gradient_norm:.3e}{zero}")
        if self.rayleigh is not None:
            trust = f"(residual {self.residual:.1e}; zero at {self.curvature_tolerance:.1e})"
            lines.append(f"  curvature vᵀHv   {self.rayleigh:.6e}  {trust}")
        if self.lower is not None:
            how = "dense, rounding included"
            if self.method == "lanczos":
                sure = 1 - (self.failure_probability or 0)
                how = f"probability {sure:g}, {self.lanczos_steps} Lanczos steps, spread {self.spread:.3g}"
            lines.append(f"  λ_min at least   {self.lower:.6e}  ({how})")
        if self.symmetry_dimension:
            flat = f"{self.symmetry_dimension} directions deflated, ‖Ht‖/‖H‖ ≤ {self.symmetry_residual:.1e}"
            lines.append(f"  symmetry         {flat}")
        if self.decrease is not None:
            lines.append(f"  the way out      step {self.step:.3g} along v lowers the value by {self.decrease:.6g}")
        lines.append(f"  calls            {self.calls}, {self.seconds:.2f} s")
        return "\n".join(lines)
