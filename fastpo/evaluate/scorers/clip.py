"""Scores of image and prompt by CLIP models: agreement, PickScore, quality, diversity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastpo.errors import ConfigError, ModelError
from fastpo.evaluate.scorers.base import Scores, WeightedScorer
from fastpo.evaluate.scorers.loading import CLIP, CLIP_H, PICKSCORE, load_clip, load_processor
from fastpo.system.files import user_path

PUBLIC_CLIPS = ("openai/clip-", "laion/CLIP-")


class ClipScorer(WeightedScorer):
    """Agreement of image and prompt by CLIP: 100 times the cosine of the two embeddings.

    Args:
        path: A folder or hub id of a CLIP model with its processor.
        options: `device`, `batch_size`, `precision`: see `WeightedScorer`.

    Raises:
        ModelError: The model or its processor is not available.
    """

    name = "clip"
    default_path = CLIP

    def __init__(self, path: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        path = path or self.default_path
        self.check_path(path)
        self.model = load_clip(self.name, path, self.device, self.dtype)
        self.processor = load_processor(self.name, self.processor_path(path), self.model, path)

    def check_path(self, path: str) -> None:
        """Refuses what is known to be another model; any CLIP serves here."""

    def processor_path(self, path: str) -> str:
        """Where the processor of the model at `path` is: a folder or hub id."""
        return path

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{name: (N,)}`."""
        return {self.name: self.scale() * self.batched(self._cosine, images, prompts)}

    def scale(self) -> float:
        """What the cosine is multiplied by."""
        return 100.0

    def _cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        inputs = self.processor(
            text=list(prompts),
            images=[image.convert("RGB") for image in images],
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device, dtype=self.dtype)  # tokens stay integers
        output = self.model(**inputs)  # both embeddings have unit length
        return (output.image_embeds.double() * output.text_embeds.double()).sum(-1)


class PickScorer(ClipScorer):
    """PickScore (arXiv 2305.01569): a CLIP-H tuned on human choices; temperature times cosine.

    The published scale, about 20 to 24. A folder without a processor uses that of the CLIP it was
    tuned from. Other CLIPs are refused as far as they can be told.

    Args:
        path: A folder or hub id.
        options: `device`, `batch_size`, `precision`: see `WeightedScorer`.

    Raises:
        ModelError: The model or its processor is not available.
    """

    name = "pickscore"
    default_path = PICKSCORE

    def check_path(self, path: str) -> None:
        """Refuses public CLIPs, whose scores would be called PickScore's.

        Raises:
            ModelError: It is the CLIP that PickScore was tuned from, or another one, by its hub id,
                its folder in the hub's cache or OpenCLIP's configuration beside the weights.
        """
        folder = user_path(path)
        names = [path, *(p.removeprefix("models--").replace("--", "/") for p in folder.parts)]
        known = any(name.startswith(PUBLIC_CLIPS) for name in names)
        if known or (folder / "open_clip_config.json").is_file():
            raise ModelError(
                f"scorer pickscore: {path} holds CLIP, not PickScore, whose weights are "
                f"{PICKSCORE}; to score by CLIP itself: evaluate.scorers: [clip:{path}]"
            )

    def processor_path(self, path: str) -> str:
        """The folder itself if it has a processor, else that of the CLIP it was tuned from."""
        files = ("processor_config.json", "preprocessor_config.json")
        own = any((user_path(path) / name).is_file() for name in files)
        return path if own else CLIP_H

    def scale(self) -> float:
        """The temperature learned with the model."""
        return self.model.logit_scale.exp().item()


class QualityScorer(ClipScorer):
    """CLIP-IQA (arXiv 2207.12396): how much rather an image is a good photo than a bad one.

    With c the cosine of image and text and t the model's temperature: the softmax of `t c` over
    "Good photo." and "Bad photo.", of which the first share is returned, in [0, 1]. No reference
    image and no prompt. The authors use CLIP's RN50, whose values differ from a ViT's.

    Args:
        path: A folder or hub id of a CLIP model with its processor.
        options: `device`, `batch_size`, `precision`: see `WeightedScorer`.

    Raises:
        ModelError: The model or its processor is not available.
    """

    name = "clip_iqa"
    reads_prompts = False
    anchors = ("Good photo.", "Bad photo.")

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{"clip_iqa": (N,)}`."""
        return {self.name: self.batched(self._quality, images, prompts)}

    def _quality(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        inputs = self.processor(
            text=list(self.anchors),
            images=[image.convert("RGB") for image in images],
            padding=True,
            return_tensors="pt",
        ).to(self.device, dtype=self.dtype)
        output = self.model(**inputs)
        cosines = output.image_embeds.double() @ output.text_embeds.double().T
        return (self.model.logit_scale.double().exp() * cosines).softmax(dim=-1)[:, 0]


class DiversityScorer(ClipScorer):
    """How far an image is from the others of its prompt: mean of 1 - cosine of CLIP's embeddings.

    Its mean over the images of a prompt is the mean pairwise distance within the prompt. It falls
    where a model answers each seed with the same image, as over-optimized models do.

    Args:
        path: A folder or hub id of a CLIP model with its processor.
        options: `device`, `batch_size`, `precision`: see `WeightedScorer`.

    Raises:
        ModelError: The model or its processor is not available.
    """

    name = "diversity"
    needs_groups = True

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{"diversity": (N,)}` in [0, 2].

        Raises:
            ConfigError: A prompt has a single image.
        """
        embedded = self.batched(self._embedded, images, prompts)
        distances = np.zeros(len(images))
        names = np.array(prompts, dtype=object)
        for prompt in dict.fromkeys(prompts):
            own = np.flatnonzero(names == prompt)
            if len(own) < 2:
                raise ConfigError(
                    f"scorer diversity: {prompt!r} has a single image, two of each prompt are "
                    "needed (evaluate.seeds_per_prompt)"
                )
            cosines = embedded[own] @ embedded[own].T
            others = cosines.sum(axis=1) - np.diagonal(cosines)
            distances[own] = 1.0 - others / (len(own) - 1)
        return {self.name: distances}

    def _embedded(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        rgb = [image.convert("RGB") for image in images]
        inputs = self.processor(images=rgb, return_tensors="pt").to(self.device, dtype=self.dtype)
        pooled = self.model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled).double(), dim=-1)
