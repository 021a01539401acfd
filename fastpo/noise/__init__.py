"""Timesteps and noise shared by the two sides of a pair, drawn from counters."""

from fastpo.noise.pair_noise import (
    DRAWS,
    QUANTILES,
    PairNoise,
    TimestepTable,
    drop_captions,
    dropped_conditions,
    drops_to_zeros,
    make_noise,
    setup_noise,
    timestep_quantiles,
)

__all__ = [
    "DRAWS",
    "QUANTILES",
    "PairNoise",
    "TimestepTable",
    "drop_captions",
    "dropped_conditions",
    "drops_to_zeros",
    "make_noise",
    "setup_noise",
    "timestep_quantiles",
]
