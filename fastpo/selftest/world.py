"""The small world that faults are tried on: a tiny SDXL, 24 pairs, and the commands that use them.

    model/    the pipeline
    data/     24 pairs, one of them with half an image
    whole/    cache/, lora/, full/: what the commands made without any fault

A place is a folder laid out as `whole/`: what a command reads there and writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from fastpo.config import Config

Stage = Literal["prepare", "reference", "lora", "full", "evaluate"]
STAGES: tuple[Stage, ...] = ("prepare", "reference", "lora", "full", "evaluate")
TRAININGS: tuple[Stage, ...] = ("lora", "full")
PAIRS, VISITS = 24, 2
STEPS = {"lora": 6, "full": 5}
CHECKPOINT_EVERY = 2


@dataclass(frozen=True)
class World:
    """Where the parts of the world lie.

    Attributes:
        folder: Its folder.
    """

    folder: Path

    @property
    def whole(self) -> Path:
        """What the stages made without any fault."""
        return self.folder / "whole"

    def config(self, stage: Stage, place: Path) -> Config:
        """The configuration of a command on a place: its cache, and its run in `lora` or `full`.

        A place without a cache of its own reads the whole one.
        """
        from fastpo.config import parse_config

        own, method = place / "cache", "full" if stage == "full" else "lora"
        makes_it = stage in ("prepare", "reference")
        cache = own if makes_it or own.exists() else self.whole / "cache"
        return parse_config(_raw_config(self.folder, cache, place / method, method))

    def copy(self, source: str, part: str, place: Path) -> None:
        """Copies a part of `whole` or `stopped` into a place: `cache`, `lora` or `full`."""
        shutil.copytree(self.folder / source / part, place / part)

    def lay_out(self, stage: Stage, place: Path) -> None:
        """Copies into an empty place what a command writes beside."""
        place.mkdir(parents=True)
        if stage == "reference":
            ignored = shutil.ignore_patterns("reference", ".claims")
            shutil.copytree(self.whole / "cache", place / "cache", ignore=ignored)
        elif stage == "evaluate":
            ignored = shutil.ignore_patterns("evaluation", "checkpoints")
            shutil.copytree(self.whole / "lora", place / "lora", ignore=ignored)


def _raw_config(folder: Path, cache: Path, output: Path, method: str) -> dict[str, Any]:
    lora = method == "lora"
    adaptive = {"name": "adaptive_dpo", "beta": 500.0}
    annotators = {"kind": "ledger"} if lora else {"kind": "ema", "decays": [0.9, 0.5]}
    return {
        "seed": 7,
        "model": {"path": str(folder / "model")},
        "data": {"source": "folder", "path": str(folder / "data"), "flip_rate": 0.25},
        "prepare": {
            "cache_dir": str(cache),
            "resolution": 32,
            "shard_size": 8,
            "store_precision": "fp32",
            "workers": 0,
        },
        "train": {
            "output_dir": str(output),
            "method": method,
            **({"lora": {"rank": 4, "target_modules": ["to_q"]}} if lora else {}),
            "objective": adaptive,
            "annotators": annotators,
            "reference": "cached" if lora else "live",
            "statistics": "processes" if lora else "running",
            "optim": {"lr": 1e-3},
            "max_steps": STEPS[method],
            "micro_batch_size": 4,
            "precision": "fp32",
            "ema_decay": 0.9 if lora else None,
            "checkpoint_every": CHECKPOINT_EVERY,
            "trackers": [],
            "loader_workers": 1,
        },
        "evaluate": {
            "prompts": ["prompt 0", "prompt 1"],
            "seeds_per_prompt": 1,
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            "scorers": [Brightness.name],
        },
    }


class Brightness:
    """A scorer without a model: the mean of all pixels."""

    name = "brightness"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
        """Returns `{"brightness": (N,)}`, from 0 to 255."""
        return {self.name: np.array([np.asarray(image, dtype=float).mean() for image in images])}


def make_model_and_data(folder: Path) -> None:
    """Writes a tiny SDXL, and 24 pairs of which one has a broken image."""
    from fastpo.testing import tiny_sdxl_folder, write_folder

    tiny_sdxl_folder(folder / "model")
    write_folder(folder / "data", PAIRS)
    broken = folder / "data" / "winner5.png"
    broken.write_bytes(broken.read_bytes()[:100])


def command_line(stage: Stage, config: Path) -> list[str]:
    """Returns the words behind `fastpo`; an interrupted command is repeated with the same."""
    if stage in TRAININGS:
        return ["train", str(config), "--resume"]
    if stage == "reference":
        return ["prepare", str(config), "--reference", str(VISITS)]
    return [stage, str(config)]
