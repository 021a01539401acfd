"""Timesteps and noise shared by the two sides of a pair, drawn from counters.

A draw depends on (seed, pair, visit) only: not on the batch, the process, or the order of the data.
The schedule is the model family's; the arithmetic is `fastpo_kernels.pair_noise.noised_pair`, one
launch on a GPU.

Timesteps that are not uniform are drawn by inversion: a table holds the distribution's quantiles at
the middles of Q equal parts of [0, 1), the kernel draws a part, and the schedule it reads is the
one of the table's timesteps. The table is made on the host in float64, so that every device draws
the same timestep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpo.config import Config
from fastpo.config.timesteps import (
    BinTimesteps,
    ListTimesteps,
    LogitNormalTimesteps,
    SigmaTimesteps,
    TimestepsConfig,
    UniformTimesteps,
)
from fastpo.errors import ConfigError
from fastpo.models.folder import ModelFolder
from fastpo.models.schedule import NoiseSchedule, with_shift
from fastpo.types import NoisedPair, PairBatch
from fastpo_kernels.pair_noise import Stream, noised_pair, pair_uniform

QUANTILES = 2**16  # a timestep's share of the draws is exact to this fraction
DRAWS = "philox4x32-10, 1"  # change the number whenever the same counters give other draws


@dataclass(frozen=True)
class TimestepTable:
    """Equally likely places of the schedule, and the schedule at each of them.

    Attributes:
        index: `(Q,)` int64.
        signal: `(Q,)` float32, factor of the latents.
        sigma: `(Q,)` float32, factor of the noise.
    """

    index: Tensor
    signal: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class PairNoise:
    """Turns a batch of latents into what the denoiser sees and what it should answer.

    Attributes:
        schedule: The model's noise schedule, on the run's device.
        seed: The run's seed in [0, 2^32).
        min_timestep: First place of the schedule drawn.
        max_timestep: First place not drawn.
        sample_latents: Draw the latents from the VAE's posterior, else take its mean.
        table: The places to draw from, or None: each of the range equally often.
        guidance: The guidance scale that the denoiser is told; None: it is told none.
    """

    schedule: NoiseSchedule
    seed: int
    min_timestep: int
    max_timestep: int
    sample_latents: bool
    table: TimestepTable | None = None
    guidance: float | None = None

    def noised_pair(self, batch: PairBatch) -> NoisedPair:
        """Adds the pair's shared noise at its shared timestep and forms the target."""
        schedule, table = self.schedule, self.table
        drawn_from = schedule if table is None else table
        noisy, target, index = noised_pair(
            batch.latent_mean,
            batch.pair_key,
            batch.visit,
            drawn_from.signal,
            drawn_from.sigma,
            seed=self.seed,
            low=self.min_timestep if table is None else 0,
            high=self.max_timestep if table is None else len(table.index),
            prediction=schedule.prediction,
            logvar=batch.latent_logvar if self.sample_latents else None,
            shift=schedule.latent_shift,
            scale=schedule.latent_scale,
        )
        if table is not None:
            index = table.index[index]
        return NoisedPair(
            noisy_latents=noisy,
            index=index,
            timesteps=schedule.timesteps[index],
            target=target,
            guidance=1.0 if self.guidance is None else self.guidance,
        )

    def empty_prompts(self, batch: PairBatch, rate: float) -> Tensor:
        """Returns `(B,)` bool: the visits on which both sides lose their caption."""
        coin = pair_uniform(batch.pair_key, batch.visit, seed=self.seed, stream=Stream.EMPTY_PROMPT)
        return coin < rate

    def drop_captions(
        self, batch: PairBatch, rate: float, empty: Mapping[str, Tensor]
    ) -> PairBatch:
        """Takes the caption from both sides of a pair on the visits of `empty_prompts`.

        Args:
            batch: The pairs.
            rate: The visits' share.
            empty: The conditions of a dropped caption, see `dropped_conditions`.
        """
        return drop_captions(batch, self.empty_prompts(batch, rate), empty) if rate else batch

    def snr_weight(self, index: Tensor, gamma: float | None) -> Tensor | None:
        """The min-SNR weight of each pair's loss, `(B,)` float32 in [0, 1]; None without gamma.

        With `snr = signal_t^2 / sigma_t^2`: `min(snr, gamma) / snr` where the noise is predicted,
        `min(snr, gamma) / (snr + 1)` where the velocity is. Hang et al. 2023 (arXiv 2303.09556),
        section 3.4. Without signal (snr = 0) it is 1 and 0. The weights' mean is below 1, so they
        also lower the step's length. Flow matching has no such weight, see `setup_noise`.

        Args:
            index: `(B,)` int64, places of the schedule.
            gamma: The greatest weight of an error in the image itself; usually 5.
        """
        if gamma is None:
            return None
        snr = (self.schedule.signal[index] / self.schedule.sigma[index]).square()
        if self.schedule.prediction == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        return snr.clamp(max=gamma) / (snr + 1.0)

    def identity(self) -> dict[str, str]:
        """All that a pair's draws, noisy latents and target depend on, besides the latents.

        Equal identities give equal draws, on any device; what was computed from draws of another
        identity (a cache of reference errors) is of no use. Keys are the configuration's names.
        """
        schedule, table = self.schedule, self.table
        told = () if schedule.tells_places else (schedule.timesteps,)
        return {
            "draws": DRAWS,
            "seed": str(self.seed),
            "schedule": _digest(schedule.signal, schedule.sigma, *told),
            "prediction_type": schedule.prediction,
            "vae.scaling_factor": repr(schedule.latent_scale),
            "vae.shift_factor": repr(schedule.latent_shift),
            "train.min_timestep": str(self.min_timestep),
            "train.max_timestep": str(self.max_timestep),
            "train.timesteps": "uniform" if table is None else _digest(table.index),
            "train.sample_latents": str(self.sample_latents).lower(),
            **({} if self.guidance is None else {"train.guidance": repr(self.guidance)}),
        }


def drop_captions(batch: PairBatch, dropped: Tensor, empty: Mapping[str, Tensor]) -> PairBatch:
    """Replaces what prompts give by the conditions of a dropped caption; those of pairs stay.

    Args:
        batch: The pairs.
        dropped: `(B,)` bool, the pairs that lose their caption.
        empty: The conditions of a dropped caption, each `(1, ...)`.
    """
    conditions = dict(batch.conditions)
    for name, nothing in empty.items():
        given = conditions[name]
        rows = dropped.view(-1, *[1] * (given.ndim - 1))
        conditions[name] = torch.where(rows, nothing.to(given), given)
    return replace(batch, conditions=conditions)


def drops_to_zeros(config: Config, model: ModelFolder) -> bool:
    """Tells whether a run drops captions, and conditions on zeros where it does."""
    train = config.train
    if not train.empty_prompt_rate or train.empty_prompt == "encoded":
        return False
    return model.family.zeros_for_empty_prompt(model)


def dropped_conditions(
    config: Config, model: ModelFolder, empty: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns what a pair is conditioned on where its caption is dropped; see `train.empty_prompt`.

    Args:
        config: The run's configuration.
        model: The folder of its model.
        empty: The conditions that the empty prompt gives, each `(1, ...)`.

    Raises:
        ConfigError: Captions are dropped, and the family encodes none without a source image.
    """
    if config.train.empty_prompt_rate and model.family.text_sees_source:
        raise ConfigError(
            f"train.empty_prompt_rate: prompts of {model.family.name} are encoded together with "
            "their source images, and no empty ones are kept; leave it at 0"
        )
    if drops_to_zeros(config, model):
        return {name: torch.zeros_like(given) for name, given in empty.items()}
    return dict(empty)


def _digest(*tensors: Tensor) -> str:
    """The first 16 hexadecimal digits of BLAKE2b over the tensors' values."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def timestep_quantiles(
    kind: UniformTimesteps | ListTimesteps | LogitNormalTimesteps | BinTimesteps,
    low: int,
    high: int,
    length: int,
) -> Tensor | None:
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


def _nearest_places(kind: SigmaTimesteps, schedule: NoiseSchedule) -> Tensor:
    """The places whose factor of the noise is nearest to each of those listed, int64.

    Raises:
        ConfigError: The model is not trained with flow matching.
    """
    if schedule.prediction != "flow":
        raise ConfigError(
            "train.timesteps.kind: sigmas are factors of the noise under flow matching, with which "
            f"this model is not trained ({schedule.prediction}); list its timesteps with kind: list"
        )
    wanted = torch.tensor(kind.values, dtype=torch.float64)
    return (wanted[:, None] - schedule.sigma.cpu().double()).abs().argmin(dim=1)


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
    schedule: NoiseSchedule,
    *,
    seed: int,
    min_timestep: int,
    max_timestep: int | None,
    sample_latents: bool,
    timesteps: TimestepsConfig | None = None,
    device: torch.device | str = "cpu",
) -> PairNoise:
    """Checks the timesteps asked for and puts the noise source together.

    Args:
        schedule: The model's schedule.
        seed: The run's seed in [0, 2^32).
        min_timestep: First place of the schedule drawn.
        max_timestep: First place not drawn; None is the schedule's length.
        sample_latents: Draw the latents from the VAE's posterior, else take its mean.
        timesteps: How often each is drawn; None is uniform.
        device: Where the tables live.

    Raises:
        ConfigError: The timesteps do not lie within the schedule, or the seed is not in [0, 2^32).
    """
    if seed >= 2**32:
        raise ConfigError(f"seed must be below 2^32, got {seed}")
    length = len(schedule)
    high = length if max_timestep is None else max_timestep
    if not 0 <= min_timestep < high <= length:
        raise ConfigError(
            f"train.min_timestep and train.max_timestep must satisfy 0 <= min < max <= {length} "
            f"(the schedule's length), got {min_timestep} and {high}"
        )
    table = None
    if isinstance(timesteps, SigmaTimesteps):
        drawn = _nearest_places(timesteps, schedule)
    else:
        drawn = timestep_quantiles(timesteps or UniformTimesteps(), min_timestep, high, length)
    if drawn is not None:
        columns = (drawn, schedule.signal[drawn], schedule.sigma[drawn])
        table = TimestepTable(*(column.to(device) for column in columns))
    return PairNoise(
        schedule=replace(
            schedule,
            signal=schedule.signal.to(device),
            sigma=schedule.sigma.to(device),
            timesteps=schedule.timesteps.to(device),
        ),
        seed=seed,
        min_timestep=min_timestep,
        max_timestep=high,
        sample_latents=sample_latents,
        table=table,
    )


def setup_noise(
    config: Config, model: ModelFolder, device: torch.device | str = "cpu"
) -> PairNoise:
    """Makes the noise source of a run from its configuration and its model's folder.

    Raises:
        ModelError: A configuration file of the model is missing, or its schedule is not supported.
        ConfigError: As in `make_noise`.
    """
    train = config.train
    noise = make_noise(
        _schedule(config, model),
        seed=config.seed,
        min_timestep=train.min_timestep,
        max_timestep=train.max_timestep,
        sample_latents=train.sample_latents,
        timesteps=train.timesteps,
        device=device,
    )
    usual = model.family.guidance
    if usual is None and train.guidance is not None:
        raise ConfigError(
            f"train.guidance: {model.family.name} is told no guidance scale, got {train.guidance}"
        )
    return replace(noise, guidance=usual if train.guidance is None else train.guidance)


def _schedule(config: Config, model: ModelFolder) -> NoiseSchedule:
    """The model's schedule with the shift asked for.

    Raises:
        ConfigError: A key does not go with the model's kind of training.
    """
    schedule, train = model.family.schedule(model, config.prepare.resolution), config.train
    if schedule.prediction == "flow":
        if train.snr_gamma is not None:
            raise ConfigError(
                "train.snr_gamma: min-SNR evens out the errors of noise predictions; under flow "
                f"matching, with which {model.family.name} is trained, it means nothing: leave it "
                "out, and choose with train.timesteps which noise counts more"
            )
        return schedule if train.flow_shift is None else with_shift(schedule, train.flow_shift)
    if train.flow_shift is not None:
        raise ConfigError(
            f"train.flow_shift: {model.family.name} is not trained with flow matching, got "
            f"{train.flow_shift:g}"
        )
    return schedule
