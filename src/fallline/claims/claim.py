"""What a claim is, and how it is judged.

A claim is a paper's headline statement made executable: an instance that meets the theorem's
hypotheses, a measurement, a verdict with thresholds that were fixed before the run, and a negative
control, which differs from the method by one named line or hypothesis and must fail the same verdict.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from ..core.errors import check_choice

__all__ = ["KINDS", "Check", "Claim", "Finding", "Scale", "Track", "Verdict", "all_of", "run"]

KINDS = ("rate", "exact recovery", "bound", "invariance", "comparison")

Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""Goes through an iterable and shows how far it is: `for seed in track(range(10), "seeds")`."""


class Scale(enum.StrEnum):
    """How large the experiment is: about 10 s for CI; the card's on two cores, at most 5 minutes; larger hardware."""

    SMOKE = "smoke"
    SMALL = "small"
    FULL = "full"


class Verdict(enum.StrEnum):
    """Only the first is green."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"


@dataclasses.dataclass(frozen=True)
class Check:
    """One number against its threshold: `relation` is `"<="` or `">="`.

    With an `interval` (of confidence) the check is met where all of it is on the right side, missed where all of
    it is on the wrong one, and open in between. A value that is not finite on the wrong side is missed;
    a NaN always is.
    """

    name: str
    value: float
    relation: str
    threshold: float
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_choice("relation", self.relation, ("<=", ">="))

    def _holds(self, value: float) -> bool:
        return value <= self.threshold if self.relation == "<=" else value >= self.threshold

    @property
    def met(self) -> bool | None:
        """True, False, or None where the interval leaves it open."""
        if math.isnan(self.value):
            return False
        ends = {self._holds(float(end)) for end in self.interval or (self.value,)}
        return ends.pop() if len(ends) == 1 else None

    def __str__(self) -> str:
        word = {True: "met", False: "missed", None: "open"}[self.met]
        within = "" if self.interval is None else f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"
        return f"{self.name}: {self.value:.6g}{within} {self.relation} {self.threshold:.6g}, {word}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of a paper, and the experiment that could refute it.

    **Fields:**
    - `name`: of this claim among those of its method, in kebab case.
    - `statement`, `refuted_by`: what the paper says, and which result would refute it.
    - `kind`: one of `KINDS`; `source`: the theorem, table or figure.
    - `tolerance`: the thresholds and where they come from.
    - `seeds`: how many at each scale; they are 0, 1, 2, … and never chosen.
    - `build`: `scale -> (instance, hypotheses)`: the instance, and each hypothesis of the theorem as a
      `Check` of it; where one is not met, nothing is measured.
    - `measure`: `(instance, track) -> numbers`, by name: numbers, lists, dictionaries of them.
    - `judge`: `numbers -> checks`, the thresholds.
    - `control`: what differs in the negative control; `measure_control`: its measurement, under the
      same names.
    - `draw`: `(numbers, axes) -> None`, a picture on `panels` Matplotlib axes, from the evidence alone.
    - `precision`: bits of a real number.
    - `finding`: where the claim did not reproduce, what we found instead, with its figures.
    """

    name: str
    statement: str
    refuted_by: str
    kind: str
    source: str
    tolerance: str
    seeds: Mapping[Scale, int]
    build: Callable[[Scale], tuple[Any, Sequence[Check]]]
    measure: Callable[[Any, Track], Mapping[str, Any]]
    judge: Callable[[Mapping[str, Any]], Sequence[Check]]
    control: str
    measure_control: Callable[[Any, Track], Mapping[str, Any]]
    draw: Callable[[Mapping[str, Any], Sequence[Any]], None] | None = None
    panels: int = 1
    precision: int = 64
    finding: str = ""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one claim, with all that it rests on."""

    claim: Claim
    scale: Scale
    verdict: Verdict
    reason: str
    hypotheses: Sequence[Check]
    checks: Sequence[Check]
    control_checks: Sequence[Check]
    measured: Mapping[str, Any]
    control_measured: Mapping[str, Any]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.claim.name}: {self.verdict} ({self.seconds:.1f} s): {self.reason}"]
        lines += [f"  {check}" for check in self.checks]
        lines += [f"  control, {self.claim.control}:"] if self.control_checks else []
        lines += [f"    {check}" for check in self.control_checks]
        return "\n".join(lines)


def run(claim: Claim, scale: Scale | str = Scale.SMALL, track: Track = lambda items, what: items) -> Finding:
    """Measure a claim and its control at one scale, and judge them."""
    check_choice("scale", scale, list(Scale))
    scale, clock = Scale(scale), time.perf_counter()
    with jax.enable_x64(claim.precision == 64):
        instance, hypotheses = claim.build(scale)
        unmet = [check for check in hypotheses if not check.met]
        measured: Mapping[str, Any] = {}
        control: Mapping[str, Any] = {}
        if not unmet:
            measured = claim.measure(instance, track)
            control = claim.measure_control(instance, track)
    checks = [] if unmet else list(claim.judge(measured))
    control_checks = [] if unmet else list(claim.judge(control))
    verdict, reason = _verdict(unmet, checks, control_checks)
    seconds = time.perf_counter() - clock
    return Finding(
        claim, scale, verdict, reason, list(hypotheses), checks, control_checks, measured, control, seconds
    )  # fmt: skip


def _verdict(unmet: Sequence[Check], checks: Sequence[Check], control: Sequence[Check]) -> tuple[Verdict, str]:
    if unmet:
        return Verdict.INCONCLUSIVE, f"the instance does not meet a hypothesis ({unmet[0]})"
    missed = [check.name for check in checks if check.met is False]
    if missed:
        return Verdict.NOT_REPRODUCED, f"missed: {', '.join(missed)}"
    undecided = [check.name for check in checks if check.met is None]
    if undecided or not checks:
        return Verdict.INCONCLUSIVE, f"the sample does not decide: {', '.join(undecided) or 'nothing was checked'}"
    if not any(check.met is False for check in control):
        return Verdict.INCONCLUSIVE, "the control passes too, so the test shows nothing"
    return Verdict.REPRODUCED, "every threshold is met, and the control fails"


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a method with several claims: the worst of them."""
    found = set(verdicts)
    order = (Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE, Verdict.REPRODUCED)
    return next((verdict for verdict in order if verdict in found), Verdict.INCONCLUSIVE)
