"""Scikit-learn's handwritten digits as 32x32 images, their captions, and how much ink they hold.

The 1,797 scans come as 8x8 counts of inked dots (0 to 16). One cell of blank paper is put round
each, then a bicubic enlargement to 32x32 and a steeper contrast turn the counts into dark strokes
on white paper: a legible digit with room to grow bolder. `prompts(held_out=True)` are wordings
that the base knows but that no preference was given for: they are for evaluation alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastpo.errors import DataError

SIZE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "the digit {}",
    "a {} in black ink on white paper",
    "handwriting: {}",
    "a scan of the number {}",
    "someone wrote a {}",
)
HELD_OUT_TEMPLATES = (
    "the digit {}, written by hand",
    "a photo of a handwritten {}",
    "the number {} in ink",
    "one pen stroke spells {}",
)
CONTRAST = 2.0  # steepness of the stroke's edge after the enlargement
HELD_OUT_EVERY = 5  # one scan in five is kept from the base, the preferences and the classifier

Gray = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scans:
    """Gray images and what they show.

    Attributes:
        images: `(N, 32, 32)` uint8, 255 is paper and 0 is ink.
        labels: `(N,)` int64, 0 to 9.
    """

    images: Gray
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Returns N."""
        return len(self.labels)


@cache
def load_scans(*, held_out: bool = False) -> Scans:
    """Returns four fifths of the scans, or with `held_out` the other fifth; the split is fixed."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    counts, labels = np.asarray(bunch.images), np.asarray(bunch.target, dtype=np.int64)
    chosen = (np.arange(len(labels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out
    images = np.stack([_enlarge(cell) for cell in counts[chosen]])
    images.setflags(write=False)
    return Scans(images, labels[chosen])


def _enlarge(counts: NDArray[np.float64]) -> Gray:
    """Turns one 8x8 scan of ink counts into a 32x32 image of dark strokes on white paper."""
    padded = np.pad(counts / 16.0, 1).astype(np.float32)
    smooth = np.asarray(Image.fromarray(padded).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    stroke = np.clip((smooth - 0.5) * CONTRAST + 0.5, 0.0, 1.0)
    return np.round((1.0 - stroke) * 255.0).astype(np.uint8)


def to_image(gray: Gray) -> Image.Image:
    """Returns one gray scan as the RGB image that the pipeline knows."""
    return Image.fromarray(gray).convert("RGB")


def to_gray(image: Image.Image) -> Gray:
    """Returns any image as `(32, 32)` uint8 gray, averaged down or up where its size differs."""
    gray = image.convert("L")
    if gray.size != (SIZE, SIZE):
        gray = gray.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(gray, dtype=np.uint8)


def ink(image: Image.Image) -> float:
    """Returns the mean darkness of all pixels: 0 is blank paper, 1 is a black sheet.

    The scans hold 0.20 on average; within one digit they vary by 0.02 (standard deviation).
    """
    return float(1.0 - to_gray(image).mean() / 255.0)


def prompts(*, held_out: bool = False) -> list[str]:
    """Returns the ten digits in every wording for preferences, or in those held out."""
    templates = HELD_OUT_TEMPLATES if held_out else TEMPLATES
    return [template.format(word) for template in templates for word in WORDS]


def digit_of(prompt: str) -> int:
    """Returns the digit that a prompt asks for: the last digit word in it.

    Raises:
        DataError: The prompt names no digit.
    """
    found = re.findall(rf"\b({'|'.join(WORDS)})\b", prompt.lower())
    if not found:
        raise DataError(f"the prompt names no digit (zero to nine): {prompt!r}")
    return WORDS.index(found[-1])
