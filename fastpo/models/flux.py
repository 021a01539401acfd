"""FLUX.1-dev: a transformer on tokens of 2 x 2 latent pixels, distilled from guided predictions.

Conditions: `prompt_embeds` `(B, L, D)`, the states of T5 with its padding, and `pooled` `(B, P)`,
CLIP's. The transformer reads no mask. It is told `sigma`, which it multiplies by 1000 itself, and a
guidance scale, and answers `noise - x`. Positions are ids: rows and columns of the image's tokens,
zeros for text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from fastpo.config.sections import PrepareConfig
from fastpo.errors import ConfigError, ModelError
from fastpo.models.edits import of_both_sides
from fastpo.models.encoders import Encoders, count_longer, load_clip_tokenizer, load_encoder
from fastpo.models.flow import JOINT_ATTENTION, FlowFamily
from fastpo.models.folder import ModelFolder
from fastpo.models.t5 import load_t5, load_t5_tokenizer, t5_states
from fastpo.models.turns import States, TurnEncoders, Turns
from fastpo.precision import DTYPES
from fastpo.types import NoisedPair

TEXT_LENGTH = 512
"""Tokens of T5 that the pipeline takes, and the most that it takes."""


@dataclass(frozen=True)
class FluxEncoders(TurnEncoders):
    """CLIP for the summary of a prompt, T5 for its words.

    Attributes:
        length: Tokens of T5.
    """

    length: int = TEXT_LENGTH

    def states_by(self, number: int, encoder: Any, prompts: Sequence[str]) -> States:
        """As the pipeline's `encode_prompt`."""
        tokenizer = self.tokenizers[number]
        if number == 1:
            return {"prompt_embeds": t5_states(tokenizer, encoder, prompts, self.length)}
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"pooled": encoder(tokens["input_ids"].to(self.device)).pooler_output}

    def join(self, states: Sequence[States]) -> States:
        """Both beside each other."""
        clip, t5 = states
        return {**t5, **clip}

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`, by T5, which reads the words."""
        return count_longer(self.tokenizers[1], prompts, self.length)


class Flux(FlowFamily):
    """FLUX.1-dev, and what was fine-tuned from it.

    Attributes:
        model_name: The model in messages.
    """

    name = "flux"
    encoders_class: ClassVar[type[FluxEncoders]] = FluxEncoders
    encoder_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    lora_targets = JOINT_ATTENTION
    denoiser_class = FluxTransformer2DModel
    pipeline_class = FluxPipeline
    pipeline_prefix = r"Flux(?!\d|KontextPipeline)"
    shifts_by_tokens = True
    guidance = 1.0
    model_name: ClassVar[str] = "FLUX.1-dev"

    def check(self, folder: ModelFolder) -> None:
        """As `FlowFamily.check`; the transformer and the schedule must be FLUX.1-dev's."""
        super().check(folder)
        config, path = self.denoiser_config(folder), folder.component("transformer") / "config.json"
        if not config.get("guidance_embeds"):
            raise ModelError(
                f"{path}: FastPO trains {self.model_name}, which is told a guidance scale; this "
                "transformer is told none (guidance_embeds is false), as FLUX.1-schnell's, which "
                "was distilled to four steps"
            )
        channels = config.get("in_channels", 64), config.get("out_channels") or 64
        if channels != (64, 64):
            raise ModelError(
                f"{path}: {self.model_name} maps 64 numbers a token to 64; this transformer "
                f"maps {channels[0]} to {channels[1]}, as those for control and filling in do"
            )
        self.check_width(folder, [("text_encoder", "hidden_size")], "pooled_projection_dim")
        self.check_width(folder, [("text_encoder_2", "d_model")], "joint_attention_dim")

    def load_encoders(
        self, folder: ModelFolder, config: PrepareConfig, device: torch.device
    ) -> Encoders:
        """Loads the VAE and the tokenizers; the text encoders when prompts are encoded."""
        from transformers import CLIPTextModel

        self.refuse_clip_options(config)
        length = self.text_length(config)
        dtype = DTYPES[config.text_precision]
        clip, t5 = (name for name in self.encoder_parts if name.startswith("text_encoder"))
        tokenizers = load_clip_tokenizer(folder, clip), load_t5_tokenizer(folder, t5)
        loads = (
            partial(load_encoder, folder, clip, CLIPTextModel, dtype),
            partial(load_t5, folder, t5, dtype),
        )
        vae = self.load_vae(folder, config, device)
        turns = Turns(loads, device)
        return self.encoders_class(vae, tokenizers, (), device, turns=turns, length=length)

    def text_length(self, config: PrepareConfig) -> int:
        """Returns the tokens of T5.

        Raises:
            ConfigError: There are more than the pipeline takes.
        """
        length = config.text_length or TEXT_LENGTH
        if length > TEXT_LENGTH:
            raise ConfigError(
                f"prepare.text_length: FLUX.1's pipeline takes at most {TEXT_LENGTH} tokens, got "
                f"{length}"
            )
        return length

    def denoiser_factor(self, folder: ModelFolder) -> int:
        """A token is 2 x 2 latent pixels, though `patch_size` is 1: the pipeline packs them."""
        return 2

    def told(self, sigma: Tensor) -> Tensor:
        """As `FlowFamily.told`."""
        return sigma.clone()

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], config: PrepareConfig
    ) -> dict[str, Any]:
        """As `ModelFamily.prompt_arguments`, with the length of T5's text."""
        return {"prompt": list(prompts), "max_sequence_length": self.text_length(config)}

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`."""
        latents = noised.noisy_latents
        rows, _, height, width = latents.shape
        device, dtype = latents.device, latents.dtype
        text = conditions["prompt_embeds"].to(dtype).repeat(2, 1, 1)
        tokens, ids = tokens_of(latents)
        own = tokens.shape[1]
        for source in of_both_sides(conditions, latents):
            tokens, ids = _appended(tokens, ids, source)
        answer = denoiser(
            hidden_states=tokens,
            timestep=noised.timesteps.repeat(2),
            guidance=torch.full((rows,), noised.guidance, device=device),
            pooled_projections=conditions["pooled"].to(dtype).repeat(2, 1),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(answer[:, :own], height, width, 1)


def tokens_of(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns latents `(N, C, h, w)` as tokens `(N, L, 4 C)`, and their ids `(L, 3)`."""
    rows, channels, height, width = latents.shape
    tokens = FluxPipeline._pack_latents(latents, rows, channels, height, width)
    sides = height // 2, width // 2
    device = latents.device
    return tokens, FluxPipeline._prepare_latent_image_ids(rows, *sides, device, torch.float32)


def _appended(tokens: Tensor, ids: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the source's tokens behind the image's; the first of their ids is 1 instead of 0."""
    more, more_ids = tokens_of(source)
    more_ids[:, 0] = 1
    return torch.cat([tokens, more], dim=1), torch.cat([ids, more_ids])
