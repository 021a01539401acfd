"""What is fetched from the Hugging Face hub; a path that exists never is."""

from __future__ import annotations

import re
from pathlib import Path

from fastpo.errors import ModelError

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def is_hub_id(path: str) -> bool:
    """Tells whether `path` could name a hub repository (`name` or `owner/name`)."""
    return _HUB_ID.fullmatch(path) is not None


def download_pipeline(path: str, revision: str | None, variant: str | None) -> Path:
    """Fetches a pipeline, of a variant where it has it.

    Raises:
        ModelError: It could not be fetched, or the name is no hub id.
    """
    _require_hub_id("model.path", path)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(path, revision=revision, variant=variant)
    except Exception as error:  # the client also raises its transport's errors
        raise ModelError(
            f"model.path: {path!r} is no local folder and could not be fetched from the hub "
            f"(revision={revision}, variant={variant}): {error}"
        ) from error
    return Path(folder)


def download_configurations(name: str, revision: str | None) -> Path:
    """Fetches all of a pipeline but its weights; errors as `download_pipeline`."""
    _require_hub_id("model.config", name)
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.txt", "*.model"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise ModelError(
            f"model.config: {name!r} is no local folder and could not be fetched from the hub: "
            f"{error}"
        ) from error


def download_vae(path: str, variant: str | None) -> Path:
    """Fetches a VAE, or that of a pipeline; errors as `download_pipeline`."""
    _require_hub_id("model.vae", path)
    from huggingface_hub import snapshot_download

    weights = f"diffusion_pytorch_model*{'.' + variant if variant else ''}*.safetensors"
    names = ["config.json", "diffusion_pytorch_model*.safetensors", weights]
    try:
        patterns = [*names, *(f"vae/{name}" for name in names)]
        return Path(snapshot_download(path, allow_patterns=list(dict.fromkeys(patterns))))
    except Exception as error:
        raise ModelError(
            f"model.vae: {path!r} is no local folder and could not be fetched from the hub: {error}"
        ) from error


def _require_hub_id(key: str, path: str) -> None:
    if not is_hub_id(path):
        raise ModelError(f"{key}: no such folder: {path} (and no hub id either)")
