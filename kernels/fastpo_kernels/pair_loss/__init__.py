"""Preference losses of a batch of pairs, fused. See README.md for the derivation."""

from fastpo_kernels._shared.dispatch import Impl
from fastpo_kernels._shared.target import PairDraw, PairTarget
from fastpo_kernels.pair_loss.api import PairLoss, Target, pair_errors, pair_loss
from fastpo_kernels.pair_loss.reference import (
    OBJECTIVES,
    Adaptive,
    Reduce,
    minority_metric,
    pair_weights,
)

__all__ = [
    "OBJECTIVES",
    "Adaptive",
    "Impl",
    "PairDraw",
    "PairLoss",
    "PairTarget",
    "Reduce",
    "Target",
    "minority_metric",
    "pair_errors",
    "pair_loss",
    "pair_weights",
]
