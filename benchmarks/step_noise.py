"""How plain fine-tuning noises latents, and the schedule that FastPO's step takes for the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from step_flow import LATENT_SCALE, flow_scheduler
from torch import Tensor

from fastpo.models.flow import FlowFamily
from fastpo.models.schedule import NoiseSchedule, ddpm_schedule, flow_schedule
from fastpo.types import NoisedPair


@dataclass(frozen=True)
class Noising:
    """A schedule, as diffusers and as FastPO have it.

    Attributes:
        scheduler: diffusers' scheduler.
        schedule: FastPO's table of it.
        draw: From scaled latents `(2B, C, h, w)` to noisy ones with noise of their own and a
            timestep for each pair, as one would write it with diffusers.
    """

    scheduler: Any
    schedule: NoiseSchedule
    draw: Callable[[Tensor], NoisedPair]


def ddpm_noising() -> Noising:
    """SDXL's and SD1.5's."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def draw(latents: Tensor) -> NoisedPair:
        noise = torch.randn_like(latents)
        times = torch.randint(1000, (len(latents) // 2,), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, times.repeat(2))  # pyright: ignore[reportArgumentType]
        return NoisedPair(noisy, times, times, noise)

    return Noising(scheduler, ddpm_schedule(scheduler, {}), draw)


def flow_noising(family: Any) -> Noising:
    """That of a family of transformers."""
    assert isinstance(family, FlowFamily)
    scheduler = flow_scheduler()
    schedule = flow_schedule(scheduler, latent_scale=LATENT_SCALE)

    def draw(latents: Tensor) -> NoisedPair:
        noise = torch.randn_like(latents)
        sigma = torch.sigmoid(torch.randn(len(latents) // 2, device=latents.device))
        noisy = torch.lerp(latents, noise, sigma.repeat(2).view(-1, 1, 1, 1))
        return NoisedPair(noisy, sigma, family.told(sigma), noise - latents)

    return Noising(scheduler, replace(schedule, timesteps=family.told(schedule.sigma)), draw)
