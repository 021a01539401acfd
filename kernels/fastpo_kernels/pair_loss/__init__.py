"""Preference losses of a batch of pairs, fused. See README.md for the derivation."""

from fastpo_kernels._shared.target import PairDraw, PairTarget
from fastpo_kernels.pair_loss.api import Impl, Target, pair_errors, pair_loss
from fastpo_kernels.pair_loss.epilogue import minority_metric, pair_weights
from fastpo_kernels.pair_loss.objectives import OBJECTIVES
from fastpo_kernels.pair_loss.sides import Given
from fastpo_kernels.pair_loss.spec import (
    Adaptive,
    Layout,
    MarginKind,
    Normalize,
    PairLoss,
    Reduce,
    Reduction,
    WeightKind,
)

__all__ = [
    "OBJECTIVES",
    "Adaptive",
    "Given",
    "Impl",
    "Layout",
    "MarginKind",
    "Normalize",
    "PairDraw",
    "PairLoss",
    "PairTarget",
    "Reduce",
    "Reduction",
    "Target",
    "WeightKind",
    "minority_metric",
    "pair_errors",
    "pair_loss",
    "pair_weights",
]
