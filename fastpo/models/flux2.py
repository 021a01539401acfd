"""FLUX.2: klein, whose prompts Qwen3 reads, and dev, whose prompts Mistral reads.

Latents `(4 C, h/2, w/2)` are the VAE's in patches of 2 by 2, normalized by the running statistics
of the VAE's batch normalization. The transformer is told `sigma` and answers `noise - image`.
Conditions: `prompt_embeds` `(B, 512, D)`, three layers' states side by side; padding is part of
them, without a mask, as in the pipelines. `dev` is also told a guidance scale. Of edits there are
`source_latents` `(B, 4 C, h', w')`, whose tokens follow those of the noisy image, at time 10 of
their ids, and those of further sources at times 20, 30 and so on; the texts do not see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import (
    Flux2Pipeline,
    compute_empirical_mu,
    format_input,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from torch import Tensor, nn
from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from fastpo.errors import ModelError
from fastpo.models.edits import EditEncoders, of_both_sides
from fastpo.models.encoders import count_longer, vae_factor
from fastpo.models.folder import ModelFolder, read_json
from fastpo.models.language import LanguageEncoders, LanguageFamily, chats
from fastpo.system.pictures import UnusableImageError
from fastpo.types import NoisedPair

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLING_STEPS = 50
"""The pipelines' default, on which the shift of their noise depends."""
_PATCH = 2
MOST_SOURCE = 1024 * 1024
"""Pixels of a source image in the pipelines."""
MOST_SOURCES = 10
"""Images that the model's publisher offers to edit together; the pipelines take any number."""


class Flux2Encoders(LanguageEncoders, EditEncoders):
    """The VAE of FLUX.2 and a language model."""

    pipeline_class: ClassVar[Any]

    def check_source(self, image: Image) -> None:
        """As `EditEncoders.check_source`: sides of 64 px and more, at most 1 to 8."""
        try:
            Flux2ImageProcessor.check_image_input(image)
        except ValueError as error:
            raise UnusableImageError(str(error)) from None

    def source_pixels(self, image: Image) -> Tensor:
        """As `EditEncoders.source_pixels`: at its own size up to a megapixel, cut to patches."""
        processor, multiple = Flux2ImageProcessor(vae_scale_factor=self.vae_factor), self.vae_factor
        if image.width * image.height > MOST_SOURCE:
            image = processor._resize_to_target_area(image, MOST_SOURCE)
        width, height = (side // multiple * multiple for side in image.size)
        return processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]

    @property
    def vae_factor(self) -> int:
        """Image pixels for each patch and side."""
        return _PATCH * vae_factor(self.vae.config)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Encoders.encode_images`, of normalized patches."""
        moments = super().encode_images(pixels)
        mean, logvar = (self.pipeline_class._patchify_latents(moment) for moment in moments)
        statistics = self.vae.bn
        center = statistics.running_mean.float().view(1, -1, 1, 1)
        variance = statistics.running_var.float() + self.vae.config.batch_norm_eps
        variance = variance.view(1, -1, 1, 1)
        return (mean - center) / variance.sqrt(), logvar - variance.log()

    def prompt_conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As the pipeline's `encode_prompt`."""
        embeds, _ = self.pipeline_of(self.pipeline_class).encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.length
        )
        return {"prompt_embeds": embeds}


class KleinEncoders(Flux2Encoders):
    """Klein's: layers 9, 18 and 27 of Qwen3."""

    pipeline_class = Flux2KleinPipeline

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`."""
        return count_longer(
            self.tokenizer, chats(self.tokenizer, prompts, thinking=False), self.length
        )


class DevEncoders(Flux2Encoders):
    """Dev's: layers 10, 20 and 30 of Mistral, told by its system message to see structure."""

    pipeline_class = Flux2Pipeline

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`."""
        texts = self.tokenizer.apply_chat_template(format_input(list(prompts)), tokenize=False)
        return count_longer(self.tokenizer, texts, self.length)


class Flux2Klein(LanguageFamily):
    """FLUX.2-klein-base, 4B and 9B; pairs may be edits of a source image."""

    name = "flux2-klein"
    edits = "may"
    most_sources = MOST_SOURCES
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj")
    denoiser_class = Flux2Transformer2DModel
    pipeline_class = Flux2KleinPipeline
    pipeline_prefix = "Flux2Klein"
    shifts_by_tokens = True
    vae_class = AutoencoderKLFlux2
    latent_channels = 32
    encoders_class = KleinEncoders
    text_class = Qwen3ForCausalLM
    text_states = 3
    text_layer = 27

    def refuse_few_steps(self, folder: ModelFolder) -> None:
        """Also by `is_distilled` of `model_index.json`."""
        super().refuse_few_steps(folder)
        if read_json(folder.path / "model_index.json").get("is_distilled"):
            raise ModelError(
                f"{folder.path / 'model_index.json'}: is_distilled is set: this model is distilled "
                "to a few steps, which flow matching's training would undo; train the base model "
                "(FLUX.2-klein-base-4B or -9B) and use the adapters with both"
            )

    def in_chats(self, tokenizer: Any, prompts: Sequence[str]) -> Sequence[str]:
        """As `LanguageFamily.in_chats`, without thinking."""
        return chats(tokenizer, prompts, thinking=False)

    def vae_factor(self, folder: ModelFolder) -> int:
        """Image pixels for each patch and side."""
        return _PATCH * super().vae_factor(folder)

    def mu(self, tokens: int) -> float:
        """For 50 steps, the pipelines' default."""
        return compute_empirical_mu(tokens, SAMPLING_STEPS)

    def told(self, sigma: Tensor) -> Tensor:
        """`sigma`."""
        return sigma

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`."""
        latents = noised.noisy_latents
        sigma = noised.timesteps.repeat(2)
        embeds = conditions["prompt_embeds"].to(latents.dtype).repeat(2, 1, 1)
        # One image's ids serve all: they have one size.
        image_ids = Flux2Pipeline._prepare_latent_ids(latents[:1])
        tokens = Flux2Pipeline._pack_latents(latents)
        own, sources = tokens.shape[1], of_both_sides(conditions, latents)
        if sources:
            more = Flux2Pipeline._prepare_image_ids([source[:1] for source in sources])
            image_ids = torch.cat([image_ids, more], dim=1)
            tokens = torch.cat([tokens, *map(Flux2Pipeline._pack_latents, sources)], dim=1)
        text_ids = Flux2Pipeline._prepare_text_ids(embeds[:1]).to(latents.device)
        answer = denoiser(
            hidden_states=tokens,
            timestep=sigma,
            guidance=None if self.guidance is None else torch.full_like(sigma, noised.guidance),
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids.to(latents.device),
            return_dict=False,
        )[0][:, :own]
        return answer.transpose(1, 2).unflatten(2, latents.shape[2:])


class Flux2Dev(Flux2Klein):
    """FLUX.2-dev, 32B: distilled from guided predictions, it is told a guidance scale."""

    name = "flux2-dev"
    pipeline_class = Flux2Pipeline
    encoders_class = DevEncoders
    text_class = Mistral3ForConditionalGeneration
    pipeline_prefix = "Flux2(?!Klein)"
    text_layer = 30
    guidance = 1.0

    def in_chats(self, tokenizer: Any, prompts: Sequence[str]) -> Sequence[str]:
        """As `LanguageFamily.in_chats`, behind a system message."""
        return tokenizer.apply_chat_template(format_input(list(prompts)), tokenize=False)
