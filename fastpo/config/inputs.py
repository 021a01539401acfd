"""The files and folders that a configuration reads: no command may replace or remove them."""

from __future__ import annotations

from pathlib import Path

from fastpo.config.load import Config
from fastpo.system.files import user_path


def input_paths(config: Config) -> list[Path]:
    """Returns what a configuration reads on this machine; a hub id names a path too, if none."""
    named = (
        config.model.path,
        config.model.config,
        config.model.vae,
        config.model.lora,
        *(one.path for one in config.data.each()),
        config.train.deepspeed,
        config.train.verdicts,
        config.prepare.reuse,
        config.evaluate.prompts_file,
        *(text.partition(":")[2] for text in config.evaluate.prompt_sets if ":" in text),
    )
    return [user_path(path) for path in named if path is not None]
