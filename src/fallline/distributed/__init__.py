"""Rounds of many workers: compression, error feedback, lossy links, Byzantine workers, simulated or real."""

from .aggregators import IterativeFiltering, Majority, Mean, Median, Total, TrimmedMean
from .attacks import (
    InnerProduct,
    LargeNoise,
    LittleIsEnough,
    NotANumber,
    RandomSigns,
    SaddlePoint,
    SignFlip,
    flip_labels,
)
from .channels import Corrupts, Delays, Drops, StaleReads
from .processes import join
from .round import Account, Round
from .rules import Adopt, Gradient, LocalSteps, Momentum, Step
from .sharded import Sharded, shard
from .workers import mesh_of

__all__ = [
    "Account",
    "Adopt",
    "Corrupts",
    "Delays",
    "Drops",
    "Gradient",
    "InnerProduct",
    "IterativeFiltering",
    "LargeNoise",
    "LittleIsEnough",
    "LocalSteps",
    "Majority",
    "Mean",
    "Median",
    "Momentum",
    "NotANumber",
    "RandomSigns",
    "Round",
    "SaddlePoint",
    "Sharded",
    "SignFlip",
    "StaleReads",
    "Step",
    "Total",
    "TrimmedMean",
    "flip_labels",
    "join",
    "mesh_of",
    "shard",
]
