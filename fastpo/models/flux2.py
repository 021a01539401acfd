"""FLUX.2: klein, whose prompts Qwen3 reads, and dev, whose prompts Mistral reads.

Latents `(4 C, h/2, w/2)` are the VAE's in patches of 2 by 2, normalized by the running statistics
of the VAE's batch normalization. The transformer is told `sigma` and answers `noise - image`.
Conditions: `prompt_embeds` `(B, 512, D)`, three layers' states side by side; padding is part of
them, without a mask, as in the pipelines. `dev` is also told a guidance scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import (
    Flux2Pipeline,
    compute_empirical_mu,
    format_input,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from torch import Tensor, nn
from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from fastpo.errors import ModelError
from fastpo.models.encoders import Encoders, vae_factor
from fastpo.models.flow_family import FlowFamily
from fastpo.models.folder import ModelFolder, read_json
from fastpo.models.language import chats, count_longer
from fastpo.models.schedule import NoiseSchedule
from fastpo.types import NoisedPair

TEXT_LENGTH = 512
"""Tokens of a prompt with its chat; the pipelines' default."""
SAMPLING_STEPS = 50
"""The pipelines' default, on which the shift of their noise depends."""
_PATCH = 2


class Flux2Encoders(Encoders):
    """The VAE of FLUX.2 and a language model."""

    pipeline_class: ClassVar[Any]

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
        (tokenizer,), (encoder,) = self.tokenizers, self.text_encoders
        pipeline = self.pipeline_class(None, None, encoder, tokenizer, None)
        embeds, _ = pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=TEXT_LENGTH
        )
        return {"prompt_embeds": embeds}


class KleinEncoders(Flux2Encoders):
    """Klein's: layers 9, 18 and 27 of Qwen3."""

    pipeline_class = Flux2KleinPipeline

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`."""
        (tokenizer,) = self.tokenizers
        return count_longer(tokenizer, chats(tokenizer, prompts, thinking=False), TEXT_LENGTH)


class DevEncoders(Flux2Encoders):
    """Dev's: layers 10, 20 and 30 of Mistral, told by its system message to see structure."""

    pipeline_class = Flux2Pipeline

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`."""
        (tokenizer,) = self.tokenizers
        texts = tokenizer.apply_chat_template(format_input(list(prompts)), tokenize=False)
        return count_longer(tokenizer, texts, TEXT_LENGTH)


class Flux2Klein(FlowFamily):
    """FLUX.2-klein-base, 4B and 9B."""

    name = "flux2-klein"
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj")
    denoiser_class = Flux2Transformer2DModel
    pipeline_class = Flux2KleinPipeline
    vae_class = AutoencoderKLFlux2
    encoders_class = KleinEncoders
    text_class = Qwen3ForCausalLM
    relatives: ClassVar[Mapping[str, str]] = {
        "Flux2KleinKVPipeline": "it keeps the keys of reference images over its steps",
        "Flux2KleinInpaintPipeline": "it fills in masked images",
    }
    text_layers: ClassVar[int] = 27
    """The last layer of the text encoder that is read."""

    def _refuse_distilled(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Also by `is_distilled` of `model_index.json`."""
        super()._refuse_distilled(folder, index)
        if index.get("is_distilled"):
            raise ModelError(
                f"{folder / 'model_index.json'}: is_distilled is set: this model is distilled to "
                "few steps, which training at all noise levels would undo; train the base model "
                "(FLUX.2-klein-base-4B or -9B) and use the adapters with both"
            )

    def check_widths(self, folder: ModelFolder) -> None:
        """As `FlowFamily.check_widths`; the layers that are read must be there."""
        path = folder.component("text_encoder") / "config.json"
        text = read_json(path)
        inner: Any = text.get("text_config", text)
        width, layers = inner.get("hidden_size"), inner.get("num_hidden_layers")
        reads = read_json(folder.component("transformer") / "config.json")
        gives = 3 * width if isinstance(width, int) else width
        self.require_width(folder, gives, reads.get("joint_attention_dim"))
        if not isinstance(layers, int) or layers < self.text_layers:
            raise ModelError(
                f"{path}: {self.name} reads layer {self.text_layers} of its text encoder, which "
                f"has {ascii(layers)[:20]}"
            )

    def vae_factor(self, folder: ModelFolder) -> int:
        """Image pixels for each patch and side."""
        return _PATCH * super().vae_factor(folder)

    def denoiser_factor(self, folder: ModelFolder) -> int:
        """Latents are patches already."""
        return 1

    def shift(self, folder: ModelFolder, tokens: int) -> float:
        """As `FlowFamily.shift`, for 50 steps, the pipelines' default."""
        return compute_empirical_mu(tokens, SAMPLING_STEPS)

    def schedule(self, folder: ModelFolder, resolution: int) -> NoiseSchedule:
        """As `FlowFamily.schedule`; the transformer is told `sigma`."""
        schedule = super().schedule(folder, resolution)
        return replace(schedule, timesteps=schedule.sigma)

    def guidance(self, denoiser: nn.Module, sigma: Tensor) -> Tensor | None:
        """Returns the guidance scale that the transformer is told, `(N,)`; None: it is told none.

        Args:
            denoiser: The transformer.
            sigma: `(N,)` float32, its time.
        """
        return None

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`."""
        latents = noised.noisy_latents
        sigma = noised.timesteps.repeat(2)
        embeds = conditions["prompt_embeds"].to(latents.dtype).repeat(2, 1, 1)
        # One image's ids serve all: they have one size.
        image_ids = Flux2Pipeline._prepare_latent_ids(latents[:1]).to(latents.device)
        text_ids = Flux2Pipeline._prepare_text_ids(embeds[:1]).to(latents.device)
        answer = denoiser(
            hidden_states=Flux2Pipeline._pack_latents(latents),
            timestep=sigma,
            guidance=self.guidance(denoiser, sigma),
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return answer.transpose(1, 2).unflatten(2, latents.shape[2:])


class Flux2Dev(Flux2Klein):
    """FLUX.2-dev, 32B: distilled from guided predictions, it is told a guidance scale."""

    name = "flux2-dev"
    pipeline_class = Flux2Pipeline
    encoders_class = DevEncoders
    text_class = Mistral3ForConditionalGeneration
    relatives: ClassVar[Mapping[str, str]] = {}
    text_layers = 30

    def guidance(self, denoiser: nn.Module, sigma: Tensor) -> Tensor | None:
        """1 for each image: the model's own prediction, without guidance."""
        return torch.ones_like(sigma)
