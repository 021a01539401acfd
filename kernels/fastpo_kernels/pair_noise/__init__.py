"""Counter-based noise, timesteps and coins shared by the two sides of a pair."""

from fastpo_kernels._shared.philox import (
    MAX_SEED,
    Stream,
    pair_bits,
    pair_integers,
    pair_normal,
    pair_uniform,
    philox,
)
from fastpo_kernels._shared.target import PairDraw, PairTarget, Prediction
from fastpo_kernels.pair_noise.api import NoisedPair, noised_pair

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
