"""What a run has exported, given as a model: a denoiser, whose other parts are the base's."""

from __future__ import annotations

from pathlib import Path

from fastpo.config import ModelConfig
from fastpo.config.load import read_yaml
from fastpo.errors import ConfigError, ModelError
from fastpo.system.files import listing

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file that diffusers' pipelines write and look for."""


def holds_an_export(folder: Path) -> bool:
    """Whether a folder is no pipeline, but holds what a run exports: a denoiser or a LoRA."""
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return False
    denoisers = (folder / name / "config.json" for name in ("unet", "transformer"))
    return any(path.is_file() for path in denoisers) or (folder / LORA_FILE).is_file()


def base_of(export: Path) -> ModelConfig:
    """Returns the model that the run of an export was trained from, as its `config.yaml` says.

    Raises:
        ModelError: The export is a LoRA, or none of a run.
    """
    recorded = export.parent / "config.yaml"
    try:
        base = ModelConfig.model_validate(read_yaml(recorded).get("model"))
    except (ConfigError, ValueError):
        base = None
    if (export / LORA_FILE).is_file():
        path = "the base model" if base is None else base.path
        raise ModelError(
            f"model.path: {export} holds a LoRA, no model: set model.path to {path}, and "
            f"model.lora to {export}"
        )
    if base is None:
        raise ModelError(
            f"model.path: {export} holds {listing(export)} alone, and no config.yaml of a run lies "
            "beside it to tell the rest; give a whole pipeline: a copy of the base's folder with "
            "this folder in the place of its own"
        )
    return base
