"""The frozen parts that turn images and prompts into what the UNet is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo.config import Config, Precision
from fastpo.errors import ConfigError, ModelError, NonFiniteLatentsError
from fastpo.models.folder import Family, ModelFolder, component_variant

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Encoders:
    """A VAE and the text encoders of one pipeline folder, in evaluation mode.

    Attributes:
        family: `sd15` (one text encoder) or `sdxl` (two).
        vae: The `AutoencoderKL`.
        tokenizers: One tokenizer per text encoder.
        text_encoders: The CLIP text models, in the pipeline's order.
        device: Where all of them live and where inputs are moved to.
    """

    family: Family
    vae: Any
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    device: torch.device

    @classmethod
    def load(
        cls,
        config: Config,
        *,
        device: torch.device | str | None = None,
        model: ModelFolder | None = None,
    ) -> Encoders:
        """Loads what `config.model` and `config.prepare` name.

        Args:
            config: Gives the model, the VAE that replaces its own, and both precisions.
            device: Defaults to the first CUDA device if there is one, else the CPU.
            model: The folder of the configuration's model; by default it is looked for.

        Raises:
            ModelError: A folder or a part of it is missing, or the family is not supported.
            ConfigError: The VAE is known to overflow in the precision asked for.
        """
        model, prepare = model or ModelFolder.resolve(config.model), config.prepare
        family = model.family
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        vae = _load_vae(model.vae, model.variant, DTYPES[prepare.vae_precision])
        tokenizers, texts = _load_texts(model, DTYPES[prepare.text_precision])
        if family == "sdxl" and vae.dtype == torch.float16 and vae.config.force_upcast:
            raise ConfigError(
                "prepare.vae_precision: fp16 overflows in this VAE (its config.json asks for "
                "force_upcast, as SDXL's original one does); set prepare.vae_precision=fp32 or "
                "bf16, or model.vae to an fp16-fix VAE"
            )
        for module in (vae, *texts):
            module.to(place).eval().requires_grad_(False)
        return cls(family, vae, tokenizers, texts, place)

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent pixel and side."""
        return vae_factor(self.vae.config)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images to the VAE's posterior, not scaled by its `scaling_factor`.

        Args:
            pixels: `(N, 3, H, W)` in [-1, 1], sides multiples of the VAE's factor.

        Returns:
            Mean and log-variance, each `(N, C, h, w)` float32.

        Raises:
            NonFiniteLatentsError: The VAE answered with NaN or infinity; its `rows` say for which.
        """
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        # The raw output: the posterior clamps its log-variance, which would hide an infinity.
        finite = torch.isfinite(posterior.parameters).flatten(1).all(dim=1)
        if not bool(finite.all()):
            raise NonFiniteLatentsError(
                f"the VAE produced NaN or infinity in {self.vae.dtype}; SDXL's original VAE does "
                f"so in fp16: set prepare.vae_precision=fp32 (or bf16), or set model.vae to an "
                f"fp16-fix VAE",
                rows=(~finite).nonzero().flatten().tolist(),
            )
        return mean, logvar

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encodes prompts as `StableDiffusion(XL)Pipeline.encode_prompt` does the positive prompt.

        SD1.5 takes the last layer's states; SDXL joins the last but one layer's states of both
        encoders and adds the second one's pooled projection. Prompts are cut at the tokenizer's
        length.

        Args:
            prompts: N prompts; an empty one is the unconditional prompt.

        Returns:
            `prompt_embeds` `(N, L, D)` and, for SDXL, `pooled` `(N, P)`, in the encoders' dtype.

        Raises:
            ModelError: An encoder answered with NaN or infinity.
        """
        states: list[Tensor] = []
        pooled: Tensor | None = None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            masked = getattr(encoder.config, "use_attention_mask", False)
            output = encoder(
                tokens.input_ids,
                attention_mask=tokens.attention_mask if masked else None,
                output_hidden_states=self.family == "sdxl",
            )
            states.append(output[0] if self.family == "sd15" else output.hidden_states[-2])
            pooled = output[0] if output[0].ndim == 2 else pooled
        conditions = {"prompt_embeds": torch.cat(states, dim=-1)}
        if pooled is not None:
            conditions["pooled"] = pooled
        for tensor in conditions.values():
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(
                    f"a text encoder produced NaN or infinity in {tensor.dtype}; "
                    f"set prepare.text_precision=fp32"
                )
        return conditions


def vae_factor(vae_config: dict[str, Any]) -> int:
    """Returns how many image pixels one latent pixel spans on each side."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def _load_vae(folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    chosen = component_variant(folder, variant)
    try:
        return AutoencoderKL.from_pretrained(folder, variant=chosen, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the VAE could not be loaded: {error}") from error


def _load_texts(model: ModelFolder, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns tokenizers and text encoders in the pipeline's order."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    tokenizers, encoders = [], []
    for name in list(kinds)[: 2 if model.family == "sdxl" else 1]:
        part = model.path / name
        chosen = component_variant(part, model.variant)
        try:
            encoders.append(kinds[name].from_pretrained(part, variant=chosen, dtype=dtype))
            part = model.path / name.replace("text_encoder", "tokenizer")
            tokenizers.append(CLIPTokenizer.from_pretrained(part))
        except (OSError, ValueError) as error:
            raise ModelError(f"{part} could not be loaded: {error}") from error
    return tuple(tokenizers), tuple(encoders)
