"""What a noised pair is made from and how: plain records, shared by all implementations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo_kernels._shared.target import Prediction


@dataclass(frozen=True, eq=False)
class NoiseInputs:
    """The tensors.

    Attributes:
        latents: `[2B, *dims]`, winners first.
        logvar: like `latents`, or None: no draw of the posterior.
        pair_key: `[B]` int64.
        visit: `[B]` int64.
        signal: `[T]`, factor of the latents at each timestep.
        sigma: `[T]`, factor of the noise.
    """

    latents: Tensor
    logvar: Tensor | None
    pair_key: Tensor
    visit: Tensor
    signal: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class NoiseSpec:
    """What is formed of them.

    Attributes:
        prediction: what the denoiser predicts, so what the target is.
        seed: the run's seed in [0, 2^32).
        low: first timestep drawn.
        high: first timestep not drawn.
        shift: subtracted from the latents.
        scale: multiplies them then.
        dtype: of the noisy latents.
    """

    prediction: Prediction
    seed: int
    low: int
    high: int
    shift: float
    scale: float
    dtype: torch.dtype


def empty_outputs(inputs: NoiseInputs, spec: NoiseSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for noisy latents, float32 target, timesteps; dense latents keep their layout."""
    latents, n_pairs = inputs.latents, len(inputs.pair_key)
    sides = latents[:n_pairs] if spec.prediction == "epsilon" else latents
    return (
        torch.empty_like(latents, dtype=spec.dtype),
        torch.empty_like(sides, dtype=torch.float32),
        torch.empty(n_pairs, dtype=torch.int64, device=latents.device),
    )
