"""The demo's base of flow matching: a tiny SD3, trained once on the scans and kept.

The folder is a stock `StableDiffusion3Pipeline`: an AutoencoderKL of 16 channels that halves three
times, a transformer on its 16 pixels, two frozen CLIP text encoders, a frozen T5, and the Euler
sampler of flow matching without a shift.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from fastpo.demo.base_training import (
    BaseRecipe,
    Captioned,
    captioned_scans,
    captions,
    draw,
    fit_averaged,
)
from fastpo.demo.digits import SIZE
from fastpo.demo.text import (
    WIDTH,
    build_t5,
    build_text_encoders,
    build_tokenizer,
    build_word_tokenizer,
)

CHANNELS, SIDE = 16, SIZE // 8
CLIP_LENGTH, TEXT_LENGTH = 10, 9  # tokens of CLIP and of T5 that the longest caption has
RECIPE = BaseRecipe(vae_steps=400, unet_steps=1000, unet_batch=48)
OPTIONS: dict[str, Any] = {"prepare": {"text_length": TEXT_LENGTH}}
"""Keys of a run in which it differs from the demo of SDXL."""


def train_pipeline(recipe: BaseRecipe, progress: bool) -> StableDiffusion3Pipeline:
    """Trains autoencoder and transformer on the scans; about three minutes on two cores."""
    pipeline = _untrained(captions())
    transformer = pipeline.transformer
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        data = captioned_scans(pipeline.vae, _encode(pipeline, captions()), recipe, bar)
        empty = _encode(pipeline, [""])
        task = bar.add_task("denoiser", total=recipe.unet_steps)
        fit_averaged(
            transformer,
            lambda: _flow_loss(transformer, data, empty, recipe),
            recipe,
            lambda: bar.advance(task),
        )
    return pipeline


def _untrained(texts: list[str]) -> StableDiffusion3Pipeline:
    """The pipeline as drawn from torch's generator."""
    tokenizer, words = build_tokenizer(texts, CLIP_LENGTH), build_word_tokenizer(texts)
    first, second = build_text_encoders(tokenizer, [CLIPTextModelWithProjection] * 2)
    t5 = build_t5(words)
    return StableDiffusion3Pipeline(
        vae=build_vae(),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=words,  # pyright: ignore[reportArgumentType]
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def build_vae() -> AutoencoderKL:
    """Returns the autoencoder: 3x32x32 to 16x4x4."""
    shape: dict[str, Any] = {  # diffusers annotates these as tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 32, 64),
    }
    return AutoencoderKL(
        **shape,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,  # pyright: ignore[reportArgumentType]
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )


def build_transformer() -> SD3Transformer2DModel:
    """Returns the denoiser: four joint blocks on a token for each latent pixel."""
    width, heads = 96, 4
    return SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )


@torch.no_grad()
def _encode(pipeline: StableDiffusion3Pipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Returns `(N, L, D)` states and `(N, P)` pooled states, as the pipeline samples with."""
    encode: Any = pipeline.encode_prompt  # which annotates other prompts as required
    states, _, pooled, _ = encode(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
    )
    return states, pooled


def _flow_loss(
    transformer: SD3Transformer2DModel,
    data: Captioned,
    empty: tuple[Tensor, Tensor],
    recipe: BaseRecipe,
) -> Tensor:
    """Mean squared error of `noise - x` at logit-normal noise, captions dropped at random."""
    clean, words, keep = draw(data, recipe)
    kept = keep > 0
    noise, sigma = torch.randn_like(clean), torch.sigmoid(torch.randn(len(clean)))
    answer = transformer(
        hidden_states=torch.lerp(clean, noise, sigma[:, None, None, None]),
        timestep=1000.0 * sigma,
        encoder_hidden_states=torch.where(kept[:, None, None], data.states[words], empty[0]),
        pooled_projections=torch.where(kept[:, None], data.pooled[words], empty[1]),
        return_dict=False,
    )[0]
    return F.mse_loss(answer, noise - clean)
