"""The noised pair in plain PyTorch, from the draws of `philox.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo_kernels._shared.philox import Stream, pair_integers, pair_normal


def noised_pair(
    latents: Tensor,
    logvar: Tensor | None,
    pair_key: Tensor,
    visit: Tensor,
    signal: Tensor,
    sigma: Tensor,
    target: str,
    with_schedule: bool,
    seed: int,
    low: int,
    high: int,
    shift: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents `[2B, *dims]`, target, timesteps `[B]`, schedule `[2, B]`; see `ops.py`."""
    dims = latents.shape[1:]
    x = latents.float()
    if logvar is not None:
        sides = (Stream.POSTERIOR_WINNER, Stream.POSTERIOR_LOSER)
        draws = [pair_normal(pair_key, visit, dims, seed=seed, stream=s) for s in sides]
        x = x + torch.exp(0.5 * logvar.float()) * torch.cat(draws)
    x = ((x - shift) * scale).unflatten(0, (2, len(pair_key)))
    noise = pair_normal(pair_key, visit, dims, seed=seed, stream=Stream.NOISE)
    timesteps = pair_integers(
        pair_key, visit, low=low, high=high, seed=seed, stream=Stream.TIMESTEP
    )
    schedule = torch.stack([table.float()[timesteps] for table in (signal, sigma)])
    a, s = schedule.view(2, -1, *[1] * len(dims))
    noisy = (a * x + s * noise).flatten(0, 1).to(dtype)
    if not with_schedule:
        schedule = schedule[:, :0]
    if target == "none":
        return noisy, noise.new_empty(0), timesteps, schedule
    if target == "epsilon":
        return noisy, noise, timesteps, schedule
    ready = a * noise - s * x if target == "v_prediction" else noise - x
    return noisy, ready.flatten(0, 1), timesteps, schedule
