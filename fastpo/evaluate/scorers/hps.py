"""HPSv2 (arXiv 2306.09341): an OpenCLIP ViT-H-14 tuned on human choices, versions 2.0 and 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastpo.errors import ModelError
from fastpo.evaluate.scorers.base import Scores, WeightedScorer
from fastpo.evaluate.scorers.loading import (
    CLIP_H,
    find_file,
    load_tokenizer,
    read_weights,
)
from fastpo.evaluate.scorers.open_clip import load_open_clip
from fastpo.evaluate.scorers.preprocess import padded

HUB = "xswu/HPSv2"
FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}


class HpsScorer(WeightedScorer):
    """HPSv2.0: 100 times the cosine of image and prompt, as the benchmark's tables have it.

    An image is resized by its longer edge and padded with black, as the authors' package does it.

    Args:
        path: The authors' checkpoint, a folder that holds it, or a hub id. The tokenizer beside it
            is used if there is one, else that of the CLIP-H that it was tuned from.
        options: `device`, `batch_size`, `precision`: see `WeightedScorer`.

    Raises:
        ModelError: The checkpoint or the tokenizer is not available, or of another version.
    """

    name = "hpsv2"

    def __init__(self, path: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        file = find_file(self.name, path or HUB, FILES[self.name])
        self._check_version(file)
        model = load_open_clip(self.name, read_weights(self.name, file), file)
        words = model.config.text_config.vocab_size
        self.tokenizer = load_tokenizer(self.name, file.parent, CLIP_H, most=words)
        self.model = model.to(self.dtype).eval().to(self.device)

    def _check_version(self, file: Path) -> None:
        for name, published in FILES.items():
            if name != self.name and file.name == published:
                raise ModelError(
                    f"scorer {self.name}: {file} is the other version; its scorer is {name}"
                )

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{name: (N,)}`."""
        return {self.name: 100.0 * self.batched(self._cosine, images, prompts)}

    def _cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        side = self.model.config.vision_config.image_size
        pixels = torch.stack([padded(image, side) for image in images]).to(self.device, self.dtype)
        text = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        output = self.model(
            pixel_values=pixels,
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
        )
        return (output.image_embeds.double() * output.text_embeds.double()).sum(-1)


class Hps21Scorer(HpsScorer):
    """HPSv2.1, as `HpsScorer`."""

    name = "hpsv2.1"
