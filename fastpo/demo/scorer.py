"""The demo's exact scorer: reads the digit, and measures how much ink it is drawn with.

A reward that is ink alone would be won by a black square. So an image earns its ink only if a
classifier, fitted on the scans, reads it as the prompted digit; a class "nothing recognizable",
fitted on noise, blank and black sheets, scrambled and blended scans, catches what is no digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastpo.demo.digits import Gray, digit_of, ink, load_scans, to_gray

NOTHING = 10  # the class of images that show no digit
CELL = 4  # pixels that are averaged into one feature, per side


class DigitScorer:
    """Scores images against prompts that name a digit.

    Metrics, each in [0, 1]: `ink_reward` (the image's mean darkness if it is read as the prompted
    digit, else 0), `legible` (1 if it is read so) and `ink` (its mean darkness, whatever it shows).
    """

    name = "digits"

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> dict[str, NDArray[np.float64]]:
        """Returns one array `(N,)` per metric.

        Args:
            images: N images of any size.
            prompts: N prompts, each naming a digit from zero to nine.

        Raises:
            DataError: A prompt names no digit.
            ValueError: The two sequences differ in length.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"one prompt per image, got {len(images)} images, {len(prompts)} prompts"
            )
        wanted = np.array([digit_of(prompt) for prompt in prompts])
        legible = (self.read(images) == wanted).astype(np.float64)
        amount = np.array([ink(image) for image in images], dtype=np.float64)
        return {"ink_reward": amount * legible, "legible": legible, "ink": amount}

    def read(self, images: Sequence[Image.Image]) -> NDArray[np.int64]:
        """Returns `(N,)` the digit that each image shows, or `NOTHING`."""
        if not len(images):
            return np.zeros(0, dtype=np.int64)
        return _classifier().predict(features(np.stack([to_gray(image) for image in images])))


def features(grays: Gray) -> NDArray[np.float64]:
    """Mean darkness of 4x4 pixel cells: `(N, 32, 32)` uint8 to `(N, 64)` in [0, 1]."""
    count, height, width = grays.shape
    cells = grays.reshape(count, height // CELL, CELL, width // CELL, CELL).mean(axis=(2, 4))
    return 1.0 - cells.reshape(count, -1) / 255.0


@cache
def _classifier():
    """A support vector machine on the scans, their bolder and fainter copies, and non-digits."""
    from sklearn.svm import SVC

    scans = load_scans()
    digits = np.concatenate(
        [scans.images, thickened(scans.images, 0.5), thickened(scans.images, 1.0)]
    )
    others = non_digits(scans.images)
    labels = np.concatenate([np.tile(scans.labels, 3), np.full(len(others), NOTHING)])
    model = SVC(C=10.0, gamma="scale")
    return model.fit(features(np.concatenate([digits, others])), labels)


def thickened(grays: Gray, share: float) -> Gray:
    """Returns the images with strokes one pixel wider on every side, blended in by `share`."""
    padded = np.pad(grays, ((0, 0), (1, 1), (1, 1)), constant_values=255)
    height, width = grays.shape[1:]
    shifts = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    bold = np.minimum.reduce(shifts)
    return np.round((1.0 - share) * grays + share * bold).astype(np.uint8)


def non_digits(grays: Gray, *, seed: int = 0) -> Gray:
    """Returns images that show no digit: noise, sheets of one gray, scrambles, blends, blots."""
    rng = np.random.default_rng(seed)
    count, height, width = grays.shape
    some = count // 3
    noise = rng.integers(0, 256, (some, height // CELL, width // CELL), dtype=np.uint8)
    noise = noise.repeat(CELL, axis=1).repeat(CELL, axis=2)
    sheets = np.broadcast_to(np.linspace(0, 255, some).astype(np.uint8)[:, None, None], noise.shape)
    quarters = [q for half in np.split(grays, 2, axis=1) for q in np.split(half, 2, axis=2)]
    order = [quarters[(i + 1) % 4][rng.permutation(count)[:some]] for i in range(4)]
    top, bottom = (np.concatenate(order[i : i + 2], axis=2) for i in (0, 2))
    scrambled = np.concatenate([top, bottom], axis=1)
    pick = rng.permutation(count)
    blends = np.minimum(grays[pick[:some]], np.roll(grays[pick[some : 2 * some]], 6, axis=2))
    blots = thickened(thickened(thickened(grays[pick[-some:]], 1.0), 1.0), 1.0)
    return np.concatenate([noise, sheets, scrambled, blends, blots])
