"""Small stand-ins for real checkpoints, built offline in about a second.

The pipelines have the real ones' folder layout, classes and configuration keys with random weights,
a few hundred thousand of them. Their UNets halve the latent once, so latent sides must be even;
their tokenizers know single bytes only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROMPT_LENGTH = 77
"""Tokens per prompt, as in the real encoders."""


def tiny_sdxl_folder(
    path: Path, *, seed: int = 0, vae_factor: int = 4, prediction_type: str = "epsilon"
) -> Path:
    """Writes a pipeline of SDXL's kind: two text encoders, pooled text and size conditioning.

    Args:
        path: Folder to create; an existing one is overwritten file by file.
        seed: Seed of the random weights; the caller's random state is left alone.
        vae_factor: 2 or 4, image pixels per latent pixel and side.
        prediction_type: `epsilon` or `v_prediction`, written into the scheduler's configuration.

    Returns:
        `path`.
    """
    import torch
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        scheduler: Any = EulerDiscreteScheduler(
            **_schedule(prediction_type), timestep_spacing="leading", steps_offset=1
        )
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(vae_factor, scaling_factor=0.13025),
            text_encoder=CLIPTextModel(clip_config(tokenizer, hidden_size=16)),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, hidden_size=24)),
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(pad_token="!"),
            unet=_unet(
                cross_attention_dim=40,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 20,
                use_linear_projection=True,
            ),
            scheduler=scheduler,
        )
    return save_pipeline(pipeline, path)


def tiny_sd15_folder(
    path: Path, *, seed: int = 0, vae_factor: int = 4, prediction_type: str = "epsilon"
) -> Path:
    """Writes a pipeline of SD1.5's kind: one text encoder, no added conditioning.

    Args and return value as in `tiny_sdxl_folder`.
    """
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler
    from transformers import CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        scheduler: Any = PNDMScheduler(
            **_schedule(prediction_type), skip_prk_steps=True, steps_offset=1
        )
        pipeline = StableDiffusionPipeline(
            vae=_vae(vae_factor, scaling_factor=0.18215),
            text_encoder=CLIPTextModel(clip_config(tokenizer, hidden_size=16)),
            tokenizer=tokenizer,
            unet=_unet(cross_attention_dim=16),
            scheduler=scheduler,
            safety_checker=None,  # pyright: ignore[reportArgumentType]
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
    return save_pipeline(pipeline, path)


def save_pipeline(pipeline: Any, path: Path) -> Path:
    """Saves a pipeline without progress bars and returns `path`."""
    from transformers.utils import logging

    verbose = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipeline.save_pretrained(path)
    finally:
        if verbose:
            logging.enable_progress_bar()
    return path


def _schedule(prediction_type: str) -> dict[str, Any]:
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }


def _vae(factor: int, *, scaling_factor: float) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    channels: Any = {2: (8, 16), 4: (8, 8, 16)}[factor]
    down: Any = ("DownEncoderBlock2D",) * len(channels)
    up: Any = ("UpDecoderBlock2D",) * len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


def _unet(**kind: Any) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        **kind,
    )


def clip_config(tokenizer: Any, *, hidden_size: int) -> Any:
    """The configuration of a tiny CLIP text encoder, with a projection to 20 numbers."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH,
        projection_dim=20,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer without merges: each byte is a token, once inside and once ending a word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{a}</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        pad_token=pad_token,
        model_max_length=PROMPT_LENGTH,
    )
