"""From encoded bytes to pixels: decoding, aspect-ratio buckets, one crop for both images of a pair.

Nothing here knows which image won, so nothing of the label can leak into the pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastpo.models.geometry import Geometry

ASPECT_TOLERANCE = 2
"""Largest difference of the two images' aspect ratios, in percent."""


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded; of several frames the first. Other formats' decoders are never called."""
MOST_PIXELS = 80_000_000
"""Of one image, told by its header before anything is decoded; three bytes each."""
MOST_SIDE = 65_535
"""Pixels of width or height; a JPEG has no more."""
MOST_ENLARGED = 4
"""How many times the target's pixels a whole resized image may have before it is cut first."""


class UnusableImageError(Exception):
    """A pair cannot be used; the text is the reason written to the quarantine.

    Attributes:
        kind: `bad` where an image or the row is at fault; `aspect` or `same` where the two images
            are whole but cannot be compared: shapes that differ, or one image twice.
    """

    def __init__(self, reason: str, kind: Literal["bad", "aspect", "same"] = "bad") -> None:
        super().__init__(reason)
        self.kind: Literal["bad", "aspect", "same"] = kind


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


def decode(data: bytes) -> Image.Image:
    """Decodes an image to RGB: EXIF orientation applied, transparency laid over white.

    Raises:
        UnusableImageError: The bytes are not a whole image of `FORMATS`, or it is too large.
        MemoryError: There is none left for it.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS or max(image.size) > MOST_SIDE:
            raise ValueError(
                f"{image.width}x{image.height} are more than {MOST_PIXELS / 1e6:g} megapixels, or "
                f"than {MOST_SIDE} on a side"
            )
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _sixteen_bit(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except MemoryError:  # of the machine, not of the image
        raise
    except UnidentifiedImageError:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UnusableImageError(f"UnidentifiedImageError: no {kinds} image") from None
    except Exception as error:  # PIL's plug-ins raise anything on broken data
        reason = " ".join(str(error).split("<_io", maxsplit=1)[0].split())
        raise UnusableImageError(f"{type(error).__name__}: {reason}") from error


def _decode(read: Callable[[], bytes], name: str) -> Image.Image:
    try:
        return decode(read())
    except OSError as error:
        raise UnusableImageError(f"{name}: unreadable: {error}") from error
    except UnusableImageError as error:
        raise UnusableImageError(f"{name}: {error}") from error


def _sixteen_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit gray levels to eight bits; PIL's own conversion clips them to white."""
    values = np.asarray(image, dtype=np.float64)
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))


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
