"""What families share that edit images: a source image beside the prompt that says what to change.

The transformer sees the source's tokens behind those of the noisy image, and of its answer the
first part counts. Which size a source gets is the pipeline's rule, whatever size the result has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpo.models.encoders import Encoders, checked
from fastpo.models.schedule import vae_number
from fastpo.system.pictures import UnusableImageError

if TYPE_CHECKING:
    from PIL.Image import Image

SOURCE_LATENTS = "source_latents"
"""The condition that holds the source images' latents, `(B, C, h, w)`, as the model sees them."""

MOST_ASPECT = 50
"""Sides of a source image are at most 1 to this."""


class EditEncoders(Encoders):
    """Encoders of a family that edits."""

    def check_source(self, image: Image) -> None:
        """Refuses a source image that the pipeline does not take.

        Raises:
            UnusableImageError: Its sides are too unlike: resized, one would become 0.
        """
        if max(image.size) > MOST_ASPECT * min(image.size):
            raise UnusableImageError(f"its sides are more than 1 to {MOST_ASPECT}: {image.size}")

    @abstractmethod
    def source_pixels(self, image: Image) -> Tensor:
        """Returns a source image as the pipeline resizes it, `(3, H, W)` in [-1, 1]."""

    def encode_sources(self, pixels: Tensor) -> Tensor:
        """Encodes source images of one size, `(N, 3, H, W)`, to `(N, C, h, w)` float32.

        As in the pipelines this is the posterior's mean, normalized as the noisy latents are.

        Raises:
            NonFiniteLatentsError: The VAE answered with NaN or infinity.
        """
        mean, _ = self.encode_images(pixels)
        shift = vae_number(self.vae.config, "shift_factor", 0.0)
        return (mean - shift) * vae_number(self.vae.config, "scaling_factor", 1.0)

    def edit_conditions(self, prompt: str, image: Image) -> dict[str, Tensor]:
        """Encodes a prompt together with its source image, where the family's texts see that.

        Returns:
            The conditions, each `(1, ...)` with the same sizes for every call.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode_edit(self, prompt: str, image: Image) -> dict[str, Tensor]:
        """As `edit_conditions`.

        Raises:
            ModelError: An encoder answered with NaN or infinity.
        """
        return checked(self.edit_conditions(prompt, image))


def of_both_sides(conditions: Mapping[str, Tensor], like: Tensor) -> Tensor | None:
    """Returns the source latents of winners and losers in the noisy latents' dtype, or None.

    Args:
        conditions: As `ModelFamily.predict` gets them.
        like: The noisy latents `(2B, C, h, w)`.

    Returns:
        `(2B, C, h', w')`.
    """
    source = conditions.get(SOURCE_LATENTS)
    return None if source is None else source.to(like.dtype).repeat(2, 1, 1, 1)
