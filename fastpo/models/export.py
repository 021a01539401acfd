"""What other programs load: a LoRA file or a UNet folder in diffusers' own formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from torch import Tensor

from fastpo.system.files import whole_folder


def export_policy(
    unet: UNet2DConditionModel,
    target: Path,
    method: str,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes the trained weights whole or not at all.

    Args:
        unet: The policy, not wrapped by any launcher.
        target: The folder to make: `pytorch_lora_weights.safetensors` for LoRA, which
            `pipeline.load_lora_weights(target)` reads (SD1.5 and SDXL alike), or, for full
            fine-tuning, `unet/`, which
            `UNet2DConditionModel.from_pretrained(target, subfolder="unet")` reads.
        method: `lora` or `full`.
        weights: The trained weights by name, where `unet` has only the architecture (its own may
            be shared out or on the meta device); default: the UNet's own.

    Returns:
        `target`.
    """
    with whole_folder(target) as folder:
        if method == "lora":
            own = None if weights is None else dict(weights)
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, own))
            # Without the adapter's metadata a loader takes alpha for the rank.
            StableDiffusionPipeline.save_lora_weights(
                folder,
                unet_lora_layers=layers,
                unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
            )
        else:
            whole = unet if weights is None else _with_weights(unet, weights)
            whole.save_pretrained(folder / "unet")
    return target


def _with_weights(
    unet: UNet2DConditionModel, weights: Mapping[str, Tensor]
) -> UNet2DConditionModel:
    """A UNet of the same architecture around the given tensors; copies nothing."""
    whole = empty_unet(dict(unet.config))
    whole.load_state_dict(weights, assign=True)
    return whole


def empty_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """The architecture of a diffusers configuration, without memory for weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)  # pyright: ignore[reportReturnType]
