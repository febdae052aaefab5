"""The statistics of claims: intervals and fits whose formulas are in any textbook."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["Line", "binomial_interval", "fit_line"]


def binomial_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of Clopper and Pearson (1934) for a probability of success."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


@dataclasses.dataclass(frozen=True)
class Line:
    """A least-squares line y ≈ `intercept` + `slope` x, the slope's standard error, and R²."""

    slope: float
    intercept: float
    slope_error: float
    r_squared: float


def fit_line(x: Sequence[float] | Float[np.ndarray, " n"], y: Sequence[float] | Float[np.ndarray, " n"]) -> Line:
    """Fit a line through at least three points."""
    from scipy.stats import linregress

    fit: Any = linregress(np.asarray(x, float), np.asarray(y, float))
    return Line(float(fit.slope), float(fit.intercept), float(fit.stderr), float(fit.rvalue**2))
