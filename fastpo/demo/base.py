"""The demo's base models: a tiny SDXL or SD3, trained once on the scans and kept.

SDXL's folder is a stock `StableDiffusionXLPipeline`: an AutoencoderKL that halves twice, a UNet
with SDXL's text and size conditioning, two frozen CLIP text encoders, and a DDIM sampler. It
predicts the velocity under a cosine schedule, which at this size trains well where predicting the
noise stays noisy. SD3 is in `fastpo.demo.flow_base`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from rich.console import Console
from rich.progress import Progress

from fastpo.demo import flow_base
from fastpo.demo.base_training import BaseRecipe, captioned_scans, captions, train_unet
from fastpo.demo.digits import SIZE
from fastpo.demo.text import WIDTH, build_text_encoders, build_tokenizer, encode
from fastpo.errors import ConfigError
from fastpo.system.ownership import Kind, check_replaceable, owned_folder

LAYOUT = 1  # raise when the architecture or the data of the base changes
SHORT = BaseRecipe(vae_steps=4, unet_steps=4)
SCHEDULE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
ABOUT = "demo_base.json"
DEMO_BASE = Kind(
    "the demo's base model",
    r"(demo_base|model_index)\.json"
    r"|(vae|unet|transformer|text_encoder(_[23])?|tokenizer(_[23])?|scheduler)/[\w.-]+",
    lambda folder: (folder / ABOUT).is_file(),
)


PLAIN = "sdxl"
"""The family that the demo is of unless another is asked for."""


@dataclass(frozen=True)
class DemoFamily:
    """A kind of base model that the demo has.

    Attributes:
        title: What the base is.
        recipe: How it is trained.
        options: Keys of a run's configuration in which it differs from `configs/demo.yaml`.
        suffix: Of the names of its folders.
    """

    title: str
    recipe: BaseRecipe
    options: Mapping[str, Any]
    suffix: str


FAMILIES = {
    PLAIN: DemoFamily("a tiny SDXL", BaseRecipe(), {}, ""),
    "sd3": DemoFamily("a tiny SD3", flow_base.RECIPE, flow_base.OPTIONS, "-sd3"),
}


def demo_family(name: str) -> DemoFamily:
    """Returns one of the demo's families.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in FAMILIES:
        raise ConfigError(f"--family: the demo has {' and '.join(FAMILIES)}, got {name!a}")
    return FAMILIES[name]


def build_base(
    out: Path,
    *,
    seed: int = 0,
    recipe: BaseRecipe | None = None,
    progress: bool = True,
    family: str = PLAIN,
) -> Path:
    """Trains the base, or finds the one that the same recipe made before.

    Args:
        out: The pipeline's folder; appears when complete, never half-written.
        seed: Seed of the base's weights and training.
        recipe: Lengths and rates; the default takes about three minutes on two cores.
        progress: Show a progress bar.
        family: One of `FAMILIES`.

    Returns:
        `out`.

    Raises:
        ForeignPathError: `out` holds something else.
        ConfigError: The demo has no such family.
    """
    recipe = recipe or demo_family(family).recipe
    about: dict[str, Any] = {"layout": LAYOUT, "seed": seed, "recipe": asdict(recipe)}
    if family != PLAIN:
        about["family"] = family
    about["fingerprint"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    marker = out / ABOUT
    if marker.is_file() and json.loads(marker.read_text()) == about:
        return out
    check_replaceable(out, DEMO_BASE)
    make = _train if family == PLAIN else flow_base.train_pipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = make(recipe, progress)
    with owned_folder(out, DEMO_BASE) as folder:
        pipeline.save_pretrained(folder)
        (folder / ABOUT).write_text(json.dumps(about))
    return out


def _train(recipe: BaseRecipe, progress: bool) -> StableDiffusionXLPipeline:
    tokenizer = build_tokenizer(captions())
    first, second = build_text_encoders(tokenizer)
    vae, unet = build_vae(), build_unet()
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        data = captioned_scans(vae, encode(tokenizer, first, second, captions()), recipe, bar)
        task = bar.add_task("denoiser", total=recipe.unet_steps)
        train_unet(unet, DDPMScheduler(**SCHEDULE), data, recipe, lambda: bar.advance(task))
    sampler = DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=sampler,  # pyright: ignore[reportArgumentType]
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def build_vae(size: int = SIZE) -> AutoencoderKL:
    """Returns the autoencoder: 3xSxS to 4x(S/4)x(S/4), a quarter of a million weights."""
    shape: dict[str, Any] = {  # diffusers annotates these as tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 32),
    }
    return AutoencoderKL(
        **shape,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
        force_upcast=False,  # pyright: ignore[reportArgumentType]
    )


def build_unet() -> UNet2DConditionModel:
    """Returns the denoiser: SDXL's conditioning, cross attention at 4x4, a million weights."""
    time_width = 8
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=WIDTH + 6 * time_width,
    )
