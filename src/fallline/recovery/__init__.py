"""Signals and low-rank matrices from their measurements."""

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
from .phase_diagram import PhaseDiagram, phase_diagram
from .problem import Recovery
from .recover import recover
from .starts import STARTS, random, signs, spectral, start
from .structures import PSD, Factors, Structure, TwoFactors, Vector

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
    "Operator",
    "OversampledFourier",
    "PhaseDiagram",
    "Recovery",
    "ReweightedAmplitude",
    "Squared",
    "Structure",
    "StructuredSensing",
    "TruncatedAmplitude",
    "TruncatedPoisson",
    "TwoFactors",
    "Vector",
    "coded_diffraction",
    "gaussian_measurements",
    "phase_diagram",
    "random",
    "recover",
    "signs",
    "spectral",
    "start",
    "structured_sensing",
]
