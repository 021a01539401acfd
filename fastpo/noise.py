"""Timesteps and noise shared by the two sides of a pair, drawn from counters.

A draw depends on (seed, pair, visit) only: not on the batch, the process, or the order of the data.
The schedule itself is diffusers' `DDPMScheduler`, read from the pipeline's own scheduler folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from fastpo.errors import ConfigError, ModelError
from fastpo.types import NoisedPair, PairBatch
from fastpo_kernels.pair_noise import Stream, pair_integers, pair_normal, pair_uniform


@dataclass(frozen=True)
class PairNoise:
    """Turns a batch of latents into what the denoiser sees and what it should answer.

    Attributes:
        scheduler: The noise schedule and the kind of prediction.
        seed: The run's seed in [0, 2^32).
        scaling_factor: The VAE's scale; the denoiser works on `latents * scaling_factor`.
        shift_factor: Subtracted from the latents before scaling.
        min_timestep: First timestep drawn.
        max_timestep: First timestep not drawn.
        sample_latents: Draw the latents from the VAE's posterior, else take its mean.
    """

    scheduler: DDPMScheduler
    seed: int
    scaling_factor: float
    shift_factor: float
    min_timestep: int
    max_timestep: int
    sample_latents: bool

    def timesteps(self, batch: PairBatch) -> Tensor:
        """Returns `(B,)` int64, uniform in [min_timestep, max_timestep)."""
        return pair_integers(
            batch.pair_key,
            batch.visit,
            low=self.min_timestep,
            high=self.max_timestep,
            seed=self.seed,
            stream=Stream.TIMESTEP,
        )

    def latents(self, batch: PairBatch) -> Tensor:
        """Returns `(2B, C, h, w)` float32 scaled latents; the sides' posterior draws differ."""
        latents = batch.latent_mean.float()
        if self.sample_latents:
            sides = [
                self._normal(batch, latents.shape[1:], stream)
                for stream in (Stream.POSTERIOR_WINNER, Stream.POSTERIOR_LOSER)
            ]
            latents = latents + torch.exp(0.5 * batch.latent_logvar.float()) * torch.cat(sides)
        return (latents - self.shift_factor) * self.scaling_factor

    def noised_pair(self, batch: PairBatch) -> NoisedPair:
        """Adds the pair's shared noise at its shared timestep and forms the target."""
        latents = self.latents(batch)
        noise = self._normal(batch, latents.shape[1:], Stream.NOISE)
        timesteps = self.timesteps(batch)
        both, both_steps = torch.cat((noise, noise)), torch.cat((timesteps, timesteps))
        noisy = self.scheduler.add_noise(latents, both, both_steps)  # pyright: ignore[reportArgumentType]
        if self.scheduler.config["prediction_type"] == "v_prediction":
            target = self.scheduler.get_velocity(latents, both, both_steps)  # pyright: ignore[reportArgumentType]
        else:
            target = noise
        return NoisedPair(noisy_latents=noisy, timesteps=timesteps, target=target)

    def empty_prompts(self, batch: PairBatch, rate: float) -> Tensor:
        """Returns `(B,)` bool: the visits on which both sides lose their caption."""
        coin = pair_uniform(batch.pair_key, batch.visit, seed=self.seed, stream=Stream.EMPTY_PROMPT)
        return coin < rate

    def _normal(self, batch: PairBatch, shape: torch.Size, stream: Stream) -> Tensor:
        return pair_normal(batch.pair_key, batch.visit, shape, seed=self.seed, stream=stream)


def make_noise(
    scheduler: DDPMScheduler,
    vae_config: dict,
    *,
    seed: int,
    min_timestep: int,
    max_timestep: int | None,
    sample_latents: bool,
) -> PairNoise:
    """Checks the schedule and the range of timesteps, and puts the noise source together.

    Raises:
        ModelError: The schedule predicts neither the noise nor the velocity.
        ConfigError: The range of timesteps does not lie within the schedule.
    """
    kind = scheduler.config["prediction_type"]
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"scheduler/scheduler_config.json: prediction_type must be 'epsilon' or "
            f"'v_prediction', got {kind!r}"
        )
    length = scheduler.config["num_train_timesteps"]
    high = length if max_timestep is None else max_timestep
    if not 0 <= min_timestep < high <= length:
        raise ConfigError(
            f"train.min_timestep and train.max_timestep must satisfy 0 <= min < max <= {length} "
            f"(the schedule's length), got {min_timestep} and {high}"
        )
    return PairNoise(
        scheduler=scheduler,
        seed=seed,
        scaling_factor=vae_config.get("scaling_factor", 0.18215),
        shift_factor=vae_config.get("shift_factor") or 0.0,
        min_timestep=min_timestep,
        max_timestep=high,
        sample_latents=sample_latents,
    )
