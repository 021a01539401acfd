"""Images as the published scorers see them, where transformers has no processor for it.

The steps are those of torchvision's transforms of the same name.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that OpenAI's CLIP was trained on; BLIP and OpenCLIP use the same."""


def cropped(image: Image.Image, side: int) -> Tensor:
    """Returns `(3, side, side)`: the shorter edge resized (bicubic), the center cut out.

    Args:
        image: Any image.
        side: Height and width of the result in pixels.
    """
    width, height = image.size
    short, long = sorted((width, height))
    longer = int(side * long / short)
    size = (side, longer) if width <= height else (longer, side)
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return normalized(to_tensor(image.crop((left, top, left + side, top + side))))


def padded(image: Image.Image, side: int) -> Tensor:
    """Returns `(3, side, side)`: the longer edge resized (bicubic), the rest black on both sides.

    Args:
        image: Any image.
        side: Height and width of the result in pixels.
    """
    pixels = to_tensor(image.convert("RGB"))
    scale = side / max(pixels.shape[1:])
    if scale != 1.0:
        size = [round(length * scale) for length in pixels.shape[1:]]
        pixels = torch.nn.functional.interpolate(
            pixels[None], size=size, mode="bicubic", antialias=True, align_corners=False
        )[0]
        rows, columns = (side - length for length in size)
        edges = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        pixels = torch.nn.functional.pad(pixels, edges)
    return normalized(pixels)


def to_tensor(image: Image.Image) -> Tensor:
    """Returns `(3, H, W)` float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def normalized(pixels: Tensor) -> Tensor:
    """Subtracts the mean of each channel and divides by its deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std
