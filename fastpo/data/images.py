"""From encoded bytes to pixels: decoding, aspect-ratio buckets, one crop for both images of a pair.

Nothing here knows which image won, so nothing of the label can leak into the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastpo.models.geometry import Geometry
from fastpo.system.pictures import UnusableImageError as UnusableImageError
from fastpo.system.pictures import decode as decode

ASPECT_TOLERANCE = 2
"""Largest difference of the two images' aspect ratios, in percent."""


MOST_ENLARGED = 4
"""How many times the target's pixels a whole resized image may have before it is cut first."""


@dataclass(frozen=True)
class PairImages:
    """Both images of a pair at their bucket's size.

    Attributes:
        pixels: `(2, 3, H, W)` uint8, first the one given first.
        add_time_ids: Original height and width, crop top and left (in resized pixels), target
            height and width: SDXL's size conditioning, the same for both images.
    """

    pixels: Tensor
    add_time_ids: tuple[int, int, int, int, int, int]


def load_pair(
    first: Callable[[], bytes], second: Callable[[], bytes], geometry: Geometry
) -> PairImages:
    """Decodes two images, resizes both to one size and crops both at the same place.

    The bucket follows from the mean aspect ratio. The original size is the smaller image's.

    Raises:
        UnusableImageError: An image is missing, corrupt or too large, or the aspect ratios differ
            too much.
        MemoryError: There is none left for them.
    """
    images = [_decode(read, name) for read, name in ((first, "winner"), (second, "loser"))]
    one, other = images
    aspects = sorted((one.width * other.height, other.width * one.height))
    if 100 * aspects[1] > (100 + ASPECT_TOLERANCE) * aspects[0]:
        sizes = " and ".join(f"{image.width}x{image.height}" for image in images)
        text = f"aspect ratios differ by more than {ASPECT_TOLERANCE} %: {sizes}"
        raise UnusableImageError(text, "aspect")
    width, height = min((i.size for i in images), key=lambda s: (s[0] * s[1], s))
    mean_aspect = math.sqrt(one.width * other.width / (one.height * other.height))
    target = geometry.bucket_for(mean_aspect)
    scale = max(target[0] / height, target[1] / width)
    resized = (max(target[0], round(height * scale)), max(target[1], round(width * scale)))
    top, left = (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2
    pixels = np.stack([_resize_crop(image, resized, (top, left), target) for image in images])
    return PairImages(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), (height, width, top, left, *target)
    )


def to_model_range(pixels: Tensor) -> Tensor:
    """Returns uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def _decode(read: Callable[[], bytes], name: str) -> Image.Image:
    try:
        return decode(read())
    except OSError as error:
        raise UnusableImageError(f"{name}: unreadable: {error}") from error
    except UnusableImageError as error:
        raise UnusableImageError(f"{name}: {error}") from error


def _resize_crop(
    image: Image.Image, size: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]
) -> np.ndarray:
    """Resizes to `size` and cuts `target` at `corner`; all as (vertical, horizontal).

    Of a long strip, which would become very large, only what is kept is resized.
    """
    (height, width), (top, left) = size, corner
    if height * width > MOST_ENLARGED * target[0] * target[1]:
        across, down = image.width / width, image.height / height
        right, bottom = left + target[1], top + target[0]
        box = (left * across, top * down, right * across, bottom * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        shape = (target[1], target[0])
        return np.asarray(image.resize(shape, Image.Resampling.LANCZOS, box=box))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image.crop((left, top, left + target[1], top + target[0])))
