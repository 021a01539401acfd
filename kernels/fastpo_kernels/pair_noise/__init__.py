"""Counter-based noise, timesteps and coins shared by the two sides of a pair."""

from fastpo_kernels._counters import (
    MAX_SEED,
    Stream,
    pair_bits,
    pair_integers,
    pair_normal,
    pair_uniform,
    philox,
)
from fastpo_kernels.pair_noise.api import NoisedPair, noised_pair
from fastpo_kernels.pair_target import PairDraw, PairTarget, Prediction

__all__ = [
    "MAX_SEED",
    "NoisedPair",
    "PairDraw",
    "PairTarget",
    "Prediction",
    "Stream",
    "noised_pair",
    "pair_bits",
    "pair_integers",
    "pair_normal",
    "pair_uniform",
    "philox",
]
