"""Tiny models in the place of those that shipped configurations name."""

from fastpo.testing.flow import tiny_flux_folder, tiny_sd3_folder
from fastpo.testing.language_pipelines import (
    tiny_flux2_klein_folder,
    tiny_qwen_image_folder,
    tiny_z_image_folder,
)

MAKERS = {
    "Qwen/Qwen-Image": tiny_qwen_image_folder,
    "black-forest-labs/FLUX.2-klein-base-4B": tiny_flux2_klein_folder,
    "black-forest-labs/FLUX.1-dev": tiny_flux_folder,
    "Tongyi-MAI/Z-Image": tiny_z_image_folder,
    "stabilityai/stable-diffusion-3.5-medium": tiny_sd3_folder,
}


def tiny_twin(config, pipelines, folder):
    """The options that put a tiny model of the same family in, whose files are made in `folder`.

    Args:
        config: The shipped configuration.
        pipelines: Folders of tiny models of SD1.5 and SDXL, by family.
        folder: Where others are made.
    """
    make = MAKERS.get(config.model.path)
    if make is not None:
        return {"model.path": make(folder), "prepare.text_length": 32}
    family = "sd15" if "stable-diffusion-v1-5" in config.model.path else "sdxl"
    return {"model.path": pipelines[family], "model.variant": "null", "model.vae": "null"}
