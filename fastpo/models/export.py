"""What other programs load: adapters or a denoiser's folder in diffusers' own formats."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastpo.models.trained import LORA_FILE as LORA_FILE
from fastpo.system.checksums import folder_checksums
from fastpo.system.manifest import find_damage, write_manifest
from fastpo.system.ownership import Kind, owned_folder, strangers

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser, ModelFamily

EXPORT_MANIFEST = "fastpo-manifest.json"
"""Sizes and checksums of what was exported; no program that loads the weights reads it."""


def _lies_in_a_run(folder: Path) -> bool:
    """Other programs write such folders too; earlier versions' own lie beside a run's metrics."""
    return (folder.parent / "metrics.jsonl").is_file() and not strangers(folder, EXPORT)


EXPORT = Kind(
    "an export",
    rf"{re.escape(LORA_FILE)}|{re.escape(EXPORT_MANIFEST)}|[\w-]+/(config\.json|diffusion_pytorch_model[\w.-]*)",
    _lies_in_a_run,
)


def export_policy(
    family: ModelFamily,
    denoiser: Denoiser,
    target: Path,
    method: str,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes the trained weights whole or not at all, in the place of an earlier run's own.

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
        `target`. Equal weights give equal bytes. `fastpo-manifest.json` in it holds checksums.

    Raises:
        ForeignPathError: `target` is there, and not as a run wrote it.
    """
    with owned_folder(target, EXPORT) as folder:
        family.save(denoiser, folder, method, weights)
        for file in folder.rglob("*.safetensors"):
            sort_metadata(file)
        write_manifest(folder, folder_checksums(folder), EXPORT_MANIFEST)
    return target


def export_damage(folder: Path) -> str | None:
    """Tells what is wrong with an exported folder; None if its files are as they were written.

    An export of a version that wrote no manifest is only looked at: every weights file must be as
    long as its header says, and there must be one.
    """
    if (folder / EXPORT_MANIFEST).exists():
        return find_damage(folder, EXPORT_MANIFEST)
    files = sorted(folder.rglob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            return f"{file} cannot be read ({error})"
    return None if files else f"{folder} is missing or holds no weights"


def export_fingerprint(folder: Path) -> str | None:
    """Returns what tells an export's weights from others'; None where there are none.

    The SHA-256 of its manifest, which holds the files' checksums; of the files themselves where a
    version wrote no manifest.
    """
    manifest = folder / EXPORT_MANIFEST
    files = [manifest] if manifest.is_file() else sorted(folder.rglob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest() if files else None


def peft_layers(denoiser: Denoiser, weights: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Returns the adapters' weights under peft's names (`lora_A`)."""
    return get_peft_model_state_dict(denoiser, None if weights is None else dict(weights))


def lora_layers(denoiser: Denoiser, weights: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Returns the adapters' weights under names that diffusers loads.

    Those of its trainers (`lora.down`) if all layers are the attention's projections, else peft's
    (`lora_A`): diffusers has no names of its own for other layers, and its loader takes one kind
    for all layers of a file, by the first name, and leaves those of the other kind out.
    """
    named = peft_layers(denoiser, weights)
    converted = convert_state_dict_to_diffusers(named)
    return named if any(".lora_A." in name for name in converted) else converted


def lora_metadata(denoiser: Denoiser) -> dict[str, Any]:
    """Returns the adapter's configuration, its sets as sorted lists: their order is random.

    Without dropout: diffusers' loader makes layers in training mode, which would drop in sampling.
    """
    config = {**denoiser.peft_config["default"].to_dict(), "lora_dropout": 0.0}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def sort_metadata(file: Path) -> None:
    """Sorts a file's metadata by key; safetensors writes them in an order that is random."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # blanks behind the header keep the tensors where they are
            opened.seek(8)
            opened.write(text.ljust(size))


def with_weights(denoiser: Denoiser, weights: Mapping[str, Tensor] | None) -> Denoiser:
    """A denoiser of the same architecture around the given tensors; copies nothing.

    Tables that are saved and not trained, such as SD3's positions, are the denoiser's own.
    """
    if weights is None:
        return denoiser
    whole = empty_denoiser(type(denoiser), dict(denoiser.config))
    whole.load_state_dict({**saved_tables(denoiser), **weights}, assign=True)
    return whole


def saved_tables(denoiser: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that a denoiser saves beside its weights, by name."""
    weights = {name for name, _ in denoiser.named_parameters()}
    return {name: t for name, t in denoiser.state_dict().items() if name not in weights}


def empty_denoiser(kind: Any, config: dict[str, Any]) -> Denoiser:
    """The architecture of a diffusers configuration, without memory for weights."""
    with torch.device("meta"):
        return kind.from_config(config)
