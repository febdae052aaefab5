"""Signals and low-rank matrices from their measurements."""

from .alternating_least_squares import alternating_least_squares
from .completion_least_squares import completion_least_squares
from .losses import (
    Absolute,
    Amplitude,
    Intensity,
    Loss,
    ReweightedAmplitude,
    Squared,
    TruncatedAmplitude,
    TruncatedPoisson,
)
from .matrix_completion import matrix_completion, observed
from .matrix_sensing import matrix_sensing
from .operators import (
    CodedDiffraction,
    Dense,
    Entries,
    Lineax,
    Operator,
    OversampledFourier,
    StructuredSensing,
    coded_diffraction,
    gaussian_measurements,
    structured_sensing,
)
from .overparam_matrix_sensing import overparam_matrix_sensing
from .phase_diagram import PhaseDiagram, phase_diagram
from .phase_retrieval import phase_retrieval, wirtinger
from .problem import Recovery
from .random_init_phase_retrieval import (
    leave_one_out,
    random_init_phase_retrieval,
    random_signs,
    state_evolution,
)
from .recover import recover
from .robust_pca import ObservedMatrix, RobustPCA, Trimmed, robust_pca, robust_pca_start
from .scaled_gradient import scale_by_factor_grams, scaled_gradient
from .singular_value_projection import singular_value_projection
from .starts import STARTS, random, signs, spectral, start
from .structures import PSD, Factors, Structure, TwoFactors, Vector
from .subgm_robust_recovery import check_schedule, sign_rip, small_signs, subgm_robust_recovery

__all__ = [
    "PSD",
    "STARTS",
    "Absolute",
    "Amplitude",
    "CodedDiffraction",
    "Dense",
    "Entries",
    "Factors",
    "Intensity",
    "Lineax",
    "Loss",
    "ObservedMatrix",
    "Operator",
    "OversampledFourier",
    "PhaseDiagram",
    "Recovery",
    "ReweightedAmplitude",
    "RobustPCA",
    "Squared",
    "Structure",
    "StructuredSensing",
    "Trimmed",
    "TruncatedAmplitude",
    "TruncatedPoisson",
    "TwoFactors",
    "Vector",
    "alternating_least_squares",
    "check_schedule",
    "coded_diffraction",
    "completion_least_squares",
    "gaussian_measurements",
    "leave_one_out",
    "matrix_completion",
    "matrix_sensing",
    "observed",
    "overparam_matrix_sensing",
    "phase_diagram",
    "phase_retrieval",
    "random",
    "random_init_phase_retrieval",
    "random_signs",
    "recover",
    "robust_pca",
    "robust_pca_start",
    "scale_by_factor_grams",
    "scaled_gradient",
    "sign_rip",
    "signs",
    "singular_value_projection",
    "small_signs",
    "spectral",
    "start",
    "state_evolution",
    "structured_sensing",
    "subgm_robust_recovery",
    "wirtinger",
]
