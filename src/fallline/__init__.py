"""fallline: non-convex optimisation in machine learning, on JAX."""

from .core.calls import Calls
from .core.certificate import Certificate, Verdict
from .core.checkpoint import Checkpoint, CheckpointError
from .core.errors import FalllineError, InputError, RunError
from .core.loop import minimize
from .core.optimizer import optimizer
from .core.problem import FiniteSum, Objective, Problem
from .core.progress import Progress
from .core.solution import Solution
from .core.solver import Solver, State
from .core.status import Ending, Status
from .core.stopping import call_budget, decrease, gradient_norm, residual, time_limit
from .core.sweep import sweep
from .descent.diffgrad import diffgrad, scale_by_diffgrad
from .descent.perturbed_gradient_descent import perturbed_gradient_descent, theory_parameters
from .landscape.certify import certify, escape

__version__ = "0.1.0"

__all__ = [
    "Calls",
    "Certificate",
    "Checkpoint",
    "CheckpointError",
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
    "Verdict",
    "call_budget",
    "certify",
    "decrease",
    "diffgrad",
    "escape",
    "gradient_norm",
    "minimize",
    "optimizer",
    "perturbed_gradient_descent",
    "residual",
    "scale_by_diffgrad",
    "sweep",
    "theory_parameters",
    "time_limit",
]
