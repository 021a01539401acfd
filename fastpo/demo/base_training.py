"""The short trainings behind the demo's bases: the autoencoder, then the denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from rich.progress import Progress
from torch import Tensor, nn

from fastpo.demo.digits import SIZE, WORDS, load_scans, prompts

Advance = Callable[[], None]


class DenoiserRecipe(Protocol):
    """How long and how a denoiser is trained."""

    @property
    def unet_steps(self) -> int: ...

    @property
    def unet_lr(self) -> float: ...

    @property
    def ema_decay(self) -> float: ...


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """How long and how a base is trained; the defaults take three minutes on two cores.

    `unet_steps`, `unet_batch` and `unet_lr` are the denoiser's, of whatever kind it is.
    """

    vae_steps: int = 500
    vae_batch: int = 24
    vae_lr: float = 3e-3
    kl_weight: float = 5e-4
    unet_steps: int = 900
    unet_batch: int = 64
    unet_lr: float = 2e-3
    caption_drop: float = 0.1  # classifier-free guidance needs the unconditional answer
    ema_decay: float = 0.99


@dataclass(frozen=True, slots=True)
class Captioned:
    """What the denoiser learns from.

    Attributes:
        mean, logvar: `(N, C, h, w)` the scans' posteriors, scaled to unit variance.
        labels: `(N,)` int64 digit of each scan.
        states: `(10, T, L, D)` text states of each digit in each wording.
        pooled: `(10, T, P)` the pooled states.
    """

    mean: Tensor
    logvar: Tensor
    labels: Tensor
    states: Tensor
    pooled: Tensor


def captions() -> list[str]:
    """Returns all that the base can be asked for, wording by wording."""
    return [*prompts(), *prompts(held_out=True)]


def captioned_scans(
    vae: AutoencoderKL, texts: tuple[Tensor, Tensor], recipe: BaseRecipe, bar: Progress
) -> Captioned:
    """Fits the autoencoder to the scans in place, and encodes them.

    Args:
        vae: The autoencoder; its scaling factor is set so that latents have unit size.
        texts: States `(T * 10, L, D)` and pooled states `(T * 10, P)` of `captions`.
        recipe: How it is trained.
        bar: Gets a task.

    Returns:
        What the denoiser learns from.
    """
    scans = load_scans()
    images = torch.from_numpy(scans.images.copy()).float()[:, None] / 127.5 - 1.0
    task = bar.add_task("autoencoder", total=recipe.vae_steps)
    train_vae(vae, images, recipe, lambda: bar.advance(task))
    mean, logvar, scale = posteriors(vae, images)
    vae.register_to_config(scaling_factor=scale)
    states, pooled = map(by_digit, texts)
    return Captioned(mean, logvar, torch.from_numpy(scans.labels), states, pooled)


def train_vae(vae: AutoencoderKL, images: Tensor, recipe: BaseRecipe, advance: Advance) -> None:
    """Fits the autoencoder to `(N, 1, 32, 32)` images in [-1, 1] in place.

    Half of the images are thickened at random: the decoder must be able to draw strokes that are
    bolder than any scan's, because that is what the preferences will ask for.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr)
    vae.train()
    for rate in rates(recipe.vae_lr, recipe.vae_steps):
        clean = images[torch.randint(len(images), (recipe.vae_batch,))]
        bold = -F.max_pool2d(-clean, 3, stride=1, padding=1)
        share = torch.rand(2, recipe.vae_batch, 1, 1, 1).prod(dim=0)
        x = torch.lerp(clean, bold, share).expand(-1, 3, -1, -1)
        posterior = vae.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        decoded = vae.decode(posterior.sample()).sample  # pyright: ignore[reportAttributeAccessIssue]
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        step(optimizer, vae, F.mse_loss(decoded, x) + recipe.kl_weight * divergence, rate)
        advance()
    vae.eval().requires_grad_(False)


def train_unet(
    unet: UNet2DConditionModel,
    schedule: DDPMScheduler,
    data: Captioned,
    recipe: BaseRecipe,
    advance: Advance,
) -> None:
    """Fits the UNet to the captioned latents in place; see `fit_averaged`."""
    fit_averaged(unet, lambda: _denoising_loss(unet, schedule, data, recipe), recipe, advance)


def fit_averaged(
    denoiser: nn.Module, loss: Callable[[], Tensor], recipe: DenoiserRecipe, advance: Advance
) -> None:
    """Lowers a denoiser's loss in place and leaves the weights' moving average in it."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.unet_lr)
    averaged = [p.detach().clone() for p in denoiser.parameters()]
    denoiser.train()
    for rate in rates(recipe.unet_lr, recipe.unet_steps):
        step(optimizer, denoiser, loss(), rate)
        torch._foreach_lerp_(averaged, list(denoiser.parameters()), 1.0 - recipe.ema_decay)
        advance()
    with torch.no_grad():
        for parameter, average in zip(denoiser.parameters(), averaged, strict=True):
            parameter.copy_(average)
    denoiser.eval().requires_grad_(False)


def _denoising_loss(
    unet: UNet2DConditionModel, schedule: DDPMScheduler, data: Captioned, recipe: BaseRecipe
) -> Tensor:
    """Mean squared error of the velocity at random timesteps, captions dropped at random."""
    batch = recipe.unet_batch
    clean, words, keep = draw(data, recipe)
    noise = torch.randn_like(clean)
    steps = schedule.config["num_train_timesteps"]
    timesteps = torch.randint(steps, (batch,))
    answer = unet(
        schedule.add_noise(clean, noise, timesteps),  # pyright: ignore[reportArgumentType]
        timesteps,
        encoder_hidden_states=data.states[words] * keep[:, None, None],
        added_cond_kwargs={
            "text_embeds": data.pooled[words] * keep[:, None],
            "time_ids": time_ids(batch),
        },
    ).sample
    velocity = schedule.get_velocity(clean, noise, timesteps)  # pyright: ignore[reportArgumentType]
    return F.mse_loss(answer, velocity)


def draw(data: Captioned, recipe: BaseRecipe) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Draws a batch.

    Returns:
        Latents `(B, C, h, w)`; digits and wordings, an index of `data.states`; and `(B,)` float32,
        0 where the caption is dropped, else 1.
    """
    batch = recipe.unet_batch
    rows = torch.randint(len(data.labels), (batch,))
    words = (data.labels[rows], torch.randint(data.states.shape[1], (batch,)))
    keep = (torch.rand(batch) >= recipe.caption_drop).float()
    clean = data.mean[rows]
    return clean + torch.exp(0.5 * data.logvar[rows]) * torch.randn_like(clean), words, keep


@torch.no_grad()
def posteriors(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Returns the scans' scaled means and log-variances, and the scale that gives unit size."""
    posterior = vae.encode(images.expand(-1, 3, -1, -1)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    scale = 1.0 / posterior.sample().std().item()
    logvar = posterior.logvar + 2.0 * torch.tensor(scale).log()
    return posterior.mean * scale, logvar, scale


def by_digit(rows: Tensor) -> Tensor:
    """`(T * 10, ...)` rows, wording by wording, as `(10, T, ...)`."""
    return rows.view(-1, len(WORDS), *rows.shape[1:]).transpose(0, 1).contiguous()


def time_ids(batch: int) -> Tensor:
    """Returns `(batch, 6)`: original height and width, crop top and left, target height, width."""
    return torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], dtype=torch.float32).expand(batch, -1)


def rates(peak: float, steps: int) -> Iterator[float]:
    """Yields a short linear warm-up, then half a cosine down to zero."""
    warmup = max(1, steps // 20)
    for step in range(steps):
        yield peak * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor, rate: float) -> None:
    """Updates the weights once, at a rate, from gradients of norm 1 at most."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
