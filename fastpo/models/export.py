"""What other programs load: adapters or a denoiser's folder in diffusers' own formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from torch import Tensor

from fastpo.system.files import whole_folder

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser, ModelFamily

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file that diffusers' pipelines write and look for."""


def export_policy(
    family: ModelFamily,
    denoiser: Denoiser,
    target: Path,
    method: str,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes the trained weights whole or not at all.

    Args:
        family: The model's family.
        denoiser: The policy, not wrapped by any launcher.
        target: The folder to make: `pytorch_lora_weights.safetensors` for LoRA, which
            `pipeline.load_lora_weights(target)` reads, or, for full fine-tuning, the denoiser's
            folder (`unet/`), which `from_pretrained(target, subfolder="unet")` reads.
        method: `lora` or `full`.
        weights: The trained weights by name, where `denoiser` has only the architecture (its own
            may be shared out or on the meta device); default: the denoiser's own.

    Returns:
        `target`.
    """
    with whole_folder(target) as folder:
        family.save(denoiser, folder, method, weights)
    return target


def lora_layers(denoiser: Denoiser, weights: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Returns the adapters' weights under diffusers' names."""
    own = None if weights is None else dict(weights)
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser, own))


def with_weights(denoiser: Denoiser, weights: Mapping[str, Tensor] | None) -> Denoiser:
    """A denoiser of the same architecture around the given tensors; copies nothing."""
    if weights is None:
        return denoiser
    whole = empty_denoiser(type(denoiser), dict(denoiser.config))
    whole.load_state_dict(weights, assign=True)
    return whole


def empty_denoiser(kind: Any, config: dict[str, Any]) -> Denoiser:
    """The architecture of a diffusers configuration, without memory for weights."""
    with torch.device("meta"):
        return kind.from_config(config)
