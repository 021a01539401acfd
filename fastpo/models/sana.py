"""Sana: linear attention on latents of 32 channels, a 32nd of the image's side.

Conditions: `prompt_embeds` `(B, L, D)`, Gemma 2's states behind the pipeline's instruction, its
first token and the last L - 1, and `prompt_mask` `(B, L)` bool, where they are of a token and
not of padding. The transformer is told `1000 sigma` times its `timestep_scale` and answers
`noise - x`. The VAE is no distribution: one image has one latent.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from fastpo.config.sections import PrepareConfig
from fastpo.errors import ModelError, NonFiniteLatentsError
from fastpo.models.encoders import Encoders, count_longer, load_text
from fastpo.models.flow import FlowFamily
from fastpo.models.folder import ModelFolder, read_json
from fastpo.models.geometry import MOST_LEVELS
from fastpo.models.schedule import NoiseSchedule, config_number
from fastpo.precision import DTYPES
from fastpo.types import NoisedPair

TEXT_LENGTH = 300
"""Tokens of a prompt that the pipeline takes."""
NO_VARIANCE = -80.0
"""The log-variance of a VAE without one: a deviation of 4e-18, below any latent's last digit."""


@dataclass(frozen=True)
class SanaEncoders(Encoders):
    """An `AutoencoderDC` and Gemma 2.

    Attributes:
        length: Tokens of a prompt.
    """

    length: int = TEXT_LENGTH

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent pixel and side."""
        return _vae_factor(self.vae.config)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Encoders.encode_images`; the log-variance is that of no spread."""
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent.float()
        finite = torch.isfinite(latents).flatten(1).all(dim=1)
        if not bool(finite.all()):
            raise NonFiniteLatentsError(
                f"the VAE produced NaN or infinity in {self.vae.dtype}; set "
                "prepare.vae_precision=fp32 (or bf16)",
                rows=(~finite).nonzero().flatten().tolist(),
            )
        return latents, torch.full_like(latents, NO_VARIANCE)

    def prompt_conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encodes prompts by the pipeline's own `encode_prompt`, with its own instruction."""
        states, mask, _, _ = self._pipeline().encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.length,
            complex_human_instruction=instruction(),
        )
        # The transformer sees nothing of the padding; zeros need no place in the cache.
        return {"prompt_embeds": states * mask.unsqueeze(-1), "prompt_mask": mask.bool()}

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`: the instruction's tokens do not count."""
        (tokenizer,) = self.tokenizers
        before = "\n".join(instruction())
        room = len(tokenizer.encode(before)) + self.length - 2
        texts = self._pipeline()._text_preprocessing(list(prompts))
        return count_longer(tokenizer, [before + text for text in texts], room)

    def _pipeline(self) -> Any:
        """diffusers' pipeline of the text encoder alone."""
        parts: Any = self.tokenizers[0], self.text_encoders[0], None, None, None
        return SanaPipeline(*parts)


def instruction() -> list[str]:
    """What Sana's pipeline puts before each prompt."""
    parameters = inspect.signature(SanaPipeline.__call__).parameters
    return list(parameters["complex_human_instruction"].default)


class Sana(FlowFamily):
    """Sana and Sana 1.5; not Sana-Sprint, which was distilled to few steps."""

    name = "sana"
    encoder_parts = ("text_encoder", "tokenizer")
    lora_targets = ("to_q", "to_k", "to_v")
    denoiser_class = SanaTransformer2DModel
    pipeline_class = SanaPipeline
    pipeline_prefix = "Sana"
    vae_class = AutoencoderDC
    latent_channels = 32
    sdpa_alone = True

    def check(self, folder: ModelFolder) -> None:
        """As `FlowFamily.check`; the transformer must be told no guidance and no variance."""
        super().check(folder)
        config = self.denoiser_config(folder)
        path = folder.component("transformer") / "config.json"
        if config.get("guidance_embeds"):
            raise ModelError(
                f"{path}: guidance_embeds is true, as in Sana-Sprint, which was distilled to few "
                "steps; FastPO trains the model that it was made from"
            )
        channels = config.get("in_channels", 32), config.get("out_channels", 32)
        if channels != (32, 32):
            raise ModelError(
                f"{path}: Sana maps 32 channels to 32, this transformer {channels[0]} to "
                f"{channels[1]}"
            )

        self.check_width(folder, [("text_encoder", "hidden_size")], "caption_channels")

    def scheduler_config(self, folder: ModelFolder) -> dict[str, Any]:
        """As `FlowFamily.scheduler_config`, of Sana's DPM-Solver with flow matching's sigmas too.

        It is given as the configuration of a `FlowMatchEulerDiscreteScheduler`.
        """
        path = folder.component("scheduler") / "scheduler_config.json"
        config = read_json(path)
        if config.get("_class_name") != "DPMSolverMultistepScheduler":
            return super().scheduler_config(folder)
        kind = config.get("prediction_type")
        if not config.get("use_flow_sigmas") or kind != "flow_prediction":
            raise ModelError(
                f"{path}: sana is trained with flow matching, for which its pipeline has a "
                "DPMSolverMultistepScheduler with use_flow_sigmas and prediction_type: "
                f"flow_prediction; got prediction_type {ascii(kind)[:80]}"
            )
        self.check_sigmas(path, config)
        return {
            "_class_name": FlowMatchEulerDiscreteScheduler.__name__,
            "num_train_timesteps": 1000,
            "shift": config_number(config, "flow_shift", 1.0, "the scheduler"),
        }

    def load_encoders(
        self, folder: ModelFolder, config: PrepareConfig, device: torch.device
    ) -> Encoders:
        """Loads the VAE and Gemma 2."""
        from transformers import Gemma2Model, GemmaTokenizer

        self.refuse_clip_options(config)
        dtype = DTYPES[config.text_precision]
        tokenizer, text = load_text(folder, "text_encoder", Gemma2Model, GemmaTokenizer, dtype)
        text.to(device).eval().requires_grad_(False)
        vae = self.load_vae(folder, config, device)
        length = config.text_length or TEXT_LENGTH
        return SanaEncoders(vae, (tokenizer,), (text,), device, length=length)

    def vae_factor(self, folder: ModelFolder) -> int:
        """As `ModelFamily.vae_factor`."""
        return _vae_factor(read_json(folder.vae / "config.json"))

    def schedule(self, folder: ModelFolder, resolution: int) -> NoiseSchedule:
        """As `FlowFamily.schedule`, in the transformer's scale of the time."""
        schedule = super().schedule(folder, resolution)
        config = self.denoiser_config(folder)
        scale = config_number(config, "timestep_scale", 1.0, "the transformer")
        return replace(schedule, timesteps=scale * schedule.timesteps)

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], config: PrepareConfig
    ) -> dict[str, Any]:
        """As `ModelFamily.prompt_arguments`; images are made in the size asked for."""
        return {
            "prompt": list(prompts),
            "max_sequence_length": config.text_length or TEXT_LENGTH,
            "use_resolution_binning": False,
        }

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`."""
        dtype = noised.noisy_latents.dtype
        return denoiser(
            noised.noisy_latents,
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype).repeat(2, 1, 1),
            encoder_attention_mask=conditions["prompt_mask"].to(dtype).repeat(2, 1),
            timestep=noised.timesteps.repeat(2),
            return_dict=False,
        )[0]


def _vae_factor(config: Mapping[str, Any]) -> int:
    """Image pixels per latent pixel of an `AutoencoderDC`: 2 for each level but the first.

    Raises:
        ModelError: Its configuration does not list its levels.
    """
    levels = config.get("encoder_block_out_channels")
    if not isinstance(levels, list | tuple) or not 0 < len(levels) <= MOST_LEVELS:
        raise ModelError(
            f"encoder_block_out_channels of the VAE must be a list of 1 to {MOST_LEVELS} sizes, "
            f"got {ascii(levels)[:80]}"
        )
    return 2 ** (len(levels) - 1)
