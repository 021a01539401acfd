"""Which modules a configuration means: from a folder, the hub's local cache, or packaged files.

Nothing is downloaded and no weight is read; a component is its `config.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fastpo.config import Config, ModelConfig
from fastpo.errors import ModelError
from fastpo.models.folder import ModelFolder, read_json, resolve_vae_folder
from fastpo.models.hub import is_hub_id
from fastpo.models.registry import detect
from fastpo.models.trained import holds_an_export

PACKAGED: dict[str, str] = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/sdxl-turbo": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
}
"""Hub ids whose architecture is known without the hub."""

PACKAGED_VAES: dict[str, str] = {
    "madebyollin/sdxl-vae-fp16-fix": "sdxl",
    "stabilityai/sdxl-vae": "sdxl",
    "stabilityai/sd-vae-ft-mse": "sd15",
    "stabilityai/sd-vae-ft-ema": "sd15",
}
"""The same for VAEs, of which SDXL's and SD1.5's differ in their weights only."""

NAMES = {"sdxl": "SDXL base 1.0", "sd15": "SD1.5"}


@dataclass(frozen=True)
class Architecture:
    """The configurations of a pipeline's parts.

    Attributes:
        family: `sd15` or `sdxl`.
        source: Where they come from, in words.
        unet: `unet/config.json`.
        vae: `vae/config.json`, of `model.vae` where that is given.
        texts: `text_encoder/config.json` and, for SDXL, `text_encoder_2/config.json`.
    """

    family: str
    source: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: tuple[dict[str, Any], ...]


def resolve_architecture(config: Config) -> Architecture:
    """Finds the architecture that `model` names.

    A local folder comes first, then the hub's cache on this machine, then the packaged files.

    Raises:
        ModelError: The folder is not a pipeline that FastPO trains, or a hub id is neither in the
            local cache nor packaged.
    """
    model = config.model
    folder, cached = Path(model.path).expanduser(), False
    known = folder.is_file() or holds_an_export(folder)
    whole = ModelFolder.resolve(model) if known else ModelFolder(folder)
    folder = whole.path
    if not folder.is_dir():
        found = _cached(model.path, "model_index.json", model.revision)
        if found is not None:
            folder, cached = found.parent, True
            whole = ModelFolder(folder)
    if folder.is_dir():
        # Of a hub's model only the files that were asked for are here; its parts are not checked.
        family = (detect(folder) if cached else whole.family).name
        unet = read_json(whole.place("unet") / "unet" / "config.json")
        parts = ("text_encoder", "text_encoder_2")[: 2 if family == "sdxl" else 1]
        texts = tuple(read_json(folder / part / "config.json") for part in parts)
        source = f"the hub's copy on this machine, {folder}" if cached else str(folder)
        own_vae = folder
    else:
        family = _packaged_family(model)
        unet = _packaged(family, "unet")
        texts = tuple(_packaged(family, part) for part in _text_parts(family))
        source = f"the packaged architecture of {NAMES[family]} ({model.path} is not here)"
        own_vae = None
    return Architecture(family, source, unet, _vae_config(model, own_vae, family), texts)


def _text_parts(family: str) -> tuple[str, ...]:
    return ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)


def _packaged_family(model: ModelConfig) -> str:
    known: dict[str, str] = {name.lower(): family for name, family in PACKAGED.items()}
    if model.path.lower() in known:
        return known[model.path.lower()]
    if not is_hub_id(model.path):
        raise ModelError(f"model.path: no such folder: {model.path} (and no hub id either)")
    raise ModelError(
        f"model.path: {model.path!r} is neither a folder nor in the hub's cache on this machine, "
        f"and a plan downloads nothing; known without it: {', '.join(PACKAGED)}. Download it once, "
        "or plan with one of these if the architecture is the same (--set model.path=...)"
    )


def _vae_config(model: ModelConfig, own: Path | None, family: str) -> dict[str, Any]:
    """The VAE's configuration: of `model.vae`, else the pipeline's own (`own`: its folder)."""
    if model.vae is None:
        return (
            _packaged(family, "vae")
            if own is None
            else read_json(resolve_vae_folder(str(own)) / "config.json")
        )
    if own is not None and Path(model.vae).expanduser().is_file():
        return read_json(resolve_vae_folder(str(own)) / "config.json")
    if Path(model.vae).expanduser().is_dir():
        return read_json(resolve_vae_folder(model.vae) / "config.json")
    for name in ("vae/config.json", "config.json"):
        found = _cached(model.vae, name, None)
        if found is not None:
            return read_json(found)
    named = PACKAGED | PACKAGED_VAES
    known: dict[str, str] = {name.lower(): family for name, family in named.items()}
    if model.vae.lower() in known:
        return _packaged(known[model.vae.lower()], "vae")
    raise ModelError(
        f"model.vae: {model.vae!r} is neither a folder nor in the hub's cache on this machine, and "
        f"a plan downloads nothing; known without it: {', '.join(PACKAGED_VAES)}"
    )


def _packaged(family: str, part: str) -> dict[str, Any]:
    file = resources.files("fastpo.models").joinpath("architectures", family, f"{part}.json")
    return json.loads(file.read_text())


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a repository in the hub's cache on this machine; None where it is not there."""
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None
