"""The color world's exact scorer: which emoji is it, how colorful, and in which style.

Color alone would be won by a red sheet, and style B by any flat blot. So both count only if the
image is recognized: among all drawn names, the prompted one's pictures must be among those of the
few names that the image is most like.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastpo.study.emoji.judge import StyleJudge
from fastpo.study.emoji.pictures import (
    STYLES,
    Pictures,
    Pixels,
    Variation,
    color,
    from_tensor,
    to_pixels,
    to_tensor,
    vary,
)
from fastpo.study.emoji.text import name_of

FEW = 3  # names among which the prompted one must be
CELLS = 8  # a side: what of an image is compared
KNOWN_SCALES = (0.8, 0.9, 1.0)
KNOWN_STRENGTHS = (0.5, 1.0, 1.5)


class EmojiScorer:
    """Scores images against prompts that end with an emoji's name.

    Metrics, each in [0, 1]: `emoji_reward`, what the preferences ask for: `(1 - m)` times the color
    plus `m` times the style at a mismatch m, of a recognized image, else 0; `legible` (1 if it is
    recognized); `color_reward` and `style_reward`, either of a recognized image, else 0; `color`
    and `style`, whatever it shows.

    Args:
        pictures: All drawn names.
        judge: Tells the styles apart.
        mismatch: The share of preferences for style B.
    """

    name = "emoji"

    def __init__(self, pictures: Pictures, judge: StyleJudge, mismatch: float) -> None:
        self._names, self._judge, self._mismatch = pictures.names, judge, mismatch
        self._size = pictures.styles[STYLES[0]].shape[1]
        self._known = _templates(pictures)

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> dict[str, NDArray[np.float64]]:
        """Returns one array `(N,)` per metric.

        Args:
            images: N images of any size.
            prompts: N prompts, each ending with a drawn name.

        Raises:
            DataError: A prompt ends with no drawn name.
            ValueError: The two sequences differ in length.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"one prompt per image, got {len(images)} images, {len(prompts)} prompts"
            )
        wanted = np.array([name_of(prompt, self._names) for prompt in prompts], dtype=np.int64)
        if not len(images):
            return dict.fromkeys(METRICS, np.zeros(0))
        pixels = to_pixels(images, self._size)
        place = self.places(pixels)[np.arange(len(wanted)), wanted]
        legible = (place < FEW).astype(np.float64)
        amount, style = color(pixels), self._judge.style_b(pixels)
        reward = (1.0 - self._mismatch) * amount + self._mismatch * style
        values = (reward * legible, legible, amount * legible, style * legible, amount, style)
        return dict(zip(METRICS, values, strict=True))

    def places(self, pixels: Pixels) -> NDArray[np.int64]:
        """Returns `(N, names)`: each name's place, from 0, by likeness to each image."""
        likeness = features(pixels) @ self._known.T
        best = likeness.reshape(len(pixels), len(self._names), -1).max(axis=2)
        return (-best).argsort(axis=1).argsort(axis=1)


METRICS = ("emoji_reward", "legible", "color_reward", "style_reward", "color", "style")


def features(pixels: Pixels) -> NDArray[np.float64]:
    """The distance from white in 8x8 cells, of unit length: `(N, S, S, 3)` to `(N, 192)`."""
    count, size = pixels.shape[:2]
    cell = size // CELLS
    cells = pixels.reshape(count, CELLS, cell, CELLS, cell, 3).mean(axis=(2, 4))
    flat = 1.0 - cells.reshape(count, -1) / 255.0
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)


def _templates(pictures: Pictures) -> NDArray[np.float64]:
    """Features of each name in both styles, some sizes and strengths of color, name by name."""
    one = torch.ones(len(pictures))
    variants = []
    for style, scale, strength in product(STYLES, KNOWN_SCALES, KNOWN_STRENGTHS):
        how = Variation(strength * one, scale * one, 0.0 * one, 0.0 * one)
        variants.append(features(from_tensor(vary(to_tensor(pictures.styles[style]), how))))
    return np.stack(variants, axis=1).reshape(len(pictures) * len(variants), -1)
