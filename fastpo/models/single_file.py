"""Checkpoints in one `.safetensors` file, as A1111, ComfyUI and civitai have them.

Such a file holds weights alone, under the names of the original code. Configurations, tokenizers
and the schedule come from a diffusers folder, `model.config`; diffusers' tables turn the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpo.errors import ModelError
from fastpo.models.headers import header
from fastpo.models.reports import complain

if TYPE_CHECKING:
    from fastpo.models.folder import ModelFolder

_SECOND = "conditioner.embedders.1.model."


def load_from_file(
    kind: Any, folder: ModelFolder, name: str, file: Path, dtype: torch.dtype | None
) -> Any:
    """Loads one component from a single file, by diffusers' `from_single_file`.

    Args:
        kind: Its class, of diffusers or a text encoder of transformers.
        folder: Gives its configuration.
        name: Its name in the pipeline.
        file: The file.
        dtype: Of the weights; default: as they are stored.
    """
    place, subfolder = _config_place(folder, name)
    options = {"config": place, "subfolder": subfolder, "local_files_only": True}
    if hasattr(kind, "from_single_file"):
        return kind.from_single_file(str(file), torch_dtype=dtype, **options)
    from diffusers.loaders.single_file_utils import (
        create_diffusers_clip_model_from_ldm,
        load_single_file_checkpoint,
    )

    weights = load_single_file_checkpoint(str(file))
    return create_diffusers_clip_model_from_ldm(kind, weights, torch_dtype=dtype, **options)


def check_component(kind: Any, folder: ModelFolder, name: str, file: Path) -> None:
    """Compares names and shapes of a file with a component's architecture; no tensor is read.

    Args:
        kind: The component's class.
        folder: Gives its configuration.
        name: Its name in the pipeline.
        file: The file.

    Raises:
        ModelError: Keys are missing, unexpected or of another shape.
    """
    place, subfolder = _config_place(folder, name)
    with torch.device("meta"):
        model, config = _empty(kind, place, subfolder)
    wanted = model.state_dict()
    found = _converted(model, config, name, header(file), wanted)
    # Buffers that are not saved by now: CLIP's position_ids, in the files of years.
    unsaved = {key for key, _ in model.named_buffers()}
    shapes = [
        (key, tensor.shape, wanted[key].shape)
        for key, tensor in found.items()
        if key in wanted and tensor.shape != wanted[key].shape
    ]
    complaint = complain(
        wanted.keys() - found.keys(), found.keys() - wanted.keys() - unsaved, shapes
    )
    if complaint:
        where = "in model.config" if folder.checkpoint == file else "of the model"
        raise ModelError(
            f"{file} does not fit {name}/config.json {where}: under diffusers' names it {complaint}"
        )


def _config_place(folder: ModelFolder, name: str) -> tuple[str, str | None]:
    """Where a component's configuration is: folder, and subfolder."""
    return (str(folder.vae), None) if name == "vae" else (str(folder.path), name)


def _empty(kind: Any, place: str, subfolder: str | None) -> tuple[nn.Module, Mapping[str, Any]]:
    if hasattr(kind, "from_single_file"):
        config = kind.load_config(place, subfolder=subfolder, local_files_only=True)
        return kind.from_config(config), config
    options = {"subfolder": subfolder, "local_files_only": True}
    return kind(kind.config_class.from_pretrained(place, **options)), {}


def _converted(
    model: nn.Module,
    config: Mapping[str, Any],
    name: str,
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The file's tensors under the names of a component, as diffusers turns them."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    if name == "unet":
        return convert_ldm_unet_checkpoint(weights, config)
    if name == "vae":
        if set(wanted) <= set(weights):
            return dict(weights)
        return convert_ldm_vae_checkpoint(weights, config)
    if name == "text_encoder_2":
        turned = convert_open_clip_checkpoint(model, weights, prefix=_SECOND)
    else:
        turned = convert_ldm_clip_checkpoint(weights)
    inner = "" if hasattr(model, "text_model") else "text_model."
    return {key.removeprefix(inner): tensor for key, tensor in turned.items()}
