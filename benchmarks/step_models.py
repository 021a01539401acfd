"""What `bench_step.py` measures on: random weights in the published shapes, or a quarter of them.

`sdxl` and `sd15` are the published architectures at their own resolution. `mid` is SDXL's at a
quarter of the width of every part and a quarter of the side (256 pixels), so that UNet, VAE and
text encoders keep their proportions to one another, and a CPU takes seconds a step. `tiny` has
fewer layers too, and only shows that the benchmark runs. Transformers are in `step_flow.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from step_flow import CHANNELS, build_flow_vae, build_transformer, text_conditions
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fastpo.bench.measure import device
from fastpo.types import PairBatch

TOKENS = 77
Built = TypeVar("Built")


@dataclass(frozen=True)
class Size:
    """One architecture, scaled by `width` and `depth`.

    Attributes:
        family: `sdxl` or `sd15`, or `sd3` or `flux`, trained with flow matching.
        latent: Side of the latents.
        width: Divisor of all channel counts.
        depth: Divisor of all numbers of layers, of which one is left at least.
    """

    family: str
    latent: int
    width: int = 1
    depth: int = 1

    def layers(self, count: int) -> int:
        """What is left of so many layers."""
        return max(1, count // self.depth)

    @property
    def flow(self) -> bool:
        """Whether it is a transformer trained with flow matching."""
        return self.family in ("sd3", "flux")

    @property
    def channels(self) -> int:
        """Of the latents."""
        return CHANNELS if self.flow else 4

    @property
    def text_dims(self) -> tuple[int, ...]:
        """Hidden size of each text encoder."""
        return tuple(d // self.width for d in ((768, 1280) if self.family == "sdxl" else (768,)))


SIZES = {
    "tiny": Size("sdxl", latent=8, width=16, depth=16),
    "mid": Size("sdxl", latent=32, width=4),
    "sdxl": Size("sdxl", latent=128),
    "sd15": Size("sd15", latent=64),
    "sd3-tiny": Size("sd3", latent=32, width=8, depth=4),
    "sd3-mid": Size("sd3", latent=32, width=8),
    "sd3": Size("sd3", latent=128),
    "flux-tiny": Size("flux", latent=32, width=16, depth=4),
    "flux-mid": Size("flux", latent=32, width=16),
    "flux": Size("flux", latent=128),
}


def on_device(build: Callable[[Size], Built]) -> Callable[[Size], Built]:
    """Makes a model's random weights where it will run: on a CPU SDXL's take a minute."""

    @functools.wraps(build)
    def built(size: Size) -> Built:
        with torch.device(device()):
            return build(size)

    return built


@on_device
def build_denoiser(size: Size) -> Any:
    """The UNet or transformer with random weights, float32."""
    return build_transformer(size) if size.flow else _build_unet(size)


def _build_unet(size: Size) -> UNet2DConditionModel:
    w = size.width
    common: dict[str, Any] = {
        "sample_size": size.latent,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": size.layers(2),
        "norm_num_groups": {1: 32, 4: 16, 16: 4}[w],
        "cross_attention_dim": sum(size.text_dims),
    }
    if size.family == "sd15":
        return UNet2DConditionModel(
            **common, block_out_channels=tuple(c // w for c in (320, 640, 1280, 1280))
        )
    return UNet2DConditionModel(
        **common,
        block_out_channels=tuple(c // w for c in (320, 640, 1280)),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=tuple(map(size.layers, (1, 2, 10))),
        attention_head_dim=(5, 10, 20) if w == 1 else (5, 5, 5),  # numbers of heads
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256 // w,
        projection_class_embeddings_input_dim=1280 // w + 6 * (256 // w),
    )


@on_device
def build_vae(size: Size) -> AutoencoderKL:
    """The VAE; its encoder is all that training uses."""
    if size.flow:
        return build_flow_vae(size)
    shape: dict[str, Any] = {  # diffusers annotates tuples of one
        "block_out_channels": tuple(c // size.width for c in (128, 256, 512, 512)),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(
        **shape,
        layers_per_block=size.layers(2),
        latent_channels=4,
        sample_size=8 * size.latent,
        norm_num_groups=min(32, 128 // size.width),
    )


@on_device
def build_text_encoders(size: Size) -> list[nn.Module]:
    """CLIP ViT-L's text tower and, for SDXL, OpenCLIP ViT-bigG's; none where text is cached."""
    if size.flow:
        return []
    w = size.width

    def config(hidden: int, layers: int, heads: int, **more: Any) -> CLIPTextConfig:
        return CLIPTextConfig(
            hidden_size=hidden // w,
            intermediate_size=4 * hidden // w,
            num_hidden_layers=size.layers(layers),
            num_attention_heads=max(1, heads // w),
            max_position_embeddings=TOKENS,
            projection_dim=hidden // w,
            **more,
        )

    encoders: list[nn.Module] = [CLIPTextModel(config(768, 12, 12))]
    if size.family == "sdxl":
        encoders.append(CLIPTextModelWithProjection(config(1280, 32, 20, hidden_act="gelu")))
    return encoders


@dataclass(frozen=True)
class Inputs:
    """One batch, in the raw form that recipes take and in the cached form that FastPO takes.

    Attributes:
        pixels: `(2B, 3, H, W)` in [-1, 1], winners first.
        tokens: `(B, 77)` int64; nothing of transformers reads them.
        batch: The same pairs as the cache gives them.
    """

    pixels: Tensor
    tokens: Tensor
    batch: PairBatch


def make_inputs(size: Size, pairs: int, device: torch.device) -> Inputs:
    """Random pairs; every value is the same in every run."""
    make = torch.Generator().manual_seed(0)
    side, rows = size.latent, 2 * pairs
    pixels = torch.rand(rows, 3, 8 * side, 8 * side, generator=make) * 2 - 1
    if size.flow:
        conditions = text_conditions(size, pairs, make)
    else:
        conditions = _clip_conditions(size, pairs, make)
    shape = rows, size.channels, side, side
    batch = PairBatch(
        index=torch.arange(pairs),
        pair_key=torch.randint(2**62, (pairs,), generator=make),
        visit=torch.zeros(pairs, dtype=torch.int64),
        flipped=torch.zeros(pairs, dtype=torch.bool),
        latent_mean=torch.randn(shape, generator=make).half(),
        latent_logvar=torch.full(shape, -10.0).half(),
        conditions=conditions,
    )
    tokens = torch.randint(1000, (pairs, TOKENS), generator=make)
    return Inputs(pixels.to(device), tokens.to(device), batch)


def _clip_conditions(size: Size, pairs: int, make: torch.Generator) -> dict[str, Tensor]:
    """Random prompts of SDXL and SD1.5."""
    conditions = {
        "prompt_embeds": torch.randn(pairs, TOKENS, sum(size.text_dims), generator=make).half()
    }
    if size.family == "sdxl":
        side = 8.0 * size.latent
        times = [side, side, 0.0, 0.0, side, side]
        conditions["pooled"] = torch.randn(pairs, size.text_dims[-1], generator=make).half()
        conditions["add_time_ids"] = torch.tensor([times] * pairs)
    return conditions


def endless(batch: PairBatch) -> Iterator[PairBatch]:
    """The batch again and again, as a data set that is visited ever more often."""
    from dataclasses import replace

    visit = 0
    while True:
        yield replace(batch, visit=torch.full_like(batch.visit, visit))
        visit += 1


def encode_text(encoders: Sequence[nn.Module], tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Text states as the UNet takes them, and SDXL's pooled state."""
    if len(encoders) == 1:
        return encoders[0](tokens).last_hidden_state, None
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[-1].text_embeds
