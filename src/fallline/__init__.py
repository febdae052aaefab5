"""fallline: non-convex optimisation in machine learning, on JAX."""

from .core.calls import Calls
from .core.errors import FalllineError, InputError, RunError
from .core.loop import minimize
from .core.optimizer import optimizer
from .core.problem import FiniteSum, Objective, Problem
from .core.progress import Progress
from .core.solution import Solution
from .core.solver import Solver, State
from .core.status import Ending, Status
from .core.stopping import call_budget, decrease, gradient_norm, residual, time_limit

__version__ = "0.1.0"

__all__ = [
    "Calls",
    "Ending",
    "FalllineError",
    "FiniteSum",
    "InputError",
    "Objective",
    "Problem",
    "Progress",
    "RunError",
    "Solution",
    "Solver",
    "State",
    "Status",
    "call_budget",
    "decrease",
    "gradient_norm",
    "minimize",
    "optimizer",
    "residual",
    "time_limit",
]
