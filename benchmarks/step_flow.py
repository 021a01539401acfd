"""Flow-matching transformers for `bench_step.py`: SD3.5 medium and FLUX.1-dev, scaled down.

`sd3` and `flux` are the published architectures at 1024 pixels. `mid` has an eighth (SD3.5) or a
sixteenth (FLUX.1) of the width of transformer and VAE, all layers, and a quarter of the side and so
a sixteenth of the tokens, so that transformer and VAE keep their proportion and a CPU takes seconds
a step; `tiny` has a quarter of the transformer's layers and half of the VAE's, which weighs more
beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

if TYPE_CHECKING:
    from step_models import Size

CHANNELS = 16
SHIFT = 3.0
LATENT_SCALE = 1.5305
WIDTHS = {"sd3": 1536, "flux": 3072}
TEXT_WIDTH = 4096
POOLED = {"sd3": 2048, "flux": 768}
TEXT_TOKENS = {"sd3": 333, "flux": 512}  # at 1024 pixels
FEWEST_TOKENS = 8


def build_transformer(size: Size) -> nn.Module:
    """The transformer with random weights, float32."""
    return _sd3(size) if size.family == "sd3" else _flux(size)


def _sd3(size: Size) -> SD3Transformer2DModel:
    width = WIDTHS["sd3"] // size.width
    dual: Any = tuple(range(size.layers(13)))  # diffusers annotates a tuple of none
    return SD3Transformer2DModel(
        sample_size=size.latent,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=size.layers(24),
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=TEXT_WIDTH // size.width,
        caption_projection_dim=width,
        pooled_projection_dim=POOLED["sd3"] // size.width,
        pos_embed_max_size=size.latent,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )


def _flux(size: Size) -> FluxTransformer2DModel:
    width = WIDTHS["flux"] // size.width
    head = min(128, width // 3)
    axes: Any = (head // 8, 7 * head // 16, 7 * head // 16)
    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=size.layers(19),
        num_single_layers=size.layers(38),
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=TEXT_WIDTH // size.width,
        pooled_projection_dim=POOLED["flux"] // size.width,
        guidance_embeds=True,
        axes_dims_rope=axes,
    )


def build_flow_vae(size: Size) -> AutoencoderKL:
    """The VAE of 16 channels that both families have; its encoder is all that training uses."""
    shape: dict[str, Any] = {  # diffusers annotates tuples of one
        "block_out_channels": tuple(c // size.width for c in (128, 256, 512, 512)),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(
        **shape,
        layers_per_block=size.layers(2),
        latent_channels=CHANNELS,
        sample_size=8 * size.latent,
        norm_num_groups=min(32, 128 // size.width),
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=LATENT_SCALE,
        shift_factor=0.0,
    )


def text_conditions(size: Size, pairs: int, make: torch.Generator) -> dict[str, Tensor]:
    """Random prompts as the cache gives them, as many tokens for an image's as at full size."""
    tokens = max(FEWEST_TOKENS, TEXT_TOKENS[size.family] * size.latent**2 // 128**2)
    width, pooled = TEXT_WIDTH // size.width, POOLED[size.family] // size.width
    return {
        "prompt_embeds": torch.randn(pairs, tokens, width, generator=make).half(),
        "pooled": torch.randn(pairs, pooled, generator=make).half(),
    }


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's schedule; FLUX.1's at 1024 pixels is shifted by about as much."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def predict_arm(
    model: nn.Module, family: str, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """A transformer's answer on one side of the pairs, `(B, C, h, w)`, as trainers call it."""
    dtype = noisy.dtype
    text, pooled = (conditions[name].to(dtype) for name in ("prompt_embeds", "pooled"))
    told: dict[str, Any] = {
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "return_dict": False,
    }
    if family == "sd3":
        return model(hidden_states=noisy, timestep=1000.0 * sigma, **told)[0]
    rows, channels, height, width = noisy.shape
    device = noisy.device
    sides = height // 2, width // 2
    answer = model(
        hidden_states=FluxPipeline._pack_latents(noisy, rows, channels, height, width),
        timestep=sigma,
        guidance=torch.ones(rows, device=device),
        txt_ids=torch.zeros(text.shape[1], 3, device=device),
        img_ids=FluxPipeline._prepare_latent_image_ids(rows, *sides, device, torch.float32),
        **told,
    )[0]
    return FluxPipeline._unpack_latents(answer, height, width, 1)
