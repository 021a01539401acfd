"""What other programs load: a LoRA file or a UNet folder in diffusers' own formats."""

from __future__ import annotations

from pathlib import Path

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict

from fastpo.files import whole_folder


def export_policy(unet: UNet2DConditionModel, target: Path, method: str) -> Path:
    """Writes the trained weights whole or not at all.

    Args:
        unet: The policy, not wrapped by any launcher.
        target: The folder to make: `pytorch_lora_weights.safetensors` for LoRA, which
            `pipeline.load_lora_weights(target)` reads (SD1.5 and SDXL alike), or, for full
            fine-tuning, `unet/`, which
            `UNet2DConditionModel.from_pretrained(target, subfolder="unet")` reads.
        method: `lora` or `full`.

    Returns:
        `target`.
    """
    with whole_folder(target) as folder:
        if method == "lora":
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
            # Without the adapter's metadata a loader takes alpha for the rank.
            StableDiffusionPipeline.save_lora_weights(
                folder,
                unet_lora_layers=layers,
                unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
            )
        else:
            unet.save_pretrained(folder / "unet")
    return target
