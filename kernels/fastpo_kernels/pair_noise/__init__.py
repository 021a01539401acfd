"""Counter-based noise, timesteps and coins shared by the two sides of a pair."""

from fastpo_kernels.pair_noise.api import NoisedPair, Prediction, noised_pair
from fastpo_kernels.pair_noise.reference import (
    MAX_SEED,
    Stream,
    pair_bits,
    pair_integers,
    pair_normal,
    pair_uniform,
    philox,
)

__all__ = [
    "MAX_SEED",
    "NoisedPair",
    "Prediction",
    "Stream",
    "noised_pair",
    "pair_bits",
    "pair_integers",
    "pair_normal",
    "pair_uniform",
    "philox",
]
