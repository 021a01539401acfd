"""LAION's aesthetic predictor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastpo.errors import ConfigError, ModelError
from fastpo.evaluate.scorers.base import Scores, WeightedScorer
from fastpo.evaluate.scorers.head import Layers, apply_layers, linear_layers
from fastpo.evaluate.scorers.loading import CLIP, load_clip, load_processor, read_weights
from fastpo.system.files import user_path

HEAD = "sac+logos+ava1-l14-linearMSE.pth"


class AestheticScorer(WeightedScorer):
    """LAION's aesthetic predictor: linear layers on CLIP ViT-L/14's image embedding; no prompt.

    Args:
        head: The head's weights, `sac+logos+ava1-l14-linearMSE.pth`, or a folder that holds them.
        clip: A folder or hub id of the CLIP the head was trained on; default: the folder of `head`
            if it has a CLIP's files, else `openai/clip-vit-large-patch14`.
        options: `device`, `batch_size`, `precision`: see `WeightedScorer`.

    Raises:
        ConfigError: No head was given.
        ModelError: The head or CLIP is not available, or they do not fit together.
    """

    name = "aesthetic"
    reads_prompts = False

    def __init__(self, head: str = "", clip: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not head:
            raise ConfigError(
                "evaluate.scorers: aesthetic needs the head's weights: "
                "aesthetic:/path/to/sac+logos+ava1-l14-linearMSE.pth"
            )
        place = user_path(head)
        file = place / HEAD if place.is_dir() else place
        if not file.is_file():
            raise ModelError(
                f"scorer aesthetic: no such file: {file}. The head is published as {HEAD} with the "
                "improved-aesthetic-predictor repository"
            )
        if clip is None:
            clip = str(place) if (place / "config.json").is_file() else CLIP
        self.model = load_clip(self.name, clip, self.device, self.dtype)
        self.processor = load_processor(self.name, clip, self.model, clip)
        self.layers = _load_head(file, self.model.config.projection_dim)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{"aesthetic": (N,)}`."""
        return {self.name: self.batched(self._rating, images, prompts)}

    def _rating(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        rgb = [image.convert("RGB") for image in images]
        inputs = self.processor(images=rgb, return_tensors="pt").to(self.device, dtype=self.dtype)
        pooled = self.model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        features = self.model.visual_projection(pooled).double()
        return apply_layers(self.layers, torch.nn.functional.normalize(features, dim=-1))


def _load_head(file: Path, width: int) -> Layers:
    """Reads the head and checks that it fits CLIP's features."""
    state = read_weights("aesthetic", file)
    try:
        return linear_layers(state, width)
    except ValueError as error:
        raise ModelError(
            f"scorer aesthetic: {file} does not fit CLIP's features: {error}"
        ) from None
