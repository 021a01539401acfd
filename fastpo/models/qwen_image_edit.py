"""Qwen-Image-Edit: Qwen-Image that edits a source image, which Qwen2.5-VL sees, too.

Beside Qwen-Image's conditions it is told `source_latents` `(B, C, h, w)`, whose tokens follow those
of the noisy image, and its texts are encoded together with the source: `prompt_embeds` holds the
states of the image's tokens and of the prompt behind the template's first 64. The source has about
a megapixel for the VAE, whatever the size of the result. Qwen2.5-VL sees the same picture in
Qwen-Image-Edit, and one of 384 x 384 pixels' area in Edit-Plus (2509 and later), which takes
several sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import QwenImageEditPlusPipeline
from torch import Tensor, nn

from fastpo.config.sections import PrepareConfig
from fastpo.models.edits import EditEncoders, of_both_sides
from fastpo.models.encoders import count_longer
from fastpo.models.folder import ModelFolder, loading
from fastpo.models.language import lengths, padded
from fastpo.models.qwen_image import QwenImage, QwenImageEncoders
from fastpo.types import NoisedPair

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_SOURCES = 10
"""Of Edit-Plus, made for one to three; the pipeline takes any number, numbered in the text."""


@dataclass(frozen=True)
class QwenImageEditEncoders(QwenImageEncoders, EditEncoders):
    """Qwen-Image's, with the processor that gives Qwen2.5-VL its pictures.

    Attributes:
        processor: Of the pipeline.
    """

    processor: Any = None
    image_tokens: ClassVar[int] = 1536
    """Room for a source's tokens, one for 28 x 28 pixels: at most 1,369 at the usual aspects."""

    def pipeline_of(self, kind: Any) -> Any:
        """As `LanguageEncoders.pipeline_of`, with the processor."""
        return kind(None, None, self.text_encoders[0], self.tokenizer, self.processor, None)

    def source_pixels(self, image: Image) -> Tensor:
        """As `EditEncoders.source_pixels`."""
        processor, (height, width) = self._resizer(), self._source_size(image)
        return processor.preprocess(processor.resize(image, height, width), height, width)[0]

    def edit_conditions(self, prompt: str, images: Sequence[Image]) -> dict[str, Tensor]:
        """As `EditEncoders.edit_conditions`, padded to one length.

        What is longer is cut, while the pipeline, which pads nothing, would take it whole.
        """
        (image,) = images
        embeds, _ = self.pipeline_of(QwenImageEditPipeline).encode_prompt(
            [prompt], image=self._seen(image), device=self.device
        )
        return self._padded(embeds, 1)

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`."""
        return count_longer(self.tokenizer, prompts, self.length)

    def _resizer(self) -> Any:
        return VaeImageProcessor(vae_scale_factor=2 * self.vae_factor)

    def _source_size(self, image: Image) -> tuple[int, int]:
        """Height and width of the source as the VAE gets it."""
        aspect = image.width / image.height
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, aspect)
        return int(height), int(width)

    def _seen(self, image: Image) -> Any:
        """The picture that Qwen2.5-VL gets."""
        return self._resizer().resize(image, *self._source_size(image))

    def _padded(self, embeds: Tensor, images: int) -> dict[str, Tensor]:
        length = self.length + images * self.image_tokens
        embeds, mask = padded([embeds[0, :length]], length)
        return {"prompt_embeds": embeds, "prompt_mask": mask}


class QwenImageEditPlusEncoders(QwenImageEditEncoders):
    """Of Edit-Plus, whose language model sees a smaller picture."""

    image_tokens: ClassVar[int] = 256

    def edit_conditions(self, prompt: str, images: Sequence[Image]) -> dict[str, Tensor]:
        """As `EditEncoders.edit_conditions`, padded to one length for as many images."""
        embeds, _ = self.pipeline_of(QwenImageEditPlusPipeline).encode_prompt(
            [prompt], image=[self._seen(image) for image in images], device=self.device
        )
        return self._padded(embeds, len(images))

    def _source_size(self, image: Image) -> tuple[int, int]:
        return self._sized(image, pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE)

    def _seen(self, image: Image) -> Any:
        size = self._sized(image, pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE)
        return self._resizer().resize(image, *size)

    def _sized(self, image: Image, area: int) -> tuple[int, int]:
        aspect = image.width / image.height
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area, aspect)
        return height, width


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit, 20B."""

    name = "qwen-image-edit"
    pipeline_class = QwenImageEditPipeline
    pipeline_prefix = r"QwenImageEditPipeline\b"
    encoders_class = QwenImageEditEncoders
    encoder_parts = ("text_encoder", "tokenizer", "processor")
    edits = "must"
    text_sees_source = True
    refused_keys = ("use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")

    def encoder_options(self, folder: ModelFolder) -> dict[str, Any]:
        """As `LanguageFamily.encoder_options`: the processor."""
        return {"processor": load_processor(folder)}

    def pipeline_parts(self, folder: ModelFolder) -> dict[str, Any]:
        """As `ModelFamily.pipeline_parts`: the processor, without torchvision, too."""
        return {"processor": load_processor(folder)}

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], config: PrepareConfig
    ) -> dict[str, Any]:
        """As `ModelFamily.prompt_arguments`: these pipelines cut no prompt."""
        return {"prompt": list(prompts)}

    def predict(
        self, denoiser: nn.Module, noised: NoisedPair, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """As `ModelFamily.predict`; texts are cut to the longest of the batch."""
        latents, sources = noised.noisy_latents, of_both_sides(conditions, noised.noisy_latents)
        assert sources, "the family edits"
        rows, channels, height, width = latents.shape
        own = lengths(conditions["prompt_mask"])
        length = max(own)
        mask = None if min(own) == length else conditions["prompt_mask"][:, :length].repeat(2, 1)
        pack = self.pipeline_class._pack_latents
        tokens = pack(latents, rows, channels, height, width)
        sides = [(height, width), *(source.shape[2:] for source in sources)]
        shapes = [(1, h // 2, w // 2) for h, w in sides]
        answer = denoiser(
            hidden_states=torch.cat([tokens, *(pack(s, *s.shape) for s in sources)], dim=1),
            timestep=noised.timesteps.repeat(2),
            encoder_hidden_states=conditions["prompt_embeds"][:, :length]
            .to(latents.dtype)
            .repeat(2, 1, 1),
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * rows,
            return_dict=False,
        )[0][:, : tokens.shape[1]]
        return self.pipeline_class._unpack_latents(answer, height, width, 1).squeeze(2)


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit-2509 and later, 20B."""

    name = "qwen-image-edit-plus"
    pipeline_class = QwenImageEditPlusPipeline
    pipeline_prefix = r"QwenImageEditPlusPipeline\b"
    encoders_class = QwenImageEditPlusEncoders
    most_sources = MOST_SOURCES


def load_processor(folder: ModelFolder) -> Any:
    """Loads the pipeline's processor of texts with images.

    transformers makes none without torchvision, which its part for videos needs; here that part is
    then left away, and images are resized by PIL.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer, Qwen2VLProcessor
    from transformers.utils.import_utils import is_torchvision_available

    part = folder.component("processor")
    with loading(f"{part} could not be loaded"):
        if is_torchvision_available():
            return Qwen2VLProcessor.from_pretrained(part)
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        images = Qwen2VLImageProcessorPil.from_pretrained(part)
        return processor_of_images(images, AutoTokenizer.from_pretrained(part))


def processor_of_images(images: Any, tokenizer: Any) -> Any:
    """Returns a `Qwen2VLProcessor` without its part for videos."""
    from transformers import Qwen2VLProcessor

    processor = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    parts = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
    for kind in ("image", "video"):
        token = f"<|{kind}_pad|>"
        parts[f"{kind}_token"] = token
        parts[f"{kind}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    for name, part in {**parts, "chat_template": None}.items():
        setattr(processor, name, part)
    return processor
