"""Decoding of images that others made: few formats, bounded sizes, one kind of error."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded; of several frames the first. Other formats' decoders are never called."""
MOST_IMAGE_BYTES = 1 << 28
"""Of one encoded image."""
MOST_PIXELS = 80_000_000
"""Of one image, told by its header before anything is decoded; three bytes each."""
MOST_SIDE = 65_535
"""Pixels of width or height; a JPEG has no more."""


class UnusableImageError(Exception):
    """A pair cannot be used; the text is the reason written to the quarantine.

    Attributes:
        kind: `bad` where an image or the row is at fault; `aspect` or `same` where the two images
            are whole but cannot be compared: shapes that differ, or one image twice.
    """

    def __init__(self, reason: str, kind: Literal["bad", "aspect", "same"] = "bad") -> None:
        super().__init__(reason)
        self.kind: Literal["bad", "aspect", "same"] = kind


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


def _sixteen_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit gray levels to eight bits; PIL's own conversion clips them to white."""
    values = np.asarray(image, dtype=np.float64)
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
