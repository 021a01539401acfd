"""What families share that edit images: source images beside the prompt that says what to change.

The transformer sees the sources' tokens, in their order, behind those of the noisy image, and of
its answer the first part counts. Which size a source gets is the pipeline's rule, whatever size the
result and the other sources have.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpo.models.encoders import Encoders, checked
from fastpo.models.schedule import vae_number
from fastpo.system.pictures import UnusableImageError

if TYPE_CHECKING:
    from PIL.Image import Image

SOURCE_LATENTS = "source_latents"
"""The condition that holds the source images' latents, `(B, C, h, w)`, as the model sees them; that
of second source images is `source_latents_2`, and so on."""

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

    def edit_conditions(self, prompt: str, images: Sequence[Image]) -> dict[str, Tensor]:
        """Encodes a prompt together with its source images, where the family's texts see them.

        Returns:
            The conditions, each `(1, ...)` with the same sizes for every call of as many images.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode_edit(self, prompt: str, images: Sequence[Image]) -> dict[str, Tensor]:
        """As `edit_conditions`.

        Raises:
            ModelError: An encoder answered with NaN or infinity.
        """
        return checked(self.edit_conditions(prompt, images))


def source_condition(place: int) -> str:
    """Returns the name of the condition with the latents of the sources at a place, from 0."""
    return SOURCE_LATENTS if place == 0 else f"{SOURCE_LATENTS}_{place + 1}"


def of_both_sides(conditions: Mapping[str, Tensor], like: Tensor) -> list[Tensor]:
    """Returns the source latents of winners and losers in the noisy latents' dtype.

    Args:
        conditions: As `ModelFamily.predict` gets them.
        like: The noisy latents `(2B, C, h, w)`.

    Returns:
        For each place `(2B, C, h', w')`; nothing where the pairs begin from no image.
    """
    names = takewhile(conditions.__contains__, map(source_condition, count()))
    return [conditions[name].to(like.dtype).repeat(2, 1, 1, 1) for name in names]
