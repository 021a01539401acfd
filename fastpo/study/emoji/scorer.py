"""The color world's exact scorer: which emoji is it, how colorful, and in which style.

Color alone would be won by a red sheet. So color and style count only if the image is recognized:
among all drawn names, the prompted one must be among the few that the image is most like. The style
is how near the image is to the prompted name's picture in style B, and how far from that in style
A.

    python -m fastpo.study.emoji.scorer BASE

tells how often that is right on the held-out names, varied as no picture is that it compares with,
before and after the autoencoder of a study's `base/emoji-32/base`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image

from fastpo.study.emoji.pictures import (
    STYLES,
    Pictures,
    Pixels,
    Variation,
    color,
    draw_variation,
    from_tensor,
    read_pictures,
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

    The style is `a / (a + b)`, where `a` and `b` are one minus the cosine between the image and the
    most alike variant of the name's picture in style A and in style B: 0 is A's picture, 1 is B's.

    Args:
        pictures: All drawn names.
        mismatch: The share of preferences for style B.
    """

    name = "emoji"

    def __init__(self, pictures: Pictures, mismatch: float) -> None:
        self._names, self._mismatch = pictures.names, mismatch
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
        likeness = self.likeness(pixels)
        own = likeness[np.arange(len(wanted)), :, wanted]  # (N, 2)
        better = likeness.max(axis=1) > own.max(axis=1, keepdims=True)
        legible = (better.sum(axis=1) < FEW).astype(np.float64)
        amount, style = color(pixels), nearer(own)
        reward = (1.0 - self._mismatch) * amount + self._mismatch * style
        values = (reward * legible, legible, amount * legible, style * legible, amount, style)
        return dict(zip(METRICS, values, strict=True))

    def likeness(self, pixels: Pixels) -> NDArray[np.float64]:
        """Returns `(N, 2, names)` the cosine to each name's most alike variant in both styles."""
        cosines = features(pixels) @ self._known.T
        return cosines.reshape(len(pixels), len(STYLES), len(self._names), -1).max(axis=3)


def nearer(own: NDArray[np.float64]) -> NDArray[np.float64]:
    """From `(N, 2)` cosines to A and B: `(N,)` the style, 0 at A's picture and 1 at B's."""
    a, b = (1.0 - own + 1e-9).T
    return a / (a + b)


METRICS = ("emoji_reward", "legible", "color_reward", "style_reward", "color", "style")


def features(pixels: Pixels) -> NDArray[np.float64]:
    """The distance from white in 8x8 cells, of unit length: `(N, S, S, 3)` to `(N, 192)`."""
    count, size = pixels.shape[:2]
    cell = size // CELLS
    cells = pixels.reshape(count, CELLS, cell, CELLS, cell, 3).mean(axis=(2, 4))
    flat = 1.0 - cells.reshape(count, -1) / 255.0
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)


def _templates(pictures: Pictures) -> NDArray[np.float64]:
    """Features in some sizes and strengths of color: style by style, name by name, all variants."""
    one = torch.ones(len(pictures))
    styles = []
    for style in STYLES:
        variants = []
        for scale, strength in product(KNOWN_SCALES, KNOWN_STRENGTHS):
            how = Variation(strength * one, scale * one, 0.0 * one, 0.0 * one)
            variants.append(features(from_tensor(vary(to_tensor(pictures.styles[style]), how))))
        styles.append(np.stack(variants, axis=1))
    return np.stack(styles).reshape(-1, variants[0].shape[1])


@torch.no_grad()
def accuracy(pictures: Path, vae: AutoencoderKL, *, draws: int = 8) -> dict[str, float]:
    """Measures how often the style of a held-out name's variant is told.

    Args:
        pictures: Folder that `write_pictures` wrote.
        vae: The base's autoencoder.
        draws: Variants of each picture.

    Returns:
        The share that is right of the variants as they are, `pictures`, and of what the autoencoder
        makes of them, `decoded`; and the share of the latter that is `legible`.
    """
    scorer = EmojiScorer(read_pictures(pictures), 1.0)
    held_out = read_pictures(pictures, held_out=True)
    generator = torch.Generator().manual_seed(0)
    prompts = draws * held_out.names
    found: dict[str, list[float]] = {"pictures": [], "decoded": [], "legible": []}
    for label, style in enumerate(STYLES):
        images = to_tensor(held_out.styles[style]).repeat(draws, 1, 1, 1)
        images = vary(images, draw_variation(len(images), generator))
        latents = vae.encode(images).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        decoded = vae.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
        for key, shown in (("pictures", images), ("decoded", decoded)):
            listed = [Image.fromarray(p) for p in from_tensor(shown)]
            scores = scorer.score(listed, prompts)
            found[key] += list((scores["style"] > 0.5) == bool(label))
        found["legible"] += list(scores["legible"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def main() -> None:
    """Prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="the base's folder, with `pictures` beside it")
    base = parser.parse_args().base
    vae = AutoencoderKL.from_pretrained(base / "vae")
    for key, share in accuracy(base.parent / "pictures", vae).items():
        print(f"{key} {share:.3f}")


if __name__ == "__main__":
    main()
