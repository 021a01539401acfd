"""Noise schedules: how much of image and noise a noisy latent has, and what the denoiser is told.

A schedule is a table with one row per place, from nearly clean to nearly noise:
`x_t = signal x + sigma noise`. Draws, the ledger's bins and the signal-to-noise ratio go by the
place; the denoiser is told `timesteps[place]`, a whole number or a real one, in the family's scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from fastpo.errors import ModelError
from fastpo.models.folder import ModelFolder, loading, read_json
from fastpo_kernels.pair_noise import Prediction

# Samplers of models that were trained with DDPM's noise. Others (flow matching, EDM, consistency
# distillation) belong to models that learned another target or another scale of the noise.
_DDPM_SAMPLERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


@dataclass(frozen=True)
class NoiseSchedule:
    """What training noises latents with.

    Attributes:
        signal: `(T,)` float32, factor of the latents at each place.
        sigma: `(T,)` float32, factor of the noise.
        timesteps: `(T,)` int64 or float32, what the denoiser is told there.
        prediction: What the denoiser predicts: `epsilon` (the noise), `v_prediction`
            (`signal noise - sigma x`) or `flow` (`noise - x`).
        latent_scale: The denoiser works on `(latents - latent_shift) * latent_scale`.
        latent_shift: Subtracted from the stored latents before scaling.
    """

    signal: Tensor
    sigma: Tensor
    timesteps: Tensor
    prediction: Prediction
    latent_scale: float = 1.0
    latent_shift: float = 0.0

    def __len__(self) -> int:
        """Returns the number of places."""
        return len(self.signal)

    @property
    def tells_places(self) -> bool:
        """Whether the denoiser is told the place itself."""
        if self.timesteps.dtype != torch.int64:
            return False
        return torch.equal(self.timesteps.cpu(), torch.arange(len(self)))


def read_ddpm_schedule(folder: ModelFolder) -> NoiseSchedule:
    """Reads a diffusion schedule and the VAE's scale from a pipeline's folder.

    Whatever sampler of such models the folder names, training takes `DDPMScheduler`'s table of its
    settings.

    Raises:
        ModelError: As `ddpm_schedule`, the sampler is one of other models, or a configuration file
            is missing.
    """
    path = folder.component("scheduler") / "scheduler_config.json"
    config: Any = read_json(path)
    name = config.get("_class_name")
    if name not in _DDPM_SAMPLERS or config.get("use_flow_sigmas"):
        flow = " with use_flow_sigmas" if config.get("use_flow_sigmas") else ""
        raise ModelError(
            f"{path}: {ascii(name)[:80]}{flow} does not sample a model that was trained with "
            "DDPM's noise, as this family is (flow matching, EDM and consistency models are not); "
            "if this model was, put its training's scheduler there, such as DDPMScheduler"
        )
    with loading(f"{path}: no schedule could be made of it"):
        scheduler = DDPMScheduler.from_config(config)
    return ddpm_schedule(scheduler, read_json(folder.vae / "config.json"))


def ddpm_schedule(scheduler: Any, vae_config: dict[str, Any]) -> NoiseSchedule:
    """Makes the schedule of a `DDPMScheduler`.

    Args:
        scheduler: The scheduler.
        vae_config: The VAE's `config.json`, for its scale.

    Raises:
        ModelError: It predicts neither the noise nor the velocity.
    """
    prediction = scheduler.config["prediction_type"]
    if prediction not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"scheduler/scheduler_config.json: prediction_type must be 'epsilon' or "
            f"'v_prediction', got {prediction!r}"
        )
    kept = scheduler.alphas_cumprod.cpu().float()
    if kept.ndim != 1 or not len(kept):
        raise ModelError("scheduler/scheduler_config.json: trained_betas must be a list of numbers")
    return NoiseSchedule(
        signal=kept.sqrt(),
        sigma=(1.0 - kept).sqrt(),
        timesteps=torch.arange(len(kept)),
        prediction=prediction,
        latent_scale=vae_number(vae_config, "scaling_factor", 0.18215),
        latent_shift=vae_number(vae_config, "shift_factor", 0.0),
    )


def vae_number(config: dict[str, Any], key: str, default: float) -> float:
    """As `config_number`, of the VAE's configuration."""
    return config_number(config, key, default, "the VAE")


def config_number(config: dict[str, Any], key: str, default: float, part: str) -> float:
    """Returns a finite number of a configuration, the default where it is null or missing.

    Raises:
        ModelError: It is none.
    """
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise ModelError(f"{part}'s {key} must be a number, got {ascii(value)[:80]}")
    return value


def flow_schedule(
    scheduler: Any,
    *,
    tokens: int | None = None,
    mu: float | None = None,
    latent_scale: float = 1.0,
    latent_shift: float = 0.0,
) -> NoiseSchedule:
    """Makes the schedule of flow matching: `x_t = (1 - sigma) x + sigma noise`.

    Sigmas and timesteps are the scheduler's own, its shift included; the timesteps are
    `1000 sigma`, real numbers. A family that is told something else (`sigma`, or `1 - sigma`)
    replaces them: `replace(schedule, timesteps=...)`.

    Args:
        scheduler: A `FlowMatchEulerDiscreteScheduler`, fresh from its configuration.
        tokens: Number of the image's tokens, for a scheduler with `use_dynamic_shifting`.
        mu: By what such a scheduler shifts, where that is no matter of `dynamic_shift`.
        latent_scale: See `NoiseSchedule`.
        latent_shift: See `NoiseSchedule`.
    """
    sigma, steps = scheduler.sigmas.cpu().float(), scheduler.timesteps.cpu().float()
    if tokens is not None and scheduler.config.use_dynamic_shifting:
        # Such a scheduler's table has no shift before `set_timesteps` is given one.
        mu = dynamic_shift(scheduler.config, tokens) if mu is None else mu
        sigma = scheduler.time_shift(mu, 1.0, sigma)
        if scheduler.config.shift_terminal:
            sigma = scheduler.stretch_shift_to_terminal(sigma)
        steps = sigma * scheduler.config.num_train_timesteps
    return NoiseSchedule(
        signal=1.0 - sigma.flip(0),
        sigma=sigma.flip(0),
        timesteps=steps.flip(0),
        prediction="flow",
        latent_scale=latent_scale,
        latent_shift=latent_shift,
    )


def with_shift(schedule: NoiseSchedule, shift: float) -> NoiseSchedule:
    """Returns a schedule of flow matching with another shift in the place of its own.

    `sigma = shift s / (1 + (shift - 1) s)` of `s = 1/T, ..., 1`. What the denoiser is told stays
    the linear function of sigma that it was.
    """
    even = torch.arange(1, len(schedule) + 1, dtype=torch.float64) / len(schedule)
    sigma = shift * even / (1.0 + (shift - 1.0) * even)
    (low, high), (first, last) = (t[[0, -1]].double() for t in (schedule.sigma, schedule.timesteps))
    told = first + (sigma - low) * ((last - first) / (high - low))
    sigma = sigma.float()
    return replace(schedule, signal=1.0 - sigma, sigma=sigma, timesteps=told.float())


def dynamic_shift(config: Any, tokens: int) -> float:
    """Returns `mu`, linear in the number of the image's tokens, as the pipelines calculate it.

    Through `(base_image_seq_len, base_shift)` and `(max_image_seq_len, max_shift)` of the
    scheduler's configuration; diffusers' `calculate_shift`.
    """
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return tokens * slope + config.base_shift - slope * config.base_image_seq_len
