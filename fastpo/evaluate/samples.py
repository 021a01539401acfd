"""Which images are sampled: a prompt, a seed and, of edits, the images that are edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastpo.config import Config
from fastpo.errors import DataError, one_line
from fastpo.evaluate.prompt_sets import configured_sets
from fastpo.models.folder import digest_files
from fastpo.system.json_text import read_bounded
from fastpo.system.pictures import MOST_IMAGE_BYTES, UnusableImageError, decode


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to make.

    Attributes:
        prompt_index: Position of its prompt among the prompts.
        prompt: The prompt.
        seed: Seed of its generator; no two samples share one.
        sources: Paths of the images that are edited; empty where none is.
    """

    prompt_index: int
    prompt: str
    seed: int
    sources: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Its file's name in a folder of samples."""
        return f"{self.prompt_index:05d}-{self.seed}.png"


def plan_samples(config: Config) -> list[Sample]:
    """Lists what is sampled: `seeds_per_prompt` images of each prompt.

    Prompts are `evaluate.prompts`, those of `evaluate.prompts_file` and `evaluate.prompt_sets`. A
    prompt given twice counts once. Sample i has the seed `first_seed + i`: a seed of its own, so
    that samples of different prompts are independent, which their intervals rest on.

    Raises:
        ConfigError: No prompt is given, a file of prompts is missing or not as published, or a
            prompt is too long.
    """
    rows = [row for one in configured_sets(config) for row in one.rows]
    return list_samples(config, list(dict.fromkeys(rows)))


def list_samples(config: Config, rows: Sequence[tuple[str, tuple[str, ...]]]) -> list[Sample]:
    """Lists `seeds_per_prompt` images of each of some distinct prompts; see `plan_samples`.

    Args:
        config: The experiment.
        rows: Prompts with their source images; see `PromptSet.rows`.
    """
    each, first = config.evaluate.seeds_per_prompt, config.evaluate.first_seed
    return [
        Sample(p, prompt, first + p * each + k, sources)
        for p, (prompt, sources) in enumerate(rows)
        for k in range(each)
    ]


def described(sample: Sample) -> dict[str, Any]:
    """What stands for a sample in a fingerprint: of source images name and content, no folder."""
    row = asdict(sample)
    sources = row.pop("sources")
    return row | {"source": digest_files([*map(Path, sources)])} if sources else row


def opened(path: str) -> Image.Image:
    """Decodes a source image.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return decode(read_bounded(Path(path), MOST_IMAGE_BYTES))
    except (OSError, ValueError, UnusableImageError) as error:
        raise DataError(f"source image {path}: {one_line(error)}") from None
