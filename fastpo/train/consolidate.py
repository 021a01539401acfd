"""From a run or a checkpoint to a folder that stock diffusers loads, without training's processes.

A checkpoint holds whole weights under every ZeRO stage (`fastpo.train.checkpoint`), so this needs
neither DeepSpeed nor a GPU, and host memory for one copy of the trained weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file

from fastpo.config import Config, parse_config
from fastpo.errors import CheckpointError
from fastpo.models.denoisers import add_lora
from fastpo.models.export import empty_unet, export_policy
from fastpo.models.folder import ModelFolder, unet_config
from fastpo.train.checkpoint import list_checkpoints


def consolidate(source: Path, target: Path, *, average: bool = False) -> Path:
    """Exports a checkpoint as training exports its end.

    Args:
        source: A run's folder, whose newest checkpoint is taken, or a checkpoint's folder.
        target: The folder to make or replace; its layout is `fastpo.models.export.export_policy`'s.
        average: Export the moving average of `train.ema_decay` instead of the last weights.

    Returns:
        `target`.

    Raises:
        CheckpointError: There is no whole checkpoint, or no moving average in it.
        ModelError: The base model's folder is not to be found.
    """
    checkpoint = _find(source)
    try:
        about = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'state.json'} cannot be read: {error}") from None
    config = parse_config(about["config"], where=str(checkpoint / "state.json"))
    file = checkpoint / ("average-export.safetensors" if average else "trainable.safetensors")
    if not file.is_file():
        hint = "; only a run with train.ema_decay keeps one" if average else ""
        raise CheckpointError(f"{checkpoint} holds no {file.name}{hint}")
    weights = load_file(file)
    if average:
        weights = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
    return export_policy(_architecture(config), target, config.train.method, weights)


def _find(source: Path) -> Path:
    if (source / "state.json").is_file():
        return source
    checkpoints = list_checkpoints(source)
    if not checkpoints:
        raise CheckpointError(f"{source} is neither a checkpoint nor a run that has one")
    return checkpoints[-1]


def _architecture(config: Config) -> UNet2DConditionModel:
    """The policy without weights."""
    model = ModelFolder.resolve(config.model)
    unet = empty_unet(unet_config(model.path))
    if config.train.method == "lora":
        with torch.device("meta"):
            add_lora(unet, config.train.lora)
    return unet
