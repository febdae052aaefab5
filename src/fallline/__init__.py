"""fallline: non-convex optimisation in machine learning, on JAX."""

from .clustering.k_means import KMeans, assign, k_means_plus_plus, lloyd
from .clustering.power_k_means import power_k_means
from .core.calls import Calls
from .core.certificate import Certificate, Verdict
from .core.checkpoint import Checkpoint, CheckpointError
from .core.errors import FalllineError, InputError, RunError
from .core.loop import minimize
from .core.optimizer import optimizer
from .core.problem import FiniteSum, Objective, Problem
from .core.progress import Progress
from .core.race import Race, race
from .core.solution import Solution
from .core.solver import Solver, State
from .core.status import Ending, Status
from .core.stopping import call_budget, decrease, gradient_norm, residual, time_limit
from .core.sweep import sweep
from .descent.adadagrad import adadagrad, adagrad, adagrad_norm, scale_by_adagrad, scale_by_adagrad_norm
from .descent.adaptive_saddle_escape import (
    Isotropy,
    adaptive_saddle_escape,
    big_small_steps,
    noise_isotropy,
    scale_by_full_matrix_rms,
    scale_by_preconditioner,
)
from .descent.batch_size_learning_rates import (
    BatchSizeLearningRates,
    CurvatureNoise,
    batch_size_learning_rates,
    noise_variance,
    scale_learning_rate,
)
from .descent.curvature_learner import curvature_learner, polyak_pair
from .descent.diffgrad import diffgrad, scale_by_diffgrad
from .descent.last_iterate import last_iterate, last_iterate_schedule, prox_mirror
from .descent.m_fac import m_fac, scale_by_m_fac
from .descent.m_fac_static import inverse_fisher, m_fac_prune
from .descent.perturbed_gradient_descent import perturbed_gradient_descent, theory_parameters
from .descent.psgd_lie_groups import psgd_lie_groups, scale_by_psgd
from .descent.rapdual import Blocks, MultiBlock
from .descent.rapgrad import theory_inner_steps
from .descent.rapgrad_rapdual import rapgrad_rapdual
from .descent.target_surrogate import TargetLoss, armijo, target_surrogate
from .distributed.byzantine_pgd import byzantine_pgd
from .distributed.double_squeeze import double_squeeze
from .distributed.mem_sgd import mem_sgd
from .distributed.sign_sgd_majority_vote import sign_sgd_majority_vote
from .distributed.topk_sparsified import topk_sparsified
from .inference.adversarial_risk import (
    AdversarialRisk,
    MonotoneNetwork,
    adversarial_risk,
    monotone_network,
    supremum_transform,
    transformed_loss,
    tree_transform,
)
from .inference.sgld_generalization import GeneralizationBound, running_bound, sghmc, sgld, sgld_generalization
from .landscape.certify import certify, escape
from .landscape.deep_linear_width import DeepLinear, WidthSweep, deep_linear_width
from .landscape.dynamical_stability import Stability, dynamical_stability
from .landscape.exponential_linear_nets import (
    DepthSweep,
    DepthTimes,
    LinearNet,
    exponential_linear_nets,
    initial_factors,
)
from .parts.batch_size import CoordinateTest, InnerProductTest, NormTest, adapt_batch_size, by_samples, next_batch_size
from .parts.nonfinite import on_nonfinite
from .recovery.matrix_completion import matrix_completion
from .recovery.matrix_sensing import matrix_sensing
from .recovery.overparam_matrix_sensing import overparam_matrix_sensing
from .recovery.phase_retrieval import phase_retrieval
from .recovery.problem import Recovery
from .recovery.random_init_phase_retrieval import random_init_phase_retrieval
from .recovery.recover import recover
from .recovery.robust_pca import robust_pca
from .recovery.subgm_robust_recovery import subgm_robust_recovery

__version__ = "0.1.0"

__all__ = [
    "AdversarialRisk",
    "BatchSizeLearningRates",
    "Blocks",
    "Calls",
    "Certificate",
    "Checkpoint",
    "CheckpointError",
    "CoordinateTest",
    "CurvatureNoise",
    "DeepLinear",
    "DepthSweep",
    "DepthTimes",
    "Ending",
    "FalllineError",
    "FiniteSum",
    "GeneralizationBound",
    "InnerProductTest",
    "InputError",
    "Isotropy",
    "KMeans",
    "LinearNet",
    "MonotoneNetwork",
    "MultiBlock",
    "NormTest",
    "Objective",
    "Problem",
    "Progress",
    "Race",
    "Recovery",
    "RunError",
    "Solution",
    "Solver",
    "Stability",
    "State",
    "Status",
    "TargetLoss",
    "Verdict",
    "WidthSweep",
    "adadagrad",
    "adagrad",
    "adagrad_norm",
    "adapt_batch_size",
    "adaptive_saddle_escape",
    "adversarial_risk",
    "armijo",
    "assign",
    "batch_size_learning_rates",
    "big_small_steps",
    "by_samples",
    "byzantine_pgd",
    "call_budget",
    "certify",
    "curvature_learner",
    "decrease",
    "deep_linear_width",
    "diffgrad",
    "double_squeeze",
    "dynamical_stability",
    "escape",
    "exponential_linear_nets",
    "gradient_norm",
    "initial_factors",
    "inverse_fisher",
    "k_means_plus_plus",
    "last_iterate",
    "last_iterate_schedule",
    "lloyd",
    "m_fac",
    "m_fac_prune",
    "matrix_completion",
    "matrix_sensing",
    "mem_sgd",
    "minimize",
    "monotone_network",
    "next_batch_size",
    "noise_isotropy",
    "noise_variance",
    "on_nonfinite",
    "optimizer",
    "overparam_matrix_sensing",
    "perturbed_gradient_descent",
    "phase_retrieval",
    "polyak_pair",
    "power_k_means",
    "prox_mirror",
    "psgd_lie_groups",
    "race",
    "random_init_phase_retrieval",
    "rapgrad_rapdual",
    "recover",
    "residual",
    "robust_pca",
    "running_bound",
    "scale_by_adagrad",
    "scale_by_adagrad_norm",
    "scale_by_diffgrad",
    "scale_by_full_matrix_rms",
    "scale_by_m_fac",
    "scale_by_preconditioner",
    "scale_by_psgd",
    "scale_learning_rate",
    "sghmc",
    "sgld",
    "sgld_generalization",
    "sign_sgd_majority_vote",
    "subgm_robust_recovery",
    "supremum_transform",
    "sweep",
    "target_surrogate",
    "theory_inner_steps",
    "theory_parameters",
    "time_limit",
    "topk_sparsified",
    "transformed_loss",
    "tree_transform",
]
