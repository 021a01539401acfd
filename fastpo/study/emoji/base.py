"""The color world's base model: a tiny SD1.5 that knows style A alone.

The folder is a stock `StableDiffusionPipeline`: an AutoencoderKL that halves twice, a UNet with
cross attention alone, a frozen CLIP text encoder, and a DDIM sampler; it predicts the velocity
under a cosine schedule. The autoencoder has seen both styles and all names, as a real model's
autoencoder has seen all pictures; the denoiser has seen style A of the drawn names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import CLIPTextModel

from fastpo.demo.base import SCHEDULE, build_vae
from fastpo.demo.base_training import fit_averaged, rates, step
from fastpo.demo.text import build_text_encoders, build_tokenizer
from fastpo.study.emoji.pictures import (
    FILE,
    STYLES,
    Pictures,
    draw_variation,
    read_pictures,
    to_tensor,
    vary,
)
from fastpo.study.emoji.text import WIDTH, encode, prompts_of
from fastpo.system.ownership import Kind, check_replaceable, owned_folder

SAMPLING = {"clip_sample": False, "timestep_spacing": "trailing", "steps_offset": 1}
LAYOUT = 1  # raise when the architecture or the data of the base changes
ABOUT = "emoji_base.json"
EMOJI_BASE = Kind(
    "the color world's base model",
    r"(emoji_base|model_index)\.json|(vae|unet|text_encoder|tokenizer|scheduler)/[\w.-]+",
    lambda folder: (folder / ABOUT).is_file(),
)
Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class EmojiRecipe:
    """How long and how the base is trained; the defaults take about nine minutes of one core."""

    vae_steps: int = 600
    vae_batch: int = 16
    vae_lr: float = 3e-3
    kl_weight: float = 1e-4
    variants: int = 12  # of each picture, which the denoiser learns from
    unet_steps: int = 1200
    unet_batch: int = 48
    unet_lr: float = 2e-3
    caption_drop: float = 0.1  # classifier-free guidance needs the unconditional answer
    ema_decay: float = 0.99


SHORT = EmojiRecipe(vae_steps=4, variants=2, unet_steps=4, unet_batch=8)


@dataclass(frozen=True, slots=True)
class Latents:
    """What the denoiser learns from.

    Attributes:
        mean, logvar: `(N, V, C, h, w)` the posteriors of each name's variants, of unit size.
        states: `(W, N, L, D)` text states of each name in each wording.
        nothing: `(L, D)` text states of the empty prompt.
    """

    mean: Tensor
    logvar: Tensor
    states: Tensor
    nothing: Tensor


def build_emoji_base(
    out: Path,
    pictures: Path,
    *,
    seed: int = 0,
    recipe: EmojiRecipe | None = None,
    progress: bool = True,
) -> Path:
    """Trains the base, or finds the one that the same recipe made of the same pictures before.

    Args:
        out: The pipeline's folder; appears when complete, never half-written.
        pictures: Folder that `write_pictures` wrote.
        seed: Seed of the base's weights and training.
        recipe: Lengths and rates.
        progress: Show a progress bar.

    Returns:
        `out`.

    Raises:
        DataError: There are no pictures.
        ForeignPathError: `out` holds something else.
    """
    recipe = recipe or EmojiRecipe()
    drawn = read_pictures(pictures)
    about = {
        "layout": LAYOUT,
        "seed": seed,
        "recipe": asdict(recipe),
        "pictures": hashlib.sha256((pictures / FILE).read_bytes()).hexdigest(),
    }
    marker = out / ABOUT
    if marker.is_file() and json.loads(marker.read_text()) == about:
        return out
    check_replaceable(out, EMOJI_BASE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _train(drawn, read_pictures(pictures, drawn=None), recipe, progress)
    with owned_folder(out, EMOJI_BASE) as folder:
        pipeline.save_pretrained(folder)
        (folder / ABOUT).write_text(json.dumps(about))
    return out


def _train(
    drawn: Pictures, known: Pictures, recipe: EmojiRecipe, progress: bool
) -> StableDiffusionPipeline:
    captions = prompts_of(drawn.names)
    tokenizer = build_tokenizer(captions)
    [encoder] = build_text_encoders(tokenizer, (CLIPTextModel,), WIDTH)
    size = drawn.styles[STYLES[0]].shape[1]
    vae, unet = build_vae(size), build_unet(size)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("autoencoder", total=recipe.vae_steps)
        images = torch.cat([to_tensor(known.styles[style]) for style in STYLES])
        _train_vae(vae, images, recipe, lambda: bar.advance(task))
        mean, logvar, scale = _posteriors(vae, to_tensor(drawn.styles[STYLES[0]]), recipe.variants)
        vae.register_to_config(scaling_factor=scale)
        states = encode(tokenizer, encoder, [*captions, ""])
        data = Latents(
            mean=mean,
            logvar=logvar,
            states=states[:-1].view(-1, len(drawn), *states.shape[1:]),
            nothing=states[-1],
        )
        task = bar.add_task("denoiser", total=recipe.unet_steps)
        schedule = DDPMScheduler(**SCHEDULE)
        fit_averaged(
            unet,
            lambda: _denoising_loss(unet, schedule, data, recipe),
            recipe,
            lambda: bar.advance(task),
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, **SAMPLING),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def build_unet(size: int) -> UNet2DConditionModel:
    """Returns the denoiser: SD1.5's conditioning, two resolutions, a million weights."""
    return UNet2DConditionModel(
        sample_size=size // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def _train_vae(vae: AutoencoderKL, images: Tensor, recipe: EmojiRecipe, advance: Advance) -> None:
    """Fits the autoencoder to variants of `(N, 3, S, S)` images in [-1, 1] in place."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr)
    vae.train()
    for rate in rates(recipe.vae_lr, recipe.vae_steps):
        some = images[torch.randint(len(images), (recipe.vae_batch,))]
        some = vary(some, draw_variation(len(some)))
        posterior = vae.encode(some).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        decoded = vae.decode(posterior.sample()).sample  # pyright: ignore[reportAttributeAccessIssue]
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        step(optimizer, vae, F.mse_loss(decoded, some) + recipe.kl_weight * divergence, rate)
        advance()
    vae.eval().requires_grad_(False)


@torch.no_grad()
def _posteriors(vae: AutoencoderKL, images: Tensor, variants: int) -> tuple[Tensor, Tensor, float]:
    """Returns the variants' scaled means and log-variances, and the scale of unit size."""
    means, logvars = [], []
    for _ in range(variants):
        posterior = vae.encode(vary(images, draw_variation(len(images)))).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
    mean, logvar = torch.stack(means, dim=1), torch.stack(logvars, dim=1)
    scale = 1.0 / (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).std().item()
    return mean * scale, logvar + 2.0 * torch.tensor(scale).log(), scale


def _denoising_loss(
    unet: UNet2DConditionModel, schedule: DDPMScheduler, data: Latents, recipe: EmojiRecipe
) -> Tensor:
    """Mean squared error of the velocity at random timesteps, captions dropped at random."""
    batch = recipe.unet_batch
    names = torch.randint(data.mean.shape[0], (batch,))
    rows = names, torch.randint(data.mean.shape[1], (batch,))
    clean = data.mean[rows]
    clean = clean + torch.exp(0.5 * data.logvar[rows]) * torch.randn_like(clean)
    states = data.states[torch.randint(len(data.states), (batch,)), names]
    dropped = torch.rand(batch, 1, 1) < recipe.caption_drop
    noise = torch.randn_like(clean)
    timesteps = torch.randint(schedule.config["num_train_timesteps"], (batch,))
    answer = unet(
        schedule.add_noise(clean, noise, timesteps),  # pyright: ignore[reportArgumentType]
        timesteps,
        encoder_hidden_states=torch.where(dropped, data.nothing, states),
    ).sample
    velocity = schedule.get_velocity(clean, noise, timesteps)  # pyright: ignore[reportArgumentType]
    return F.mse_loss(answer, velocity)
