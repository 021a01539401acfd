"""Timesteps and noise shared by the two sides of a pair, drawn from counters.

A draw depends on (seed, pair, visit) only: not on the batch, the process, or the order of the data.
The schedule is read from the pipeline's own scheduler folder, by diffusers' `DDPMScheduler`; the
arithmetic is `fastpo_kernels.pair_noise.noised_pair`, one launch on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from fastpo.errors import ConfigError, ModelError
from fastpo.types import NoisedPair, PairBatch
from fastpo_kernels.pair_noise import Prediction, Stream, noised_pair, pair_uniform


@dataclass(frozen=True)
class PairNoise:
    """Turns a batch of latents into what the denoiser sees and what it should answer.

    Attributes:
        signal: `(T,)` float32, factor of the latents at each timestep, on the run's device.
        sigma: `(T,)` float32, factor of the noise.
        prediction: What the denoiser predicts.
        seed: The run's seed in [0, 2^32).
        scaling_factor: The VAE's scale; the denoiser works on `(latents - shift) * scale`.
        shift_factor: Subtracted from the latents before scaling.
        min_timestep: First timestep drawn.
        max_timestep: First timestep not drawn.
        sample_latents: Draw the latents from the VAE's posterior, else take its mean.
    """

    signal: Tensor
    sigma: Tensor
    prediction: Prediction
    seed: int
    scaling_factor: float
    shift_factor: float
    min_timestep: int
    max_timestep: int
    sample_latents: bool

    def noised_pair(self, batch: PairBatch) -> NoisedPair:
        """Adds the pair's shared noise at its shared timestep and forms the target."""
        noisy, target, timesteps = noised_pair(
            batch.latent_mean,
            batch.pair_key,
            batch.visit,
            self.signal,
            self.sigma,
            seed=self.seed,
            low=self.min_timestep,
            high=self.max_timestep,
            prediction=self.prediction,
            logvar=batch.latent_logvar if self.sample_latents else None,
            shift=self.shift_factor,
            scale=self.scaling_factor,
        )
        return NoisedPair(noisy_latents=noisy, timesteps=timesteps, target=target)

    def empty_prompts(self, batch: PairBatch, rate: float) -> Tensor:
        """Returns `(B,)` bool: the visits on which both sides lose their caption."""
        coin = pair_uniform(batch.pair_key, batch.visit, seed=self.seed, stream=Stream.EMPTY_PROMPT)
        return coin < rate


def make_noise(
    scheduler: DDPMScheduler,
    vae_config: dict,
    *,
    seed: int,
    min_timestep: int,
    max_timestep: int | None,
    sample_latents: bool,
    device: torch.device | str = "cpu",
) -> PairNoise:
    """Checks the schedule and the range of timesteps, and puts the noise source together.

    Raises:
        ModelError: The schedule predicts neither the noise nor the velocity.
        ConfigError: The range of timesteps does not lie within the schedule, or the seed is not
            in [0, 2^32).
    """
    kind = scheduler.config["prediction_type"]
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"scheduler/scheduler_config.json: prediction_type must be 'epsilon' or "
            f"'v_prediction', got {kind!r}"
        )
    if seed >= 2**32:
        raise ConfigError(f"seed must be below 2^32, got {seed}")
    length = scheduler.config["num_train_timesteps"]
    high = length if max_timestep is None else max_timestep
    if not 0 <= min_timestep < high <= length:
        raise ConfigError(
            f"train.min_timestep and train.max_timestep must satisfy 0 <= min < max <= {length} "
            f"(the schedule's length), got {min_timestep} and {high}"
        )
    kept = scheduler.alphas_cumprod.to(device, torch.float32)
    return PairNoise(
        signal=kept.sqrt(),
        sigma=(1.0 - kept).sqrt(),
        prediction=kind,
        seed=seed,
        scaling_factor=vae_config.get("scaling_factor", 0.18215),
        shift_factor=vae_config.get("shift_factor") or 0.0,
        min_timestep=min_timestep,
        max_timestep=high,
        sample_latents=sample_latents,
    )
