"""Z-Image: one stream of image and text tokens, texts of any length read by Qwen3.

The transformer is told `1 - sigma` and answers `image - noise`: time and sign run backward to what
the scheduler is told. Conditions: `prompt_embeds` `(B, 512, D)`, the last but one layer's states of
the whole chat, and `prompt_mask` `(B, 512)` bool, its tokens; padding is taken off before the
transformer, which pads to multiples of 32 with tokens of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from fastpo.models.encoders import Encoders
from fastpo.models.flow_family import FlowFamily
from fastpo.models.folder import ModelFolder, read_json
from fastpo.models.language import chats, count_longer, padded
from fastpo.models.schedule import NoiseSchedule, vae_normalization
from fastpo.types import NoisedPair

TEXT_LENGTH = 512
"""Tokens of a prompt with its chat; the pipeline's default."""


class ZImageEncoders(Encoders):
    """The VAE of FLUX.1's kind and Qwen3."""

    def prompt_conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As the pipeline's `encode_prompt`, padded."""
        (tokenizer,), (encoder,) = self.tokenizers, self.text_encoders
        pipeline = ZImagePipeline(None, None, encoder, tokenizer, None)  # pyright: ignore[reportArgumentType]
        states, _ = pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_LENGTH,
        )
        embeds, mask = padded(states, TEXT_LENGTH)
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`."""
        (tokenizer,) = self.tokenizers
        return count_longer(tokenizer, chats(tokenizer, prompts, thinking=True), TEXT_LENGTH)


class ZImage(FlowFamily):
    """Z-Image, 6B; not Turbo, which is distilled to few steps, nor Omni, which reads images."""

    name = "z-image"
    denoiser_class = ZImageTransformer2DModel
    pipeline_class = ZImagePipeline
    vae_class = AutoencoderKL
    encoders_class = ZImageEncoders
    text_class = Qwen3ForCausalLM
    relatives: ClassVar[Mapping[str, str]] = {
        "ZImageOmniPipeline": "it is conditioned on images beside the text",
        "ZImageImg2ImgPipeline": "it starts from an image",
        "ZImageInpaintPipeline": "it fills in masked images",
        "ZImageControlNetPipeline": "it has a ControlNet",
        "ZImageControlNetInpaintPipeline": "it has a ControlNet",
    }

    def check_widths(self, folder: ModelFolder) -> None:
        """As `FlowFamily.check_widths`."""
        text = read_json(folder.component("text_encoder") / "config.json")
        reads = read_json(folder.component("transformer") / "config.json")
        self.require_width(folder, text.get("hidden_size"), reads.get("cap_feat_dim"))

    def schedule(self, folder: ModelFolder, resolution: int) -> NoiseSchedule:
        """As `FlowFamily.schedule`; the transformer is told `1 - sigma`."""
        schedule = super().schedule(folder, resolution)
        scale, shift = vae_normalization(folder)
        return replace(
            schedule,
            timesteps=1.0 - schedule.sigma,
            latent_scale=scale,
            latent_shift=shift,
        )

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`; images and texts go in as lists."""
        latents = noised.noisy_latents
        embeds = conditions["prompt_embeds"].to(latents.dtype)
        texts = [states[own] for states, own in zip(embeds, conditions["prompt_mask"], strict=True)]
        answers = denoiser(
            list(latents.unsqueeze(2).unbind()),
            noised.timesteps.repeat(2),
            texts * 2,
            return_dict=False,
        )[0]
        return -torch.stack(answers).squeeze(2)
