"""Stable Diffusion 3 and 3.5, medium and large: a transformer on patches beside tokens of text.

Conditions: `prompt_embeds` `(B, 77 + L, D)`, the states of two CLIP encoders side by side, padded
with zeros to T5's width, before those of T5; `pooled` `(B, P)`, both projections side by side. The
transformer reads no mask. It is told `1000 sigma` and answers `noise - x`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from fastpo.config.sections import PrepareConfig
from fastpo.errors import ConfigError
from fastpo.models.encoders import Encoders, count_longer, load_clip_tokenizer, load_encoder
from fastpo.models.flow import JOINT_ATTENTION, FlowFamily
from fastpo.models.folder import ModelFolder
from fastpo.models.geometry import Geometry
from fastpo.models.t5 import load_t5, load_t5_tokenizer, t5_states
from fastpo.models.turns import States, TurnEncoders, Turns
from fastpo.precision import DTYPES
from fastpo.types import NoisedPair

TEXT_LENGTH = 256
"""Tokens of T5 that the pipeline takes."""


@dataclass(frozen=True)
class SD3Encoders(TurnEncoders):
    """Two CLIP encoders and T5.

    Attributes:
        length: Tokens of T5.
    """

    length: int = TEXT_LENGTH

    def states_by(self, number: int, encoder: Any, prompts: Sequence[str]) -> States:
        """As the pipeline's `encode_prompt` encodes the positive prompt."""
        tokenizer = self.tokenizers[number]
        if number == 2:
            return {"states": t5_states(tokenizer, encoder, prompts, self.length)}
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizers[0].model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = encoder(tokens["input_ids"].to(self.device), output_hidden_states=True)
        return {"states": output.hidden_states[-2], "pooled": output[0]}

    def join(self, states: Sequence[States]) -> States:
        """CLIP's states side by side, padded to T5's width, before T5's."""
        *clips, t5 = (given["states"] for given in states)
        clip = torch.cat(clips, dim=-1)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "prompt_embeds": torch.cat([clip, t5], dim=-2),
            "pooled": torch.cat([given["pooled"] for given in states[:2]], dim=-1),
        }

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`, by T5, which reads most of a prompt."""
        return count_longer(self.tokenizers[2], prompts, self.length)


class SD3(FlowFamily):
    """Stable Diffusion 3, 3.5 medium and 3.5 large."""

    name = "sd3"
    encoder_parts = (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    lora_targets = JOINT_ATTENTION
    denoiser_class = SD3Transformer2DModel
    pipeline_class = StableDiffusion3Pipeline
    pipeline_prefix = "StableDiffusion3"
    sdpa_alone = True

    def check(self, folder: ModelFolder) -> None:
        """As `FlowFamily.check`; the text encoders must be the transformer's."""
        super().check(folder)
        clips = [(name, "projection_dim") for name in self.encoder_parts[:2]]
        self.check_width(folder, clips, "pooled_projection_dim")
        self.check_width(folder, [("text_encoder_3", "d_model")], "joint_attention_dim")

    def load_encoders(
        self, folder: ModelFolder, config: PrepareConfig, device: torch.device
    ) -> Encoders:
        """Loads the VAE and the tokenizers; the text encoders when prompts are encoded."""
        from transformers import CLIPTextModelWithProjection

        self.refuse_clip_options(config)
        dtype = DTYPES[config.text_precision]
        *clips, t5 = (name for name in self.encoder_parts if name.startswith("text_encoder"))
        tokenizers = (
            *(load_clip_tokenizer(folder, name) for name in clips),
            load_t5_tokenizer(folder, t5),
        )
        kind = CLIPTextModelWithProjection
        loads = [
            *(partial(load_encoder, folder, name, kind, dtype) for name in clips),
            partial(load_t5, folder, t5, dtype),
        ]
        vae = self.load_vae(folder, config, device)
        length = config.text_length or TEXT_LENGTH
        return SD3Encoders(vae, tokenizers, (), device, turns=Turns(loads, device), length=length)

    def geometry(self, folder: ModelFolder, resolution: int, *, buckets: bool) -> Geometry:
        """As `ModelFamily.geometry`; the table of positions bounds the sides."""
        found = super().geometry(folder, resolution, buckets=buckets)
        most = self.denoiser_config(folder).get("pos_embed_max_size", 96)
        side = most * self.vae_factor(folder) * self.denoiser_factor(folder)
        longest = max(max(bucket) for bucket in found.buckets)
        if longest > side:
            raise ConfigError(
                f"prepare.resolution: images would have sides of up to {longest} px, but this "
                f"transformer has places for {side} px; use a lower resolution"
                + (" or prepare.buckets=false" if resolution <= side else "")
            )
        return found

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], config: PrepareConfig
    ) -> dict[str, Any]:
        """As `ModelFamily.prompt_arguments`, with the length of T5's text."""
        length = config.text_length or TEXT_LENGTH
        return {"prompt": list(prompts), "max_sequence_length": length}

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`."""
        dtype = noised.noisy_latents.dtype
        return denoiser(
            hidden_states=noised.noisy_latents,
            timestep=noised.timesteps.repeat(2),
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype).repeat(2, 1, 1),
            pooled_projections=conditions["pooled"].to(dtype).repeat(2, 1),
            return_dict=False,
        )[0]
