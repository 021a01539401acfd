"""FLUX.1-Kontext-dev: FLUX.1 that edits a source image as the prompt says.

Beside FLUX.1's conditions it is told `source_latents` `(B, C, h, w)`. Their tokens follow those of
the noisy image, with 1 in the first place of their ids, and their part of the answer is left away.
The source is resized to the preferred size whose aspect is nearest, of about a megapixel, whatever
the size of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from torch import Tensor

from fastpo.models.edits import EditEncoders
from fastpo.models.flux import Flux, FluxEncoders

if TYPE_CHECKING:
    from PIL.Image import Image


class FluxKontextEncoders(FluxEncoders, EditEncoders):
    """FLUX.1's, which also encode source images."""

    def source_pixels(self, image: Image) -> Tensor:
        """As `EditEncoders.source_pixels`."""
        multiple = 2 * self.vae_factor
        processor = VaeImageProcessor(vae_scale_factor=multiple)
        height, width = processor.get_default_height_width(image)
        aspect = width / height
        _, width, height = min(
            (abs(aspect - w / h), w, h)
            for w, h in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
        )
        height, width = (side // multiple * multiple for side in (height, width))
        resized: Any = processor.resize(image, height, width)
        return processor.preprocess(resized, height, width)[0]


class FluxKontext(Flux):
    """FLUX.1-Kontext-dev, and what was fine-tuned from it."""

    name = "flux-kontext"
    model_name = "FLUX.1-Kontext-dev"
    pipeline_class = FluxKontextPipeline
    pipeline_prefix = r"FluxKontextPipeline\b"
    encoders_class = FluxKontextEncoders
    edits = "must"

    def edit_arguments(self, images: Sequence[Any], height: int, width: int) -> dict[str, Any]:
        """As `ModelFamily.edit_arguments`; the pipeline would make the result a megapixel."""
        return {**super().edit_arguments(images, height, width), "max_area": height * width}
