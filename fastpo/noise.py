"""Timesteps and noise shared by the two sides of a pair, drawn from counters.

A draw depends on (seed, pair, visit) only: not on the batch, the process, or the order of the data.
The schedule is read from the pipeline's own scheduler folder, by diffusers' `DDPMScheduler`; the
arithmetic is `fastpo_kernels.pair_noise.noised_pair`, one launch on a GPU.

Timesteps that are not uniform are drawn by inversion: a table holds the distribution's quantiles at
the middles of Q equal parts of [0, 1), the kernel draws a part, and the schedule it reads is the
one of the table's timesteps. The table is made on the host in float64, so that every device draws
the same timestep.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from fastpo.config import Config
from fastpo.config_timesteps import (
    BinTimesteps,
    ListTimesteps,
    LogitNormalTimesteps,
    TimestepsConfig,
    UniformTimesteps,
)
from fastpo.encoders import vae_folder_of
from fastpo.errors import ConfigError, ModelError
from fastpo.hub import read_json
from fastpo.types import NoisedPair, PairBatch
from fastpo_kernels.pair_noise import Prediction, Stream, noised_pair, pair_uniform

QUANTILES = 2**16  # a timestep's share of the draws is exact to this fraction
DRAWS = "philox4x32-10, 1"  # change the number whenever the same counters give other draws


@dataclass(frozen=True)
class TimestepTable:
    """Equally likely timesteps, and the schedule at each of them.

    Attributes:
        timesteps: `(Q,)` int64.
        signal: `(Q,)` float32, factor of the latents.
        sigma: `(Q,)` float32, factor of the noise.
    """

    timesteps: Tensor
    signal: Tensor
    sigma: Tensor


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
        table: The timesteps to draw from, or None: each of the range equally often.
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
    table: TimestepTable | None = None

    def noised_pair(self, batch: PairBatch) -> NoisedPair:
        """Adds the pair's shared noise at its shared timestep and forms the target."""
        table = self.table
        schedule = self if table is None else table
        noisy, target, timesteps = noised_pair(
            batch.latent_mean,
            batch.pair_key,
            batch.visit,
            schedule.signal,
            schedule.sigma,
            seed=self.seed,
            low=self.min_timestep if table is None else 0,
            high=self.max_timestep if table is None else len(table.timesteps),
            prediction=self.prediction,
            logvar=batch.latent_logvar if self.sample_latents else None,
            shift=self.shift_factor,
            scale=self.scaling_factor,
        )
        if table is not None:
            timesteps = table.timesteps[timesteps]
        return NoisedPair(noisy_latents=noisy, timesteps=timesteps, target=target)

    def empty_prompts(self, batch: PairBatch, rate: float) -> Tensor:
        """Returns `(B,)` bool: the visits on which both sides lose their caption."""
        coin = pair_uniform(batch.pair_key, batch.visit, seed=self.seed, stream=Stream.EMPTY_PROMPT)
        return coin < rate

    def snr_weight(self, timesteps: Tensor, gamma: float | None) -> Tensor | None:
        """The min-SNR weight of each pair's loss, `(B,)` float32 in [0, 1]; None without gamma.

        With `snr = signal_t^2 / sigma_t^2`: `min(snr, gamma) / snr` where the noise is predicted,
        `min(snr, gamma) / (snr + 1)` where the velocity is. Hang et al. 2023 (arXiv 2303.09556),
        section 3.4. Without signal (snr = 0) it is 1 and 0. The weights' mean is below 1, so they
        also lower the step's length.

        Args:
            timesteps: `(B,)` int64.
            gamma: The greatest weight of an error in the image itself; usually 5.
        """
        if gamma is None:
            return None
        snr = (self.signal[timesteps] / self.sigma[timesteps]).square()
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        return snr.clamp(max=gamma) / (snr + 1.0)

    def identity(self) -> dict[str, str]:
        """All that a pair's draws, noisy latents and target depend on, besides the latents.

        Equal identities give equal draws, on any device; what was computed from draws of another
        identity (a cache of reference errors) is of no use. Keys are the configuration's names.
        """
        return {
            "draws": DRAWS,
            "seed": str(self.seed),
            "schedule": _digest(self.signal, self.sigma),
            "prediction_type": self.prediction,
            "vae.scaling_factor": repr(self.scaling_factor),
            "vae.shift_factor": repr(self.shift_factor),
            "train.min_timestep": str(self.min_timestep),
            "train.max_timestep": str(self.max_timestep),
            "train.timesteps": ("uniform" if self.table is None else _digest(self.table.timesteps)),
            "train.sample_latents": str(self.sample_latents).lower(),
        }


def _digest(*tensors: Tensor) -> str:
    """The first 16 hexadecimal digits of BLAKE2b over the tensors' values."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def timestep_quantiles(kind: TimestepsConfig, low: int, high: int, length: int) -> Tensor | None:
    """Returns the timesteps to draw from, each equally likely, `(Q,)` int64; None: low..high-1.

    Args:
        kind: The distribution, over the range's fractions: `t = low + floor(x (high - low))`.
        low: The first timestep of the range.
        high: The first timestep beyond it.
        length: Number of timesteps of the schedule.

    Raises:
        ConfigError: A listed timestep is not one of the schedule's.
    """
    if isinstance(kind, UniformTimesteps):
        return None
    if isinstance(kind, ListTimesteps):
        outside = [t for t in kind.values if t >= length]
        if outside:
            raise ConfigError(
                f"train.timesteps.values must lie below {length} (the schedule's length), "
                f"got {outside[0]}"
            )
        return torch.tensor(kind.values, dtype=torch.int64)
    level = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    if isinstance(kind, LogitNormalTimesteps):
        fraction = torch.sigmoid(kind.mean + kind.std * torch.special.ndtri(level))
    else:
        fraction = _bin_quantiles(kind, level)
    steps = torch.floor(fraction * (high - low)).to(torch.int64)
    return low + steps.clamp(0, high - low - 1)


def _bin_quantiles(kind: BinTimesteps, level: Tensor) -> Tensor:
    """Inverts the piecewise linear distribution function of equal bins with the given weights."""
    weights = torch.tensor(kind.weights, dtype=torch.float64)
    upper = (weights / weights.sum()).cumsum(0)
    # `right` goes past bins of weight 0; the clamp guards the last digit of the sum.
    which = torch.searchsorted(upper, level, right=True).clamp(max=len(weights) - 1)
    share = weights[which] / weights.sum()
    inside = ((level - (upper[which] - share)) / share).clamp(0.0, 1.0)
    return (which + inside) / len(weights)


def make_noise(
    scheduler: DDPMScheduler,
    vae_config: dict,
    *,
    seed: int,
    min_timestep: int,
    max_timestep: int | None,
    sample_latents: bool,
    timesteps: TimestepsConfig | None = None,
    device: torch.device | str = "cpu",
) -> PairNoise:
    """Checks the schedule and the timesteps asked for, and puts the noise source together.

    Args:
        scheduler: The pipeline's schedule.
        vae_config: The VAE's `config.json`.
        seed: The run's seed in [0, 2^32).
        min_timestep: First timestep drawn.
        max_timestep: First timestep not drawn; None is the schedule's length.
        sample_latents: Draw the latents from the VAE's posterior, else take its mean.
        timesteps: How often each is drawn; None is uniform.
        device: Where the tables live.

    Raises:
        ModelError: The schedule predicts neither the noise nor the velocity.
        ConfigError: The timesteps do not lie within the schedule, or the seed is not in [0, 2^32).
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
    kept = scheduler.alphas_cumprod.cpu().float()
    signal, sigma = kept.sqrt(), (1.0 - kept).sqrt()
    table = None
    drawn = timestep_quantiles(timesteps or UniformTimesteps(), min_timestep, high, length)
    if drawn is not None:
        table = TimestepTable(*(t.to(device) for t in (drawn, signal[drawn], sigma[drawn])))
    return PairNoise(
        signal=signal.to(device),
        sigma=sigma.to(device),
        prediction=kind,
        seed=seed,
        scaling_factor=vae_config.get("scaling_factor", 0.18215),
        shift_factor=vae_config.get("shift_factor") or 0.0,
        min_timestep=min_timestep,
        max_timestep=high,
        sample_latents=sample_latents,
        table=table,
    )


def setup_noise(config: Config, folder: Path, device: torch.device | str = "cpu") -> PairNoise:
    """Makes the noise source of a run from its configuration and its pipeline's folder.

    Raises:
        ModelError: A configuration file of the model is missing, or its schedule is not supported.
        ConfigError: As in `make_noise`.
    """
    train = config.train
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler: Any = DDPMScheduler.from_config(schedule)  # pyright: ignore[reportArgumentType]
    return make_noise(
        scheduler,
        read_json(vae_folder_of(config, folder) / "config.json"),
        seed=config.seed,
        min_timestep=train.min_timestep,
        max_timestep=train.max_timestep,
        sample_latents=train.sample_latents,
        timesteps=train.timesteps,
        device=device,
    )
