"""Preference losses of a batch of pairs, fused. See README.md for the derivation."""

from fastpo_kernels._impl import Impl
from fastpo_kernels.pair_loss.api import PairLoss, pair_errors, pair_loss
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
    "PairLoss",
    "Reduce",
    "minority_metric",
    "pair_errors",
    "pair_loss",
    "pair_weights",
]
