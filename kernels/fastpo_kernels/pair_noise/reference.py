"""The noised pair in plain PyTorch, from the draws of `philox.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo_kernels._shared.philox import Stream, pair_integers, pair_normal
from fastpo_kernels.pair_noise.spec import NoiseInputs, NoiseSpec


def noised_pair(inputs: NoiseInputs, spec: NoiseSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents `[2B, *dims]`, target `[B, *dims]` or `[2B, *dims]`, timesteps `[B]`."""
    pair_key, visit, dims = inputs.pair_key, inputs.visit, inputs.latents.shape[1:]
    x = inputs.latents.float()
    if inputs.logvar is not None:
        sides = (Stream.POSTERIOR_WINNER, Stream.POSTERIOR_LOSER)
        draws = [pair_normal(pair_key, visit, dims, seed=spec.seed, stream=s) for s in sides]
        x = x + torch.exp(0.5 * inputs.logvar.float()) * torch.cat(draws)
    x = ((x - spec.shift) * spec.scale).unflatten(0, (2, len(pair_key)))
    noise = pair_normal(pair_key, visit, dims, seed=spec.seed, stream=Stream.NOISE)
    timesteps = pair_integers(
        pair_key, visit, low=spec.low, high=spec.high, seed=spec.seed, stream=Stream.TIMESTEP
    )
    schedule = torch.stack([table.float()[timesteps] for table in (inputs.signal, inputs.sigma)])
    a, s = schedule.view(2, -1, *[1] * len(dims))
    noisy = (a * x + s * noise).flatten(0, 1).to(spec.dtype)
    if spec.prediction == "epsilon":
        return noisy, noise, timesteps
    ready = a * noise - s * x if spec.prediction == "v_prediction" else noise - x
    return noisy, ready.flatten(0, 1), timesteps
