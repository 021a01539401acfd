"""What a plan asks of flow-matching families: their modules, and a micro-batch on the meta device.

A pass is the family's own `predict`, so that packing, guidance and the texts' tokens cost what they
cost in training. Texts are as long as they can be: `prepare.text_length`, or the pipeline's length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastpo.config import Config
from fastpo.errors import ModelError
from fastpo.models import flux, sana, sd3
from fastpo.models.edits import source_condition
from fastpo.models.export import empty_denoiser
from fastpo.models.flow import FlowFamily
from fastpo.models.folder import ModelFolder
from fastpo.models.language import LanguageFamily
from fastpo.types import NoisedPair

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser
    from fastpo.plan.shapes import Shapes

META = torch.device("meta")
CLIP_TOKENS = 77
_LENGTHS = {
    "sd3": sd3.TEXT_LENGTH,
    "flux": flux.TEXT_LENGTH,
    "flux-kontext": flux.TEXT_LENGTH,
    "sana": sana.TEXT_LENGTH,
}
_SEEN = {"qwen-image-edit": 37 * 37, "qwen-image-edit-plus": 14 * 14}
"""Tokens of 28 x 28 pixels of a square source image, as the language model sees it."""
SOURCE_SIDE = 1024
"""Pixels: the pipelines resize a square source to this side, FLUX.2's at most."""


@dataclass(frozen=True)
class Text:
    """What a prompt gives to the transformer.

    Attributes:
        sizes: Of each condition, by name, without the batch.
        masks: Which of them are masks, one byte a token.
    """

    sizes: dict[str, tuple[int, ...]]
    masks: tuple[str, ...] = ()

    def bytes(self, element: int) -> int:
        """Bytes of a prompt with so many for each number."""
        return sum(
            math.prod(size) * (1 if name in self.masks else element)
            for name, size in self.sizes.items()
        )


def text_length(family: FlowFamily, config: Config, images: int = 1) -> int:
    """Returns the tokens of a prompt, and of images with it, for the long text encoder."""
    seen = images * _SEEN.get(family.name, 0)
    if config.prepare.text_length is not None:
        return config.prepare.text_length + seen
    if isinstance(family, LanguageFamily):
        return family.text_length + seen
    return _LENGTHS[family.name]


def text_of(family: FlowFamily, denoiser: dict[str, Any], length: int) -> Text:
    """Returns what a prompt of a length gives.

    Args:
        family: The family.
        denoiser: The transformer's configuration, with its class's defaults.
        length: Tokens.
    """
    if family.name == "z-image":
        sizes = {"prompt_embeds": (length, denoiser["cap_feat_dim"]), "prompt_mask": (length,)}
        return Text(sizes, masks=("prompt_mask",))
    if family.name == "sana":
        sizes = {"prompt_embeds": (length, denoiser["caption_channels"]), "prompt_mask": (length,)}
        return Text(sizes, masks=("prompt_mask",))
    width = denoiser["joint_attention_dim"]
    if family.name in ("qwen-image", *_SEEN):
        sizes = {"prompt_embeds": (length, width), "prompt_mask": (length,)}
        return Text(sizes, masks=("prompt_mask",))
    if family.name in ("sd3", "flux", "flux-kontext"):
        tokens = length + (CLIP_TOKENS if family.name == "sd3" else 0)
        pooled = (denoiser["pooled_projection_dim"],)
        return Text({"prompt_embeds": (tokens, width), "pooled": pooled})
    return Text({"prompt_embeds": (length, width)})


def empty_transformer(family: FlowFamily, config: dict[str, Any]) -> Denoiser:
    """The transformer of a configuration on the meta device."""
    return empty_denoiser(family.denoiser_class, config)


def empty_vae(family: FlowFamily, config: dict[str, Any]) -> nn.Module:
    """The VAE of a configuration on the meta device."""
    with META:
        return family.vae_class.from_config(config)


def empty_text(config: dict[str, Any]) -> nn.Module:
    """A text encoder's layers on the meta device, without its image tower and last layer.

    Raises:
        ModelError: transformers knows no such model.
    """
    from transformers import AutoConfig, AutoModel, CLIPTextModel, T5EncoderModel

    own = dict(config.get("text_config") or config)
    kind = own.pop("model_type", None)
    if not isinstance(kind, str):
        raise ModelError("text_encoder/config.json names no model_type")
    settings: Any = AutoConfig.for_model(kind, **own)
    with META:
        if kind == "t5":
            return T5EncoderModel(settings)
        if kind.startswith("clip"):
            return CLIPTextModel(settings)
        return AutoModel.from_config(settings)


def text_tokens(config: dict[str, Any], length: int) -> int:
    """Returns how many tokens a text encoder reads of a prompt."""
    own = config.get("text_config") or config
    return CLIP_TOKENS if str(own.get("model_type")).startswith("clip") else length


def channels(family: FlowFamily, folder: ModelFolder, vae_config: dict[str, Any]) -> int:
    """Returns the channels of stored latents, whose pixels may be patches of the VAE's."""
    from fastpo.models.encoders import vae_factor

    if "block_out_channels" not in vae_config:
        return family.latent_channels
    patch = family.vae_factor(folder) // vae_factor(vae_config)
    return family.latent_channels * patch * patch


def transformer_call(
    family: FlowFamily, text: Text, shapes: Shapes, latent_channels: int
) -> tuple[list[Tensor], Callable[[nn.Module], Tensor]]:
    """Returns a micro-batch's tensors on the meta device, and the pass of a transformer on them."""
    rows = 2 * shapes.pairs
    latents = torch.empty(rows, latent_channels, shapes.height, shapes.width, device=META)
    index = torch.zeros(shapes.pairs, dtype=torch.int64, device=META)
    noised = NoisedPair(latents, index, torch.empty(shapes.pairs, device=META), latents)
    conditions = {
        # Masks lie on the host: a family looks at the lengths that they tell.
        name: torch.ones(shapes.pairs, *size, dtype=torch.bool)
        if name in text.masks and family.name != "sana"
        else torch.empty(shapes.pairs, *size, device=META)
        for name, size in text.sizes.items()
    }

    for place in range(0 if shapes.source is None else shapes.sources):
        size = shapes.pairs, latent_channels, *(shapes.source or ())
        conditions[source_condition(place)] = torch.empty(size, device=META)

    def call(denoiser: nn.Module) -> Tensor:
        return family.predict(denoiser, noised, conditions)

    held = [t for t in conditions.values() if t.device == META]
    return [latents, noised.timesteps, *held], cast("Callable[[nn.Module], Tensor]", call)
