"""The frozen parts that turn images and prompts into what a denoiser is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo.config import Config
from fastpo.errors import ModelError, NonFiniteLatentsError
from fastpo.models.folder import ModelFolder, loading
from fastpo.models.geometry import halvings
from fastpo.models.weights import load_component, load_part
from fastpo.system.process import default_device


@dataclass(frozen=True)
class Encoders(ABC):
    """A VAE and the text encoders of one pipeline folder, in evaluation mode.

    A family gives a subclass that says what a prompt's conditions are.

    Attributes:
        vae: An `AutoencoderKL`; a family with another overrides `encode_images`.
        tokenizers: One tokenizer per text encoder.
        text_encoders: The text models, in the pipeline's order.
        device: Where all of them live and where inputs are moved to.
        chunks: `prepare.prompt_chunks`.
        clip_skip: `prepare.clip_skip`.
    """

    vae: Any
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    device: torch.device
    chunks: int = 1
    clip_skip: int = 0

    @staticmethod
    def load(
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
        model = model or ModelFolder.resolve(config.model)
        place = torch.device(device or default_device())
        return model.family.load_encoders(model, config.prepare, place)

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent pixel and side."""
        return vae_factor(self.vae.config)

    def place_texts(self, device: torch.device | str) -> None:
        """Moves the text encoders: to the CPU while images are encoded, and back for prompts.

        They are many times as large as the VAE, which stays where it is.
        """
        for encoder in self.text_encoders:
            encoder.to(device)

    @abstractmethod
    def prompt_conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encodes prompts; see `encode_prompts`."""

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Returns how many prompts are longer than what is encoded of them."""
        return 0

    def posterior(self, pixels: Tensor) -> Any:
        """Returns the VAE's posterior of images: a `DiagonalGaussianDistribution`."""
        return self.vae.encode(pixels).latent_dist

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
        posterior = self.posterior(pixels.to(self.device, self.vae.dtype))
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
        """Encodes prompts as the family's pipeline does the positive prompt.

        Args:
            prompts: N prompts; an empty one is the unconditional prompt.

        Returns:
            The conditions that prompts give, each `(N, ...)` with the same sizes for every call, in
            the encoders' dtype (masks bool or int64), under the names that `predict` reads.

        Raises:
            ModelError: An encoder answered with NaN or infinity.
        """
        return checked(self.prompt_conditions(prompts))

    def encode_batches(self, prompts: Sequence[str], size: int) -> Iterator[dict[str, Tensor]]:
        """Encodes any number of prompts in batches of `size`, in their order.

        Yields:
            What `encode_prompts` gives for each batch.

        Raises:
            ModelError: As `encode_prompts`, or a text encoder cannot be loaded.
        """
        for start in range(0, len(prompts), size):
            yield self.encode_prompts(prompts[start : start + size])


def checked(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns prompts' conditions if all of their numbers are finite.

    Raises:
        ModelError: One is not.
    """
    for tensor in conditions.values():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"a text encoder produced NaN or infinity in {tensor.dtype}; "
                f"set prepare.text_precision=fp32"
            )
    return conditions


def vae_factor(vae_config: Mapping[str, Any]) -> int:
    """Returns how many image pixels one latent pixel spans on each side.

    Raises:
        ModelError: The configuration does not say.
    """
    return halvings(vae_config, "the VAE")


def load_vae(folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """Loads an `AutoencoderKL` from its folder, of a variant if it has that.

    Raises:
        ModelError: As `load_component`.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    what = f"{folder}: the VAE could not be loaded"
    return load_component(AutoencoderKL, folder, what=what, variant=variant, dtype=dtype)


def load_vae_of(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """Loads the `AutoencoderKL` in use, also from a single file; errors as `load_part`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    what = f"{folder.vae}: the VAE could not be loaded"
    return load_part(AutoencoderKL, folder, "vae", what=what, dtype=dtype)


def load_text(
    folder: ModelFolder, name: str, kind: Any, tokenizer_kind: Any, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Loads one of a pipeline's text encoders and its tokenizer.

    Args:
        folder: The pipeline.
        name: The encoder's component, such as `text_encoder_2`.
        kind: The class of the encoder.
        tokenizer_kind: The class of the tokenizer.
        dtype: Of the encoder's weights.

    Returns:
        The tokenizer and the encoder.

    Raises:
        ModelError: One of them cannot be loaded.
    """
    encoder = load_encoder(folder, name, kind, dtype)
    return load_tokenizer(folder, name, tokenizer_kind), encoder


def load_encoder(folder: ModelFolder, name: str, kind: Any, dtype: torch.dtype) -> Any:
    """As `load_text`, of the encoder alone."""
    what = f"{folder.path / name} could not be loaded"
    return load_part(kind, folder, name, what=what, dtype=dtype)


def load_tokenizer(folder: ModelFolder, name: str, kind: Any) -> Any:
    """As `load_text`, of the tokenizer alone; `name` is the encoder's component."""
    part = folder.path / name.replace("text_encoder", "tokenizer")
    with loading(f"{part} could not be loaded"):
        return kind.from_pretrained(part)


def load_clip(folder: ModelFolder, name: str, kind: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """As `load_text`, of CLIP, whose tokenizer is held to the encoder's places."""
    from transformers import CLIPTokenizer

    tokenizer, encoder = load_text(folder, name, kind, CLIPTokenizer, dtype)
    limit_tokens(tokenizer, encoder.config)
    return tokenizer, encoder


def load_clip_tokenizer(folder: ModelFolder, name: str) -> Any:
    """As `load_clip`, of the tokenizer alone."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    tokenizer = load_tokenizer(folder, name, CLIPTokenizer)
    part = folder.component(name)
    with loading(f"{part} could not be loaded"):
        limit_tokens(tokenizer, CLIPTextConfig.from_pretrained(part))
    return tokenizer


def count_longer(tokenizer: Any, texts: Sequence[str], length: int) -> int:
    """Returns how many texts have more tokens than `length`, the tokenizer's own among them."""
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    return sum(len(own) > length for own in ids)


def limit_tokens(tokenizer: Any, config: Any) -> None:
    """Lowers a tokenizer's length to the places of an encoder, by its configuration.

    A configuration without `model_max_length` means 10^30 to transformers, to which each prompt
    would be padded.
    """
    places = config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, places)
