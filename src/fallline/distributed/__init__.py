"""Rounds of many workers: compression, error feedback, lossy links, Byzantine workers, simulated or real."""

from ..parts.codecs import QSGD, Plain, RandomK, Signs, Split, TopK
from ..parts.feedback import ErrorFeedback
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
    "QSGD",
    "Account",
    "Adopt",
    "Corrupts",
    "Delays",
    "Drops",
    "ErrorFeedback",
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
    "Plain",
    "RandomK",
    "Round",
    "SaddlePoint",
    "Sharded",
    "SignFlip",
    "Signs",
    "Split",
    "StaleReads",
    "Step",
    "TopK",
    "Total",
    "TrimmedMean",
    "flip_labels",
    "join",
    "mesh_of",
    "shard",
]
