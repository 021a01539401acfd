"""Files of weights by their headers: what is in them, without reading a tensor."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from fastpo.errors import ModelError, one_line

if TYPE_CHECKING:
    from torch import Tensor

_POINTER = b"version https://git-lfs"
# How the names of the parts begin in single files, by the pipeline's component.
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
_LORA = ("lora_", ".lora", "lora.")


def check_weights_file(file: Path, what: str) -> None:
    """Refuses a file that holds no weights, by its first bytes and its header.

    Raises:
        ModelError: It is a Git LFS pointer, or a safetensors file that is cut off or damaged.
    """
    try:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ModelError(
                    f"{what}: {file} is a Git LFS pointer, not the weights; fetch them with "
                    "`git lfs pull`"
                )
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                weights.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{what}: {file} is cut off or no safetensors file ({one_line(error)}); "
            "fetch or save it again"
        ) from None


def header(file: Path) -> dict[str, Tensor]:
    """Returns a safetensors file's tensors on the meta device: names and shapes alone."""
    stat = file.stat()
    return _header(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _header(file: Path, size: int, changed: int) -> dict[str, Tensor]:
    import torch

    with safe_open(file, framework="pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def holds(file: Path, component: str) -> bool:
    """Tells whether a single file has weights of a component, by its name in the pipeline."""
    prefixes = _PREFIXES.get(component, ())
    return bool(prefixes) and any(name.startswith(prefixes) for name in header(file))


def check_single_file(file: Path) -> None:
    """Refuses what is no single-file checkpoint as A1111 and ComfyUI read them.

    Raises:
        ModelError: It is no safetensors file, or holds no UNet; the text says what it holds.
    """
    what = "model.path"
    if file.suffix != ".safetensors":
        raise ModelError(
            f"{what}: {file} is a file; FastPO reads a pipeline's folder, or a checkpoint in one "
            ".safetensors file"
        )
    check_weights_file(file, what)
    if holds(file, "unet"):
        return
    names = sorted(header(file))
    if any(text in name for name in names for text in _LORA):
        held = "adapters (LoRA), and no model"
    elif is_vae(file):
        held = "a VAE alone, which model.vae takes"
    else:
        held = (
            f"no UNet named as in A1111's and ComfyUI's files (its names: {', '.join(names[:3])})"
        )
    raise ModelError(f"{what}: {file} holds {held}")


def is_vae(file: Path) -> bool:
    """Tells whether a file has a VAE's weights, of either naming, with a prefix or without."""
    return any(name.endswith("decoder.conv_in.weight") for name in header(file))


def check_vae_file(file: Path) -> None:
    """Refuses a file that holds no VAE.

    Raises:
        ModelError: It is no safetensors file, or holds none.
    """
    if file.suffix != ".safetensors":
        raise ModelError(f"model.vae: {file} is no .safetensors file, the only kind that is read")
    check_weights_file(file, "model.vae")
    if not is_vae(file):
        raise ModelError(f"model.vae: {file} holds no VAE (its names: {_first_names(file)})")


def _first_names(file: Path) -> str:
    return ", ".join(sorted(header(file))[:3])


def usual_config(file: Path) -> str:
    """Returns the hub's name of the pipeline that diffusers takes a single file's parts from."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return fetch_diffusers_config(header(file))["pretrained_model_name_or_path"]
