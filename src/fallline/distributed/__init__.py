"""Rounds of many workers: compression, error feedback, lossy links, Byzantine workers, simulated or real."""

from ..parts.averaging import Averaged
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
from .byzantine_pgd import ball_marginal
from .channels import Corrupts, Delays, Drops, StaleReads
from .mem_sgd import ShiftedDecay
from .processes import join
from .round import Account, Round
from .rules import Adopt, Gradient, LocalSteps, Momentum, Step
from .sharded import Sharded, shard
from .sign_sgd_majority_vote import density, sign_failure_bound, signal_to_noise
from .topk_sparsified import dense_shadow
from .workers import mesh_of

__all__ = [
    "QSGD",
    "Account",
    "Adopt",
    "Averaged",
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
    "ShiftedDecay",
    "SignFlip",
    "Signs",
    "Split",
    "StaleReads",
    "Step",
    "TopK",
    "Total",
    "TrimmedMean",
    "ball_marginal",
    "dense_shadow",
    "density",
    "flip_labels",
    "join",
    "mesh_of",
    "shard",
    "sign_failure_bound",
    "signal_to_noise",
]
