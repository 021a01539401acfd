"""Qwen-Image: two streams, a VAE of five dimensions, texts read by Qwen2.5-VL.

Latents `(C, h, w)` are those of the VAE's one frame, normalized by channel. The transformer is told
`sigma` and answers `noise - image`, on patches of 2 by 2. Conditions: `prompt_embeds` `(B, 1024,
D)`, the last layer's states without the template's first 34 tokens, and `prompt_mask` `(B, 1024)`
bool. All images of a batch have one size, which the position embedding takes from the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from fastpo.errors import ModelError
from fastpo.models.clip import latent_normalization
from fastpo.models.encoders import count_longer
from fastpo.models.folder import ModelFolder, read_json
from fastpo.models.geometry import MOST_LEVELS
from fastpo.models.language import LanguageEncoders, LanguageFamily, lengths, padded
from fastpo.types import NoisedPair


class QwenImageEncoders(LanguageEncoders):
    """The VAE of Qwen-Image and Qwen2.5-VL."""

    @property
    def vae_factor(self) -> int:
        """As `Encoders.vae_factor`."""
        return _vae_factor(self.vae.config)

    def posterior(self, pixels: Tensor) -> Any:
        """As `Encoders.posterior`, of videos of one frame."""
        return self.vae.encode(pixels.unsqueeze(2)).latent_dist

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Encoders.encode_images`, of the normalized latents."""
        mean, logvar = (moment.squeeze(2) for moment in super().encode_images(pixels))
        normalization = latent_normalization(_channels_named(self.vae.config))
        assert normalization is not None, "the family's check asks for it"
        center, spread = (
            torch.tensor(values, device=mean.device).view(-1, 1, 1) for values in normalization
        )
        return (mean - center) / spread, logvar - 2.0 * spread.log()

    def prompt_conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As the pipeline's `encode_prompt`, padded to one length."""
        embeds, mask = self.pipeline_of(QwenImagePipeline).encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.length
        )
        if mask is None:
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        states = [text[own] for text, own in zip(embeds, mask.bool(), strict=True)]
        embeds, mask = padded(states, self.length)
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`."""
        pipeline = self.pipeline_of(QwenImagePipeline)
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        room = self.length + pipeline.prompt_template_encode_start_idx
        return count_longer(self.tokenizer, texts, room)


class QwenImage(LanguageFamily):
    """Qwen-Image, 20B.

    Attributes:
        refused_keys: Of the transformer's configuration; each set one is of another kind of model.
    """

    name = "qwen-image"
    refused_keys: ClassVar[tuple[str, ...]] = (
        "zero_cond_t",
        "use_additional_t_cond",
        "use_layer3d_rope",
        "guidance_embeds",
    )
    denoiser_class = QwenImageTransformer2DModel
    pipeline_class = QwenImagePipeline
    pipeline_prefix = "QwenImage(?!Edit(Plus)?Pipeline)"
    shifts_by_tokens = True
    sdpa_alone = True  # texts of unequal length need a mask, which flash kernels do not take
    vae_class = AutoencoderKLQwenImage
    encoders_class = QwenImageEncoders
    text_class = Qwen2_5_VLForConditionalGeneration
    text_length = most_text = 1024

    def check(self, folder: ModelFolder) -> None:
        """As `LanguageFamily.check`; the VAE must tell its normalization."""
        super().check(folder)
        if latent_normalization(_channels_named(read_json(folder.vae / "config.json"))) is None:
            raise ModelError(f"{folder.vae / 'config.json'} has no latents_mean and latents_std")
        config = self.denoiser_config(folder)
        for key in self.refused_keys:
            if config.get(key):
                raise ModelError(
                    f"{folder.component(self.denoiser) / 'config.json'}: {key} is set, as in "
                    f"models of another kind than {self.name}, which edit images or make layers"
                )

    def scheduler_config(self, folder: ModelFolder) -> dict[str, Any]:
        """As `FlowFamily.scheduler_config`; Lightning's schedule is refused."""
        config = super().scheduler_config(folder)
        shift = config.get("base_shift")
        if config.get("use_dynamic_shifting") and shift == config.get("max_shift") is not None:
            raise ModelError(
                f"{folder.component('scheduler') / 'scheduler_config.json'}: base_shift and "
                f"max_shift are both {ascii(shift)[:20]}, the schedule of models distilled to a "
                "few steps (Lightning); give Qwen-Image's own"
            )
        return config

    def vae_channels(self, config: dict[str, Any]) -> Any:
        """As `FlowFamily.vae_channels`."""
        return config.get("z_dim", 16)

    def guidance_arguments(self, scale: float, images: int) -> dict[str, Any]:
        """As `ModelFamily.guidance_arguments`; without a negative prompt there is none."""
        return {"true_cfg_scale": scale, "negative_prompt": [" "] * images if scale > 1.0 else None}

    def vae_factor(self, folder: ModelFolder) -> int:
        """As `ModelFamily.vae_factor`: each of the VAE's downsamplings halves both sides."""
        return _vae_factor(read_json(folder.vae / "config.json"))

    def told(self, sigma: Tensor) -> Tensor:
        """`sigma`."""
        return sigma

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`; texts are cut to the longest of the batch."""
        latents = noised.noisy_latents
        rows, channels, height, width = latents.shape
        own = lengths(conditions["prompt_mask"])
        length = max(own)
        # As in the pipeline: texts of one length need no mask.
        mask = None if min(own) == length else conditions["prompt_mask"][:, :length].repeat(2, 1)
        embeds = conditions["prompt_embeds"][:, :length].to(latents.dtype).repeat(2, 1, 1)
        answer = denoiser(
            hidden_states=QwenImagePipeline._pack_latents(latents, rows, channels, height, width),
            timestep=noised.timesteps.repeat(2),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * rows,
            return_dict=False,
        )[0]
        return QwenImagePipeline._unpack_latents(answer, height, width, 1).squeeze(2)


def _vae_factor(config: Mapping[str, Any]) -> int:
    levels = config.get("temperal_downsample")
    if not isinstance(levels, list | tuple) or not len(levels) < MOST_LEVELS:
        raise ModelError(
            "temperal_downsample of the VAE must be a list with an entry for each level, got "
            f"{ascii(levels)[:80]}"
        )
    return 2 ** len(levels)


def _channels_named(config: Mapping[str, Any]) -> dict[str, Any]:
    """The VAE's configuration with the number of channels under `AutoencoderKL`'s name."""
    return {**config, "latent_channels": config.get("z_dim", 16)}
