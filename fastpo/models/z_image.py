"""Z-Image: one stream of image and text tokens, texts of any length read by Qwen3.

The transformer is told `1 - sigma` and answers `image - noise`: time and sign run backward to what
the scheduler is told. Conditions: `prompt_embeds` `(B, 512, D)`, the last but one layer's states of
the whole chat, and `prompt_mask` `(B, 512)` bool, its tokens; padding is taken off before the
transformer, which pads to multiples of 32 with tokens of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from fastpo.models.encoders import count_longer
from fastpo.models.language import (
    LanguageEncoders,
    LanguageFamily,
    chats,
    lengths,
    padded,
)
from fastpo.types import NoisedPair


class ZImageEncoders(LanguageEncoders):
    """The VAE of FLUX.1's kind and Qwen3."""

    def prompt_conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As the pipeline's `encode_prompt`, padded."""
        states, _ = self.pipeline_of(ZImagePipeline).encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
        )
        embeds, mask = padded(states, self.length)
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`."""
        return count_longer(
            self.tokenizer, chats(self.tokenizer, prompts, thinking=True), self.length
        )


class ZImage(LanguageFamily):
    """Z-Image, 6B; not Turbo, which is distilled to few steps, nor Omni, which reads images."""

    name = "z-image"
    denoiser_class = ZImageTransformer2DModel
    pipeline_class = ZImagePipeline
    pipeline_prefix = "ZImage"
    sdpa_alone = True  # texts of unequal length need a mask, which flash kernels do not take
    encoders_class = ZImageEncoders
    text_class = Qwen3ForCausalLM
    text_width = "cap_feat_dim"

    def in_chats(self, tokenizer: Any, prompts: Sequence[str]) -> Sequence[str]:
        """As `LanguageFamily.in_chats`, with thinking."""
        return chats(tokenizer, prompts, thinking=True)

    def told(self, sigma: Tensor) -> Tensor:
        """`1 - sigma`, 0 at noise, rounded as in the pipeline: its waves turn a thousand times."""
        return (1000.0 - 1000.0 * sigma) / 1000.0

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`; images and texts go in as lists."""
        latents = noised.noisy_latents
        embeds = conditions["prompt_embeds"].to(latents.dtype)
        own = lengths(conditions["prompt_mask"])
        texts = [states[:length] for states, length in zip(embeds, own, strict=True)]
        answers = denoiser(
            list(latents.unsqueeze(2).unbind()),
            noised.timesteps.repeat(2),
            texts * 2,
            return_dict=False,
        )[0]
        return -torch.stack(answers).squeeze(2)
